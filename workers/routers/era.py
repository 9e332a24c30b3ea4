"""The Expert Routing Agent: a GRU that reads all sites of all experts and emits a width u and a depth v for each, trained end to end.

One sequence over all experts and sites, so that one expert's choice can depend on another's; the budget is part of every token, so that
one agent serves all budgets. Frozen orthogonal inputs, bidirectional GRU 64 -> 128, LayerNorm + ReLU, a head per site; Gumbel
straight-through choices; only the agent learns. Loss = log(weighted expert loss) + cost_weight x |log(cost / budget)|: both terms are
ratios, so one weight holds the budget whatever the scale of the losses. It starts from the best of uniform, stitch, greedy and knapsack;
what it proposes while it learns is refined jointly, and the answer is the best combination of everything that was tried.
Legend: K experts, S sites, W widths of the site that has most, U units of the site that has most, R budgets.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
import random
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.contracts import ElasticSite, RouteSettings, SearchSpace
from workers.refine import Archive, refine
from workers.routers import RouteProblem, Specs, greedy, knapsack, stitch, uniform

INPUT, HIDDEN = 64, 128
OFFSET = 3.0
"""Logit of the starting choice: at first nearly every sample is the starting plan."""
PROPOSALS = 20
"""Plans that the agent proposes while it learns, evenly spaced."""
PER_EXTRA_BUDGET = 1 / 8
"""What every budget beyond the first adds to a search, as a part of a search of one."""


class Agent(nn.Module):
    """Logits over every site's choices, for every expert, under any budget between those of the starting plans."""

    inputs: Tensor
    start_width: Tensor
    start_depth: Tensor
    legal: Tensor

    def __init__(self, space: SearchSpace, starts: dict[float, Specs]):
        """``starts``: budget -> the plan to start from."""
        super().__init__()
        self.sites, self.ratios = space.sites, sorted(starts)
        experts, sites = len(starts[self.ratios[0]]), len(space.sites)
        most = max(len(_widths(site)) for site in space.sites)
        inputs = torch.empty(experts * sites, INPUT)
        self.register_buffer("inputs", nn.init.orthogonal_(inputs).view(experts, sites, INPUT) * len(inputs) ** 0.5)
        self.expert_embedding = nn.Embedding(experts, INPUT)
        self.budget_embedding = nn.Linear(1, INPUT)
        self.gru = nn.GRU(INPUT, HIDDEN, bidirectional=True, batch_first=True)
        self.norm = nn.LayerNorm(2 * HIDDEN)
        self.width_heads = nn.Parameter(torch.randn(sites, most, 2 * HIDDEN) * 1e-3)
        self.width_bias = nn.Parameter(torch.zeros(sites, most))
        self.depth_head = nn.Parameter(torch.randn(sites, 2 * HIDDEN) * 1e-3)
        self.depth_bias = nn.Parameter(torch.zeros(sites))
        self.register_buffer("legal", torch.tensor([[w < len(_widths(site)) for w in range(most)] for site in space.sites]))
        plans = [starts[ratio] for ratio in self.ratios]
        width = [[[_start_width(site, spec[site.name], most) for site in self.sites] for spec in plan] for plan in plans]
        depth = [[[OFFSET if spec[site.name] > 0 else -OFFSET for site in self.sites] for spec in plan] for plan in plans]
        self.register_buffer("start_width", torch.tensor(width))
        self.register_buffer("start_depth", torch.tensor(depth))

    def forward(self, ratio: float) -> tuple[Tensor, Tensor]:
        """Width logits [K, S, W], -inf where a site has fewer, and depth logits [K, S]."""
        budget = self.budget_embedding(torch.full((1,), math.log(ratio), device=self.inputs.device))
        tokens = self.inputs + self.expert_embedding.weight[:, None] + budget
        states, _ = self.gru(tokens.flatten(0, 1)[None])
        states = F.relu(self.norm(states[0])).view(*self.inputs.shape[:2], -1)
        width = torch.einsum("ksh,swh->ksw", states, self.width_heads) + self.width_bias + self._between(self.start_width, ratio)
        depth = torch.einsum("ksh,sh->ks", states, self.depth_head) + self.depth_bias + self._between(self.start_depth, ratio)
        return width.masked_fill(~self.legal, -torch.inf), depth

    def _between(self, starts: Tensor, ratio: float) -> Tensor:
        """[R, ...] -> [...]: the starting logits of a budget, from those of its two neighbours."""
        above = min(max(1, bisect.bisect_left(self.ratios, ratio)), len(self.ratios) - 1)
        low, high = math.log(self.ratios[above - 1]), math.log(self.ratios[above])
        part = 0.0 if high == low else min(1.0, max(0.0, (math.log(ratio) - low) / (high - low)))
        return starts[above - 1] * (1 - part) + starts[above] * part

    @torch.no_grad()
    def surprise(self, ratio: float) -> list[dict[str, dict[int, float]]]:
        """Per expert, site -> choice -> minus its log-probability: what the most likely plan within a budget has least of."""
        width, depth = self(ratio)
        widths, keep, drop = (-v for v in (width.log_softmax(-1), F.logsigmoid(depth), F.logsigmoid(-depth)))
        rows = torch.cat([drop[..., None], widths + keep[..., None]], -1).tolist()
        return [
            {
                site.name: {c: row[0 if c == 0 else 1 + _widths(site).index(c)] for c in site.choices}
                for site, row in zip(self.sites, of, strict=True)
            }
            for of in rows
        ]


