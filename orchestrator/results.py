"""One table over several runs: what each measured, the dense model once, sorted by measured time. Reads files only, and loads no model."""

from __future__ import annotations

import math
import shlex
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from orchestrator import tables
from orchestrator.store import read_object, write_json
from orchestrator.words import CUT_ONLY, both, measured_under, percent, sampler, sig, timed_on
from workers.contracts import InputError, Partition
from workers.protocol import common_protocol
from workers.records import differing

TABLE, JOB = "evaluation/table.json", "job.json"
"""In a run folder: what `evaluate` printed, and the job and command of the last `run`."""
DENSE = "dense"
NUMBERS: dict[str, tuple[str, Callable[[float], str]]] = {
    "macs_per_step": ("MACs/step", percent),
    "relative_time": ("time", percent),
    "ms_per_step": ("ms/step", sig),
    "frechet": ("FD", sig),
    "kid": ("KID", sig),
    "paired_mse": ("MSE to dense", sig),
    "trained_images": ("trained on", lambda images: f"{images:,.0f}"),
}
"""Number of a row -> its column's title, and how it reads."""
MORE: dict[str, tuple[str, Callable[[float], str]]] = {
    "paired_lpips": ("LPIPS to dense", sig),
    "ms_per_image": ("ms/image", sig),
    "peak_memory_mib": ("peak MiB", lambda size: f"{size:,.0f}"),
    "trainer_seconds": ("trainer s", lambda seconds: f"{seconds:,.0f}"),
}
"""The same of columns that are shown when they are asked for."""
WORDS = ("run", "", "agent", "sampler")
"""Titles of the columns that hold words."""


@dataclass(frozen=True)
class Run:
    """What a run folder says of itself. ``rows``: label -> metrics, dense first, all under one protocol."""

    name: str
    folder: Path
    owner: Mapping[str, Any]
    job: Mapping[str, Any] | None
    """None if the folder was last written by a version that did not record it."""
    experts: int | None
    """None before the partition."""
    rows: Mapping[str, Mapping[str, Any]]
    left_out: Sequence[str] = ()
    """Rows of the same mixtures that were measured otherwise."""
    agents: Mapping[str, str] = field(default_factory=dict)
    """Budget -> whose plan was chosen."""

    @property
    def dense(self) -> Mapping[str, Any]:
        return self.rows[DENSE]

    @property
    def seed(self) -> int:
        return int(self.dense["protocol"]["seed"])

    @property
    def command(self) -> str | None:
        if self.job is None:
            return None
        overrides = [word for override in self.job["set"] for word in ("--set", override)]
        return shlex.join(["diffpruning", "run", self.job["file"], *overrides])

    @property
    def commits(self) -> list[str]:
        """Of the code that measured the rows; empty for an older version's."""
        return sorted({row["commit"] for row in self.rows.values() if row.get("commit")})

    @property
    def trained_images(self) -> int | None:
        """Images drawn by the training of all experts of one mixture, elastic and after; None if the folder does not tell."""
        stages = [] if self.job is None else [self.job["config"].get(stage) for stage in ("specialize", "finetune")]
        if self.experts is None or not stages or not all(stages):
            return None
        return self.experts * sum(stage["steps"] * stage["batch_size"] for stage in stages if stage)

    @property
    def settings(self) -> dict[str, Any]:
        """What runs of one group have in common: all but seed and name, what other checks compare by content, and how work is shared out.

        Raises: InputError if the folder does not tell.
        """
        if self.job is None:
            raise InputError(
                f"--group: {self.folder} does not record its job: the same `diffpruning run` again records it, and does no work"
            )
        config = {key: value for key, value in self.job["config"].items() if key not in ("seed", "name", "model", "evaluate")}
        return {**config, "data": {**config["data"], "path": self.owner["data.path"][-1]}}


def record(folder: Path, file: str, overrides: Sequence[str], config: Mapping[str, Any]) -> None:
    """Write what a run folder's results come from, unless it says so, if in other words. ``file`` and ``overrides``: as they were typed."""
    if (read_object(folder / JOB) or {}).get("config") != config:
        write_json(folder / JOB, {"schema": 1, "file": file, "set": list(overrides), "config": config})


# --- reading ----------------------------------------------------------------------------------------------------------


