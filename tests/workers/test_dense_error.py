"""The yardstick for errors: smooth in the timestep, true on average, flat outside of what was measured."""

import numpy as np
import pytest
import torch

from workers.dense_error import FLOOR, DenseError
from workers.diffusion import NoiseSchedule

SCHEDULE = NoiseSchedule({"_class_name": "DDPMScheduler", "num_train_timesteps": 1000})
LOG_SNR = SCHEDULE.log_snr(range(1000))


def test_a_parabola_in_log_snr_is_found_exactly_and_kept_outside_of_what_was_measured():
    def true(t):
        return np.exp(0.02 * LOG_SNR[t] ** 2 + 0.6 * LOG_SNR[t] - 3)

    measured = np.arange(100, 900, 10)
    found = DenseError.fit(SCHEDULE, measured.tolist(), true(measured).tolist(), 0.0)().numpy()
    np.testing.assert_allclose(found[measured], true(measured), rtol=1e-5)
    np.testing.assert_allclose(found[[0, 99, 891, 999]], true(np.array([100, 100, 890, 890])), rtol=1e-5)


def test_noise_of_single_images_is_averaged_and_the_mean_stays_what_was_measured():
    rng, timesteps = np.random.default_rng(0), np.arange(0, 1000, 2)
    true = np.exp(0.7 * LOG_SNR[timesteps] - 3)
    errors = true * rng.gamma(4, 1 / 4, len(true))
    found = DenseError.fit(SCHEDULE, timesteps.tolist(), errors.tolist(), 0.0)().numpy()[timesteps]
    assert np.abs(np.log(found / true)).max() < 0.35 < np.abs(np.log(errors / true)).max()
    assert found.mean() == pytest.approx(errors.mean(), rel=1e-5)


def test_few_images_give_one_number():
    assert DenseError.fit(SCHEDULE, [10, 20], [0.1, 0.3], 0.0)() == pytest.approx(torch.full((1000,), 0.2))


def test_a_little_is_added_so_that_the_noisiest_timesteps_do_not_count_without_bound():
    timesteps = np.arange(0, 1000, 10)
    true = np.exp(0.9 * LOG_SNR[timesteps] - 3)
    found = DenseError.fit(SCHEDULE, timesteps.tolist(), true.tolist(), energy=0.5)().numpy()[timesteps]
    np.testing.assert_allclose(found, true + 0.5 * FLOOR, rtol=1e-5)
