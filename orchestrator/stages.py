"""THE METHOD ON ONE PAGE: six stages, each a short function that asks the cluster for work and keeps the answer.

analyze     how alike are timesteps?           partition   where to cut?
specialize  one elastic expert per interval    route       who gets which sub-network, per budget?
finetune    recover quality                    publish     is it good? keep it
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator import encode, evaluation, publishing
from orchestrator.calibration import calibrate, read_influence
from orchestrator.config import JobConfig
from orchestrator.pipeline import Context, Stage
from orchestrator.registry import is_published
from orchestrator.scheduling import longest_first
from orchestrator.store import RunStore, write_json
from orchestrator.words import few_steps, predicts
from workers import data, families, first_stage, latents, partition, tasks, tasks_evaluate, tasks_route
from workers.contracts import (
    DenoiserRef,
    ExpertCheckpoint,
    ExpertTask,
    ImageTask,
    LatencyTask,
    MixturePlan,
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
    experts = _fit_all(ctx, "specialize", jobs)
    return {"experts": list(experts.values())}


def route(ctx: Context) -> dict[str, Any]:
    """Every agent searches every budget; per budget the plan with the lowest loss is chosen, on images no agent searched on."""
    job, settings = ctx.job, ctx.job.router
    item = route_task(ctx)
    counted = read_influence(item)
    budgets = {job.budget(i).name: job.budget(i) for i in range(len(job.budgets))}
    axes = {"budget": list(budgets), "agent": agents_of(job), "seed": settings.seeds}
    trials = {
        f"{budget}/{agent}/{seed}": replace(item, budget=budgets[budget], agent=agent, search_seed=seed)
        for budget, agent, seed in itertools.product(*axes.values())
    }
    found = ctx.cluster.search(tasks_route.search_plan, axes, trials, ctx.folder)
    plans = [trial.plan for trial in found.values() if trial.plan]
    chosen = {budget: min((p for p in plans if p.budget.name == budget), key=lambda p: p.loss) for budget in budgets}
    for budget, plan in chosen.items():
        losses = ", ".join(f"{p.agent} {p.loss:.4f}" for p in plans if p.budget.name == budget)
        ctx.say(f"  {budget}: {plan.agent} chosen, {plan.cost_ratio:.3f} of dense {plan.budget.quantity} (search loss: {losses})")
    served = {f"{p.budget.scheduler}:{p.budget.steps}": [round(share * p.budget.steps) for share in p.shares] for p in chosen.values()}
    counts = ", ".join(f"{interval.name} {count:.2g}" for interval, count in zip(item.partition.intervals, counted, strict=True))
    ctx.say(f"  an error counts, by the samples it moves: {counts}")
    for warning in few_steps(item.partition, served):
        ctx.say(f"  warning: {warning}")
    return {"chosen": {b: p.to_json() for b, p in chosen.items()}, "trials": [p.to_json() for p in plans], "influence": counted}


def agents_of(job: JobConfig) -> list[str]:
    """The job's agents; the baseline is always there."""
    return list(dict.fromkeys(["uniform", *job.router.agents, *job.finetune.compare]))


def route_task(ctx: Context, stage: str = "route") -> RouteTask:
    """What the trials of a plan search share: the elastic experts, and what was measured of them."""
    job, settings = ctx.job, ctx.job.router
    images, train, _ = _images(ctx)
    experts = tuple(_located(ctx, e) for e in ctx.results["specialize"]["experts"])
    item = RouteTask(
        model=job.model.path,
        images=images,
        rows=tuple(train[-settings.images :]),
        partition=_partition(ctx),
        elastic=job.elastic_settings(),
        experts=experts,
        budget=job.budget(0),
        agent="uniform",
        seed=job.seed,
        settings=settings.settings(),
        device=ctx.cluster.need.device,
        latency=_latency(ctx),
        stage=stage,
        mixed_precision=job.specialize.mixed_precision,
    )
    return calibrate(ctx, item)


def finetune(ctx: Context) -> dict[str, Any]:
    """Extract each chosen sub-network as a plain small denoiser and train it on its interval; other agents' too, to compare."""
    job, settings = ctx.job, ctx.job.finetune
    images, train, _ = _images(ctx)
    elastic = [_located(ctx, e) for e in ctx.results["specialize"]["experts"]]
    jobs = {
        _unit(plan, k): ExpertTask(
            stage="finetune",
            model=job.model.path,
            images=images,
            rows=tuple(train),
            interval=interval,
            elastic=job.elastic_settings(),
            train=settings.settings(),
            random_networks=0,
            importance_images=1,
            seed=derive_seed(job.seed, "finetune", plan.budget.name),
            flip=job.data.flip,
            class_dropout=job.data.class_dropout,
            source=elastic[k].path,
            spec=plan.experts[k],
            label=plan.budget.name + (f" {plan.agent}" if settings.compare else ""),
        )
        for plan in _plans(ctx)
        for k, interval in enumerate(plan.partition.intervals)
    }
    return {"experts": _fit_all(ctx, "finetune", jobs)}


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
    made = _denoisers(ctx) if "finetune" in ctx.results else {"dense": DenoiserRef("dense")}
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
    Stage("partition", cut, ("analyze",), ("partition", "similarity.bootstrap")),
    Stage(
        "specialize",
        specialize,
        ("partition",),
        ("elastic", "specialize", "data.flip", "data.class_dropout"),
        ("specialize.checkpoint_every",),
        version=3,
    ),
    Stage(
        "route",
        route,
        ("specialize",),
        ("router", "budgets", "timing", "sampler.scheduler", "sampler.steps", "sampler.guidance_scale", "finetune.compare"),
        version=3,
    ),
    Stage("finetune", finetune, ("route",), ("finetune",), ("finetune.checkpoint_every",), version=2),
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
        version=2,
        holds=lambda result: all(is_published(version["path"]) for version in result["published"].values()),
        fills=evaluation.FOLDER,
    ),
)


