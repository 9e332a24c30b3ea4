"""Evolution: tournaments among plans, crossover between them, mutation of their sites, every child repaired to the budget."""

from __future__ import annotations

import random

from workers.contracts import ArchitectureSpec, RouteSettings
from workers.repair import repair
from workers.routers import RouteProblem, Specs, greedy, uniform

POPULATION, TOURNAMENT, CHILDREN = 24, 4, 8
MUTATED_SITES = 2.0
"""Sites of an expert that a mutation changes, on average."""


def search(problem: RouteProblem, settings: RouteSettings, rng: random.Random) -> Specs:
    """The lowest search loss of ``settings.trials`` plans. The first are the uniform and the greedy plan, and mutants of both."""
    parents = [uniform.search(problem, settings, rng), greedy.search(problem, settings, rng)][: settings.trials]
    tried: dict[Specs, float] = {}
    while True:
        wanted = min(CHILDREN, settings.trials - len(tried)) if tried else len(parents)
        plans = _children(problem, tried, wanted, rng) if tried else parents
        tried.update(zip(plans, problem.losses(plans), strict=True))
        best = min(tried, key=tried.__getitem__)
        problem.report(min(len(tried), settings.trials), settings.trials, tried[best])
        if len(tried) >= settings.trials or not plans:
            return best


def _children(problem: RouteProblem, tried: dict[Specs, float], count: int, rng: random.Random) -> list[Specs]:
    """New plans from the best POPULATION of those tried; fewer than ``count`` if the space seems exhausted."""
    population = sorted(tried, key=tried.__getitem__)[:POPULATION]
    children: dict[Specs, None] = {}
    for _ in range(20 * count):
        if len(children) == count:
            break
        mother, father = (min(rng.choices(population, k=TOURNAMENT), key=tried.__getitem__) for _ in range(2))
        child = repair(problem, _mutated(problem, _crossed(mother, father, rng), rng), rng)
        if child not in tried:
            children[child] = None
    return list(children)


def _crossed(mother: Specs, father: Specs, rng: random.Random) -> Specs:
    """Whole experts of either parent, as experts do not depend on each other; one of them mixed site by site."""
    child = [rng.choice(pair) for pair in zip(mother, father, strict=True)]
    k = rng.randrange(len(child))
    child[k] = ArchitectureSpec({site: rng.choice((mother[k], father[k]))[site] for site in mother[k].choices})
    return tuple(child)


def _mutated(problem: RouteProblem, specs: Specs, rng: random.Random) -> Specs:
    rate = MUTATED_SITES / len(problem.space.sites)
    return tuple(
        ArchitectureSpec({s.name: rng.choice(s.choices) if rng.random() < rate else spec[s.name] for s in problem.space.sites})
        for spec in specs
    )
