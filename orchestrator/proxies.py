"""Which agent's plan is best once it is fine-tuned? Each one's experts are trained for a little while, and their errors are looked at.

    <run folder>/cache/proxy-<key>.json    of one plan: how far its experts are from dense then, and the seconds that it took
A search loss is of sub-networks of the elastic experts. Fine-tuning makes up for some cuts and not for others, and a plan that is far ahead
before may be behind after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator import experts
from orchestrator.calibration import read_influence
from orchestrator.pipeline import Context
from orchestrator.store import read_object
from workers import tasks_route
from workers.contracts import Budget, MixturePlan, RouteTask, digest_of
from workers.trials import ProxyTask

VERSION = 3
"""Grows with the meaning of a distance."""


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
        ctx.cluster.scatter(tasks_route.proxy_distance, [replace(task, out=str(folder / task.out)) for task in todo])
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
    short = experts.tuning(ctx, item.images, rows, plan.partition, plan.experts, "proxy", experts.short(ctx))
    keys = [experts.key_of(ctx, task, item.experts) for task in short]
    key = digest_of([VERSION, keys, plan.partition.to_json(), item.rows, plan.shares, read_influence(item)])
    return ProxyTask(replace(item, budget=plan.budget), plan, short, f"cache/proxy-{key[:10]}.json")
