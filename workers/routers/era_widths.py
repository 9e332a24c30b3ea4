"""The Expert Routing Agent where every branch stays: it allocates widths alone, over sites and experts.

Elastic experts, trained for a short while, are too kind to plans that drop branches: fine-tuning makes up for narrow branches more than for
missing ones. At a budget of MACs this is often the better plan; at one of time dropped branches save more. Who is right, the samples tell
(`tasks_route.proxy_distance`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from workers.contracts import RouteSettings, SearchSpace
from workers.routers import RouteProblem, Specs, era, uniform


def search(problem: RouteProblem, settings: RouteSettings, rng: random.Random) -> Specs:
    """The best plan of widths within the budget."""
    return search_front(problem, (problem.ratio,), settings, rng)[0]


def search_front(problem: RouteProblem, ratios: Sequence[float], settings: RouteSettings, rng: random.Random) -> list[Specs]:
    """One search for several budgets. One that takes dropped branches gets the uniform plan."""
    table = replace(problem.table, space=_widths(problem.space))
    met = [ratio for ratio in ratios if ratio >= table.smallest_ratio(problem.metric)]
    found: dict[float, Specs] = {}
    if met:
        rises = [{site.name: {c: rise[site.name][c] for c in site.choices} for site in table.space.sites} for rise in problem.sensitivity]
        found = dict(
            zip(met, era.search_front(replace(problem, table=table, sensitivity=rises, ratio=met[0]), met, settings, rng), strict=True)
        )
    return [found.get(ratio) or uniform.search(replace(problem, ratio=ratio), settings, rng) for ratio in ratios]


def _widths(space: SearchSpace) -> SearchSpace:
    """The same sites, none of which may be dropped."""
    return SearchSpace(tuple(replace(site, choices=tuple(choice for choice in site.choices if choice)) for site in space.sites))
