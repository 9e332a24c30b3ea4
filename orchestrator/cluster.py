"""Where work is done: the Cluster protocol, and InlineCluster, which does it right here (tests, ``--inline``)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from workers.contracts import ExpertCheckpoint, Progress, RunFailed
from workers.files import replacing
from workers.session import Session
from workers.trials import SearchTrial

Task = Callable[[Session, Any], Any]


@dataclass(frozen=True)
class Need:
    """What one worker holds while it works, and how many workers one expert has."""

    device: str
    cpus: float
    gpus: float
    workers_per_expert: int = 1

    def __str__(self) -> str:
        gpus = f" and {self.gpus:g} GPU{'s' if self.gpus > 1 else ''}" if self.gpus else ""
        return f"{self.cpus:g} CPU{'s' if self.cpus > 1 else ''}{gpus}"


class Cluster(Protocol):
    """A task is ``task(session, item)``. All three verbs return results in the order of their input."""

    need: Need

    def slots(self) -> int:
        """How many workers fit at once."""

    def scatter(self, task: Task, items: Sequence[Any]) -> list[Any]:
        """Independent tasks, as many at a time as fit."""

    def fit_all(
        self, task: Task, jobs: Mapping[str, Any], storage: Path, on_done: Callable[[str, ExpertCheckpoint], None]
    ) -> dict[str, ExpertCheckpoint]:
        """One training run per job, as many at a time as fit, the rest queued. A run's name is its identity: the same name resumes.

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

    def _session(self, folder: str = "") -> Session:
        return Session(folder=folder, device=self.need.device, on_progress=self.on_progress)

    def slots(self) -> int:
        return 1

    def scatter(self, task: Task, items: Sequence[Any]) -> list[Any]:
        return [task(self._session(), item) for item in items]

    def fit_all(
        self, task: Task, jobs: Mapping[str, Any], storage: Path, on_done: Callable[[str, ExpertCheckpoint], None]
    ) -> dict[str, ExpertCheckpoint]:
        done: dict[str, ExpertCheckpoint] = {}
        failed: dict[str, Exception] = {}
        for name, item in jobs.items():
            try:
                done[name] = task(self._session(str(storage / name)), item)
                on_done(name, done[name])
            except Exception as error:  # the others still run; all failures are told together
                failed[name] = error
        raise_failures(failed, len(jobs), storage)
        return done

    def search(
        self, task: Task, axes: Mapping[str, Sequence[Any]], items: Mapping[str, Any], storage: Path, stop_early: bool = False
    ) -> dict[str, SearchTrial]:
        """One after the other, so that there is nothing to stop early."""
        found: dict[str, SearchTrial] = {}
        (storage / "search").mkdir(exist_ok=True)
        for key, item in items.items():
            record = storage / "search" / f"{key.replace('/', ' ').replace(':', '-')}.json"
            if not record.exists():
                trial = task(self._session(), item)
                with replacing(record) as path:
                    path.write_text(json.dumps(trial.to_json()))
            found[key] = SearchTrial.from_json(json.loads(record.read_text()))
        return found

    def close(self) -> None:
        pass


def raise_failures(failed: Mapping[str, BaseException], total: int, storage: Path) -> None:
    """Raises: RunFailed that names every failed run, why, where its files are, and how to go on. Nothing if none failed."""
    if failed:
        reasons = "; ".join(f"{name}: {' '.join(str(error).split())[:300]}" for name, error in failed.items())
        raise RunFailed(
            f"{len(failed)} of {total} runs failed: {reasons}. Checkpoints are under {storage}; the same command again continues from them"
        ) from next(iter(failed.values()))
