"""The report of a finished run: what was compressed, to what, what it costs, how good it is, whether to trust it.

`evidence` reads the run folder into values, `remarks` and `figures` make sentences and pictures of them, this file tables and the page.
No clock and no randomness: the same run gives the same bytes.
"""

from __future__ import annotations

import base64
import contextlib
import math
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

import jinja2

from orchestrator import __version__, figures, figures_quality
from orchestrator.evidence import Evidence, Measured, curves, gather, trainers, trials_of
from orchestrator.remarks import RELIABLE, remarks, uncertain_cuts, verdict
from orchestrator.store import read_json
from orchestrator.words import FEW_STEPS, dropped, gmacs, kernels, measured_under, of_dense, percent, predicted_ms, sig, span, spent, timing
from workers.contracts import Cost, InputError, MixturePlan
from workers.files import replacing
from workers.sensitivity import explain

if TYPE_CHECKING:
    from orchestrator.planning import Prepared


MOST_COLUMNS = 10
"""As many fit the width of the page."""

# --- the table of key figures ---------------------------------------------------------------------------------------


class Column(NamedTuple):
    """``best`` picks the best value of a budget; None where less is not simply better."""

    title: str
    unit: str
    values: list[float]
    form: str
    best: Callable[[Iterable[float]], float] | None = None

    def text(self, row: int) -> str:
        return format(self.values[row], self.form) if math.isfinite(self.values[row]) else ""


def _decimals(values: Sequence[float]) -> str:
    """One format for a whole column: three digits of its smallest value."""
    finite = [abs(v) for v in values if math.isfinite(v) and v]
    return f".{min(6, max(0, 2 - math.floor(math.log10(min(finite))))) if finite else 0}f"


def _metric(e: Evidence, key: str) -> list[float]:
    """Of every row; NaN where it was not measured, compares dense with itself, or stands in the row of the job's sampler already."""
    known = ["paired" in key and m is e.dense or "loss" in key and bool(m.sampler) for m in e.measured]
    values = [None if skip else m.metrics.get(key) for skip, m in zip(known, e.measured, strict=True)]
    return [math.nan if value is None else float(value) for value in values]


def quality_columns(e: Evidence) -> list[Column]:
    """How good every row is, one value each."""
    loss, mse, lpips = _metric(e, "denoising_loss"), _metric(e, "paired_mse"), _metric(e, "paired_lpips")
    rise = [math.nan, *(v / loss[0] - 1 for v in loss[1:])]
    small = min((abs(v) for v in rise if math.isfinite(v)), default=0) < 0.1
    distances = {"FD": _metric(e, "frechet"), "KID": _metric(e, "kid")}
    return [
        *(Column(name, "to images", v, _decimals(v), min) for name, v in distances.items() if any(map(math.isfinite, v))),
        Column("loss", "denoising", loss, _decimals(loss), min),
        Column("loss", "over dense", rise, "+.1%" if small else "+.0%", min),
        Column("MSE", "to dense", mse, _decimals(mse), min),
        *([Column("LPIPS", "to dense", lpips, _decimals(lpips), min)] if any(map(math.isfinite, lpips)) else []),
        Column("PSNR", "dB", _metric(e, "paired_psnr_db"), ".2f", max),
        Column("SSIM", "to dense", _metric(e, "paired_ssim"), ".3f", max),
    ]