def load(folder: Path) -> Run:
    """Read a run folder, under the settings that it was last used with. Raises: InputError if nothing is measured there."""
    owner = read_object(folder / "run.json", "name") or {}
    fingerprints = (read_object(folder / "progress.json") or {}).get("fingerprints", {})
    route, cut = (_result(folder, stage, fingerprints) for stage in ("route", "partition"))
    rows, left_out = _rows(folder, fingerprints)
    if DENSE not in rows:
        raise InputError(f"nothing is measured in {folder}: `diffpruning run` or `diffpruning evaluate` on its job does that")
    if odd := [label for label, row in rows.items() if not row.get("protocol")]:
        raise InputError(f"{folder}: row {odd[0]!r} has no protocol: it was measured by an older version; run its job again")
    experts = None if cut is None else len(Partition.from_json(cut["partition"]))
    agents = {} if route is None else {budget: plan["agent"] for budget, plan in route["chosen"].items()}
    return Run(owner["name"], folder, owner, read_object(folder / JOB), experts, rows, left_out, agents)


def _result(folder: Path, stage: str, fingerprints: Mapping[str, str]) -> dict[str, Any] | None:
    fingerprint = fingerprints.get(stage, "")
    done = read_object(folder / f"{stage}-{fingerprint[:8]}" / "done.json", "result") if fingerprint else None
    return None if done is None else done["result"]


