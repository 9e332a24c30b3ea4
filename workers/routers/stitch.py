"""The hand rule: small where the noise is high, dense where the image is nearly clean (T-Stitch, arXiv 2402.14167)."""

from __future__ import annotations

import random

from workers.contracts import RouteSettings
from workers.routers import RouteProblem, Specs, uniform


def search(problem: RouteProblem, settings: RouteSettings, rng: random.Random) -> Specs:
    """The first experts dense and the others as large as still fits, one size for all of them; of the possible numbers of dense experts
    the one of lowest search loss. Where not even one dense expert fits, all are cut alike, as `uniform` does."""
    plans = [plan for dense in range(1, len(problem.experts)) if (plan := _stitched(problem, dense)) is not None]
    return min(plans, key=problem.loss) if plans else uniform.search(problem, settings, rng)


def _stitched(problem: RouteProblem, dense: int) -> Specs | None:
    """``dense`` experts as they are and the others at the highest uniform level that fits; None if none does."""
    clean, noisy = (problem.space.dense,) * dense, len(problem.experts) - dense
    return uniform.highest(problem, lambda level: clean + (uniform.at_level(problem.space, level),) * noisy)
