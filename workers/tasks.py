"""The entry points that run on workers, one per kind of work: ``task(session, item)``. They load, call the science, and save."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from workers import (
    checkpoint,
    conditioning,
    data,
    families,
    latency,
    latents,
    partition,
    similarity,
)
from workers.contracts import (
    ExpertCheckpoint,
    ExpertTask,
    ImageTask,
    LatencyTask,
    Progress,
    RouteTask,
    SimilarityMatrix,
    SimilarityTask,
)
from workers.cost import cost_table
from workers.diffusion import NoiseSchedule, draw_timesteps, generator
from workers.elastic import Branch, ElasticDenoiser, extract, importance_order, reorder
from workers.files import replacing
from workers.latency_table import table_path
from workers.samples import Samples, open_samples
from workers.session import Session
from workers.trainer import teachable
from workers.training import WHOLE, fit, sandwich


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
    table = latency.find_or_measure(Path(item.folder), config, item.elastic, session.device, item.timing, on_progress=session.report)
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
            minibatches.append((images.clean(rows, session.device), conditioner(labels_of(images, conditioner, rows, session.device))))
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


def labels_of(images: Samples, conditioner: conditioning.Conditioner, rows: Sequence[int], device: str) -> Tensor | None:
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
    method: str,
    min_timesteps: int,
    penalty: float,
    max_experts: int,
    bootstrap: int,
    seed: int,
    scheduler_config: dict[str, Any],
) -> dict[str, Any]:
    """The partition, its evidence and the naive baselines, as JSON; ``method``: learned, or the name of a baseline. ``rule`` in it: that
    method, or given.

    Takes milliseconds, so the driver calls it itself.
    """
    cells = len(matrix.timesteps)
    min_length = min(cells, max(1, round(min_timesteps * cells / matrix.num_timesteps)))
    chosen = partition.cut(matrix, experts, min_length=min_length, penalty=penalty, max_experts=max_experts)
    replicates = similarity.bootstrap(np.load(gram), bootstrap, seed, matrix.measure)
    log_snr = NoiseSchedule(scheduler_config).log_snr(range(matrix.num_timesteps))
    baselines = partition.baselines(log_snr, len(chosen), min_timesteps)
    chosen = baselines.get(method, chosen)
    costs = partition.interval_costs(np.asarray(matrix.values))
    return {
        "partition": chosen.to_json(),
        "rule": method if isinstance(experts, (int, str)) else "given",
        "boundary_frequency": partition.boundary_frequency(
            replicates, matrix, chosen, 1 if not isinstance(experts, (int, str)) else min_length
        ),
        "min_length": min_length,
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
        names = teachable(names, item.spec)
        about = {"spec": item.spec.to_json()}
        return fit(session, ElasticDenoiser(small, ()), teacher, names, schedule, item, WHOLE, about)

    model = families.load_denoiser(item.model)
    branches = family.sites(model, item.elastic)
    with session.resume() as folder:
        saved = checkpoint.read(folder, prefix="no tensor")[1] if folder else None
    orders = saved["orders"] if saved else _importance(session, model, branches, schedule, item)
    if not saved:  # a resumed checkpoint holds weights that are already in order
        orders = session.agree(orders)
        reorder(model, branches, orders)
    elastic = ElasticDenoiser(model, branches)  # in eval mode: distillation wants no dropout
    networks = sandwich(cost_table(config, item.elastic), item.network_costs, item.random_networks, item.seed, item.network_pool)
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
            told = conditioner(labels_of(images, conditioner, rows, session.device))
            yield nn.functional.mse_loss(model(schedule.noised(clean, noise, t), t, **told).sample, schedule.target(clean, noise, t))

    return importance_order(model, branches, losses, "taylor")


def load_elastic(path: str, model_path: str, item: ExpertTask | RouteTask) -> ElasticDenoiser:
    """The averaged weights of an elastic checkpoint, frozen, on the CPU, in eval mode."""
    config = families.load_config(model_path)
    with torch.device("meta"):
        model = families.build(config)
    model.load_state_dict(checkpoint.read(path, prefix="ema.")[0], assign=True)
    return ElasticDenoiser(model.eval().requires_grad_(False), families.family_of_config(config).sites(model, item.elastic))
