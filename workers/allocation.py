"""Which option of every group, so that the losses sum to the least within a budget? The multiple-choice knapsack, solved exactly.

Groups may be the sites of all experts (options: their choices), or the experts themselves (options: the sub-networks tried so far).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Option = tuple[float, float]
"""(cost, loss) of one option."""
STATES = 2048
"""Partial sums that are remembered. Up to so many undominated ones, the answer is exact; beyond, each group may waste 1/STATES of the
budget."""


def allocate(groups: Sequence[Sequence[Option]], budget: float, states: int = STATES) -> list[int] | None:
    """Index of the chosen option of every group, by dynamic programming over undominated (cost, loss) sums; None if nothing fits.

    Ties go to the cheaper, then to the earlier option, so that equal inputs have equal answers.
    """
    cheapest = [min(cost for cost, _ in options) for options in groups]
    rest = float(sum(cheapest))
    costs, losses, trail = np.zeros(1), np.zeros(1), []
    for options, least in zip(groups, cheapest, strict=True):
        rest -= least
        cost, loss = np.asarray(options, dtype=float).T
        all_costs, all_losses = (costs[:, None] + cost).ravel(), (losses[:, None] + loss).ravel()
        order = np.lexsort((all_losses, all_costs))
        order = order[all_costs[order] + rest <= budget + 1e-12]
        if not len(order):
            return None
        before = np.minimum.accumulate(np.concatenate([[np.inf], all_losses[order][:-1]]))
        order = _thinned(order[all_losses[order] < before], all_costs, states)
        costs, losses = all_costs[order], all_losses[order]
        trail.append((order, len(options)))
    state, chosen = len(losses) - 1, []
    for order, count in reversed(trail):
        state, option = divmod(int(order[state]), count)
        chosen.append(option)
    return chosen[::-1]


def _thinned(order: np.ndarray, costs: np.ndarray, states: int) -> np.ndarray:
    """The best of every 1/states of the range of costs, and the cheapest of all, so that what fits still fits."""
    if len(order) <= states:
        return order
    ends = costs[order]
    cell = ((ends - ends[0]) * (states - 1) / (ends[-1] - ends[0])).astype(int)
    last = np.concatenate([cell[1:] != cell[:-1], [True]])
    last[0] = True
    return order[last]
