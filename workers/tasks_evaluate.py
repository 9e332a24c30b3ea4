"""The entry points of evaluation and publishing that run on workers: ``task(session, item)``, as those of `workers.tasks`.

Legend: n images of one shard or of all; d features.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from workers import checkpoint, conditioning, data, evaluate, extractors, families, first_stage, golden, pretrained, rewrites, shards
from workers.contracts import DenoiserRef, EvaluateTask, ExtractorRef, InputError, Progress, RunFailed, SamplerRef, derive_seed
from workers.diffusion import NoiseSchedule, make_sampler, pixels, sampler_timesteps
from workers.elastic import extract, reorder
from workers.files import finished, remove, replacing
from workers.frechet import Statistics, frechet_distance, kernel_distance, read_statistics
from workers.generate import SamplingDenoiser, Surroundings
from workers.latency import device_name
from workers.mixture import MixtureDenoiser, any_width
from workers.regional import RegionCompiler
from workers.rows import ReferenceTask, RowTask
from workers.samples import open_samples
from workers.session import Session


def load_reference(ref: DenoiserRef, model_path: str) -> nn.Module:
    """The denoiser a reference points to: dense, published, a mixture of fine-tuned experts, or one cut from the pretrained weights.

    All predict noise as they were trained to; who draws divides it by the sampler's scale.
    """
    if ref.folder is not None:
        published = pretrained.load(MixtureDenoiser, Path(ref.folder))
        return published if ref.epsilon_scale == 1 else published.scale_epsilon(1 / ref.epsilon_scale)
    if ref.plan is None:
        return families.load_denoiser(model_path)
    config = families.load_config(model_path)
    with torch.device("meta"):
        mixture: Any = MixtureDenoiser.of(
            config, ref.plan.partition.boundaries, ref.plan.experts, ref.unit, num_timesteps=ref.plan.partition.num_timesteps
        )
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
    if isinstance(model, MixtureDenoiser):
        return model.rewrite([name for name in names if name not in dict(model.config)["rewrites"]])
    return rewrites.apply(model, names)


@functools.cache
def _compiler() -> RegionCompiler:
    """One per worker process: blocks that several denoisers share are compiled once."""
    return RegionCompiler()


@functools.lru_cache(maxsize=1)
def _extractor(ref: ExtractorRef, device: str) -> extractors.Extractor:
    return extractors.load(ref, device)


@torch.no_grad()
def evaluate_shard(session: Session, item: EvaluateTask) -> str:
    """Held-out denoising losses, samples from fixed noise, and features of more of them, of one denoiser on one shard: ``item.out`` (npz).

    losses float64 [rows, timesteps], samples float32 [n, C, H, W], features float32 [n, d], and of every batch drawn its size and seconds.
    """
    model = load_reference(item.denoiser, item.model).to(session.device)
    around, shape = Surroundings.load(item.model, session.device), open_samples(item.images).shape
    unit, started, done = item.denoiser.label, time.time(), 0
    total = len(item.rows) + len(item.noise_seeds) + len(item.frechet_seeds)

    def on_images(count: int) -> None:
        nonlocal done
        done += count
        session.report(Progress(item.stage, unit, done, max(1, total), seconds=time.time() - started))

    on_images(0)
    losses = _losses(model, around, item, session.device, on_images)
    denoiser = SamplingDenoiser(model, session.device, item.dtype, fused=not item.compiled)
    if item.compiled:
        _compiler().compile(denoiser.model)
    batches: list[tuple[int, float]] = []
    timed = functools.partial(
        around.draw, denoiser, item.sampler, shape=shape, batch=item.batch_size, guidance_scale=item.guidance_scale, pad=item.compiled
    )

    def draw(seeds: Sequence[int]) -> Iterator[Tensor]:
        for images, seconds in timed(seeds=seeds):
            batches.append((len(images), seconds))
            yield images
            on_images(len(images))

    if item.compiled or session.device.startswith("cuda"):
        for _ in timed(seeds=evaluate.lone_batch((item.noise_seeds, item.frechet_seeds), item.batch_size)):
            pass  # it warms up what would be timed first
    arrays: dict[str, Any] = {"losses": losses, "samples": _stack([images.cpu() for images in draw(item.noise_seeds)])}
    if item.extractor is not None:
        extractor = _extractor(item.extractor, session.device)
        arrays["features"] = _stack([extractor(images).cpu() for images in draw(item.frechet_seeds)])
    with replacing(Path(item.out)) as path:
        np.savez(path, batches=np.array(batches, np.float64).reshape(-1, 2), **arrays)
    return item.out


def _stack(parts: list[Tensor]) -> np.ndarray:
    """All rows together; without any, an array that adds none to those of other shards."""
    return torch.cat(parts).numpy() if parts else np.zeros((0,), np.float32)


def _losses(model: nn.Module, around: Surroundings, item: EvaluateTask, device: str, on_images: Callable[[int], None]) -> np.ndarray:
    """Denoising losses on the held-out rows: float64 [rows, timesteps]."""
    images, schedule = open_samples(item.images), NoiseSchedule(around.scheduler_config)
    is_told = around.conditioner.classes.argument is not None
    found = [np.zeros((0, len(item.timesteps)))]
    for start in range(0, len(item.rows), item.batch_size):
        rows = item.rows[start : start + item.batch_size]
        seeds = [derive_seed(item.seed, row) for row in rows]
        told = around.conditioner(images.labels_of(rows).to(device) if is_told else None)
        found.append(evaluate.denoising_losses(model, schedule, images.clean(rows, device), told, seeds, item.timesteps))
        on_images(len(rows))
    return np.concatenate(found)


def summarise(session: Session, items: tuple[RowTask, ...]) -> list[str]:
    """Write the rows whose shards are there, in order, one file each: a run that is killed continues with those that are missing.

    Times are compared with dense's of the same task, since a clock's circumstances change: dense is timed again if its row is older.
    """
    started, dense_ms = time.time(), math.nan
    for done, item in enumerate(items, 1):
        if not Path(item.out).exists():
            if not item.is_dense and math.isnan(dense_ms):
                dense_ms = _costs(session, replace(item.shards[0], denoiser=DenoiserRef("dense")))["ms_per_step"]
            row = _row(session, item, dense_ms)
            dense_ms = row["ms_per_step"] if item.dense is None else dense_ms
            _write_row(item, row)
        session.report(Progress(item.shards[0].stage, "costs and distances", done, len(items), seconds=time.time() - started))
    return [item.out for item in items]


def _costs(session: Session, task: EvaluateTask) -> dict[str, Any]:
    """What a step costs, and the name of the device that this is true of."""
    model = rewritten(load_reference(task.denoiser, task.model), task.timing.rewrites)
    return {**evaluate.cost_per_step(model, task, session.device, compiler=_compiler()), "device": device_name(session.device)}


def _row(session: Session, item: RowTask, dense_ms: float) -> dict[str, Any]:
    """Paired errors, distances, costs and times of one denoiser under one sampler. ``dense_ms``: of a step of dense, timed just now."""
    task, shards = item.shards[0], [dict(np.load(shard.out)) for shard in item.shards]
    samples = _joined(shards, "samples")
    dense_samples = samples if item.dense is None else np.load(Path(item.dense).with_suffix(".npz"))["samples"]
    known = json.loads(Path(item.known_from).read_text()) if item.known_from is not None else {}
    if known:
        quality = {key: known[key] for key in evaluate.LOSSES}
    else:
        losses = _joined(shards, "losses")
        quality = {
            "denoising_loss": float(losses.mean()),
            "denoising_loss_by_timestep": [float(v) for v in losses.mean(0)],
            "timesteps": list(task.timesteps),
        }
    costs = {key: known[key] for key in evaluate.COSTS if key in known} if known and item.is_dense else _costs(session, task)
    return {
        **quality,
        **costs,
        "dense_ms_per_step": costs["ms_per_step"] if item.is_dense else dense_ms,
        **evaluate.paired_metrics(samples, dense_samples),
        **({} if item.lpips is None else {"paired_lpips": evaluate.lpips(item.lpips, samples, dense_samples, session.device)}),
        **_distances(item, shards),
        **evaluate.speed([shard["batches"] for shard in shards]),
        "drawn": {"batch": task.batch_size, "compiled": task.compiled},
        "sampler": task.sampler.to_json(),
        "protocol": item.protocol.told(),
        "timing": task.timing.to_json(),
        "samples": len(samples),
        "drawn_at_once": item.drawn_at_once,
        "commit": item.commit,
        "calls": len(sampler_timesteps(task.sampler.scheduler, families.load_scheduler_config(task.model), task.sampler.steps)),
    }


def _write_row(item: RowTask, row: dict[str, Any]) -> None:
    """The samples first: where a row is, they are too."""
    out = Path(item.out)
    with replacing(out.with_suffix(".npz")) as path:
        np.savez(path, samples=np.concatenate([np.load(shard.out)["samples"] for shard in item.shards if len(shard.noise_seeds)]))
    with replacing(out) as path:
        path.write_text(json.dumps(row, indent=1) + "\n")
    for shard in out.parent.glob(f"{out.stem}.*of*.npz"):
        remove(shard)


def _joined(shards: Sequence[dict[str, np.ndarray]], name: str) -> np.ndarray:
    """The rows of all shards, in order."""
    return np.concatenate([shard[name] for shard in shards if len(shard[name])])


def _distances(item: RowTask, shards: Sequence[dict[str, np.ndarray]]) -> dict[str, float | None]:
    """Frechet and kernel distance of the shards' features from their references; None where these, or the features, are missing."""
    if item.reference is None:
        return {}
    features, reference = _joined(shards, "features"), read_statistics(item.reference)
    if not np.isfinite(features).all():  # the images themselves are not
        return {"frechet": None, "kid": None, "kid_std": None}
    kid = spread = known = None
    if item.kid_reference is not None:
        known = (
            reference if item.kid_reference == item.reference else read_statistics(item.kid_reference, "evaluate.kid_reference")
        ).features
    if known is not None:
        kid, spread = kernel_distance(features, known)
    return {"frechet": frechet_distance(Statistics.of(features), reference), "kid": kid, "kid_std": spread}


