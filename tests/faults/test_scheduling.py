"""Experts on fewer slots than there are experts, on real Ray: they queue, they fail alone, and take the time that was predicted."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.scheduling import least_s, longest_first, makespan_s
from orchestrator.simulation import Phase
from tests.faults.harness import FAIR, MARK, ROOT, TABLE, Row, marked_pids

pytestmark = [pytest.mark.faults, pytest.mark.slow]


def run(asked: dict[str, Any], storage: Path, address: str | None = None) -> dict[str, Any]:
    """What `tests.faults.work` prints."""
    storage.mkdir(parents=True, exist_ok=True)
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"PYTHONPATH": str(ROOT)}
    environment |= FAIR | ({"RAY_ADDRESS": address, "RAY_AUTH_MODE": "disabled"} if address else {})
    words = [sys.executable, "-m", "tests.faults.work", json.dumps(asked), str(storage)]
    for _ in range(5):
        done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=1800, check=False)
        if "no Ray could be started on this machine" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def most_at_once(spans: list[tuple[float, float]]) -> int:
    return max(sum(a <= start < b for a, b in spans) for start, _ in spans)


@pytest.fixture(scope="module")
def queue(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Seven experts of known length on two slots, the longest first, and two that fail among them."""
    seconds = {"a": 9.0, "b": 24.0, "c": 15.0, "d": 6.0, "e": 18.0, "f": 12.0, "g": 9.0}
    order = longest_first(seconds)
    experts: dict[str, Any] = {name: seconds[name] for name in order}
    return {"seconds": [experts[name] for name in order]} | run({"slots": 2, "experts": experts}, tmp_path_factory.mktemp("queue"))


def test_seven_experts_on_two_slots_queue_the_longest_first_and_all_of_them_end(queue):
    assert not queue["error"]
    lengths = [end - start for start, end in sorted(queue["done"].values())]
    assert sorted(lengths[:2], reverse=True) + lengths[2:] == pytest.approx(sorted(lengths, reverse=True), abs=0.5)
    assert len(queue["done"]) == 7
    assert most_at_once(list(queue["done"].values())) == 2


def test_the_makespan_is_within_a_twentieth_and_the_spread_of_start_ups_of_the_best_possible(queue):
    """An expert holds its slot from the end of the one before it, start-up included; the best is found by trying every assignment. It knows
    how long each will take to start, which nobody knows beforehand: what start-ups differ by is allowed on top.
    """
    spans = sorted(queue["done"].values())
    began = max(end for _, end in spans) - queue["call"]["wall_s"]
    ends, held, startups = [began, began], [], []
    for start, end in spans:  # by start: each took the slot that had become free first
        slot = ends.index(min(ends))
        held.append(end - ends[slot])
        startups.append(start - ends[slot])
        ends[slot] = end
    best = min(
        max(sum(s for s, at in zip(held, places, strict=True) if at == slot) for slot in range(2))
        for places in itertools.product(range(2), repeat=7)
    )
    least, wall_s = least_s(queue["seconds"], 2), queue["call"]["wall_s"]
    told = f"{wall_s:.1f} s, the best {best:.1f}; start-ups {min(startups):.1f} to {max(startups):.1f} s, least work {least:.1f} s"
    print("\n" + told)
    assert wall_s <= 1.05 * best + max(startups) - min(startups), told


def test_the_simulation_predicts_a_real_run_within_fifteen_percent(queue, tmp_path):
    """Start-up is measured on one slot, with other experts; the work is known."""
    alone = run({"slots": 1, "experts": {"x": 8.0, "y": 8.0}}, tmp_path)["call"]
    predicted, startup, _ = Phase(tuple(queue["seconds"]), 0, alone["startup_s"], True).on(2)
    real = queue["call"]["wall_s"]
    least = least_s(queue["seconds"], 2)
    told = f"{predicted:.1f} s predicted, {startup:.1f} of them start-up; {real:.1f} s in fact, least work {least:.1f} s"
    print("\n" + told)
    assert predicted == pytest.approx(real, rel=0.15), told
    assert queue["call"]["busy_s"] == pytest.approx(makespan_s(queue["seconds"], 2), rel=0.05)


