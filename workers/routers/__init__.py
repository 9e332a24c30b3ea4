"""Who gets which sub-network? One file per agent; every agent answers the same `RouteProblem`.

An agent defines ``search(problem, settings, rng) -> tuple[ArchitectureSpec, ...]``: one architecture per expert, within the budget.
Contract: same seed, same plan; never over budget; never worse than `uniform` on the search loss; an impossible budget raises.
Legend: K experts, S sites, loss = schedule-weighted mean of the experts' normalised losses on calibration images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from workers import extension, names_in
from workers.contracts import ArchitectureSpec, RunFailed, SearchSpace
from workers.cost import CostTable, require_reachable, weighted
from workers.elastic import ElasticDenoiser, gated

Specs = tuple[ArchitectureSpec, ...]
Sensitivity = Mapping[str, Mapping[int, float]]
"""Site -> choice -> how much an expert's loss rises when only that site is reduced."""


def names() -> list[str]:
    return names_in("routers")


def agent(name: str) -> ModuleType:
    """Raises: InputError for a name that is no file of this folder."""
    return extension("routers", name, "router.agents")


@dataclass(frozen=True)
class CalibrationBatch:
    """Fixed noisy images of one interval, and what the dense model makes of them. Tensors [n, C, H, W], timesteps [n]."""

    noisy: Tensor
    timesteps: Tensor
    target: Tensor
    taught: Tensor
    told: dict[str, Tensor] = field(default_factory=dict)
    """What else the denoiser is told, first dimension n."""

    def loss(self, predicted: Tensor) -> Tensor:
        """(distillation error + denoising error) / the dense model's denoising error: comparable across intervals, 1 for a perfect copy."""
        dense = F.mse_loss(self.taught, self.target).clamp_min(1e-8)
        return (F.mse_loss(predicted.float(), self.taught) + F.mse_loss(predicted.float(), self.target)) / dense


@dataclass
class RouteProblem:
    """One budget to meet. Per expert, ``search_batches`` are for looking around, ``score_batches`` for the loss that is reported."""

    experts: Sequence[ElasticDenoiser]
    table: CostTable
    shares: Sequence[float]
    ratio: float
    search_batches: Sequence[CalibrationBatch]
    score_batches: Sequence[CalibrationBatch]
    sensitivity: Sequence[Sensitivity]
    metric: str = "macs"
    _cache: dict[tuple[int, ArchitectureSpec], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises: BudgetUnreachable, at once, if no plan can meet the budget."""
        require_reachable(self.table, self.ratio, "budgets.ratio", self.metric)

    @property
    def space(self) -> SearchSpace:
        return self.table.space

    def cost_ratio(self, specs: Specs) -> float:
        """Schedule-weighted cost relative to dense."""
        return weighted([self.table.cost(spec) for spec in specs], self.shares, self.metric) / self.table.dense.of(self.metric)

    def price(self, site: str, choice: int) -> float:
        """What one choice of one site costs, relative to the whole dense model."""
        return self.table.prices(self.metric)[site][choice] / self.table.dense.of(self.metric)

    def within_budget(self, specs: Specs) -> bool:
        return self.cost_ratio(specs) <= self.ratio + 1e-9

    @torch.no_grad()
    def loss(self, specs: Specs) -> float:
        """Search loss of a plan, by sliced execution; remembered per expert and architecture."""
        total = 0.0
        for k, spec in enumerate(specs):
            if (k, spec) not in self._cache:
                self._cache[k, spec] = float(self._expert_loss(k, spec, self.search_batches[k]))
            total += self.shares[k] * self._cache[k, spec]
        return total

    @torch.no_grad()
    def score(self, specs: Specs) -> float:
        """Loss of a plan on calibration images that no agent has searched on."""
        return sum(self.shares[k] * float(self._expert_loss(k, spec, self.score_batches[k])) for k, spec in enumerate(specs))

    def _expert_loss(self, k: int, spec: ArchitectureSpec, batch: CalibrationBatch) -> Tensor:
        return batch.loss(self.experts[k](batch.noisy, batch.timesteps, spec, **batch.told))

    def gated_loss(self, k: int, gates: Mapping[str, tuple[Tensor, Tensor]], rows: Sequence[int]) -> Tensor:
        """Loss of expert k under differentiable gates, on some rows of its search batch; the gradient reaches the gates."""
        batch, expert = self.search_batches[k], self.experts[k]
        told = {name: value[rows] for name, value in batch.told.items()}
        part = CalibrationBatch(batch.noisy[rows], batch.timesteps[rows], batch.target[rows], batch.taught[rows], told)
        with gated(expert.model, expert.branches, gates):
            return part.loss(expert.model(part.noisy, part.timesteps, **told).sample)


def measure_sensitivity(expert: ElasticDenoiser, batch: CalibrationBatch, points: int = 4) -> dict[str, dict[int, float]]:
    """Loss rise for every site and choice, the rest dense. At most ``points`` choices a site are measured, those between interpolated."""
    with torch.no_grad():
        base = float(batch.loss(expert(batch.noisy, batch.timesteps, **batch.told)))
        rises: dict[str, dict[int, float]] = {}
        for site in expert.space.sites:
            last = len(site.choices) - 1
            ranks = sorted({round(i * last / points) for i in range(points)} - {last})
            known = {last: 0.0}
            for rank in ranks:
                spec = expert.space.dense.replace(site.name, site.choices[rank])
                known[rank] = float(batch.loss(expert(batch.noisy, batch.timesteps, spec, **batch.told))) - base
            rises[site.name] = {choice: _between(known, rank) for rank, choice in enumerate(site.choices)}
    return rises


def _between(known: Mapping[int, float], rank: int) -> float:
    below, above = max(r for r in known if r <= rank), min(r for r in known if r >= rank)
    if below == above:
        return known[below]
    part = (rank - below) / (above - below)
    return known[below] * (1 - part) + known[above] * part


def check_plan(problem: RouteProblem, specs: Specs) -> Specs:
    """The plan, once it is sure to be legal and within the budget."""
    for spec in specs:
        problem.space.check(spec)
    if not problem.within_budget(specs):
        raise RunFailed(
            f"the agent broke its contract: its plan costs {problem.cost_ratio(specs):.4f} of dense, the budget is {problem.ratio:g}"
        )
    return specs
