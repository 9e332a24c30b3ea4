"""What one trial of a plan search leaves, whether it ended or was stopped; what the search is asked besides. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from workers.contracts import Budget, ExpertTask, MixturePlan, RouteTask
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
    images: int = 0
    """Images that it ran through sub-networks, or found run by another trial; one that a gradient was taken of counts as three."""
    shared_by: int = 1
    """Trials that one search serves: its seconds and images are shared out evenly."""


@dataclass(frozen=True)
class FrontTask(Record):
    """One search for several budgets of one agent, sampler and seed: a list of trials, one per budget, goes to ``out`` (JSON)."""

    task: RouteTask
    """Its own budget does not count."""
    budgets: tuple[Budget, ...]
    out: str


@dataclass(frozen=True)
class InfluenceTask(Record):
    """Measure how much an error of each expert counts: on ``samples`` drawn samples, ``batch`` at a time. ``dense``: file of dense's;
    ``tuned``: how the expert's part of the uniform plan of ``budget`` is fine-tuned before, its sub-network still open."""

    route: RouteTask
    samples: int
    batch: int
    guidance_scale: float
    dense: str
    tuned: tuple[ExpertTask, ...] = ()
    budget: Budget | None = None


@dataclass(frozen=True)
class ProxyTask(Record):
    """What a plan is worth after a little fine-tuning, ``experts``: how far they are from dense, and the seconds, go to ``out`` (JSON).
    ``route``: of the plan's budget, calibrated."""

    route: RouteTask
    plan: MixturePlan
    experts: tuple[ExpertTask, ...]
    out: str
