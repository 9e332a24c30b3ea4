"""The entry points that run on workers, one per kind of work: ``task(session, item)``. They load, call the science, and save."""

from __future__ import annotations

import functools
import json
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from workers import (
    checkpoint,
    conditioning,
    data,
    evaluate,
    families,
    first_stage,
    latency,
    latents,
    partition,
    rewrites,
    routers,
    similarity,
)
from workers.contracts import (
    DenoiserRef,
    EvaluateTask,
    ExpertCheckpoint,
    ExpertTask,
    ImageTask,
    Interval,
    LatencyTask,
    MixturePlan,
    Progress,
    RouteTask,
    RunFailed,
    SimilarityMatrix,
    SimilarityTask,
    derive_seed,
)
from workers.cost import cost_table
from workers.diffusion import NoiseSchedule, draw_timesteps, generator, make_sampler, sampler_timesteps, steps_per_expert
from workers.elastic import Branch, ElasticDenoiser, extract, importance_order, reorder
from workers.files import replacing
from workers.generate import Surroundings
from workers.latency_table import LatencyTable, table_path
from workers.mixture import MixtureDenoiser, any_width
from workers.regional import RegionCompiler
from workers.samples import Samples, open_samples
from workers.session import Session
from workers.training import fit, sandwich


def build_images(session: Session, item: ImageTask) -> dict[str, Any]:
    """Decode the job's images into the memory-mapped cache at ``item.out``."""
    cache = data.build_cache(item)
    return {"count": cache.count, "skipped": list(cache.skipped)}


def encode_latents(session: Session, item: tuple[latents.EncodeTask, ...]) -> None:
    """Encode some shards of the latent cache with the job's own first stage."""
    started, total = time.time(), item[-1].stop - item[0].start
    unit = f"images {item[0].start}-{item[-1].stop}"

    def on_progress(done: int) -> None:
        seconds = time.time() - started
        session.report(Progress("encode", unit, done, total, images_per_s=done / max(seconds, 1e-9), seconds=seconds))

    on_progress(0)
    latents.encode_shards(item, session.device, on_progress)


def measure_latency(session: Session, item: LatencyTask) -> str:
    """Path of the latency table of this worker's device, measured now unless it is there."""
    config = families.load_config(item.model)
    item.timing.check(session.device)
    table = latency.find_or_measure(
        Path(item.folder),
        config,
        item.elastic,
        device=session.device,
        dtype=item.timing.dtype,
        batch=item.timing.batch,
        compiled=item.timing.compiled,
        rewrites=item.timing.rewrites,
        cuda_graphs=item.timing.cuda_graphs,
        on_progress=session.report,
    )
    return str(table_path(Path(item.folder), table.identity))


def embed_timesteps(session: Session, item: SimilarityTask) -> str:
    """Embed some timesteps of the grid under the named measure; writes float32 [B, len(timesteps), D] to ``item.out``."""
    measure = similarity.measure(item.measure)
    schedule = NoiseSchedule(families.load_scheduler_config(item.model))
    model, minibatches = None, []
    if measure.NEEDS_MODEL:
        model = families.load_denoiser(item.model).to(session.device)
        images, conditioner = open_samples(item.images), conditioning.load(item.model, session.device)
        for start in range(0, len(item.rows), item.batch_size):
            rows = item.rows[start : start + item.batch_size]
            minibatches.append((images.clean(rows, session.device), conditioner(_labels(images, conditioner, rows, session.device))))
    unit, started, done = f"t{item.timesteps[0]:04d}-{item.timesteps[-1]:04d}", time.time(), 0

    def on_timestep() -> None:
        nonlocal done
        done += 1
        session.report(Progress("analyze", unit, done, len(item.timesteps), seconds=time.time() - started))

    session.report(Progress("analyze", unit, 0, len(item.timesteps)))
    problem = similarity.SimilarityProblem(schedule, minibatches, model, item.buckets, item.seed, on_timestep)
    with replacing(Path(item.out)) as path:
        np.save(path, measure.embed(problem, item.timesteps))
    return item.out


def _labels(images: Samples, conditioner: conditioning.Conditioner, rows: Sequence[int], device: str) -> Tensor | None:
    """The classes of some rows, if the denoiser is told any."""
    return None if conditioner.classes.argument is None else images.labels_of(rows).to(device)


