"""What training reads, pixels and latents alike: clean samples in the denoiser's own scale, from a memory-mapped cache.

Legend: B = rows of one batch; samples [B, C, H, W] are what the denoiser takes, before noise.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from workers import data, latents
from workers.contracts import InputError
from workers.diffusion import pixels

Rows = Sequence[int] | np.ndarray
ALL = slice(None)


class Samples(abc.ABC):
    """``count`` samples of ``shape`` (C, H, W); ``labels`` is int64 [count], -1 where unknown, or None; ``identity`` is the data's."""

    def __init__(self, cache: data.ImageCache | latents.LatentCache) -> None:
        self.count: int = cache.count
        self.shape: tuple[int, int, int] = cache.shape
        self.labels: np.ndarray | None = cache.labels
        self.identity: str = cache.identity

    @abc.abstractmethod
    def clean(
        self, rows: Rows, device: torch.device | str, flip: Tensor | None = None, gen: torch.Generator | None = None, mine: slice = ALL
    ) -> Tensor:
        """float32 [B, C, H, W] on ``device``: the rows ``rows[mine]``, mirrored where ``flip[mine]`` is set; ``flip``: bool [len(rows)].

        ``gen`` draws what the first stage leaves to chance, for all ``rows``, so that ranks that share a batch agree; without it, the
        most likely latent. A ``flip`` on the CPU spares latents a wait for the device. Raises: IndexError outside [0, count).
        """

    def labels_of(self, rows: Rows) -> Tensor:
        """int64 [B], on the CPU; -1 where unknown. Raises: InputError if the data has no labels."""
        if self.labels is None:
            raise InputError(
                "data.path: the images have no labels, which a class-conditional model needs: "
                "give Parquet with a column label, or a folder per class"
            )
        return torch.from_numpy(self.labels[np.asarray(rows, dtype=np.int64)])


def open_samples(path: str | Path) -> Samples:
    """An image cache (a file) or a latent cache (a folder). Raises: InputError naming what is missing or damaged."""
    return LatentSamples(latents.LatentCache.open(path)) if Path(path).is_dir() else PixelSamples(data.ImageCache.open(path))


class PixelSamples(Samples):
    """Images in [-1, 1]. Nothing is left to chance: ``gen`` is not used."""

    def __init__(self, cache: data.ImageCache) -> None:
        super().__init__(cache)
        self.cache = cache

    def clean(
        self, rows: Rows, device: torch.device | str, flip: Tensor | None = None, gen: torch.Generator | None = None, mine: slice = ALL
    ) -> Tensor:
        clean = pixels(self.cache.load(rows[mine]), device)
        if flip is None:
            return clean
        return torch.where(flip[mine].to(clean.device).view(-1, 1, 1, 1), clean.flip(-1), clean)


class LatentSamples(Samples):
    """Latents times the first stage's scale. KL: drawn anew at every call, z = mean + std * noise."""

    def __init__(self, cache: latents.LatentCache) -> None:
        super().__init__(cache)
        self.cache = cache

    def clean(
        self, rows: Rows, device: torch.device | str, flip: Tensor | None = None, gen: torch.Generator | None = None, mine: slice = ALL
    ) -> Tensor:
        key = self.cache.key
        flipped = None if flip is None else flip[mine].flatten().cpu().numpy()
        clean = torch.from_numpy(self.cache.load(rows[mine], flipped)).to(device).float()
        if key.kind == "kl":
            clean, log_variance = clean.chunk(2, dim=1)
            if gen is not None:
                noise = torch.randn(len(rows), *self.shape, generator=gen, device=gen.device)[mine].to(clean.device)
                clean = clean + (0.5 * log_variance.clamp(*latents.LOG_VARIANCE)).exp() * noise
        return clean * key.scaling_factor
