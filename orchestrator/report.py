"""The report of a finished run: what was compressed, to what, what it costs, how good it is, whether to trust it.

`gather` reads the run folder into values, the functions below it make sentences and tables of them, `build` writes the page.
No clock and no randomness: the same run gives the same bytes.
"""

from __future__ import annotations

import base64
import contextlib
import math
import os
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2
import numpy as np

from orchestrator import __version__, figures
from orchestrator.figures import RELIABLE, RETURNED, Measured, Points, Trainer, both, dropped, percent, sig, span
from orchestrator.store import read_json
from workers.contracts import ExpertCheckpoint, InputError, Interval, MixturePlan, Partition, SimilarityMatrix

if TYPE_CHECKING:
    from orchestrator.planning import Prepared

KINDS = {"mixture": "", "uniform": " uniform", "cut only": " cut only"}
"""What is measured per budget -> what its label in the metrics adds to the budget's name."""
FAR = 0.25
"""Samples are far from dense's above this part of the MSE between unrelated samples."""


@dataclass(frozen=True)
class Evidence:
    """Everything the report looks at. ``measured``: dense first, then budget by budget in the order of `KINDS`."""

    prepared: Prepared
    results: Mapping[str, dict[str, Any]]
    seconds: Mapping[str, float]
    matrix: SimilarityMatrix
    partition: Partition
    partitions: Mapping[str, tuple[Partition, float]]
    """The chosen one first, then the baselines, each with its cost."""
    trials: tuple[MixturePlan, ...]
    chosen: tuple[MixturePlan, ...]
    specialized: tuple[ExpertCheckpoint, ...]
    measured: tuple[Measured, ...]

    @property
    def dense(self) -> Measured:
        return self.measured[0]

    def find(self, plan: MixturePlan, kind: str) -> Measured | None:
        """What was measured of a kind at a plan's budget."""
        return next((m for m in self.measured if m.plan and m.plan.budget == plan.budget and m.kind == kind), None)

    def mixture(self, plan: MixturePlan) -> Measured:
        return next(m for m in self.measured if m.plan == plan and m.kind == "mixture")

    @property
    def smallest(self) -> MixturePlan:
        return min(self.chosen, key=lambda plan: plan.budget.ratio)

    @property
    def unrelated_mse(self) -> float:
        """How far dense samples of different noise are from each other: what an MSE is to be compared with. NaN for one sample."""
        samples = self.dense.samples.astype(np.float64)
        return float(np.square(samples - np.roll(samples, 1, axis=0)).mean()) if len(samples) > 1 else math.nan


def gather(prepared: Prepared) -> Evidence:
    """Read the finished run. Raises: InputError naming the stage that is not done."""
    records: dict[str, dict[str, Any]] = {}
    for stage, fingerprint in prepared.pipeline.fingerprints.items():
        record = prepared.store.done(stage, fingerprint)
        if record is None:
            raise InputError(f"no report yet: stage {stage} is not done in {prepared.store.folder}; `diffpruning run` does what is missing")
        records[stage] = record
    results = {stage: record["result"] for stage, record in records.items()}
    trials = tuple(map(MixturePlan.from_json, results["route"]["trials"]))
    chosen = tuple(map(MixturePlan.from_json, results["route"]["chosen"].values()))
    metrics, trained = results["publish"]["metrics"], results["finetune"]["experts"]
    with np.load(prepared.store.stage_folder("publish", prepared.pipeline.fingerprints["publish"]) / "samples.npz") as arrays:
        samples = {label: arrays[label] for label in metrics}
    measured = [Measured("dense", None, metrics["dense"], samples["dense"])]
    for best in chosen:
        uniform = next((trial for trial in trials if trial.agent == "uniform" and trial.budget == best.budget), best)
        for kind, suffix in KINDS.items():
            if (label := best.budget.name + suffix) in metrics:
                plan = best if kind == "mixture" else uniform
                names = [] if kind == "cut only" else [f"{plan.budget.name}-{plan.agent}-{i.name}" for i in plan.partition.intervals]
                experts = tuple(ExpertCheckpoint.from_json(trained[name]) for name in names)
                measured.append(Measured(kind, plan, metrics[label], samples[label], experts))
    cut = results["partition"]
    partitions = {"chosen": cut, **cut["baselines"]}
    return Evidence(
        prepared=prepared,
        results=results,
        seconds={stage: float(record["seconds"]) for stage, record in records.items()},
        matrix=SimilarityMatrix.from_json(results["analyze"]["similarity"]),
        partition=Partition.from_json(cut["partition"]),
        partitions={name: (Partition.from_json(p["partition"]), float(p["cost"])) for name, p in partitions.items()},
        trials=trials,
        chosen=chosen,
        specialized=tuple(map(ExpertCheckpoint.from_json, results["specialize"]["experts"])),
        measured=tuple(measured),
    )


