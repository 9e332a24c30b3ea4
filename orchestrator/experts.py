"""Which experts are trained, each once: a run's name stands for all that it depends on, so whatever a job asks for finds what is there.

    <run folder>/train/<stage>-<interval>-<key>/step_NNNNNNN/    checkpoints
                                                expert.json      written when the training is over: where its last one lies
A small expert depends on its sub-network, the elastic expert that it is cut from, the settings of its training, the data and the seed; not
on the budget or the agent whose plan asks for it. Equal ones of several plans, of one job or of several, are one run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.pipeline import Context
from orchestrator.scheduling import longest_first
from orchestrator.store import read_object, write_json
from workers import families, tasks
from workers.contracts import (
    ArchitectureSpec,
    DenoiserRef,
    ExpertCheckpoint,
    ExpertTask,
    Interval,
    MixturePlan,
    Partition,
    TrainSettings,
    derive_seed,
    digest_of,
)
from workers.cost import cost_table

VERSION = 3
"""Of the stage finetune: grows with what a small expert's training means."""
FOLDER, RECORD = "train", "expert.json"
NOT_TOLD = ("model", "images", "rows", "source", "label")
"""What a task says of places and names. The elastic expert's fingerprint and identity stand for it."""


def located(ctx: Context, expert: Mapping[str, Any]) -> ExpertCheckpoint:
    """A stored checkpoint, with its path made absolute."""
    found = ExpertCheckpoint.from_json(dict(expert))
    return replace(found, path=str(ctx.store.folder / found.path))


def identity(expert: ExpertCheckpoint) -> list[Any]:
    """Stands for an expert's weights, wherever they lie, beside the fingerprint of its stage."""
    return [expert.interval.name, expert.step, expert.loss, expert.ended]


def folders(experts: Iterable[Mapping[str, Any]]) -> list[str]:
    """The runs behind a stage's result, relative to the run folder."""
    return sorted({Path(expert["path"]).parent.as_posix() for expert in experts})


# --- training -------------------------------------------------------------------------------------------------------


