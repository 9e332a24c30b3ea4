"""How good is everything that a run made? One table, a row per denoiser and sampler, each measured once under one protocol.

    <run folder>/evaluation/<label>-<key>.json     what was measured; the key stands for all that it depends on, so that equal
                                                   mixtures are measured once, whoever asks for them, under the first one's label
                            <label>-<key>.npz      its samples, for the report
A killed evaluation goes on with the rows, and within them the shards, that are missing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.config import LEAST_SCALE, MOST_SCALE, JobConfig
from orchestrator.experts import identity
from orchestrator.pipeline import Context
from orchestrator.results import commit
from orchestrator.store import read_object
from workers import data, diffusion, evaluate, extractors, families, first_stage, frechet, partition, tasks_evaluate
from workers.contracts import (
    DenoiserRef,
    EvaluateTask,
    ExpertCheckpoint,
    ExtractorRef,
    ImageTask,
    InputError,
    Partition,
    Protocol,
    SamplerRef,
    derive_seed,
    digest_of,
)
from workers.protocol import common_protocol
from workers.rows import ReferenceTask, RowTask

DENSE, FOLDER = "dense", "evaluation"
FURTHER_ROW = re.compile(r"([a-z-]+):([1-9][0-9]*)(?::([0-9]*\.?[0-9]+))?")


@dataclass(frozen=True)
class Row:
    """One denoiser under one sampler. ``made_from`` stands for all that the denoiser itself depends on."""

    ref: DenoiserRef
    sampler: SamplerRef
    partition: Partition
    made_from: Sequence[Any]
    told: Mapping[str, Any] = field(default_factory=dict)
    """What the table says of it beside what is measured: ``agent`` (who found its plan), ``trained_images`` and ``trainer_seconds``."""
    known_from: str | None = None
    """Label of the row before it of the same denoiser, this one being under a further sampler."""


def job_sampler(job: JobConfig) -> SamplerRef:
    return SamplerRef(job.sampler.scheduler, job.sampler.steps, job.sampler.eta, job.sampler.epsilon_scale)


def further_samplers(job: JobConfig, key: str) -> list[SamplerRef]:
    """Those of ``key``, dense or mixtures. Raises: InputError for one that is none, or is named twice."""
    found: dict[str, SamplerRef] = {}
    for text in getattr(job.evaluate, key):
        told = FURTHER_ROW.fullmatch(text)
        if told is None or told[1] not in diffusion.SAMPLERS:
            known = ", ".join(diffusion.SAMPLERS)
            raise InputError(
                f"evaluate.{key}: {text!r} is not SCHEDULER:STEPS or SCHEDULER:STEPS:EPSILON_SCALE, e.g. ddim:25 or ddim:25:1.002; "
                f"schedulers are {known}"
            )
        eta = job.sampler.eta if told[1].startswith("ddim") else 0.0
        sampler = SamplerRef(told[1], int(told[2]), eta, float(told[3] or 1))
        if not LEAST_SCALE <= sampler.epsilon_scale <= MOST_SCALE:
            raise InputError(f"evaluate.{key}: {text!r} scales noise by {told[3]}: it must be from {LEAST_SCALE} to {MOST_SCALE}")
        if sampler.name in found:
            raise InputError(f"evaluate.{key} names {sampler.name} twice")
        found[sampler.name] = sampler
    return list(found.values())


def rows_of(ctx: Context, denoisers: Mapping[str, DenoiserRef], cuts: Partition) -> dict[str, Row]:
    """Every row by its label: dense, dense under other samplers, and the rest, what is published under other samplers too."""
    job, sampler = ctx.job, job_sampler(ctx.job)
    dense_from = [ctx.identity[key] for key in ("model", "first_stage", "data.path")]
    dense_from += [job.seed, job.data.model_dump(mode="json", include={"holdout", "resize", "on_error", "latent_dtype", "encode_math"})]
    rows = {DENSE: Row(denoisers[DENSE], sampler, cuts, dense_from)}
    for other in further_samplers(job, "dense"):
        if other.name != sampler.name:
            label = f"{DENSE} {other.name}"
            rows[label] = Row(DenoiserRef(label), other, cuts, dense_from, known_from=DENSE)
    chosen = {job.budget(i).name for i in range(len(job.budgets))}
    for label, ref in denoisers.items():
        if label != DENSE:
            drawn = sampler if ref.folder is None else replace(sampler, epsilon_scale=ref.epsilon_scale)
            rows[label] = row = Row(ref, drawn, ref.plan.partition if ref.plan else cuts, _made_from(ctx, ref), _told(ctx, ref))
            for other in further_samplers(job, "mixtures") if label in chosen or ref.folder is not None else ():
                if other.name != drawn.name:
                    further = f"{label} {other.name}"
                    rows[further] = replace(row, ref=replace(ref, label=further), sampler=other, known_from=label)
    return rows


def _told(ctx: Context, ref: DenoiserRef) -> dict[str, Any]:
    """Training counts all experts of the mixture, elastic (which mixtures share) and fine-tuned, whichever job trained them."""
    assert ref.plan is not None, ref.label
    if ref.folder is not None:
        return {"agent": ref.plan.agent}
    elastic = [ExpertCheckpoint.from_json(expert) for expert in ctx.results["specialize"]["experts"]]
    stages = [(elastic, ctx.job.specialize), (ref.experts, ctx.job.finetune)] if not ref.cut_only else []
    return {
        "agent": ref.plan.agent,
        "trained_images": sum(expert.step * settings.batch_size for experts, settings in stages for expert in experts),
        "trainer_seconds": sum(expert.seconds for experts, _ in stages for expert in experts),
    }


def _made_from(ctx: Context, ref: DenoiserRef) -> list[Any]:
    """Stands for a mixture's weights: those published, or its sub-networks and the runs that made them, whatever else the job asks for."""
    if ref.folder is not None:
        return [(Path(ref.folder) / "SHA256SUMS").read_text()]
    assert ref.plan is not None
    specs = [spec.to_json() for spec in ref.plan.experts]
    return [ctx.fingerprints["specialize"], ref.cut_only, ref.unit, specs, [identity(expert) for expert in ref.experts]]