# --- sentences ------------------------------------------------------------------------------------------------------


LEVELS = ("warning", "note", "good")


class Remark(NamedTuple):
    """One thing to know before trusting the numbers; ``level`` is one of `LEVELS`."""

    level: str
    text: str


def verdict(e: Evidence) -> str:
    """What was made and, at the smallest budget, how far it is from dense."""
    count, mixture, cut_only = len(e.chosen), e.mixture(e.smallest), e.find(e.smallest, "cut only")
    head = dict(enumerate(("A mixture", "Two mixtures", "Three mixtures", "Four mixtures"), 1)).get(count, f"{count} mixtures")
    budgets = both(percent(plan.budget.ratio) for plan in e.chosen)
    aside = []
    if cut_only and mixture.mse:
        times = cut_only.mse / mixture.mse
        worse = f"i.e. {times:,.{int(times < 10)}f}x worse" if times > 1.05 else "no worse"
        aside.append(f"cut without training: {sig(cut_only.mse)}, {worse}")
    if not math.isnan(e.unrelated_mse):
        aside.append(f"two unrelated dense samples: {sig(e.unrelated_mse)}")
    loss = mixture.metrics["denoising_loss"] / e.dense.metrics["denoising_loss"]
    time = mixture.metrics["ms_per_step"] / e.dense.metrics["ms_per_step"]
    return (
        f"{head} of {len(e.partition)} expert{'s' * (len(e.partition) > 1)} at {budgets} of the dense model's MACs. "
        f"At {mixture.budget}, samples differ from dense by MSE {sig(mixture.mse)}" + (f" ({'; '.join(aside)})" if aside else "") + "; "
        f"the denoising loss is {loss:.2f}x and the time of a step {time:.2f}x the dense model's."
    )


def remarks(e: Evidence) -> list[Remark]:
    """Whether to trust it: what speaks against it first."""
    found = [remark for plan in e.chosen for remark in (_against_uniform(e, plan), _agents(e, plan), _time(e, plan))]
    return sorted([*_far_from_dense(e), *found, *_cuts(e), *_few_steps(e)], key=lambda remark: LEVELS.index(remark.level))


def _against_uniform(e: Evidence, plan: MixturePlan) -> Remark:
    """Is the allocation worth anything? Paired over samples, so that the difference comes with its standard error."""
    mixture, uniform = e.mixture(plan), e.find(plan, "uniform")
    at = f"At {mixture.budget}, the mixture"
    if uniform is None and any(trial.agent == "uniform" and trial.experts == plan.experts for trial in trials_of(e, plan)):
        return Remark("warning", f"{at} is the uniform allocation itself: no agent found a better one.")
    if uniform is None:
        return Remark("note", f"{at} was not compared with the uniform allocation under the same fine-tuning (finetune.compare_uniform).")
    errors = [np.square(m.samples.astype(np.float64) - e.dense.samples).mean(axis=(1, 2, 3)) for m in (mixture, uniform)]
    difference, n = errors[0] - errors[1], len(errors[0])
    mean, spread = float(difference.mean()), float(difference.std(ddof=1) / math.sqrt(n)) if n > 1 else math.inf
    numbers = f"paired MSE {sig(mixture.mse)} against {sig(uniform.mse)} (difference {mean:+.2g}, standard error {spread:.2g}, {n} samples)"
    rise = mixture.metrics["denoising_loss"] / uniform.metrics["denoising_loss"] - 1
    numbers += f"; but its denoising loss is {rise:.1%} higher" if mean < 0 < rise else ""
    if mean >= 0:
        return Remark("warning", f"{at} does not beat the uniform allocation with the same fine-tuning: {numbers}.")
    if -mean <= 2 * spread:
        return Remark("note", f"{at} is ahead of the uniform allocation with the same fine-tuning, but not clearly: {numbers}.")
    return Remark("good" if rise <= 0 else "note", f"{at} beats the uniform allocation with the same fine-tuning: {numbers}.")


