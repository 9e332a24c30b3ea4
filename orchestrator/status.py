"""Where a run stands, and what a version is, as text: read from files, by anybody who sees the storage."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.config import load_job
from orchestrator.job_file import find_run
from orchestrator.place import Place, is_uri
from orchestrator.progress import duration, line
from orchestrator.store import RunStore, read_json, write_json
from orchestrator.words import gmacs, measured_under, of_dense, predicted_ms, sig, timing
from workers.contracts import InputError, MixtureManifest, Progress, RunFailed
from workers.mirror import tells
from workers.protocol import common_protocol
from workers.records import Record

QUIET_S = 30.0
"""A living run writes more often."""
LOST_S = 300.0
"""So long a watcher waits for somebody to go on with a run that was killed, or to begin one."""
WATCH_EVERY_S = 1.0


@dataclass(frozen=True)
class _Worker(Record):
    world_rank: int
    node_ip: str
    pid: int
    gpu_ids: tuple[Any, ...] | None
    log_file_path: str | None


@dataclass(frozen=True)
class _Trainer(Record):
    name: str
    status: str
    detail: str
    attempts: int
    workers: tuple[_Worker, ...]


@dataclass(frozen=True)
class _End(Record):
    exit_code: int
    kind: str
    message: str


@dataclass(frozen=True)
class _Word(Record):
    """progress.json, as `orchestrator.progress` tells it; what it does not tell was not there in earlier versions."""

    stage: str | None
    units: tuple[Any, ...]
    at: float
    fingerprints: dict[str, str] | None = None
    trainers: tuple[_Trainer, ...] | None = None
    driver: dict[str, Any] | None = None
    end: _End | None = None

    def __post_init__(self) -> None:
        for unit in self.units:
            Progress.from_json(unit)


@dataclass(frozen=True)
class _Done(Record):
    """What is read of a done.json."""

    stage: str
    fingerprint: str
    started: float
    seconds: float


@dataclass(frozen=True)
class _Owner(Record):
    """What is read of a run.json."""

    name: str


def _page(path: Path, kind: type[Record]) -> dict[str, Any] | None:
    """The JSON object of a file, if it is there. Raises: InputError, naming the file, if it is not what ``kind`` says."""
    found = read_json(path)
    if found is None:
        return None
    try:
        if not isinstance(found, dict):
            raise InputError("it is not a JSON object")
        kind.from_json({key: value for key, value in found.items() if key in kind.__annotations__})
    except InputError as error:
        raise InputError(f"{path} is damaged ({str(error).removeprefix(kind.__name__ + ': ')[:200]}): delete it") from None
    return found


def read(job: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Stages that are done and the units of the one at work. ``job``: a job file or a run folder. Raises: InputError."""
    if is_uri(job):
        place = Place.of_run(job)
    else:
        folder = find_run(job)
        place = Place(folder) if folder else load_job(job, overrides).place
    store = RunStore.of(place, tells)
    folder = store.folder
    owner = _page(folder / "run.json", _Owner)
    if owner is None:
        raise InputError(f"no run in {store.where()}: start it with `diffpruning run`")
    records = [_page(path, _Done) for path in folder.glob("*-????????/done.json")]
    done = sorted((r for r in records if r), key=lambda r: r["started"] + r["seconds"])
    progress = _page(folder / "progress.json", _Word) or {}
    mine = set((progress.get("fingerprints") or {}).values())
    latest = {r["stage"]: r for r in done if not mine or r["fingerprint"] in mine}
    return {
        "run_folder": store.where(),
        "job": owner["name"],
        "done": [
            {"stage": r["stage"], "seconds": round(r["seconds"], 1), "folder": f"{r['stage']}-{r['fingerprint'][:8]}"}
            for r in latest.values()
        ],
        "running": progress.get("stage"),
        "units": progress.get("units", []) if progress.get("stage") else [],
        "seconds_since_update": round(time.time() - progress["at"], 1) if progress else None,
        "trainers": (progress.get("trainers") or []) if progress.get("stage") else [],
        "driver": progress.get("driver"),
        "end": progress.get("end"),
        "report": store.where(folder / "report.html") if store.has(folder / "report.html") else None,
    }