def files_of(ctx: Context, rows: Mapping[str, Row], stage: str = "publish") -> dict[str, Path]:
    """Where each row is, or will be once it is measured."""
    return _files(ctx, rows, _protocol(ctx, stage)[0])


def _files(ctx: Context, rows: Mapping[str, Row], protocol: Protocol) -> dict[str, Path]:
    """Rows of one key share a file, which has the label of the first that asked for it."""
    files: dict[str, Path] = {}
    by_key: dict[str, Path] = {}
    for label, row in rows.items():
        key = _key(ctx, row, protocol)
        named = ctx.store.folder / FOLDER / f"{label.replace(' ', '-').replace(':', '-')}-{key}.json"
        files[label] = by_key.setdefault(key, min(named.parent.glob(f"*-{key}.json"), default=named))
    return files


def _owners(files: Mapping[str, Path]) -> dict[Path, str]:
    """The first label of every file."""
    found: dict[Path, str] = {}
    for label, file in files.items():
        found.setdefault(file, label)
    return found


def measure(ctx: Context, rows: Mapping[str, Row], images: str, held_out: Sequence[int], stage: str = "publish") -> dict[str, Path]:
    """Measure what is missing; the file of every row. ``rows`` begin with dense. ``held_out``: rows of the cache of images or latents."""
    before = {str(path) for path in ctx.store.folder.glob("cache/reference-*.npz")}
    protocol, reference, kid_reference = _protocol(ctx, stage)
    ctx.reused |= bool(before & {reference, kid_reference})
    files = _files(ctx, rows, protocol)
    owners = _owners(files)
    missing = [label for label, file in files.items() if owners[file] == label and read_object(file) is None]
    ctx.reused |= len(missing) < len(owners)
    if not missing:
        return files
    (ctx.store.folder / FOLDER).mkdir(exist_ok=True)
    if reference is not None and protocol.images <= len(frechet.read_statistics(reference).mean):
        ctx.say("  warning: evaluate.frechet_samples is no more than the features: such a distance is far too large; raise it")
    shards = {label: _shards(ctx, rows[label], files[label], images, held_out, stage) for label in missing}
    code, at_once = commit(Path(__file__).parents[1]), min(ctx.cluster.slots(), sum(map(len, shards.values())))
    undrawn = [shard for label in missing for shard in shards[label] if not Path(shard.out).exists()]
    work = tuple(
        RowTask(
            shards=shards[label],
            protocol=protocol,
            out=str(files[label]),
            dense=None if label == DENSE else str(files[DENSE]),
            known_from=None if (base := rows[label].known_from) is None else str(files[base]),
            reference=reference,
            kid_reference=kid_reference,
            lpips=ctx.job.evaluate.lpips,
            commit=code,
            drawn_at_once=at_once,
        )
        for label in missing
    )
    ctx.reused |= len(undrawn) < sum(map(len, shards.values()))
    ctx.cluster.scatter(tasks_evaluate.evaluate_shard, undrawn)
    ctx.cluster.scatter(tasks_evaluate.summarise, [work])  # one task: times are taken while nothing else runs
    return files


