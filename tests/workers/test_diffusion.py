"""Noise, targets and samplers: formulas by hand, and a batch that changes nothing."""

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from workers import diffusion, families
from workers.contracts import InputError, Interval
from workers.diffusion import NoiseSchedule, draw_timesteps, generator, make_sampler, sample, sampler_timesteps

T = 1000
SHAPE = (3, 32, 32)
every_sampler = pytest.mark.parametrize("name", diffusion.SAMPLERS)


@pytest.fixture(scope="module")
def config(emoji) -> dict:
    return families.load_scheduler_config(emoji)


@pytest.fixture(scope="module")
def model(emoji) -> torch.nn.Module:
    return families.load_denoiser(emoji)


def halve(x: Tensor, t: Tensor) -> Tensor:
    """A denoiser without rounding, so that equal means equal."""
    return x / 2


# --- timesteps of training ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interval", "low", "high"),
    [
        (Interval(300, 700), 200, 800),
        (Interval(0, 400), 0, 500),
        (Interval(800, 1000), 750, 1000),
        (Interval(100, 900), 0, 1000),
        (Interval(5, 6), 4, 7),
    ],
)
def test_timesteps_come_from_the_interval_and_its_margins(interval, low, high):
    drawn = draw_timesteps(interval, T, 20_000, 0.25, generator("cpu", 0))
    inside = (drawn >= interval.start) & (drawn < interval.stop)
    assert drawn.shape == (20_000,)
    assert drawn.dtype == torch.int64
    assert int(drawn.min()) == low
    assert int(drawn.max()) == high - 1
    assert abs(float((~inside).float().mean()) - 0.25) < 0.02


def test_timesteps_are_uniform_inside_and_outside():
    drawn = draw_timesteps(Interval(40, 80), 100, 60_000, 0.5, generator("cpu", 0))
    counts = torch.bincount(drawn, minlength=100).float() / 60_000
    assert torch.allclose(counts[40:80], torch.full((40,), 0.5 / 40), rtol=0.15)
    assert torch.allclose(counts[[*range(30, 40), *range(80, 90)]], torch.full((20,), 0.5 / 20), rtol=0.15)


def test_no_fraction_outside_stays_inside():
    drawn = draw_timesteps(Interval(300, 700), T, 20_000, 0.0, generator("cpu", 0))
    assert int(drawn.min()) == 300
    assert int(drawn.max()) == 699


def test_an_interval_of_all_timesteps_has_no_outside():
    drawn = draw_timesteps(Interval(0, 10), 10, 1000, 1.0, generator("cpu", 0))
    assert set(drawn.tolist()) == set(range(10))


