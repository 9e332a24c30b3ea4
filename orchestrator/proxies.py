"""Which agent's plan is best once it is fine-tuned? Each one's experts are trained for a little while, and their samples are looked at.

    <run folder>/cache/proxy-<key>.json    of one plan: how far its samples are from dense's then, and the seconds that it took
A search loss is of sub-networks of the elastic experts. Fine-tuning makes up for some cuts and not for others, and a plan that is far ahead
before may be behind after it. But a little fine-tuning is not all of it: what the noisy experts lack is made up for last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator import experts
from orchestrator.calibration import dense_samples
from orchestrator.pipeline import Context
from orchestrator.store import read_object
from workers import tasks_route
from workers.contracts import Budget, MixturePlan, RouteTask, digest_of
from workers.trials import InfluenceTask, ProxyTask

VERSION = 2
"""Grows with the meaning of a distance."""
CLEARLY = 2.0
"""By this factor samples must be closer to overrule the search. On CIFAR-10 a uniform plan was 1.25 times closer than `era`'s, which gave
its noisy expert less, after 100 steps of fine-tuning, and far behind after 2,500 (Frechet distances of 2.03 and 1.74)."""


def choose(plans: Sequence[MixturePlan]) -> MixturePlan:
    """Of one budget's plans that of the lowest search loss, unless the samples of another are clearly closer to dense's."""
    found, closest = min(plans, key=lambda plan: plan.loss), min(plans, key=lambda plan: plan.rank)
    if found.distance is None or closest.distance is None:
        return found
    return closest if closest.distance * CLEARLY < found.distance else found


def compare(ctx: Context, item: RouteTask, rows: Sequence[int], plans: Sequence[MixturePlan]) -> tuple[list[MixturePlan], float]:
    """The plans, with their distances where agents differ, and the seconds of workers' time behind those. ``rows``: the training images."""
    files: dict[tuple[Budget, object], str] = {}
    tasks: dict[str, ProxyTask] = {}
    for plan in _rivals(plans) if ctx.job.proxy_steps else []:
        task = _task(ctx, item, rows, plan)
        files[plan.budget, plan.experts] = task.out
        tasks.setdefault(task.out, task)
    folder = ctx.store.folder
    todo = [task for name, task in tasks.items() if _read(folder / name) is None]
    ctx.reused |= len(todo) < len(tasks)
    if todo:
        with dense_samples(ctx, todo[0].drawn):
            placed = [replace(task, out=str(folder / task.out)) for task in todo]
            ctx.cluster.scatter(tasks_route.proxy_distance, placed)
    found = {name: of for name in tasks if (of := _read(folder / name)) is not None}
    distances = {key: found[name]["distance"] for key, name in files.items()}
    told = [replace(plan, distance=distances.get((plan.budget, plan.experts))) for plan in plans]
    return told, sum(of["seconds"] for of in found.values())


def _read(path: Path) -> dict[str, Any] | None:
    return read_object(path, "distance", "seconds")


def _rivals(plans: Sequence[MixturePlan]) -> list[MixturePlan]:
    """Per budget the best plan of every agent, where they are not all one plan."""
    found: list[MixturePlan] = []
    for budget in dict.fromkeys(plan.budget for plan in plans):
        best: dict[str, MixturePlan] = {}
        for plan in sorted((plan for plan in plans if plan.budget == budget), key=lambda plan: plan.loss):
            best.setdefault(plan.agent, plan)
        found += best.values() if len({plan.experts for plan in best.values()}) > 1 else []
    return found


def _task(ctx: Context, item: RouteTask, rows: Sequence[int], plan: MixturePlan) -> ProxyTask:
    job, dense = ctx.job, str(ctx.store.folder / "cache" / "proxy-dense.npz")
    samples = job.router.influence_samples or job.evaluate.samples
    short = experts.tuning(ctx, item.images, rows, plan.partition, plan.experts, "proxy", experts.short(ctx))
    drawn = InfluenceTask(item, samples, job.evaluate.batch_size, job.sampler.guidance_scale, dense)
    keys = [experts.key_of(ctx, task, item.experts) for task in short]
    key = digest_of([VERSION, keys, plan.partition.to_json(), samples, job.sampler.scheduler, job.sampler.steps, drawn.guidance_scale])
    return ProxyTask(drawn, plan, short, f"cache/proxy-{key[:10]}.json")