def _widths(site: ElasticSite) -> tuple[int, ...]:
    return tuple(choice for choice in site.choices if choice > 0)


def _start_width(site: ElasticSite, choice: int, most: int) -> list[float]:
    """Logits that prefer ``choice`` and, less and less, its neighbours (a dropped branch, should it come back, its narrowest form)."""
    rank = _widths(site).index(choice or site.narrowest)
    return [-OFFSET * min(2.0, abs(r - rank)) for r in range(most)]


class Choices:
    """What the sampled choices of every site mean, as tensors: which units a width keeps, and what it costs."""

    def __init__(self, problem: RouteProblem, device: torch.device):
        sites = problem.space.sites
        most, units = max(len(_widths(site)) for site in sites), max(site.dense for site in sites)
        self.prefix = torch.zeros(len(sites), most, units)
        self.price, self.dropped = torch.zeros(len(sites), most), torch.zeros(len(sites))
        self.droppable = torch.tensor([site.choices[0] == 0 for site in sites], device=device)
        for s, site in enumerate(sites):
            for w, width in enumerate(_widths(site)):
                self.prefix[s, w, :width] = 1
                self.price[s, w] = problem.price(site.name, width)
            self.dropped[s] = problem.price(site.name, 0) if site.choices[0] == 0 else 0.0
        self.fixed = 1 - sum(problem.price(site.name, site.dense) for site in sites)
        self.prefix, self.price, self.dropped = (t.to(device) for t in (self.prefix, self.price, self.dropped))


def search(problem: RouteProblem, settings: RouteSettings, rng: random.Random) -> Specs:
    """The best plan within the budget that can be combined from everything the search has tried."""
    return search_front(problem, (problem.ratio,), settings, rng)[0]


def search_front(problem: RouteProblem, ratios: Sequence[float], settings: RouteSettings, rng: random.Random) -> list[Specs]:
    """One search for several budgets: one agent learns them all, and what is tried for one budget serves the others.

    Eight budgets take less than two searches of one. Raises: BudgetUnreachable, before anything is run.
    """
    problems = [dataclasses.replace(problem, ratio=ratio) for ratio in ratios]
    more, archive = 1 + PER_EXTRA_BUDGET * (len(ratios) - 1), Archive(problem)
    steps = round(settings.era_steps * more)
    passes = settings.trials * more / len(ratios) * sum(weight > 0 for weight in problem.weights)
    archive.add(agent.search(p, settings, rng) for p in problems for agent in (uniform, stitch, greedy, knapsack))

    def report(done: int) -> None:
        best = [problem.loss(archive.best(ratio)) for ratio in ratios]
        problem.report(done, steps + len(ratios), sum(best) / len(best))

    _train(problems, archive, settings, steps, rng, report)
    for done, p in enumerate(sorted(problems, key=lambda p: -p.ratio), 1):
        refine(p, archive, passes, rng)
        report(steps + done)
    return [archive.best(ratio) for ratio in ratios]