def test_the_same_generator_draws_the_same_timesteps():
    first, again, other = (
        draw_timesteps(Interval(300, 700), T, 50, 0.2, generator("cpu", *seed)) for seed in ((1, "a"), (1, "a"), (1, "b"))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# --- noise and targets ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def noised() -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(0)
    return torch.randn(4, *SHAPE, generator=gen), torch.randn(4, *SHAPE, generator=gen), torch.tensor([0, 300, 700, 999])


def abar(timesteps: Tensor) -> Tensor:
    """The bundled model's linear betas, from 1e-4 to 0.02."""
    return torch.linspace(1e-4, 0.02, T, dtype=torch.float64).neg().add(1).cumprod(0)[timesteps].view(-1, 1, 1, 1)


def test_noising_follows_the_ddpm_formula(config, noised):
    clean, noise, timesteps = noised
    expected = abar(timesteps).sqrt() * clean + (1 - abar(timesteps)).sqrt() * noise
    assert torch.allclose(NoiseSchedule(config).noised(clean, noise, timesteps).double(), expected, atol=1e-5)


def test_log_snr_follows_from_the_betas(config):
    timesteps = torch.arange(T)
    expected = (abar(timesteps) / (1 - abar(timesteps))).log().flatten().numpy()
    found = NoiseSchedule(config).log_snr(timesteps.tolist())
    assert np.allclose(found, expected, atol=1e-3)
    assert (np.diff(found) < 0).all()


def test_the_target_is_what_the_model_predicts(config, noised):
    clean, noise, timesteps = noised

    def target(kind: str) -> Tensor:
        return NoiseSchedule({**config, "prediction_type": kind}).target(clean, noise, timesteps)

    assert torch.equal(target("epsilon"), noise)
    assert torch.equal(target("sample"), clean)
    velocity = abar(timesteps).sqrt() * noise - (1 - abar(timesteps)).sqrt() * clean
    assert torch.allclose(target("v_prediction").double(), velocity, atol=1e-5)
    with pytest.raises(InputError, match="'aura' is not epsilon"):
        target("aura")


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler", "ScoreSdeVeScheduler", None])
def test_a_scheduler_without_ddpm_timesteps_is_refused(name):
    other = {"_class_name": name} if name is None else {**getattr(diffusers, name)().config, "_class_name": name}
    with pytest.raises(InputError, match=f"scheduler {name} has no DDPM"):
        NoiseSchedule(other)


# --- samplers -------------------------------------------------------------------------------------------------------


@every_sampler
def test_a_sampler_keeps_the_models_betas_and_prediction_type(name, config):
    sampler = make_sampler(name, {**config, "prediction_type": "v_prediction"})
    assert torch.equal(sampler.betas, NoiseSchedule(config).scheduler.betas)
    assert sampler.config.prediction_type == "v_prediction"
    assert sampler.config.num_train_timesteps == T


def test_an_unknown_sampler_is_refused(config):
    with pytest.raises(InputError, match="'heun' is unknown: known are ddpm, ddim"):
        make_sampler("heun", config)


@every_sampler
def test_more_steps_than_training_timesteps_are_refused(name, config):
    with pytest.raises(InputError, match="sampler.steps 1001 is more than the model's 1000"):
        sampler_timesteps(name, config, T + 1)


@every_sampler
@pytest.mark.parametrize("steps", [2, 5, 20])
def test_the_model_is_called_at_the_samplers_timesteps_noisiest_first(name, steps, config):
    seen = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        seen.append(float(t))
        return torch.zeros_like(x)

    sample(denoise, make_sampler(name, config), steps, [0], SHAPE, "cpu")
    assert seen == sampler_timesteps(name, config, steps)
    assert seen == sorted(seen, reverse=True)
    assert 0 <= seen[-1] <= seen[0] < T


@every_sampler
def test_the_first_input_of_the_model_has_unit_variance(name, config):
    seen = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x)
        return halve(x, t)

    sample(denoise, make_sampler(name, config), 5, range(4), SHAPE, "cpu")
    assert float(seen[0].std()) == pytest.approx(1, abs=0.03)


@every_sampler
def test_a_batch_samples_what_its_images_sample_alone(name, config):
    together = sample(halve, make_sampler(name, config), 7, [7, 8, 7], SHAPE, "cpu")
    for image, seed in zip(together, (7, 8, 7), strict=True):
        assert torch.equal(sample(halve, make_sampler(name, config), 7, [seed], SHAPE, "cpu")[0], image)
    assert not torch.allclose(together[0], together[1], atol=0.1)
    assert together.shape == (3, *SHAPE)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "unipc"])
def test_a_real_model_samples_in_a_batch_what_it_samples_alone(name, config, model):
    def predict(x: Tensor, t: Tensor) -> Tensor:
        return model(x, t).sample

    together = sample(predict, make_sampler(name, config), 3, [7, 8], SHAPE, "cpu")
    for image, seed in zip(together, (7, 8), strict=True):
        assert torch.allclose(sample(predict, make_sampler(name, config), 3, [seed], SHAPE, "cpu")[0], image, atol=1e-5)


@every_sampler
def test_a_sampler_may_be_used_twice(name, config):
    sampler = make_sampler(name, config)
    first = sample(halve, sampler, 7, [7], SHAPE, "cpu")
    assert torch.equal(sample(halve, sampler, 7, [7], SHAPE, "cpu"), first)


@every_sampler
def test_a_perfect_denoiser_finds_the_clean_image(name, config):
    """The denoiser that knows x_0: its noise is (x_t - sqrt(abar) x_0) / sqrt(1 - abar), and every sampler must end at x_0."""
    clean = torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(0)) * 1.8 - 0.9

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        a = abar(t.round().long().view(1))
        return ((x - a.sqrt() * clean) / (1 - a).sqrt()).float()

    found = sample(denoise, make_sampler(name, config), 50, [3], SHAPE, "cpu")
    assert float((found - clean).abs().max()) < 1e-3