def text(found: dict[str, Any]) -> str:
    driver = found["driver"] or {}
    lines = [f"run {found['job']}, {found['run_folder']}" + (f", job {driver['job']}" if driver.get("job") else "")]
    lines += [f"  {r['stage']:<12}done in {duration(r['seconds'])}" for r in found["done"]]
    if found["running"]:
        quiet = found["seconds_since_update"] > QUIET_S
        lines.append(
            f"  {found['running']:<12}"
            + (f"stopped? no word for {duration(found['seconds_since_update'])}; the same run command continues it" if quiet else "running")
        )
        lines += [f"    {line(Progress.from_json(unit))}" for unit in found["units"]]
        lines += [f"    {_trainer(trainer)}" for trainer in found["trainers"] if trainer["status"] != "FINISHED"]
    elif found["end"] and found["end"]["exit_code"]:
        lines.append(f"  {found['end']['kind']:<12}exit code {found['end']['exit_code']}: {found['end']['message']}".rstrip(": "))
    elif not found["end"] and found["seconds_since_update"] is not None and found["seconds_since_update"] > QUIET_S:
        lines.append(f"  {'stopped?':<12}no word for {duration(found['seconds_since_update'])}; the same run command continues it")
    if found["report"]:
        lines.append(f"  report      {found['report']}")
    return "\n".join(lines)


def _trainer(found: dict[str, Any]) -> str:
    """``trainer specialize-t0000-0500-1a2b3c4d  running, attempt 2, on 10.0.0.5 pid 1234 GPU 0, log FILE``"""
    parts = [f"trainer {found['name']}  {found['status'].lower()}"]
    parts += [f"attempt {found['attempts']}"] if found["attempts"] > 1 else []
    for worker in found["workers"]:
        gpus = f" GPU {', '.join(map(str, worker['gpu_ids']))}" if worker["gpu_ids"] else ""
        parts.append(
            f"on {worker['node_ip']} pid {worker['pid']}{gpus}" + (f", log {worker['log_file_path']}" if worker["log_file_path"] else "")
        )
    return ", ".join(parts + ([found["detail"]] if found["detail"] else []))


def watch(job: str, overrides: Sequence[str], tell: Callable[[dict[str, Any]], None]) -> int:
    """``tell`` what has changed, until the run ends; returns its exit code. A run that is killed may be continued, so it is waited for.

    Raises: RunFailed after ``LOST_S`` without a word."""
    last: dict[str, Any] | None = None
    heard = time.monotonic()
    while True:
        found = read(job, overrides)
        quiet = found["seconds_since_update"] is None or found["seconds_since_update"] > QUIET_S
        now = {**found, "seconds_since_update": quiet}
        if now != last:
            tell(found)
            last = now
        if found["end"] is not None:
            return found["end"]["exit_code"]
        if not quiet:
            heard = time.monotonic()
        if time.monotonic() - heard > LOST_S:
            silent_s = found["seconds_since_update"]
            since = "it was begun" if silent_s is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time.time() - silent_s))
            raise RunFailed(f"no word since {since} from {found['run_folder']}: was it killed? The same run command continues it")
        time.sleep(WATCH_EVERY_S)


def submitted(place: Place, id: str) -> None:
    """A run that had ended goes on: whoever watches it from now on waits for the job ``id``. Where its storage is not seen, nothing."""
    with contextlib.suppress(InputError, RunFailed, OSError):
        store = RunStore.of(place, tells)
        file = store.folder / "progress.json"
        before = _page(file, _Word)
        if before is not None and before.get("end") is not None and (before.get("driver") or {}).get("job") != id:
            word: dict[str, Any] = {"stage": None, "units": [], "at": time.time(), "fingerprints": before.get("fingerprints") or {}}
            with store.followed():
                write_json(file, {**word, "trainers": [], "driver": {"host": None, "pid": None, "job": id}, "end": None})


