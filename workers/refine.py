"""Joint refinement of a plan: measure what every site's change does around it, let the knapsack exchange them, keep what truly helps.

Sensitivities around dense say little at half the cost; here they are measured again around each better plan, on a few images, and every
exchange they suggest is verified by its true loss on all of them. Experts do not depend on each other: whatever sub-network was ever
tried for one may be combined with any of another, exactly, for any budget.
"""

from __future__ import annotations

import random
from collections.abc import Iterable

from workers.allocation import allocate
from workers.contracts import ArchitectureSpec
from workers.routers import RouteProblem, Sensitivity, Specs
from workers.routers.knapsack import best_sum
from workers.sensitivity import measure_sensitivity, ranks_around

FEW_IMAGES, FEW_PART = 8, 8
"""Sensitivities are measured on one of FEW_PART images, but at least FEW_IMAGES."""
OPEN = (1.0, 0.5, 0.5, 0.25, 0.25, 0.1)
"""Parts of the sites that the candidates of a round may change: the fewer, the surer is the sum of the rises."""
PATIENCE = 3
"""Rounds without a better plan before the rest of the passes is left unused."""


class Archive:
    """Every sub-network that a search has tried, per expert, and the best combination of them."""

    def __init__(self, problem: RouteProblem):
        self.problem = problem
        self.tried: list[dict[ArchitectureSpec, tuple[float, float]]] = [{} for _ in problem.experts]
        """Per expert: sub-network -> what it adds to the plan's cost and loss."""

    def add(self, plans: Iterable[Specs]) -> None:
        """Run the plans' sub-networks that are new; the device is waited for once."""
        problem, plans = self.problem, list(plans)
        problem.losses(plans)
        for specs in plans:
            for k, spec in enumerate(specs):
                if spec not in self.tried[k]:
                    cost = problem.table.cost(spec).of(problem.metric) / problem.table.dense.of(problem.metric)
                    self.tried[k][spec] = problem.shares[k] * cost, problem.expert_loss(k, spec)

    def best(self, ratio: float) -> Specs:
        """The combination of lowest loss within the budget; one plan within it must have been added."""
        chosen = allocate([list(tried.values()) for tried in self.tried], ratio)
        assert chosen is not None
        return tuple(list(tried)[i] for tried, i in zip(self.tried, chosen, strict=True))


def refine(problem: RouteProblem, archive: Archive, passes: float, rng: random.Random) -> None:
    """Improve the archive around its best plan for ``problem.ratio``, with at most about ``passes`` forward passes of whole batches."""
    start, idle, turn = problem.passes, 0, 0
    while (spent := problem.passes - start) < passes and idle < PATIENCE:
        plan = archive.best(problem.ratio)
        rises = _rises_around(problem, plan, (passes - spent) / 2, turn, rng)
        affordable = problem.passes - start > spent
        candidates = (best_sum(problem, _opened(rises, plan, part, rng)) for part in OPEN)
        archive.add(dict.fromkeys(specs for specs in candidates if specs is not None))
        turn += 1
        idle = 0 if archive.best(problem.ratio) != plan else idle + 1
        if not affordable:
            return


def _rises_around(problem: RouteProblem, plan: Specs, passes: float, turn: int, rng: random.Random) -> list[Sensitivity]:
    """Sensitivities around a plan, for at most so many passes. Where not all sites can be afforded, those of some at random."""
    active = [k for k, weight in enumerate(problem.weights) if weight > 0]
    rises: list[Sensitivity] = [{site: {choice: 0.0} for site, choice in spec.choices.items()} for spec in plan]
    for k in active:
        batch = problem.search_batches[k]
        step = max(1, len(batch) // max(FEW_IMAGES, len(batch) // FEW_PART))
        part = batch.part(range(turn % step, len(batch), step))  # strided: the timesteps still cover the interval
        each, room, sites = len(part) / len(batch), passes / len(active), []
        for site in rng.sample(problem.space.sites, len(problem.space.sites)):
            room -= each * len(ranks_around(site, plan[k][site.name]))
            if room < each:
                break
            sites.append(site)
        if sites:
            networks = 1 + sum(len(ranks_around(site, plan[k][site.name])) for site in sites)
            problem.effort.images += networks * len(part)
            rises[k] = {**rises[k], **measure_sensitivity(problem.experts[k], part, around=plan[k], sites=sites)}
    return rises


def _opened(rises: list[Sensitivity], plan: Specs, part: float, rng: random.Random) -> list[Sensitivity]:
    """The rises of a random part of the sites; the others stay as they are."""
    return [
        {site: row if rng.random() < part else {spec[site]: 0.0} for site, row in rise.items()}
        for rise, spec in zip(rises, plan, strict=True)
    ]
