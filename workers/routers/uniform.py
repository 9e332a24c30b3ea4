"""The same ratio everywhere: every site of every expert is cut to one common level. The baseline that every agent must beat."""

from __future__ import annotations

import random
from collections.abc import Callable

from workers.contracts import ArchitectureSpec, ElasticSite, RouteSettings, SearchSpace
from workers.routers import RouteProblem, Specs

GOLDEN = 0.6180339887498949


def at_level(space: SearchSpace, level: float) -> ArchitectureSpec:
    """The sub-network at ``level``: 2 is dense, 1 the narrowest, 0 the smallest. In between, sites step down one at a time, well spread."""
    return ArchitectureSpec({site.name: _choice(site, level, i * GOLDEN % 1) for i, site in enumerate(space.sites)})


def _choice(site: ElasticSite, level: float, dither: float) -> int:
    widths = [choice for choice in site.choices if choice > 0]
    if level < 1 and site.choices[0] == 0:
        return 0 if dither >= level else widths[0]
    return widths[min(len(widths) - 1, int(max(0.0, level - 1) * (len(widths) - 1) + dither))]


def highest(problem: RouteProblem, plan_at: Callable[[float], Specs]) -> Specs | None:
    """``plan_at`` the highest level in [0, 2] that fits the budget, by bisection; None if level 0 does not fit."""
    if problem.within_budget(plan_at(2.0)):
        return plan_at(2.0)
    low, high = 0.0, 2.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if problem.within_budget(plan_at(middle)) else (low, middle)
    return plan_at(low) if problem.within_budget(plan_at(low)) else None


def search(problem: RouteProblem, settings: RouteSettings, rng: random.Random) -> Specs:
    """The highest level that fits; widths shrink first, branches go only when the narrowest is still too dear."""
    plan = highest(problem, lambda level: (at_level(problem.space, level),) * len(problem.experts))
    return plan or (problem.cheapest,) * len(problem.experts)
