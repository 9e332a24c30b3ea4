"""Experts on fewer slots than there are experts, on real Ray: they queue, they fail alone, and take the time that was predicted."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator.scheduling import least_s, longest_first, makespan_s
from orchestrator.simulation import Phase
from tests.faults.harness import ROOT, TABLE, Row

pytestmark = [pytest.mark.faults, pytest.mark.slow]


def run(asked: dict[str, Any], storage: Path, address: str | None = None) -> dict[str, Any]:
    """What `tests.faults.work` prints."""
    storage.mkdir(parents=True, exist_ok=True)
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"PYTHONPATH": str(ROOT)}
    environment |= {"RAY_ADDRESS": address} if address else {}
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.work", json.dumps(asked), str(storage)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=1800,
        check=False,
    )
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


def test_seven_experts_on_two_slots_queue_and_all_of_them_end(queue):
    assert not queue["error"]
    assert len(queue["done"]) == 7
    assert most_at_once(list(queue["done"].values())) == 2


def test_the_makespan_beyond_start_up_is_within_a_twentieth_of_the_best_possible(queue):
    """Where an expert ran is told by when it ran: each goes to the slot that became free before it."""
    spans, ends = sorted(queue["done"].values()), [0.0, 0.0]
    work = [0.0, 0.0]
    for start, end in spans:
        slot = min(range(2), key=lambda i: ends[i])
        ends[slot], work[slot] = end, work[slot] + end - start
    best = min(
        max(sum(s for s, at in zip(queue["seconds"], places, strict=True) if at == slot) for slot in range(2))
        for places in itertools.product(range(2), repeat=7)
    )
    assert max(work) <= 1.05 * best, f"{max(work):.1f} s of work on one slot, the best schedule has {best:.1f}"


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
