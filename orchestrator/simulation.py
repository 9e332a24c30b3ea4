"""How long a job takes on so many GPUs: its units of work on equal slots, the longest first, from measured times where there are any."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.progress import duration
from orchestrator.scheduling import Call, least_s, makespan_s
from orchestrator.workload import Work, passes, workload
from workers.contracts import InputError

TRAINER_STARTUP_S, TASK_STARTUP_S = 15.0, 8.0
"""Assumed until it was measured: what starting a trainer takes, and the first task of a call."""
MOST = 1024


@dataclass(frozen=True)
class Phase:
    """One call of a stage: units in seconds, how long their processes take to start, and whether every unit starts its own."""

    units: tuple[float, ...]
    pieces: int
    startup_s: float
    each: bool

    def on(self, slots: int) -> tuple[float, float, float]:
        """(seconds, those of them in which processes start, least seconds that the work itself could take)."""
        units = tuple(sorted(self.units, reverse=True))
        if self.pieces:  # as the stage cuts it: two chunks per slot
            chunks = min(self.pieces, 2 * slots)
            units = tuple(sum(units) * len(range(i, self.pieces, chunks)) / self.pieces for i in range(chunks))
        busy = makespan_s(units, slots)
        whole = makespan_s([unit + self.startup_s for unit in units], slots) if self.each else busy + self.startup_s * bool(units)
        return whole, whole - busy, least_s(units, slots)


def parse_counts(text: str) -> list[int]:
    """``8``, ``1,2,6`` or ``1-1024``, a range by doubling. Raises: InputError."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        ends = [first, last] if dash else [first]
        if not all(end.strip().isdecimal() and len(end) < 20 and 1 <= int(end) <= MOST for end in ends):
            raise InputError(f"--simulate {text[:200]!r}: give numbers of GPUs from 1 to {MOST}, e.g. 8 or 1,2,6 or 1-1024")
        start, stop = int(ends[0]), int(ends[-1])
        while start < stop:
            found.append(start)
            start *= 2
        found.append(stop)
    return sorted(set(found))


def phases_of(prepared: Any, tflops: float) -> tuple[dict[str, list[Phase]], set[str]]:
    """Stage -> its phases, and the stages that were measured: those that ran from beginning to end under these settings.

    The others are estimated from their forward passes, at the speed that the measured ones showed, else at ``tflops``.
    """
    works = workload(prepared.job, prepared.table, prepared.images)
    tflop = 2 * prepared.table.dense.macs / 1e12  # of one forward pass
    records = {name: prepared.store.done(name, fingerprint) for name, fingerprint in prepared.pipeline.fingerprints.items()}
    calls = {
        name: [Call.from_json(call) for call in record["calls"]]
        for name, record in records.items()
        if record and record.get("calls") and not record.get("resumed")
    }
    each = {call.task: call.startup_s for found in calls.values() for call in found}
    seen = [(sum(sum(call.units) for call in found), passes(works[name]) * tflop) for name, found in calls.items()]
    seen = [(seconds, work) for seconds, work in seen if work > 0 and seconds > 0]
    pace = sum(seconds for seconds, _ in seen) / sum(work for _, work in seen) if seen else 1 / tflops
    found: dict[str, list[Phase]] = {}
    for name, parts in works.items():
        pieces = {part.task: part.pieces for part in parts}
        if name in calls:
            found[name] = [Phase(call.units, pieces.get(call.task, 0), call.startup_s, call.each) for call in calls[name]]
        else:
            found[name] = [_estimated(part, pace * tflop, each, prepared.job.resources.workers_per_expert) for part in parts]
    return found, set(calls)


def _estimated(part: Work, seconds_per_pass: float, startups: dict[str, float], workers_per_expert: int) -> Phase:
    trainer = part.task == "train_expert"
    startup_s = startups.get(part.task, TRAINER_STARTUP_S if trainer else TASK_STARTUP_S)
    share = seconds_per_pass / (workers_per_expert if trainer else 1)
    return Phase(tuple(unit * share for unit in part.units), part.pieces, startup_s, trainer)


def simulate(prepared: Any, counts: Sequence[int], tflops: float, gpus_per_worker: float) -> list[dict[str, Any]]:
    """A row per number of GPUs: seconds in all and by stage, start-up, GPU-hours held, and how near the schedule is to the best one.

    Raises: InputError if the GPUs hold no worker.
    """
    phases, measured = phases_of(prepared, tflops)
    together = prepared.job.resources.workers_per_expert
    rows = []
    for count in counts:
        slots = math.floor(count / gpus_per_worker + 1e-9)
        if slots < together:
            raise InputError(f"--simulate {count}: {together} worker(s) of {gpus_per_worker:g} GPUs need more")
        stages, startup, least, busy = {}, 0.0, 0.0, 0.0
        for name, parts in phases.items():
            stages[name] = 0.0
            for part in parts:
                whole, waits, best = part.on(slots // together if part.each else slots)
                stages[name] += whole
                startup, least, busy = startup + waits, least + best, busy + sum(part.units) * (together if part.each else 1)
        seconds = sum(stages.values())
        rows.append(
            {
                "gpus": count,
                "seconds": round(seconds, 1),
                "startup_s": round(startup, 1),
                "of_ideal": round((seconds - startup) / least, 3) if least else 1.0,
                "busy": round(busy / (slots * seconds), 3) if seconds else 0.0,
                "gpu_hours": round(count * seconds / 3600, 3),
                "stages": {name: round(value, 1) for name, value in stages.items()},
                "measured": sorted(measured),
            }
        )
    return rows


def text(rows: Sequence[dict[str, Any]], unit: str) -> str:
    """The table, and from where on more GPUs do not help. ``unit``: GPUs, or workers of a job for CPUs."""
    names = [name for name in rows[0]["stages"] if name != "partition"]
    lines = [
        f"{unit:>7}{'time':>9}{'start-up':>10}{'/ ideal':>9}{'busy':>7}{unit + '-hours':>15}" + "".join(f"{name:>12}" for name in names)
    ]
    for row in rows:
        lines.append(
            f"{row['gpus']:>7}{duration(row['seconds']):>9}{duration(row['startup_s']):>10}{row['of_ideal']:>9.3f}{row['busy']:>7.0%}"
            f"{row['gpu_hours']:>15.2f}" + "".join(f"{duration(row['stages'][name]):>12}" for name in names)
        )
    measured = rows[0]["measured"]
    lines += ["", f"from measured times of {', '.join(measured)}" if measured else "from assumed speeds: orders of magnitude"]
    enough = next(row for row in rows if row["seconds"] <= 1.02 * rows[-1]["seconds"])
    if enough is not rows[-1]:
        lines.append(f"more than {enough['gpus']} {unit} hardly help: units of work are indivisible, and processes take time to start")
    return "\n".join(lines)
