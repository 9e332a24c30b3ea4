"""Experts whose training is waiting: how they queue, fail and hang on a real Ray, without the noise of two busy cores.

python -m tests.faults.work '{"slots": 2, "hang_timeout_s": 60, "experts": {"a": 4, "b": "fails", "c": "hangs"}}' STORAGE
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from orchestrator.ray_cluster import RayCluster
from workers.contracts import ElasticSettings, ExpertCheckpoint, ExpertTask, Interval, Progress, RunFailed, TrainSettings
from workers.session import Session

TICK_S = 0.1


def wait(session: Session, item: ExpertTask) -> ExpertCheckpoint:
    """As many steps as ``item.train.steps``, a tenth of a second each; ``item.label`` says what else happens."""
    started, steps = time.time(), item.train.steps
    for step in range(steps):
        session.report(Progress(item.stage, item.unit, step, steps))
        time.sleep(max(0.0, started + (step + 1) * TICK_S - time.time()))
        if step == 10 and item.label == "fails":
            raise RunFailed("the loss is nan at step 10: lower specialize.learning_rate")
        if step == 10 and item.label == "breaks":
            raise RuntimeError("a bug of ours")
        if step == 10 and item.label == "hangs":
            time.sleep(1e6)
    return ExpertCheckpoint(item.interval, session.checkpoint_path(steps), steps, 0.0, started, time.time())


def expert(seconds: float, label: str) -> ExpertTask:
    train = TrainSettings(round(seconds / TICK_S), 1, 1e-3, 0, 0.0, 0.0, 1.0, "no", 10, 0.0, 1.0, 0.0, 0.0)
    elastic = ElasticSettings(width_multiple=8, depth=True, importance="taylor")
    return ExpertTask("specialize", "none", "none", (), Interval(0, 10), elastic, train, 0, 1, 0, False, label=label)


def cluster_of(asked: dict[str, Any], storage: Path) -> RayCluster:
    return RayCluster(
        device="cpu",
        cpus=asked.get("cpus", 1),
        gpus=0,
        workers_per_expert=1,
        custom=asked.get("custom", {}),
        local_cpus=asked.get("slots"),
        autoscale_to=asked.get("autoscale_to"),
        timeout_s=600,
        hang_timeout_s=asked.get("hang_timeout_s", 600),
        max_failures=asked.get("max_failures", 0),
        on_progress=lambda event: None,
        on_trainers=lambda found: None,
        folder=storage,
    )


def main(asked: dict[str, Any], storage: Path) -> dict[str, Any]:
    cluster = cluster_of(asked, storage)
    done: dict[str, tuple[float, float]] = {}
    error = ""
    jobs = {name: expert(5, kind) if isinstance(kind, str) else expert(kind, "") for name, kind in asked["experts"].items()}
    try:
        cluster.fit_all(wait, jobs, storage, lambda name, found: done.update({name: (found.started, found.ended)}))
    except RunFailed as failed:
        error = str(failed)
    slots = cluster.slots()
    [call] = cluster.calls
    cluster.close()
    return {"done": done, "error": error, "slots": slots, "call": call.to_json()}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]), Path(sys.argv[2]))))
