"""The Expert Routing Agent with the same budget for every expert: what each loses is learned, who gets how much is not.

Before fine-tuning, the errors of small noisy experts seem to ask for most of a budget, and after it they do not; a search that trades
between experts then gives too much to some. Who is right, a little fine-tuning tells (`tasks_route.proxy_distance`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from workers.contracts import RouteSettings
from workers.routers import RouteProblem, Specs, era, uniform


def search(problem: RouteProblem, settings: RouteSettings, rng: random.Random) -> Specs:
    """The best plan within the budget whose experts each keep within it."""
    return search_front(problem, (problem.ratio,), settings, rng)[0]


def search_front(problem: RouteProblem, ratios: Sequence[float], settings: RouteSettings, rng: random.Random) -> list[Specs]:
    """One search per expert for several budgets. An expert that counts nothing is cut as `uniform` does."""
    found = [list(uniform.search(replace(problem, ratio=ratio), settings, rng)) for ratio in ratios]
    for k, weight in enumerate(problem.weights):
        if weight > 0:
            alone = tuple(float(j == k) for j in range(len(problem.experts)))
            plans = era.search_front(replace(problem, shares=alone, weights=alone), ratios, settings, rng)
            for specs, plan in zip(found, plans, strict=True):
                specs[k] = plan[k]
    return [tuple(specs) for specs in found]
