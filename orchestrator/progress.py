"""What a run shows while it works: one live table on a terminal, plain lines elsewhere, and progress.json for `diffpruning status`.

progress.json   stage, units    what is at work: contracts.Progress
                at              seconds since the epoch of the last word; a living run writes every few seconds
                fingerprints    of the job's stages: which folders are this job's
                trainers        what Ray Train says of the trainers, if it was asked
                driver          host and process; the id that a cluster gave the job
                end             null while the run goes on; then its exit code, the kind of its end, and its message
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from orchestrator.store import write_json
from workers.contracts import BudgetUnreachable, InputError, Progress, RunFailed, VerificationError

PLAIN_EVERY_S = 10.0
BEAT_S = 5.0
BEFOREHAND = ("encode", "profile")
"""Work that a stage may begin with, whose lines have a name of their own."""


def duration(seconds: float) -> str:
    """8s, 3m05s, 2h10m."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    return f"{seconds // 60}m{seconds % 60:02d}s" if seconds < 3600 else f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


def rate(images_per_s: float) -> str:
    """312, 4.7, 0.083."""
    return f"{images_per_s:.0f}" if images_per_s >= 10 else f"{images_per_s:.2g}"


def line(event: Progress) -> str:
    """``specialize t0250-0500  step 1200/20000  loss 0.0312  312 img/s  eta 41m``, or ``encode images 0-5000  320/5000  312 img/s``"""
    eta, done = event.eta_s, f"{event.step}/{event.steps}"
    parts = [f"{event.stage} {event.unit}", done if event.stage == "encode" else f"step {done}"]
    parts += [f"loss {event.loss:.4f}"] if event.loss is not None else []
    parts += [f"{rate(event.images_per_s)} img/s"] if event.images_per_s else []
    parts += [f"eta {duration(eta)}"] if eta is not None else []
    return "  ".join(parts + ([event.note] if event.note else []))


def _number(unit: str) -> list[tuple[int, str]]:
    """A key that sorts ``images 900-1200`` before ``images 1200-1500``."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", unit)]


def ending(error: BaseException | None) -> dict[str, Any]:
    """How a run ended: its exit code, a word for it, and the message; ``error``: what ended it."""
    kinds = (
        (BudgetUnreachable, "budget unreachable"),
        (VerificationError, "verification mismatch"),
        (InputError, "refused"),
        (KeyboardInterrupt, "interrupted"),
    )
    if error is None:
        return {"exit_code": 0, "kind": "ok", "message": ""}
    kind = next((word for type_, word in kinds if isinstance(error, type_)), "failed")
    code = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
    return {"exit_code": code, "kind": kind, "message": " ".join(str(error).split())}


def submission_id() -> str | None:
    """The id that the cluster gave the job that this process drives, if it was submitted to one."""
    try:
        return json.loads(os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"])["metadata"]["job_submission_id"]
    except (KeyError, ValueError, TypeError):
        return None


class ProgressView:
    """Use as a context manager. ``update`` may be called from any thread."""

    def __init__(self, console: Console, file: Path | None, fingerprints: Mapping[str, str] | None = None):
        """``fingerprints`` of the job's stages go into the file, so that a reader knows which folders are this job's."""
        self.console, self.file, self.fingerprints = console, file, dict(fingerprints or {})
        self._over, self._writing = threading.Event(), threading.Lock()
        self.stage: str | None = None
        self.units: dict[str, Progress] = {}
        self._trainers: list[dict[str, Any]] = []
        self._driver = {"host": socket.gethostname(), "pid": os.getpid(), "job": submission_id()}
        self._end: dict[str, Any] | None = None
        self._told: dict[str, float] = {}
        self._written = 0.0
        self._lock = threading.Lock()
        self._live = (
            Live(get_renderable=self._table, console=console, refresh_per_second=2, transient=True) if console.is_terminal else None
        )

    def __enter__(self) -> ProgressView:
        if self._live:
            self._live.start()
        self._write(force=True)  # how the run ended before is no longer how it stands
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        if self._live:
            self._live.stop()
        self._over.set()
        self.stage, self._end = None, ending(error)
        self._write(force=True)

    def _beat(self) -> None:
        """Some work is silent for minutes; the file still says that the run is alive."""
        while not self._over.wait(BEAT_S):
            self._write(force=True)

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def on_stage(self, name: str, state: str, seconds: float) -> None:
        with self._lock:
            self.stage, self.units = (name if state == "running" else None), {}
            self._told.clear()
        self.say(f"{name:<11}{state}" + (f" ({duration(seconds)})" if seconds else ""))
        self._write(force=True)

    def trainers(self, found: list[dict[str, Any]]) -> None:
        """What Ray Train says of its runs."""
        self._trainers = found

    def update(self, event: Progress) -> None:
        with self._lock:
            begun = any(unit.stage == self.stage for unit in self.units.values())
            if event.stage != self.stage and (begun or self.stage is None or event.stage not in BEFOREHAND):
                return  # a late line of work that is over
            if event.stage == self.stage and not begun:
                self.units.clear()  # what it began with is over
            before, now = self.units.get(event.unit), time.monotonic()
            self.units[event.unit] = event
            ends = event.step == event.steps and (before is None or before.step != before.steps)  # said once
            tell = ends or bool(event.note) or (event.step < event.steps and now - self._told.get(event.unit, -1e9) > PLAIN_EVERY_S)
            if tell:
                self._told[event.unit] = now
        if tell and (self._live is None or event.note):
            self.say("  " + line(event))
        self._write()

    def _write(self, force: bool = False) -> None:
        if self.file is None or (not force and time.monotonic() - self._written < 1):
            return
        self._written = time.monotonic()
        with self._lock:
            units = [event.to_json() for event in self.units.values()]
            value: dict[str, Any] = {"stage": self.stage, "units": units, "at": time.time(), "fingerprints": self.fingerprints}
            value |= {"trainers": self._trainers, "driver": self._driver, "end": self._end}
        with (
            self._writing,
            contextlib.suppress(OSError, RunFailed),
        ):  # a full disk is told by whoever needs it; progress is not worth a crash
            write_json(self.file, value, durable=False)

    def _table(self) -> Table:
        table = Table(box=None, padding=(0, 2), header_style="bold")
        for name, right in (("stage", 0), ("unit", 0), ("step", 1), ("loss", 1), ("images/s", 1), ("ETA", 1)):
            table.add_column(name, justify="right" if right else "left")
        with self._lock:
            events = sorted(self.units.values(), key=lambda e: _number(e.unit))
        for event in events:
            eta = event.eta_s
            table.add_row(
                event.stage,
                event.unit,
                f"{event.step}/{event.steps}",
                "" if event.loss is None else f"{event.loss:.4f}",
                "" if not event.images_per_s else rate(event.images_per_s),
                "done" if event.step == event.steps else "" if eta is None else duration(eta),
            )
        return table