def compare_timesteps(session: Session, item: tuple[tuple[SimilarityTask, ...], int, str]) -> SimilarityMatrix:
    """The similarity matrix from all chunks of embeddings; the inner products behind it go to ``out`` (float32 [B, T', B, T'])."""
    items, num_timesteps, out = item
    embeddings = np.concatenate([np.load(part.out) for part in items], axis=1)
    gram = similarity.gram_of(embeddings)
    with replacing(Path(out)) as path:
        np.save(path, gram)
    grid = [t for part in items for t in part.timesteps]
    return similarity.similarity_of(gram, items[0].measure, grid, num_timesteps, len(items[0].rows))


def cut_timesteps(
    matrix: SimilarityMatrix,
    gram: str,
    experts: int | str | Sequence[int],
    *,
    min_timesteps: int,
    penalty: float,
    max_experts: int,
    bootstrap: int,
    seed: int,
    scheduler_config: dict[str, Any],
) -> dict[str, Any]:
    """The partition, its evidence and the naive baselines, as JSON. Takes milliseconds, so the driver calls it itself."""
    cells = len(matrix.timesteps)
    min_length = min(cells, max(1, round(min_timesteps * cells / matrix.num_timesteps)))
    chosen = partition.cut(matrix, experts, min_length=min_length, penalty=penalty, max_experts=max_experts)
    replicates = similarity.bootstrap(np.load(gram), bootstrap, seed)
    log_snr = NoiseSchedule(scheduler_config).log_snr(range(matrix.num_timesteps))
    baselines = {
        "uniform in t": partition.uniform_in_t(matrix.num_timesteps, len(chosen)),
        "uniform in log-SNR": partition.uniform_in_log_snr(log_snr, len(chosen)),
    }
    costs = partition.interval_costs(np.asarray(matrix.values))
    return {
        "partition": chosen.to_json(),
        "boundary_frequency": partition.boundary_frequency(
            replicates, matrix, chosen, 1 if not isinstance(experts, (int, str)) else min_length
        ),
        "cost": partition.partition_cost(chosen, matrix),
        "curve": {str(k): value for k, value in partition.cost_curve(costs, min_length, max_experts).items()},
        "baselines": {name: {"partition": p.to_json(), "cost": partition.partition_cost(p, matrix)} for name, p in baselines.items()},
    }


# --- experts --------------------------------------------------------------------------------------------------------


def train_expert(session: Session, item: ExpertTask) -> ExpertCheckpoint:
    """Train one expert: the elastic copy, or (``item.spec`` set) the extracted sub-network of an elastic checkpoint."""
    config, schedule = families.load_config(item.model), NoiseSchedule(families.load_scheduler_config(item.model))
    family = families.family_of_config(config)
    teacher = families.load_denoiser(item.model)
    names = family.features(teacher)
    if item.spec is not None and item.source is not None:
        elastic = load_elastic(item.source, item.model, item)
        small = extract(elastic.model, elastic.branches, item.spec).requires_grad_(True)
        about = {"spec": item.spec.to_json()}
        return fit(session, ElasticDenoiser(small, ()), teacher, names, schedule, item, lambda step: (None,), about)

    model = families.load_denoiser(item.model)
    branches = family.sites(model, item.elastic)
    with session.resume() as folder:
        saved = checkpoint.read(folder, prefix="no tensor")[1] if folder else None
    orders = saved["orders"] if saved else _importance(session, model, branches, schedule, item)
    if not saved:  # a resumed checkpoint holds weights that are already in order
        orders = session.agree(orders)
        reorder(model, branches, orders)
    elastic = ElasticDenoiser(model, branches)  # in eval mode: distillation wants no dropout
    networks = sandwich(elastic.space, item.random_networks, item.seed)
    return fit(session, elastic, teacher, names, schedule, item, networks, {"orders": orders})


def _importance(
    session: Session, model: nn.Module, branches: Sequence[Branch], schedule: NoiseSchedule, item: ExpertTask
) -> dict[str, list[list[int]]]:
    """Importance of every unit for the denoising loss on the expert's own interval."""
    if item.elastic.importance == "magnitude":
        return importance_order(model, branches, iter(()), "magnitude")
    images, conditioner = open_samples(item.images), conditioning.load(item.model, session.device)
    model.to(session.device)
    size = min(16, item.importance_images)

    def losses() -> Iterator[Tensor]:
        for start in range(0, item.importance_images, size):
            gen = generator(session.device, item.seed, item.interval.start, "importance", start)
            stop = min(start + size, item.importance_images)
            rows = [item.rows[i % len(item.rows)] for i in range(start, stop)]
            clean = images.clean(rows, session.device)
            t = draw_timesteps(item.interval, schedule.num_timesteps, len(clean), 0.0, gen)
            noise = torch.randn(clean.shape, generator=gen, device=clean.device)
            told = conditioner(_labels(images, conditioner, rows, session.device))
            yield nn.functional.mse_loss(model(schedule.noised(clean, noise, t), t, **told).sample, schedule.target(clean, noise, t))

    return importance_order(model, branches, losses, "taylor")


