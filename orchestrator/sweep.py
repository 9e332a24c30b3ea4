"""What would other budgets, samplers, agents and seeds give? Trials over the same elastic experts, as one more stage beside route."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator import figures_sweep, searching
from orchestrator.calibration import calibrate
from orchestrator.config import BudgetConfig, JobConfig
from orchestrator.pipeline import Context, Pipeline, Stage
from orchestrator.planning import Prepared
from orchestrator.searching import search_fronts
from orchestrator.stages import STAGES, agents_of, route_task, steps_served, training_rows
from orchestrator.store import read_object
from orchestrator.words import few_steps
from workers import diffusion, families, names_in, tasks_route
from workers.contracts import METRICS, Budget, InputError, Partition, RouteTask, digest_of
from workers.cost import require_reachable
from workers.files import replacing
from workers.trials import SearchTrial

TABLE = pa.schema(
    [
        ("metric", pa.string()),
        ("ratio", pa.float64()),
        ("sampler", pa.string()),
        ("steps", pa.int64()),
        ("agent", pa.string()),
        ("seed", pa.int64()),
        ("stopped_early", pa.bool_()),
        ("progress", pa.float64()),
        ("loss", pa.float64()),
        ("gain", pa.float64()),
        ("gain_error", pa.float64()),
        ("relative_search_loss", pa.float64()),
        ("search_seconds", pa.float64()),
        ("images", pa.int64()),
        ("shared_by", pa.int64()),
        ("macs_ratio", pa.float64()),
        ("time_ratio", pa.float64()),
        ("steps_per_expert", pa.list_(pa.int64())),
        ("shares", pa.list_(pa.float64())),
        ("plan", pa.string()),
        ("worker", pa.string()),
        ("loads", pa.int64()),
    ]
)
"""One row per trial. ``loss``: of the plan, on images that no agent searched on; ``gain``: how much lower than the uniform plan's, with its
standard error; null, as all of a plan, for a trial that was stopped early. ``relative_search_loss``: best so far, as a part of the uniform
plan's at the same budget and sampler. ``images``: that the search ran through sub-networks, or found run by another trial, a
gradient counting as three. ``shared_by``: trials that one search serves; its seconds and images are shared out evenly. ``time_ratio``:
predicted, where the sweep has a latency table. ``loads``: how often the trial's ``worker`` process had read the experts by then."""


@dataclass(frozen=True)
class Axes:
    """What is swept: a trial is one combination. ``samplers``: scheduler and steps, as in ``ddim:50``."""

    metric: str
    ratios: tuple[float, ...]
    samplers: tuple[str, ...]
    agents: tuple[str, ...]
    seeds: tuple[int, ...]
    stop_early: bool

    def budgets(self) -> dict[tuple[str, str], Budget]:
        """(name of the budget, sampler) -> the budget."""
        found = {}
        for sampler, ratio in itertools.product(self.samplers, self.ratios):
            scheduler, _, steps = sampler.partition(":")
            budget = Budget(self.metric, ratio, scheduler, int(steps))
            found[budget.name, sampler] = budget
        return found


def axes_of(
    job: JobConfig,
    *,
    budgets: str | None = None,
    metric: str | None = None,
    agents: str | None = None,
    seeds: str | None = None,
    samplers: str | None = None,
    stop_early: bool = True,
) -> Axes:
    """What a command asks for, comma-separated; what it leaves out is the job's. Raises: InputError, naming the option."""
    metric = metric or job.budgets[0].metric
    own = [b.ratio for b in job.budgets if b.metric == metric] or [b.ratio for b in job.budgets]
    ratios = own if budgets is None else [_number(part, "--budgets", float) for part in _parts(budgets, "--budgets")]
    for ratio in ratios:
        if not 0 < ratio <= 1:
            raise InputError(f"--budgets {ratio:g}: give parts of the dense model's {METRICS[metric]} above 0, at most 1")
    if len({f"{ratio:.2f}" for ratio in ratios}) != len(ratios):
        raise InputError(f"--budgets {', '.join(f'{r:g}' for r in ratios)}: they must differ in their first two decimals")
    chosen = agents_of(job) if agents is None else list(dict.fromkeys(["uniform", *_parts(agents, "--agents")]))
    for agent in chosen:
        if agent not in names_in("routers"):
            raise InputError(f"--agents {agent!r} is unknown: known are {', '.join(names_in('routers'))}")
    own_sampler = f"{job.sampler.scheduler}:{job.sampler.steps}"
    return Axes(
        metric=metric,
        ratios=tuple(sorted(ratios)),
        samplers=tuple(dict.fromkeys(map(_sampler, _parts(samplers, "--samplers") if samplers is not None else [own_sampler]))),
        agents=tuple(chosen),
        seeds=tuple(dict.fromkeys(_number(s, "--seeds", int) for s in _parts(seeds, "--seeds")) if seeds is not None else job.router.seeds),
        stop_early=stop_early,
    )


