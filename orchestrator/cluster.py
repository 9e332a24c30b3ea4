"""Where work is done: the Cluster protocol, and InlineCluster, which does it right here (tests, ``--inline``)."""

from __future__ import annotations

import contextlib
import math
import os
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from orchestrator.scheduling import Call
from orchestrator.store import read_as, storage_error, write_json
from workers.contracts import ExpertCheckpoint, InputError, Progress, RunFailed
from workers.files import finished, remove
from workers.session import Session
from workers.trials import SearchTrial

Task = Callable[[Session, Any], Any]
FAILURE = "failure.txt"
"""Beside a run's checkpoints: why it failed the last time."""


@dataclass(frozen=True)
class Need:
    """What one worker holds while it works, and how many workers one expert has."""

    device: str
    cpus: float
    gpus: float
    workers_per_expert: int = 1
    custom: Mapping[str, float] = field(default_factory=dict)
    """Further Ray resources, by name."""

    def __str__(self) -> str:
        held = [f"{self.cpus:g} CPU{'s' if self.cpus > 1 else ''}"]
        held += [f"{self.gpus:g} GPU{'s' if self.gpus > 1 else ''}"] if self.gpus else []
        return " and ".join(held + [f"{amount:g} {name}" for name, amount in self.custom.items()])

    def resources(self) -> dict[str, float]:
        """What one worker holds, under Ray's names."""
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {}), **self.custom}

    def fits(self, node: Mapping[str, float]) -> int:
        """How many workers fit on a node that has these resources."""
        return min(math.floor(node.get(name, 0) / amount + 1e-9) for name, amount in self.resources().items())

    def check(self, nodes: Sequence[Mapping[str, float]], place: str) -> None:
        """Raises: InputError if one expert's workers never fit on these nodes; ``place`` names them."""
        if sum(map(self.fits, nodes)) >= self.workers_per_expert:
            return
        names = [name for name in self.resources() if name != "CPU"]
        most = max(nodes, key=lambda node: ([node.get(name, 0) for name in names], node.get("CPU", 0)), default={})
        has = " and ".join(f"{most.get(name, 0):g} {name}" + "s" * (name in ("CPU", "GPU")) for name in ("CPU", "GPU", *self.custom))
        raise InputError(
            f"resources: {self.workers_per_expert} worker(s) of {self} never fit {place} of {len(nodes)} node(s), the largest with {has}: "
            "lower resources.cpus_per_worker, gpus_per_worker, custom or workers_per_expert"
        )


def cpus_here(most: int | None) -> int:
    """CPUs of a local Ray."""
    here = os.cpu_count() or 1
    return here if most is None else min(most, here)


class Cluster(Protocol):
    """A task is ``task(session, item)``. All three verbs return results in the order of their input."""

    need: Need
    calls: list[Call]
    """What was asked of it so far, and how long that took; whoever reads it may empty it."""

    def slots(self) -> int:
        """How many workers fit at once."""

    def scatter(self, task: Task, items: Sequence[Any]) -> list[Any]:
        """Independent tasks, as many at a time as fit."""

    def fit_all(
        self, task: Task, jobs: Mapping[str, Any], storage: Path, on_done: Callable[[str, ExpertCheckpoint], None]
    ) -> dict[str, ExpertCheckpoint]:
        """One training run per job, as many at a time as fit, the rest queued in the order of ``jobs``. A run's name is its identity: the
        same name resumes from its newest readable checkpoint under ``storage/name``.

        One failing run does not stop the others. Raises: RunFailed at the end, naming those that failed.
        """

    def search(
        self, task: Task, axes: Mapping[str, Sequence[Any]], items: Mapping[str, Any], storage: Path, stop_early: bool = False
    ) -> dict[str, SearchTrial]:
        """One trial per combination of ``axes``; ``items`` is keyed by the combination's values joined with "/".

        The same storage is the same search: trials that ended are not run again. ``stop_early``: trials that fall behind others of the same
        problem, all but the agent and the seed being equal, may be stopped; they are left without a plan.
        """

    def close(self) -> None: ...


