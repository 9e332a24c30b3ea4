"""How much work each stage of a job is: calls to the cluster and their units, in forward passes of one image of the dense model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator import evaluation
from orchestrator.config import JobConfig, Training
from workers import influence, routers, similarity
from workers.cost import CostTable
from workers.routers.era import PER_EXTRA_BUDGET


@dataclass(frozen=True)
class Work:
    """One call. A backward pass counts two forward passes."""

    task: str
    units: tuple[float, ...]
    pieces: int = 0
    """Into how many equal parts the units' sum may be cut anew; 0: the units stay as they are."""


def experts_of(job: JobConfig) -> int:
    """How many there will be, at most."""
    experts = job.partition.experts
    return experts if isinstance(experts, int) else len(experts) + 1 if isinstance(experts, list) else job.partition.max_experts


def workload(job: JobConfig, table: CostTable, images: int) -> dict[str, tuple[Work, ...]]:
    """Stage -> its calls in order. ``images``: how many the data has."""
    experts, copies = experts_of(job), 1 + len(job.finetune.compare)
    ratios = [budget.ratio for budget in job.budgets]
    train, tune, route = job.specialize, job.finetune, job.router
    gradient = job.similarity.timesteps * min(job.similarity.images, images) * 3
    needs_model = similarity.measure(job.similarity.measure).NEEDS_MODEL
    choices = sum(min(4, len(site.choices) - 1) for site in table.space.sites)
    agents = dict.fromkeys(["uniform", *route.agents, *tune.compare])
    together, alone = _searches(job, float(experts * route.era_steps * route.era_batch), list(agents))
    influenced = route.influence_samples * (1 if job.sampler.guidance_scale == 1 else 2) if experts > 1 else 0
    dense_samples = float(influenced * min(job.sampler.steps, influence.STEPS))
    drawn = job.evaluate.samples + job.evaluate.frechet_samples
    row = job.evaluate.images * job.evaluate.timesteps + drawn * job.sampler.steps
    own = evaluation.job_sampler(job).name
    dense, mixtures = (
        [float(drawn * sampler.steps) for sampler in evaluation.further_samplers(job, key) if sampler.name != own]
        for key in ("dense", "mixtures")
    )
    rows = [row, *dense, *(further * ratio for ratio in ratios for further in mixtures)]
    rows += [row * ratio for ratio in ratios for _ in range(copies + job.evaluate.cut_only)]
    return {
        "analyze": (Work("embed_timesteps", (float(gradient if needs_model else 0),), job.similarity.timesteps),),
        "partition": (),
        "specialize": (Work("train_expert", (_trained(train, 0.65 + 0.6 * train.random_networks),) * experts),),
        "route": (
            Work("expert_sensitivity", (choices * route.images / 2,) * experts),
            Work("draw_dense", (dense_samples,)),
            Work("expert_influence", tuple(dense_samples * (k + 1) / experts for k in range(experts))),
            *([Work("search_front", tuple(together))] if together else []),
            Work("search_plan", tuple(alone)),
            *_proxies(job, len(agents), experts),
        ),
        "finetune": (Work("train_expert", tuple(_trained(tune, ratio) for ratio in ratios for _ in range(copies * experts))),),
        "publish": (Work("evaluate_shard", tuple(rows)),),
    }


def _searches(job: JobConfig, era: float, agents: Sequence[str]) -> tuple[list[float], list[float]]:
    """The searches for several budgets, and those for one. ``era``: of that agent's for one, next to which all others are nothing."""
    together: list[float] = []
    alone: list[float] = []
    for agent in agents:
        for count in Counter(budget.metric for budget in job.budgets).values():
            cost = era if agent in routers.LEARNED else 0.0
            if count > 1 and routers.serves_fronts(agent):
                together += [cost * (1 + PER_EXTRA_BUDGET * (count - 1))] * len(job.router.seeds)
            else:
                alone += [cost] * count * len(job.router.seeds)
    return together, alone


def passes(works: Sequence[Work]) -> float:
    return sum(sum(work.units) for work in works)


def _proxies(job: JobConfig, agents: int, experts: int) -> tuple[Work, ...]:
    """Every agent's plan of every budget, trained for a little while."""
    if not job.proxy_steps or agents == 1:
        return ()
    tuned = [experts * job.proxy_steps * job.finetune.batch_size * (1 + 3 * budget.ratio) for budget in job.budgets]
    return (Work("proxy_distance", tuple(cost for cost in tuned for _ in range(agents))),)


def _trained(settings: Training, networks: float) -> float:
    """One expert: the teacher forward, and sub-networks that cost ``networks`` dense ones forward and backward."""
    return settings.steps * settings.batch_size * (1 + 3 * networks)
