"""THE METHOD ON ONE PAGE: six stages, each a short function that asks the cluster for work and keeps the answer.

analyze     how alike are timesteps?           partition   where to cut?
specialize  one elastic expert per interval    route       who gets which sub-network, per budget?
finetune    recover quality                    publish     is it good? keep it
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator import encode, evaluation, experts, proxies, publishing, searching
from orchestrator.calibration import calibrate, read_influence
from orchestrator.config import JobConfig
from orchestrator.pipeline import Context, Stage
from orchestrator.registry import is_published
from orchestrator.searching import search_plans
from orchestrator.store import RunStore, write_json
from orchestrator.words import few_steps, merits, predicts, spent
from workers import data, diffusion, families, first_stage, latents, partition, tasks, tasks_evaluate
from workers.contracts import (
    DenoiserRef,
    ExpertTask,
    ImageTask,
    LatencyTask,
    Partition,
    RouteTask,
    SimilarityMatrix,
    SimilarityTask,
    derive_seed,
)
from workers.cost import cost_table, require_reachable
from workers.files import remove
from workers.latency_table import LatencyTable


def analyze(ctx: Context) -> dict[str, Any]:
    """Embed every grid timestep under the chosen measure, in chunks over the cluster; compare the embeddings."""
    job, settings = ctx.job, ctx.job.similarity
    images, train, _ = _images(ctx)
    rows = tuple(train[: settings.images])
    num_timesteps = families.load_scheduler_config(job.model.path)["num_train_timesteps"]
    grid = partition.grid(num_timesteps, settings.timesteps)
    chunks = [tuple(int(t) for t in chunk) for chunk in np.array_split(grid, min(len(grid), 2 * ctx.cluster.slots()))]
    items = [
        SimilarityTask(
            measure=settings.measure,
            model=job.model.path,
            images=images,
            rows=rows,
            timesteps=chunk,
            batch_size=settings.batch_size,
            buckets=settings.buckets,
            seed=job.seed,
            device=ctx.cluster.need.device,
            out=str(ctx.folder / f"embed-{chunk[0]:04d}-{chunk[-1]:04d}.npy"),
        )
        for chunk in chunks
    ]
    ctx.cluster.scatter(tasks.embed_timesteps, [item for item in items if not Path(item.out).exists()])
    [matrix] = ctx.cluster.scatter(tasks.compare_timesteps, [(tuple(items), num_timesteps, str(ctx.folder / "gram.npy"))])
    for part in ctx.folder.glob("embed-*.npy"):  # an attempt with another number of workers had other chunks
        remove(part)
    return {"similarity": matrix.to_json()}


def cut(ctx: Context) -> dict[str, Any]:
    """The exact best contiguous intervals, how sure each boundary is, and what the naive partitions would cost."""
    job, settings = ctx.job, ctx.job.partition
    matrix = SimilarityMatrix.from_json(ctx.results["analyze"]["similarity"])
    found = tasks.cut_timesteps(
        matrix,
        str(ctx.folder_of("analyze") / "gram.npy"),
        settings.experts,
        method=settings.method,
        min_timesteps=settings.min_timesteps,
        penalty=settings.penalty,
        max_experts=settings.max_experts,
        bootstrap=job.similarity.bootstrap,
        seed=job.seed,
        scheduler_config=families.load_scheduler_config(job.model.path),
    )
    chosen = Partition.from_json(found["partition"])
    _warn_of_few_steps(ctx, chosen)  # before anything is trained for them
    reliability = float(np.median(matrix.reliability))
    if reliability < 0.5:
        ctx.say(
            f"  note: two halves of the images agree little about the gradients (median cosine {reliability:.2f}): raise similarity.images"
        )
    for boundary, frequency in zip(chosen.boundaries, found["boundary_frequency"], strict=True):
        if frequency < 0.7 and found["rule"] == "learned":
            ctx.say(
                f"  note: the boundary at t = {boundary} returned in only {frequency:.0%} of bootstrap resamples: "
                "raise similarity.images to be surer of it"
            )
    return found


def specialize(ctx: Context) -> dict[str, Any]:
    """One elastic copy of the denoiser per interval, each its own training run, all at the same time as far as they fit."""
    _latency(ctx)  # an impossible budget is told before hours of training
    job, settings = ctx.job, ctx.job.specialize
    images, train, _ = _images(ctx)
    jobs = {
        interval.name: ExpertTask(
            stage="specialize",
            model=job.model.path,
            images=images,
            rows=tuple(train),
            interval=interval,
            elastic=job.elastic_settings(),
            train=settings.settings(),
            random_networks=settings.random_networks,
            network_pool=settings.network_pool,
            network_costs=settings.costs,
            importance_images=settings.importance_images,
            seed=job.seed,
            flip=job.data.flip,
            class_dropout=job.data.class_dropout,
        )
        for interval in _partition(ctx).intervals
    }
    found = experts.fit(ctx, "specialize", jobs, dict.fromkeys(jobs, ctx.fingerprint))
    return {"experts": list(found.values())}


def route(ctx: Context) -> dict[str, Any]:
    """Every agent searches every budget; per budget the plan is chosen whose experts are closest to dense after a little fine-tuning."""
    job, train = ctx.job, training_rows(ctx)
    item = calibrate(ctx, route_task(ctx), train)
    budgets = {job.budget(i).name: job.budget(i) for i in range(len(job.budgets))}
    found, counted = search_plans(ctx, item, budgets.values(), agents_of(job), job.router.seeds), read_influence(item)
    plans, spent_s = proxies.compare(ctx, item, train, found.plans)
    chosen = {name: min((p for p in plans if p.budget == budget), key=lambda p: p.rank) for name, budget in budgets.items()}
    for name, plan in chosen.items():
        told = merits([p for p in plans if p.budget == plan.budget], job.proxy_steps)
        ctx.say(f"  {name}: {plan.agent} chosen, {plan.cost_ratio:.3f} of dense {plan.budget.quantity} ({told})")
    if found.known:
        ctx.say(f"  {found.known} of the {len(plans)} plans were there from earlier searches")
    counts = ", ".join(f"{interval.name} {count:.2g}" for interval, count in zip(item.partition.intervals, counted, strict=True))
    ctx.say(f"  an error counts, by the samples it moves: {counts}")
    seconds = {**found.seconds, "short fine-tuning": spent_s} if spent_s else found.seconds
    ctx.say(f"  search: {spent(seconds)}")
    _warn_of_few_steps(ctx, item.partition)
    return {
        "chosen": {name: plan.to_json() for name, plan in chosen.items()},
        "trials": [plan.to_json() for plan in plans],
        "influence": counted,
        "seconds": seconds,
        "searches": found.files,
    }


def training_rows(ctx: Context) -> list[int]:
    """The images that experts learn from."""
    return _images(ctx)[1]


def agents_of(job: JobConfig) -> list[str]:
    """The job's agents; the baseline is always there."""
    return list(dict.fromkeys(["uniform", *job.router.agents, *job.finetune.compare]))


