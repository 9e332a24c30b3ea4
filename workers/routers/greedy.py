"""Sensitivity-greedy: always cut where the least loss is paid per cost saved, by tables measured once per expert."""

from __future__ import annotations

import random

from workers.contracts import ArchitectureSpec, RouteSettings
from workers.routers import RouteProblem, Specs


def search(problem: RouteProblem, settings: RouteSettings, rng: random.Random) -> Specs:
    """The dense plan, cut until it fits."""
    return fit_budget(problem, (problem.space.dense,) * len(problem.experts))


def fit_budget(problem: RouteProblem, start: Specs) -> Specs:
    """Shrink ``start`` until it fits the budget, then give back what still fits: the best exchange of loss for cost first."""
    specs = [dict(spec.choices) for spec in start]
    spent = problem.cost_ratio(start)
    while spent > problem.ratio + 1e-12:
        price, k, site, choice = min(_moves(problem, specs, down=True))
        spent += _cost_change(problem, k, site, specs[k][site], choice)
        specs[k][site] = choice
    while True:
        room = problem.ratio - spent + 1e-12
        ups = [m for m in _moves(problem, specs, down=False) if _cost_change(problem, m[1], m[2], specs[m[1]][m[2]], m[3]) <= room]
        if not ups:
            return tuple(ArchitectureSpec(choices) for choices in specs)
        price, k, site, choice = min(ups)
        spent += _cost_change(problem, k, site, specs[k][site], choice)
        specs[k][site] = choice


def _cost_change(problem: RouteProblem, k: int, site: str, old: int, new: int) -> float:
    return problem.shares[k] * (problem.price(site, new) - problem.price(site, old))


def _moves(problem: RouteProblem, specs: list[dict[str, int]], down: bool) -> list[tuple[float, int, str, int]]:
    """Every move of one site: (loss per cost, expert, site, new choice). Down: to any cheaper choice, so that a bump in the table is
    jumped over. Up: to any choice with a lower loss (negative price, the best first)."""
    moves = []
    for k, choices in enumerate(specs):
        if problem.shares[k] == 0:
            continue
        for site in problem.space.sites:
            now, rises = choices[site.name], problem.sensitivity[k][site.name]
            for choice in site.choices:
                cost = _cost_change(problem, k, site.name, now, choice)
                loss = problem.weights[k] * (rises[choice] - rises[now])
                if (cost < 0) if down else (loss < 0):
                    # measured time may fall as a width grows: what costs nothing and helps comes first
                    moves.append((loss / max(-cost if down else cost, 1e-15), k, site.name, choice))
    return moves
