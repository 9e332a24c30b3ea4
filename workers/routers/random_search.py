"""Plans at random, each filled up to the budget; the best of them. What luck alone finds at the same number of trials."""

from __future__ import annotations

import random

from workers.contracts import RouteSettings
from workers.repair import random_spec, repair
from workers.routers import RouteProblem, Specs

ROUND = 10
"""Plans that are run before the device is waited for."""


def search(problem: RouteProblem, settings: RouteSettings, rng: random.Random) -> Specs:
    """The lowest search loss of ``settings.trials`` random plans."""
    best: tuple[float, Specs] | None = None
    for done in range(0, settings.trials, ROUND):
        count = min(ROUND, settings.trials - done)
        plans = [repair(problem, tuple(random_spec(problem.space, rng) for _ in problem.experts), rng) for _ in range(count)]
        found = min(zip(problem.losses(plans), plans, strict=True), key=lambda pair: pair[0])
        best = found if best is None or found[0] < best[0] else best
        problem.report(done + count, settings.trials, best[0])
    assert best is not None
    return best[1]