def _rows(folder: Path, fingerprints: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Every row that holds beside the same dense, and the labels of those of the same mixtures that do not.

    They are those of the publish stage, what `evaluate` printed, and those of other publish stages of the same mixtures: settings of the
    evaluation may have changed between them.
    """
    mixtures, table = fingerprints.get("finetune"), read_object(folder / TABLE) or {}
    found = dict((_result(folder, "publish", fingerprints) or {}).get("metrics", {}))
    records = [
        record for path in folder.glob("publish-????????/done.json") if (record := read_object(path, "result", "started")) is not None
    ]
    newest_first = sorted(records, key=lambda record: record["started"], reverse=True)
    others = [record["result"]["metrics"] for record in newest_first if mixtures and record["result"].get("mixtures") == mixtures]
    sources = [(table.get("rows", {}), bool(mixtures) and table.get("mixtures") == mixtures), *((rows, True) for rows in others)]
    dense = next((rows[DENSE] for rows in (found, *(rows for rows, _ in sources)) if DENSE in rows), None)
    left_out: list[str] = []
    for rows, same in sources:
        held = holding(rows, dense or {}, same)
        found |= {label: row for label, row in held.items() if label not in found}
        left_out += [label for label in rows if same and label not in held]
    return found, sorted({*left_out} - {*found})


def holding(rows: Mapping[str, Any], dense: Mapping[str, Any], same_mixtures: bool) -> dict[str, Any]:
    """Those of a table's ``rows`` that hold beside ``dense``: of one protocol, timing and number of samples, and of the same mixtures or of
    what is none of a run's, the dense model and published versions. Without their paired errors, where the dense model of these was drawn
    otherwise."""
    paired_alike = rows.get(DENSE, {}).get("sampler") == dense.get("sampler")
    return {
        label: row if paired_alike else {key: None if key.startswith("paired_") else value for key, value in row.items()}
        for label, row in rows.items()
        if (same_mixtures or _is_dense(label) or _is_version(label))
        and all(row.get(key) == dense.get(key) for key in ("protocol", "timing", "samples"))
    }


def _denoiser(label: str) -> str:
    """A label without the further sampler that the denoiser is under."""
    name, _, rest = label.partition(" ")
    return name if ":" in rest else label


def _is_version(label: str) -> bool:
    return not _is_dense(label) and ":" in label.partition(" ")[0]


def _is_dense(label: str) -> bool:
    return label.partition(" ")[0] == DENSE


# --- what may stand in one table --------------------------------------------------------------------------------------


def _check(runs: Sequence[Run], names: Sequence[str], group: bool) -> None:
    """Raises: InputError naming two runs that differ in their model, their protocol, or the circumstances of their times."""
    first, one = runs[0], names[0]
    for run, two in zip(runs[1:], names[1:], strict=True):
        models = [r.owner["model.path"] for r in (first, run)]
        if not any(a == b for a, b in zip(*models, strict=False)):
            raise InputError(f"{one} and {two} cannot stand in one table: their models are {models[0][0]} and {models[1][0]}")
        odd = [key for key, _, _ in differing(first.dense["protocol"], run.dense["protocol"]) if key != "id"]
        if odd == ["seed"]:
            if not group:
                seeds = f"{first.seed} and {run.seed}"
                raise InputError(f"{one} and {two} differ in the seed of their noise, {seeds}: --group gives mean and spread over seeds")
        elif odd:
            common_protocol({one: first.dense, two: run.dense})
        timing, other = first.dense.get("timing"), run.dense.get("timing")
        same_device = first.dense.get("device") == run.dense.get("device")  # else there are no times to mix
        if timing and other and timing != other and same_device:
            texts = ", ".join(f"{key} {a} and {b}" for key, a, b in differing(timing, other))
            raise InputError(
                f"{one} and {two} cannot stand in one table: their times hold for {texts}: evaluate both under one latency section"
            )


def _names(runs: Sequence[Run]) -> list[str]:
    """By which runs are told apart: their names, or where two have the same, their folders."""
    names = [run.name for run in runs]
    return [run.name if names.count(run.name) == 1 else str(run.folder) for run in runs]


# --- the table --------------------------------------------------------------------------------------------------------


def collect(runs: Sequence[Run], group: bool = False) -> dict[str, Any]:
    """The table as JSON, a row per denoiser and sampler, sorted by measured time; with ``group``, one for all seeds.

    Dense rows, which all runs share, are those of the first run that has them. Times are those of the device of the first run's dense row;
    rows of another have none. Raises: InputError if the runs cannot be compared.
    """
    names = _names(runs)
    if twice := [str(run.folder) for i, run in enumerate(runs) if run.folder in [other.folder for other in runs[:i]]]:
        raise InputError(f"{twice[0]} is given twice: give every run once")
    _check(runs, names, group)
    groups: list[dict[str, Any]] = []
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for number, (run, name) in enumerate(zip(runs, names, strict=True)):
        if group:
            settings = run.settings
            groups += [settings] * (settings not in groups)
            number = groups.index(settings)
        for label, metrics in run.rows.items():
            row = _row(run, name, label, metrics, runs[0])
            key = (DENSE if _is_dense(label) else (number, label), row["sampler"])
            into = found.setdefault(key, {**row, "runs": [], "seeds": [], "experts": [], "agents": [], "devices": [], "each": []})
            if run.seed in into["seeds"]:
                if not _is_dense(label):
                    raise InputError(f"--group: {into['runs'][0]} and {name} are one job with one seed, {run.seed}: give one of them")
                continue
            into["runs"].append(name)
            into["seeds"].append(run.seed)
            into["experts"] = sorted({*into["experts"], *([row["experts"]] if row["experts"] else [])})
            into["agents"] = sorted({*into["agents"], *filter(None, [row["agent"]])})
            into["devices"] = list(dict.fromkeys([*into["devices"], metrics.get("device")]))
            into["each"].append({name: row[name] for name in (*NUMBERS, *MORE, "macs")})
    rows = sorted(
        (_summary(row) for row in found.values()), key=lambda row: (row["relative_time"] is None, row["relative_time"] or row["macs"])
    )
    return {
        "protocol": runs[0].dense["protocol"],
        "seeds": sorted({run.seed for run in runs}),
        "grouped": group,
        "sampler": sampler(runs[0].dense),
        "device": runs[0].dense.get("device"),
        "timing": runs[0].dense.get("timing"),
        "rows": rows,
        "runs": [
            {
                "name": name,
                "run_folder": str(run.folder),
                "seed": run.seed,
                "command": run.command,
                "commits": run.commits,
                "left_out": run.left_out,
            }
            for run, name in zip(runs, names, strict=True)
        ],
    }


def _row(run: Run, name: str, label: str, metrics: Mapping[str, Any], first: Run) -> dict[str, Any]:
    """One row of one run. Time and MACs of all steps are relative to dense under the sampler of the ``first`` run."""
    dense = first.dense
    calls = metrics["calls"] / dense["calls"]
    macs = metrics["gmacs_per_step"] / run.dense["gmacs_per_step"]
    plan = not _is_dense(label) and not _is_version(label)  # of a version nothing is known here but what was written beside its numbers
    same_device = metrics.get("device") == dense.get("device")
    drawn_alike = same_device and metrics.get("drawn") == dense.get("drawn")
    paired_alike = sampler(run.dense) == sampler(dense) and run.dense.get("samples") == dense.get("samples")
    trained = None if not plan or run.trained_images is None else run.trained_images * (not label.endswith(CUT_ONLY))
    return {
        "run": "" if _is_dense(label) else name,
        "label": DENSE if _is_dense(label) else _denoiser(label),
        "experts": run.experts if plan else None,
        "agent": metrics.get("agent") or (_agent(run, label) if plan else None),
        "sampler": sampler(metrics),
        "macs_per_step": macs,
        "macs": calls * macs,
        "relative_time": calls * metrics["ms_per_step"] / metrics["dense_ms_per_step"] if same_device else None,
        "ms_per_step": metrics["ms_per_step"] if same_device else None,
        "frechet": metrics.get("frechet"),
        "kid": metrics.get("kid"),
        "paired_mse": metrics["paired_mse"] if paired_alike else None,
        "trained_images": metrics.get("trained_images", trained),
        "paired_lpips": metrics.get("paired_lpips") if paired_alike else None,
        "ms_per_image": metrics.get("ms_per_image") if drawn_alike else None,
        "peak_memory_mib": metrics.get("peak_memory_mib") if same_device else None,
        "trainer_seconds": metrics.get("trainer_seconds"),
    }


def _agent(run: Run, label: str) -> str | None:
    """Who found the plan of a mixture whose row does not say so: its label does, or the run."""
    budget, _, kind = _denoiser(label).partition(" ")
    return "uniform" if kind == CUT_ONLY else kind or run.agents.get(budget)


def _summary(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the table: means over its seeds, and ``std``, the sample standard deviation, where there are several."""
    means, std = {}, {}
    each = row.pop("each")
    for key in each[0]:
        values = [one[key] for one in each]
        whole = all(value is not None and math.isfinite(value) for value in values)
        means[key] = fmean(values) if whole else None
        if len(values) > 1:
            std[key] = stdev(values) if whole else None
    return {**row, **means, "n": len(each), "std": std}


def commit(root: Path) -> str | None:
    """Of the code, if ``root`` is a git checkout; said to be changed where files differ from it."""
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        return subprocess.check_output(["git", "-C", str(root), *words], text=True, stderr=subprocess.DEVNULL).strip()

    try:
        return git("rev-parse", "HEAD") + (", changed since" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


# --- as text ----------------------------------------------------------------------------------------------------------


def _cells(found: Mapping[str, Any], more: bool) -> list[list[str]]:
    """The table's words, its head first; a column in which nothing stands, or which says the same of all runs, is left out. ``more``: those
    of `MORE` too."""
    rows = found["rows"]
    names = {row["run"] for row in rows} - {""}
    columns = {
        "run": [row["run"] if len(names) > 1 else "" for row in rows],
        "": [row["label"] for row in rows],
        "K": [", ".join(map(str, row["experts"])) for row in rows],
        "agent": [", ".join(row["agents"]) for row in rows],
        "sampler": [row["sampler"] for row in rows],
        "n": [str(row["n"]) if found["grouped"] else "" for row in rows],
    }
    numbers = NUMBERS | MORE if more else NUMBERS
    return tables.filled(columns | {title: [_number(row, key, text) for row in rows] for key, (title, text) in numbers.items()})


def _number(row: Mapping[str, Any], key: str, text: Callable[[float], str]) -> str:
    value, spread = row[key], row["std"].get(key)
    return "" if value is None else text(value) + (f" \N{PLUS-MINUS SIGN} {text(spread)}" if spread is not None else "")


def _notes(found: Mapping[str, Any], more: bool) -> list[str]:
    under, seeds = found["sampler"], found["seeds"]
    told = f"MACs/step: relative to dense. time: measured, of all steps, relative to dense under {under}."
    if any(row["paired_mse"] is None for row in found["rows"]):
        told += f" MSE: to dense under {under}; left out for what was paired with another, or over another number of samples."
    if any(row["trained_images"] is not None for row in found["rows"]):
        told += " trained on: images drawn by the training of all experts, elastic and after."
    if more and any(row["trainer_seconds"] is not None for row in found["rows"]):
        told += " trainer s: of all their trainers together."
    if found["grouped"]:
        told += " \N{PLUS-MINUS SIGN}: sample standard deviation over n seeds."
    several = f"; also seeds {both(map(str, seeds[1:]))}" if len(seeds) > 1 else ""
    elsewhere = list(dict.fromkeys(_of(row) for row in found["rows"] if row["devices"] != [found["device"]]))
    why = "measured under another protocol, timing or number of samples than dense"
    lost = [f"left out of {run['name']}, as {why}: {both(run['left_out'])}" for run in found["runs"] if run["left_out"]]
    return [told, timed_on(found, elsewhere), measured_under(found["protocol"], found["rows"]) + several, *lost]


def _of(row: Mapping[str, Any]) -> str:
    """A row by its run, or what it is, and its device."""
    return f"{row['run'] or row['label']} ({both(device or 'not named' for device in row['devices'])})"


def _sources(found: Mapping[str, Any], quote: str = "") -> list[str]:
    """The command that makes each run, and the commit of the code that measured it."""
    lines = []
    for run in found["runs"]:
        command = f"{quote}{run['command']}{quote}" if run["command"] else "its folder does not record its job"
        lines.append(f"{run['name']}: {command}" + (f", measured at commit {both(run['commits'])}" if run["commits"] else ""))
    return lines


def text(found: Mapping[str, Any], more: bool = False) -> str:
    """For a terminal."""
    return "\n".join([*tables.aligned(_cells(found, more), WORDS), "", *_notes(found, more), *_sources(found)])


def markdown(found: Mapping[str, Any], more: bool = False) -> str:
    """The table, and below it what it holds for and the commands that make its runs."""
    lines = tables.markdown(_cells(found, more), WORDS)
    lines += [line for note in _notes(found, more) for line in ("", note)]
    return "\n".join([*lines, "", *(f"- {line}" for line in _sources(found, "`"))]) + "\n"