def trials_of(e: Evidence, plan: MixturePlan) -> list[MixturePlan]:
    """All trials of a plan's budget, best first."""
    return sorted((trial for trial in e.trials if trial.budget == plan.budget), key=lambda trial: trial.loss)


def _agents(e: Evidence, plan: MixturePlan) -> Remark:
    """Which agent found the plan, and whether the learned one (era) earned its place."""
    best: dict[str, MixturePlan] = {}
    for trial in trials_of(e, plan):
        best.setdefault(trial.agent, trial)
    at, era = f"At {percent(plan.budget.ratio)},", best.pop("era", None)
    if era is None or not best:
        losses = ", ".join(f"{agent} {trial.loss:.4g}" for agent, trial in best.items())
        return Remark("note", f"{at} {plan.agent} was chosen (search loss: {losses or format(plan.loss, '.4g')}); era was not compared.")
    ahead = {agent: trial for agent, trial in best.items() if not era.loss < trial.loss}
    if not ahead:
        rest = both(f"{agent} {trial.loss:.4g} ({trial.loss / era.loss - 1:+.1%})" for agent, trial in best.items())
        narrowly = ", narrowly" if min(trial.loss for trial in best.values()) < 1.02 * era.loss else ""
        return Remark("good", f"{at} era found the best plan{narrowly}: search loss {era.loss:.4g}, against {rest}.")
    rest = both(
        f"{agent} {trial.loss:.4g} " + ("with the same plan" if trial.experts == era.experts else f"with {dropped(trial)} dropped")
        for agent, trial in ahead.items()
    )
    lost = f"search loss {era.loss:.4g} with {dropped(era)} branches dropped, against {rest}"
    return Remark("warning", f"{at} era did not beat {both(ahead)} here: {lost}. The plan of {plan.agent} is used.")


def _time(e: Evidence, plan: MixturePlan) -> Remark:
    ratio = e.mixture(plan).metrics["ms_per_step"] / e.dense.metrics["ms_per_step"]
    at = f"At {percent(plan.budget.ratio)}"
    text = f"{at}, a step takes {ratio:.0%} of the dense model's time on this device, with {plan.cost_ratio:.0%} of its MACs"
    if ratio >= 1:
        return Remark("warning", f"{text}: no time is saved.")
    return Remark("good" if 1 - ratio >= 0.75 * (1 - plan.cost_ratio) else "note", f"{text}.")


def _far_from_dense(e: Evidence) -> list[Remark]:
    """Too far to replace dense: the MSE is no small part of that between unrelated samples."""
    far = [m for m in map(e.mixture, e.chosen) if m.mse > FAR * e.unrelated_mse]
    if not far:
        return []
    parts = both(f"{m.mse / e.unrelated_mse:.0%}" for m in far)
    text = f"At {both(m.budget for m in far)}, samples are far from dense's: {parts} of the MSE between unrelated samples."
    return [Remark("warning", f"{text} Train longer (specialize.steps, finetune.steps) or allow a larger budget.")]


def _cuts(e: Evidence) -> list[Remark]:
    """How sure the cuts are."""
    typical, frequency = median(e.matrix.reliability), e.results["partition"]["boundary_frequency"]
    unsure = [f"t = {b} ({f:.0%})" for b, f in zip(e.partition.boundaries, frequency, strict=True) if f < RETURNED]
    found = []
    if typical < RELIABLE:
        found.append(f"the similarity of timesteps is unreliable (median reliability {typical:.2f} with {e.matrix.images} images)")
    if unsure:
        found.append(f"the {'cut' if len(unsure) == 1 else 'cuts'} at {both(unsure)} came back in too few bootstrap resamples")
    if found:
        return [Remark("warning", f"More images needed: {', and '.join(found)}. Raise similarity.images.")]
    sure = f"every cut came back in at least {min(frequency):.0%} of bootstrap resamples, " if frequency else ""
    return [Remark("good", f"The cuts are stable: {sure}median reliability {typical:.2f}.")]


