"""Any process or node may die at any time, and the result is the same bits; what was lost is told in a table.

The same command, or Ray's own retry, goes on after every fault. `make faults` runs them all.
"""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.faults.harness import EVERY, Job, Row, judged

pytestmark = [pytest.mark.faults, pytest.mark.slow]

TASK, TRAINER, CONTROLLER, TRIAL = r"ray::run_task", r"ray::RayTrainWorker", r"ray::TrainController", r"ray::(ImplicitFunc|run_trial)"


def steps_lost(job: Job, stage: str, unit: dict[str, Any]) -> int | None:
    """How many steps a trainer that dies now makes again. None for work that has no steps to lose."""
    return max(0, unit["step"] - job.newest_step(stage, unit["unit"])) if stage in EVERY else None


def moment(stage: str, unit: dict[str, Any]) -> str:
    return f"{stage} {unit['unit']} {unit['step']}/{unit['steps']}"[:33]


def test_killed_workers_controllers_and_trials_are_started_again_by_the_same_command(job_file, reference, tmp_path):
    job = Job(job_file, tmp_path / "processes")
    with judged(job, reference) as rows:
        driver = job.start()
        for stage, what, pattern in (
            ("analyze", "task", TASK),
            ("specialize", "train worker", TRAINER),
            ("route", "Tune trial", TRIAL),
            ("finetune", "train controller", CONTROLLER),
            ("publish", "task", TASK),
        ):
            part = 0.25 if stage in EVERY else 0.0
            unit = driver.until_work(stage, part)
            victim = driver.until(lambda pattern=pattern: driver.workers(pattern), f"{what} in {stage}")[0]
            lost, started = steps_lost(job, stage, unit), time.monotonic()
            victim.kill()
            driver.until_again_at(stage, unit)
            rows.append(Row(f"kill -9 of a {what}", moment(stage, unit), lost, time.monotonic() - started))
        assert driver.wait() == 0, driver.said
    assert all(row.lost is None or row.lost <= 10 for row in rows)
    assert "Traceback" not in driver.said
