"""What a sub-network costs: MACs and parameters, exact and additive over branches, counted without running anything."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from workers import families
from workers.contracts import ArchitectureSpec, BudgetUnreachable, Cost, ElasticSettings, ElasticSite, SearchSpace
from workers.elastic import extract, search_space
from workers.latency_table import LatencyTable

ATTENTION_OPS = ("attention", "bmm")
"""Parts of the names of the operators that multiply queries with keys and weights with values."""


@dataclass(frozen=True)
class Count:
    """MACs of a module, those of attention products apart."""

    macs: int
    attention_macs: int


def count(model: nn.Module, config: Mapping[str, Any]) -> tuple[Cost, dict[str, Count]]:
    """Cost of one forward pass of one image, and the MACs of every named module. ``model`` must lie on the meta device.

    MACs = FLOPs / 2. Attention products are counted (on the CPU the counter would miss them), and told apart: papers often leave them out.
    """
    args, kwargs = families.example_inputs(config, 1, "meta", torch.float32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*args, **kwargs)
    prefix = type(model).__name__ + "."
    modules = {}
    for name, ops in counter.get_flop_counts().items():
        attention = sum(flops for op, flops in ops.items() if any(part in str(op) for part in ATTENTION_OPS))
        modules[name.removeprefix(prefix)] = Count(sum(ops.values()) // 2, attention // 2)
    total = modules["Global"]
    return Cost(total.macs, sum(p.numel() for p in model.parameters()), total.attention_macs), modules


@dataclass(frozen=True)
class CostTable:
    """Costs of every choice of every site. Branches share nothing, so a sub-network's cost is the sum of its choices and the rest."""

    space: SearchSpace
    dense: Cost
    macs: dict[str, dict[int, int]]
    params: dict[str, dict[int, int]]
    attention_macs: dict[str, dict[int, int]]
    latency_ms: dict[str, dict[int, float]] | None = None
    """By site and choice, where the job has a latency table; ``dense.latency_ms`` is then set too."""

    def cost(self, spec: ArchitectureSpec) -> Cost:
        """Cost of one sub-network: MACs and parameters equal those that ``count`` finds in the extracted model; latency is predicted."""

        def less(table: Mapping[str, Mapping[int, float]]) -> float:
            return sum(table[site.name][site.dense] - table[site.name][spec[site.name]] for site in self.space.sites)

        macs, params, attention = (int(less(table)) for table in (self.macs, self.params, self.attention_macs))
        latency = None
        if self.latency_ms is not None and self.dense.latency_ms is not None:
            latency = self.dense.latency_ms - less(self.latency_ms)
        return Cost(self.dense.macs - macs, self.dense.params - params, self.dense.attention_macs - attention, latency)

    def prices(self, metric: str) -> Mapping[str, Mapping[int, float]]:
        """Site -> choice -> what it costs in the budget's metric."""
        if metric == "macs":
            return self.macs
        assert self.latency_ms is not None
        return self.latency_ms

    def with_latency(self, table: LatencyTable) -> CostTable:
        """The same table with predicted times; the dense model's is predicted too, so that errors of the fit cancel in ratios."""
        return replace(self, dense=replace(self.dense, latency_ms=table.predict(self.space.dense.choices)), latency_ms=table.by_choice)

    def smallest_ratio(self, metric: str = "macs") -> float:
        """Cost of the cheapest sub-network as a part of dense: no budget below it can be met."""
        prices = self.prices(metric)
        cheapest = ArchitectureSpec({s.name: min(s.choices, key=lambda choice, s=s: prices[s.name][choice]) for s in self.space.sites})  # type: ignore[misc]
        return self.cost(cheapest).of(metric) / self.dense.of(metric)


def cost_table(config: dict[str, Any], settings: ElasticSettings) -> CostTable:
    """Count the table on the meta device: a few forward passes, all sites at once. Counted once per process."""
    return _cost_table(json.dumps(config), settings)


@functools.lru_cache(maxsize=8)
def _cost_table(config_json: str, settings: ElasticSettings) -> CostTable:
    config = json.loads(config_json)
    with torch.device("meta"):
        model = families.build(config).eval()
    branches = families.family_of_config(config).sites(model, settings)
    space = search_space(branches)
    corners: list[dict[str, dict[int, int]]] = [{site.name: {} for site in space.sites} for _ in range(3)]
    # a module's cost is linear in its kept units, so that two widths tell all; a dropped branch is measured by itself
    for spec in dict.fromkeys((space.smallest, space.narrowest, space.dense)):
        small = extract(model, branches, spec)
        cost, modules = count(small, config)
        for site in space.sites:
            found = modules.get(site.name, Count(0, 0))
            params = sum(p.numel() for p in small.get_submodule(site.name).parameters())
            for table, value in zip(corners, (found.macs, params, found.attention_macs), strict=True):
                table[site.name][spec[site.name]] = value
    macs, params_, attention = ({site.name: _between(site, table[site.name]) for site in space.sites} for table in corners)
    return CostTable(space, cost, macs, params_, attention)


def _between(site: ElasticSite, known: Mapping[int, int]) -> dict[int, int]:
    """Cost of every choice from that of the narrowest, the dense, and the dropped one."""
    low, high = site.narrowest, site.dense
    slope = (known[high] - known[low]) // max(1, high - low)
    assert known[low] + slope * (high - low) == known[high], f"the cost of {site.name} is not linear in its units"
    return {choice: known[0] if choice == 0 else known[low] + slope * (choice - low) for choice in site.choices}


def activation_bytes(config: dict[str, Any]) -> int:
    """Bytes in float32 that one image's forward pass of the dense denoiser keeps for its backward pass, counted on the meta device."""
    with torch.device("meta"):
        model = families.build(config).eval()
    args, kwargs = families.example_inputs(config, 1, "meta", torch.float32)
    own, kept = {p.untyped_storage()._cdata for p in model.parameters()}, {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(*args, **kwargs).sample.sum()
    return sum(tensor.untyped_storage().nbytes() for storage, tensor in kept.items() if storage not in own)


def require_reachable(table: CostTable, ratio: float, key: str, metric: str = "macs") -> None:
    """Raises: BudgetUnreachable if even the cheapest sub-network costs more than ``ratio`` of dense."""
    smallest = table.smallest_ratio(metric)
    if ratio < smallest:
        what = "MACs" if metric == "macs" else "measured time"
        raise BudgetUnreachable(
            f"{key} is {ratio:g}, but the smallest mixture needs {smallest:.3f} of the dense model's {what}: "
            "raise it, or allow smaller widths (elastic.width_multiple) or dropped branches (elastic.depth)"
        )


def weighted(costs: Sequence[Cost], shares: Sequence[float], metric: str = "macs") -> float:
    """Schedule-weighted cost of one denoising step of a mixture."""
    return sum(share * cost.of(metric) for cost, share in zip(costs, shares, strict=True))
