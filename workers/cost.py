"""What a sub-network costs: MACs and parameters, exact and additive over branches, counted without running anything."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from workers import families
from workers.contracts import ArchitectureSpec, BudgetUnreachable, Cost, ElasticSettings, SearchSpace
from workers.elastic import extract, search_space


def count(model: nn.Module, config: Mapping[str, int]) -> tuple[Cost, dict[str, int]]:
    """Cost of one forward pass of one image, and the MACs of every named module. ``model`` must lie on the meta device.

    MACs = FLOPs / 2, attention products included (on the CPU the counter would miss them).
    """
    size = config["sample_size"]
    sample = torch.empty(1, config["in_channels"], size, size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(sample, torch.empty(1, device="meta"))
    prefix = type(model).__name__ + "."
    modules = {name.removeprefix(prefix): sum(ops.values()) // 2 for name, ops in counter.get_flop_counts().items()}
    return Cost(counter.get_total_flops() // 2, sum(p.numel() for p in model.parameters())), modules


@dataclass(frozen=True)
class CostTable:
    """Costs of every choice of every site. Branches share nothing, so a sub-network's cost is the sum of its choices and the rest."""

    space: SearchSpace
    dense: Cost
    macs: dict[str, dict[int, int]]
    params: dict[str, dict[int, int]]

    def cost(self, spec: ArchitectureSpec) -> Cost:
        """Exact cost of one sub-network; equals ``count`` of the extracted model."""
        saved = [
            (self.macs[s.name][s.dense] - self.macs[s.name][spec[s.name]], self.params[s.name][s.dense] - self.params[s.name][spec[s.name]])
            for s in self.space.sites
        ]
        return Cost(self.dense.macs - sum(m for m, _ in saved), self.dense.params - sum(p for _, p in saved))

    @property
    def smallest_ratio(self) -> float:
        """MACs of the smallest sub-network as a part of dense: no budget below it can be met."""
        return self.cost(self.space.smallest).macs / self.dense.macs


def cost_table(config: dict[str, Any], settings: ElasticSettings) -> CostTable:
    """Measure the table on the meta device: one forward pass per choice rank, all sites at once. Measured once per process."""
    return _cost_table(json.dumps(config), settings)


@functools.lru_cache(maxsize=8)
def _cost_table(config_json: str, settings: ElasticSettings) -> CostTable:
    config = json.loads(config_json)
    with torch.device("meta"):
        model = families.build(config).eval()
    branches = families.family_of_config(config).sites(model, settings)
    space = search_space(branches)
    macs: dict[str, dict[int, int]] = {site.name: {} for site in space.sites}
    params: dict[str, dict[int, int]] = {site.name: {} for site in space.sites}
    for rank in range(max(len(site.choices) for site in space.sites)):
        spec = ArchitectureSpec({site.name: site.choices[min(rank, len(site.choices) - 1)] for site in space.sites})
        small = extract(model, branches, spec)
        _, modules = count(small, config)
        for site in space.sites:
            macs[site.name][spec[site.name]] = modules.get(site.name, 0)
            params[site.name][spec[site.name]] = sum(p.numel() for p in small.get_submodule(site.name).parameters())
    dense, _ = count(model, config)
    return CostTable(space, dense, macs, params)


def require_reachable(table: CostTable, ratio: float, key: str) -> None:
    """Raises: BudgetUnreachable if even the smallest sub-network costs more than ``ratio`` of dense."""
    if ratio < table.smallest_ratio:
        raise BudgetUnreachable(
            f"{key} is {ratio:g}, but the smallest mixture needs {table.smallest_ratio:.3f} of the dense model's MACs: "
            "raise it, or allow smaller widths (elastic.width_multiple) or dropped branches (elastic.depth)"
        )


def weighted(costs: Sequence[Cost], shares: Sequence[float]) -> float:
    """Schedule-weighted MACs of one denoising step of a mixture."""
    return sum(share * cost.macs for cost, share in zip(costs, shares, strict=True))
