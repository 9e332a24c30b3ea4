"""How long a job would take: what more GPUs change, what was measured, and what is asked wrongly."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner, Result

from orchestrator import simulation
from orchestrator.cli import main
from orchestrator.config import load_job
from orchestrator.simulation import Phase, parse_counts
from orchestrator.store import RunStore
from orchestrator.workload import experts_of, workload
from workers.contracts import InputError


def diffpruning(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments), catch_exceptions=False)


@pytest.mark.parametrize(
    ("text", "counts"),
    [("8", [8]), ("1,2,6", [1, 2, 6]), ("1-1024", [2**i for i in range(11)]), ("3-20,1", [1, 3, 6, 12, 20]), ("5-5", [5])],
)
def test_numbers_of_gpus_are_listed_or_doubled(text, counts):
    assert parse_counts(text) == counts


@pytest.mark.parametrize("text", ["0", "", "8-", "-3", "x", "2000", "1.5", "1,,2", "1-2-3"])
def test_other_numbers_are_refused_with_examples(text):
    with pytest.raises(InputError, match="give numbers of GPUs from 1 to 1024, e.g. 8 or 1,2,6 or 1-1024"):
        parse_counts(text)


def test_units_of_their_own_start_in_every_round_and_tasks_once():
    units = (4.0, 4.0, 4.0, 4.0)
    assert Phase(units, 0, 10.0, each=True).on(2) == (28.0, 20.0, 8.0)
    assert Phase(units, 0, 10.0, each=False).on(2) == (18.0, 10.0, 8.0)


def test_work_that_can_be_cut_spreads_over_all_slots_but_no_finer_than_its_pieces():
    phase = Phase((60.0,), 12, 0.0, each=False)
    assert [phase.on(slots)[0] for slots in (1, 2, 3, 6, 12, 100)] == pytest.approx([60, 30, 20, 10, 5, 5])


SETTINGS = ("partition.experts=8", "router.agents=[uniform]", "finetune.compare=[]", "budgets=[{ratio: 0.5}]")


class Table:
    """Costs of a model with 1e12 MACs and no sites."""

    dense = SimpleNamespace(macs=1e12)
    space = SimpleNamespace(sites=())


@pytest.fixture
def prepared(tmp_path: Path) -> SimpleNamespace:
    job = load_job("quickstart", SETTINGS)
    stages = ("analyze", "partition", "specialize", "route", "finetune", "publish")
    pipeline = SimpleNamespace(fingerprints={stage: f"{i}" * 64 for i, stage in enumerate(stages)})
    return SimpleNamespace(job=job, table=Table(), images=1000, store=RunStore(tmp_path), pipeline=pipeline)


def test_more_gpus_never_take_longer_and_eight_experts_need_no_more_than_eight_but_for_analyze(prepared):
    rows = simulation.simulate(prepared, [2**i for i in range(11)], 1.0, 1)
    for fewer, more in itertools.pairwise(rows):
        assert more["seconds"] <= fewer["seconds"]
        assert more["of_ideal"] >= 0.999
    eight, most = rows[3], rows[-1]
    for stage in ("specialize", "route", "finetune"):
        assert eight["stages"][stage] == most["stages"][stage]
    assert eight["stages"]["analyze"] > most["stages"]["analyze"]
    assert rows[0]["busy"] > 0.9


def test_half_a_gpu_per_worker_is_twice_the_slots_and_two_workers_per_expert_half_the_time(prepared):
    whole = simulation.simulate(prepared, [4], 1.0, 1)[0]
    assert simulation.simulate(prepared, [2], 1.0, 0.5)[0]["stages"] == whole["stages"]
    startup, alone = simulation.TRAINER_STARTUP_S, simulation.simulate(prepared, [16], 1.0, 1)[0]
    prepared.job = load_job("quickstart", [*SETTINGS, "resources.workers_per_expert=2"])
    pairs = simulation.simulate(prepared, [16], 1.0, 1)[0]
    assert pairs["stages"]["specialize"] - startup == pytest.approx((alone["stages"]["specialize"] - startup) / 2, rel=1e-3)
    with pytest.raises(InputError, match=r"--simulate 1: 2 worker\(s\) of 1 GPUs need more"):
        simulation.simulate(prepared, [1], 1.0, 1)


def test_what_was_measured_replaces_what_is_assumed_and_sets_the_pace_of_the_rest(prepared):
    store, fingerprint = prepared.store, prepared.pipeline.fingerprints["specialize"]
    folder = store.stage_folder("specialize", fingerprint)
    folder.mkdir(parents=True)
    call = {"task": "train_expert", "slots": 2, "wall_s": 420.0, "startup_s": 5.0, "each": True, "units": [100.0] * 8}
    store.finish("specialize", fingerprint, {}, 0.0, 420.0, [call])
    [row] = simulation.simulate(prepared, [2], 1.0, 1)
    assert row["measured"] == ["specialize"]
    assert row["stages"]["specialize"] == 420.0
    works = workload(prepared.job, prepared.table, prepared.images)
    per_expert = works["finetune"][0].units[0] / works["specialize"][0].units[0] * 100
    assert row["stages"]["finetune"] == pytest.approx(4 * (per_expert + 5.0), abs=0.1)
    store.finish("specialize", fingerprint, {}, 0.0, 420.0, [call], resumed=True)
    assert simulation.simulate(prepared, [2], 1.0, 1)[0]["measured"] == [], "a resumed stage measured only its end"


def test_the_work_of_a_stage_grows_with_what_it_does(prepared):
    before = workload(prepared.job, prepared.table, prepared.images)
    assert experts_of(prepared.job) == len(before["specialize"][0].units) == 8
    longer = prepared.job.model_copy(update={"finetune": prepared.job.finetune.model_copy(update={"steps": 120})})
    after = workload(longer, prepared.table, prepared.images)
    assert after["finetune"][0].units[0] == pytest.approx(2 * before["finetune"][0].units[0])
    assert {stage for stage in before if before[stage] != after[stage]} == {"finetune"}


def test_the_command_prints_a_row_per_number_and_from_where_on_more_do_not_help(tmp_path):
    where = ("--set", f"storage.path={tmp_path / 'runs'}", "--set", f"registry.path={tmp_path / 'registry'}")
    done = diffpruning("plan", "quickstart", *where, "--simulate", "1-1024")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[:12]] == ["workers", *(str(2**i) for i in range(11))]
    assert "from assumed speeds: orders of magnitude" in lines
    assert "hardly help" in lines[-1]
    [row] = json.loads(diffpruning("plan", "quickstart", *where, "--simulate", "4", "--json").stdout)
    assert row["gpus"] == 4
    assert row["seconds"] == pytest.approx(sum(row["stages"].values()), abs=0.5)
    assert not list(tmp_path.iterdir())


# --- capacity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("resources.cpus_per_worker=1000", "1 worker(s) of 1000 CPUs never fit a Ray on this machine (RAY_ADDRESS is not set)"),
        ("resources.workers_per_expert=1000", "1000 worker(s) of 1 CPU never fit"),
        ("resources.custom={slot: 1}", "1 worker(s) of 1 CPU and 1 slot never fit"),
        ("resources.custom={slot: 0}", "resources.custom.slot is 0: must be greater than 0"),
        ("resources.custom={GPU: 1}", "GPU is no custom resource: see cpus_per_worker and gpus_per_worker"),
        ("resources.gpus_per_worker=1.5", "resources.gpus_per_worker is 1.5: must be whole, or a fraction of one GPU"),
        ("resources.hang_timeout_s=0", "resources.hang_timeout_s is 0: must be greater than 0"),
    ],
)
def test_what_can_never_run_is_refused_in_one_line_before_anything_is_read(setting, told, tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    done = diffpruning("run", "quickstart", "--set", "model.path=/no/such/model", "--set", f"storage.path={tmp_path}", "--set", setting)
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert told in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("there", "settings", "told"),
    [
        (0, ("resources.device=cuda",), "resources.device is cuda, but this machine has no usable GPU: set it to cpu"),
        (2, ("resources.device=cuda", "resources.gpus_per_worker=3"), "1 worker(s) of 1 CPU and 3 GPUs never fit a Ray on this machine"),
        (1, ("resources.device=auto", "resources.gpus_per_worker=2"), "1 worker(s) of 1 CPU and 2 GPUs never fit a Ray on this machine"),
    ],
)
def test_gpus_that_this_machine_lacks_are_told_by_plan_and_refused_by_run_before_ray_starts_or_anything_is_written(
    there, settings, told, tmp_path, monkeypatch
):
    import torch

    def no_ray(*_: object, **__: object) -> None:
        raise AssertionError("a cluster was started")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    monkeypatch.setattr("orchestrator.cli_driver._cluster", no_ray)
    where = [word for setting in (f"storage.path={tmp_path}", f"registry.path={tmp_path}", *settings) for word in ("--set", setting)]
    for command in (("run",), *([("run", "--inline")] if there == 0 else [])):
        done = diffpruning(*command, "quickstart", *where)
        assert done.exit_code == 2
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        assert told in done.stderr
        assert not list(tmp_path.iterdir())
    planned = diffpruning("plan", "quickstart", *where)
    assert planned.exit_code == 0, planned.output
    assert f"warning: a run here would be refused: {told if there == 0 else 'resources: ' + told}" in planned.stdout
    assert not list(tmp_path.iterdir())


def test_a_cluster_is_asked_before_the_run_folder_is_claimed(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    done = diffpruning("run", "quickstart", "--set", f"storage.path={tmp_path}", "--set", f"registry.path={tmp_path}")
    assert done.exit_code == 2
    assert "RAY_ADDRESS is 127.0.0.1:1, but nothing answers there" in done.stderr
    assert not list(tmp_path.iterdir())