def _shards(ctx: Context, row: Row, file: Path, images: str, held_out: Sequence[int], stage: str) -> tuple[EvaluateTask, ...]:
    """A row's work, shared out in whole batches: any number of shards computes the same. Every image has the same noise for every row."""
    job, settings, count = ctx.job, ctx.job.evaluate, ctx.job.evaluate.shards
    losses = _whole_batches(held_out[: settings.images] if row.known_from is None else [], settings.batch_size, count)
    paired = _whole_batches(_seeds(job, "sample", settings.samples), settings.batch_size, count)
    far = _whole_batches(_seeds(job, "frechet", settings.frechet_samples), settings.batch_size, count)
    return tuple(
        EvaluateTask(
            denoiser=row.ref,
            model=job.model.path,
            images=images,
            rows=tuple(int(i) for i in losses[s]),
            noise_seeds=tuple(paired[s]),
            partition=row.partition,
            sampler=row.sampler,
            batch_size=settings.batch_size,
            timesteps=partition.grid(families.load_scheduler_config(job.model.path)["num_train_timesteps"], settings.timesteps),
            seed=job.seed,
            device=ctx.cluster.need.device,
            out=str(file.with_suffix(f".{s}of{count}x{settings.batch_size}.npz")),  # a batch size decides which shard draws what
            timing=job.timing(),
            guidance_scale=job.sampler.guidance_scale,
            dtype=settings.dtype,
            compiled=settings.compile,
            frechet_seeds=tuple(far[s]),
            extractor=extractor_of(job),
            stage=stage,
        )
        for s in range(count)
    )


def read_table(files: Mapping[str, Path], rows: Mapping[str, Row]) -> dict[str, dict[str, Any]]:
    """The metrics of every row, and what is ``told`` of it; ``relative_time`` is that of all steps, dense's under the job's sampler, timed
    beside it, being 1. ``same_as``: the row before it that is the same mixture, measured once for both.

    Raises: InputError if they were not measured under one protocol.
    """
    metrics = {label: {**(read_object(file) or {}), **rows[label].told} for label, file in files.items()}
    common_protocol(metrics)
    dense = metrics[DENSE]
    owners = _owners(files)
    for label, row in metrics.items():
        row["relative_time"] = row["calls"] * row["ms_per_step"] / (dense["calls"] * row["dense_ms_per_step"])
        if (owner := owners[files[label]]) != label:
            row["same_as"] = owner
    return metrics


