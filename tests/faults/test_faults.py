"""Any process or node may die at any time, and the result is the same bits; what was lost is told in a table.

The same command, or Ray's own retry, goes on after every fault. `make faults` runs them all.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.harness import EVERY, TABLE, Driver, Job, Nodes, Row, judged, marked, moment, of_process

pytestmark = [pytest.mark.faults, pytest.mark.slow]

TASKS = r"ray::(embed_timesteps|compare_timesteps|evaluate_shard|summarise|assemble_mixture)"  # named after what they do
TASK, TRAINER, CONTROLLER, TRIAL = TASKS, r"ray::RayTrainWorker", r"ray::TrainController", r"ray::(ImplicitFunc|run_trial)"
AT_WORK = {"analyze": TASK, "specialize": TRAINER, "route": TRIAL, "finetune": TRAINER, "publish": TASK}
"""Stage -> whose process works in it."""


def at_work(driver: Driver, stage: str) -> list[dict]:
    """Units worth killing: trainers have a checkpoint or two by then, and what a search measures beforehand is no trial."""
    return driver.until_work(stage, 0.3 if stage in EVERY else 0.0, "seed" if stage == "route" else "")


# --- one process ------------------------------------------------------------------------------------------------------


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
            units = at_work(driver, stage)
            victim = driver.until(lambda pattern=pattern: driver.workers(pattern), f"{what} in {stage}")[0]
            units = of_process(victim, units)
            lost, started = job.lost(stage, units), time.monotonic()
            victim.kill()
            driver.until_again_at(stage, units)
            rows.append(Row(f"kill -9 of a {what}", moment(stage, units), lost, time.monotonic() - started))
        assert driver.wait() == 0, driver.said
    assert all(row.lost is None or row.lost <= 10 for row in rows)
    assert "Traceback" not in driver.said


# --- a node -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    mark = uuid.uuid4().hex
    found = Nodes(mark, 2)
    yield found
    found.close()
    deadline = time.monotonic() + 60
    while left := marked(mark):
        assert time.monotonic() < deadline, f"still running: {left}"
        time.sleep(0.5)


SLOT = ("resources.custom={slot: 1}",)


def test_a_node_that_is_lost_in_any_stage_costs_what_ran_on_it_since_the_last_checkpoint(job_file, reference, nodes, tmp_path):
    job = Job(job_file, tmp_path / "nodes", nodes.address, SLOT)
    with judged(job, reference) as rows:
        driver = job.start()
        for stage, pattern in AT_WORK.items():
            units = at_work(driver, stage)

            def busy(pattern: str = pattern) -> list:
                return [(n, found[0]) for n in nodes.nodes if (found := driver.workers(pattern, [nodes.raylet(n)]))]

            node, worker = driver.until(busy, f"node at work in {stage}")[0]
            units = of_process(worker, units)
            lost, started = job.lost(stage, units), time.monotonic()
            nodes.lose(node)
            driver.until_again_at(stage, units)
            rows.append(Row("node lost (kill -9 of its raylet)", moment(stage, units), lost, time.monotonic() - started))
        assert driver.wait() == 0, driver.said
    assert all(row.lost is None or row.lost <= 10 for row in rows)
    assert "Traceback" not in driver.said


def test_two_workers_per_expert_go_on_after_one_of_them_is_killed_and_train_what_two_train(job_file, nodes, tmp_path):
    """Bit for bit. (That two train what one trains, but for rounding, is seen in test_training.py.)"""
    sets = (*SLOT, "resources.workers_per_expert=2")
    calm, job = (Job(job_file, tmp_path / name, nodes.address, sets) for name in ("calm", "killed"))
    assert (driver := calm.start("--until", "specialize")).wait() == 0, driver.said
    driver = job.start("--until", "specialize")
    units = driver.until_work("specialize", 0.3)
    victims = driver.until(
        lambda: [w for node in nodes.nodes for w in driver.workers(TRAINER, [nodes.raylet(node)])] if len(units) else [], "two ranks"
    )
    units = of_process(victims[-1], units)
    lost, started = job.lost("specialize", units), time.monotonic()
    victims[-1].kill()
    driver.until_again_at("specialize", units)
    recovered = time.monotonic() - started
    assert driver.wait() == 0, driver.said
    job.assert_clean()
    undisturbed = sorted(calm.run.glob("train/specialize-*/step_0000080/state.safetensors"))
    same = [file.read_bytes() == (job.run / file.relative_to(calm.run)).read_bytes() for file in undisturbed]
    TABLE.append(Row("kill -9 of one of two workers (DDP)", moment("specialize", units), lost, recovered, all(same)))
    assert same and all(same)


def test_what_never_fits_a_cluster_is_refused_at_once_and_nothing_is_written(job_file, nodes, tmp_path):
    for setting, told in (
        ("resources.custom={slot: 2}", "1 worker(s) of 1 CPU and 2 slot never fit this cluster of 3 node(s), the largest with 1 CPUs"),
        ("resources.custom={tpu: 1}", "1 worker(s) of 1 CPU and 1 tpu never fit"),
        ("resources.workers_per_expert=4", "4 worker(s) of 1 CPU never fit"),
    ):
        job = Job(job_file, tmp_path / "never", nodes.address, (setting,))
        driver = job.start()
        assert driver.wait() == 2
        assert told in driver.said
        assert not job.run.exists()
        driver.log.unlink()


# --- the driver -------------------------------------------------------------------------------------------------------


def test_a_driver_that_is_killed_at_twenty_random_moments_loses_at_most_one_interval_each_time(job_file, reference, tmp_path):
    """Three jobs, each killed once in every stage, and one that is killed five times while it starts; each is resumed until it is done."""
    rng, worst, slowest, hit = random.Random(20), 0, 0.0, list[str]()
    rows: list[Row] = []
    for number, wanted in enumerate([list(AT_WORK)] * 3 + [["start"] * 5]):
        job = Job(job_file, tmp_path / f"killed{number}")
        with judged(job, reference) as mine:
            for stage in wanted:
                lost, waited, where = _kill_at_random(rng, job, job.start(), stage)
                worst, slowest = max(worst, lost), max(slowest, waited)
                hit.append(where)
            job.finish()
            if number == 3:
                rows.append(Row("kill -9 of the driver, worst of 20", f"{len(hit)} moments in all stages", worst, slowest))
                mine += rows
    assert worst <= 10
    assert set(AT_WORK) | {"start"} == set(hit), f"kills hit only {sorted(set(hit))}"


def _kill_at_random(rng: random.Random, job: Job, driver: Driver, wanted: str) -> tuple[int, float, str]:
    """(steps lost, seconds until it had been at work, stage): within 6 s of its start, or at a random step of the wanted stage."""
    if wanted == "start":
        time.sleep(rng.uniform(0, 6))
        driver.kill()
        return 0, 0.0, wanted
    part, order = rng.random(), list(AT_WORK)

    def due() -> str:
        found = driver.progress()
        if found.get("at", 0) <= driver.started or not any(unit["step"] < unit["steps"] for unit in found["units"]):
            return ""
        done = sum(unit["step"] for unit in found["units"]) / sum(unit["steps"] for unit in found["units"])
        late = order.index(found["stage"]) > order.index(wanted) if found["stage"] in order else False
        return found["stage"] if late or (found["stage"] == wanted and (wanted not in EVERY or done >= part)) else ""

    stage = driver.until(due, f"work in {wanted}")
    waited = time.time() - driver.started
    units = [unit for unit in driver.units(stage).values() if unit["step"] < unit["steps"]]
    driver.kill()
    return (job.lost(stage, units) or 0) if units else 0, waited, stage


# --- signals, a broken checkpoint, a full disk ------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of its own with 64 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("no right to mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Leave no room on the file system of a folder."""
    ballast = folder / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(65536))
    return ballast


