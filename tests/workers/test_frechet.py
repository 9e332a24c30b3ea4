"""The distances of two sets of features: the closed form of Gaussians, and torchmetrics' own functions on the same features."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import poly_mmd

from workers.contracts import InputError
from workers.frechet import Statistics, frechet_distance, is_statistics, kernel_distance, read_statistics, squared_mmd


@pytest.fixture(scope="module")
def sets() -> tuple[np.ndarray, np.ndarray]:
    """Correlated features of two different distributions."""
    rng = np.random.default_rng(3)
    mix = rng.standard_normal((12, 12))
    return (rng.standard_normal((300, 12)) @ mix).astype(np.float32), (0.3 + rng.standard_normal((200, 12)) @ mix.T).astype(np.float32)


def test_the_statistics_are_numpys(sets):
    found = Statistics.of(np.tile(sets[0], (5, 1)))
    np.testing.assert_allclose(found.mean, np.tile(sets[0], (5, 1)).mean(0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(found.cov, np.cov(np.tile(sets[0], (5, 1)).astype(np.float64), rowvar=False), rtol=1e-10)
    assert found.n == 1500


def test_the_frechet_distance_is_that_of_torchmetrics(sets):
    a, b = map(Statistics.of, sets)
    theirs = _compute_fid(*(torch.from_numpy(x) for s in (a, b) for x in (s.mean, s.cov)))
    assert frechet_distance(a, b) == pytest.approx(float(theirs), rel=1e-9)


def test_the_frechet_distance_of_axis_aligned_gaussians_is_the_closed_form():
    a = Statistics(np.array([0.0, 1.0]), np.diag([4.0, 9.0]), 10)
    b = Statistics(np.array([3.0, 1.0]), np.diag([1.0, 16.0]), 10)
    assert frechet_distance(a, b) == pytest.approx(3**2 + (2 - 1) ** 2 + (3 - 4) ** 2, rel=1e-12)


def test_the_frechet_distance_is_symmetric_and_zero_for_equal_sets_also_of_fewer_images_than_features(sets):
    a, b = map(Statistics.of, sets)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    few = Statistics.of(sets[0][:5])
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-6 * np.trace(few.cov))


def test_the_kernel_distance_is_that_of_torchmetrics_on_the_same_subsets(sets):
    a, b = sets[0][:150], sets[1][:150]
    theirs = poly_mmd(torch.from_numpy(a).double(), torch.from_numpy(b).double())
    assert squared_mmd(a, b) == pytest.approx(float(theirs), rel=1e-9)


def test_the_kernel_distance_is_unbiased_and_the_same_every_time(sets):
    same = np.random.default_rng(0).standard_normal((2, 600, 8))
    mean, spread = kernel_distance(same[0], same[1], subsets=10)
    assert abs(mean) < 3 * spread
    first, again = (kernel_distance(*sets, subsets=5) for _ in range(2))
    assert first == again
    assert first[0] > 0


def test_the_unbiased_estimate_takes_sets_of_different_sizes(sets):
    x, y = sets[0][:5].astype(float), sets[1][:3].astype(float)

    def k(a, b):
        return (a @ b / 12 + 1) ** 3

    within = [np.mean([k(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j]) for s in (x, y)]
    assert squared_mmd(x, y) == pytest.approx(sum(within) - 2 * np.mean([k(a, b) for a in x for b in y]), rel=1e-12)


def test_statistics_are_saved_and_read_with_and_without_a_prefix(sets, tmp_path):
    made = Statistics.of(sets[0])
    made.save(tmp_path / "own.npz")
    again = read_statistics(str(tmp_path / "own.npz"))
    assert again.digest == made.digest
    np.testing.assert_array_equal(again.features, sets[0])
    np.savez(
        tmp_path / "both.npz", test_mean=made.mean, test_cov=made.cov, test_n=300, train_mean=made.mean + 1, train_cov=made.cov, train_n=9
    )
    test, train = (read_statistics(f"{tmp_path}/both.npz:{prefix}") for prefix in ("test", "train"))
    assert (test.digest, test.features, train.n) == (made.digest, None, 9)
    assert frechet_distance(test, train) == pytest.approx(12)


def test_features_have_a_digest_of_their_own(sets):
    made = Statistics.of(sets[0])
    other = Statistics(made.mean, made.cov, made.n, made.features[::-1])
    assert (other.digest, Statistics(made.mean, made.cov, made.n).features_digest) == (made.digest, "")
    assert len({made.features_digest, other.features_digest, ""}) == 3


def test_what_names_statistics_and_what_names_images():
    assert [is_statistics(name) for name in ("a.npz", "a/b.npz:test", "images", "a.parquet", "hf://datasets/a/b")] == [True] * 2 + [
        False
    ] * 3


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({"mean": np.zeros(3), "n": 5}, r"has no cov; it has mean, n"),
        ({"mean": np.zeros(3), "cov": np.eye(2), "n": 5}, r"mean \(3,\), cov \(2, 2\) and n 5 are no statistics"),
        ({"mean": np.full(2, np.nan), "cov": np.eye(2), "n": 5}, "are no statistics"),
        ({"mean": np.zeros(2), "cov": np.eye(2), "n": 1}, "n 1 are no statistics"),
        ({"mean": np.zeros(2), "cov": np.eye(2), "n": 5, "features": np.zeros((4, 3))}, "do not fit a mean of 2 numbers"),
    ],
)
def test_statistics_that_are_none_are_refused(tmp_path, arrays, told):
    np.savez(tmp_path / "odd.npz", **arrays)
    with pytest.raises(InputError, match=told):
        read_statistics(str(tmp_path / "odd.npz"))


def test_a_file_that_is_no_npz_is_refused(tmp_path):
    (tmp_path / "text.npz").write_text("no")
    for name, told in (("text.npz", r".* is not a readable \.npz file"), ("missing.npz:test", r"no such file: .*/missing\.npz$")):
        with pytest.raises(InputError, match=rf"evaluate\.reference: {told}"):
            read_statistics(str(tmp_path / name))
