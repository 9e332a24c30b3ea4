"""What a finished run measured, read from its folder into values: figures, remarks and tables look at nothing else."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from orchestrator.evaluation import samples_of
from orchestrator.experts import unit
from orchestrator.store import read_json
from orchestrator.words import CUT_ONLY, label, predicted_ms, span
from workers.contracts import ExpertCheckpoint, InputError, Interval, MixturePlan, Partition, SimilarityMatrix, derive_seed
from workers.latency_table import LatencyTable
from workers.protocol import common_protocol

if TYPE_CHECKING:
    from orchestrator.planning import Prepared


@dataclass(frozen=True)
class Measured:
    """One row of the evaluation: ``kind`` is dense, mixture, another agent's name, or cut only; ``plan`` is None for dense.

    ``sampler`` is empty for the job's own; else this was drawn with it, as in ``ddim:25``.
    """

    kind: str
    plan: MixturePlan | None
    metrics: Mapping[str, Any]
    samples: np.ndarray
    """[n, C, H, W] in [-1, 1]; the same n noises for every denoiser."""
    experts: tuple[ExpertCheckpoint, ...] = ()
    """Empty where nothing was trained for this row."""
    sampler: str = ""
    same_as: str = ""
    """The label of the row before it that is the same mixture, if there is one."""

    @property
    def budget(self) -> str:
        return label(self.plan.budget) if self.plan else ""

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.budget, self.kind, self.sampler)))

    @property
    def mse(self) -> float:
        return float(self.metrics["paired_mse"])


class Trainer(NamedTuple):
    """One training run on the clock, in seconds since the epoch."""

    name: str
    interval: Interval
    started: float
    ended: float


Points = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Evidence:
    """Everything the report looks at. ``measured``: dense first, then by budget, what is under further samplers after its own row."""

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
    classes: tuple[int, ...] | None = None
    """Of every sample; None for an unconditional model."""
    latency: tuple[Path, LatencyTable] | None = None
    """The table by which latency budgets were met, and where it lies."""

    @property
    def dense(self) -> Measured:
        return self.measured[0]

    @property
    def quality(self) -> str:
        """The metric that rows are compared by, less being better: the Frechet distance where it was measured."""
        return "paired_mse" if self.dense.metrics.get("frechet") is None else "frechet"

    @property
    def distinct(self) -> list[Measured]:
        """What is worth drawing: every mixture, and of what else was measured all that is not the same as a row before it."""
        return [m for m in self.measured if not m.same_as or m.kind == "mixture"]

    @property
    def training_s(self) -> float:
        """Workers' time of training all experts, elastic and small, each once."""
        trained = [*self.results["specialize"]["experts"], *self.results["finetune"]["experts"].values()]
        seconds = {expert["path"]: expert.get("seconds", 0.0) for expert in trained}
        return sum(seconds.values()) * self.prepared.job.resources.workers_per_expert

    def macs_ratio(self, m: Measured) -> float:
        """MACs of a whole trajectory, dense's under the job's sampler being 1."""
        step = m.plan.macs_ratio if m.plan else 1.0
        if m.plan and m.sampler:  # under which experts serve other parts of the steps than the plan says
            own = next(other for other in self.measured if (other.kind, other.plan, other.sampler) == (m.kind, m.plan, ""))
            step *= m.metrics["gmacs_per_step"] / own.metrics["gmacs_per_step"]
        return float(m.metrics["calls"] / self.dense.metrics["calls"] * step)

    def time_ratio(self, m: Measured) -> float:
        """Measured time of a whole trajectory, dense's under the job's sampler being 1."""
        return float(m.metrics["relative_time"])

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
            raise InputError(
                f"no report yet: stage {stage} is not done in {prepared.store.where()}; `diffpruning run` does what is missing"
            )
        records[stage] = record
    results = {stage: record["result"] for stage, record in records.items()}
    trials = tuple(map(MixturePlan.from_json, results["route"]["trials"]))
    chosen = tuple(map(MixturePlan.from_json, results["route"]["chosen"].values()))
    metrics, trained = results["publish"]["metrics"], results["finetune"]["experts"]
    samples = {label: samples_of(prepared.store.folder / file) for label, file in results["publish"]["rows"].items()}
    common_protocol(metrics)
    measured = [Measured("dense", None, metrics["dense"], samples["dense"])]
    measured += _further(measured[0], "dense", metrics, samples)
    for best in chosen:
        at = [trial for trial in trials if trial.budget == best.budget]
        for kind in ("mixture", *dict.fromkeys(trial.agent for trial in at), CUT_ONLY):
            if (label := best.budget.name + (f" {kind}" if kind != "mixture" else "")) in metrics:
                agent = "uniform" if kind == CUT_ONLY else kind
                plan = best if kind == "mixture" else min((trial for trial in at if trial.agent == agent), key=lambda trial: trial.rank)
                names = [] if kind == CUT_ONLY else [unit(label, interval) for interval in plan.partition.intervals]
                experts = tuple(ExpertCheckpoint.from_json(trained[name]) for name in names)
                measured.append(Measured(kind, plan, metrics[label], samples[label], experts, same_as=metrics[label].get("same_as", "")))
                measured += _further(measured[-1], label, metrics, samples)
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
        classes=_classes(prepared, len(samples["dense"])),
        latency=_latency_table(prepared.store.folder / "cache", chosen),
    )


