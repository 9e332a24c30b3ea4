"""How good is a denoiser? Paired error against dense from the same noise, and denoising loss on held-out images.

Noise is fixed per image (one seed each), so that neither batch size nor sharding changes a number.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from workers import families
from workers.contracts import EvaluateTask
from workers.diffusion import NoiseSchedule, generator, sampler_timesteps, steps_per_expert


@torch.no_grad()
def denoising_losses(
    model: Any, schedule: NoiseSchedule, images: Tensor, told: dict[str, Tensor], seeds: Sequence[int], timesteps: Sequence[int]
) -> np.ndarray:
    """Squared error of every held-out sample [n, C, H, W] at every timestep, mean over its numbers: float64 [n, len(timesteps)].

    Image i has its own noise, the same at every timestep, from ``seeds[i]``.
    """
    noise = torch.stack([torch.randn(images.shape[1:], generator=generator("cpu", seed, "held out")) for seed in seeds]).to(images.device)
    losses = []
    for t in timesteps:
        at = torch.full((len(images),), t, device=images.device)
        error = model(schedule.noised(images, noise, at), t, **told).sample - schedule.target(images, noise, at)
        losses.append(error.double().square().flatten(1).mean(1).cpu().numpy())
    return np.stack(losses, axis=1)


def paired_metrics(samples: np.ndarray, dense: np.ndarray) -> dict[str, float | None]:
    """How far samples [n, C, H, W] in [-1, 1] are from dense's of the same noise: MSE, PSNR in dB (None if equal), SSIM."""
    mine, theirs = torch.from_numpy(samples), torch.from_numpy(dense)
    psnr, ssim = PeakSignalNoiseRatio(data_range=(-1.0, 1.0)), StructuralSimilarityIndexMeasure(data_range=(-1.0, 1.0))
    if np.array_equal(samples, dense):
        return {"paired_mse": 0.0, "paired_psnr_db": None, "paired_ssim": 1.0}  # infinite: JSON has no word for it
    return {
        "paired_mse": float((mine.double() - theirs.double()).square().mean()),
        "paired_psnr_db": float(psnr(mine, theirs)),
        "paired_ssim": float(ssim(mine, theirs)),
    }


@torch.no_grad()
def time_per_step(model: Any, task: EvaluateTask, device: str, repeats: int = 5) -> dict[str, float]:
    """Schedule-weighted time of one denoising step for one batch, in ms: the median of ``repeats`` per expert, nothing else running."""
    model.to(device)
    config = families.load_scheduler_config(task.model)
    timesteps = sampler_timesteps(task.scheduler, config, task.steps)
    served = steps_per_expert(task.partition, timesteps)
    (x, _), told = families.example_inputs(families.load_config(task.model), task.batch_size, device, torch.float32)
    total = 0.0
    for interval, count in zip(task.partition.intervals, served, strict=True):
        times = []
        for _ in range(repeats + 1):  # the first warms up
            _synchronise(device)
            started = time.perf_counter()
            model(x, interval.start, **told)
            _synchronise(device)
            times.append(time.perf_counter() - started)
        total += count / len(timesteps) * float(np.median(times[1:]))
    return {"ms_per_step": 1e3 * total}


def _synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