def _few_steps(e: Evidence) -> list[Remark]:
    plan = e.chosen[0]
    served = {span(i): round(share * plan.budget.steps) for i, share in zip(plan.partition.intervals, plan.shares, strict=True)}
    few = [f"{name} ({steps} of {plan.budget.steps})" for name, steps in served.items() if steps < 2]
    return [Remark("warning", f"Fewer than two sampler steps for the expert of {both(few)}.")] if few else []


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


def key_columns(e: Evidence) -> list[Column]:
    """What is compared, one value per measured denoiser; values that compare dense with itself are left out."""
    costs = [m.plan.expert_costs if m.plan else (e.chosen[0].dense_cost,) for m in e.measured]
    every, largest = [sum(c.params for c in one) / 1e6 for one in costs], [max(c.params for c in one) / 1e6 for one in costs]
    macs = [m.plan.macs / 1e9 if m.plan else e.chosen[0].dense_cost.macs / 1e9 for m in e.measured]

    def of(key: str) -> list[float]:
        values = [m.metrics[key] if m.plan or not key.startswith("paired") else None for m in e.measured]
        return [math.nan if value is None else float(value) for value in values]

    loss, mse, time = of("denoising_loss"), of("paired_mse"), of("ms_per_step")
    rise = [math.nan, *(v / loss[0] - 1 for v in loss[1:])]
    return [
        Column("MACs", "of dense", [v / macs[0] for v in macs], ".1%"),
        Column("GMACs", "per step", macs, _decimals(macs)),
        Column("parameters", "all, M", every, _decimals(largest)),
        Column("parameters", "largest, M", largest, _decimals(largest)),
        Column("loss", "denoising", loss, _decimals(loss), min),
        Column("loss", "over dense", rise, "+.1%" if min(map(abs, rise[1:])) < 0.1 else "+.0%", min),
        Column("MSE", "to dense", mse, _decimals(mse), min),
        Column("PSNR", "dB", of("paired_psnr_db"), ".2f", max),
        Column("SSIM", "to dense", of("paired_ssim"), ".3f", max),
        Column("time", "ms / step", time, _decimals(time), min),
        Column("time", "of dense", [v / time[0] for v in time], ".0%", min),
    ]


Row = tuple[str, list[tuple[str, bool]]]


def key_rows(e: Evidence, columns: Sequence[Column]) -> dict[str, list[Row]]:
    """Budget -> rows of (name, cells of (text, whether it reads as the best of its budget)); dense stands under an empty name."""
    groups: dict[str, list[Row]] = {}
    for row, m in enumerate(e.measured):
        rivals = [i for i, other in enumerate(e.measured) if other.budget == m.budget]
        cells = []
        for column in columns:
            best = column.best(column.values[i] for i in rivals) if column.best and len(rivals) > 1 else None
            cells.append((column.text(row), best is not None and column.text(row) == format(best, column.form)))
        name = f"mixture ({m.plan.agent})" if m.plan and m.kind == "mixture" else figures.ALLOCATIONS.get(m.kind, m.kind)
        groups.setdefault(m.budget, []).append((name, cells))
    return groups


# --- training runs --------------------------------------------------------------------------------------------------


def trainers(e: Evidence) -> dict[str, list[Trainer]]:
    """Every training run, per stage, that recorded its time."""
    found: dict[str, list[Trainer]] = {}
    for stage, prefix, experts in [("specialize", "", e.specialized), *(("finetune", f"{m.name}  ", m.experts) for m in e.measured)]:
        timed = [Trainer(prefix + span(x.interval), x.interval, x.started, x.ended) for x in experts if x.ended > x.started]
        found[stage] = found.get(stage, []) + timed
    return {stage: group for stage, group in found.items() if group}