def route_task(ctx: Context, stage: str = "route") -> RouteTask:
    """What the trials of a plan search share: the elastic experts, and what was measured of them."""
    job, settings = ctx.job, ctx.job.router
    images, train, _ = _images(ctx)
    return RouteTask(
        model=job.model.path,
        images=images,
        rows=tuple(train[-settings.images :]),
        partition=_partition(ctx),
        elastic=job.elastic_settings(),
        experts=tuple(experts.located(ctx, e) for e in ctx.results["specialize"]["experts"]),
        budget=job.budget(0),
        agent="uniform",
        seed=job.seed,
        settings=settings.settings(),
        device=ctx.cluster.need.device,
        latency=_latency(ctx),
        stage=stage,
        mixed_precision=job.specialize.mixed_precision,
    )


def finetune(ctx: Context) -> dict[str, Any]:
    """Extract each chosen sub-network as a plain small denoiser and train it on its interval; other agents' too, to compare.

    Equal ones are trained once, and not at all if they are there: `experts`.
    """
    images, train, _ = _images(ctx)
    elastic = [experts.located(ctx, e) for e in ctx.results["specialize"]["experts"]]
    plans, settings = experts.plans(ctx), ctx.job.finetune.settings()
    jobs = {
        experts.unit(label, task.interval): task
        for label, plan in plans.items()
        for task in experts.tuning(ctx, images, train, plan.partition, plan.experts, label, settings)
    }
    for label, other in experts.equals(plans).items():
        ctx.say(f"  {label} = {other}: the same sub-networks, trained and measured once")
    keys = {name: experts.key_of(ctx, task, elastic) for name, task in jobs.items()}
    return {"experts": experts.fit(ctx, "finetune", jobs, keys)}


