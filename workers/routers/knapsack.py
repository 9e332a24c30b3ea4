"""The exact optimum of an additive model: every site adds the loss rise that was measured when it alone was reduced."""

from __future__ import annotations

import random
from collections.abc import Sequence

from workers.allocation import allocate
from workers.contracts import ArchitectureSpec, RouteSettings
from workers.routers import RouteProblem, Sensitivity, Specs


def search(problem: RouteProblem, settings: RouteSettings, rng: random.Random) -> Specs:
    """The plan of least summed loss rise within the budget, over the sites of all experts at once."""
    plan = best_sum(problem, problem.sensitivity)
    assert plan is not None  # the problem is reachable
    return plan


def best_sum(problem: RouteProblem, rises: Sequence[Sensitivity], weights: Sequence[float] | None = None) -> Specs | None:
    """The plan within the budget whose rises, times ``weights`` (by default the experts'), sum to the least; None if there is none.

    Only choices that ``rises[k][site]`` lists are allowed.
    """
    sites, options = problem.space.sites, []
    for share, weight, rise in zip(problem.shares, weights or problem.weights, rises, strict=True):
        for site in sites:
            options.append([(share * problem.price(site.name, choice), weight * loss) for choice, loss in rise[site.name].items()])
    fixed = 1 - sum(problem.price(site.name, site.dense) for site in sites)
    chosen = allocate(options, problem.ratio - sum(problem.shares) * fixed)
    if chosen is None:
        return None
    picks = iter(chosen)
    return tuple(ArchitectureSpec({site.name: list(rise[site.name])[next(picks)] for site in sites}) for rise in rises)
