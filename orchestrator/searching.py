"""Which plans are searched, each once: a trial is known by what it depends on, so that other budgets, agents and seeds find what is there.

    <run folder>/search/<budget>-<key> <agent> <seed>.json         one trial
                        front <key> <agent> <seed> <key>.json      those of one search for several budgets
Where an agent serves several budgets of one metric and sampler in one search, they are one task. A budget that is asked for later is
searched by itself, and those that were searched keep their plans, and with them their trained experts; `--redo route` searches all anew.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.calibration import read_influence, seconds_of
from orchestrator.cluster import TrialLog
from orchestrator.experts import identity
from orchestrator.pipeline import Context
from orchestrator.store import read_as
from workers import routers, tasks_route
from workers.contracts import Budget, InputError, MixturePlan, RouteTask, digest_of
from workers.trials import FrontTask, SearchTrial

VERSION = 4
"""Of the stage route: grows with what a search finds."""
PLACES = ("model", "images", "rows", "experts", "sensitivity", "influence", "latency", "device", "stage")
NAMED = ("budget", "agent", "search_seed")
"""What a task says of places, for which identities stand, and of what the name of a trial tells."""


@dataclass(frozen=True)
class Found:
    """What a search of all combinations left."""

    plans: list[MixturePlan]
    files: list[str]
    """Where the trials lie, relative to the run folder."""
    known: int
    """How many of the plans were there before."""
    seconds: dict[str, float]
    """Workers' time behind all of it, by kind of work, whenever that was."""


def search_plans(ctx: Context, item: RouteTask, budgets: Iterable[Budget], agents: Sequence[str], seeds: Sequence[int]) -> Found:
    """A plan of every agent and seed for every budget, searched now where it is not there. ``item``: what all trials share."""
    made_from = _made_from(ctx, item)
    names = {budget: f"{budget.name}-{digest_of([made_from, budget.to_json()])[:10]}" for budget in budgets}
    tasks = {
        f"{name}/{agent}/{seed}": replace(item, budget=budget, agent=agent, search_seed=seed)
        for (budget, name), agent, seed in itertools.product(names.items(), agents, seeds)
    }
    log, shared = TrialLog(ctx.store.folder), f"front {made_from[:10]}"

    def fronts() -> dict[str, tuple[SearchTrial, Path]]:
        found = {}
        for path in sorted(log.folder.glob(f"{shared} *.json")):
            for trial in read_front(path):
                if trial.plan is not None and trial.plan.budget in names:
                    found[f"{names[trial.plan.budget]}/{trial.plan.agent}/{trial.plan.seed}"] = (trial, path)
        return found

    known = {**log.read(tasks), **fronts()}.keys() & tasks.keys()
    ctx.reused |= bool(known)
    search_fronts(
        ctx,
        {key: task for key, task in tasks.items() if key not in known},
        lambda task, of: log.folder / f"{shared} {task.agent} {task.search_seed} {digest_of([b.to_json() for b in of])[:10]}.json",
    )
    together = {key: found for key, found in fronts().items() if key in tasks}
    alone = {key: task for key, task in tasks.items() if key not in together}
    axes = {"budget": list(names.values()), "agent": agents, "seed": seeds}
    trials = ctx.cluster.search(tasks_route.search_plan, axes, alone, ctx.store.folder)
    files = {path for _, path in together.values()} | {log.file(key) for key in alone}
    trials |= {key: trial for key, (trial, _) in together.items()}
    return Found(
        plans=[trials[key].plan for key in tasks if trials[key].plan is not None],
        files=sorted(path.relative_to(ctx.store.folder).as_posix() for path in files),
        known=len(known),
        seconds={**seconds_of(item), "trials": sum(trials[key].seconds for key in tasks)},
    )


def search_fronts(
    ctx: Context, tasks: Mapping[str, RouteTask], file: Callable[[RouteTask, Sequence[Budget]], Path]
) -> dict[str, SearchTrial]:
    """The trials, by their keys, of agents that serve several of the tasks' budgets in one search; ``file``: where it is written down.

    A search whose file is there is not run again.
    """
    groups: dict[tuple[object, ...], dict[str, RouteTask]] = {}
    for key, task in tasks.items():
        budget = task.budget
        groups.setdefault((task.agent, task.search_seed, budget.metric, budget.scheduler, budget.steps), {})[key] = task
    fronts = {}
    for group in groups.values():
        first, *others = group.values()
        if others and routers.serves_fronts(first.agent):
            budgets = tuple(task.budget for task in group.values())
            fronts[tuple(group)] = FrontTask(first, budgets, str(file(first, budgets)))
    ctx.cluster.scatter(tasks_route.search_front, [front for front in fronts.values() if not read_front(Path(front.out))])
    return {key: trial for keys, front in fronts.items() for key, trial in zip(keys, read_front(Path(front.out)), strict=True)}


def read_front(path: Path) -> list[SearchTrial]:
    """The trials of one search for several budgets; none if it has not ended. Raises: InputError if the file is damaged."""

    def decode(found: Any) -> list[SearchTrial]:
        if not isinstance(found, list):
            raise InputError("it is not a list")
        return [SearchTrial.from_json(trial) for trial in found]

    return read_as(path, decode) or []


def _made_from(ctx: Context, item: RouteTask) -> str:
    """Stands for all that the trials of a search have in common."""
    told = {name: value for name, value in item.to_json().items() if name not in (*PLACES, *NAMED)}
    latency = None if item.latency is None else hashlib.sha256(Path(item.latency).read_bytes()).hexdigest()
    experts = [identity(expert) for expert in item.experts]
    return digest_of([VERSION, ctx.fingerprints["specialize"], experts, told, read_influence(item), latency])
