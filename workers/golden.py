"""Does a published version still compute what it did when it was published? A few images, and one prediction of every expert, are kept.

Arithmetic differs between machines, so they are compared with a tolerance: rounding what enters every convolution as TF32 does moved
images of the bundled model by 0.001 and predictions by 0.0003, as bfloat16 does by 0.012 and 0.003. Images show that loading and sampling
work as a whole; predictions tell of each expert alone, however little the images owe to it.
Legend: n images [n, C, H, W], stored as uint8; one prediction per expert [K, C', H', W'], float32.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from workers import pretrained
from workers.contracts import GOLDEN, InputError, SamplerRef, VerificationError
from workers.generate import Surroundings
from workers.mixture import MixtureDenoiser

SEEDS = (0, 1, 2, 3)
MOST_STEPS = 50
"""More of a planned sampler's steps are not taken."""
IMAGE_TOLERANCE = 0.02
"""Largest root mean square difference of an image that counts as equal, as a part of the range of pixels."""
PREDICTION_TOLERANCE = 0.01
"""The same of an expert's prediction, as a part of its own root mean square."""
SCHEMA = 1


def make(folder: Path, scheduler: str, steps: int, device: str) -> None:
    """Compute them by the mixture in ``folder``, loaded from its files as a user would, and add them to it."""
    about = {"schema": SCHEMA, "scheduler": scheduler, "steps": min(steps, MOST_STEPS), "seeds": SEEDS, "device": device.partition(":")[0]}
    images, predictions = _compute(folder, about, device)
    (folder / GOLDEN).parent.mkdir(exist_ok=True)
    # one key, since safetensors writes several in any order
    tensors = {"images": images.contiguous(), "predictions": predictions.contiguous()}
    save_file(tensors, folder / GOLDEN, metadata={"golden": json.dumps(about)})


def compare(folder: Path, device: str) -> dict[str, Any]:
    """Load the mixture and compute them again: how many images there are, and the largest difference of one.

    Raises: VerificationError, without the version's name, if it cannot be loaded or computes something else.
    """
    with _told():
        kept, expected, about = _read(folder / GOLDEN)
        images, predictions = _compute(folder, about, device)
    if images.shape != kept.shape or predictions.shape != expected.shape:
        shapes = [list(tensor.shape) for tensor in (kept, expected, images, predictions)]
        raise VerificationError(
            f"{GOLDEN}: holds images and predictions {shapes[0]} and {shapes[1]}, the mixture's are {shapes[2]} and {shapes[3]}"
        )
    off = _rms(predictions - expected) / _rms(expected).clamp(min=1e-12)
    if not float(off.max()) <= PREDICTION_TOLERANCE:
        k = int(off.argmax())
        raise VerificationError(
            f"{GOLDEN}: expert {k} predicts something else than when it was published (on {about['device']}): the difference is "
            f"{float(off[k]):.4f} of it, {PREDICTION_TOLERANCE} is allowed"
        )
    differences = _rms(images.float() - kept.float()) / 255
    worst = float(differences.max())
    if not worst <= IMAGE_TOLERANCE:
        seed = about["seeds"][int(differences.argmax())]
        raise VerificationError(
            f"{GOLDEN}: seed {seed} draws another image than when it was published (on {about['device']}): the difference is {worst:.4f} "
            f"of the range of pixels, {IMAGE_TOLERANCE} is allowed"
        )
    return {"samples": len(kept), "difference": worst}


def try_out(folder: Path, scheduler: str, device: str) -> None:
    """Load the mixture, take one sampling step, and let every expert predict once: there is nothing to compare with.

    Raises: VerificationError, without the version's name, if it cannot, or predicts no numbers.
    """
    with _told():
        _, predictions = _compute(folder, {"scheduler": scheduler, "steps": 1, "seeds": SEEDS[:1]}, device)
    if lost := [k for k, prediction in enumerate(predictions) if not prediction.isfinite().all()]:
        raise VerificationError(f"expert {lost[0]} predicts numbers that are not finite")


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Raises: VerificationError for whatever the files of a version bring about."""
    try:
        yield
    except (InputError, OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise VerificationError(f"cannot be loaded and sampled: {' '.join(str(error).split())[:300]}") from error


def _rms(rows: Tensor) -> Tensor:
    return rows.double().square().mean(dim=(1, 2, 3)).sqrt()


@torch.no_grad()
def _compute(folder: Path, about: dict[str, Any], device: str) -> tuple[Tensor, Tensor]:
    """(images, predictions)."""
    around, seeds = Surroundings.load(folder, device), list(about["seeds"])
    model = pretrained.load(MixtureDenoiser, folder).to(device)
    shape = (model.config.in_channels, model.config.sample_size, model.config.sample_size)
    sampler = SamplerRef(about["scheduler"], about["steps"], 0.0)
    images = torch.cat([part.cpu() for part, _ in around.draw(model, sampler, seeds, shape, len(seeds))])
    classes = around.conditioner.classes
    labels = None if classes.argument is None else torch.tensor(classes.of_seeds(seeds[:1]), device=device)
    predict = around.conditioner.guide(model, labels, 1.0)
    noise = torch.randn((1, *shape), generator=torch.Generator().manual_seed(seeds[0])).to(device)
    edges = [0, *model.boundaries, int(around.scheduler_config["num_train_timesteps"])]
    middles = [(start + stop) // 2 for start, stop in zip(edges, edges[1:], strict=False)]
    predictions = torch.cat([predict(noise, torch.tensor(t, device=device)).float().cpu() for t in middles])
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8), predictions


def _read(path: Path) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """(images, predictions, how they came about). Raises: InputError if what the file asks for cannot be."""
    with safe_open(path, framework="pt") as file:
        about = json.loads((file.metadata() or {})["golden"])
        kept, expected = file.get_tensor("images"), file.get_tensor("predictions")
    seeds, steps = about["seeds"], about["steps"]
    is_ours = kept.dtype == torch.uint8 and expected.dtype == torch.float32 and kept.dim() == expected.dim() == 4
    if about["schema"] != SCHEMA or not is_ours or not 1 <= len(seeds) == len(kept) <= 16:
        raise InputError(f"{GOLDEN} is of another kind")
    if not all(isinstance(seed, int) and 0 <= seed < 1 << 63 for seed in seeds) or not 1 <= int(steps) <= MOST_STEPS:
        raise InputError(f"{GOLDEN} asks for the seeds {str(seeds)[:60]} in {steps} steps")
    return kept, expected, about
