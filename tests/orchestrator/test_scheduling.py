"""Longest first: the order, the time it takes, and how near to the best possible that is; what fits where."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.cluster import Need
from orchestrator.scheduling import Call, least_s, longest_first, makespan_s
from workers.contracts import InputError

UNITS = st.lists(st.integers(1, 50).map(float), min_size=1, max_size=6)
SLOTS = st.integers(1, 4)


def best_s(units: list[float], slots: int) -> float:
    """By trying every assignment."""
    return min(
        max(sum(unit for unit, at in zip(units, places, strict=True) if at == slot) for slot in range(slots))
        for places in itertools.product(range(slots), repeat=len(units))
    )


def in_order(units: list[float]) -> list[float]:
    work = {str(i): unit for i, unit in enumerate(units)}
    return [work[name] for name in longest_first(work)]


@settings(deadline=None)
@given(UNITS, SLOTS)
def test_longest_first_is_within_four_thirds_of_the_best_assignment_and_no_bound_is_above_it(units, slots):
    best, found = best_s(units, slots), makespan_s(in_order(units), slots)
    assert least_s(units, slots) <= best + 1e-9
    assert best - 1e-9 <= found <= (4 / 3 - 1 / (3 * slots)) * best + 1e-9


def test_a_long_unit_that_comes_last_would_cost_a_round():
    assert makespan_s([1, 1, 1, 1, 4], 2) == 6
    assert makespan_s(in_order([1, 1, 1, 1, 4]), 2) == 4


def test_equals_stay_in_their_order():
    assert longest_first({"b": 1, "a": 1, "c": 2}) == ["c", "b", "a"]


@settings(deadline=None)
@given(UNITS, SLOTS, st.floats(0, 20))
def test_what_a_call_waited_for_processes_is_found_again(units, slots, startup):
    """Exact when every slot has the same number of units; never more than there was."""
    wall = makespan_s([unit + startup for unit in units], slots)
    call = Call.of("task", slots, wall, units, each=True)
    assert Call.from_json(call.to_json()).units == tuple(units)
    assert 0 <= call.startup_s <= startup * 2 + 1e-6
    if len(units) <= slots or len(set(units)) == 1:
        assert call.startup_s == pytest.approx(startup)


def test_a_call_of_nothing_took_no_time():
    assert Call.of("task", 4, 0.0, []).startup_s == 0


# --- what fits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("need", "node", "fits"),
    [
        (Need("cpu", 1, 0), {"CPU": 4}, 4),
        (Need("cuda", 2, 1), {"CPU": 16, "GPU": 4}, 4),
        (Need("cuda", 2, 1), {"CPU": 4, "GPU": 4}, 2),
        (Need("cuda", 1, 0.5), {"CPU": 16, "GPU": 1}, 2),
        (Need("cuda", 1, 0.1), {"CPU": 16, "GPU": 1}, 10),
        (Need("cpu", 1, 0, custom={"slot": 1}), {"CPU": 16, "slot": 3}, 3),
        (Need("cpu", 1, 0, custom={"slot": 1}), {"CPU": 16}, 0),
        (Need("cuda", 1, 1), {"CPU": 16}, 0),
    ],
)
def test_workers_fit_by_the_scarcest_resource(need, node, fits):
    assert need.fits(node) == fits


def test_what_never_fits_is_refused_with_what_there_is_and_what_to_lower():
    need = Need("cuda", 4, 1, workers_per_expert=3, custom={"H100": 1})
    with pytest.raises(InputError) as error:
        need.check([{"CPU": 8, "GPU": 2, "H100": 2}, {"CPU": 64}], "this cluster")
    assert str(error.value) == (
        "resources: 3 worker(s) of 4 CPUs and 1 GPU and 1 H100 never fit this cluster of 2 node(s), the largest with 8 CPUs and 2 GPUs "
        "and 2 H100: lower resources.cpus_per_worker, gpus_per_worker, custom or workers_per_expert"
    )
    need.check([{"CPU": 8, "GPU": 2, "H100": 2}, {"CPU": 4, "GPU": 1, "H100": 1}], "this cluster")