def publish(ctx: Context) -> dict[str, Any]:
    """Measure dense, every mixture and its baselines on the same images and noise; publish, verify, report."""
    chosen = rows(ctx)
    measured = evaluate(ctx, chosen)
    metrics = evaluation.read_table(measured, chosen)
    write_json(ctx.folder / "metrics.json", metrics)
    published = {}
    for budget in ctx.results["route"]["chosen"]:
        item = publishing.item_of(ctx, chosen[budget].ref)
        ctx.cluster.scatter(tasks_evaluate.assemble_mixture, [item])
        version = publishing.publish(ctx, chosen[budget].ref, metrics)
        published[budget] = {"reference": version.reference, "path": version.where}
    return {
        "metrics": metrics,
        "mixtures": ctx.fingerprints["finetune"],
        "rows": {label: file.relative_to(ctx.store.folder).as_posix() for label, file in measured.items()},
        "published": published,
    }


def rows(ctx: Context, published: Mapping[str, DenoiserRef] | None = None) -> dict[str, evaluation.Row]:
    """What the table of results is about, also before there are mixtures; ``published`` versions are added."""
    whole = families.load_scheduler_config(ctx.job.model.path)["num_train_timesteps"]
    cuts = _partition(ctx) if "partition" in ctx.results else Partition.from_boundaries([], whole)
    made = experts.denoisers(ctx) if "finetune" in ctx.results else {"dense": DenoiserRef("dense")}
    return evaluation.rows_of(ctx, {**made, **(published or {})}, cuts)


def evaluate(ctx: Context, chosen: Mapping[str, evaluation.Row], stage: str = "publish") -> dict[str, Path]:
    """The file of every row, measured now unless it is there."""
    images, _, held_out = _images(ctx)
    return evaluation.measure(ctx, chosen, images, held_out, stage)


STAGES = (
    Stage(
        "analyze",
        analyze,
        (),
        (
            "model",
            "data.path",
            "data.on_error",
            "data.resize",
            "data.holdout",
            "data.latent_dtype",
            "data.encode_math",
            "first_stage",
            "seed",
            *(f"similarity.{k}" for k in ("measure", "timesteps", "images", "batch_size", "buckets")),
        ),
        version=2,
    ),
    Stage("partition", cut, ("analyze",), ("partition", "similarity.bootstrap"), version=2),
    Stage(
        "specialize",
        specialize,
        ("partition",),
        ("elastic", "specialize", "data.flip", "data.class_dropout"),
        ("specialize.checkpoint_every",),
        version=3,
        leaves=lambda result: experts.folders(result["experts"]),
    ),
    Stage(
        "route",
        route,
        ("specialize",),
        ("router", "budgets", "timing", "sampler.scheduler", "sampler.steps", "sampler.guidance_scale", "finetune.compare"),
        version=searching.VERSION + proxies.VERSION,  # both only grow
        leaves=lambda result: result["searches"],
        leans=False,
    ),
    Stage(
        "finetune",
        finetune,
        ("route",),
        ("finetune",),
        ("finetune.checkpoint_every",),
        version=experts.VERSION,
        leaves=lambda result: experts.folders(result["experts"].values()),
    ),
    Stage(
        "publish",
        publish,
        ("finetune",),
        (
            "evaluate",
            "evaluate.extractor_weights",
            "evaluate.reference",
            "evaluate.kid_reference",
            "evaluate.lpips",
            "export",
            "latency",
            "sampler.guidance_scale",
            "sampler.eta",
            "name",
            "registry",
        ),
        ignores=tuple(  # how work is shared out; and files, which are known by what they hold
            f"evaluate.{k}" for k in ("batch_size", "shards", "extractor_weights", "reference", "kid_reference", "lpips")
        ),
        later={"sampler.epsilon_scale": 1.0, "evaluate.mixtures": []},
        version=2,
        holds=lambda result: all(is_published(version["path"]) for version in result["published"].values()),
        fills=evaluation.FOLDER,
        leaves=lambda result: [*result.get("rows", {}).values()],
    ),
)


# --- what the stages share ------------------------------------------------------------------------------------------


def _partition(ctx: Context) -> Partition:
    return Partition.from_json(ctx.results["partition"]["partition"])


def too_few_steps(job: JobConfig, cuts: Partition) -> list[str]:
    """A sentence for every expert that hardly serves the job's sampler, or one that its mixtures are measured under."""
    samplers = [evaluation.job_sampler(job), *evaluation.further_samplers(job, "mixtures")]
    return few_steps(cuts, steps_served(job.model.path, cuts, [(sampler.scheduler, sampler.steps) for sampler in samplers]))


def _warn_of_few_steps(ctx: Context, cuts: Partition) -> None:
    for text in too_few_steps(ctx.job, cuts):
        ctx.say(f"  warning: {text}")