def test_signals_and_a_truncated_checkpoint_end_in_a_line_and_the_same_command_goes_on(job_file, reference, tmp_path):
    job = Job(job_file, tmp_path / "signals")
    with judged(job, reference) as rows:
        driver = job.start()
        units = driver.until_work("specialize", 0.3)
        term, lost, started = moment("specialize", units), job.lost("specialize", units), time.monotonic()
        assert driver.kill(signal.SIGTERM) == 130
        assert driver.said.splitlines()[-1] == "interrupted: the same command continues where this one stopped"

        unit = max(units, key=lambda one: one["step"])
        newest = job.newest_step("specialize", unit["unit"])
        state = job.trainer_of("specialize", unit["unit"]) / f"step_{newest:07d}" / "state.safetensors"
        os.truncate(state, state.stat().st_size // 2)
        driver = job.start()
        driver.until_again_at("specialize", units)
        rows.append(Row("SIGTERM", term, lost, time.monotonic() - started))
        broken = unit["step"] - newest + 10
        rows.append(Row("checkpoint truncated on disk", moment("specialize", [unit]), broken, time.monotonic() - started))
        assert f"passed over: checkpoint {state.parent} cannot be read" in driver.said
        assert [step for step, _ in job.attempts("specialize", unit["unit"])][-1] == newest - 10

        units = driver.until_work("finetune", 0.3)
        interrupted, lost, started = moment("finetune", units), job.lost("finetune", units), time.monotonic()
        assert driver.kill(signal.SIGINT) == 130
        driver = job.start()
        driver.until_again_at("finetune", units)
        rows.append(Row("SIGINT", interrupted, lost, time.monotonic() - started))
        assert driver.wait() == 0, driver.said
    assert all(row.lost is not None and row.lost <= 10 + 10 * ("truncated" in row.fault) for row in rows)


def test_a_full_disk_ends_in_a_line_and_the_same_command_goes_on(job_file, reference, small_disk, tmp_path):
    job = Job(job_file, small_disk / "small", logs=tmp_path)
    with judged(job, reference) as rows:
        driver = job.start()
        units = driver.until_work("finetune", 0.3)
        full, lost, started = moment("finetune", units), job.lost("finetune", units), time.monotonic()
        ballast = fill(small_disk)
        assert driver.wait() == 1
        assert driver.said.splitlines()[-1].startswith("error: ")
        assert "No space left on device" in driver.said.splitlines()[-1]
        assert "same command again" in driver.said.splitlines()[-1]
        assert "Traceback" not in driver.said
        ballast.unlink()
        driver = job.start()
        driver.until_again_at("finetune", units)
        rows.append(Row("storage full", full, lost, time.monotonic() - started))
        assert driver.wait() == 0, driver.said
    assert all(row.lost is not None and row.lost <= 10 for row in rows)


# --- a worker that hangs ----------------------------------------------------------------------------------------------


def test_a_worker_that_hangs_is_ended_with_a_line_that_names_it_and_where_it_stood(job_file, reference, tmp_path):
    """First the images are on a file server that does not answer (a pipe that nobody writes to), then a process is stopped."""
    job = Job(job_file, tmp_path / "hangs", settings=("resources.hang_timeout_s=60",))
    with judged(job, reference) as rows:
        job.finish("--until", "partition")
        [cache] = job.run.glob("cache/images-*.arrow")
        driver = job.start()
        driver.until(lambda: list(job.run.glob("train/specialize-*")), "trainer")
        aside = shutil.move(cache, tmp_path / "aside.arrow")
        os.mkfifo(cache)
        [first, *_] = driver.until(lambda: list(job.run.glob("train/specialize-*/hang-rank0.txt")), "hang that was noticed")
        started = time.monotonic()
        shutil.move(aside, cache)
        stood = first.read_text() if first.exists() else ""
        driver.until_work("specialize", 0.1)
        rows.append(Row("worker hangs while it reads (60 s allowed)", "specialize", 0, time.monotonic() - started))
        assert "no step for 60 s (resources.hang_timeout_s), ended; where it stood: " in driver.said
        assert "specialize t0" in stood
        assert "open_samples" in stood

        units = driver.until_work("finetune", 0.3)
        victim = driver.until(lambda: driver.workers(TRAINER), "train worker in finetune")[0]
        units = of_process(victim, units)
        lost, started = job.lost("finetune", units), time.monotonic()
        victim.suspend()
        driver.until_again_at("finetune", units)
        rows.append(Row("worker stopped (SIGSTOP, 60 s allowed)", moment("finetune", units), lost, time.monotonic() - started))
        assert driver.wait() == 0, driver.said
    assert all(row.lost is not None and row.lost <= 10 for row in rows)
