"""The Expert Routing Agent: a GRU that reads all sites of all experts and emits a width u and a depth v for each, trained end to end.

One sequence over all experts and sites, so that one expert's choice can depend on another's. Frozen orthogonal inputs, bidirectional GRU
64 -> 128, LayerNorm + ReLU, a head per site; Gumbel straight-through choices; only the agent learns. Loss = log(schedule-weighted expert
loss) + cost_weight x |log(cost / budget)|: both terms are ratios, so one weight holds the budget whatever the scale of the losses.
It starts from the greedy plan, and its answer is the best plan met on the way.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.contracts import ArchitectureSpec, ElasticSite, RouteSettings
from workers.routers import RouteProblem, Specs, greedy

INPUT, HIDDEN = 64, 128
OFFSET = 3.0
"""Logit of the starting choice: at first nearly every sample is the starting plan."""


class Agent(nn.Module):
    """Logits over every site's choices, for every expert."""

    inputs: Tensor
    start_depth: Tensor

    def __init__(self, problem: RouteProblem, start: Specs):
        super().__init__()
        self.sites = problem.space.sites
        self.experts = len(problem.experts)
        inputs = torch.empty(self.experts * len(self.sites), INPUT)
        self.register_buffer("inputs", nn.init.orthogonal_(inputs).view(self.experts, len(self.sites), INPUT) * len(inputs) ** 0.5)
        self.expert_embedding = nn.Embedding(self.experts, INPUT)
        self.gru = nn.GRU(INPUT, HIDDEN, bidirectional=True, batch_first=True)
        self.norm = nn.LayerNorm(2 * HIDDEN)
        self.width_heads = nn.ModuleList(nn.Linear(2 * HIDDEN, len(_widths(site))) for site in self.sites)
        self.depth_head = nn.Linear(2 * HIDDEN, len(self.sites))
        for head in (*self.width_heads, self.depth_head):
            nn.init.normal_(head.weight, std=1e-3)
            nn.init.zeros_(head.bias)
        self.start_width = [[_start_width(site, spec[site.name]) for site in self.sites] for spec in start]
        self.register_buffer("start_depth", torch.tensor([[OFFSET if spec[s.name] > 0 else -OFFSET for s in self.sites] for spec in start]))

    def forward(self) -> list[list[tuple[Tensor, Tensor]]]:
        """[expert][site] -> (width logits [choices], depth logit [])."""
        tokens = self.inputs + self.expert_embedding.weight[:, None]
        states, _ = self.gru(tokens.flatten(0, 1)[None])
        states = F.relu(self.norm(states[0])).view(self.experts, len(self.sites), -1)
        depth = self.start_depth + torch.einsum("ksh,sh->ks", states, self.depth_head.weight) + self.depth_head.bias
        return [
            [(self.width_heads[s](states[k, s]) + self.start_width[k][s].to(states.device), depth[k, s]) for s in range(len(self.sites))]
            for k in range(self.experts)
        ]

    def plan(self) -> Specs:
        """The most likely choice of every site."""
        with torch.no_grad():
            return tuple(
                ArchitectureSpec(
                    {
                        site.name: 0 if site.choices[0] == 0 and depth < 0 else _widths(site)[int(width.argmax())]
                        for site, (width, depth) in zip(self.sites, logits, strict=True)
                    }
                )
                for logits in self()
            )


def _widths(site: ElasticSite) -> tuple[int, ...]:
    return tuple(choice for choice in site.choices if choice > 0)


def _start_width(site: ElasticSite, choice: int) -> Tensor:
    """Logits that prefer ``choice`` and, less and less, its neighbours (a dropped branch, should it come back, its narrowest form)."""
    rank = _widths(site).index(choice or site.narrowest)
    return OFFSET * torch.tensor([-abs(r - rank) / 1.0 for r in range(len(_widths(site)))]).clamp_min(-2)