def cost_columns(e: Evidence) -> list[Column]:
    """What every row costs, one value each; left out where nothing was measured, or it would repeat its neighbour."""
    dense, dense_ms = e.chosen[0].dense_cost, next((plan.dense_cost.latency_ms for plan in e.chosen if predicted_ms(plan)), None)

    def weighted(of: Callable[[Cost], int]) -> list[float]:
        def one(m: Measured) -> float:
            if m.plan is None:
                return of(dense) / 1e9
            if m.sampler:  # under which experts serve other parts of the steps
                return math.nan
            return sum(share * of(cost) for share, cost in zip(m.plan.shares, m.plan.expert_costs, strict=True)) / 1e9

        return [one(m) for m in e.measured]

    macs, bare = weighted(lambda cost: cost.macs), weighted(lambda cost: cost.macs_without_attention)
    exported, memory, time = _metric(e, "gmacs_per_step"), _metric(e, "peak_memory_mib"), _metric(e, "ms_per_step")
    known = [(None if m.sampler else predicted_ms(m.plan)) if m.plan else dense_ms for m in e.measured]
    predicted = [math.nan if value is None else value for value in known]
    params = [[cost.params / 1e6 for cost in (m.plan.expert_costs if m.plan else (dense,))] for m in e.measured]
    every, largest = list(map(sum, params)), list(map(max, params))
    kept = [count / 1e6 for count in _metric(e, "parameters")]
    images, seconds = _metric(e, "trained_images"), _metric(e, "trainer_seconds")
    columns = [
        Column("MACs", "of dense", [v / macs[0] for v in macs], ".1%"),
        Column("GMACs", "per step", macs, _decimals(macs)),
        Column("GMACs", "no attention*", bare, _decimals(bare)) if dense.attention_macs else None,
        Column("GMACs", "exported", exported, _decimals(exported)) if _differ(exported, macs) else None,
        Column("parameters", "all, M", every, _decimals(largest)),
        Column("parameters", "largest, M", largest, _decimals(largest)),
        Column("parameters", "exported, M", kept, _decimals(largest)) if _differ(kept, every) else None,
        Column("memory", "peak, MiB", memory, ".0f", min) if _differ(memory, [0] * len(memory)) else None,
        Column("trained", "images", images, ",.0f") if any(map(math.isfinite, images)) else None,
        Column("trained", "trainer s", seconds, ",.0f") if any(map(math.isfinite, seconds)) else None,
        Column("time", "ms / step", time, _decimals(time), min),
        Column("time", "of dense", [e.time_ratio(m) * e.dense.metrics["calls"] / m.metrics["calls"] for m in e.measured], ".0%", min),
        Column("time", "all steps", _metric(e, "relative_time"), ".0%", min) if any(m.sampler for m in e.measured) else None,
        *(
            (
                Column("predicted", "ms / step", predicted, _decimals(predicted)),
                Column("predicted", "of dense", [v / predicted[0] for v in predicted], ".0%"),
            )
            if dense_ms
            else ()
        ),
    ]
    return [column for column in columns if column]


def fitted(columns: list[Column]) -> list[list[Column]]:
    """The cost columns as one table, or as two, of counts and of times, where one would be wider than the page."""
    if len(columns) <= MOST_COLUMNS:
        return [columns]
    times = [column for column in columns if column.title in ("time", "predicted")]
    return [[column for column in columns if column not in times], times]


def _differ(values: Sequence[float], others: Sequence[float]) -> bool:
    """Whether any value was measured that is not about the other, where that is known."""
    pairs = zip(values, others, strict=True)
    return any(math.isfinite(v) and not math.isnan(other) and not math.isclose(v, other, rel_tol=1e-3) for v, other in pairs)


Row = tuple[str, list[tuple[str, bool]]]


def key_rows(e: Evidence, columns: Sequence[Column]) -> dict[str, list[Row]]:
    """Budget -> rows of (name, cells of (text, whether it reads as the best of its budget)); dense stands under an empty name."""
    groups: dict[str, list[Row]] = {}
    for row, m in enumerate(e.measured):
        rivals = [i for i, other in enumerate(e.measured) if other.budget == m.budget and not other.sampler]
        cells = []
        for column in columns:
            finite = [column.values[i] for i in rivals if math.isfinite(column.values[i])]
            best = column.best(finite) if column.best and m.plan and not m.sampler and len(rivals) > 1 and finite else None
            cells.append((column.text(row), best is not None and column.text(row) == format(best, column.form)))
        allocation = figures.ALLOCATIONS.get(m.kind) or (f"{m.kind}, trained alike" if m.plan else m.kind)
        name = f"mixture ({m.plan.agent})" if m.plan and m.kind == "mixture" else allocation
        name += f" {m.sampler}" if m.sampler else ""
        name += f" = {m.same_as}" if m.same_as else ""
        groups.setdefault(of_dense(m.plan.budget) if m.plan else "", []).append((name, cells))
    return groups


# --- the experts of a plan ------------------------------------------------------------------------------------------


class ExpertRow(NamedTuple):
    """One expert of a plan: the sampler's steps that it serves, its part of them, how much an error of it counts per step (1 on average),
    its cost as a part of dense, and why it is so."""

    name: str
    steps: int
    share: float
    influence: float
    cost: float
    params: int
    reasons: list[str]


def expert_rows(plan: MixturePlan, influence: Sequence[float]) -> list[ExpertRow]:
    """From clean to noisy."""
    names, metric = [span(interval) for interval in plan.partition.intervals], plan.budget.metric
    reasons = plan.reasons or ((),) * len(names)
    return [
        ExpertRow(
            name,
            round(share * plan.budget.steps),
            share,
            counts,
            cost.of(metric) / plan.dense_cost.of(metric),
            cost.params,
            explain([replace(reason, site=figures.short_name(reason.site)) for reason in why]),
        )
        for name, share, counts, cost, why in zip(names, plan.shares, influence, plan.expert_costs, reasons, strict=True)
    ]


# --- the page -------------------------------------------------------------------------------------------------------


