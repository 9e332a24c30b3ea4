"""What a job would do, before it does anything: check model, data and settings; say what each stage needs. Writes nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator import capacity, evaluation
from orchestrator.config import JobConfig
from orchestrator.pipeline import Pipeline
from orchestrator.registry import Registry
from orchestrator.stages import STAGES, too_few_steps
from orchestrator.store import RunStore
from orchestrator.workload import experts_of, passes, workload
from workers import conditioning, data, diffusion, families, first_stage, partition, random_init, similarity
from workers.contracts import InputError, Partition, digest_of
from workers.cost import CostTable, activation_bytes, cost_table, require_reachable

TFLOPS = {"cpu": 0.07, "cuda": 60.0}
"""Sustained training speed that estimates assume: per CPU core, and per GPU. Orders of magnitude, not promises."""
BYTES_OF_MOMENTS = {"muon": 4, "adamw": 8}
"""Per parameter, in float32: AdamW remembers two, Muon one. (What Muon leaves to AdamW is little.)"""
BYTES_OF_OPTIMIZER = 8
"""Per parameter, while it works: Muon keeps beside its moment how far the parameter goes."""
BYTES_KEPT_PER_PARAMETER = 8
"""A checkpoint holds weights, average and moments in float32; two are kept."""
BYTES_TRAINED_PER_PARAMETER = {"no": 16, "bf16": 18}
"""A trainer holds, in float32, its expert's weights with gradient, average and moments, and the dense weights; in bf16 those are of two
bytes, as is the copy of the expert that computes, with its gradient."""


@dataclass(frozen=True)
class Prepared:
    """A checked job: paths resolved, contents identified, costs counted."""

    job: JobConfig
    store: RunStore
    pipeline: Pipeline
    table: CostTable
    images: int
    disk_bytes: int
    """That checkpoints and latents take in all."""
    free_bytes: int
    """What the storage has left."""
    to_make: Path | None = None
    """Where random weights belong that are not there yet."""


def prepare(job: JobConfig) -> Prepared:
    """Check everything that can be checked without computing. Raises: InputError; BudgetUnreachable at once for an impossible budget."""
    store = RunStore.of(job.place)
    model = source = families.locate(job.model.path)
    to_make = None
    if job.model.random_init:
        made = random_init.folder_of(model, store.folder.parent, job.seed)
        to_make, model = (None, made) if made.is_dir() else (made, model)
    job.timing().check(job.resources.device)
    config, family = families.load_config(model), families.family_name(model)
    if job.model.family not in ("auto", family):
        raise InputError(f"model.family is {job.model.family}, but {job.model.path} holds a model of family {family}")
    scheduler = families.load_scheduler_config(model)
    schedule = diffusion.NoiseSchedule(scheduler)
    if to_make is None:
        families.check_files(model)
    _check_partition(job, schedule.num_timesteps)
    diffusion.sampler_timesteps(job.sampler.scheduler, scheduler, job.sampler.steps)
    _check_evaluate(job, schedule.num_timesteps)
    images_at = data.resolve(job.data.path)
    channels, size = _image_shape(model, config, weights=to_make is None)
    images = data.check(str(images_at), channels, size, job.data.resize)
    job = evaluation.absolute(job)
    compared = evaluation.check(job, scheduler, channels, size)
    _check_images(job, images)
    _check_classes(job, model, images_at)
    table = cost_table(config, job.elastic_settings())
    for i, budget in enumerate(job.budgets):
        if budget.metric == "macs":  # time has to be measured first
            require_reachable(table, budget.ratio, f"budgets.{i}.ratio")
    latent_bytes = 2 * images * 4 * config["in_channels"] * config["sample_size"] ** 2 if first_stage.locate(model) else 0
    disk_bytes = _disk_bytes(job, table, latent_bytes)
    free_bytes = shutil.disk_usage(_nearest_folder(store.folder, _disk_key(store))).free
    registry = Registry(job.registry.path)
    if registry.is_local:
        _nearest_folder(registry.root, "registry.path")
    job = job.model_copy(
        update={
            "model": job.model.model_copy(update={"path": str(model)}),
            "data": job.data.model_copy(update={"path": str(images_at.resolve())}),
            "registry": job.registry.model_copy(update={"path": _absolute(job.registry.path)}),
        }
    )
    stage = first_stage.locate(model)
    identity = {
        "model": families.model_digest(model),
        "model.source": str(source),
        "first_stage": "" if stage is None or to_make is not None else first_stage.digest(stage),
        "data.path": data.identity(str(images_at)),
        **compared,
        # under what time is measured decides plans only where time is the budget
        "timing": digest_of(job.timing().to_json()) if any(budget.metric == "latency" for budget in job.budgets) else "",
    }
    store.check_owner(owner(job, identity))
    pipeline = Pipeline(STAGES, job.model_dump(mode="json"), identity, store)
    return Prepared(job, store, pipeline, table, images, disk_bytes, free_bytes, to_make)


def make_ready(job: JobConfig) -> Prepared:
    """``prepare``, see that the storage is large enough, and write the random weights of a job that asks for them.

    Raises: as ``prepare``, and InputError if the disk cannot hold what the job will still write; before anything is written.
    """
    prepared = prepare(job)
    _check_space(prepared)
    if prepared.to_make is None:
        return prepared
    if prepared.store.mirror is not None and os.environ.get("RAY_ADDRESS"):
        raise InputError("model.random_init: with storage.path on an object store, a cluster's other nodes would not see the random model")
    random_init.make(families.locate(job.model.path), prepared.to_make, job.seed)
    return prepare(job)


def _image_shape(model: Path, config: Mapping[str, Any], weights: bool) -> tuple[int, int]:
    """(channels, size) of the images that the pipeline is trained on: the denoiser's, or what its first stage encodes.

    Raises: InputError if the pipeline is a latent one and its first stage is missing or of another model.
    """
    stage = first_stage.locate(model)
    if stage is None:
        index = model / "model_index.json"
        if index.is_file() and "LDM" in str(families.read_json(index).get("_class_name")):
            raise InputError(f"model.path: {model} is a latent diffusion pipeline without its first stage: add its vqvae folder")
        return config["in_channels"], config["sample_size"]
    info = first_stage.check(stage, config["sample_size"], config["in_channels"]) if weights else first_stage.describe(stage)
    return info.in_channels, config["sample_size"] * info.downscale


def _check_classes(job: JobConfig, model: Path, images: Path) -> None:
    """Raises: InputError if a class-conditional model's images have no labels or one too many, or guidance has no null class."""
    classes = conditioning.describe(model)
    if job.sampler.guidance_scale != 1 and classes.null is None:
        raise InputError(f"sampler.guidance_scale is {job.sampler.guidance_scale:g}, but the model has no null class: set it to 1")
    if classes.argument is not None:
        classes.check(data.labels(str(images)), f"data.path: {images}")


