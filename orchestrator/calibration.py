"""What is measured of the elastic experts before plans are searched: once per run, for `route` and for every sweep.

Sensitivities: how much each expert's loss rises with each choice. Influence: how much an error of each expert counts in the samples.
Both lie in the run folder's cache, as good as new while the experts' weights and the settings that they depend on are the same.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.pipeline import Context
from orchestrator.store import read_json, write_json
from workers import families, tasks_route
from workers.contracts import ExpertCheckpoint, RouteTask, digest_of
from workers.diffusion import sampler_timesteps, steps_per_expert
from workers.files import remove
from workers.influence import influences
from workers.trials import InfluenceTask

VERSION = 1
"""Grows with the meaning of what is measured here."""


def calibrate(ctx: Context, item: RouteTask) -> RouteTask:
    """The task with its sensitivities and its influence, measured unless they are there."""
    tables = [(item, k, str(_file(ctx, "sensitivity", [expert], []))) for k, expert in enumerate(item.experts)]
    ctx.cluster.scatter(tasks_route.expert_sensitivity, [table for table in tables if not Path(table[2]).exists()])
    return replace(item, sensitivity=tuple(out for _, _, out in tables), influence=_influence(ctx, item))


def read_influence(item: RouteTask) -> list[float]:
    """How much an error of each expert counts per step it serves, on average 1."""
    return [1.0] * len(item.experts) if item.influence is None else list(json.loads(Path(item.influence).read_text())["influence"])


def _influence(ctx: Context, item: RouteTask) -> str | None:
    """The file of it; None if it is not to be measured."""
    job, samples = ctx.job, ctx.job.router.influence_samples
    if samples == 0 or len(item.experts) == 1:
        return None
    out = _file(ctx, "influence", item.experts, [samples, job.sampler.scheduler, job.sampler.steps, job.sampler.guidance_scale])
    if read_json(out) is None:
        dense = out.with_suffix(".npz")
        task = InfluenceTask(item, samples, job.evaluate.batch_size, job.sampler.guidance_scale, str(dense))
        ctx.cluster.scatter(tasks_route.draw_dense, [task])
        found = ctx.cluster.scatter(tasks_route.expert_influence, [(task, k) for k in range(len(item.experts))])
        distances, errors = ([pair[i] for pair in found] for i in (0, 1))
        timesteps = sampler_timesteps(job.sampler.scheduler, families.load_scheduler_config(item.model), job.sampler.steps)
        shares = [count / len(timesteps) for count in steps_per_expert(item.partition, timesteps)]
        write_json(out, {"influence": influences(distances, errors, shares), "distances": distances, "errors": errors})
        remove(dense)
    return str(out)


def _file(ctx: Context, kind: str, experts: tuple[ExpertCheckpoint, ...] | list[ExpertCheckpoint], settings: list[Any]) -> Path:
    trained = [[expert.interval.name, expert.step, expert.loss, expert.ended] for expert in experts]
    key = digest_of([VERSION, ctx.fingerprints["specialize"], trained, ctx.job.router.images, settings])[:10]
    return ctx.store.folder / "cache" / "-".join([kind, *([experts[0].interval.name] if len(experts) == 1 else []), f"{key}.json"])
