"""Two matrices on one axis of noise levels: what is the same agrees with itself, what is reversed does not, and chance is known."""

from itertools import pairwise

import numpy as np
import pytest

from workers.agreement import (
    Side,
    adjusted_rand,
    common_levels,
    compare,
    correlation,
    random_rand,
    resample,
    uniform_labels,
    without_distance,
)
from workers.contracts import InputError, Partition
from workers.partition import grid
from workers.similarity import gram_of, similarity_of


def log_snr(timesteps: int = 1000, last: float = 0.02) -> np.ndarray:
    """Of DDPM's linear schedule."""
    abar = np.cumprod(1 - np.linspace(1e-4, last, timesteps))
    return np.log(abar) - np.log1p(-abar)


def side(boundaries, points: int = 20, noise: float = 0.1, seed: int = 0, snr: np.ndarray | None = None, measure: str = "gradient") -> Side:
    """A model whose timesteps are alike within each interval: one random direction each, with a minibatch's noise of size ``noise``."""
    snr = log_snr() if snr is None else snr
    num, rng = len(snr), np.random.default_rng(7)
    timesteps, partition = grid(num, points), Partition.from_boundaries(boundaries, num)
    directions = rng.standard_normal((len(partition), 40)) / 40**0.5
    clean = np.stack([directions[partition.index_of(t)] for t in timesteps])
    rng = np.random.default_rng(seed)
    embeddings = clean[None] + noise / 40**0.5 * rng.standard_normal((16, points, 40))
    gram = gram_of(embeddings.astype(np.float32))
    return Side(similarity_of(gram, measure, timesteps, num, 64), gram, partition, snr, 1)


# --- the axis ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("points", [1, 7, 16, 24, 64, 1000])
def test_models_with_one_schedule_meet_at_their_grid(points):
    snr = log_snr()
    np.testing.assert_array_equal(common_levels(snr, snr, points), snr[list(grid(1000, points))])


def test_levels_fall_lie_in_both_ranges_and_do_not_depend_on_the_order_of_the_models():
    one, two = log_snr(), log_snr(400, 0.03)
    levels = common_levels(one, two, 30)
    assert all(a > b for a, b in pairwise(levels))
    assert max(one.min(), two.min()) <= levels.min() <= levels.max() <= min(one.max(), two.max())
    np.testing.assert_array_equal(levels, common_levels(two, one, 30))


def test_models_without_a_common_noise_level_are_refused():
    with pytest.raises(InputError, match=r"share no noise level: log-SNR is 5\.0 to 9\.0 in one, -3\.0 to 4\.0"):
        common_levels(np.array([9.0, 5.0]), np.array([4.0, -3.0]), 4)


def test_a_matrix_read_at_its_own_grid_is_itself():
    matrix = side([300, 600]).matrix
    values = np.asarray(matrix.values)
    np.testing.assert_allclose(resample(values, matrix.timesteps, np.array(matrix.timesteps, float)), values, atol=1e-12)


def test_between_grid_points_it_is_read_linearly_and_beyond_them_level():
    values = np.array([[1.0, 0.0], [0.0, 1.0]])
    found = resample(values, (10, 20), np.array([0.0, 12.5, 20.0]))
    np.testing.assert_allclose(found, [[1, 0.75, 0], [0.75, 1, 0.25], [0, 0.25, 1]])


# --- the statistics ---------------------------------------------------------------------------------------------------


def brute_force_rand(left, right) -> float:
    """Over all pairs of points: agreements less those expected, over the most less those expected."""
    n = len(left)
    together = [(left[i] == left[j], right[i] == right[j]) for i in range(n) for j in range(i)]
    both, one, two = sum(a and b for a, b in together), sum(a for a, _ in together), sum(b for _, b in together)
    expected = one * two / len(together)
    return (both - expected) / ((one + two) / 2 - expected)


def test_the_adjusted_rand_index_is_that_of_all_pairs():
    rng = np.random.default_rng(0)
    for _ in range(20):
        left, right = rng.integers(3, size=12), rng.integers(4, size=12)
        assert adjusted_rand(left, right) == pytest.approx(brute_force_rand(left.tolist(), right.tolist()))