def samples_of(file: Path) -> np.ndarray:
    """The samples of a row, float32 [n, C, H, W] in [-1, 1]."""
    with np.load(file.with_suffix(".npz")) as arrays:
        return arrays["samples"]


# --- the protocol ---------------------------------------------------------------------------------------------------


def extractor_of(job: JobConfig) -> ExtractorRef | None:
    """None if the job measures no distance."""
    settings = job.evaluate
    if not settings.frechet_samples:
        return None
    if settings.extractor is None:
        raise InputError(
            f"evaluate.frechet_samples is {settings.frechet_samples}, but nothing says whose features to compare: set evaluate.extractor "
            f"({', '.join(extractors.names())} or package.module:function)"
        )
    return ExtractorRef(settings.extractor, settings.extractor_weights)


def check(job: JobConfig, scheduler: dict[str, Any], channels: int, size: int) -> dict[str, str]:
    """See that everything of the job's evaluate section can be used. What stands for files in fingerprints, by key.

    Raises: InputError, before anything is computed.
    """
    settings, predicts = job.evaluate, diffusion.NoiseSchedule(scheduler).prediction_type
    for sampler in (job_sampler(job), *further_samplers(job, "dense"), *further_samplers(job, "mixtures")):
        diffusion.sampler_timesteps(sampler.scheduler, scheduler, sampler.steps)
        if sampler.epsilon_scale != 1 and predicts != "epsilon":
            raise InputError(
                f"sampler.epsilon_scale, or that of a row of evaluate.dense or evaluate.mixtures, is {sampler.epsilon_scale:g}, "
                f"but the model predicts {predicts}, not noise: set it to 1"
            )
    found = {"evaluate.lpips": "" if settings.lpips is None else evaluate.lpips_digest(settings.lpips)}
    ref = extractor_of(job)
    if ref is None:
        return found
    if settings.frechet_samples < 2:
        raise InputError("evaluate.frechet_samples is 1: a covariance needs two or more")
    extractor = extractors.load(ref)
    features = extractor.features(channels, size)

    def identify(source: str, key: str) -> tuple[str, str]:
        """What stands for it in Frechet and in kernel distances."""
        if not frechet.is_statistics(source):
            try:
                data.check(source, channels, size, job.data.resize)
                digest = digest_of([data.identity(source), channels, size, job.data.resize, job.data.on_error])
            except InputError as error:
                raise InputError(str(error).replace("data.path:", f"{key}:")) from None
            return digest, digest
        statistics = frechet.read_statistics(source, key)
        if len(statistics.mean) != features:
            raise InputError(
                f"{key}: {source} is of {len(statistics.mean)} features, but evaluate.extractor {ref.name} has {features}: "
                "give the statistics of this extractor, or images"
            )
        return statistics.digest, statistics.features_digest

    reference, kid = identify(_reference(job), "evaluate.reference")
    if settings.kid_reference is not None:
        _, kid = identify(settings.kid_reference, "evaluate.kid_reference")
        if not kid:
            raise InputError(
                f"evaluate.kid_reference: {settings.kid_reference} holds no features, of which a kernel distance is made: "
                "give images, or statistics with features"
            )
    return {**found, "evaluate.extractor_weights": extractor.digest, "evaluate.reference": reference, "evaluate.kid_reference": kid}


def absolute(job: JobConfig) -> JobConfig:
    """The job with the paths of its evaluate section made absolute, since workers may run elsewhere. Raises: InputError."""
    settings, found = job.evaluate, {}
    for key in ("extractor_weights", "reference", "kid_reference", "lpips"):
        value = getattr(settings, key)
        if value is None or (key == "lpips" and not Path(value).expanduser().is_file()):
            continue
        try:
            images = key.endswith("reference") and not frechet.is_statistics(value)
            found[key] = str((data.resolve(value) if images else Path(value).expanduser()).resolve())
        except InputError as error:
            raise InputError(str(error).replace("data.path:", f"evaluate.{key}:")) from None
    return job.model_copy(update={"evaluate": settings.model_copy(update=found)})