def owner(job: JobConfig, identity: Mapping[str, str]) -> dict[str, Any]:
    """Whose run folder it is: a model and its images, known by where they lie or by what they are."""
    return {
        "name": job.name,
        "model.path": [identity["model.source"], identity["model"]],
        "data.path": [job.data.path, identity["data.path"]],
    }


def _absolute(uri: str) -> str:
    return uri if "://" in uri else str(Path(uri).expanduser().resolve())


def _check_partition(job: JobConfig, num_timesteps: int) -> None:
    points, experts = job.similarity.timesteps, job.partition.experts
    partition.grid(num_timesteps, points)
    if isinstance(experts, list):
        partition.explicit(experts, num_timesteps)
        return
    cells = min(points, max(1, round(job.partition.min_timesteps * points / num_timesteps)))
    if (2 if experts == "auto" else experts) * cells > points:
        raise InputError(
            f"partition.experts is {experts}, but a grid of {points} timesteps (similarity.timesteps) has room for {points // cells} "
            f"intervals of at least {job.partition.min_timesteps} timesteps (partition.min_timesteps)"
        )


def _check_evaluate(job: JobConfig, num_timesteps: int) -> None:
    settings = job.evaluate
    if settings.timesteps > num_timesteps:
        raise InputError(f"evaluate.timesteps is {settings.timesteps}, but the model has {num_timesteps} training timesteps: lower it")
    most = min(settings.images, settings.samples, job.data.holdout)
    if settings.shards > most:
        raise InputError(
            f"evaluate.shards is {settings.shards}, but there are only {most} images or samples to share out "
            "(evaluate.images, evaluate.samples, data.holdout): lower it"
        )