def _train(
    problems: Sequence[RouteProblem],
    archive: Archive,
    settings: RouteSettings,
    steps: int,
    rng: random.Random,
    report: Callable[[int], None],
) -> None:
    """Train an agent on budgets between those of ``problems``; what it proposes on the way goes to the archive."""
    problem, ratios = problems[0], [p.ratio for p in problems]
    device = problem.search_batches[0].noisy.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.getrandbits(63))
        agent = Agent(problem.space, {ratio: archive.best(ratio) for ratio in ratios}).to(device)
    noise = torch.Generator(device=device).manual_seed(rng.getrandbits(63))
    choices, every = Choices(problem, device), max(1, steps // PROPOSALS)
    optimizer = torch.optim.AdamW(agent.parameters(), lr=settings.era_learning_rate, weight_decay=0.0)
    for step in range(1, steps + 1):
        optimizer.zero_grad(set_to_none=True)
        ratio = math.exp(rng.uniform(math.log(min(ratios)), math.log(max(ratios))))
        agent_loss(agent, problem, choices, ratio, settings, noise, rng).backward()
        nn.utils.clip_grad_norm_(agent.parameters(), 1.0)
        optimizer.step()
        if step % every == 0:
            p = problems[step // every % len(problems)]
            proposed = knapsack.best_sum(p, agent.surprise(p.ratio), (1.0,) * len(p.experts))
            archive.add([proposed] if proposed is not None else [])
            report(step)


def agent_loss(
    agent: Agent, problem: RouteProblem, choices: Choices, ratio: float, settings: RouteSettings, noise: torch.Generator, rng: random.Random
) -> Tensor:
    """Expert loss of one sampled plan + cost term, 0-d. Every expert sees the same number of its calibration images."""
    width, depth = agent(ratio)
    chosen, keep = _sample(width, depth, choices.droppable, settings.temperature, noise)
    units = torch.einsum("ksw,swu->ksu", chosen, choices.prefix)
    branch = (chosen * choices.price).sum(-1)
    prices = choices.fixed + (keep * branch + (1 - keep) * choices.dropped).sum(-1)
    cost = (prices * torch.tensor(problem.shares, device=prices.device, dtype=prices.dtype)).sum()
    quality = torch.zeros((), device=noise.device)
    for k, weight in enumerate(problem.weights):
        n = len(problem.search_batches[k])
        rows = sorted(rng.sample(range(n), min(settings.era_batch, n)))
        if weight > 0:
            quality = quality + weight * _expert_loss(problem, k, units[k], keep[k], rows)
    return quality.clamp_min(1e-8).log() + settings.cost_weight * (cost / ratio).clamp_min(1e-8).log().abs()


def _expert_loss(problem: RouteProblem, k: int, units: Tensor, keep: Tensor, rows: Sequence[int]) -> Tensor:
    """``problem.gated_loss`` to first order: its value and its gradient in the gates [S, U] and [S]. The expert's activations are freed at
    once, so that the search needs the memory of one expert, not of all."""
    leaves = units.detach().requires_grad_(), keep.detach().requires_grad_()
    sites = problem.space.sites
    loss = problem.gated_loss(k, {site.name: (leaves[0][s, : site.dense], leaves[1][s]) for s, site in enumerate(sites)}, rows)
    slopes = torch.autograd.grad(loss, leaves)
    return loss.detach() + sum(((gate - gate.detach()) * slope).sum() for gate, slope in zip((units, keep), slopes, strict=True))


def _sample(width: Tensor, depth: Tensor, droppable: Tensor, temperature: float, noise: torch.Generator) -> tuple[Tensor, Tensor]:
    """Hard choices with soft gradients: one-hot over the widths [K, S, W], and keep in {0, 1} [K, S], 1 where a site must stay."""
    gumbel = -torch.empty_like(width).exponential_(generator=noise).log()
    soft = ((width + gumbel) / temperature).softmax(-1)
    hard = F.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft.dtype)
    uniform = torch.empty_like(depth).uniform_(1e-6, 1 - 1e-6, generator=noise)
    soft_keep = ((depth + uniform.log() - (1 - uniform).log()) / temperature).sigmoid()
    keep = torch.where(droppable, (soft_keep > 0.5).to(soft.dtype) + soft_keep - soft_keep.detach(), 1.0)
    return hard + soft - soft.detach(), keep
