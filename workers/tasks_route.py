"""The entry points of routing that run on workers: ``task(session, item)``, as those of `workers.tasks`.

Legend: n calibration images or samples; K experts.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import socket
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from workers import checkpoint, conditioning, families, routers, sensitivity
from workers.contracts import (
    ArchitectureSpec,
    Budget,
    ExpertTask,
    Interval,
    MixturePlan,
    Progress,
    RouteTask,
    derive_seed,
)
from workers.cost import cost_table
from workers.dense_error import DenseError
from workers.diffusion import NoiseSchedule, generator, sampler_timesteps, steps_per_expert
from workers.elastic import ElasticDenoiser, extract
from workers.files import replacing
from workers.influence import Probe, level_of_error
from workers.latency_table import LatencyTable
from workers.routers.uniform import at_level
from workers.samples import open_samples
from workers.session import Session
from workers.tasks import labels_of, load_elastic, train_expert
from workers.trials import FrontTask, InfluenceTask, ProxyTask, SearchTrial


@functools.lru_cache(maxsize=1)
def _known_losses(item: RouteTask) -> dict[tuple[int, ArchitectureSpec], float]:
    """Search losses of sub-networks, shared by all trials of a worker process: a budget need not run what another has run."""
    return {}


@functools.lru_cache(maxsize=1)
def _calibration(item: RouteTask) -> tuple[list[ElasticDenoiser], list[routers.CalibrationBatch], list[routers.CalibrationBatch]]:
    """Elastic experts and calibration batches, loaded once per worker process however many trials it runs."""
    schedule = NoiseSchedule(families.load_scheduler_config(item.model))
    teacher = families.load_denoiser(item.model).to(item.device)
    images, conditioner = open_samples(item.images), conditioning.load(item.model, item.device)
    experts = [load_elastic(expert.path, item.model, item).to(item.device) for expert in item.experts]
    half = len(item.rows) // 2

    def batch(interval: Interval, rows: Sequence[int], name: str) -> routers.CalibrationBatch:
        gen = generator(item.device, item.seed, "calibration", name, interval.start)
        clean = images.clean(rows, item.device)
        # stratified timesteps: the whole interval is seen whatever the number of images
        t = (interval.start + (torch.arange(len(rows), device=clean.device) + 0.5) * interval.length / len(rows)).long()
        noise = torch.randn(clean.shape, generator=gen, device=clean.device)
        noisy = schedule.noised(clean, noise, t)
        with torch.no_grad():
            told = conditioner(labels_of(images, conditioner, rows, item.device))
        taught = routers.predict(teacher, noisy, t, told)
        return routers.CalibrationBatch(noisy, t, schedule.target(clean, noise, t), taught, told, item.mixed_precision)

    search = [batch(interval, item.rows[:half], "search") for interval in item.partition.intervals]
    score = [batch(interval, item.rows[half:], "score") for interval in item.partition.intervals]
    for k, parts in enumerate(zip(search, score, strict=True)):  # an error counts as a part of the dense model's at its timestep
        timesteps, errors = (torch.cat(found).tolist() for found in zip(*((p.timesteps, p.dense_errors) for p in parts), strict=True))
        energy = float(torch.cat([part.target for part in parts]).square().mean())
        dense = DenseError.fit(schedule, timesteps, errors, energy)(item.device)
        search[k], score[k] = (replace(part, scale=dense[part.timesteps]) for part in parts)
    return experts, search, score


def _shared(item: RouteTask) -> RouteTask:
    """The part of a trial that all trials share, whatever their budget and sampler: the key of the per-process cache."""
    budget = Budget("macs", 1.0, "ddim", 1)
    return replace(item, agent="", search_seed=0, sensitivity=(), influence=None, budget=budget, latency=None, stage="route")


def expert_sensitivity(session: Session, item: tuple[RouteTask, int, str]) -> str:
    """Write expert k's sensitivity table as JSON: ``rises`` (site -> choice -> loss rise), and the ``seconds`` that it took."""
    task, k, out = item
    unit, started = f"sensitivity {task.experts[k].interval.name}", time.time()
    session.report(Progress(task.stage, unit, 0, 1))
    experts, search, _ = _calibration(_shared(task))
    table = sensitivity.measure_sensitivity(experts[k], search[k])
    session.report(Progress(task.stage, unit, 1, 1, seconds=time.time() - started))
    with replacing(Path(out)) as path:
        path.write_text(json.dumps({"rises": table, "seconds": round(time.time() - started, 2)}))
    return out


def draw_dense(session: Session, item: InfluenceTask) -> str:
    """Draw samples with the dense model: its states and their features go to ``item.dense`` (npz)."""
    session.report(Progress(item.route.stage, "influence dense", 0, 1))
    with replacing(Path(item.dense)) as path, _precision(item.route):
        np.savez(path, **_probe(item).draw_dense())  # type: ignore[arg-type]  # numpy's stub takes a name for a flag
    session.report(Progress(item.route.stage, "influence dense", 1, 1))
    return item.dense


