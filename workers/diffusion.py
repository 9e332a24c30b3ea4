"""Noising, targets, samplers: which timesteps are trained, which are sampled, and by whom. Samples [B, C, H, W]: pixels or latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor

from workers.contracts import InputError, Interval, Partition, derive_seed

SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpm": ("DDPMScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "ddim-unclipped": ("DDIMScheduler", {"clip_sample": False}),
    "dpmpp": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": False}),
    "dpmpp-trailing": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": False, "timestep_spacing": "trailing"}),
    "dpmpp-karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "unipc": ("UniPCMultistepScheduler", {"use_karras_sigmas": False}),
    "euler": ("EulerDiscreteScheduler", {"use_karras_sigmas": False}),
}
TRAINING_CLASSES = {cls for cls, _ in SAMPLERS.values()} | {"PNDMScheduler", "LMSDiscreteScheduler", "EulerAncestralDiscreteScheduler"}


def make_sampler(name: str, config: dict[str, Any]) -> Any:
    """The named sampler on the model's own betas. Raises: InputError for an unknown name."""
    if name not in SAMPLERS:
        raise InputError(f"sampler.scheduler {name!r} is unknown: known are {', '.join(SAMPLERS)}")
    cls, extra = SAMPLERS[name]
    return getattr(diffusers, cls).from_config(config, **extra)


def takes_eta(sampler: Any) -> bool:
    """Whether it can be told how much noise to add."""
    return type(sampler).__name__ == "DDIMScheduler"


def sampler_timesteps(name: str, config: dict[str, Any], steps: int) -> list[float]:
    """The timesteps at which the sampler calls the model, noisiest first; one entry per call. Raises: InputError."""
    sampler = make_sampler(name, config)
    if steps > sampler.config.num_train_timesteps:
        raise InputError(f"sampler.steps {steps} is more than the model's {sampler.config.num_train_timesteps} training timesteps")
    sampler.set_timesteps(steps)
    return [float(t) for t in sampler.timesteps]


def steps_per_expert(partition: Partition, timesteps: Sequence[float]) -> list[int]:
    """How many of the sampler's model calls each expert serves."""
    served = [partition.index_of(t) for t in timesteps]
    return [served.count(k) for k in range(len(partition))]


class NoiseSchedule:
    """The forward process the model was trained with: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps (DDPM, eq. 4)."""

    def __init__(self, config: dict[str, Any]):
        """Raises: InputError if the pipeline's scheduler is not of the discrete DDPM kind (EDM, flow matching)."""
        if config.get("_class_name") not in TRAINING_CLASSES:
            raise InputError(f"model.path: scheduler {config.get('_class_name')} has no DDPM training timesteps, which this method needs")
        self.scheduler = diffusers.DDPMScheduler.from_config(config)
        self.num_timesteps: int = self.scheduler.config.num_train_timesteps
        self.prediction_type: str = self.scheduler.config.prediction_type
        if self.prediction_type not in ("epsilon", "sample", "v_prediction"):
            raise InputError(f"model.path: prediction_type {self.prediction_type!r} is not epsilon, sample or v_prediction")

    def noised(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return self.scheduler.add_noise(clean, noise, timesteps)

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the model is trained to predict: eps, x_0 or v, by the scheduler's ``prediction_type``."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return clean
        return self.scheduler.get_velocity(clean, noise, timesteps)

    def log_snr(self, timesteps: Sequence[int]) -> np.ndarray:
        """log(abar / (1 - abar)) at the given timesteps; zero terminal SNR counts as abar = 2^-24, as in diffusers' samplers."""
        abar = self.scheduler.alphas_cumprod.double().cpu().numpy()[np.asarray(timesteps)].clip(min=2**-24)
        return np.log(abar) - np.log1p(-abar)


def generator(device: torch.device | str, *parts: int | str | float) -> torch.Generator:
    """A generator seeded by ``parts`` alone."""
    return torch.Generator(device=device).manual_seed(derive_seed(*parts))


def pixels(images: np.ndarray, device: torch.device | str) -> Tensor:
    """uint8 [B, C, H, W] -> float32 in [-1, 1]."""
    return torch.from_numpy(images).to(device).float().div_(127.5).sub_(1)


def draw_timesteps(interval: Interval, num_timesteps: int, count: int, outside_fraction: float, gen: torch.Generator) -> Tensor:
    """``count`` timesteps [count], uniform over the interval; a part of them from just outside, so that borders do not drift (DeMe).

    "Just outside" is the margin of `Interval.widened`.
    """
    wide = interval.widened(num_timesteps)
    below, above = (wide.start, interval.start), (interval.stop, wide.stop)
    room = (below[1] - below[0]) + (above[1] - above[0])
    inside = interval.start + torch.randint(interval.length, (count,), generator=gen, device=gen.device)
    if room == 0:
        return inside
    offset = torch.randint(room, (count,), generator=gen, device=gen.device)
    beside = torch.where(offset < below[1] - below[0], below[0] + offset, above[0] + offset - (below[1] - below[0]))
    return torch.where(torch.rand(count, generator=gen, device=gen.device) < outside_fraction, beside, inside)


@torch.no_grad()
def sample(
    predict: Callable[[Tensor, Any], Tensor],
    sampler: Any,
    steps: int,
    seeds: Sequence[int],
    shape: tuple[int, int, int],
    device: str,
    eta: float = 0.0,
) -> Tensor:
    """Samples [B, C, H, W] in the denoiser's scale, one per seed. Every sample has its own generator, so a batch changes nothing.

    ``predict(x, t)`` answers with the denoiser's output [B, C, H, W]. ``eta``: noise that DDIM adds, as a part of DDPM's.
    """
    gens = [torch.Generator().manual_seed(seed) for seed in seeds]
    sampler.set_timesteps(steps)
    x = torch.stack([torch.randn(shape, generator=gen) for gen in gens]).to(device) * sampler.init_noise_sigma
    extra: dict[str, Any] = {"generator": gens} if type(sampler).__name__ in ("DDPMScheduler", "DDIMScheduler") else {}
    if takes_eta(sampler):
        extra["eta"] = eta
    for t in sampler.timesteps:
        x = sampler.step(predict(sampler.scale_model_input(x, t), t), t, x, **extra).prev_sample
    return x
