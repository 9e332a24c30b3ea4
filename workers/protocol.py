"""Under what a distance, and a time, was measured. Numbers with different ids are never put side by side. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from workers.errors import InputError
from workers.records import Record, differing
from workers.timesteps import digest_of


@dataclass(frozen=True)
class ExtractorRef(Record):
    """A feature extractor: a file of workers/extractors, or ``package.module:function``; and its weights file."""

    name: str
    weights: str | None = None


@dataclass(frozen=True)
class SamplerRef(Record):
    """With what images are drawn. It is a choice that is compared, not a part of the protocol: dense at 25 steps beside a mixture at 50."""

    scheduler: str
    steps: int
    eta: float
    epsilon_scale: float = 1.0
    """By which the predicted noise is divided (epsilon scaling, arXiv 2308.15321)."""

    @property
    def name(self) -> str:
        """``ddim:25``, or with scaled noise ``ddim:25:1.002``, as in the job's evaluate.dense."""
        return f"{self.scheduler}:{self.steps}" + (f":{self.epsilon_scale}" if self.epsilon_scale != 1 else "")

    def to_json(self) -> dict[str, Any]:
        """The scale is left out where it is 1: what stands for a row is what it was before there was one."""
        return {key: value for key, value in super().to_json().items() if (key, value) != ("epsilon_scale", 1)}


@dataclass(frozen=True)
class Protocol(Record):
    """What two numbers must have in common to be compared. What stands for a thing that is not measured is empty."""

    image_shape: tuple[int, ...]
    """(C, H, W) of the images, which are in [-1, 1]."""
    seed: int
    """Image i starts from noise of derive_seed(seed, "sample", i) or, for the distances, of derive_seed(seed, "frechet", i)."""
    guidance_scale: float
    dtype: str
    """Of the denoiser's weights and activations, with torch's default arithmetic (TF32 in a GPU's convolutions); the sampler's state is
    float32."""
    weights: str = "ema"
    """Of trained networks: their moving average."""
    levels: int = 256
    """Images are rounded to so many levels a channel before features are taken."""
    extractor: str = ""
    extractor_digest: str = ""
    input_size: int | None = None
    resize: str = ""
    images: int = 0
    """Generated images behind a distance."""
    reference_digest: str = ""
    reference_images: int = 0
    kid_digest: str = ""
    """Of the images, or of the stored features, that the kernel distance is measured from."""
    kid_images: int = 0
    """Reference images behind the kernel distance; 0: none is measured."""
    lpips_digest: str = ""
    """Of the network behind the perceptual distance."""

    def to_json(self) -> dict[str, Any]:
        """Kernel and perceptual distance are left out where they are not measured: the id of what is does not depend on them."""
        return {key: value for key, value in super().to_json().items() if value or not key.startswith(("kid_", "lpips_"))}

    @property
    def id(self) -> str:
        return digest_of(self.to_json())[:12]

    def told(self) -> dict[str, Any]:
        """With its id, as it is stored beside every number."""
        return {"id": self.id, **self.to_json()}


def common_protocol(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """The protocol of all rows of a table; None if they have none. Raises: InputError naming two that differ, and in what."""
    found = [(label, row["protocol"]) for label, row in metrics.items() if row.get("protocol")]
    for label, protocol in found[1:]:
        first, other = found[0]
        if protocol["id"] != other["id"]:
            odd = ", ".join(f"{key} {one} and {two}" for key, one, two in differing(other, protocol) if key != "id")
            raise InputError(
                f"{first} and {label} cannot stand in one table: they were measured under the protocols {other['id']} and "
                f"{protocol['id']}, which differ in {odd}: measure both under one"
            )
    return found[0][1] if found else None


@dataclass(frozen=True)
class Timing(Record):
    """Under what a denoiser is timed: ``compiled`` region by region, ``rewrites`` as exported, ``cuda_graphs`` replayed, and
    with ``fused_kernels`` of `workers.fused`."""

    batch: int
    dtype: str
    compiled: bool
    rewrites: tuple[str, ...] = ()
    cuda_graphs: bool = False
    fused_kernels: bool = False

    def check(self, device: str) -> None:
        """Raises: InputError if nothing can be timed so on ``device``; auto may still become one on which it can."""
        for name in ("cuda_graphs", "fused_kernels"):
            if getattr(self, name) and device == "cpu":
                raise InputError(f"latency.{name} is true, but the device is cpu: set it to false")
        if self.fused_kernels and self.compiled:
            raise InputError(
                "latency.fused_kernels and latency.compile are both true: a compiler brings kernels of its own; set one to false"
            )
