"""The cuts are the exact best ones: brute force agrees, and what does not fit is refused."""

import itertools

import numpy as np
import pytest

from workers import partition
from workers.contracts import InputError, Partition, SimilarityMatrix

T = 1000


def random_similarity(points: int, seed: int) -> np.ndarray:
    """Cosines of random vectors: symmetric, unit diagonal, otherwise without order."""
    vectors = np.random.default_rng(seed).normal(size=(points, 4))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors @ vectors.T


def matrix(values: np.ndarray, num_timesteps: int = T) -> SimilarityMatrix:
    timesteps = partition.grid(num_timesteps, len(values))
    return SimilarityMatrix("test", num_timesteps, timesteps, tuple(map(tuple, values.tolist())), (1.0,) * len(values))


def blocks(*lengths: int) -> np.ndarray:
    """1 within each block, 0 between blocks."""
    label = np.repeat(np.arange(len(lengths)), lengths)
    return (label[:, None] == label[None, :]).astype(float)


def naive_cost(values: np.ndarray, start: int, stop: int) -> float:
    total = 0.0
    for i in range(start, stop):
        for j in range(start, stop):
            total += values[i, j]
    length = stop - start
    return length * (1 - total / length**2)


def cuts_by_brute_force(values: np.ndarray, experts: int, min_length: int) -> list[tuple[float, tuple[int, ...]]]:
    """Every legal way to cut, the cheapest first."""
    n, found = len(values), []
    for cuts in itertools.combinations(range(1, n), experts - 1):
        edges = list(itertools.pairwise((0, *cuts, n)))
        if all(b - a >= min_length for a, b in edges):
            found.append((sum(naive_cost(values, a, b) for a, b in edges), cuts))
    return sorted(found)


# --- the optimum ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("points", [1, 2, 7])
def test_interval_costs_equal_a_double_loop(points):
    values = random_similarity(points, seed=points)
    costs = partition.interval_costs(values)
    assert costs.shape == (points + 1, points + 1)
    for i in range(points + 1):
        for j in range(points + 1):
            assert costs[i, j] == (pytest.approx(naive_cost(values, i, j), abs=1e-12) if i < j else np.inf)