def draw(e: Evidence) -> dict[str, bytes]:
    """Every figure as PNG, by name."""
    plans = {f"{of_dense(plan.budget)} ({plan.agent})": plan for plan in e.chosen}
    shown = [m for m in e.distinct if not m.sampler and (m.kind != "cut only" or (m.plan and m.plan.budget == e.smallest.budget))]
    cut = e.results["partition"]
    curve = {int(k): float(v) for k, v in cut["curve"].items()}
    drawn = {
        "samples": figures.samples(shown, e.classes),
        "pareto": figures_quality.pareto(e),
        "timesteps": figures_quality.timesteps([m for m in e.distinct if not m.sampler], e.partition.boundaries),
        "similarity": figures.similarity(e.matrix, e.partitions, cut["boundary_frequency"], curve),
        "architecture": figures.architecture(plans, e.prepared.table.space.sites),
        "cost": figures.cost(plans),
    }
    if found := curves(e)[0]:
        drawn["training"] = figures.training(found)
    if timed := trainers(e):
        drawn["timeline"] = figures.timeline(timed)
    return drawn


def _scheduler_class(e: Evidence, plan: MixturePlan, version: str) -> str | None:
    """The diffusers class of a published version's scheduler; None if it cannot be read."""
    made = e.prepared.store.stage_folder("publish", e.prepared.pipeline.fingerprints["publish"]) / f"mixture-{plan.budget.name}"
    folder = made if "://" in version else Path(version)  # a version in a bucket is as it was made
    with contextlib.suppress(OSError, InputError, AttributeError):
        return (read_json(folder / "scheduler" / "scheduler_config.json") or {}).get("_class_name")
    return None


def _pipeline_class(model: str) -> str:
    """The class that loads the dense model's pipeline with a mixture inside."""
    with contextlib.suppress(OSError, InputError, AttributeError):
        return (read_json(Path(model) / "model_index.json") or {}).get("_class_name") or "DiffusionPipeline"
    return "DiffusionPipeline"


def is_current(prepared: Prepared) -> bool:
    """Whether the run folder's page tells of exactly this job's results: settings may have changed and changed back."""
    page = prepared.store.folder / "report.html"
    return page.exists() and f'content="{prepared.pipeline.fingerprints["publish"]}"' in page.read_text()


def build(prepared: Prepared) -> Path:
    """Write ``figures/*.png`` and the self-contained ``report.html`` into the run folder. Raises: InputError if the run is not finished."""
    e = gather(prepared)
    drawn, published, latency = draw(e), e.results["publish"]["published"], prepared.job.latency
    made = [(plan, published[plan.budget.name]) for plan in e.chosen]
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    templates = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    templates.filters.update(percent=percent, sh=shlex.quote, py=repr, sig=sig, dropped=dropped, of_dense=of_dense)
    page = templates.get_template("report.html").render(
        e=e,
        job=prepared.job,
        verdict=verdict(e),
        remarks=remarks(e),
        warnings=[remark.text for remark in uncertain_cuts(e) if remark.level == "warning"],
        tables=[(columns, key_rows(e, columns)) for columns in (quality_columns(e), *fitted(cost_columns(e)))],
        measured_under=measured_under(e.dense.metrics["protocol"], [m.metrics for m in e.measured])
        if e.dense.metrics.get("protocol")
        else "",
        faster=any(m.sampler for m in e.measured if m.plan is None),
        timing=timing(latency.batch, latency.dtype, latency.compile, latency.cuda_graphs, latency.fused_kernels),
        device=e.dense.metrics.get("device") or "this run's device",
        pipeline=_pipeline_class(prepared.job.model.path),
        trials=[(plan, trials_of(e, plan)) for plan in e.chosen],
        tried=any(trial.distance is not None for trial in e.trials),
        experts=[(plan, expert_rows(plan, e.results["route"]["influence"])) for plan in e.chosen],
        few_steps=FEW_STEPS,
        search=spent(e.results["route"]["seconds"], e.training_s),
        kernels=kernels,
        overlaps=[figures.overlap(stage, group) for stage, group in trainers(e).items()],
        missing=curves(e)[1],
        published=[(plan, found, _scheduler_class(e, plan, found["path"])) for plan, found in made],
        gmacs=gmacs,
        fingerprint=prepared.pipeline.fingerprints["publish"],
        versions={"diffpruning": __version__, **{name: version(name) for name in ("torch", "diffusers", "numpy")}},
        median_reliability=median(e.matrix.reliability),
        reliable=RELIABLE,
        small=figures.SMALL,
        images={name: "data:image/png;base64," + base64.b64encode(png).decode() for name, png in drawn.items()},
    )
    folder = prepared.store.folder / "figures"
    folder.mkdir(exist_ok=True)
    for name, png in drawn.items():
        _write(folder / f"{name}.png", png)
    return _write(prepared.store.folder / "report.html", page.encode())


def _write(path: Path, content: bytes) -> Path:
    with replacing(path) as temporary:
        temporary.write_bytes(content)
    return path
