"""Who goes first, and how long it all takes: indivisible units of work on equal slots, the longest first."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Call:
    """One request to the cluster and how long it took: what a stage's record keeps, and what predictions are made from."""

    task: str
    """Name of the task that every unit runs."""
    slots: int
    """How many units could run at once."""
    wall_s: float
    units: tuple[float, ...]
    """Seconds of work of every unit, in the order in which they were handed out."""
    startup_s: float
    """Seconds that processes took to start: before every unit, or once."""
    each: bool
    """Whether every unit has processes of its own."""

    @classmethod
    def of(cls, task: str, slots: int, wall_s: float, units: Sequence[float], each: bool = False) -> Call:
        """A call whose start-up is what its wall time holds beyond the work, shared by the rounds of units on one slot if ``each``."""
        rounds = -(-len(units) // slots) if units and each else 1
        return cls(task, slots, wall_s, tuple(units), max(0.0, wall_s - makespan_s(units, slots)) / rounds, each)

    def to_json(self) -> dict[str, Any]:
        return {
            "task": self.task,
            "slots": self.slots,
            "wall_s": round(self.wall_s, 2),
            "busy_s": round(makespan_s(self.units, self.slots), 2),
            "startup_s": round(self.startup_s, 2),
            "each": self.each,
            "units": [round(seconds, 2) for seconds in self.units],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Call:
        return cls(value["task"], value["slots"], value["wall_s"], tuple(value["units"]), value["startup_s"], value["each"])


def longest_first(work: Mapping[str, float]) -> list[str]:
    """Names by falling work; equals stay in their order. On any number of slots this order takes at most 4/3 of the best possible time
    (Graham 1969), and with many units hardly more than it."""
    return sorted(work, key=lambda name: -work[name])


def makespan_s(units: Sequence[float], slots: int) -> float:
    """Seconds until the last unit is done, when every slot that becomes free takes the next unit in order."""
    free = [0.0] * max(1, min(slots, len(units)))
    for seconds in units:
        heapq.heapreplace(free, free[0] + seconds)
    return max(free)


def least_s(units: Sequence[float], slots: int) -> float:
    """No schedule of these indivisible units ends sooner: an even share, the longest unit, or two units that must share a slot."""
    falling = sorted(units, reverse=True)
    pair = falling[slots - 1] + falling[slots] if len(falling) > slots else 0.0
    return max(sum(falling) / slots, falling[0], pair) if falling else 0.0
