"""Sweeps: many plans over one run's experts, in one table; asked again it is done, interrupted it goes on; who falls behind is stopped."""

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner, Result
from diffusers import DDPMPipeline, DDPMScheduler

from orchestrator import cli, figures_sweep, planning, sweep
from orchestrator.cli import main
from orchestrator.cluster import InlineCluster, Need
from orchestrator.config import load_job
from workers import families, tasks_route
from workers.contracts import MixturePlan
from workers.trials import SearchTrial

JOB = """
name: small
storage: {{path: {folder}/runs}}
registry: {{path: {folder}/registry}}
model: {{path: {model}}}
data: {{path: {data}, holdout: 16, resize: true}}
similarity: {{measure: snr, timesteps: 8}}
partition: {{experts: [40, 500]}}
elastic: {{width_multiple: 4, importance: magnitude}}
specialize: {{steps: 1, batch_size: 2, random_networks: 0}}
router: {{images: 4, era_steps: 1, era_batch: 2, trials: 10, influence_samples: 4, proxy_steps: 1, agents: [greedy]}}
budgets: [{{ratio: 0.5}}]
sampler: {{steps: 10}}
latency: {{batch: 2}}
resources: {{device: cpu}}
"""


def diffpruning(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def job(tmp_path_factory, emoji_images) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "images").mkdir()
    for i, row in enumerate(next(pq.ParquetFile(emoji_images).iter_batches(32, columns=["image"])).to_pylist()):
        (folder / "images" / f"{i:02d}.png").write_bytes(row["image"]["bytes"])
    torch.manual_seed(0)
    DDPMPipeline(families.family("unet2d").tiny(), DDPMScheduler()).save_pretrained(folder / "model")
    (folder / "job.yaml").write_text(JOB.format(folder=folder, model=folder / "model", data=folder / "images"))
    return folder / "job.yaml"


ASKED = ("--budgets", "0.5,0.8", "--agents", "greedy", "--samplers", "ddim:20,ddim:50", "--inline", "--json")


@pytest.fixture(scope="module")
def first(job) -> Result:
    done = diffpruning("sweep", "run", job, *ASKED)
    assert done.exit_code == 0, done.stderr
    return done


def trials(done: Result) -> list[dict]:
    return json.loads(done.stdout)["trials"]


# --- a finished sweep -------------------------------------------------------------------------------------------------


def test_the_experts_are_trained_first_and_nothing_after_them(first, job):
    assert "specialize finished" in first.stderr
    assert "route" not in first.stderr
    assert not list((job.parent / "runs" / "small").glob("route-*"))


def test_a_trial_is_one_combination_and_uniform_is_always_there(first):
    combinations = {(t["sampler"], t["steps"], t["ratio"], t["agent"], t["seed"]) for t in trials(first)}
    assert combinations == set(itertools.product(["ddim"], [20, 50], [0.5, 0.8], ["uniform", "greedy"], [0]))
    assert len(trials(first)) == 8


def test_every_plan_keeps_its_budget_under_the_shares_of_its_own_sampler(first):
    for trial in trials(first):
        plan = MixturePlan.from_json(trial["plan"])
        assert (plan.budget.scheduler, plan.budget.steps) == (trial["sampler"], trial["steps"])
        assert list(plan.shares) == trial["shares"] == [n / trial["steps"] for n in trial["steps_per_expert"]]
        assert trial["macs_ratio"] == plan.macs_ratio <= trial["ratio"]
        assert trial["loss"] == plan.loss > 0
        assert trial["relative_search_loss"] == pytest.approx(1) or trial["agent"] != "uniform"
        assert not trial["stopped_early"]


def test_the_experts_are_read_once_by_a_process_however_many_trials_it_runs(first):
    assert len({(trial["worker"], trial["loads"]) for trial in trials(first)}) == 1


def test_another_sampler_gives_an_expert_other_shares(first):
    served = json.loads(first.stdout)["steps_per_expert"]
    assert served == {"ddim:20": [1, 9, 10], "ddim:50": [2, 23, 25]}


