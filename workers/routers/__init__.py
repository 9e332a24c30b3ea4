"""Who gets which sub-network? One file per agent; every agent answers the same `RouteProblem`.

An agent defines ``search(problem, settings, rng) -> tuple[ArchitectureSpec, ...]``: one architecture per expert, within the budget.
Contract: same seed, same plan; never over budget; an impossible budget raises; an agent answers with its own plan, however bad (the
stage compares it with `uniform`'s). `era`, the agent proper, is besides never worse on the search loss than `uniform` or `greedy`.
An agent may also define ``search_front(problem, ratios, settings, rng)``: a plan for each of several budgets from one search.
Legend: K experts, S sites, n images, loss = weighted mean of the experts' normalised losses on calibration images. A pass is one
sub-network run on all its expert's search images.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

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


LEARNED = ("era", "era_even")
"""Agents that are trained; all others are baselines."""


def serves_fronts(name: str) -> bool:
    """Whether one search of this agent finds a plan for each of several budgets."""
    return hasattr(agent(name), "search_front")


CHUNK = 256
"""Images of one forward pass at most."""


@dataclass(frozen=True)
class CalibrationBatch:
    """Fixed noisy images of one interval, and what the dense model makes of them. Tensors [n, C, H, W], timesteps [n]."""

    noisy: Tensor
    timesteps: Tensor
    target: Tensor
    taught: Tensor
    told: dict[str, Tensor] = field(default_factory=dict)
    """What else the denoiser is told, first dimension n."""
    mixed_precision: str = "no"
    """``bf16``: forward passes run under autocast on a GPU."""
    scale: Tensor | None = None
    """What errors are divided by, 0-d or [n]: the dense model's denoising error, its mean over the batch if it is not given."""

    def __post_init__(self) -> None:
        if self.scale is None:
            object.__setattr__(self, "scale", F.mse_loss(self.taught, self.target).clamp_min(1e-8))

    def __len__(self) -> int:
        return len(self.noisy)

    def losses(self, predicted: Tensor) -> Tensor:
        """Per image [n]: 1 + (distillation error + denoising error - the dense model's denoising error) / ``scale``; 1 for a perfect copy.

        The scale is the interval's, so that losses of different intervals compare and a part of the batch is measured like the whole.
        """
        taught, target = _error(predicted.float(), self.taught), _error(predicted.float(), self.target)
        assert self.scale is not None
        return 1 + (taught + target - self.dense_errors) / self.scale

    @property
    def dense_errors(self) -> Tensor:
        """The dense model's denoising error per image [n]."""
        return _error(self.taught, self.target)

    @torch.no_grad()
    def error(self, denoiser: Callable[..., Any]) -> float:
        """Mean distillation error of a denoiser, in units of ``scale``."""
        assert self.scale is not None
        with self.autocast():
            predicted = predict(denoiser, self.noisy, self.timesteps, self.told)
        return float((_error(predicted, self.taught) / self.scale).mean())

    def loss(self, predicted: Tensor) -> Tensor:
        """Mean of ``losses``, 0-d."""
        return self.losses(predicted).mean()

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.mixed_precision == "bf16" and self.noisy.is_cuda:
            return torch.autocast("cuda", torch.bfloat16)
        return contextlib.nullcontext()

    @torch.no_grad()
    def run(self, expert: ElasticDenoiser, spec: ArchitectureSpec | None = None) -> Tensor:
        """Losses [n] of one sub-network."""
        with self.autocast():
            return self.losses(predict(functools.partial(expert, spec=spec), self.noisy, self.timesteps, self.told))

    def part(self, rows: Sequence[int]) -> CalibrationBatch:
        """Some of the images, under the same scale."""
        index: slice | list[int] = slice(rows.start, rows.stop, rows.step) if isinstance(rows, range) else list(rows)
        told = {name: value[index] for name, value in self.told.items()}
        tensors = (self.noisy[index], self.timesteps[index], self.target[index], self.taught[index])
        scale = self.scale[index] if self.scale is not None and self.scale.dim() else self.scale
        return CalibrationBatch(*tensors, told, self.mixed_precision, scale)


@torch.no_grad()
def predict(denoiser: Callable[..., Any], noisy: Tensor, timesteps: Tensor, told: Mapping[str, Tensor]) -> Tensor:
    """What a denoiser makes of noisy images, float32 [n, C, H, W], in chunks of at most CHUNK images."""
    chunks = [slice(start, start + CHUNK) for start in range(0, len(noisy), CHUNK)]
    found = [denoiser(noisy[c], timesteps[c], **{name: value[c] for name, value in told.items()}) for c in chunks]
    return torch.cat([getattr(out, "sample", out).float() for out in found])


def _error(a: Tensor, b: Tensor) -> Tensor:
    """Squared error per image [n]."""
    return (a - b).square().flatten(1).mean(1)