def history(expert: ExpertCheckpoint, run_folder: Path) -> Points | None:
    """[(step, loss)] from the checkpoint's description; None if it cannot be read."""
    try:
        about = read_json(run_folder / expert.path / "checkpoint.json") or {}
        return [(int(step), float(loss)) for step, loss in about["history"]] or None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def curves(e: Evidence) -> tuple[dict[str, dict[Interval, Points]], list[str]]:
    """Loss curves: "specialize", then every fine-tuned mixture, by interval; and the names of those that cannot be read."""
    found: dict[str, dict[Interval, Points]] = {}
    missing = []
    for name, experts in [("specialize", e.specialized), *((m.name, m.experts) for m in e.measured if m.experts)]:
        for expert in experts:
            if points := history(expert, e.prepared.store.folder):
                found.setdefault(name, {})[expert.interval] = points
            else:
                missing.append(f"{name} {span(expert.interval)}")
    return found, missing


# --- the page -------------------------------------------------------------------------------------------------------


def draw(e: Evidence) -> dict[str, bytes]:
    """Every figure as PNG, by name."""
    plans = {f"{percent(plan.budget.ratio)} of dense MACs ({plan.agent})": plan for plan in e.chosen}
    shown = [m for m in e.measured if m.kind != "cut only" or (m.plan and m.plan.budget == e.smallest.budget)]
    cut = e.results["partition"]
    curve = {int(k): float(v) for k, v in cut["curve"].items()}
    drawn = {
        "samples": figures.samples(shown),
        "pareto": figures.pareto(e.measured, e.unrelated_mse, e.partition.boundaries),
        "similarity": figures.similarity(e.matrix, e.partitions, cut["boundary_frequency"], curve),
        "architecture": figures.architecture(plans, e.prepared.table.space.sites),
        "cost": figures.cost(plans),
    }
    if found := curves(e)[0]:
        drawn["training"] = figures.training(found)
    if timed := trainers(e):
        drawn["timeline"] = figures.timeline(timed)
    return drawn


def _scheduler_class(version: str) -> str | None:
    """The diffusers class of a published version's scheduler; None if it cannot be read."""
    with contextlib.suppress(OSError, InputError, AttributeError):
        return (read_json(Path(version) / "scheduler" / "scheduler_config.json") or {}).get("_class_name")
    return None


def is_current(prepared: Prepared) -> bool:
    """Whether the run folder's page tells of exactly this job's results: settings may have changed and changed back."""
    page = prepared.store.folder / "report.html"
    return page.exists() and f'content="{prepared.pipeline.fingerprints["publish"]}"' in page.read_text()


def build(prepared: Prepared) -> Path:
    """Write ``figures/*.png`` and the self-contained ``report.html`` into the run folder. Raises: InputError if the run is not finished."""
    e = gather(prepared)
    drawn, columns, published = draw(e), key_columns(e), e.results["publish"]["published"]
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    templates = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    templates.filters.update(percent=percent, sh=shlex.quote, py=repr, sig=sig, dropped=dropped)
    page = templates.get_template("report.html").render(
        e=e,
        job=prepared.job,
        verdict=verdict(e),
        remarks=remarks(e),
        warnings=[remark.text for remark in _cuts(e) if remark.level == "warning"],
        columns=columns,
        groups=key_rows(e, columns),
        trials=[(plan, trials_of(e, plan)) for plan in e.chosen],
        overlaps=[figures.overlap(stage, group) for stage, group in trainers(e).items()],
        missing=curves(e)[1],
        published=[(plan, published[plan.budget.name], _scheduler_class(published[plan.budget.name]["path"])) for plan in e.chosen],
        fingerprint=prepared.pipeline.fingerprints["publish"],
        versions={"diffpruning": __version__, **{name: version(name) for name in ("torch", "diffusers", "numpy")}},
        median_reliability=median(e.matrix.reliability),
        reliable=RELIABLE,
        images={name: "data:image/png;base64," + base64.b64encode(png).decode() for name, png in drawn.items()},
    )
    folder = prepared.store.folder / "figures"
    folder.mkdir(exist_ok=True)
    for name, png in drawn.items():
        _write(folder / f"{name}.png", png)
    return _write(prepared.store.folder / "report.html", page.encode())


def _write(path: Path, content: bytes) -> Path:
    """Atomically: beside, then renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
