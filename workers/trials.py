"""What one trial of a plan search leaves, whether it ended or was stopped. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from workers.contracts import MixturePlan
from workers.records import Record


@dataclass(frozen=True)
class SearchTrial(Record):
    """One agent's search for one budget, one sampler and one seed, so far."""

    plan: MixturePlan | None
    """None until the search is over; for good if it was stopped before."""
    relative_loss: float
    """Lowest search loss so far, as a part of the uniform plan's at the same budget and sampler."""
    progress: float
    """Part of the search that is done."""
    seconds: float
    worker: str
    """Host and process that searched."""
    loads: int
    """How often that process had read the experts' weights by then."""