def expert_influence(session: Session, item: tuple[InfluenceTask, int]) -> tuple[float | None, float]:
    """(how far the samples move while expert k alone is narrow, the error of that sub-network); no distance if it serves no step.

    The sub-network is that of the uniform plan, after a little fine-tuning, and its error that of before, which a search knows: of some
    experts' errors fine-tuning takes more than of others'. Without fine-tuning, one whose error is about the same for all experts.
    """
    task, k = item
    unit, route = f"influence {task.route.experts[k].interval.name}", task.route
    session.report(Progress(route.stage, unit, 0, 1))
    experts, _, score = _calibration(_shared(route))
    if task.budget is not None:
        problem = _problem(replace(route, budget=task.budget, sensitivity=(), influence=None))
        spec = routers.agent("uniform").search(problem, route.settings, random.Random(0))[k]
        small = _trained(session, replace(task.tuned[k], spec=spec))
    else:
        level = level_of_error(lambda level: score[k].error(functools.partial(experts[k], spec=at_level(experts[k].space, level))))
        spec = at_level(experts[k].space, level)
        small = extract(experts[k].model, experts[k].branches, spec)
    with np.load(task.dense, allow_pickle=False) as arrays, _precision(route):
        distance = _probe(task).distance({k: small}, dict(arrays))
    session.report(Progress(route.stage, unit, 1, 1))
    return distance, score[k].error(functools.partial(experts[k], spec=spec))


def proxy_distance(session: Session, item: ProxyTask) -> str:
    """Train a plan's experts for a little while and measure how far they are from dense then: their errors, weighted as a search does.

    A search knows sub-networks of elastic experts, not what they become: some lose little before fine-tuning and gain little by it.
    """
    started, route = time.time(), item.route
    unit, total = f"proxy {item.plan.budget.name} {item.plan.agent}", len(item.experts)
    weights, (_, _, score) = _problem(route).weights, _calibration(_shared(route))
    distance = 0.0
    for k, task in enumerate(item.experts):
        session.report(Progress(route.stage, unit, k, total, seconds=time.time() - started))
        if weights[k] > 0:
            distance += weights[k] * score[k].error(_trained(session, task))
    session.report(Progress(route.stage, unit, total, total, distance, seconds=time.time() - started))
    with replacing(Path(item.out)) as path:
        path.write_text(json.dumps({"distance": distance, "seconds": round(time.time() - started, 2)}))
    return item.out


def _trained(session: Session, task: ExpertTask) -> nn.Module:
    """A small expert, on the session's device, after a training that leaves nothing else."""
    assert task.source is not None and task.spec is not None
    source = load_elastic(task.source, task.model, task)
    small = extract(source.model, source.branches, task.spec)
    with tempfile.TemporaryDirectory() as folder:
        found = train_expert(Session(folder, session.device), task)
        small.load_state_dict(checkpoint.read(found.path, prefix="ema.")[0])
    return small.to(session.device)


def _precision(item: RouteTask) -> contextlib.AbstractContextManager[object]:
    """As the experts were trained, on a GPU."""
    on = item.mixed_precision == "bf16" and item.device.startswith("cuda")
    return torch.autocast("cuda", torch.bfloat16) if on else contextlib.nullcontext()


def _probe(item: InfluenceTask) -> Probe:
    route, seeds = item.route, range(item.samples)
    dense = families.load_denoiser(route.model).to(route.device)
    conditioner, shape = conditioning.load(route.model, route.device), open_samples(route.images).shape
    classes = conditioner.classes
    noise = torch.stack([torch.randn(shape, generator=generator("cpu", route.seed, "influence", seed)) for seed in seeds])
    labels = classes.of_seeds(list(seeds)) if classes.argument is not None else None
    return Probe(
        dense=dense,
        levels=families.family_of_config(families.load_config(route.model)).features(dense),
        conditioner=conditioner,
        config=families.load_scheduler_config(route.model),
        partition=route.partition,
        sampler=route.budget.scheduler,
        steps=route.budget.steps,
        guidance_scale=item.guidance_scale,
        noise=noise.to(route.device),
        labels=None if labels is None else torch.tensor(labels, device=route.device),
        batch=item.batch,
    )


def search_plan(session: Session, item: RouteTask) -> SearchTrial:
    """One trial: one agent searches one budget with one seed, and tells the session how it goes. Raises: BudgetUnreachable."""
    [trial] = _search(session, item, (item.budget,))
    return trial


def search_front(session: Session, item: FrontTask) -> str:
    """The trials of all budgets of one agent that serves them in one search. Raises: BudgetUnreachable."""
    trials = _search(session, item.task, item.budgets)
    with replacing(Path(item.out)) as path:
        path.write_text(json.dumps([trial.to_json() for trial in trials]))
    for trial in trials:
        session.report_search(trial)
    return item.out