def test_an_expert_with_fewer_than_two_steps_is_told_of(first, job):
    warnings = json.loads(first.stdout)["warnings"]
    assert warnings == ["t0000-0040 serves 1 of ddim:20's 20 steps; two or more are better"]
    assert f"warning: {warnings[0]}" in diffpruning("sweep", "show", job).stdout


def test_the_table_is_parquet_with_a_row_per_trial(first):
    table = pq.read_table(Path(json.loads(first.stdout)["folder"]) / "trials.parquet")
    assert table.schema.equals(sweep.TABLE)
    assert table.num_rows == 8


def test_show_reads_the_same_by_job_and_by_run_folder(first, job):
    by_folder = diffpruning("sweep", "show", job.parent / "runs" / "small", "--json")
    assert by_folder.stdout == diffpruning("sweep", "show", job, "--json").stdout == first.stdout
    assert len(diffpruning("sweep", "show", job).stdout.splitlines()) > 12


def test_asked_again_in_other_words_it_is_already_done(first, job):
    before = {path: path.stat().st_mtime_ns for path in (job.parent / "runs" / "small").rglob("*.parquet")}
    again = diffpruning("sweep", "run", job, *ASKED, "--budgets", "0.8, .50")
    assert "sweep      already done" in again.stderr
    assert again.stdout == first.stdout
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_other_questions_are_other_sweeps_and_show_finds_each(first, job, monkeypatch):
    monkeypatch.setattr(tasks_route, "search_plan", fake_search)
    other = json.loads(diffpruning("sweep", "run", job, "--seeds", "3", "--inline", "--json").stdout)
    one = json.loads(first.stdout)["id"]
    assert other["id"] != one
    assert json.loads(diffpruning("sweep", "show", job, "--json").stdout)["id"] == other["id"]
    named = json.loads(diffpruning("sweep", "show", job, "--id", one, "--json").stdout)
    assert (named["id"], named["others"]) == (one, [other["id"]])
    refused = diffpruning("sweep", "show", job, "--id", "0000ffff")
    assert refused.exit_code == 2
    assert "no finished sweep 0000ffff" in refused.stderr


searched: list[str] = []


def fake_search(session, item) -> SearchTrial:
    searched.append(f"{item.budget.ratio} {item.agent} {item.search_seed}")
    if len(searched) == 3:
        raise KeyboardInterrupt
    return SearchTrial(None, 0.9, 0.2, 1.0, "here:1", 1)


def test_an_interrupted_sweep_goes_on_without_the_trials_that_ended(first, job, monkeypatch):
    monkeypatch.setattr(tasks_route, "search_plan", fake_search)
    monkeypatch.setattr(cli, "_leave", sys.exit)
    command = ("sweep", "run", job, "--agents", "era", "--seeds", "5,6", "--inline", "--json")
    searched.clear()
    assert diffpruning(*command).exit_code == 130
    assert len(searched) == 3
    done = diffpruning(*command)
    assert done.exit_code == 0
    assert searched[3:] == searched[2:3] + ["0.5 era 6"]
    stopped = trials(done)
    assert len(stopped) == 4
    assert all(t["stopped_early"] and t["plan"] is None and t["loss"] is None for t in stopped)
    assert "stopped at 20%" in diffpruning("sweep", "show", job).stdout


def test_a_stopped_or_a_lone_trial_draws_too(first):
    rows = [{**trial, "time_ratio": 0.7} for trial in trials(first)]
    gone = {**rows[0], "loss": None, "macs_ratio": None, "time_ratio": None}
    for some in (rows, [*rows, gone], rows[:1], [gone]):
        assert figures_sweep.pareto(some).startswith(b"\x89PNG")


# --- one search for many budgets --------------------------------------------------------------------------------------


EIGHT = "0.4,0.5,0.55,0.6,0.65,0.7,0.8,0.9"