@pytest.mark.parametrize("points", range(2, 11))
def test_the_dynamic_programme_equals_brute_force(points):
    values = random_similarity(points, seed=points)
    costs = partition.interval_costs(values)
    for min_length in (1, 2, 3):
        for experts in range(1, points // min_length + 1):
            (best, cuts), *_ = cuts_by_brute_force(values, experts, min_length)
            found, found_cuts = partition.best_cuts(costs, experts, min_length)
            assert found == pytest.approx(best, abs=1e-9)
            assert found_cuts == cuts


def test_clean_blocks_are_found_exactly():
    similarity = matrix(blocks(2, 5, 3))
    assert partition.cut(similarity, 3).boundaries == (200, 700)
    assert partition.partition_cost(partition.cut(similarity, 3), similarity) == pytest.approx(0)


def test_a_long_interval_is_not_rewarded_for_its_length():
    """The plain sum of similarities (ANT's) would put everything mildly alike into one interval."""
    values = np.maximum(blocks(5, 5), 0.6)
    assert partition.cut(matrix(values), 2).boundaries == (500,)


def test_cuts_lie_halfway_between_grid_timesteps_of_any_grid():
    similarity = SimilarityMatrix("test", 100, (0, 10, 50, 51), tuple(map(tuple, blocks(2, 2).tolist())), (1.0,) * 4)
    assert partition.cut(similarity, 2).boundaries == (30,)
    assert partition.cell_edges(similarity.timesteps, 100) == [0, 5, 30, 51, 100]


@pytest.mark.parametrize("points", [1, 3, 64, 1000])
def test_the_grid_holds_the_middles_of_equal_cells(points):
    timesteps = partition.grid(T, points)
    edges = partition.cell_edges(timesteps, T)
    assert len(timesteps) == points
    assert edges == sorted(set(edges))
    assert all(a <= t < b for t, (a, b) in zip(timesteps, itertools.pairwise(edges), strict=True))
    assert max(b - a for a, b in itertools.pairwise(edges)) - min(b - a for a, b in itertools.pairwise(edges)) <= 1


@pytest.mark.parametrize("points", [0, 1001])
def test_a_grid_finer_than_the_schedule_is_refused(points):
    with pytest.raises(InputError, match=f"similarity.timesteps is {points}"):
        partition.grid(T, points)


# --- how many, how long ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", [1, 2, 5, 12])
@pytest.mark.parametrize("num_timesteps", [12, 1000])
def test_a_partition_covers_all_timesteps(experts, num_timesteps):
    found = partition.cut(matrix(random_similarity(12, seed=0), num_timesteps), experts)
    assert len(found) == experts
    assert found.num_timesteps == num_timesteps
    assert sum(interval.length for interval in found.intervals) == num_timesteps


@pytest.mark.parametrize(("experts", "min_length"), [(7, 1), (4, 2), (0, 1), (1, 7)])
def test_more_experts_than_fit_the_grid_are_refused(experts, min_length):
    with pytest.raises(InputError, match=f"{experts} experts"):
        partition.cut(matrix(random_similarity(6, seed=0)), experts, min_length=min_length)


def test_no_interval_is_shorter_than_the_minimum():
    values = blocks(1, 9)
    assert partition.cut(matrix(values), 2).boundaries == (100,)
    assert partition.cut(matrix(values), 2, min_length=3).boundaries == (300,)


def test_auto_minimises_relative_cost_plus_penalty():
    similarity = matrix(random_similarity(10, seed=3))
    costs = partition.interval_costs(np.asarray(similarity.values))
    for penalty in (0.0, 0.02, 0.1, 0.3, 1.0):
        by_hand = {k: partition.best_cuts(costs, k)[0] / costs[0, -1] + penalty * k for k in range(2, 7)}
        assert len(partition.cut(similarity, "auto", penalty=penalty)) == min(by_hand, key=by_hand.__getitem__)


@pytest.mark.parametrize(("lengths", "experts"), [((4, 8), 2), ((4, 4, 4), 3), ((2, 3, 3, 4), 4), ((6, 6, 1, 1), 4)])
def test_auto_finds_the_number_of_clean_blocks(lengths, experts):
    assert len(partition.cut(matrix(blocks(*lengths)))) == experts


def test_auto_heeds_the_most_experts_and_the_shortest_interval():
    similarity = matrix(blocks(*[1] * 12))
    assert len(partition.cut(similarity)) == 6
    assert len(partition.cut(similarity, max_experts=4)) == 4
    assert len(partition.cut(similarity, min_length=4)) == 3


def test_auto_needs_room_for_two_intervals():
    with pytest.raises(InputError, match="auto needs a grid with room for two"):
        partition.cut(matrix(blocks(5)), min_length=3)


def test_the_cost_curve_starts_at_one_and_never_rises():
    curve = partition.cost_curve(partition.interval_costs(random_similarity(10, seed=1)))
    assert list(curve) == [1, 2, 3, 4, 5, 6]
    assert curve[1] == 1
    assert all(curve[k + 1] < curve[k] for k in range(1, 6))


# --- other partitions -----------------------------------------------------------------------------------------------


def test_explicit_boundaries_are_taken_as_they_are():
    similarity = matrix(blocks(4))
    assert partition.cut(similarity, (1, 333, 999)).boundaries == (1, 333, 999)
    assert partition.cut(similarity, ()).boundaries == ()


@pytest.mark.parametrize("boundaries", [(0,), (1000,), (700, 300), (300, 300), (-3, 5)])
def test_explicit_boundaries_that_do_not_fit_are_refused(boundaries):
    with pytest.raises(InputError, match="must ascend within"):
        partition.explicit(boundaries, T)


@pytest.mark.parametrize("num_timesteps", [2, 7, 10, 1000])
def test_uniform_intervals_differ_by_one_timestep_at_most(num_timesteps):
    for experts in range(1, min(num_timesteps, 12) + 1):
        lengths = [interval.length for interval in partition.uniform_in_t(num_timesteps, experts).intervals]
        assert len(lengths) == experts
        assert sum(lengths) == num_timesteps
        assert max(lengths) - min(lengths) <= 1


def test_uniform_in_log_snr_cuts_the_range_of_log_snr_evenly():
    log_snr = np.linspace(8, -8, T) ** 3
    found = partition.uniform_in_log_snr(log_snr, 4)
    for boundary, level in zip(found.boundaries, (256, 0, -256), strict=True):
        assert log_snr[boundary - 1] > level >= log_snr[boundary]


@pytest.mark.parametrize("shape", [np.exp, lambda x: -np.exp(-x), lambda x: x])
@pytest.mark.parametrize("num_timesteps", [2, 10, 50])
def test_uniform_in_log_snr_gives_every_expert_a_timestep_on_steep_schedules(shape, num_timesteps):
    log_snr = shape(np.linspace(20, -20, num_timesteps))
    for experts in range(1, min(num_timesteps, 12) + 1):
        found = partition.uniform_in_log_snr(log_snr, experts)
        assert len(found) == experts
        assert found.num_timesteps == num_timesteps


def test_uniform_in_log_snr_keeps_the_shortest_interval_and_moves_only_the_cuts_that_break_it():
    kept = np.cumprod(1 - np.linspace(1e-4, 0.02, T))
    log_snr = np.log(kept / (1 - kept))  # steep at the clean end
    free = partition.uniform_in_log_snr(log_snr, 4)
    assert [interval.length >= 40 for interval in free.intervals] == [False, True, True, True]
    found = partition.uniform_in_log_snr(log_snr, 4, 40)
    assert found.boundaries == (40, *free.boundaries[1:])


def test_uniform_in_log_snr_is_uniform_in_t_where_the_shortest_interval_leaves_no_choice():
    log_snr = np.linspace(8, -8, 100) ** 3
    assert partition.uniform_in_log_snr(log_snr, 4, 25).boundaries == (25, 50, 75)
    assert partition.uniform_in_log_snr(log_snr, 4, 90).boundaries == (25, 50, 75), "as far as there is room"


def test_the_best_partition_is_no_dearer_than_the_baselines():
    similarity = matrix(random_similarity(10, seed=5))
    for experts in (2, 3, 5):
        best = partition.partition_cost(partition.cut(similarity, experts), similarity)
        assert best <= partition.partition_cost(partition.uniform_in_t(T, experts), similarity) + 1e-12
    assert partition.partition_cost(Partition.from_boundaries([], T), similarity) == pytest.approx(1)


# --- stability ------------------------------------------------------------------------------------------------------


def test_boundaries_always_return_when_the_replicates_are_identical():
    values = random_similarity(10, seed=2)
    found = partition.cut(matrix(values), 4)
    assert partition.boundary_frequency(np.stack([values] * 5), matrix(values), found, tolerance=0) == [1.0, 1.0, 1.0]


def test_boundary_frequency_counts_the_replicates_that_agree():
    chosen = partition.cut(matrix(blocks(4, 6)), 2)
    replicates = np.stack([blocks(4, 6), blocks(5, 5), blocks(3, 7), blocks(8, 2)])
    assert partition.boundary_frequency(replicates, matrix(blocks(4, 6)), chosen, tolerance=0) == [0.25]
    assert partition.boundary_frequency(replicates, matrix(blocks(4, 6)), chosen, tolerance=1) == [0.75]
    assert partition.boundary_frequency(replicates, matrix(blocks(4, 6)), Partition.from_boundaries([], T)) == []