@dataclass
class Effort:
    """What a search costs, whatever the device, and whatever others have run before: images run through sub-networks. One that a gradient
    is taken of counts as three."""

    images: int = 0
    met: set[tuple[int, ArchitectureSpec]] = field(default_factory=set)
    """Expert and sub-network of all passes so far: each counts once."""


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
    weights: Sequence[float] = ()
    """How much each expert's loss counts; by default its share of the sampler's steps. An expert without a share never counts."""
    report: Callable[[int, int, float], None] = lambda done, total, best: None
    """Iterative agents call it now and then: steps done, steps in all, lowest search loss so far. It may end the search by raising."""
    effort: Effort = field(default_factory=Effort)
    """Of all searches so far that share it: problems that differ in their budget alone do."""
    _scored: dict[tuple[int, ArchitectureSpec], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises: BudgetUnreachable, at once, if no plan can meet the budget."""
        require_reachable(self.table, self.ratio, "budgets.ratio", self.metric)
        self.weights = [w if share > 0 else 0.0 for w, share in zip(self.weights or self.shares, self.shares, strict=True)]

    @property
    def space(self) -> SearchSpace:
        return self.table.space

    @property
    def passes(self) -> float:
        """The effort in passes. All experts have as many search images."""
        return self.effort.images / len(self.search_batches[0])

    @property
    def cheapest(self) -> ArchitectureSpec:
        """The sub-network that costs least; measured time may make it another than the smallest."""
        sites = self.space.sites
        return ArchitectureSpec({s.name: min(s.choices, key=lambda choice, s=s: self.price(s.name, choice)) for s in sites})  # type: ignore[misc]

    def cost_ratio(self, specs: Specs) -> float:
        """Schedule-weighted cost relative to dense."""
        return weighted([self.table.cost(spec) for spec in specs], self.shares, self.metric) / self.table.dense.of(self.metric)

    def price(self, site: str, choice: int) -> float:
        """What one choice of one site costs, relative to the whole dense model."""
        return self.table.prices(self.metric)[site][choice] / self.table.dense.of(self.metric)

    def within_budget(self, specs: Specs) -> bool:
        return self.cost_ratio(specs) <= self.ratio + 1e-9

    def loss(self, specs: Specs) -> float:
        """Search loss of a plan, by sliced execution; remembered per expert and architecture."""
        return self.losses([specs])[0]

    def losses(self, plans: Sequence[Specs]) -> list[float]:
        """Search losses of several plans; the device is waited for once."""
        pairs = dict.fromkeys((k, spec) for specs in plans for k, spec in enumerate(specs) if self.weights[k] > 0)
        self.effort.images += sum(len(self.search_batches[k]) for k, spec in pairs if (k, spec) not in self.effort.met)
        self.effort.met.update(pairs)
        new = [pair for pair in pairs if pair not in self._cache]
        if new:
            found = torch.stack([self.search_batches[k].run(self.experts[k], spec).mean() for k, spec in new]).tolist()
            self._cache.update(zip(new, found, strict=True))
        return [sum(self.expert_loss(k, spec) for k, spec in enumerate(specs)) for specs in plans]

    def expert_loss(self, k: int, spec: ArchitectureSpec) -> float:
        """What an architecture of expert k that ``losses`` has run adds to a plan's loss; 0 for an expert that does not count."""
        return self.weights[k] * self._cache[k, spec] if self.weights[k] > 0 else 0.0

    def score(self, specs: Specs) -> float:
        """Loss of a plan on calibration images that no agent has searched on."""
        return sum(float(losses.mean()) for losses in self._scores(specs))

    def compare(self, specs: Specs, other: Specs) -> tuple[float, float]:
        """``score(specs) - score(other)`` and its standard error over the images, paired, so that their difficulty cancels."""
        gaps = [a - b for a, b in zip(self._scores(specs), self._scores(other), strict=True)]
        variance = sum(float(gap.var() / len(gap)) for gap in gaps if len(gap) > 1)
        return sum(float(gap.mean()) for gap in gaps), variance**0.5

    def _scores(self, specs: Specs) -> list[Tensor]:
        """Weighted losses on the score images, [n] per expert that counts."""
        for k, spec in enumerate(specs):
            if self.weights[k] > 0 and (k, spec) not in self._scored:
                self._scored[k, spec] = self.score_batches[k].run(self.experts[k], spec)
        return [self.weights[k] * self._scored[k, spec] for k, spec in enumerate(specs) if self.weights[k] > 0]

    def gated_loss(self, k: int, gates: Mapping[str, tuple[Tensor, Tensor]], rows: Sequence[int]) -> Tensor:
        """Loss of expert k under differentiable gates, on some rows of its search batch; the gradient reaches the gates."""
        part, expert = self.search_batches[k].part(rows), self.experts[k]
        self.effort.images += 3 * len(part)
        with gated(expert.model, expert.branches, gates), part.autocast():
            return part.loss(expert.model(part.noisy, part.timesteps, **part.told).sample)


def check_plan(problem: RouteProblem, specs: Specs) -> Specs:
    """The plan, once it is sure to be legal and within the budget."""
    for spec in specs:
        problem.space.check(spec)
    if not problem.within_budget(specs):
        raise RunFailed(
            f"the agent broke its contract: its plan costs {problem.cost_ratio(specs):.4f} of dense, the budget is {problem.ratio:g}"
        )
    return specs