def _check_images(job: JobConfig, images: int) -> None:
    train, batch, workers = images - job.data.holdout, job.similarity.batch_size, job.resources.workers_per_expert
    if train < 4:  # two to search plans on, two to score them
        raise InputError(
            f"data.holdout is {job.data.holdout}, but there are only {images} images in {job.data.path}: training needs at least 4 more"
        )
    if similarity.measure(job.similarity.measure).NEEDS_MODEL and min(train, job.similarity.images) <= batch:
        raise InputError(
            f"similarity.images is {min(train, job.similarity.images)} and similarity.batch_size {batch}: "
            "the reliability of a similarity needs two minibatches or more"
        )
    for stage, settings in (("specialize", job.specialize), ("finetune", job.finetune)):
        if settings.batch_size % workers:
            raise InputError(f"{stage}.batch_size is {settings.batch_size}: make it a multiple of resources.workers_per_expert, {workers}")
    if workers > 1 and job.resources.device != "cpu" and job.resources.gpus_per_worker % 1:
        raise InputError(
            f"resources.gpus_per_worker is {job.resources.gpus_per_worker:g}: "
            f"an expert with {workers} workers needs whole GPUs, since no two of them can share one"
        )


def _disk_bytes(job: JobConfig, table: CostTable, cache_bytes: int) -> int:
    """The most that the checkpoints that the job keeps at one time, and its latents, take."""
    small = sum(budget.ratio for budget in job.budgets) * (1 + len(job.finetune.compare))
    elastic, tuned = (BYTES_KEPT_PER_PARAMETER + BYTES_OF_MOMENTS[of.optimizer] for of in (job.specialize, job.finetune))
    return round(2 * (elastic + tuned * small) * table.dense.params * experts_of(job) + cache_bytes)


def _trainer_bytes(job: JobConfig, table: CostTable) -> int:
    """Memory that training one elastic expert takes on one worker, about: the training state, and what forward passes keep.

    CUDA graphs share the memory of their activations and never give it back; a network that no graph holds needs its own beside it, as
    every one does before it is captured.
    """
    settings = job.specialize
    kept = activation_bytes(families.load_config(job.model.path)) * settings.batch_size / job.resources.workers_per_expert
    kept *= 0.5 if settings.mixed_precision == "bf16" else 1
    kept *= 2 if settings.cuda_graphs and job.resources.device != "cpu" else 1
    state = BYTES_TRAINED_PER_PARAMETER[settings.mixed_precision] + BYTES_OF_OPTIMIZER
    return round(state * table.dense.params + kept)


def _check_space(prepared: Prepared) -> None:
    folder = prepared.store.folder
    written = (*folder.glob("train/**/*"), *folder.glob("cache/latents-*/*"))
    needed = prepared.disk_bytes - sum(path.stat().st_size for path in written if path.is_file())  # what a resumed job has written
    if prepared.free_bytes < needed:
        key = _disk_key(prepared.store)
        there = _nearest_folder(folder, key)
        raise InputError(
            f"{key}: {there} has {prepared.free_bytes / 1e9:.1f} GB free, the job's checkpoints and latents may need "
            f"{needed / 1e9:.1f} GB: free some or choose another path"
        )


