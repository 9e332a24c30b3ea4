"""The multiple-choice knapsack against brute force."""

import itertools
import random

import pytest

from workers.allocation import allocate

Groups = list[list[tuple[float, float]]]


def some_groups(rng: random.Random, count: int, most: int) -> Groups:
    """Options with costs on a coarse grid, so that there are ties, and losses of either sign."""
    return [[(rng.randint(0, 8) / 8, rng.uniform(-1, 3)) for _ in range(rng.randint(1, most))] for _ in range(count)]


def sums(groups: Groups, chosen: list[int] | tuple[int, ...]) -> tuple[float, float]:
    options = [group[i] for group, i in zip(groups, chosen, strict=True)]
    return sum(cost for cost, _ in options), sum(loss for _, loss in options)


@pytest.mark.parametrize("seed", range(25))
def test_it_is_the_best_of_all_that_fit(seed):
    rng = random.Random(seed)
    groups = some_groups(rng, 4, 4)
    budget = rng.uniform(0, 4)
    everything = [sums(groups, chosen) for chosen in itertools.product(*(range(len(group)) for group in groups))]
    fits = [loss for cost, loss in everything if cost <= budget + 1e-12]
    chosen = allocate(groups, budget)
    if not fits:
        assert chosen is None
    else:
        assert sums(groups, chosen)[0] <= budget + 1e-12
        assert sums(groups, chosen)[1] == pytest.approx(min(fits))


def test_a_budget_of_exactly_the_cheapest_is_met():
    groups = [[(0.1, 1.0), (0.7, 0.0)], [(0.2, 1.0), (0.3, 0.0)], [(0.3, 0.5)]]
    assert allocate(groups, 0.1 + 0.2 + 0.3) == [0, 0, 0]
    assert allocate(groups, 0.59) is None


def test_ties_go_to_the_cheaper_then_the_earlier():
    assert allocate([[(0.5, 1.0), (0.2, 1.0), (0.2, 1.0)]], 1.0) == [1]


@pytest.mark.parametrize("seed", range(5))
def test_with_few_states_each_group_wastes_a_little_of_the_budget_at_most(seed):
    rng = random.Random(seed)
    groups = [[(rng.random(), rng.random()) for _ in range(6)] for _ in range(10)]
    cheapest = sum(min(cost for cost, _ in group) for group in groups)
    budget, states = cheapest + 2.0, 100
    thin, exact = allocate(groups, budget, states), allocate(groups, budget - len(groups) * budget / states, 1 << 20)
    assert sums(groups, thin)[0] <= budget
    assert sums(groups, thin)[1] <= sums(groups, exact)[1] + 1e-12
