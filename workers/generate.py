"""From noise to images: sampler, classes, guidance and first stage around any denoiser. n samples; images float32 in [-1, 1]."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from PIL import Image
from torch import Tensor, nn

from workers import conditioning, families, first_stage, pretrained
from workers.contracts import InputError, SamplerRef
from workers.diffusion import make_sampler, sample, sampler_timesteps, takes_eta
from workers.fused import fuse
from workers.mixture import MixtureDenoiser


@dataclass(frozen=True)
class Surroundings:
    """What a pipeline folder holds around its denoiser, loaded on one device."""

    scheduler_config: dict[str, Any]
    conditioner: conditioning.Conditioner
    first_stage: first_stage.FirstStage | None
    device: str

    @classmethod
    def load(cls, folder: str | Path, device: str) -> Surroundings:
        """Raises: InputError if a part cannot be used."""
        where = first_stage.locate(folder)
        stage = None if where is None else first_stage.load(where).to(device)
        return cls(families.load_scheduler_config(folder), conditioning.load(folder, device), stage, device)

    def draw(
        self,
        model: Any,
        sampler: SamplerRef,
        seeds: Sequence[int],
        shape: tuple[int, int, int],
        batch: int,
        labels: Sequence[int] | None = None,
        guidance_scale: float = 1.0,
        pad: bool = False,
    ) -> Iterator[tuple[Tensor, float]]:
        """Images [b, C, H, W] on the device, batch by batch, one per seed, and the seconds that each batch took, decoding included.

        ``labels``: one class per seed; by default drawn from the seeds. ``shape``: of the denoiser's samples. ``pad``: the last batch is
        filled up, and what fills it thrown away, so that the denoiser meets one size only.
        """
        classes = self.conditioner.classes
        chosen = classes.of_seeds(seeds) if labels is None else list(labels)
        for i in range(0, len(seeds), batch):
            count = min(batch, len(seeds) - i)
            rows = [*range(i, i + count), *([i] * (batch - count) if pad else ())]
            started = time.perf_counter()
            told = None if chosen is None or classes.argument is None else torch.tensor([chosen[j] for j in rows], device=self.device)
            predict = _scaled(self.conditioner.guide(model, told, guidance_scale), sampler.epsilon_scale)
            noise = [seeds[j] for j in rows]
            stepper = make_sampler(sampler.scheduler, self.scheduler_config)
            images = self.decode(sample(predict, stepper, sampler.steps, noise, shape, self.device, sampler.eta))[:count]
            if self.device.startswith("cuda"):
                torch.cuda.synchronize()
            yield images, time.perf_counter() - started

    @torch.no_grad()
    def decode(self, samples: Tensor) -> Tensor:
        """Samples in the denoiser's scale -> images [n, C, H, W] in [-1, 1]."""
        return (samples if self.first_stage is None else self.first_stage.decode(samples)).clamp(-1, 1)


def _scaled(predict: Callable[[Tensor, Any], Tensor], epsilon_scale: float) -> Callable[[Tensor, Any], Tensor]:
    """Epsilon scaling (arXiv 2308.15321)."""
    return predict if epsilon_scale == 1 else lambda x, t: predict(x, t) / epsilon_scale


class SamplingDenoiser:
    """A denoiser as a sampler calls it: float32 in and out, ``dtype`` inside. Nothing of a step waits for the device.

    The model is moved and converted for good; ``fused``: on a GPU it runs by `workers.fused`.
    """

    def __init__(self, model: Any, device: str, dtype: str = "float32", fused: bool = False) -> None:
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.model: Any = nn.Module.to(model, device, self.dtype)
        if fused and device.startswith("cuda"):
            fuse(self.model)
        self.device = device
        self._timesteps: dict[float, Tensor] = {}

    def __call__(self, x: Tensor, t: Tensor, **told: Tensor) -> UNet2DOutput:
        """As the denoiser's own call, for a timestep [] on the CPU."""
        network = self.model.expert(int(self.model.expert_index(t))) if isinstance(self.model, MixtureDenoiser) else self.model
        if float(t) not in self._timesteps:  # copied once, not at every step of every batch
            self._timesteps[float(t)] = t.to(self.device)
        told = {name: value.to(self.dtype) if value.is_floating_point() else value for name, value in told.items()}
        return UNet2DOutput(sample=network(x.to(self.dtype), self._timesteps[float(t)], **told).sample.float())


def write_sample_grid(
    version: str,
    scheduler: str,
    steps: int,
    seeds: Sequence[int],
    out: Path,
    device: str,
    label: int | None = None,
    guidance_scale: float = 1.0,
    eta: float = 0.0,
    batch: int = 64,
) -> None:
    """Draw one image per seed from a published version and save them as one PNG, in rows of at most eight.

    ``label``: the class of all of them; by default every seed has its own.
    Raises: InputError for an unknown scheduler, more steps than training timesteps, a class that the model does not have, or a version
    that cannot be loaded.
    """
    around = Surroundings.load(version, device)
    sampler_timesteps(scheduler, around.scheduler_config, steps)  # refuses what cannot be sampled
    if eta and not takes_eta(make_sampler(scheduler, around.scheduler_config)):
        raise InputError(f"--eta is {eta:g}, but {scheduler} takes none: leave it out, or give --scheduler ddim")
    classes = around.conditioner.classes
    if label is not None and classes.argument is None:
        raise InputError(f"--class-label is {label}, but this model is not told a class: leave it out")
    if label is not None and not 0 <= label < classes.count:
        raise InputError(f"--class-label is {label}, but the model has the classes 0 to {classes.count - 1}")
    if guidance_scale != 1 and classes.null is None:
        raise InputError(f"--guidance-scale is {guidance_scale:g}, but this model has no null class to be guided away from: leave it out")
    model = pretrained.load(MixtureDenoiser, Path(version)).to(device)
    shape = (model.config.in_channels, model.config.sample_size, model.config.sample_size)
    labels = None if label is None else [label] * len(seeds)
    drawn = around.draw(model, SamplerRef(scheduler, steps, eta), list(seeds), shape, batch, labels, guidance_scale)
    images = torch.cat([part.cpu() for part, _ in drawn]).numpy()
    side = min(8, len(images))
    blank = np.ones((-len(images) % side, *images.shape[1:]), images.dtype)
    rows = np.concatenate([images, blank]).reshape(-1, side, *images.shape[1:])
    channels, height, width = images.shape[1:]
    grid = rows.transpose(0, 3, 1, 4, 2).reshape(rows.shape[0] * height, side * width, channels)
    pixels = ((grid + 1) * 127.5).round().clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels.squeeze(-1) if channels == 1 else pixels).save(out, format="PNG")