def _reference(job: JobConfig) -> str:
    return job.evaluate.reference or job.data.path


def _image_shape(model: str) -> tuple[int, int, int]:
    """(C, H, W) of the images that the pipeline makes."""
    config, where = families.load_config(model), first_stage.locate(model)
    if where is None:
        return config["in_channels"], config["sample_size"], config["sample_size"]
    info = first_stage.describe(where)
    return info.in_channels, config["sample_size"] * info.downscale, config["sample_size"] * info.downscale


def _protocol(ctx: Context, stage: str) -> tuple[Protocol, str | None, str | None]:
    """What all rows have in common, and the statistics that the two distances are measured from, made now unless they are there."""
    job, ref = ctx.job, extractor_of(ctx.job)
    protocol = Protocol(_image_shape(job.model.path), job.seed, job.sampler.guidance_scale, job.evaluate.dtype)
    protocol = replace(protocol, lpips_digest=ctx.identity["evaluate.lpips"])
    if ref is None:
        return protocol, None, None
    extractor, digest, kid_digest = extractors.load(ref), ctx.identity["evaluate.reference"], ctx.identity["evaluate.kid_reference"]

    def statistics(source: str, digest: str) -> str:
        """``source`` itself, or the statistics of the images that it names."""
        if frechet.is_statistics(source):
            return source
        key = digest_of([digest, extractor.digest, extractor.input_size, extractor.resize])
        out = ctx.store.folder / "cache" / f"reference-{key[:16]}.npz"
        if not out.exists():
            channels, size, _ = protocol.image_shape
            images = ImageTask(source, channels, size, job.data.resize, job.data.on_error, str(out))
            ctx.cluster.scatter(tasks_evaluate.reference_statistics, [ReferenceTask(images, ref, job.evaluate.batch_size, stage)])
        return str(out)

    reference = statistics(_reference(job), digest)
    kid_reference = statistics(job.evaluate.kid_reference or _reference(job), kid_digest) if kid_digest else None
    features = None if kid_reference is None else frechet.read_statistics(kid_reference).features
    protocol = replace(
        protocol,
        extractor=ref.name,
        extractor_digest=extractor.digest,
        input_size=extractor.input_size,
        resize=extractor.resize,
        images=job.evaluate.frechet_samples,
        reference_digest=digest,
        reference_images=frechet.read_statistics(reference).n,
        kid_digest=kid_digest,
        kid_images=0 if features is None else len(features),
    )
    return protocol, reference, kid_reference


def _key(ctx: Context, row: Row, protocol: Protocol) -> str:
    """Stands for all that a row's numbers depend on, the paths of files aside."""
    settings = ctx.job.evaluate
    values = [settings.images, settings.samples, settings.timesteps, settings.compile, None, ctx.cluster.need.device]  # as older keys are
    if row.sampler != job_sampler(ctx.job):  # paired errors are those against dense under the job's
        values.append(job_sampler(ctx.job).to_json())
    return digest_of([list(row.made_from), row.sampler.to_json(), protocol.to_json(), ctx.job.timing().to_json(), values])[:10]


def _seeds(job: JobConfig, use: str, count: int) -> list[int]:
    """Of the noise of every image: the same for every denoiser."""
    return [derive_seed(job.seed, use, i) for i in range(count)]


def _whole_batches(seeds: Sequence[int], batch: int, shards: int) -> list[list[int]]:
    """The seeds of every shard, whole batches each: with any number of shards the same images are drawn together, bit for bit."""
    batches = [seeds[i : i + batch] for i in range(0, len(seeds), batch)]
    cuts = [round(s * len(batches) / shards) for s in range(shards + 1)]
    return [[seed for part in batches[a:b] for seed in part] for a, b in pairwise(cuts)]