def test_a_failing_expert_does_not_stop_the_others_and_the_error_names_it_its_log_and_how_to_go_on(tmp_path):
    experts = {"good-one": 4, "sick": "fails", "stuck": "hangs", "broken": "breaks", "good-two": 4}
    found = run({"slots": 2, "hang_timeout_s": 20, "experts": experts}, tmp_path)
    assert set(found["done"]) == {"good-one", "good-two"}
    error = found["error"]
    assert error.startswith("3 of 5 runs failed: ")
    assert f"sick: the loss is nan at step 10: lower specialize.learning_rate (log: {tmp_path}/sick/failure.txt)" in error
    assert f"stuck: specialize hangs t0000-0010: no step for 20 s (resources.hang_timeout_s), ended; where it stood: {tmp_path}" in error
    assert f"broken: a bug of ours (log: {tmp_path}/broken/failure.txt)" in error
    assert error.endswith(f"Checkpoints are under {tmp_path}; the same command again continues from them")
    assert " in wait\n" in (tmp_path / "stuck" / "hang-rank0.txt").read_text(), "where it slept"
    assert "a bug of ours" in (tmp_path / "broken" / "failure.txt").read_text()
    assert not list((tmp_path / "good-one").glob("*.txt"))
    TABLE.append(Row("three of five experts fail, hang, break", "the other two end", None, 0.0))


# --- a cluster that grows ---------------------------------------------------------------------------------------------


@pytest.fixture
def growing(tmp_path) -> Iterator[str]:
    """The address of a head without workers, whose autoscaler starts nodes of one slot, two at most: Ray's own, as processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    provider = {"type": "fake_multinode", "gcs_address": f"127.0.0.1:{port}", "disable_node_updaters": True}
    node = {"node_config": {}, "resources": {"CPU": 1, "slot": 1}, "min_workers": 0, "max_workers": 2}
    head = {"node_config": {}, "resources": {"CPU": 0}, "max_workers": 0}
    config: dict[str, Any] = {
        "cluster_name": "growing",
        "max_workers": 2,
        "idle_timeout_minutes": 30,
        "upscaling_speed": 1.0,
        "provider": {**provider, "disable_launch_config_check": True},
        "available_node_types": {"ray.head.default": head, "worker": node},
        "head_node_type": "ray.head.default",
    }
    for key in ("auth", "docker", "file_mounts"):  # `ray up` would fill these in
        config[key] = {}
    for key in ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray"):
        config[f"{key}_commands"] = []
    config |= {"cluster_synced_files": [], "file_mounts_sync_continuously": False, "rsync_exclude": [], "rsync_filter": []}
    (tmp_path / "autoscaling.json").write_text(json.dumps(config))
    mark = uuid.uuid4().hex
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    environment |= FAIR | {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_AUTH_MODE": "disabled", MARK: mark}
    environment |= {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    words = ["start", "--head", "--block", f"--port={port}", "--num-cpus=0", "--dashboard-port=0", "--include-dashboard=true"]
    words += ["--object-store-memory=100000000", f"--autoscaling-config={tmp_path / 'autoscaling.json'}", "--disable-usage-stats"]
    with (tmp_path / "head.log").open("w") as log:
        ray = [sys.executable, "-c", "from ray.scripts.scripts import main; main()"]
        process = subprocess.Popen([*ray, *words], env=environment, stdout=log, stderr=log, start_new_session=True)
    deadline = time.monotonic() + 120
    while True:
        with socket.socket() as probe:
            if not probe.connect_ex(("127.0.0.1", port)):
                break
        assert time.monotonic() < deadline and process.poll() is None, (tmp_path / "head.log").read_text()
        time.sleep(0.5)
    yield f"127.0.0.1:{port}"
    for pid in [process.pid, *marked_pids(mark)]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def test_a_cluster_without_workers_grows_to_as_many_as_are_allowed(growing, tmp_path):
    """Nothing fits when the experts are handed out: what waits makes the autoscaler start nodes."""
    asked = {"experts": {"a": 6, "b": 6, "c": 6}, "custom": {"slot": 1}, "autoscale_to": 2}
    found = run(asked, tmp_path / "grown", growing)
    assert not found["error"]
    assert found["slots"] == 2
    spans = list(found["done"].values())
    assert len(spans) == 3
    assert most_at_once(spans) == 2