def test_same_clusters_reach_one_whatever_their_names():
    assert adjusted_rand([0, 0, 1, 1, 2], [2, 2, 0, 0, 1]) == 1
    assert adjusted_rand([0, 0, 0], [0, 0, 0]) == 1


def test_random_cuts_exceed_their_threshold_one_time_in_twenty():
    threshold, rng = random_rand(24, 3, 4, seed=1), np.random.default_rng(5)

    def draw(experts: int) -> np.ndarray:
        return np.searchsorted(np.sort(rng.choice(np.arange(1, 24), experts - 1, False)), np.arange(24), "right")

    assert np.mean([adjusted_rand(draw(3), draw(4)) > threshold for _ in range(800)]) == pytest.approx(0.05, abs=0.025)


def test_uniform_labels_share_the_points_out():
    assert np.bincount(uniform_labels(10, 3)).tolist() == [4, 3, 3]


def test_what_depends_on_distance_alone_vanishes_beyond_distance():
    distance = np.abs(np.subtract.outer(np.arange(9), np.arange(9)))
    np.testing.assert_allclose(without_distance(1 / (1 + distance)), 0, atol=1e-12)
    assert correlation(without_distance(1 / (1 + distance)), np.random.default_rng(0).random((9, 9))) == 0


# --- the comparison ---------------------------------------------------------------------------------------------------


def test_a_run_agrees_with_itself():
    found = compare(side([200, 700]), side([200, 700]), replicates=30, seed=0)
    for key in ("correlation", "correlation_beyond_distance", "adjusted_rand"):
        assert found[key]["value"] == pytest.approx(1)
    assert found["adjusted_rand"] == {"value": 1, "low": 1, "high": 1}
    assert found["self_agreement"] == [1, 1]
    assert {k: rand["value"] for k, rand in found["at_equal_numbers"].items()} == dict.fromkeys("23456", 1)
    assert found["adjusted_rand_of_random"] < 1


def test_same_clusters_measured_on_other_images_agree_and_other_clusters_do_not():
    same = compare(side([200, 700], seed=1), side([200, 700], seed=2), 30, 0)
    other = compare(side([200, 700], seed=1), side([450, 900], seed=2), 30, 0)
    assert same["correlation"]["low"] > 0.95 > other["correlation"]["high"]
    assert same["adjusted_rand"]["low"] > same["adjusted_rand_of_random"] > other["adjusted_rand"]["value"]


def test_clusters_in_noise_agree_across_noise_schedules_and_grids():
    """The second model meets the same noise levels at other timesteps; its clusters are the first one's in log-SNR."""
    one, two = log_snr(), log_snr(500, 0.05)
    boundaries = [300, 600]
    moved = [int(np.abs(two - one[b]).argmin()) for b in boundaries]
    found = compare(side(boundaries, 20), side(moved, 32, snr=two), 20, 0)
    assert len(found["levels"]) == 20
    assert found["adjusted_rand"]["value"] > 0.8 > found["adjusted_rand_of_random"]


def test_noise_shows_as_low_reliability_and_little_agreement_with_itself():
    quiet, loud = side([200, 700], noise=0.1), side([200, 700], noise=60)
    found = compare(quiet, loud, 30, 0)
    assert found["reliability"][0] > 0.9
    assert found["reliability"][1] < 0.5
    assert found["self_agreement"][0] == 1
    assert found["self_agreement"][1] < 0.7
    assert found["correlation"]["high"] - found["correlation"]["low"] > 0.05


def test_the_same_seed_gives_the_same_numbers():
    runs = side([200, 700], noise=2), side([300], noise=2, seed=3)
    assert compare(*runs, 20, 4) == compare(*runs, 20, 4)


def test_matrices_of_different_kinds_are_refused():
    with pytest.raises(InputError, match="different kinds, gradient and snr: analyze both runs with the same similarity.measure"):
        compare(side([500]), side([500], measure="snr"), 5, 0)