def _search(session: Session, item: RouteTask, budgets: Sequence[Budget]) -> list[SearchTrial]:
    """A trial per budget, all of one metric and sampler, from one search; with several, by an agent that serves fronts."""
    started, agent, told = time.perf_counter(), routers.agent(item.agent), 0
    name = budgets[0].name if len(budgets) == 1 else f"{len(budgets)} budgets"
    unit = f"{name} {budgets[0].scheduler}-{budgets[0].steps} {item.agent} seed {item.search_seed}"

    def trial(plan: MixturePlan | None, relative_loss: float, part: float) -> SearchTrial:
        seconds, images = (time.perf_counter() - started) / len(budgets), round(problem.effort.images / len(budgets))
        return SearchTrial(plan, relative_loss, part, seconds, worker, loads, images, len(budgets))

    def on_report(done: int, total: int, best: float) -> None:
        nonlocal told
        if done * 10 // total > told:  # every tenth: whoever listens may take its time
            told = done * 10 // total
            session.report(Progress(item.stage, unit, done, total, best, seconds=time.perf_counter() - started))
            session.report_search(trial(None, best * len(budgets) / sum(uniform_losses), done / total))

    session.report(Progress(item.stage, unit, 0, 1))
    problem = replace(_problem(replace(item, budget=budgets[0])), report=on_report)
    problems = [replace(problem, ratio=budget.ratio) for budget in budgets]
    loads, worker = _calibration.cache_info().misses, f"{socket.gethostname()}:{os.getpid()}"
    rng = random.Random(derive_seed(item.seed, item.search_seed, item.agent, name))
    uniforms = [routers.agent("uniform").search(p, item.settings, rng) for p in problems]
    uniform_losses = [max(p.loss(plan), 1e-12) for p, plan in zip(problems, uniforms, strict=True)]
    if len(budgets) == 1:
        found = [agent.search(problem, item.settings, rng)]
    else:
        found = agent.search_front(problem, [budget.ratio for budget in budgets], item.settings, rng)
    seconds = (time.perf_counter() - started) / len(budgets)
    plans = [_plan(item, *each, seconds) for each in zip(budgets, problems, found, uniforms, strict=True)]
    session.report(Progress(item.stage, unit, 1, 1, plans[-1].loss, seconds=time.perf_counter() - started))
    return [trial(plan, p.loss(plan.experts) / least, 1.0) for plan, p, least in zip(plans, problems, uniform_losses, strict=True)]


def _plan(
    item: RouteTask, budget: Budget, problem: routers.RouteProblem, found: routers.Specs, uniform: routers.Specs, seconds: float
) -> MixturePlan:
    """What an agent found, as a plan with its costs, its loss, and why. Raises: RunFailed if it breaks the agent's contract."""
    # an expert that this sampler never calls costs and teaches nothing: it gets the uniform architecture, in case another sampler does
    specs = routers.check_plan(problem, tuple(s if share else u for s, u, share in zip(found, uniform, problem.shares, strict=True)))
    gain, error = problem.compare(uniform, specs)
    return MixturePlan(
        budget=budget,
        agent=item.agent,
        seed=item.search_seed,
        partition=item.partition,
        experts=specs,
        shares=tuple(problem.shares),
        expert_costs=tuple(problem.table.cost(spec) for spec in specs),
        dense_cost=problem.table.dense,
        loss=problem.score(specs),
        search_seconds=seconds,
        gain=gain,
        gain_error=error,
        reasons=sensitivity.reasons(problem, specs),
    )


def _problem(item: RouteTask) -> routers.RouteProblem:
    """What an agent is asked: the loaded experts, what each choice costs, and how many of the sampler's steps each expert serves."""
    experts, search, score = _calibration(_shared(item))
    table = cost_table(families.load_config(item.model), item.elastic)
    if item.latency is not None:
        table = table.with_latency(LatencyTable.load(Path(item.latency)))
    timesteps = sampler_timesteps(item.budget.scheduler, families.load_scheduler_config(item.model), item.budget.steps)
    shares = tuple(count / len(timesteps) for count in steps_per_expert(item.partition, timesteps))
    measured = [json.loads(Path(path).read_text())["rises"] for path in item.sensitivity]
    tables = [{site: {int(choice): rise for choice, rise in row.items()} for site, row in rises.items()} for rises in measured]
    influence = json.loads(Path(item.influence).read_text())["influence"] if item.influence else [1.0] * len(experts)
    counts = [share * value for share, value in zip(shares, influence, strict=True)]
    weights = [count / sum(counts) for count in counts]
    known = _known_losses(_shared(item))
    return routers.RouteProblem(experts, table, shares, item.budget.ratio, search, score, tables, item.budget.metric, known, weights)