def short(ctx: Context) -> TrainSettings:
    """Of a fine-tuning that only tells what a plan is worth."""
    settings, steps = ctx.job.finetune.settings(), ctx.job.proxy_steps
    return replace(settings, steps=steps, warmup_steps=min(settings.warmup_steps, steps // 5), checkpoint_every=steps)


def tuning(
    ctx: Context,
    images: str,
    rows: Sequence[int],
    cuts: Partition,
    specs: Sequence[ArchitectureSpec | None],
    label: str,
    train: TrainSettings,
) -> tuple[ExpertTask, ...]:
    """The training of a small expert of every interval. ``rows`` of ``images``: those to learn from; ``specs``: None if still open."""
    job = ctx.job
    return tuple(
        ExpertTask(
            stage="finetune",
            model=job.model.path,
            images=images,
            rows=tuple(rows),
            interval=interval,
            elastic=job.elastic_settings(),
            train=train,
            random_networks=0,
            importance_images=1,
            seed=derive_seed(job.seed, "finetune"),  # the same images and noise for every plan: a fair comparison
            flip=job.data.flip,
            class_dropout=job.data.class_dropout,
            source=located(ctx, ctx.results["specialize"]["experts"][k]).path,
            spec=spec,
            label=label,
        )
        for k, (interval, spec) in enumerate(zip(cuts.intervals, specs, strict=True))
    )


def key_of(ctx: Context, task: ExpertTask, elastic: Sequence[ExpertCheckpoint]) -> str:
    """Stands for all that a small expert depends on. ``elastic``: the experts of all intervals."""
    [source] = (expert for expert in elastic if expert.path == task.source)
    told = {name: value for name, value in task.to_json().items() if name not in NOT_TOLD}
    del told["train"]["checkpoint_every"]  # how often, not what
    return digest_of([VERSION, ctx.fingerprints["specialize"], identity(source), told])


def fit(ctx: Context, stage: str, jobs: Mapping[str, ExpertTask], keys: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The trained expert of every job. Jobs of one interval and key are one run; those that ended before, for this job or another of the
    same run folder, are not started again."""
    runs = {name: f"{stage}-{task.interval.name}-{keys[name][:8]}" for name, task in jobs.items()}
    named: dict[str, ExpertTask] = {}
    for name, run in runs.items():
        named.setdefault(run, jobs[name])
    storage = ctx.store.folder / FOLDER
    todo = {run: _work(task, storage / run) for run, task in named.items() if _record(ctx, run) is None}
    ctx.reused |= len(todo) < len(named)

    def record(run: str, expert: ExpertCheckpoint) -> None:
        inside = Path(expert.path).relative_to(ctx.store.folder)  # a run folder may be moved
        write_json(storage / run / RECORD, replace(expert, path=inside.as_posix()).to_json())

    storage.mkdir(exist_ok=True)
    if todo:
        ctx.cluster.fit_all(tasks.train_expert, {run: named[run] for run in longest_first(todo)}, storage, record)
    return {name: json.loads((storage / run / RECORD).read_text()) for name, run in runs.items()}


def _record(ctx: Context, run: str) -> dict[str, Any] | None:
    """What is written of a run that ended; None if it is still to be made, or its weights are gone."""
    found = read_object(ctx.store.folder / FOLDER / run / RECORD, "path")
    return found if found is not None and (ctx.store.folder / found["path"]).is_dir() else None


def _work(task: ExpertTask, folder: Path) -> float:
    """Multiply-accumulates that are left of training an expert, about: the teacher forward, each sub-network forward and backward."""
    table = cost_table(families.load_config(task.model), task.elastic)
    networks = table.cost(task.spec).macs if task.spec else table.dense.macs * (1 + task.random_networks)
    done = max((int(step.name.removeprefix("step_")) for step in folder.glob("step_*")), default=0)
    return (task.train.steps - done) * task.train.batch_size * (table.dense.macs + 3 * networks)


# --- whose they are -------------------------------------------------------------------------------------------------


def plans(ctx: Context) -> dict[str, MixturePlan]:
    """By the label of its row: the chosen plan of every budget, and beside it the best one of every agent that it is compared with."""
    found = {}
    for budget, chosen in ctx.results["route"]["chosen"].items():
        found[budget] = MixturePlan.from_json(chosen)
        found |= {f"{budget} {agent}": _best_of(ctx, agent, found[budget]) for agent in ctx.job.finetune.compare}
    return found


def equals(found: Mapping[str, MixturePlan]) -> dict[str, str]:
    """Label -> the first label whose plan has the same architectures on the same intervals, where that is another one."""
    first: dict[Any, str] = {}
    owners = {label: first.setdefault((plan.partition, plan.experts), label) for label, plan in found.items()}
    return {label: owner for label, owner in owners.items() if owner != label}


def unit(label: str, interval: Interval) -> str:
    """The name of one expert of a row in the stage's result, and in progress lines."""
    return f"{label} {interval.name}"


def denoisers(ctx: Context) -> dict[str, DenoiserRef]:
    """Everything that is measured: dense; per budget the mixture, those of other agents, and the pretrained net cut uniformly."""
    tuned, width = ctx.results["finetune"]["experts"], ctx.job.elastic.unit
    elastic = tuple(located(ctx, expert) for expert in ctx.results["specialize"]["experts"])
    found = {"dense": DenoiserRef("dense")}
    for label, plan in plans(ctx).items():
        refs = tuple(located(ctx, tuned[unit(label, interval)]) for interval in plan.partition.intervals)
        found[label] = DenoiserRef(label, plan, refs, unit=width)
    for budget, chosen in ctx.results["route"]["chosen"].items():
        if ctx.job.evaluate.cut_only:
            label, uniform = f"{budget} cut only", _best_of(ctx, "uniform", MixturePlan.from_json(chosen))
            found[label] = DenoiserRef(label, uniform, elastic, cut_only=True, unit=width)
    return found


def _best_of(ctx: Context, agent: str, plan: MixturePlan) -> MixturePlan:
    """An agent's own plan at another plan's budget: the best of its seeds."""
    trials = map(MixturePlan.from_json, ctx.results["route"]["trials"])
    return min((trial for trial in trials if trial.agent == agent and trial.budget == plan.budget), key=lambda trial: trial.rank)
