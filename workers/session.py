"""The Ray seam on the worker's side: device, rank, resume, report, gauges. A task is ``task(session, item)`` and never sees Ray itself."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from workers.contracts import MixturePlan, Progress, RunFailed
from workers.files import finished
from workers.mirror import Mirror
from workers.nodes import require_storage
from workers.trials import SearchTrial
from workers.watchdog import Watchdog

PROGRESS_ACTOR = "diffpruning-progress"
UNIT_GAUGES = {
    "loss": "Training loss, mean over the sub-networks of a step",
    "images_per_s": "Images per second, over all workers of the unit",
    "step": "Steps made",
    "steps": "Steps in all",
    "eta_s": "Seconds until the unit is done",
}
"""Per run, stage and unit (an expert, or a part of a stage's work). In Ray's metrics: ray_diffpruning_NAME."""
PLAN_GAUGES = {
    "budget_ratio": "The budget, as a part of the dense model's cost",
    "cost_ratio": "Cost of the plan found for the budget, as a part of the dense model's",
    "budget_reached": "1 once a plan within the budget is found",
}
"""Per run, budget, sampler and agent."""
REFRESH_S = 5.0
"""Ray forgets a gauge that is not set anew between two exports, which are 10 s apart."""


@dataclass
class Session:
    """Where a task runs. This class is the session without Ray; checkpoints lie in ``folder/step_NNNNNNN``."""

    folder: str = ""
    device: str = "cpu"
    rank: int = 0
    world_size: int = 1
    on_progress: Callable[[Progress], None] = field(default=lambda event: None)
    broken: list[str] = field(default_factory=list)
    """Checkpoints that the last ``resume`` passed over, and why."""

    def report(self, event: Progress) -> None:
        """Send one line of progress; never waits for anybody."""
        if self.rank == 0:
            self.on_progress(event)

    def report_search(self, trial: SearchTrial) -> None:
        """Tell how a plan search goes; whoever compares trials may end this one here."""

    def checkpoint_path(self, step: int) -> str:
        return f"{self.folder}/step_{step:07d}"

    @contextlib.contextmanager
    def resume(self) -> Iterator[Path | None]:
        """The folder of the newest readable checkpoint of this run, or None; what killed processes left half-written goes."""
        from workers import checkpoint

        found, broken = None, list[str]()
        if self.rank == 0:
            checkpoint.sweep(Path(self.folder))
            found = checkpoint.latest(Path(self.folder), broken)
        found, self.broken = self.agree((found, broken))  # a file server may show another rank an older state
        yield found

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Make ``write(folder)``'s files the checkpoint of ``step``, all or nothing; rank 0 writes, and the newest two are kept."""
        from workers import checkpoint

        if self.rank == 0:
            checkpoint.save_step(Path(self.folder), step, write)

    def agree(self, value: Any) -> Any:
        """Rank 0's value, on every rank: what a GPU computes may differ in its last bit from rank to rank."""
        if self.world_size == 1:
            return value
        import torch.distributed

        values = [value]
        torch.distributed.broadcast_object_list(values, src=0)
        return values[0]


class RayTaskSession(Session):
    """Inside a Ray task: progress goes straight to the driver's progress actor."""

    def __init__(self, device: str, folder: str = "", rank: int = 0, world_size: int = 1):
        self.mailbox = _mailbox()
        super().__init__(folder=folder, device=device, rank=rank, world_size=world_size, on_progress=self._send)

    def _send(self, event: Progress) -> None:
        if self.mailbox is not None:
            self.mailbox.update.remote(event.to_json())

    def report_search(self, trial: SearchTrial) -> None:
        if trial.plan is not None and self.mailbox is not None:
            self.mailbox.planned.remote(trial.plan.to_json())


class RayTrialSession(RayTaskSession):
    """Inside a Tune trial: every report goes to its scheduler, which may end the trial in it."""

    def __init__(self, device: str, trial: str):
        super().__init__(device)
        self.trial = trial

    def report_search(self, trial: SearchTrial) -> None:
        from ray import tune

        super().report_search(trial)
        # the scheduler ends a trial at 100, which is to be the report that holds the plan
        percent = 100 if trial.plan else min(99, int(100 * trial.progress))
        outcome = json.dumps(trial.to_json())
        tune.report({"trial": self.trial, "percent": percent, "relative_loss": trial.relative_loss, "outcome": outcome})


class RayTrainSession(RayTaskSession):
    """Inside a Ray Train worker. Checkpoints are our own, as without Ray: a snapshot of Ray's lags behind what was saved, names
    checkpoints that may be broken, and is not written in one piece."""

    def __init__(self, device: str, folder: str, rank: int, world_size: int, first: Progress, hang_timeout_s: float):
        """``first``: the state before the first report."""
        super().__init__(device, folder, rank, world_size)
        self.last = first
        what = f"{first.stage} {first.unit}" + (f", rank {rank}" if world_size > 1 else "")
        self.watchdog = Watchdog(hang_timeout_s, Path(folder) / hang_file(rank), what, self.on_hang)

    def report(self, event: Progress) -> None:
        self.watchdog.beat()
        self.last = event
        super().report(event)

    def on_hang(self, text: str) -> None:
        self.on_progress(replace(self.last, note=text))
        finished(self.watchdog.file)
        time.sleep(1)  # the message is on its way, and so is the end


class ProgressMailbox:
    """Named actor: workers put in, the driver takes out. What passes through becomes gauges among Ray's metrics."""

    def __init__(self, run: str) -> None:
        from ray.util.metrics import Gauge

        self.run = run
        self.events: list[dict[str, Any]] = []
        of_unit, of_plan = ("run", "stage", "unit"), ("run", "budget", "sampler", "agent")
        self.gauges = {name: Gauge(f"diffpruning_{name}", text, of_unit) for name, text in UNIT_GAUGES.items()}
        self.gauges |= {name: Gauge(f"diffpruning_{name}", text, of_plan) for name, text in PLAN_GAUGES.items()}
        self.shown: dict[tuple[str, ...], tuple[dict[str, float], dict[str, str]]] = {}
        self.refreshed = 0.0

    def __repr__(self) -> str:
        """What the dashboard calls this actor."""
        return f"progress of {self.run}"

    def update(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        told = Progress.from_json(event)
        left = 0.0 if told.step == told.steps else told.eta_s
        values = {"loss": told.loss, "images_per_s": told.images_per_s, "step": told.step, "steps": told.steps, "eta_s": left}
        for key in [key for key, (_, tags) in self.shown.items() if tags.get("stage", told.stage) != told.stage]:
            del self.shown[key]
        self._show(values, {"stage": told.stage, "unit": told.unit})

    def planned(self, found: dict[str, Any]) -> None:
        """A search has ended with this plan."""
        plan = MixturePlan.from_json(found)
        budget = plan.budget
        values = {
            "budget_ratio": budget.ratio,
            "cost_ratio": plan.cost_ratio,
            "budget_reached": int(plan.cost_ratio <= budget.ratio + 1e-9),
        }
        self._show(values, {"budget": budget.name, "sampler": f"{budget.scheduler}:{budget.steps}", "agent": plan.agent})

    def _show(self, values: Mapping[str, float | None], tags: dict[str, str]) -> None:
        told = {name: float(value) for name, value in values.items() if value is not None}
        self.shown[tuple(tags.values())] = (told, {"run": self.run, **tags})
        for name, value in told.items():
            self.gauges[name].set(value, {"run": self.run, **tags})

    def drain(self) -> list[dict[str, Any]]:
        if time.monotonic() - self.refreshed > REFRESH_S:
            self.refreshed = time.monotonic()
            for values, tags in self.shown.values():
                for name, value in values.items():
                    self.gauges[name].set(value, tags)
        events, self.events = self.events, []
        return events


def _mailbox() -> Any:
    """The driver's progress actor, or None if nobody watches."""
    import ray

    try:
        return ray.get_actor(PROGRESS_ACTOR, namespace=ray.get_runtime_context().namespace)
    except ValueError:
        return None


def run_train_worker(config: dict[str, Any]) -> dict[str, Any]:
    """The train function of every TorchTrainer: one expert, in the session that Ray prepared.

    Returns {"expert": ...}, or {"failed": ...} for what no other attempt would change: Ray tries again after every exception.
    """
    import ray.train

    context, item = ray.train.get_context(), config["item"]
    require_storage(config["marker"], config["mirror"], (config["folder"], item))
    _threads()
    world_size, folder = context.get_world_size(), Path(config["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    first = Progress(item.stage, item.unit, 0, item.train.steps)
    session = RayTrainSession(config["device"], str(folder), context.get_world_rank(), world_size, first, config["hang_timeout_s"])
    try:
        with session.watchdog:
            return {"expert": config["task"](session, item).to_json()}
    except (RunFailed, OSError) as error:
        if world_size > 1:  # the others wait in a collective for this one, whose exception ends them all
            raise
        if isinstance(error, OSError) and error.errno not in FINAL_ERRNOS:
            raise
        return {"failed": failure(error)}


FINAL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


def hang_file(rank: int) -> str:
    """Beside the checkpoints: where a worker stood that was ended because it made no step."""
    return f"hang-rank{rank}.txt"


def failure(error: RunFailed | OSError) -> dict[str, Any]:
    """An error as JSON, from which ``raised`` makes it again."""
    if isinstance(error, OSError):
        return {"kind": "OSError", "arguments": [error.errno, error.strerror, error.filename and str(error.filename)]}
    return {"kind": "RunFailed", "arguments": [str(error)]}


def raised(found: dict[str, Any]) -> Exception:
    return (OSError if found["kind"] == "OSError" else RunFailed)(*found["arguments"])


def run_task(
    task: Callable[[Session, Any], Any], device: str, item: Any, marker: str = "", mirror: Mirror | None = None
) -> tuple[Any, float]:
    """The body of every Ray task: its result, and the seconds that it took. ``marker`` and ``mirror``: see `workers.nodes`."""
    require_storage(marker, mirror, item)
    _threads()
    started = time.time()
    return task(RayTaskSession(device), item), time.time() - started


def _threads() -> None:
    """Use the CPUs that Ray gave this process, no more: two trainers on two cores must not start four threads each."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 1))


def run_trial(
    config: dict[str, Any],
    task: Callable[[Session, Any], Any],
    items: dict[str, Any],
    device: str,
    marker: str = "",
    mirror: Mirror | None = None,
) -> None:
    """The trainable of the plan search: one trial is one combination of axes (budget, agent, seed), whose name is ``config["trial"]``."""
    key = config["trial"]
    require_storage(marker, mirror, items[key])
    _threads()
    session = RayTrialSession(device, key)
    session.report_search(task(session, items[key]))


def local_device() -> str:
    """cuda if this machine has a usable one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def local_gpus() -> int:
    """How many this machine has that torch can use."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
