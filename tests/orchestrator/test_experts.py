"""Small experts are trained once, whoever asks for them: other budgets and agents find what is there, and equal plans are one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image

from orchestrator import experts
from orchestrator.cli import main
from orchestrator.cluster import InlineCluster
from workers import families, tasks

JOB = """
name: small
storage: {{path: {folder}/runs}}
registry: {{path: {folder}/registry}}
model: {{path: {model}}}
data: {{path: {data}, holdout: 8, resize: true}}
similarity: {{measure: snr, timesteps: 8}}
partition: {{experts: [300]}}
elastic: {{width_multiple: 4, importance: magnitude}}
specialize: {{steps: 1, batch_size: 2, random_networks: 0}}
router: {{images: 4, era_steps: 1, era_batch: 2, trials: 2, influence_samples: 0, agents: [uniform]}}
budgets: [{{ratio: 0.5}}]
sampler: {{steps: 4}}
finetune: {{steps: 2, batch_size: 2, compare: []}}
evaluate: {{images: 2, samples: 2, timesteps: 2, batch_size: 2, cut_only: false}}
latency: {{batch: 2}}
export: {{rewrites: []}}
resources: {{device: cpu}}
"""
TWO = ("--set", "budgets=[{ratio: 0.5}, {ratio: 0.8}]")


def diffpruning(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture
def job(tmp_path) -> Path:
    folder = tmp_path
    (folder / "images").mkdir()
    for i in range(16):
        Image.new("RGB", (16, 16), (10 * i, 255 - 10 * i, 7 * i)).save(folder / "images" / f"{i:02d}.png")
    torch.manual_seed(0)
    DDPMPipeline(families.family("unet2d").tiny(), DDPMScheduler()).save_pretrained(folder / "model")
    (folder / "job.yaml").write_text(JOB.format(folder=folder, model=folder / "model", data=folder / "images"))
    return folder / "job.yaml"


@pytest.fixture
def trained(monkeypatch) -> list[str]:
    """The finetune trainings that were started, as what the progress calls them."""
    started, train_expert = [], tasks.train_expert

    def spy(session, item):
        if item.stage == "finetune":
            started.append(item.unit)
        return train_expert(session, item)

    monkeypatch.setattr(tasks, "train_expert", spy)
    return started


def run(job: Path, *more: object) -> Result:
    done = diffpruning("run", job, "--inline", "--json", *more)
    assert done.exit_code == 0, done.output
    return done


def folder_of(job: Path) -> Path:
    return job.parent / "runs" / "small"


def newest(job: Path, stage: str) -> dict:
    records = [json.loads(path.read_text()) for path in folder_of(job).glob(f"{stage}-????????/done.json")]
    return max(records, key=lambda record: record["started"])


def times(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_another_budget_and_a_compared_agent_train_what_is_new_and_nothing_else(job, trained):
    run(job)
    first = newest(job, "finetune")["result"]["experts"]
    assert trained == ["macs-0.50 t0000-0300", "macs-0.50 t0300-1000"]
    before = times(folder_of(job) / "train")
    trained.clear()
    run(job, *TWO)
    assert sorted(trained) == ["macs-0.80 t0000-0300", "macs-0.80 t0300-1000"]
    more = newest(job, "finetune")["result"]["experts"]
    assert {name: more[name] for name in first} == first
    assert newest(job, "finetune")["resumed"], "its calls do not tell what all of it takes"
    trained.clear()
    run(job, *TWO, "--set", "finetune.compare=[stitch]")
    assert all(unit.startswith("macs-0.") and " stitch " in unit for unit in trained), trained
    assert before.items() <= times(folder_of(job) / "train").items(), "what was trained stays as it is"
    trained.clear()
    run(job, "--set", "budgets=[{ratio: 0.8}]")
    assert trained == []


def test_what_was_measured_of_a_mixture_is_not_measured_again_for_another_budget(job):
    run(job)
    measured = times(folder_of(job) / "evaluation")
    run(job, *TWO)
    after = times(folder_of(job) / "evaluation")
    assert measured.items() <= after.items()
    assert len(after) == len(measured) + 2, "a row's numbers and samples more"


def test_the_seed_and_the_settings_of_training_count_and_how_often_it_is_saved_does_not(job, trained):
    run(job)
    trained.clear()
    run(job, "--set", "finetune.checkpoint_every=1")
    assert trained == []
    run(job, "--set", "finetune.learning_rate=2e-3")
    assert len(trained) == 2
    run(job, "--set", "data.flip=true")
    assert len(trained) == 4, "the elastic experts are others, and so is what is cut from them"
    assert len(list(folder_of(job).glob("train/finetune-*"))) == 6


def test_a_killed_finetune_goes_on_under_other_budgets_with_what_it_had(job, trained, monkeypatch):
    train_expert = tasks.train_expert

    def killed(session, item):
        if item.stage == "finetune" and item.interval.start == 300:
            raise KeyboardInterrupt
        return train_expert(session, item)

    with monkeypatch.context() as patched:
        patched.setattr(tasks, "train_expert", killed)
        patched.setattr("orchestrator.cli._leave", lambda code: None)
        diffpruning("run", job, "--inline", "--until", "finetune")
    assert trained == ["macs-0.50 t0000-0300"]
    trained.clear()
    run(job, *TWO, "--until", "finetune")
    assert sorted(trained) == ["macs-0.50 t0300-1000", "macs-0.80 t0000-0300", "macs-0.80 t0300-1000"]


def test_the_key_of_an_expert_is_the_same_wherever_its_files_lie_and_whoever_asks(job, monkeypatch):
    asked = []

    def spy(self, task, jobs, storage, on_done):
        asked.extend(item for item in jobs.values() if item.stage == "finetune")
        return fit_all(self, task, jobs, storage, on_done)

    fit_all = InlineCluster.fit_all
    monkeypatch.setattr(InlineCluster, "fit_all", spy)
    run(job, "--until", "finetune")
    task, elastic = asked[0], experts.ExpertCheckpoint.from_json(newest(job, "specialize")["result"]["experts"][0])
    elastic = dataclasses.replace(elastic, path=task.source)
    context = type("Context", (), {"fingerprints": {"specialize": "f" * 64}})
    key = experts.key_of(context, task, [elastic])
    elsewhere = {name: f"/elsewhere/{name}" for name in ("model", "images", "source", "label")}
    assert experts.key_of(context, dataclasses.replace(task, **elsewhere), [dataclasses.replace(elastic, path="/elsewhere/source")]) == key
    others = [
        experts.key_of(context, dataclasses.replace(task, seed=task.seed + 1), [elastic]),
        experts.key_of(context, dataclasses.replace(task, flip=not task.flip), [elastic]),
        experts.key_of(context, dataclasses.replace(task, spec=task.spec.replace(*_narrower(task.spec))), [elastic]),
        experts.key_of(context, dataclasses.replace(task, train=dataclasses.replace(task.train, steps=9)), [elastic]),
        experts.key_of(context, task, [dataclasses.replace(elastic, ended=elastic.ended + 1)]),
        experts.key_of(type("Context", (), {"fingerprints": {"specialize": "0" * 64}}), task, [elastic]),
    ]
    assert len({key, *others}) == 7


def _narrower(spec) -> tuple[str, int]:
    site, choice = next((site, choice) for site, choice in spec.choices.items() if choice)
    return site, 0


def test_equal_plans_are_trained_and_measured_once_and_each_has_its_row(job, trained):
    done = run(job, "--set", "finetune.compare=[uniform]")
    assert "macs-0.50 uniform = macs-0.50: the same sub-networks, trained and measured once" in done.stderr
    assert trained == ["macs-0.50 t0000-0300", "macs-0.50 t0300-1000"]
    metrics = newest(job, "publish")["result"]["metrics"]
    assert list(metrics) == ["dense", "macs-0.50", "macs-0.50 uniform"]
    assert metrics["macs-0.50 uniform"] == {**metrics["macs-0.50"], "same_as": "macs-0.50"}
    assert len(list(folder_of(job).glob("evaluation/*.json"))) == 2
    table = diffpruning("evaluate", job, "--inline", "--set", "finetune.compare=[uniform]")
    assert "macs-0.50 uniform (= macs-0.50)" in table.stdout
    page = (folder_of(job) / "report.html").read_text()
    assert "uniform, trained alike = macs-0.50" in page
    assert "is the uniform allocation itself: no agent found a better one" in page


def test_two_compared_agents_with_one_plan_are_trained_once(job, trained):
    """By force: greedy is given uniform's plan, and the chosen one differs from it in one site of one expert."""
    run(job, "--until", "route", "--set", "finetune.compare=[uniform, greedy]", "--set", "router.agents=[stitch]")
    [path] = folder_of(job).glob("route-*/done.json")
    record = json.loads(path.read_text())
    by_agent = {trial["agent"]: trial for trial in record["result"]["trials"]}
    by_agent["greedy"]["experts"] = by_agent["uniform"]["experts"]
    other = json.loads(json.dumps(by_agent["uniform"]))
    choices = other["experts"][0]["choices"]
    choices[next(site for site, choice in choices.items() if choice)] = 0
    record["result"]["chosen"]["macs-0.50"] = {**other, "agent": "stitch"}
    path.write_text(json.dumps(record))
    done = run(job, "--set", "finetune.compare=[uniform, greedy]", "--set", "router.agents=[stitch]")
    assert "macs-0.50 greedy = macs-0.50 uniform" in done.stderr
    assert sorted(trained) == ["macs-0.50 t0000-0300", "macs-0.50 t0300-1000", "macs-0.50 uniform t0000-0300"], "each of three once"
    metrics = newest(job, "publish")["result"]["metrics"]
    assert metrics["macs-0.50 greedy"]["same_as"] == "macs-0.50 uniform"
    assert "same_as" not in metrics["macs-0.50 uniform"]


def test_redo_trains_anew_and_sets_aside_what_points_to_the_old_weights(job, trained):
    run(job)
    run(job, *TWO)
    trained.clear()
    run(job, "--redo", "finetune")
    assert sorted(trained) == ["macs-0.50 t0000-0300", "macs-0.50 t0300-1000"]
    assert len(list(folder_of(job).glob("train/finetune-*.aside1"))) == 2
    trained.clear()
    run(job, *TWO)
    assert trained == [], "the other budget's are still there, and these were made again"