def test_a_sweep_over_eight_budgets_of_the_era_costs_less_than_three_searches(first, job):
    costs = []
    for budgets in ("0.5", EIGHT):
        done = diffpruning("sweep", "run", job, "--budgets", budgets, "--agents", "era", "--seeds", "0", "--inline", "--json")
        rows = [trial for trial in trials(done) if trial["agent"] == "era"]
        assert [row["ratio"] for row in rows] == [float(ratio) for ratio in budgets.split(",")]
        assert {row["shared_by"] for row in rows} == {len(rows)}
        assert all(MixturePlan.from_json(row["plan"]).cost_ratio <= row["ratio"] for row in rows)
        costs.append(sum(row["images"] for row in rows))
    assert 0 < costs[0] < costs[1] < 3 * costs[0]
    told = diffpruning("sweep", "show", job).stdout
    assert "era: one search serves all 8 budgets" in told


def test_an_interrupted_sweep_does_not_repeat_the_front_that_ended(first, job, monkeypatch):
    fronts, search_front = [], tasks_route.search_front

    def spy(session, item):
        fronts.append((item.task.budget.scheduler, item.budgets[0].steps, item.task.search_seed))
        if len(fronts) == 2:
            raise KeyboardInterrupt
        return search_front(session, item)

    monkeypatch.setattr(tasks_route, "search_front", spy)
    monkeypatch.setattr(cli, "_leave", sys.exit)
    command = ("sweep", "run", job, "--budgets", "0.6,0.7", "--agents", "era", "--samplers", "ddim:20,ddim:50", "--inline", "--json")
    assert diffpruning(*command).exit_code == 130
    done = diffpruning(*command)
    assert done.exit_code == 0, done.stderr
    assert fronts == [("ddim", 20, 0), ("ddim", 50, 0), ("ddim", 50, 0)]
    assert {(t["steps"], t["ratio"], t["agent"]) for t in trials(done)} == set(itertools.product([20, 50], [0.6, 0.7], ["uniform", "era"]))


def test_sensitivities_are_measured_once_for_all_sweeps_and_again_for_other_images(first, job, monkeypatch):
    measured, expert_sensitivity = [], tasks_route.expert_sensitivity

    def spy(session, item):
        measured.append(item[1])
        return expert_sensitivity(session, item)

    monkeypatch.setattr(tasks_route, "expert_sensitivity", spy)
    command = ("sweep", "run", job, "--budgets", "0.75", "--agents", "greedy", "--inline", "--json")
    assert trials(diffpruning(*command))
    assert measured == []
    assert trials(diffpruning(*command, "--set", "router.images=6"))
    assert measured == [0, 1, 2]


# --- what a worker tells while it searches ----------------------------------------------------------------------------


class Listening(InlineCluster):
    """Keeps what the trials tell."""

    def __init__(self) -> None:
        super().__init__(Need("cpu", 1, 0))
        self.heard: list[SearchTrial] = []

    def _session(self, folder: str = ""):
        session = super()._session(folder)
        session.report_search = self.heard.append
        return session


def test_an_iterative_agent_tells_its_best_relative_to_uniform_and_is_only_ever_better(first, job):
    config, cluster = load_job(str(job), ["router.trials=40"]), Listening()
    prepared = sweep.with_sweep(planning.prepare(config), replace(sweep.axes_of(config), agents=("random_search",)))
    prepared.pipeline.run(prepared.job, lambda: cluster, lambda text: None, until="sweep")
    heard = cluster.heard
    assert [trial.progress for trial in heard] == [0.25, 0.5, 0.75, 1.0]
    losses = [trial.relative_loss for trial in heard]
    assert losses == sorted(losses, reverse=True)
    [row] = sweep.read(prepared.store.folder)["trials"]
    assert row["relative_search_loss"] == pytest.approx(losses[-1])


# --- early stopping ---------------------------------------------------------------------------------------------------


