"""How alike are two timesteps? One file per measure; every measure embeds timesteps, and this module compares the embeddings.

A measure defines ``embed(problem, timesteps) -> float array [minibatches, len(timesteps), D]``: row (b, t) depends on minibatch b, timestep
t and the seed only, never on how the grid was split over workers. Similarity is the cosine of the embeddings' mean over minibatches, or,
where a measure says ``PAIRED = True``, the mean inner product of the same minibatch's embeddings, normalised. ``NEEDS_MODEL`` says
whether model and images have to be loaded.
Legend: B minibatches, T' grid timesteps, D embedding size, R bootstrap replicates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from workers import extension, names_in
from workers.contracts import SimilarityMatrix

if TYPE_CHECKING:
    from torch import Tensor, nn

    from workers.diffusion import NoiseSchedule


@dataclass(frozen=True)
class SimilarityProblem:
    """What a measure may look at. ``minibatches``: clean samples, each [n, C, H, W], and what else the denoiser is told of
    them; ``model`` is None when not needed."""

    schedule: NoiseSchedule
    minibatches: Sequence[tuple[Tensor, dict[str, Tensor]]]
    model: nn.Module | None
    buckets: int
    seed: int
    on_timestep: Callable[[], None] = lambda: None
    """Called after each timestep, for progress."""


def names() -> list[str]:
    return names_in("similarity")


def measure(name: str) -> ModuleType:
    """Raises: InputError for a name that is no file of this folder."""
    return extension("similarity", name, "similarity.measure")


MOST_FOLDS = 32
"""Minibatches beyond this many are averaged into folds, so that the inner products stay small whatever the number of images."""


def gram_of(embeddings: np.ndarray) -> np.ndarray:
    """Inner products of all rows of embeddings [B, T', D] -> [B, T', B, T'] with B <= MOST_FOLDS: all that the statistics below need."""
    if len(embeddings) > MOST_FOLDS:
        embeddings = np.stack([fold.mean(0) for fold in np.array_split(embeddings, MOST_FOLDS)])
    batches, points, size = embeddings.shape
    flat = embeddings.reshape(batches * points, size).astype(np.float32)
    return (flat @ flat.T).reshape(batches, points, batches, points)


def cosine(gram: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Cosine matrix [T', T'] between two weighted means over minibatches; ``left`` and ``right`` are weights [B]."""
    left, right = left.astype(gram.dtype), right.astype(gram.dtype)
    inner = np.einsum("a,aibj,b->ij", left, gram, right, optimize=True).astype(np.float64)
    norm_left = np.sqrt(np.maximum(np.einsum("a,aibi,b->i", left, gram, left, optimize=True), 1e-30))
    norm_right = np.sqrt(np.maximum(np.einsum("a,aibi,b->i", right, gram, right, optimize=True), 1e-30))
    return inner / (norm_left[:, None] * norm_right[None, :])


def paired(measure_name: str) -> bool:
    return getattr(measure(measure_name), "PAIRED", False)


def _matrix(gram: np.ndarray, weights: np.ndarray, by_minibatch: bool) -> np.ndarray:
    """Similarity [T', T'] over minibatches that count ``weights`` [B] times."""
    if not by_minibatch:
        return cosine(gram, weights, weights)
    inner = np.einsum("a,aiaj->ij", weights.astype(gram.dtype), gram, optimize=True).astype(np.float64)
    norm = np.sqrt(np.maximum(inner.diagonal(), 1e-30))
    return inner / (norm[:, None] * norm[None, :])


def _agreement(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Per timestep, the correlation [T'] of two matrices' rows, their diagonals left out."""
    others = ~np.eye(len(left), dtype=bool)
    rows = [(a[keep], b[keep]) for a, b, keep in zip(left, right, others, strict=True)]
    return np.array([1.0 if len(a) < 2 or not (a.std() and b.std()) else np.corrcoef(a, b)[0, 1] for a, b in rows])


def similarity_of(gram: np.ndarray, measure_name: str, timesteps: Sequence[int], num_timesteps: int, images: int) -> SimilarityMatrix:
    """The similarity matrix with its split-half reliability per timestep: the cosine between the means of even and of odd minibatches, or,
    for a paired measure, the correlation of the two halves' rows."""
    batches, by_minibatch = len(gram), paired(measure_name)
    values = _matrix(gram, np.ones(batches), by_minibatch)
    values = np.clip((values + values.T) / 2, -1, 1)
    np.fill_diagonal(values, 1.0)
    even = (np.arange(batches) % 2 == 0).astype(float)
    if batches < 2:
        reliability = np.ones(len(values))
    elif by_minibatch:
        reliability = _agreement(_matrix(gram, even, True), _matrix(gram, 1 - even, True))
    else:
        reliability = cosine(gram, even, 1 - even).diagonal()
    return SimilarityMatrix(
        measure=measure_name,
        num_timesteps=num_timesteps,
        timesteps=tuple(int(t) for t in timesteps),
        values=tuple(tuple(float(v) for v in row) for row in values),
        reliability=tuple(float(r) for r in reliability),
        images=images,
    )


def bootstrap(gram: np.ndarray, replicates: int, seed: int, measure_name: str = "gradient") -> np.ndarray:
    """Similarity matrices [R, T', T'] of resampled minibatches."""
    batches = len(gram)
    rng = np.random.default_rng(seed)
    draws = [np.bincount(rng.integers(batches, size=batches), minlength=batches).astype(float) for _ in range(replicates)]
    return np.stack([_matrix(gram, weights, paired(measure_name)) for weights in draws])