def _disk_key(store: RunStore) -> str:
    """Which key says what disk is used."""
    return "storage.path" if store.mirror is None else "storage.scratch"


def _nearest_folder(path: Path, key: str) -> Path:
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    if not there.is_dir():
        raise InputError(f"{key}: {there} is a file, not a folder")
    return there


def describe(prepared: Prepared) -> dict[str, Any]:
    """The plan as JSON: six stages with state, workers and estimated compute; model, data and budgets."""
    job, table = prepared.job, prepared.table
    states, per_image = prepared.pipeline.states(), 2 * table.dense.macs / 1e12  # TFLOP of one dense forward pass
    works = workload(job, table, prepared.images)
    experts, copies = experts_of(job), 1 + len(job.finetune.compare)
    units = {
        "analyze": "1 task per worker" if passes(works["analyze"]) else "1 task",
        "partition": "no worker",
        "specialize": f"{experts} trainers",
        "route": f"{sum(len(work.units) for work in works['route'] if work.task.startswith('search'))} searches",
        "finetune": f"{copies * experts * len(job.budgets)} trainers",
        "publish": f"{sum(len(work.units) for work in works['publish'])} rows",
    }
    unsure = {"specialize", "finetune"} if job.partition.experts == "auto" else set()
    unsure |= {"finetune"} if copies * len(job.budgets) > 1 else set()  # equal ones are trained once
    need = job.resources
    stages = []
    for name, state in states.items():
        record = prepared.store.done(name, prepared.pipeline.fingerprints[name])
        tflop = passes(works[name]) * per_image
        stages.append(
            {
                "stage": name,
                "state": state,
                "work": "up to " * (name in unsure) + units[name],
                "cpus_per_worker": 0 if name == "partition" else need.cpus_per_worker,
                "gpus_per_worker": 0 if name == "partition" or need.device == "cpu" else need.gpus_per_worker,
                "gpu_hours": round(tflop / TFLOPS["cuda"] / 3600, 4),
                "cpu_core_hours": round(tflop / TFLOPS["cpu"] / 3600, 3),
                "seconds_taken": None if record is None else round(record["seconds"], 1),
            }
        )
    return {
        "job": job.name,
        "run_folder": prepared.store.where(),
        "registry": job.registry.path,
        "model": {
            "path": job.model.path,
            "macs": table.dense.macs,
            "macs_without_attention": table.dense.macs_without_attention,
            "params": table.dense.params,
            "smallest_ratio": round(table.smallest_ratio(), 4),
        },
        "data": {"path": job.data.path, "images": prepared.images},
        "budgets": [budget.model_dump() for budget in job.budgets],
        "device": need.device,
        "disk_bytes": prepared.disk_bytes,
        "free_bytes": prepared.free_bytes,
        "trainer_bytes": _trainer_bytes(job, table),
        "stages": stages,
        "warnings": [*_few_steps(prepared), *capacity.warning_here(job)],
    }


def _few_steps(prepared: Prepared) -> list[str]:
    """Which experts serve too few of the sampler's steps, where it is known beforehand how the timesteps are cut."""
    job, asked = prepared.job, prepared.job.partition
    record = prepared.store.done("partition", prepared.pipeline.fingerprints["partition"])
    schedule = diffusion.NoiseSchedule(families.load_scheduler_config(job.model.path))
    log_snr = schedule.log_snr(range(schedule.num_timesteps))
    if record is not None:
        cuts = Partition.from_json(record["result"]["partition"])
    elif isinstance(asked.experts, list):
        cuts = partition.explicit(asked.experts, len(log_snr))
    elif isinstance(asked.experts, int) and asked.method != "learned":
        cuts = partition.baselines(log_snr, asked.experts, asked.min_timesteps)[asked.method]
    else:
        return []
    return too_few_steps(job, cuts)
