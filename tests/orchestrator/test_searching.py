"""What route searches: all budgets of an agent at once, what is there never again; what it took, and what it warns of beforehand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image

from orchestrator import planning
from orchestrator.cli import main
from orchestrator.config import load_job
from orchestrator.words import spent
from orchestrator.workload import workload
from workers import families, tasks_route
from workers.contracts import DenoiserRef, ExpertCheckpoint, MixturePlan, RouteTask
from workers.tasks_evaluate import load_reference
from workers.trials import SearchTrial

JOB = """
name: small
storage: {{path: {folder}/runs}}
registry: {{path: {folder}/registry}}
model: {{path: {folder}/model}}
data: {{path: {folder}/images, holdout: 8, resize: true}}
similarity: {{measure: snr, timesteps: 8}}
partition: {{experts: [40, 500]}}
elastic: {{width_multiple: 4, importance: magnitude}}
specialize: {{steps: 1, batch_size: 2, random_networks: 0}}
router: {{images: 4, era_steps: 16, era_batch: 2, trials: 16, influence_samples: 4, agents: [greedy, era], seeds: [0, 1]}}
budgets: [{{ratio: 0.5}}]
sampler: {{steps: 20}}
finetune: {{steps: 1, batch_size: 2}}
latency: {{batch: 2}}
resources: {{device: cpu}}
"""
THREE = ("--set", "budgets=[{ratio: 0.4}, {ratio: 0.5}, {ratio: 0.65}]")


def diffpruning(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture
def job(tmp_path) -> Path:
    (tmp_path / "images").mkdir()
    for i in range(16):
        Image.new("RGB", (16, 16), (10 * i, 255 - 10 * i, 7 * i)).save(tmp_path / "images" / f"{i:02d}.png")
    torch.manual_seed(0)
    DDPMPipeline(families.family("unet2d").tiny(), DDPMScheduler()).save_pretrained(tmp_path / "model")
    (tmp_path / "job.yaml").write_text(JOB.format(folder=tmp_path))
    return tmp_path / "job.yaml"


@pytest.fixture
def searched(monkeypatch) -> list[str]:
    """The searches that were made: agent, seed and budgets."""
    found: list[str] = []
    search = tasks_route._search

    def spy(session, item, budgets):
        found.append(f"{item.agent} {item.search_seed}: {' '.join(f'{budget.ratio:g}' for budget in budgets)}")
        return search(session, item, budgets)

    monkeypatch.setattr(tasks_route, "_search", spy)
    return found


def routed(job: Path, *more: object) -> tuple[dict, str]:
    """The result of route, and what was said."""
    done = diffpruning("run", job, "--inline", "--until", "route", *more)
    assert done.exit_code == 0, done.output
    records = [json.loads(path.read_text()) for path in folder_of(job).glob("route-????????/done.json")]
    return max(records, key=lambda record: record["started"])["result"], done.stderr


def folder_of(job: Path) -> Path:
    return job.parent / "runs" / "small"


def trials(job: Path) -> dict[str, SearchTrial]:
    """Agent, seed and budget -> the trial, of all that were ever searched."""
    read = [json.loads(path.read_text()) for path in (folder_of(job) / "search").glob("*.json")]
    flat = [SearchTrial.from_json(t) for found in read for t in (found if isinstance(found, list) else [found])]
    return {f"{t.plan.agent} {t.plan.seed} {t.plan.budget.ratio:g}": t for t in flat if t.plan}


# --- the plan that is best once it is fine-tuned ---------------------------------------------------------------------

PROXIES = ("--set", "finetune={steps: 8, batch_size: 2}", "--set", "router.proxy_steps=2", "--set", "router.seeds=[0]")


def test_the_plan_is_chosen_whose_experts_are_closest_after_a_little_fine_tuning(job):
    result, said = routed(job, *PROXIES)
    [chosen] = result["chosen"].values()
    plans = [MixturePlan.from_json(plan) for plan in result["trials"]]
    distances = {plan.agent: plan.distance for plan in plans}
    assert all(distance is not None for distance in distances.values())
    assert chosen["distance"] == min(distances.values())
    assert "after 2 steps of fine-tuning: " in said
    assert result["seconds"]["short fine-tuning"] > 0
    before = len(list(folder_of(job).glob("cache/proxy-*.json")))
    assert before == len({plan.experts for plan in plans}), "equal plans are tried once"
    routed(job, *PROXIES, "--set", "router.trials=17")
    assert not list(folder_of(job).glob("cache/proxy-*.npz"))
    lowest, said = routed(job, *PROXIES, "--set", "router.proxy_steps=0")
    assert {plan["distance"] for plan in lowest["trials"]} == {None}
    [by_loss] = lowest["chosen"].values()
    assert by_loss["loss"] == min(plan["loss"] for plan in lowest["trials"])
    assert "search loss: " in said


def test_a_proxy_is_the_fine_tuning_of_so_many_steps(job, tmp_path):
    """Its distance is that of the experts which `finetune` makes of the plan in as many steps."""
    alike = ("--set", "router.influence_samples=0", "--set", "evaluate.samples=4")  # plans do not depend on proxies then
    result, _ = routed(job, *PROXIES, *alike)
    whole = ("--set", "finetune={steps: 2, batch_size: 2, compare: [uniform, greedy, era]}", "--set", "router.proxy_steps=0")
    done = diffpruning("run", job, "--inline", "--until", "finetune", *PROXIES[4:], *alike, *whole)
    assert done.exit_code == 0, done.output
    records = [json.loads(path.read_text()) for path in folder_of(job).glob("finetune-????????/done.json")]
    tuned = max(records, key=lambda record: record["started"])["result"]["experts"]
    item = _tried_with(job, *alike)
    _, _, score = tasks_route._calibration(tasks_route._shared(item))
    for plan in map(MixturePlan.from_json, result["trials"]):
        experts = tuple(
            dataclasses.replace(found, path=str(folder_of(job) / found.path))
            for found in (ExpertCheckpoint.from_json(tuned[f"{plan.budget.name} {plan.agent} {i.name}"]) for i in plan.partition.intervals)
        )
        mixture = load_reference(DenoiserRef("plan", plan, experts), item.model)
        errors = [batch.error(expert) for batch, expert in zip(score, mixture.experts, strict=True)]
        assert sum(share * error for share, error in zip(plan.shares, errors, strict=True)) == pytest.approx(plan.distance, rel=1e-4)


def test_one_more_budget_searches_itself_alone_where_plans_are_tried_too(job, searched):
    before, _ = routed(job, *PROXIES)
    searched.clear()
    after, _ = routed(job, *PROXIES, "--set", "budgets=[{ratio: 0.5}, {ratio: 0.65}]")
    assert {line.split(": ")[1] for line in searched} == {"0.65"}
    assert after["chosen"]["macs-0.50"] == before["chosen"]["macs-0.50"]


def _tried_with(job: Path, *more: str) -> RouteTask:
    """By what route tries plans."""
    found = list[RouteTask]()

    def proxy(session, item):
        found.append(item.route)
        Path(item.out).write_text('{"distance": 1.0, "seconds": 1.0}')

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks_route, "proxy_distance", proxy)
        routed(job, *PROXIES, *more, "--set", "router.proxy_steps=1")
    return found[-1]


# --- one search for all budgets -------------------------------------------------------------------------------------


def test_three_budgets_of_the_era_are_one_search_per_seed_and_cost_one_and_a_quarter(job, searched):
    routed(job)
    assert sorted(searched) == [f"{agent} {seed}: 0.5" for agent in ("era", "greedy", "uniform") for seed in (0, 1)]
    one = trials(job)["era 0 0.5"].images
    searched.clear()
    result, _ = routed(job, *THREE, "--set", "router.trials=17")  # another search altogether, of the same size
    assert sorted(s for s in searched if s.startswith("era")) == ["era 0: 0.4 0.5 0.65", "era 1: 0.4 0.5 0.65"]
    assert len([s for s in searched if s.startswith("greedy")]) == 6, "an agent without a front searches each"
    plans = [MixturePlan.from_json(plan) for plan in result["trials"]]
    assert len(plans) == 18
    assert all(plan.cost_ratio <= plan.budget.ratio for plan in plans)
    front = [json.loads(path.read_text()) for path in (folder_of(job) / "search").glob("front *.json")]
    assert [len(found) for found in front] == [3, 3]
    for found in front:
        assert sum(trial["images"] for trial in found) < 1.4 * one
        assert all(trial["shared_by"] == 3 for trial in found)


def test_the_plans_of_a_front_are_no_worse_than_greedys_and_uniforms_on_the_search_loss(job):
    routed(job, *THREE)
    found = trials(job)
    for ratio in ("0.4", "0.5", "0.65"):
        best = min(found[f"{agent} 0 {ratio}"].relative_loss for agent in ("uniform", "greedy"))
        assert found[f"era 0 {ratio}"].relative_loss <= best + 1e-6


def test_a_killed_route_does_not_repeat_the_searches_that_ended(job, searched, monkeypatch):
    search = tasks_route._search

    def killed(session, item, budgets):
        if item.agent == "greedy" and item.search_seed == 1:
            raise KeyboardInterrupt
        return search(session, item, budgets)

    with monkeypatch.context() as patched:
        patched.setattr(tasks_route, "_search", killed)
        patched.setattr("orchestrator.cli._leave", lambda code: None)
        diffpruning("run", job, "--inline", "--until", "route", *THREE)
    ended = set(searched)
    assert {"era 0: 0.4 0.5 0.65", "era 1: 0.4 0.5 0.65", "uniform 0: 0.4"} <= ended
    searched.clear()
    routed(job, *THREE)
    assert not ended & set(searched)


# --- what is there is found -----------------------------------------------------------------------------------------


def test_a_budget_an_agent_and_a_seed_more_search_what_is_new_and_leave_the_plans_that_are_there(job, searched):
    before, said = routed(job, "--set", "router.seeds=[0]")
    assert "earlier searches" not in said
    searched.clear()
    after, said = routed(job, "--set", "router.seeds=[0]", *THREE)
    assert sorted(searched) == ["era 0: 0.4 0.65", *(f"{a} 0: {r}" for a in ("greedy", "uniform") for r in ("0.4", "0.65"))]
    assert "3 of the 9 plans were there from earlier searches" in said
    assert after["chosen"]["macs-0.50"] == before["chosen"]["macs-0.50"]
    searched.clear()
    routed(job, "--set", "router.seeds=[0]", "--set", "finetune.compare=[stitch]")
    assert searched == ["stitch 0: 0.5"]
    searched.clear()
    routed(job, "--set", "router.seeds=[0, 4]")
    assert sorted(searched) == [f"{agent} 4: 0.5" for agent in ("era", "greedy", "uniform")]
    searched.clear()
    routed(job, "--set", "router.seeds=[0]", "--set", "budgets=[{ratio: 0.65}]")
    assert searched == [], "also of what was found together with others"


@pytest.mark.parametrize("change", ["router.images=6", "router.trials=3", "sampler.steps=10", "router.influence_samples=0", "seed=1"])
def test_what_a_search_depends_on_makes_it_another(job, searched, change):
    routed(job, "--set", "router.agents=[uniform]")
    count = len(searched)
    routed(job, "--set", "router.agents=[uniform]", "--set", change)
    assert len(searched) == 2 * count


def test_redo_searches_anew_all_together_and_leaves_the_results_of_other_settings(job, searched):
    seeds = ("--set", "router.seeds=[0]")
    first, _ = routed(job, *seeds)
    routed(job, *seeds, *THREE)
    searched.clear()
    routed(job, *seeds, *THREE, "--redo", "route")
    newest = max(
        map(json.loads, map(Path.read_text, folder_of(job).glob("route-????????/done.json"))), key=lambda record: record["started"]
    )
    assert newest["resumed"], "its sensitivities were in the cache: its seconds are not what a route takes"
    assert "era 0: 0.4 0.5 0.65" in searched
    searched.clear()
    again = diffpruning("run", job, "--inline", "--until", "route", *seeds)
    assert "route      already done" in again.stderr
    assert searched == []
    assert list((folder_of(job) / "search").glob("*.aside1"))


def test_a_damaged_file_of_a_run_is_told_in_one_line_that_names_it(job):
    routed(job, *PROXIES, *THREE)
    run = folder_of(job)
    [done] = run.glob("route-????????/done.json")
    caches = [next(run.glob(f"cache/{kind}-*.json")) for kind in ("sensitivity", "influence", "distances", "proxy")]
    searches = [next(run.glob("search/front *.json")), next(path for path in run.glob("search/*.json") if "front" not in path.name)]
    record = done.read_text()

    def refused(path: Path, content: str, *words: object) -> None:
        whole = path.read_text()
        path.write_text(content)
        told = diffpruning(*words)
        path.write_text(whole)
        assert told.exit_code == 2, told.output
        assert f"error: {path} is damaged (" in told.stderr.splitlines()[-1]

    route = ("run", job, "--inline", "--until", "route", *PROXIES, *THREE)
    for path in (*caches, *searches):
        done.unlink()
        if path.name.startswith("distances"):
            caches[1].unlink()
        for content in (path.read_text()[:20], "7"):
            refused(path, content, *route)
        done.write_text(record)
    for content in (record[:20], "[]", "{}"):
        refused(done, content, "status", job)
    for command in (route, ("plan", job, *PROXIES, *THREE), ("results", run), ("status", job)):
        refused(run / "run.json", "[]", *command)
    refused(done, "[]", *route)


# --- what it takes --------------------------------------------------------------------------------------------------


def test_workers_time_of_a_search_is_kept_and_said_whenever_it_was_spent(job):
    result, said = routed(job)
    assert set(result["seconds"]) == {"sensitivities", "influence", "trials"}
    assert min(result["seconds"].values()) > 0
    assert result["seconds"]["trials"] == pytest.approx(sum(trial.seconds for trial in trials(job).values()))
    assert f"  search: {spent(result['seconds'])}\n" in said
    again, _ = routed(job, "--set", "finetune.compare=[]")
    assert again["seconds"] == result["seconds"], "the same plans, found in the same time"


def test_what_was_spent_reads_as_seconds_and_beside_training_as_a_part_of_it():
    seconds = {"sensitivities": 3.0, "influence": 0.25, "trials": 38.0}
    assert spent(seconds) == "41 s of workers' time (sensitivities 3 s, influence 0.25 s, trials 38 s)"
    assert spent(seconds, 1057.7) == "41 s of workers' time, 3.9% of training's"


def test_the_plan_counts_one_search_for_all_budgets(job):
    prepared = planning.prepare(load_job(str(job), [THREE[1]]))
    works = {work.task: work.units for work in workload(prepared.job, prepared.table, prepared.images)["route"]}
    one = 3 * 16 * 2
    assert works["search_front"] == (1.25 * one,) * 2
    assert len(works["search_plan"]) == 2 * 3 * 2
    [route] = [stage for stage in planning.describe(prepared)["stages"] if stage["stage"] == "route"]
    assert route["work"] == "14 searches"


# --- influence ------------------------------------------------------------------------------------------------------


def test_a_sweep_counts_errors_under_each_sampler_as_route_does_and_draws_samples_once_for_those_drawn_alike(job, monkeypatch):
    drawn, draw_dense = [], tasks_route.draw_dense

    def spy(session, item):
        drawn.append((item.route.budget.scheduler, item.route.budget.steps))
        return draw_dense(session, item)

    monkeypatch.setattr(tasks_route, "draw_dense", spy)
    words = ("--agents", "greedy", "--seeds", "0", "--inline", "--json", "--samplers")
    done = diffpruning("sweep", "run", job, *words, "ddim:20,ddim:50,dpmpp:50,ddim:100")
    assert done.exit_code == 0, done.output
    assert drawn == [("ddim", 20), ("ddim", 50)], "of more than 25 steps 25 are made, and of other samplers ddim's"
    swept = {f"{t['sampler']}:{t['steps']}": t["loss"] for t in json.loads(done.stdout)["trials"] if t["agent"] == "greedy"}
    drawn.clear()
    for sampler in ("ddim:20", "dpmpp:50"):
        scheduler, _, steps = sampler.partition(":")
        result, _ = routed(job, "--set", f"sampler.scheduler={scheduler}", "--set", f"sampler.steps={steps}")
        [loss] = {plan["loss"] for plan in result["trials"] if plan["agent"] == "greedy"}
        assert loss == swept[sampler]
    assert drawn == []


# --- warnings -------------------------------------------------------------------------------------------------------

WARNING = "warning: t0000-0040 serves 1 of ddim:20's 20 steps; two or more are better"


def test_an_expert_of_few_steps_is_warned_of_before_anything_is_trained(job):
    said = diffpruning("run", job, "--inline", "--until", "specialize").stderr
    assert said.index("partition  running") < said.index(WARNING) < said.index("specialize running")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ([], [WARNING]),
        (["sampler.steps=50"], []),
        (["partition.experts=[300]"], []),
        (["partition={experts: 4, method: uniform in log-SNR, min_timesteps: 125}"], []),
        (
            ["partition={experts: 4, method: uniform in log-SNR, min_timesteps: 40}"],
            ["warning: t0000-0040 serves 1 of ddim:20's 20 steps; two or more are better"],
        ),
        (["partition={experts: 2, method: learned}"], []),
    ],
)
def test_plan_warns_where_the_cuts_are_known(job, changes, told):
    done = diffpruning("plan", job, *(word for change in changes for word in ("--set", change)))
    assert done.exit_code == 0, done.output
    assert [line for line in done.stdout.splitlines() if line.startswith("warning: t")] == told


def test_plan_warns_of_learned_cuts_once_they_are_found(job):
    learned = ("--set", "partition={experts: 8, min_timesteps: 1}", "--set", "sampler.steps=10")
    assert "warning" not in diffpruning("plan", job, *learned).stdout
    assert diffpruning("run", job, "--inline", "--until", "partition", *learned).exit_code == 0
    assert "of ddim:10's 10 steps; two or more are better" in diffpruning("plan", job, *learned).stdout