def load_elastic(path: str, model_path: str, item: ExpertTask | RouteTask) -> ElasticDenoiser:
    """The averaged weights of an elastic checkpoint, frozen, on the CPU, in eval mode."""
    config = families.load_config(model_path)
    with torch.device("meta"):
        model = families.build(config)
    model.load_state_dict(checkpoint.read(path, prefix="ema.")[0], assign=True)
    return ElasticDenoiser(model.eval().requires_grad_(False), families.family_of_config(config).sites(model, item.elastic))


# --- routing --------------------------------------------------------------------------------------------------------


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
            told = conditioner(_labels(images, conditioner, rows, item.device))
            return routers.CalibrationBatch(noisy, t, schedule.target(clean, noise, t), teacher(noisy, t, **told).sample, told)

    search = [batch(interval, item.rows[:half], "search") for interval in item.partition.intervals]
    score = [batch(interval, item.rows[half:], "score") for interval in item.partition.intervals]
    return experts, search, score


def _shared(item: RouteTask) -> RouteTask:
    """The part of a trial that all trials share: the key of the per-process cache."""
    return replace(item, agent="", search_seed=0, sensitivity=(), budget=replace(item.budget, ratio=1.0))


def expert_sensitivity(session: Session, item: tuple[RouteTask, int, str]) -> str:
    """Write expert k's sensitivity table (site -> choice -> loss rise) as JSON."""
    task, k, out = item
    unit, started = f"sensitivity {task.experts[k].interval.name}", time.time()
    session.report(Progress("route", unit, 0, 1))
    experts, search, _ = _calibration(_shared(task))
    table = routers.measure_sensitivity(experts[k], search[k])
    session.report(Progress("route", unit, 1, 1, seconds=time.time() - started))
    with replacing(Path(out)) as path:
        path.write_text(json.dumps(table))
    return out


def search_plan(session: Session, item: RouteTask) -> MixturePlan:
    """One trial: one agent searches one budget with one seed. Raises: BudgetUnreachable."""
    unit, started = f"{item.budget.name} {item.agent} seed {item.search_seed}", time.perf_counter()
    session.report(Progress("route", unit, 0, 1))
    experts, search, score = _calibration(_shared(item))
    table = cost_table(families.load_config(item.model), item.elastic)
    if item.latency is not None:
        table = table.with_latency(LatencyTable.load(Path(item.latency)))
    timesteps = sampler_timesteps(item.budget.scheduler, families.load_scheduler_config(item.model), item.budget.steps)
    served = steps_per_expert(item.partition, timesteps)
    shares = tuple(count / len(timesteps) for count in served)
    tables = [
        {s: {int(c): v for c, v in row.items()} for s, row in json.loads(Path(path).read_text()).items()} for path in item.sensitivity
    ]
    problem = routers.RouteProblem(experts, table, shares, item.budget.ratio, search, score, tables, item.budget.metric)
    rng = random.Random(derive_seed(item.seed, item.search_seed, item.agent, item.budget.name))
    specs = routers.agent(item.agent).search(problem, item.settings, rng)
    # an expert that this sampler never calls costs and teaches nothing: it gets the uniform architecture, in case another sampler does
    uniform = routers.agent("uniform").search(problem, item.settings, rng)
    specs = routers.check_plan(problem, tuple(s if share else u for s, u, share in zip(specs, uniform, shares, strict=True)))
    costs = tuple(table.cost(spec) for spec in specs)
    seconds, loss = time.perf_counter() - started, problem.score(specs)
    session.report(Progress("route", unit, 1, 1, loss, seconds=seconds))
    return MixturePlan(item.budget, item.agent, item.search_seed, item.partition, specs, shares, costs, table.dense, loss, seconds)


# --- evaluation and publishing --------------------------------------------------------------------------------------


def load_reference(ref: DenoiserRef, model_path: str) -> nn.Module:
    """The denoiser a reference points to: dense, a mixture of fine-tuned experts, or a mixture cut from the pretrained weights."""
    if ref.plan is None:
        return families.load_denoiser(model_path)
    config = families.load_config(model_path)
    with torch.device("meta"):
        mixture: Any = MixtureDenoiser.of(config, ref.plan.partition.boundaries, ref.plan.experts, ref.unit)
    if not ref.cut_only:
        for expert, saved in zip(mixture.experts, ref.experts, strict=True):
            expert.load_state_dict(checkpoint.read(saved.path, prefix="ema.")[0], assign=True)
        return mixture.eval()
    experts = []
    for spec, saved in zip(ref.plan.experts, ref.experts, strict=True):
        dense = families.load_denoiser(model_path)
        branches = families.family_of_config(config).sites(dense, any_width(ref.unit))
        reorder(dense, branches, checkpoint.read(saved.path, prefix="no tensor")[1]["orders"])
        experts.append(extract(dense, branches, spec))
    mixture.experts = nn.ModuleList(experts)
    return mixture.eval()


