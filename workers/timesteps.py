"""Timesteps, intervals and partitions: who serves a timestep, and how seeds and digests are derived. Standard library only."""

from __future__ import annotations

import hashlib
import json
import typing
from dataclasses import dataclass
from typing import Any

from workers.errors import InputError
from workers.records import Record


def digest_of(value: Any) -> str:
    """sha256 (hex) of the canonical JSON of ``value``."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def derive_seed(*parts: int | str | float) -> int:
    """A 63-bit seed that depends on every part and on nothing else: randomness is derived, never carried."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def interval_index(timestep: Any, boundaries: typing.Sequence[int]) -> Any:
    """Which interval a timestep belongs to: the number of boundaries at or below it.

    The one router of the project: analysis, training, search and sampling all use it. Accepts an int, a float,
    a numpy array or a torch tensor of any shape, and answers with an int or an integer array of that shape.
    """
    index: Any = (timestep < 0) * 0  # a zero of the timestep's own shape
    for boundary in boundaries:
        index = (timestep >= boundary) + index
    return index


# --- timesteps ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, order=True)
class Interval(Record):
    """Training timesteps [start, stop)."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise InputError(f"interval [{self.start}, {self.stop}) is empty or negative")

    @property
    def length(self) -> int:
        return self.stop - self.start

    @property
    def name(self) -> str:
        return f"t{self.start:04d}-{self.stop:04d}"

    def widened(self, num_timesteps: int) -> Interval:
        """With a margin of a quarter of its length on either side, cut off at 0 and ``num_timesteps``."""
        margin = max(1, self.length // 4)
        return Interval(max(0, self.start - margin), min(num_timesteps, self.stop + margin))


@dataclass(frozen=True)
class Partition(Record):
    """K touching intervals that cover [0, num_timesteps)."""

    intervals: tuple[Interval, ...]

    def __post_init__(self) -> None:
        if not self.intervals or self.intervals[0].start != 0:
            raise InputError("a partition has at least one interval and starts at timestep 0")
        for left, right in zip(self.intervals, self.intervals[1:], strict=False):
            if left.stop != right.start:
                raise InputError(f"intervals {left.name} and {right.name} do not touch")

    @classmethod
    def from_boundaries(cls, boundaries: typing.Sequence[int], num_timesteps: int) -> Partition:
        """``boundaries``: the K - 1 inner cuts, ascending."""
        edges = [0, *boundaries, num_timesteps]
        return cls(tuple(Interval(a, b) for a, b in zip(edges, edges[1:], strict=False)))

    @property
    def boundaries(self) -> tuple[int, ...]:
        return tuple(interval.start for interval in self.intervals[1:])

    @property
    def num_timesteps(self) -> int:
        return self.intervals[-1].stop

    def index_of(self, timestep: float) -> int:
        """The expert that serves ``timestep`` (an int or a float of the training axis)."""
        return int(interval_index(timestep, self.boundaries))

    def __len__(self) -> int:
        return len(self.intervals)


@dataclass(frozen=True)
class SimilarityMatrix(Record):
    """How alike the grid's timesteps are: ``values[i][j]`` is the cosine similarity of timesteps i and j.

    ``reliability[i]`` is the cosine between two halves of the images at timestep i: near 1, the row is measured; near 0, it is noise.
    """

    measure: str
    num_timesteps: int
    timesteps: tuple[int, ...]
    values: tuple[tuple[float, ...], ...]
    reliability: tuple[float, ...]
    images: int = 0

    def __post_init__(self) -> None:
        n = len(self.timesteps)
        if n == 0 or len(self.values) != n or any(len(row) != n for row in self.values) or len(self.reliability) != n:
            raise InputError(f"a similarity matrix over {n} timesteps needs {n} x {n} values and {n} reliabilities")
        if any(a >= b for a, b in zip((-1, *self.timesteps), (*self.timesteps, self.num_timesteps), strict=True)):
            raise InputError(f"grid timesteps must ascend within [0, {self.num_timesteps})")
