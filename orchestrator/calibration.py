"""What is measured of the elastic experts before plans are searched: once per run, for `route` and for every sweep.

Sensitivities: how much each expert's loss rises with each choice. Influence: how much an error of each expert counts in the samples of one
sampler. Both lie in the run folder's cache, as good as new while the experts' weights and the settings that they depend on are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator import experts
from orchestrator.experts import identity
from orchestrator.pipeline import Context
from orchestrator.store import read_object, write_json
from workers import families, tasks_route
from workers.contracts import Budget, ExpertCheckpoint, ExpertTask, RouteTask, digest_of
from workers.diffusion import sampler_timesteps, steps_per_expert
from workers.files import remove
from workers.influence import drawn_with, influences
from workers.trials import InfluenceTask

VERSION = 5
"""Grows with the meaning of what is measured here."""


def calibrate(ctx: Context, item: RouteTask, rows: Sequence[int]) -> RouteTask:
    """The task with its sensitivities, and its influence under its budget's sampler, measured unless they are there. ``rows``: the training
    images."""
    tables = [(item, k, str(_file(ctx, "sensitivity", [expert], []))) for k, expert in enumerate(item.experts)]
    todo = [table for table in tables if read_object(Path(table[2]), "rises", "seconds") is None]
    ctx.reused |= len(todo) < len(tables)
    ctx.cluster.scatter(tasks_route.expert_sensitivity, todo)
    return replace(item, sensitivity=tuple(out for _, _, out in tables), influence=_influence(ctx, item, rows))


def read_influence(item: RouteTask) -> list[float]:
    """How much an error of each expert counts per step it serves, on average 1."""
    return [1.0] * len(item.experts) if item.influence is None else list(_read(item.influence)["influence"])


def seconds_of(item: RouteTask) -> dict[str, float]:
    """Workers' time that was spent on what a calibrated task points to."""
    return {
        "sensitivities": sum(_read(path)["seconds"] for path in item.sensitivity),
        "influence": 0.0 if item.influence is None else _read(item.influence)["seconds"],
    }


def _read(path: str) -> dict[str, Any]:
    found = read_object(Path(path), "seconds")
    assert found is not None, path
    return found


def _influence(ctx: Context, item: RouteTask, rows: Sequence[int]) -> str | None:
    """The file of it; None if it is not to be measured."""
    samples, guidance = ctx.job.router.influence_samples, ctx.job.sampler.guidance_scale
    if samples == 0 or len(item.experts) == 1:
        return None
    scheduler, steps = item.budget.scheduler, item.budget.steps
    tuned, budget = _tuned(ctx, item, rows)
    keys = [] if budget is None else [budget.to_json(), *(experts.key_of(ctx, task, item.experts) for task in tuned)]
    out = _file(ctx, "influence", item.experts, [samples, scheduler, steps, guidance, keys])
    if read_object(out, "influence", "seconds") is not None:
        ctx.reused = True
    else:
        found = _distances(ctx, InfluenceTask(item, samples, ctx.job.evaluate.batch_size, guidance, "", tuned, budget), keys)
        timesteps = sampler_timesteps(scheduler, families.load_scheduler_config(item.model), steps)
        shares = [count / len(timesteps) for count in steps_per_expert(item.partition, timesteps)]
        write_json(out, {**found, "influence": influences(found["distances"], found["errors"], shares)})
    return str(out)


def _tuned(ctx: Context, item: RouteTask, rows: Sequence[int]) -> tuple[tuple[ExpertTask, ...], Budget | None]:
    """The short fine-tuning of every expert's part of a uniform plan, and its budget, the job's first, so that one more budget changes
    nothing; nothing without fine-tuning."""
    if not ctx.job.proxy_steps:
        return (), None
    found = experts.tuning(ctx, item.images, rows, item.partition, [None] * len(item.experts), "influence", experts.short(ctx))
    return found, ctx.job.budget(0)


def _distances(ctx: Context, task: InfluenceTask, keys: list[Any]) -> dict[str, Any]:
    """How far samples move while each expert alone is narrow, its error then, and the seconds that it took. Samplers differ little in this,
    so that those of which samples are drawn alike share it."""
    item = task.route
    drawn = drawn_with(item.budget.scheduler, item.budget.steps)
    out = _file(ctx, "distances", item.experts, [task.samples, *drawn, task.guidance_scale, keys])
    if (known := read_object(out, "distances", "errors", "seconds")) is not None:
        ctx.reused = True
        return known
    task = replace(task, dense=str(out.with_suffix(".npz")))
    ctx.cluster.scatter(tasks_route.draw_dense, [task])
    seconds = sum(ctx.cluster.calls[-1].units)
    found = ctx.cluster.scatter(tasks_route.expert_influence, [(task, k) for k in range(len(item.experts))])
    seconds += sum(ctx.cluster.calls[-1].units)
    remove(Path(task.dense))
    distances, errors = ([pair[i] for pair in found] for i in (0, 1))
    write_json(out, {"distances": distances, "errors": errors, "seconds": round(seconds, 2)})
    return _read(str(out))


def _file(ctx: Context, kind: str, experts: Sequence[ExpertCheckpoint], settings: list[Any]) -> Path:
    trained = [identity(expert) for expert in experts]
    key = digest_of([VERSION, ctx.fingerprints["specialize"], trained, ctx.job.router.images, settings])[:10]
    return ctx.store.folder / "cache" / "-".join([kind, *([experts[0].interval.name] if len(experts) == 1 else []), f"{key}.json"])