def search(problem: RouteProblem, settings: RouteSettings, rng: random.Random) -> Specs:
    """The best plan within the budget that the agent met, the one it started from included."""
    device = problem.search_batches[0].noisy.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.getrandbits(63))
        start = greedy.search(problem, settings, rng)
        agent = Agent(problem, start).to(device)
        noise = torch.Generator(device=device).manual_seed(rng.getrandbits(63))
    optimizer = torch.optim.AdamW(agent.parameters(), lr=settings.era_learning_rate, weight_decay=0.0)
    candidates = {start}
    for _ in range(settings.era_steps):
        optimizer.zero_grad(set_to_none=True)
        loss = _agent_loss(agent, problem, settings, noise, rng)
        loss.backward()
        nn.utils.clip_grad_norm_(agent.parameters(), 1.0)
        optimizer.step()
        candidates.add(greedy.fit_budget(problem, agent.plan()))
    return min(sorted(candidates, key=lambda specs: [spec.digest for spec in specs]), key=problem.loss)


def _agent_loss(agent: Agent, problem: RouteProblem, settings: RouteSettings, noise: torch.Generator, rng: random.Random) -> Tensor:
    """Expert loss of one sampled plan + cost term. Every expert sees the same number of its calibration images."""
    quality = cost = torch.zeros((), device=noise.device)
    for k, logits in enumerate(agent()):
        gates, price = {}, torch.ones((), device=noise.device)
        for site, (width, depth) in zip(problem.space.sites, logits, strict=True):
            chosen, keep = _sample(width, depth, site, settings.temperature, noise)
            widths = torch.tensor(_widths(site), device=noise.device)
            units = torch.arange(site.dense, device=noise.device)
            gates[site.name] = (chosen @ (units[None] < widths[:, None]).float(), keep)
            branch = chosen @ torch.tensor([problem.price(site.name, width) for width in _widths(site)], device=noise.device)
            dropped = problem.price(site.name, 0) if site.choices[0] == 0 else 0.0
            price = price - problem.price(site.name, site.dense) + keep * branch + (1 - keep) * dropped
        rows = rng.sample(range(len(problem.search_batches[k].noisy)), min(settings.era_batch, len(problem.search_batches[k].noisy)))
        if problem.shares[k] > 0:
            quality = quality + problem.shares[k] * _expert_loss(problem, k, gates, rows)
        cost = cost + problem.shares[k] * price
    return quality.clamp_min(1e-8).log() + settings.cost_weight * (cost / problem.ratio).clamp_min(1e-8).log().abs()


def _expert_loss(problem: RouteProblem, k: int, gates: Mapping[str, tuple[Tensor, Tensor]], rows: Sequence[int]) -> Tensor:
    """``problem.gated_loss`` to first order: its value and its gradient in the gates. The expert's activations are freed at once, so that
    the search needs the memory of one expert, not of all."""
    leaves = {site: (units.detach().requires_grad_(), keep.detach().requires_grad_()) for site, (units, keep) in gates.items()}
    loss = problem.gated_loss(k, leaves, rows)
    slopes = torch.autograd.grad(loss, [leaf for pair in leaves.values() for leaf in pair])
    ends = [gate for pair in gates.values() for gate in pair]
    return loss.detach() + sum(((gate - gate.detach()) * slope).sum() for gate, slope in zip(ends, slopes, strict=True))


def _sample(width: Tensor, depth: Tensor, site: ElasticSite, temperature: float, noise: torch.Generator) -> tuple[Tensor, Tensor]:
    """Hard choices with soft gradients: one-hot over the widths [choices], and keep in {0, 1}."""
    gumbel = -torch.empty_like(width).exponential_(generator=noise).log()
    soft = ((width + gumbel) / temperature).softmax(-1)
    hard = F.one_hot(soft.argmax(-1), len(soft)).to(soft.dtype)
    uniform = torch.empty_like(depth).uniform_(1e-6, 1 - 1e-6, generator=noise)
    soft_keep = ((depth + uniform.log() - (1 - uniform).log()) / temperature).sigmoid()
    keep = (soft_keep > 0.5).to(soft.dtype) + soft_keep - soft_keep.detach() if site.choices[0] == 0 else torch.ones_like(depth)
    return hard + soft - soft.detach(), keep