def race(*results: tuple[str, dict, int, float]) -> list[str]:
    """(trial, its axes, percent, relative loss) one after the other -> what the scheduler decides."""
    from orchestrator.ray_cluster import _HalvingPerProblem

    scheduler, known = _HalvingPerProblem({name: axes for name, axes, _, _ in results}), {}
    decisions = []
    for name, _, percent, loss in results:
        if name not in known:
            known[name] = SimpleNamespace(trial_id=name, config={"trial": name})
            scheduler.on_trial_add(None, known[name])
        decisions.append(scheduler.on_trial_result(None, known[name], {"percent": percent, "relative_loss": loss}))
    for trial in known.values():
        scheduler.on_trial_complete(None, trial, {"percent": 100, "relative_loss": 1.0})
    return decisions


def test_who_falls_behind_at_the_same_budget_is_stopped():
    tight = {"budget": "macs-0.35", "sampler": "ddim:50"}
    found = race(*((name, {**tight, "agent": "era", "seed": name}, 20, loss) for name, loss in (("a", 0.7), ("b", 0.8), ("c", 0.6))))
    assert found == ["CONTINUE", "STOP", "CONTINUE"]


def test_equals_are_not_stopped_and_nobody_is_before_a_fifth():
    tight = {"budget": "macs-0.35", "agent": "era"}
    assert race(("a", tight, 20, 0.7), ("b", tight, 20, 0.7), ("c", tight, 10, 0.99)) == ["CONTINUE"] * 3


def test_budgets_and_samplers_do_not_race_each_other():
    """The generous budget gains less over uniform, whatever its agent."""
    results = [
        (f"{budget}{sampler}", {"budget": budget, "sampler": sampler, "agent": "era", "seed": 0}, 20, loss)
        for budget, loss in (("macs-0.35", 0.6), ("macs-0.80", 0.97))
        for sampler in ("ddim:50", "dpmpp:20")
    ]
    assert race(*results) == ["CONTINUE"] * 4


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("--agents", "greedy,oracle"), 2, "--agents 'oracle' is unknown: known are "),
        (("--agents", ""), 2, "--agents '' is not a comma-separated list"),
        (("--samplers", "ddim:50,heun:20"), 2, "--samplers 'heun:20' is unknown: known are ddpm, ddim,"),
        (("--samplers", "ddim"), 2, "--samplers 'ddim' says no number of steps: write e.g. ddim:50"),
        (("--samplers", "ddim:0"), 2, "--samplers 'ddim:0' says no number of steps"),
        (("--samplers", "ddim:5000"), 2, "sampler.steps 5000 is more than the model's 1000"),
        (("--budgets", "0.5,1.5"), 2, "--budgets 1.5: give parts of the dense model's MACs above 0, at most 1"),
        (("--budgets", "0.5,nan"), 2, "--budgets nan: give parts"),
        (("--budgets", "half"), 2, "--budgets 'half' is not a number"),
        (("--budgets", "0.501,0.502"), 2, "--budgets 0.501, 0.502: they must differ in their first two decimals"),
        (("--budgets", "0.01"), 3, "--budgets is 0.01, but the smallest mixture needs"),
        (("--seeds", "1,x"), 2, "--seeds 'x' is not a number"),
        (("--set", "nonsense=1"), 2, "unknown key nonsense"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(job, tmp_path, arguments, code, told):
    done = diffpruning("sweep", "run", job, "--inline", "--set", f"storage.path={tmp_path}", *arguments)
    assert (done.exit_code, done.stderr.count("\n")) == (code, 1)
    assert done.stderr.startswith("error: ")
    assert told in done.stderr
    assert not list(tmp_path.iterdir())


def test_show_wants_a_run_with_a_sweep(job, tmp_path):
    for what, told in (
        (tmp_path, "is a folder, but no run folder (it has no run.json)"),
        (tmp_path / "none", "no such job file"),
        ("quickstart", "no run in"),
    ):
        done = diffpruning("sweep", "show", what, "--set", f"storage.path={tmp_path / 'empty'}")
        assert done.exit_code == 2
        assert told in done.stderr
    (tmp_path / "run.json").write_text("{}")
    assert "no finished sweep in" in diffpruning("sweep", "show", tmp_path).stderr
