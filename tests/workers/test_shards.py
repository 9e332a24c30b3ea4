"""A mixture's weights as one file per expert: what diffusers reads back, and what two versions share."""

import hashlib
import json

import pytest
import torch

from workers import families, golden, shards
from workers.contracts import GOLDEN, ArchitectureSpec, VerificationError
from workers.diffusion import make_sampler
from workers.mixture import MixtureDenoiser, any_width


@pytest.fixture(scope="module")
def tiny():
    """A family's smallest denoiser, and two architectures for it."""
    model = families.load_family("unet2d").tiny()
    sites = families.load_family("unet2d").sites(model, any_width("group"))
    dense = {branch.site.name: branch.site.dense for branch in sites}
    return dict(model.config), ArchitectureSpec(dense), ArchitectureSpec({name: max(1, width // 2) for name, width in dense.items()})


def mixture(tiny, seed: int) -> MixtureDenoiser:
    base, dense, half = tiny
    torch.manual_seed(seed)
    return MixtureDenoiser.of(base, [500], [dense, half])