class InlineCluster:
    """Everything in this process, one after the other, without Ray."""

    def __init__(self, need: Need, on_progress: Callable[[Progress], None] = lambda event: None):
        self.need = need
        self.on_progress = on_progress
        self.calls: list[Call] = []

    def _session(self, folder: str = "") -> Session:
        return Session(folder=folder, device=self.need.device, on_progress=self.on_progress)

    def slots(self) -> int:
        return 1

    def scatter(self, task: Task, items: Sequence[Any]) -> list[Any]:
        seconds, found = [], []
        for item in items:
            started = time.time()
            found.append(task(self._session(), item))
            seconds.append(time.time() - started)
        self.calls.append(Call.of(task_name(task), 1, sum(seconds), seconds))
        return found

    def fit_all(
        self, task: Task, jobs: Mapping[str, Any], storage: Path, on_done: Callable[[str, ExpertCheckpoint], None]
    ) -> dict[str, ExpertCheckpoint]:
        done: dict[str, ExpertCheckpoint] = {}
        failed: dict[str, BaseException] = {}
        started = time.time()
        for name, item in jobs.items():
            try:
                done[name] = task(self._session(str(storage / name)), item)
                on_done(name, done[name])
                remove(storage / name / FAILURE)
            except Exception as error:  # the others still run; all failures are told together
                failed[name] = error
        work = [one.ended - one.started for one in done.values()]
        self.calls.append(Call.of(task_name(task), 1, time.time() - started, work, each=True))
        raise_failures(failed, len(jobs), storage)
        return done

    def search(
        self, task: Task, axes: Mapping[str, Sequence[Any]], items: Mapping[str, Any], storage: Path, stop_early: bool = False
    ) -> dict[str, SearchTrial]:
        """One after the other, so that there is nothing to stop early."""
        log = TrialLog(storage)
        found = log.read(items)
        seconds: list[float] = []
        for key, item in items.items():
            if key not in found:
                started = time.time()
                found[key] = task(self._session(), item)
                log.write(key, found[key])
                seconds.append(time.time() - started)
        self.calls.append(Call.of(task_name(task), 1, sum(seconds), seconds))
        return {key: found[key] for key in items}

    def close(self) -> None:
        pass


class TrialLog:
    """The trials of one search that ended, a file each, so that none of them runs again."""

    def __init__(self, storage: Path):
        self.folder = storage / "search"
        self.folder.mkdir(exist_ok=True)

    def file(self, key: str) -> Path:
        return self.folder / f"{key.replace('/', ' ').replace(':', '-')}.json"

    def read(self, keys: Iterable[str]) -> dict[str, SearchTrial]:
        """Those that ended. Raises: InputError that names a damaged file."""
        found = {key: read_as(self.file(key), SearchTrial.from_json) for key in keys}
        return {key: trial for key, trial in found.items() if trial is not None}

    def write(self, key: str, trial: SearchTrial) -> None:
        write_json(self.file(key), trial.to_json())


def task_name(task: Task) -> str:
    return getattr(task, "__name__", "task")


def raise_failures(failed: Mapping[str, BaseException], total: int, storage: Path) -> None:
    """Raises: RunFailed that names every failed run, why, its log with the whole traceback, and how to go on. Nothing if none failed."""
    if not failed:
        return
    reasons = []
    for name, error in failed.items():
        log = storage / name / FAILURE
        with contextlib.suppress(OSError, RunFailed):  # a full disk, or a store that does not answer, may be why it failed
            log.parent.mkdir(exist_ok=True)
            log.write_text("".join(traceback.format_exception(error)))
            finished(log)
        told = (storage_error(error) if isinstance(error, OSError) else None) or " ".join(str(error).split())[:300]
        reasons.append(f"{name}: {told} (log: {log})")
    raise RunFailed(
        f"{len(failed)} of {total} runs failed: {'; '.join(reasons)}. Checkpoints are under {storage}; "
        "the same command again continues from them"
    ) from next(iter(failed.values()))