def _further(row: Measured, label: str, metrics: Mapping[str, Any], samples: Mapping[str, np.ndarray]) -> list[Measured]:
    """The same denoiser under the samplers that follow its ``label``."""
    names = {name: name.removeprefix(f"{label} ") for name in metrics if name.startswith(f"{label} ")}
    found = {name: rest for name, rest in names.items() if ":" in rest}  # else an agent's
    told = {name: metrics[name].get("same_as", "") for name in found}
    return [
        replace(row, metrics=metrics[name], samples=samples[name], experts=(), sampler=rest, same_as=told[name])
        for name, rest in found.items()
    ]


def _classes(prepared: Prepared, samples: int) -> tuple[int, ...] | None:
    """The class of every sample, as the publish stage drew it; None for an unconditional model, or one that is no longer there."""
    from workers import conditioning  # torch, for a few integers

    job = prepared.job
    with contextlib.suppress(InputError, OSError):
        found = conditioning.describe(job.model.path).of_seeds([derive_seed(job.seed, "sample", i) for i in range(samples)])
        return None if found is None else tuple(found)
    return None


def _latency_table(folder: Path, plans: Sequence[MixturePlan]) -> tuple[Path, LatencyTable] | None:
    """The table in ``folder`` whose predictions are the plans' costs."""
    plan = next((plan for plan in plans if predicted_ms(plan) is not None), None)
    if plan is None:
        return None
    for path in sorted(folder.glob("latency-*.json")):
        with contextlib.suppress(InputError):
            table = LatencyTable.load(path)
            priced = zip(plan.experts, plan.expert_costs, strict=True)
            if all(math.isclose(table.predict(spec.choices), cost.of("latency"), rel_tol=1e-6) for spec, cost in priced):
                return path, table
    return None


def trials_of(e: Evidence, plan: MixturePlan) -> list[MixturePlan]:
    """All trials of a plan's budget, best first."""
    return sorted((trial for trial in e.trials if trial.budget == plan.budget), key=lambda trial: trial.rank)


# --- training runs --------------------------------------------------------------------------------------------------


def trainers(e: Evidence) -> dict[str, list[Trainer]]:
    """Every training run, per stage, that recorded its time."""
    found: dict[str, list[Trainer]] = {}
    seen: set[str] = set()
    for stage, prefix, experts in [("specialize", "", e.specialized), *(("finetune", f"{m.name}  ", m.experts) for m in e.distinct)]:
        for x in experts:
            if x.ended > x.started and x.path not in seen:  # plans may share an expert
                found.setdefault(stage, []).append(Trainer(prefix + span(x.interval), x.interval, x.started, x.ended))
            seen.add(x.path)
    return found


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
    for name, experts in [("specialize", e.specialized), *((m.name, m.experts) for m in e.distinct if m.experts)]:
        for expert in experts:
            if points := history(expert, e.prepared.store.folder):
                found.setdefault(name, {})[expert.interval] = points
            else:
                missing.append(f"{name} {span(expert.interval)}")
    return found, missing
