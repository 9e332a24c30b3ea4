"""Do two models' timesteps cluster alike? Two similarity matrices on one axis of noise levels, and how far their cuts agree.

The axis has N noise levels (log-SNR), from clean to noisy, as often as both models' training visits them; T timesteps, T' grid timesteps,
K experts. Models with the same noise schedule meet at the same timesteps; others only at the same noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from workers import similarity
from workers.contracts import InputError, Partition, SimilarityMatrix, interval_index
from workers.partition import MAX_AUTO_EXPERTS, best_cuts, cell_edges, interval_costs

RANDOM_PAIRS = 500
SPREAD = (5, 95)
"""Percentiles between which a statistic is said to lie."""


@dataclass(frozen=True)
class Side:
    """What one run found: its matrix, the inner products behind it (float32 [B, T', B, T']), its cuts, and log-SNR by timestep [T]."""

    matrix: SimilarityMatrix
    gram: np.ndarray
    partition: Partition
    log_snr: np.ndarray
    min_length: int
    """Shortest interval in grid cells, as the cuts were made."""
    learned: bool = True
    """Whether the matrix decided the cuts; else other images would not have moved them."""

    def timesteps_at(self, levels: np.ndarray) -> np.ndarray:
        """The timesteps (floats) at which this model meets the noise levels."""
        return np.interp(-levels, -self.log_snr, np.arange(len(self.log_snr)))


def common_levels(left: np.ndarray, right: np.ndarray, points: int) -> np.ndarray:
    """``points`` noise levels [N], falling: quantiles of both models' training timesteps, within the range that both have.

    ``left`` and ``right``: falling log-SNR by timestep [T]. Raises: InputError if the ranges do not meet.
    """
    low, high = max(left.min(), right.min()), min(left.max(), right.max())
    if low >= high:
        raise InputError(
            f"the two models share no noise level: log-SNR is {left.min():.1f} to {left.max():.1f} in one, {right.min():.1f} to "
            f"{right.max():.1f} in the other"
        )
    pooled = np.concatenate([left, right])
    weights = np.concatenate([np.full(len(side), 1 / len(side)) for side in (left, right)])
    order = np.argsort(-pooled, kind="stable")
    order = order[(pooled[order] >= low) & (pooled[order] <= high)]
    cumulated = np.cumsum(weights[order]) / weights[order].sum()
    quantiles = (np.arange(points) + 0.5) / points
    return pooled[order][np.searchsorted(cumulated, quantiles + 1e-9, side="right").clip(max=len(order) - 1)]


def resample(values: np.ndarray, grid: Sequence[int], timesteps: np.ndarray) -> np.ndarray:
    """A matrix [..., T', T'] over ``grid`` read at other timesteps [N], linearly between and level beyond its points: [..., N, N]."""
    weights = np.stack([np.interp(timesteps, grid, row) for row in np.eye(len(grid))], axis=1)  # [N, T']
    found = weights @ values @ weights.T
    found[..., np.arange(len(timesteps)), np.arange(len(timesteps))] = 1.0
    return found


def correlation(left: np.ndarray, right: np.ndarray) -> float:
    """Pearson correlation of the entries above the diagonals of two [N, N]; 0 if all of either are equal."""
    above = np.triu_indices(len(left), 1)
    a, b = left[above] - left[above].mean(), right[above] - right[above].mean()
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / size if size > 1e-12 else 0.0


def without_distance(values: np.ndarray) -> np.ndarray:
    """[N, N] less the mean at every distance from the diagonal: matrices that fall off from it correlate, whatever their clusters."""
    n = len(values)
    distance = np.abs(np.arange(n)[:, None] - np.arange(n)[None])
    means = np.bincount(distance.ravel(), values.ravel()) / np.bincount(distance.ravel())
    return values - means[distance]


def adjusted_rand(left: Sequence[int] | np.ndarray, right: Sequence[int] | np.ndarray) -> float:
    """Adjusted Rand index of two labelings of the same points: 1 for the same clusters, 0 on average for random labels (Hubert 1985)."""
    table = np.zeros((max(left) + 1, max(right) + 1))
    np.add.at(table, (np.asarray(left), np.asarray(right)), 1)

    def pairs(counts: np.ndarray) -> float:
        return float((counts * (counts - 1) / 2).sum())

    both, in_left, in_right, total = pairs(table), pairs(table.sum(1)), pairs(table.sum(0)), len(left) * (len(left) - 1) / 2
    expected, most = in_left * in_right / total, (in_left + in_right) / 2
    return 1.0 if most == expected else (both - expected) / (most - expected)


def labels(boundaries: Sequence[int], timesteps: np.ndarray) -> np.ndarray:
    """Which interval each timestep belongs to, [N]."""
    return np.asarray(interval_index(timesteps, boundaries))


def uniform_labels(points: int, experts: int) -> np.ndarray:
    return np.arange(points) * experts // points


def random_rand(points: int, left: int, right: int, seed: int) -> float:
    """The adjusted Rand index that two random contiguous partitions, of ``left`` and ``right`` intervals, exceed one time in twenty."""
    rng = np.random.default_rng(seed)

    def draw(experts: int) -> np.ndarray:
        cuts = rng.choice(np.arange(1, points), size=experts - 1, replace=False)
        return (np.arange(points)[:, None] >= cuts[None]).sum(1)

    return float(np.percentile([adjusted_rand(draw(left), draw(right)) for _ in range(RANDOM_PAIRS)], 95))


def compare(left: Side, right: Side, replicates: int, seed: int) -> dict[str, Any]:
    """Both matrices on the common axis, and how far they and their cuts agree, with its spread when each run's images are resampled.

    Cuts are those that the runs used; ``at_equal_numbers`` alone cuts both matrices anew.

    Raises: InputError if the matrices are of different measures, or the models share no noise level.
    """
    if left.matrix.measure != right.matrix.measure:
        raise InputError(
            f"the matrices are of different kinds, {left.matrix.measure} and {right.matrix.measure}: "
            "analyze both runs with the same similarity.measure"
        )
    sides, seeds = (left, right), np.random.default_rng(seed).integers(2**31, size=2)
    points = min(len(side.matrix.timesteps) for side in sides)
    levels = common_levels(left.log_snr, right.log_snr, points)
    at = [side.timesteps_at(levels) for side in sides]
    values = [resample(np.asarray(s.matrix.values), s.matrix.timesteps, t) for s, t in zip(sides, at, strict=True)]
    cut = [labels(side.partition.boundaries, t) for side, t in zip(sides, at, strict=True)]
    drawn = [similarity.bootstrap(side.gram, replicates, int(s), side.matrix.measure) for side, s in zip(sides, seeds, strict=True)]
    again = [resample(d, s.matrix.timesteps, t) for d, s, t in zip(drawn, sides, at, strict=True)]
    experts = [len(side.partition) for side in sides]
    recut = [
        [_cut(d, s, t, k) if s.learned else used for d in found]
        for found, s, t, k, used in zip(drawn, sides, at, experts, cut, strict=True)
    ]
    against_uniform = [adjusted_rand(cut[i], uniform_labels(points, experts[1 - i])) for i in (0, 1)]
    return {
        "measure": left.matrix.measure,
        "levels": levels.tolist(),
        "matrices": [v.tolist() for v in values],
        "labels": [c.tolist() for c in cut],
        "correlation": _spread(correlation(*values), [correlation(a, b) for a, b in zip(*again, strict=True)]),
        "correlation_beyond_distance": _spread(
            correlation(*map(without_distance, values)),
            [correlation(without_distance(a), without_distance(b)) for a, b in zip(*again, strict=True)],
        ),
        "adjusted_rand": _spread(adjusted_rand(*cut), [adjusted_rand(a, b) for a, b in zip(*recut, strict=True)]),
        "adjusted_rand_with_uniform": float(np.mean(against_uniform)),
        "adjusted_rand_of_random": random_rand(points, experts[0], experts[1], seed),
        "at_equal_numbers": _at_equal_numbers(sides, at, drawn, seed),
        "self_agreement": [float(np.mean([adjusted_rand(a, b) for a, b in pairwise(found)] or [1.0])) for found in recut],
        "reliability": [float(np.median(side.matrix.reliability)) for side in sides],
    }


def _at_equal_numbers(
    sides: Sequence[Side], at: Sequence[np.ndarray], drawn: Sequence[np.ndarray], seed: int
) -> dict[str, dict[str, float]]:
    """K -> how far the best cuts into K intervals agree, for both matrices alike, and what random cuts reach (``random``)."""
    points = len(at[0])
    most = min(MAX_AUTO_EXPERTS, *(len(side.matrix.timesteps) // side.min_length for side in sides))
    found = {}
    for k in range(2, most + 1):
        value = adjusted_rand(*(_cut(np.asarray(s.matrix.values), s, t, k) for s, t in zip(sides, at, strict=True)))
        again = [adjusted_rand(_cut(a, sides[0], at[0], k), _cut(b, sides[1], at[1], k)) for a, b in zip(*drawn, strict=True)]
        found[str(k)] = {**_spread(value, again), "random": random_rand(points, k, k, seed)}
    return found


def _cut(values: np.ndarray, side: Side, timesteps: np.ndarray, experts: int) -> np.ndarray:
    """The labels [N] that the best cuts of a run's matrix [T', T'] give."""
    edges = cell_edges(side.matrix.timesteps, side.matrix.num_timesteps)
    _, cuts = best_cuts(interval_costs(values), experts, side.min_length)
    return labels([edges[i] for i in cuts], timesteps)


def _spread(value: float, resampled: Sequence[float]) -> dict[str, float]:
    low, high = np.percentile(resampled, SPREAD)
    return {"value": value, "low": float(low), "high": float(high)}