def _parts(text: str, option: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise InputError(f"{option} {text!r} is not a comma-separated list")
    return parts


def _number(text: str, option: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise InputError(f"{option} {text!r} is not a number") from None


def _sampler(text: str) -> str:
    scheduler, _, steps = text.partition(":")
    if scheduler not in diffusion.SAMPLERS:
        raise InputError(f"--samplers {text!r} is unknown: known are {', '.join(diffusion.SAMPLERS)}, each with its steps, e.g. ddim:50")
    if not steps.isdecimal() or int(steps) < 1:
        raise InputError(f"--samplers {text!r} says no number of steps: write e.g. {scheduler}:50")
    return f"{scheduler}:{int(steps)}"


def with_sweep(prepared: Prepared, axes: Axes) -> Prepared:
    """The checked job with the sweep as a stage after specialize: the same axes are the same folder, which is done or goes on.

    Raises: InputError if a sampler has more steps than the model, BudgetUnreachable if a MACs budget cannot be met.
    """
    scheduler = families.load_scheduler_config(prepared.job.model.path)
    for budget in axes.budgets().values():
        diffusion.sampler_timesteps(budget.scheduler, scheduler, budget.steps)
        if budget.metric == "macs":  # time has to be measured first
            require_reachable(prepared.table, budget.ratio, "--budgets")
    place = [stage.name for stage in STAGES].index("route")
    stage = Stage(
        name="sweep",
        run=functools.partial(sweep, axes),
        needs=("specialize",),
        reads=("router", "sweep"),
        ignores=("router.agents", "router.seeds"),
        version=10 * searching.VERSION + 1,  # what a search finds changes for both
    )
    timing = digest_of(prepared.job.timing().to_json()) if axes.metric == "latency" else ""
    before = prepared.pipeline
    settings = {**before.settings, "sweep": {**asdict(axes), "timing": timing}}
    pipeline = Pipeline((*STAGES[:place], stage, *STAGES[place:]), settings, before.identity, before.store)
    return replace(prepared, pipeline=pipeline)


def sweep(axes: Axes, ctx: Context) -> dict[str, Any]:
    """Every combination is one trial over the same elastic experts; leaves a table and a picture in the context's folder.

    Where one search of an agent serves all budgets, it is one task; the other trials are the cluster's search.
    """
    budgets = axes.budgets()
    asked = [BudgetConfig(metric=axes.metric, ratio=ratio) for ratio in axes.ratios]
    asking = replace(ctx, job=ctx.job.model_copy(update={"budgets": asked}))
    item, train = route_task(asking, "sweep"), training_rows(asking)
    of_sampler = {sampler: budget for (_, sampler), budget in budgets.items()}
    calibrated = {sampler: calibrate(asking, replace(item, budget=budget), train) for sampler, budget in of_sampler.items()}
    trials = {
        f"{name}/{sampler}/{agent}/{seed}": replace(calibrated[sampler], budget=budget, agent=agent, search_seed=seed)
        for ((name, sampler), budget), agent, seed in itertools.product(budgets.items(), axes.agents, axes.seeds)
    }

    def front(task: RouteTask, _: Sequence[Budget]) -> Path:
        return ctx.folder / f"front-{task.budget.scheduler}-{task.budget.steps}-{task.agent}-{task.search_seed}.json"

    found = search_fronts(ctx, trials, front)
    values = {
        "budget": list(dict.fromkeys(name for name, _ in budgets)),
        "sampler": list(axes.samplers),
        "agent": list(axes.agents),
        "seed": list(axes.seeds),
    }
    alone = {key: task for key, task in trials.items() if key not in found}
    found |= ctx.cluster.search(tasks_route.search_plan, values, alone, ctx.folder, axes.stop_early)
    served = steps_served(ctx.job.model.path, item.partition, [(budget.scheduler, budget.steps) for budget in of_sampler.values()])
    rows = [_row(task.budget, task.agent, task.search_seed, found[key], served) for key, task in trials.items()]
    with replacing(ctx.folder / "trials.parquet") as path:
        pq.write_table(pa.Table.from_pylist(rows, schema=TABLE), path)
    with replacing(ctx.folder / "pareto.png") as path:
        path.write_bytes(figures_sweep.pareto(rows))
    return {"axes": asdict(axes), "partition": item.partition.to_json(), "served": served}


def _row(budget: Budget, agent: str, seed: int, trial: SearchTrial, served: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    plan, sampler = trial.plan, f"{budget.scheduler}:{budget.steps}"
    timed = plan is not None and plan.dense_cost.latency_ms is not None
    return {
        "metric": budget.metric,
        "ratio": budget.ratio,
        "sampler": budget.scheduler,
        "steps": budget.steps,
        "agent": agent,
        "seed": seed,
        "stopped_early": plan is None,
        "progress": trial.progress,
        "loss": plan and plan.loss,
        "gain": plan and plan.gain,
        "gain_error": plan and plan.gain_error,
        "relative_search_loss": trial.relative_loss,
        "search_seconds": trial.seconds,
        "images": trial.images,
        "shared_by": trial.shared_by,
        "macs_ratio": plan and plan.macs_ratio,
        "time_ratio": plan.cost("latency") / plan.dense_cost.of("latency") if plan and timed else None,
        "steps_per_expert": list(served[sampler]),
        "shares": [steps / sum(served[sampler]) for steps in served[sampler]],
        "plan": plan and json.dumps(plan.to_json()),
        "worker": trial.worker,
        "loads": trial.loads,
    }


# --- showing --------------------------------------------------------------------------------------------------------


def read(run: Path, name: str | None = None) -> dict[str, Any]:
    """A finished sweep of a run folder, the newest or the named one, as JSON: where it lies, its axes, its rows, its warnings.

    Raises: InputError if there is none.
    """
    records = {
        path.parent.name: record
        for path in run.glob("sweep-????????/done.json")
        if (record := read_object(path, "result", "started", "seconds")) is not None
    }
    if not records:
        raise InputError(f"no finished sweep in {run}: start one with `diffpruning sweep run`")
    order = sorted(records, key=lambda folder: records[folder]["started"])
    folder = order[-1] if name is None else f"sweep-{name.removeprefix('sweep-')}"
    if folder not in records:
        raise InputError(f"no finished sweep {name} in {run}: there are {', '.join(f.removeprefix('sweep-') for f in order)}")
    result = records[folder]["result"]
    rows = pq.read_table(run / folder / "trials.parquet").to_pylist()
    for row in rows:
        row["plan"] = row["plan"] and json.loads(row["plan"])
        row.setdefault("images", None)  # a table of an older version
        row.setdefault("shared_by", 1)
    return {
        "id": folder.removeprefix("sweep-"),
        "folder": str(run / folder),
        "others": [f.removeprefix("sweep-") for f in order if f != folder],
        "seconds": round(records[folder]["seconds"], 1),
        "axes": result["axes"],
        "intervals": [interval.name for interval in Partition.from_json(result["partition"]).intervals],
        "steps_per_expert": result["served"],
        "warnings": few_steps(Partition.from_json(result["partition"]), result["served"]),
        "trials": rows,
        "table": str(run / folder / "trials.parquet"),
        "figure": str(run / folder / "pareto.png"),
    }


def text(found: dict[str, Any]) -> str:
    """The table, steps per expert, and what to be warned of."""
    rows = found["trials"]
    stopped, workers = sum(row["stopped_early"] for row in rows), len({row["worker"] for row in rows})
    timed = any(row["time_ratio"] is not None for row in rows)
    lines = [
        f"sweep {found['id']}: {len(rows)} trials" + (f", {stopped} of them stopped early" if stopped else "")
        + f", in {workers} worker process{'es' * (workers > 1)}",
        "",
        f"{'budget':<15}{'sampler':<17}{'agent':<16}{'seed':>4}{'loss':>10}{'gain':>9}{'+-':>8}{'/ uniform':>11}{'MACs':>8}"
        + f"{'time':>8}" * timed + f"{'seconds':>9}{'images':>11}   steps per expert",
    ]  # fmt: skip
    for row in sorted(rows, key=lambda r: (r["sampler"], -r["steps"], r["ratio"], r["stopped_early"], r["loss"] or 0)):
        losses = "".join(
            f"{'-':>{width}}" if row[key] is None else f"{row[key]:>{width}.{digits}f}"
            for key, width, digits in (("loss", 10, 4), ("gain", 9, 3), ("gain_error", 8, 3))
        )
        costs = [row["macs_ratio"]] + [row["time_ratio"]] * timed
        lines.append(
            f"{row['metric'] + '-' + format(row['ratio'], '.2f'):<15}{row['sampler'] + ':' + str(row['steps']):<17}{row['agent']:<16}"
            f"{row['seed']:>4}{losses}{row['relative_search_loss']:>11.3f}"
            + "".join(f"{'-':>8}" if cost is None else f"{cost:>8.3f}" for cost in costs)
            + f"{row['search_seconds']:>9.1f}"
            + (f"{'-':>11}   " if row["images"] is None else f"{row['images']:>11,}   ")
            + (f"stopped at {row['progress']:.0%}" if row["stopped_early"] else " ".join(map(str, row["steps_per_expert"])))
        )
    shared = {row["agent"]: row["shared_by"] for row in rows if row["shared_by"] > 1}
    lines += [f"{agent}: one search serves all {n} budgets; its seconds and images are shared out evenly" for agent, n in shared.items()]
    lines += ["", f"{'steps per expert':<18}" + "".join(f"{name:>14}" for name in found["intervals"])]
    lines += [f"{sampler:<18}" + "".join(f"{n:>14}" for n in counts) for sampler, counts in found["steps_per_expert"].items()]
    lines += [f"warning: {warning}" for warning in found["warnings"]]
    lines += ["", f"table     {found['table']}", f"figure    {found['figure']}"]
    if found["others"]:
        lines.append(f"others    {', '.join(found['others'])} (diffpruning sweep show JOB --id ID)")
    return "\n".join(lines)
