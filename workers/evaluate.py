"""How good is a denoiser, and what does it cost? Paired error against dense from the same noise, denoising loss on held-out images, time.

Noise is fixed per image (one seed each), so that neither batch size nor sharding changes a number.
"""

from __future__ import annotations

import copy
import functools
import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from workers import extractors, families
from workers.contracts import EvaluateTask, InputError
from workers.cost import count
from workers.diffusion import NoiseSchedule, generator, sampler_timesteps, steps_per_expert
from workers.fused import fuse
from workers.graphs import Graphs
from workers.latency import clock_of, time_ms
from workers.regional import RegionCompiler

LOSSES = ("denoising_loss", "denoising_loss_by_timestep", "timesteps")
COSTS = ("ms_per_step", "gmacs_per_step", "parameters", "peak_memory_mib", "device")
"""What `cost_per_step` tells, memory on a GPU only, and of which device."""


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
def lpips(spec: str, samples: np.ndarray, dense: np.ndarray, device: str, batch: int = 64) -> float:
    """Mean perceptual distance of samples [n, C, H, W] in [-1, 1] from dense's, by the network that ``spec`` names. Raises: InputError."""
    network, found = load_lpips(spec).to(device), []
    for i in range(0, len(samples), batch):
        a, b = (torch.from_numpy(images[i : i + batch]).to(device).expand(-1, 3, -1, -1) for images in (samples, dense))
        distance = network(a, b)
        if not isinstance(distance, Tensor) or distance.numel() != len(a):
            raise InputError(f"evaluate.lpips: {spec} must give one number for each of {len(a)} pairs of images")
        found.append(distance.double().flatten().cpu())
    return float(torch.cat(found).mean())


def load_lpips(spec: str) -> nn.Module:
    """A TorchScript file, or what ``package.module:function`` returns: a module that maps two batches [n, 3, H, W] in [-1, 1] to [n].

    Raises: InputError.
    """
    try:
        network = torch.jit.load(spec, map_location="cpu") if Path(spec).is_file() else extractors.imported(spec, "evaluate.lpips")()
    except InputError:
        raise
    except Exception as error:  # a user's module may fail in any way
        raise InputError(f"evaluate.lpips: {spec} cannot be loaded: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(network, nn.Module):
        raise InputError(f"evaluate.lpips: {spec} gave a {type(network).__name__}, not a torch.nn.Module")
    return network.eval()


def lpips_digest(spec: str) -> str:
    """sha256 (hex) of the network that ``spec`` names, wherever its file lies. Raises: InputError."""
    is_file = Path(spec).is_file()
    return extractors.digest("file" if is_file else spec, Path(spec) if is_file else None, load_lpips(spec))


def lone_batch(groups: Sequence[Sequence[int]], batch: int) -> Sequence[int]:
    """Of seeds that are drawn group by group, the largest batch, if it is the only one of its size: none could be timed after it."""
    batches = [seeds[i : i + batch] for seeds in groups for i in range(0, len(seeds), batch)]
    largest = max(batches, key=len, default=())
    return largest if sum(len(seeds) == len(largest) for seeds in batches) == 1 else ()


def speed(shards: Sequence[np.ndarray]) -> dict[str, float]:
    """From (images, seconds) of the batches that each shard drew: whole sampling runs, decoding included.

    Batches of the largest size count; a shard's first one warms up, and is left out if there are more.
    """
    size = max(float(batches[:, 0].max()) for batches in shards if len(batches))
    full = [batches[batches[:, 0] == size] for batches in shards]
    images, seconds = np.concatenate([batches[1:] if len(batches) > 1 else batches for batches in full]).sum(0)
    return {"images_per_s": float(images / seconds), "ms_per_image": float(1e3 * seconds / images)}


@torch.no_grad()
def cost_per_step(
    model: Any, task: EvaluateTask, device: str, repeats: int = 5, compiler: RegionCompiler | None = None
) -> dict[str, float]:
    """What one denoising step costs with this very model, weighted by the steps that each expert serves; nothing else may be running.

    ``ms_per_step``: time of a batch of ``task.timing``, the median of ``repeats`` per expert, taken as those of latency tables are;
    ``gmacs_per_step``: of one image; ``parameters``: of all experts; on a GPU ``peak_memory_mib``: the most that weights and activations of
    the batch take. The model comes on the CPU, and is moved and converted to the timing's dtype for good. With one ``compiler``, blocks
    that denoisers share are compiled once. Raises: InputError if the timing asks for CUDA graphs elsewhere than on a GPU.
    """
    config, timing = families.load_config(task.model), task.timing
    timing.check(device)
    timesteps = sampler_timesteps(task.sampler.scheduler, families.load_scheduler_config(task.model), task.sampler.steps)
    shares = [count / len(timesteps) for count in steps_per_expert(task.partition, timesteps)]
    experts = list(getattr(model, "experts", [model] * len(shares)))
    gmacs = sum(share * count(copy.deepcopy(e).to("meta"), config)[0].macs / 1e9 for share, e in zip(shares, experts, strict=True))
    dtype = getattr(torch, timing.dtype)
    cuda, clock = device.startswith("cuda"), clock_of(device)
    graphs = Graphs() if timing.cuda_graphs else None
    if cuda:
        gc.collect()  # a compiled denoiser refers to itself: the last one may still be there
        others = torch.cuda.memory_allocated()
    (x, t), told = families.example_inputs(config, timing.batch, device, dtype)
    nn.Module.to(model, device, dtype)  # diffusers' own warns of modules that it would keep in float32, of which there are none
    if timing.fused_kernels:
        fuse(model)
    if timing.compiled:
        (compiler or RegionCompiler()).compile(model)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    total = 0.0
    for interval, share, expert in zip(task.partition.intervals, shares, experts, strict=True):
        run: Callable[[], object] = functools.partial(model, x, interval.start, **told)
        if graphs is not None:  # a number as timestep would be copied from the host, which no graph can hold
            run = graphs.capture(functools.partial(expert, x, t, **told))
        run()  # compiles
        total += share * float(np.median([time_ms(run, clock) for _ in range(repeats)]))
    memory = {"peak_memory_mib": (torch.cuda.max_memory_allocated() - others) / 2**20} if cuda else {}
    parameters = sum(p.numel() for p in model.parameters())
    return {"ms_per_step": total, "gmacs_per_step": gmacs, "parameters": parameters, **memory}
