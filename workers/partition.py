"""Where to cut the timesteps: the exact best K contiguous intervals of a similarity matrix.

The grid has T' cells; grid point i stands for the timesteps [edges[i], edges[i + 1]). S is the [T', T'] similarity.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from workers.contracts import InputError, Partition, SimilarityMatrix

MAX_AUTO_EXPERTS = 6


def grid(num_timesteps: int, points: int) -> tuple[int, ...]:
    """The middles of ``points`` equal cells of [0, num_timesteps)."""
    if not 1 <= points <= num_timesteps:
        raise InputError(f"similarity.timesteps is {points}: give 1 to {num_timesteps}, the model's training timesteps")
    return tuple((2 * i + 1) * num_timesteps // (2 * points) for i in range(points))


def cell_edges(timesteps: Sequence[int], num_timesteps: int) -> list[int]:
    """The T' + 1 edges of the grid's cells: halfway between neighbours, so that any ascending grid works."""
    return [0, *((a + b + 1) // 2 for a, b in pairwise(timesteps)), num_timesteps]


def interval_costs(values: np.ndarray) -> np.ndarray:
    """cost[i, j] = length x (1 - mean similarity inside) of the cells [i, j), for all i < j; inf elsewhere. [T' + 1, T' + 1].

    The mean runs over all pairs of the block, which makes this the k-means objective on unit vectors. From a 2-D prefix sum, O(T'^2).
    """
    n = len(values)
    prefix = np.zeros((n + 1, n + 1))
    prefix[1:, 1:] = values.cumsum(0).cumsum(1)
    diagonal = prefix.diagonal()
    block = diagonal[None, :] + diagonal[:, None] - prefix - prefix.T
    length = np.arange(n + 1)[None, :] - np.arange(n + 1)[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(length > 0, length - block / length, np.inf)


def best_cuts(costs: np.ndarray, experts: int, min_length: int = 1) -> tuple[float, tuple[int, ...]]:
    """Total cost and the inner cuts (cell indices) of the best ``experts`` contiguous intervals; exact, O(K T'^2).

    Raises: InputError if that many intervals of ``min_length`` cells do not fit.
    """
    n = len(costs) - 1
    if experts < 1 or experts * min_length > n:
        at_least = f" of at least {min_length} cells" if min_length > 1 else ""
        raise InputError(
            f"partition.experts: {experts} experts{at_least} do not fit a grid of {n} timesteps: ask for fewer, raise similarity.timesteps"
        )
    length = np.arange(n + 1)[None, :] - np.arange(n + 1)[:, None]
    allowed = np.where(length >= min_length, costs, np.inf)
    best, came_from = allowed[0].copy(), []
    for _ in range(experts - 1):
        total = best[:, None] + allowed
        came_from.append(total.argmin(0))
        best = total.min(0)
    cuts, end = [], n
    for parents in reversed(came_from):
        end = int(parents[end])
        cuts.append(end)
    return float(best[n]), tuple(reversed(cuts))


def cost_curve(costs: np.ndarray, min_length: int = 1, most: int = MAX_AUTO_EXPERTS) -> dict[int, float]:
    """Best cost of K = 1, 2, ... intervals, relative to K = 1."""
    one = float(costs[0, -1]) or 1.0
    most = min(most, max(1, (len(costs) - 1) // min_length))
    return {k: best_cuts(costs, k, min_length)[0] / one for k in range(1, most + 1)}


def choose_experts(curve: dict[int, float], penalty: float) -> int:
    """The K in [2, 6] that minimises cost(K) / cost(1) + penalty x K: one more expert must save ``penalty`` of the whole cost."""
    candidates = [k for k in curve if k >= 2]
    if not candidates:
        raise InputError("partition.experts: auto needs a grid with room for two intervals; give experts: 1 or raise similarity.timesteps")
    return min(candidates, key=lambda k: (curve[k] + penalty * k, k))


def cut(
    similarity: SimilarityMatrix,
    experts: int | str | Sequence[int] = "auto",
    *,
    min_length: int = 1,
    penalty: float = 0.05,
    max_experts: int = MAX_AUTO_EXPERTS,
) -> Partition:
    """The partition of [0, T) into intervals of alike timesteps.

    Args:
        similarity: how alike the T' grid timesteps are.
        experts: a number K; "auto" for K by `choose_experts`; or the explicit inner boundaries in training timesteps.
        min_length: shortest interval, in grid cells.
        penalty: what one more expert must save, as a part of the cost of one interval ("auto" only).
        max_experts: the most that "auto" may choose.
    Raises: InputError if the request does not fit the grid.
    """
    if not isinstance(experts, (int, str)):
        return explicit(experts, similarity.num_timesteps)
    costs = interval_costs(np.asarray(similarity.values))
    if experts == "auto":
        experts = choose_experts(cost_curve(costs, min_length, max_experts), penalty)
    edges = cell_edges(similarity.timesteps, similarity.num_timesteps)
    _, cuts = best_cuts(costs, int(experts), min_length)
    return Partition.from_boundaries([edges[i] for i in cuts], similarity.num_timesteps)


def explicit(boundaries: Sequence[int], num_timesteps: int) -> Partition:
    """The partition with the given inner boundaries. Raises: InputError."""
    if list(boundaries) != sorted(set(boundaries)) or any(not 0 < b < num_timesteps for b in boundaries):
        raise InputError(f"partition.experts: boundaries {list(boundaries)} must ascend within (0, {num_timesteps})")
    return Partition.from_boundaries(boundaries, num_timesteps)


def uniform_in_t(num_timesteps: int, experts: int) -> Partition:
    """Baseline: intervals of equal length."""
    return Partition.from_boundaries([round(k * num_timesteps / experts) for k in range(1, experts)], num_timesteps)


def uniform_in_log_snr(log_snr: np.ndarray, experts: int, min_timesteps: int = 1) -> Partition:
    """Baseline: intervals that span equal ranges of log-SNR, as far as each can have ``min_timesteps``. ``log_snr``: [T], falling.

    Where so many do not fit, the intervals are of T // ``experts`` timesteps at least.
    """
    least = max(1, min(min_timesteps, len(log_snr) // experts))
    levels = np.linspace(log_snr[0], log_snr[-1], experts + 1)[1:-1]
    cuts = [0]
    for k, cut in enumerate(np.searchsorted(-log_snr, -levels), 1):
        last = len(log_snr) - (experts - k) * least  # leaves room for the noisier experts
        cuts.append(min(last, max(cuts[-1] + least, int(cut))))
    return Partition.from_boundaries(cuts[1:], len(log_snr))


def baselines(log_snr: np.ndarray, experts: int, min_timesteps: int) -> dict[str, Partition]:
    """The partitions that need no look at the model, by the name of their method. ``log_snr``: [T], falling."""
    return {
        "uniform in t": uniform_in_t(len(log_snr), experts),
        "uniform in log-SNR": uniform_in_log_snr(log_snr, experts, min_timesteps),
    }


def partition_cost(partition: Partition, similarity: SimilarityMatrix) -> float:
    """Cost of any partition on the grid, relative to one single interval; boundaries are taken to the nearest cell edge."""
    costs = interval_costs(np.asarray(similarity.values))
    edges = np.asarray(cell_edges(similarity.timesteps, similarity.num_timesteps))
    cells = [int(np.abs(edges - t).argmin()) for t in (0, *partition.boundaries, similarity.num_timesteps)]
    one = float(costs[0, -1]) or 1.0
    return float(sum(costs[a, b] for a, b in pairwise(cells) if b > a)) / one


def boundary_frequency(
    replicates: np.ndarray, similarity: SimilarityMatrix, partition: Partition, min_length: int = 1, tolerance: int = 1
) -> list[float]:
    """How often each chosen boundary returns when the images are resampled.

    ``replicates``: bootstrap similarity matrices [R, T', T']. A boundary counts as returned when a cut lies within ``tolerance`` cells.
    """
    edges = np.asarray(cell_edges(similarity.timesteps, similarity.num_timesteps))
    chosen = [int(np.abs(edges - b).argmin()) for b in partition.boundaries]
    hits = np.zeros(len(chosen))
    for values in replicates:
        cuts = best_cuts(interval_costs(values), len(partition), min_length)[1]
        hits += [any(abs(cut - c) <= tolerance for cut in cuts) for c in chosen]
    return (hits / max(1, len(replicates))).tolist()