def reference_statistics(session: Session, item: ReferenceTask) -> str:
    """What distances are measured from: statistics of the features of a set of images, made once."""
    reader, extractor, started = data.ImageReader(item.images.path), extractors.load(item.extractor, session.device), time.time()
    parts: list[Tensor] = []
    images = (image.pixels for image in reader.read(item.images, 0, reader.count) if image.pixels is not None)
    done = 0
    while batch := list(itertools.islice(images, item.batch_size)):
        parts.append(extractor(pixels(np.stack(batch), session.device)).cpu())
        done += len(batch)
        session.report(Progress(item.stage, "reference", done, max(done, reader.count), seconds=time.time() - started))
    if done < 2:
        raise InputError(f"evaluate.reference: {item.images.path} holds {done} readable images: distances need two or more")
    Statistics.of(torch.cat(parts).numpy()).save(Path(item.images.out))
    return item.images.out


def assemble_mixture(session: Session, item: tuple[DenoiserRef, str, SamplerRef, tuple[str, ...], str]) -> str:
    """Write a published version's files: the mixture (config, and float32 weights, one file per expert, rewritten exactly as asked), its
    sampler, what of the base model stands around it (first stage and class embedder), and images that it draws.

    Raises: RunFailed if the weights cannot be written.
    """
    ref, model_path, sampler, rewrites, out = item
    mixture: Any = load_reference(ref, model_path)
    mixture.rewrite(rewrites)
    if sampler.epsilon_scale != 1:
        mixture.scale_epsilon(sampler.epsilon_scale)
    try:
        shards.save(mixture, Path(out))
        for part in (first_stage.locate(model_path), Path(model_path) / conditioning.EMBEDDER):
            if part is not None and part.is_dir():
                shutil.copytree(part, Path(out) / part.name, dirs_exist_ok=True)
        make_sampler(sampler.scheduler, families.load_scheduler_config(model_path)).save_pretrained(Path(out) / "scheduler")
        try:
            golden.make(Path(out), sampler.scheduler, sampler.steps, session.device)
        except InputError as error:  # an expert whose training went wrong, say
            raise RunFailed(f"what was trained cannot be published: {error}") from error
    except SafetensorError as error:  # a full disk, which safetensors does not report as OSError
        raise RunFailed(f"the mixture cannot be written to {out}: {error}: the same command again continues") from error
    finished(Path(out))
    return out
