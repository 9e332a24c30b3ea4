"""The same ratio everywhere: every site of every expert is cut to one common level. The baseline that every agent must beat."""

from __future__ import annotations

import random

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


def search(problem: RouteProblem, settings: RouteSettings, rng: random.Random) -> Specs:
    """The highest level that fits, found by bisection; widths shrink first, branches go only when the narrowest is still too dear."""
    low, high = 0.0, 2.0
    if problem.within_budget((problem.space.dense,) * len(problem.experts)):
        return (problem.space.dense,) * len(problem.experts)
    for _ in range(40):
        middle = (low + high) / 2
        fits = problem.within_budget((at_level(problem.space, middle),) * len(problem.experts))
        low, high = (middle, high) if fits else (low, middle)
    return (at_level(problem.space, low),) * len(problem.experts)