def steps_served(model: str, cuts: Partition, samplers: Iterable[tuple[str, int]]) -> dict[str, list[int]]:
    """How many of a sampler's steps each expert serves, by the sampler's name, as in ``ddim:50``."""
    config = families.load_scheduler_config(model)
    return {
        f"{scheduler}:{steps}": list(diffusion.steps_per_expert(cuts, diffusion.sampler_timesteps(scheduler, config, steps)))
        for scheduler, steps in samplers
    }


def _images(ctx: Context) -> tuple[str, list[int], list[int]]:
    """What training reads (made once per run folder: decoded images, or the latents of a first stage), the training rows in random
    order, and the held-out rows."""
    job = ctx.job
    latent = first_stage.locate(job.model.path) is not None
    out = _latents(ctx) if latent else _decoded(ctx)
    count = latents.LatentCache.open(out).count if latent else data.ImageCache.open(out).count
    train, held_out = data.split(count, job.data.holdout, job.seed)
    return str(out), train.tolist(), held_out.tolist()


def _decoded(ctx: Context) -> Path:
    job, config = ctx.job, families.load_config(ctx.job.model.path)
    kind = [ctx.identity["data.path"], job.data.resize, job.data.on_error, config["in_channels"], config["sample_size"]]
    out = ctx.store.folder / "cache" / f"images-{derive_seed(*map(str, kind)):016x}.arrow"
    if not out.exists():
        out.parent.mkdir(exist_ok=True)
        item = ImageTask(job.data.path, config["in_channels"], config["sample_size"], job.data.resize, job.data.on_error, str(out))
        [made] = ctx.cluster.scatter(tasks.build_images, [item])
        _say_images(ctx.say, made["count"], made["skipped"], "decoded")
    return out


def _latents(ctx: Context) -> Path:
    plan = encode_plan(ctx.job, ctx.store, ctx.identity)
    if not plan.finished:
        encode_images(plan, lambda: ctx.cluster, ctx.say)
    return plan.folder


def encode_images(plan: encode.EncodePlan, cluster: Callable[[], Any], say: Callable[[str], None]) -> dict[str, Any]:
    """Make what is missing of a latent cache over the cluster; what is known of it, as JSON."""
    if plan.tasks:
        slots = cluster().slots()
        cluster().scatter(tasks.encode_latents, encode.batches(plan.tasks, slots))
    made = encode.finish(plan)
    if not plan.finished:
        _say_images(say, made["count"], made["skipped"], "encoded")
    if made["note"]:
        say(f"  warning: {made['note']}")
    return made


def encode_plan(job: JobConfig, store: RunStore, identity: Mapping[str, str]) -> encode.EncodePlan:
    """What is left to encode of a latent job's images. Raises: InputError for a pipeline in pixels."""
    return encode.plan(
        store.folder / "cache",
        model=job.model.path,
        data_path=job.data.path,
        identity=identity["data.path"],
        sample_size=families.load_config(job.model.path)["sample_size"],
        resize=job.data.resize,
        on_error=job.data.on_error,
        dtype=job.data.latent_dtype,
        math=job.data.encode_math,
        batch_size=job.data.encode_batch,
        digest=identity["first_stage"],
    )


def _say_images(say: Callable[[str], None], count: int, skipped: list[str], done: str) -> None:
    say(f"  {count} images {done}" + (f", {len(skipped)} unreadable and skipped: {', '.join(skipped[:3])}" if skipped else ""))


def _latency(ctx: Context) -> str | None:
    """The latency table of a job with a latency budget, measured now if there is none of this device; every budget can be met by it.

    Raises: BudgetUnreachable, before anything is trained for a budget that no mixture meets.
    """
    job = ctx.job
    if all(budget.metric != "latency" for budget in job.budgets):
        return None
    elastic = job.elastic_settings()
    item = LatencyTask(job.model.path, elastic, job.timing(), str(ctx.store.folder / "cache"))
    known = set(Path(item.folder).glob("latency-*.json"))
    [path] = ctx.cluster.scatter(tasks.measure_latency, [item])
    times = LatencyTable.load(Path(path))
    if Path(path) not in known:
        ctx.say(f"  {predicts(times.dense_ms, times.validation.median_error, times.validation.p95_error)}")
    table = cost_table(families.load_config(job.model.path), elastic).with_latency(times)
    for i, budget in enumerate(job.budgets):
        require_reachable(table, budget.ratio, f"budgets.{i}.ratio", budget.metric)
    return str(path)
