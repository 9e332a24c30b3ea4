"""How much an error of each expert counts: exact where it can be, and the same however it is measured."""

import copy
import dataclasses

import numpy as np
import pytest
import torch

from workers import conditioning
from workers.contracts import Partition
from workers.families import unet2d
from workers.influence import ERROR, LEAST, MOST, Probe, influences, level_of_error, moved, spread


@pytest.fixture
def probe(tmp_path):
    torch.manual_seed(0)
    dense = unet2d.tiny()
    return Probe(
        dense=dense,
        levels=unet2d.features(dense),
        conditioner=conditioning.Conditioner(conditioning.Classes(None), None),
        config={"_class_name": "DDPMScheduler", "num_train_timesteps": 1000},
        partition=Partition.from_boundaries([300, 700], 1000),
        sampler="dpmpp",  # DDIM stands for every other sampler
        steps=10,
        guidance_scale=1.0,
        noise=torch.randn(6, 3, 16, 16),
        labels=None,
        batch=6,
    )


def test_a_perfect_copy_moves_nothing(probe):
    dense = probe.draw_dense()
    for k in range(3):
        assert probe.distance({k: copy.deepcopy(probe.dense)}, dense) == pytest.approx(0, abs=1e-6)


def test_entering_at_an_interval_gives_the_samples_of_the_whole_way(probe):
    rows = slice(None)
    *states, samples = probe._follow(probe.noise, rows, {})
    for entry in probe.entries():
        *_, late = probe._follow(states[entry], rows, {}, entry)
        assert torch.equal(late, samples)


def test_a_larger_error_moves_the_samples_further(probe):
    dense, found = probe.draw_dense(), []
    for size in (0.01, 0.1):
        worse = copy.deepcopy(probe.dense)
        with torch.no_grad():
            worse.conv_out.bias += size
        found.append(probe.distance({1: worse}, dense))
    assert 0 < found[0] < found[1]


def test_samples_that_lost_details_but_keep_their_means_are_seen(probe):
    whole = torch.randn(64, 3, 16, 16)
    coarse = torch.nn.functional.avg_pool2d(whole, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    views = [[level.numpy() for level in probe.view(x, slice(None))] for x in (whole, coarse, whole + 0.1)]
    assert moved(views[1], views[0]) > 5 * moved(views[2], views[0]) > 0


def test_a_level_of_one_pixel_is_seen_by_its_values():
    values = torch.randn(4, 6, 1, 1)
    assert torch.equal(spread(values), values.flatten(1))
    assert torch.equal(spread(torch.ones(4, 6, 2, 2)), torch.zeros(4, 6))


def test_batches_change_nothing(probe):
    whole, pieces = probe.draw_dense(), dataclasses.replace(probe, batch=4).draw_dense()
    assert whole.keys() == pieces.keys()
    for name, array in whole.items():
        np.testing.assert_allclose(pieces[name], array, rtol=1e-3, atol=1e-3)


def test_an_expert_that_serves_no_step_has_no_distance(probe):
    narrow = dataclasses.replace(probe, partition=Partition.from_boundaries([5, 50], 1000))
    assert narrow.entries()[1] is None
    assert narrow.distance({1: narrow.dense}, narrow.draw_dense()) is None


def test_the_distance_of_shifted_features_is_the_shift_as_a_part_of_the_variance():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(500, 8))
    shift = np.full(8, 0.5)
    variance = float(np.trace(np.cov(features.T)))
    assert moved([features + shift], [features]) == pytest.approx(8 * 0.25 / variance, rel=1e-6)
    assert moved([features + shift, features], [features, features]) == pytest.approx(4 * 0.25 / variance, rel=1e-6)


def test_influence_is_the_root_of_distance_per_error_and_step_with_mean_one():
    found = influences([0.2, 0.2], errors=[1.0, 0.25], shares=[0.5, 0.5])
    assert found == pytest.approx((2 / 3, 4 / 3))
    found = influences([0.2, None, 0.2], errors=[1.0, 9.0, 0.25], shares=[0.5, 0.0, 0.5])
    assert (found[0], found[2]) == pytest.approx((2 / 3, 4 / 3)) and found[1] > 0


def test_influence_is_bounded_and_one_where_nothing_moves():
    found = influences([1.0, 1e-20], errors=[1.0, 1.0], shares=[0.5, 0.5])
    assert found[1] / found[0] == pytest.approx(LEAST / 2)
    assert max(influences([1.0] * 20 + [1e6], [1.0] * 21, [1 / 21] * 21)) <= MOST / LEAST
    assert influences([0.0, None], [1.0, 1.0], [0.5, 0.5]) == (1.0, 1.0)


def test_the_sub_network_of_a_wanted_error_is_found_between_narrowest_and_dense():
    def error(level: float) -> float:
        return 0.4 * (2 - level) ** 2

    assert error(level_of_error(error)) == pytest.approx(ERROR, rel=0.1)
    assert level_of_error(lambda level: 0.0) == 0
    assert level_of_error(lambda level: 1.0) > 1.9