def rewritten(model: Any, names: Sequence[str]) -> Any:
    """The denoiser, a mixture or dense, with the exact rewrites that exporting applies: dense is timed with them too, to be fair."""
    return model.rewrite(names) if isinstance(model, MixtureDenoiser) else rewrites.apply(model, names)


@torch.no_grad()
def evaluate_shard(session: Session, item: EvaluateTask) -> str:
    """Samples from fixed noise and held-out denoising losses of one denoiser on one shard, as ``item.out`` (npz)."""
    model = load_reference(item.denoiser, item.model).to(session.device)
    schedule = NoiseSchedule(families.load_scheduler_config(item.model))
    images, around = open_samples(item.images), Surroundings.load(item.model, session.device)
    started, losses = time.time(), []
    session.report(Progress("publish", item.denoiser.label, 0, 1))
    for start in range(0, len(item.rows), item.batch_size):
        rows = item.rows[start : start + item.batch_size]
        seeds = [derive_seed(item.seed, row) for row in rows]
        told = around.conditioner(_labels(images, around.conditioner, rows, session.device))
        losses.append(evaluate.denoising_losses(model, schedule, images.clean(rows, session.device), told, seeds, item.timesteps))
    samples, seconds = around.draw(
        model, item.scheduler, item.steps, item.noise_seeds, images.shape, item.batch_size, guidance_scale=item.guidance_scale, eta=item.eta
    )
    session.report(Progress("publish", item.denoiser.label, 1, 1, seconds=time.time() - started))
    with replacing(Path(item.out)) as path:
        np.savez(path, losses=np.concatenate(losses), samples=samples, seconds=np.array(seconds))
    return item.out


def summarise(session: Session, item: tuple[tuple[EvaluateTask, ...], str]) -> dict[str, dict[str, Any]]:
    """Metrics of every denoiser from its shards; all samples together go to ``out`` (npz, one array per label, float32 [n, C, H, W])."""
    items, out = item
    shards: dict[str, list[Any]] = {}
    for task in items:
        shards.setdefault(task.denoiser.label, []).append(np.load(task.out))
    samples = {label: np.concatenate([shard["samples"] for shard in parts]) for label, parts in shards.items()}
    arrays: dict[str, Any] = dict(samples)
    losses = {label: np.concatenate([shard["losses"] for shard in parts]) for label, parts in shards.items()}
    metrics: dict[str, dict[str, Any]] = {}
    compiler = RegionCompiler()
    for label, task in {task.denoiser.label: task for task in items}.items():
        metrics[label] = {
            "denoising_loss": float(losses[label].mean()),
            "denoising_loss_by_timestep": [float(v) for v in losses[label].mean(0)],
            "timesteps": list(task.timesteps),
            **evaluate.paired_metrics(samples[label], samples["dense"]),
            **evaluate.cost_per_step(
                rewritten(load_reference(task.denoiser, task.model), task.timing.rewrites), task, session.device, compiler=compiler
            ),
        }
    with replacing(Path(out)) as path:
        np.savez(path, **arrays)
    return metrics


def assemble_mixture(session: Session, item: tuple[DenoiserRef, str, str, tuple[str, ...], str]) -> str:
    """Write a published version's files: the mixture (config and weights, float32, rewritten exactly as asked), its sampler, and what
    of the base model stands around it: first stage and class embedder.

    Raises: RunFailed if the weights cannot be written.
    """
    ref, model_path, scheduler, rewrites, out = item
    mixture: Any = load_reference(ref, model_path)
    mixture.rewrite(rewrites)
    try:
        mixture.save_pretrained(out, safe_serialization=True)
        for part in (first_stage.locate(model_path), Path(model_path) / conditioning.EMBEDDER):
            if part is not None and part.is_dir():
                shutil.copytree(part, Path(out) / part.name, dirs_exist_ok=True)
    except SafetensorError as error:  # a full disk, which safetensors does not report as OSError
        raise RunFailed(f"the mixture cannot be written to {out}: {error}: the same command again continues") from error
    make_sampler(scheduler, families.load_scheduler_config(model_path)).save_pretrained(Path(out) / "scheduler")
    return out