# --- what the stages share ------------------------------------------------------------------------------------------


def _partition(ctx: Context) -> Partition:
    return Partition.from_json(ctx.results["partition"]["partition"])


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


def _fit_all(ctx: Context, stage: str, jobs: dict[str, ExpertTask]) -> dict[str, dict[str, Any]]:
    """Train what has no record yet. A record per finished run, so that a resumed stage does not start trainers for nothing."""
    records = {name: ctx.folder / f"{name}.json" for name in jobs}
    todo = {f"{stage}-{name}-{ctx.fingerprint[:8]}": name for name in jobs if not records[name].exists()}
    storage = ctx.store.folder / "train"
    order = longest_first({run: _work(jobs[name], storage / run) for run, name in todo.items()})

    def record(run: str, expert: ExpertCheckpoint) -> None:
        inside = Path(expert.path).relative_to(ctx.store.folder)  # a run folder may be moved
        write_json(records[todo[run]], replace(expert, path=inside.as_posix()).to_json())

    storage.mkdir(exist_ok=True)
    if todo:
        ctx.cluster.fit_all(tasks.train_expert, {run: jobs[todo[run]] for run in order}, storage, record)
    return {name: json.loads(path.read_text()) for name, path in records.items()}


def _work(task: ExpertTask, folder: Path) -> float:
    """Multiply-accumulates that are left of training an expert, about: the teacher forward, each sub-network forward and backward."""
    table = cost_table(families.load_config(task.model), task.elastic)
    networks = table.cost(task.spec).macs if task.spec else table.dense.macs * (1 + task.random_networks)
    done = max((int(step.name.removeprefix("step_")) for step in folder.glob("step_*")), default=0)
    return (task.train.steps - done) * task.train.batch_size * (table.dense.macs + 3 * networks)


def _located(ctx: Context, expert: dict[str, Any]) -> ExpertCheckpoint:
    """A stored checkpoint, with its path made absolute."""
    found = ExpertCheckpoint.from_json(expert)
    return replace(found, path=str(ctx.store.folder / found.path))


def _plans(ctx: Context) -> list[MixturePlan]:
    """The chosen plan of every budget, and beside it those of the agents it is compared with, where they are others."""
    plans = []
    for chosen in ctx.results["route"]["chosen"].values():
        best = MixturePlan.from_json(chosen)
        plans.append(best)
        others = (_best_of(ctx, agent, best) for agent in ctx.job.finetune.compare)
        plans += [plan for plan in others if plan.agent != best.agent and plan.experts != best.experts]
    return plans


def _best_of(ctx: Context, agent: str, plan: MixturePlan) -> MixturePlan:
    """An agent's own plan at another plan's budget: the best of its seeds."""
    trials = map(MixturePlan.from_json, ctx.results["route"]["trials"])
    return min((trial for trial in trials if trial.agent == agent and trial.budget == plan.budget), key=lambda trial: trial.loss)


def _unit(plan: MixturePlan, k: int) -> str:
    return f"{plan.budget.name}-{plan.agent}-{plan.partition.intervals[k].name}"


def _denoisers(ctx: Context) -> dict[str, DenoiserRef]:
    """Everything that is measured: dense; per budget the mixture, those of other agents, and the pretrained net cut uniformly."""
    experts = ctx.results["finetune"]["experts"]
    elastic = tuple(_located(ctx, e) for e in ctx.results["specialize"]["experts"])
    denoisers = {"dense": DenoiserRef("dense")}
    for plan in _plans(ctx):
        refs = tuple(_located(ctx, experts[_unit(plan, k)]) for k in range(len(plan.experts)))
        label = plan.budget.name if plan.budget.name not in denoisers else f"{plan.budget.name} {plan.agent}"
        denoisers[label] = DenoiserRef(label, plan, refs, unit=ctx.job.elastic.unit)
    for budget, chosen in ctx.results["route"]["chosen"].items():
        if not ctx.job.evaluate.cut_only:
            break
        uniform = _best_of(ctx, "uniform", MixturePlan.from_json(chosen))
        denoisers[f"{budget} cut only"] = DenoiserRef(f"{budget} cut only", uniform, elastic, cut_only=True, unit=ctx.job.elastic.unit)
    return denoisers