def teller(as_json: bool) -> Callable[[dict[str, Any]], None]:
    """Prints what `watch` finds: JSON lines, or text that takes the place of the last one on a terminal."""

    def tell(found: dict[str, Any]) -> None:
        clear = "\x1b[2J\x1b[H" if sys.stdout.isatty() and not as_json else ""
        print(json.dumps(found) if as_json else clear + text(found), flush=True)

    return tell


def manifest_text(reference: str, path: str, manifest: MixtureManifest) -> str:
    plan, came, ms = manifest.plan, manifest.provenance, predicted_ms(manifest.plan)
    dense = plan.dense_cost
    attention = sum(share * cost.attention_macs for share, cost in zip(plan.shares, plan.expert_costs, strict=True))
    lines = [
        f"{reference}  {path}",
        f"budget    {of_dense(plan.budget)} for {plan.budget.scheduler}-{plan.budget.steps}: {plan.cost_ratio:.3f}; agent {plan.agent}",
        f"cost      {gmacs(plan.macs, plan.macs - attention)} per step and image",
        f"          {plan.macs_ratio:.3f} of dense's {gmacs(dense.macs, dense.macs_without_attention)}",
    ]
    if ms is not None:
        dense_ms = dense.of("latency")
        lines.append(f"predicted {ms:.3g} ms per step{_batch(manifest)}: {ms / dense_ms:.3f} of dense's {dense_ms:.3g} ms")
    lines += [
        f"from      {came.model} (sha256 {came.model_digest[:12]}), data {came.data}, seed {came.seed}",
        "",
        f"{'expert':<14}{'share':>7}{'GMACs':>9}{'no attention':>14}{'params':>9}{'dropped':>9}{'narrowed':>10}",
    ]
    widest = {site: max(spec[site] for spec in plan.experts) for site in plan.experts[0].choices}
    for interval, spec, share, cost in zip(plan.partition.intervals, plan.experts, plan.shares, plan.expert_costs, strict=True):
        dropped = sum(choice == 0 for choice in spec.choices.values())
        narrowed = sum(0 < choice < widest[site] for site, choice in spec.choices.items())
        macs = f"{cost.macs / 1e9:>9.3f}{cost.macs_without_attention / 1e9:>14.3f}"
        lines.append(f"{interval.name:<14}{share:>7.0%}{macs}{cost.params / 1e6:>8.2f}M{dropped:>9}{narrowed:>10}")
    told = any("peak_memory_mib" in m for m in manifest.metrics.values())
    wide = max(22, *(len(label) + 2 for label in manifest.metrics))
    head = f"{'':<{wide}}{'denoising loss':>15}{'paired MSE':>12}{'PSNR dB':>9}{'ms/step':>9}"
    compared = any(m.get("frechet") is not None for m in manifest.metrics.values())
    lines += ["", head + (f"{'peak MiB':>10}" if told else "") + (f"{'FD':>9}" if compared else "")]
    for label, m in manifest.metrics.items():
        psnr = "" if m["paired_psnr_db"] is None else f"{m['paired_psnr_db']:.2f}"
        memory = f"{m['peak_memory_mib']:>10.0f}" if "peak_memory_mib" in m else ""
        distance = f"{sig(m['frechet']):>9}" if m.get("frechet") is not None else ""
        lines.append(
            f"{label:<{wide}}{m['denoising_loss']:>15.5f}{m['paired_mse']:>12.5f}{psnr:>9}{m['ms_per_step']:>9.1f}{memory}{distance}"
        )
    if protocol := common_protocol(manifest.metrics):
        lines += ["", measured_under(protocol, manifest.metrics.values())]
    return "\n".join(lines)


def _batch(manifest: MixtureManifest) -> str:
    """What the job says of the times' circumstances."""
    found = manifest.config.get("latency")
    later = (found.get(key, False) for key in ("cuda_graphs", "fused_kernels")) if found else ()
    return f" for {timing(found['batch'], found['dtype'], found['compile'], *later)}" if found else ""
