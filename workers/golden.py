"""Does a published version still draw what it drew when it was published? A few images of fixed noise are kept with it.

Arithmetic differs between machines, so images are compared, not bits: the root mean square difference of each, as a part of the range of
pixels. Legend: n images [n, C, H, W], stored as uint8.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from workers.contracts import GOLDEN, InputError, SamplerRef, VerificationError
from workers.generate import Surroundings
from workers.mixture import MixtureDenoiser

SEEDS = (0, 1, 2, 3)
MOST_STEPS = 50
"""More of a planned sampler's steps are not taken: every expert of 20 timesteps or more serves one of them."""
TOLERANCE = 0.02
"""Largest difference that counts as equal."""
SCHEMA = 1


def make(folder: Path, scheduler: str, steps: int, device: str) -> None:
    """Draw the images from the mixture in ``folder`` as a user would, loaded from its files, and add them to it."""
    about = {"schema": SCHEMA, "scheduler": scheduler, "steps": min(steps, MOST_STEPS), "seeds": SEEDS, "device": device.partition(":")[0]}
    images = _draw(folder, about, device)
    # one key, since safetensors writes several in any order
    save_file({"images": images}, folder / GOLDEN, metadata={"golden": json.dumps(about)})


def compare(folder: Path, device: str) -> dict[str, Any]:
    """Load the mixture, draw the images again, and compare: how many there are, and their largest difference.

    Raises: VerificationError, without the version's name, if it cannot be loaded or draws other images.
    """
    try:
        kept, about = _read(folder / GOLDEN)
        found = _draw(folder, about, device)
    except (InputError, OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise VerificationError(f"cannot be loaded and sampled: {' '.join(str(error).split())[:300]}") from error
    if found.shape != kept.shape:
        raise VerificationError(f"{GOLDEN}: holds images of shape {list(kept.shape)}, the mixture draws {list(found.shape)}")
    differences = (found.float() - kept.float()).square().mean(dim=(1, 2, 3)).sqrt() / 255
    worst = float(differences.max())
    if not worst <= TOLERANCE:
        seed = about["seeds"][int(differences.argmax())]
        raise VerificationError(
            f"{GOLDEN}: seed {seed} draws another image than when it was published (on {about['device']}): the difference is {worst:.4f} "
            f"of the range of pixels, {TOLERANCE} is allowed"
        )
    return {"samples": len(kept), "difference": worst}


def _draw(folder: Path, about: dict[str, Any], device: str) -> Tensor:
    around = Surroundings.load(folder, device)
    model: Any = MixtureDenoiser.from_pretrained(folder, local_files_only=True).to(device).eval()
    shape = (model.config.in_channels, model.config.sample_size, model.config.sample_size)
    sampler = SamplerRef(about["scheduler"], about["steps"], 0.0)
    images = torch.cat([part.cpu() for part, _ in around.draw(model, sampler, list(about["seeds"]), shape, len(about["seeds"]))])
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def _read(path: Path) -> tuple[Tensor, dict[str, Any]]:
    """Raises: InputError if what the file asks for cannot be."""
    with safe_open(path, framework="pt") as file:
        about = json.loads((file.metadata() or {})["golden"])
        kept = file.get_tensor("images")
    seeds, steps = about["seeds"], about["steps"]
    if about["schema"] != SCHEMA or kept.dtype != torch.uint8 or kept.dim() != 4 or not 1 <= len(seeds) == len(kept) <= 16:
        raise InputError(f"{GOLDEN} is of another kind")
    if not all(isinstance(seed, int) and 0 <= seed < 1 << 63 for seed in seeds) or not 1 <= int(steps) <= MOST_STEPS:
        raise InputError(f"{GOLDEN} asks for the seeds {str(seeds)[:60]} in {steps} steps")
    return kept, about
