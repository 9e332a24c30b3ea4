"""Any plan made to fit its budget and to use it up, at random: what agents that try plans share. Knows costs, not losses."""

from __future__ import annotations

import random

from workers.contracts import ArchitectureSpec, SearchSpace
from workers.routers import RouteProblem, Specs


def random_spec(space: SearchSpace, rng: random.Random) -> ArchitectureSpec:
    """A sub-network of random overall size, its sites spread around it."""
    size = rng.random()

    def choice(choices: tuple[int, ...]) -> int:
        return choices[round(min(1.0, max(0.0, size + rng.uniform(-0.5, 0.5))) * (len(choices) - 1))]

    return ArchitectureSpec({site.name: choice(site.choices) for site in space.sites})


def repair(problem: RouteProblem, specs: Specs, rng: random.Random) -> Specs:
    """Sites drawn at random become the next cheaper choice until the plan fits, then others the next dearer one while it still does.

    Only experts that the sampler calls are touched.
    """
    plan = [dict(spec.choices) for spec in specs]
    ladders = {
        site.name: sorted({problem.price(site.name, choice): choice for choice in site.choices}.items()) for site in problem.space.sites
    }
    places = [(k, name) for k, share in enumerate(problem.shares) if share > 0 for name in ladders]
    room = problem.ratio - problem.cost_ratio(specs)

    def step(k: int, name: str, up: bool) -> tuple[float, int] | None:
        """(what it costs, the choice) of the next dearer or cheaper choice; None at the end of the ladder."""
        now = problem.price(name, plan[k][name])
        further = [(price, choice) for price, choice in ladders[name] if (price > now if up else price < now)]
        if not further:
            return None
        price, choice = further[0 if up else -1]
        return problem.shares[k] * (price - now), choice

    for up in (False, True):
        open_ = list(places)
        while open_ and (up or room < -1e-12):
            place = rng.choice(open_)
            found = step(*place, up)
            if found is None or (up and found[0] > room + 1e-12):
                open_.remove(place)  # room only shrinks on the way up, so that what does not fit never will
                continue
            room -= found[0]
            plan[place[0]][place[1]] = found[1]
    return tuple(ArchitectureSpec(choices) for choices in plan)
