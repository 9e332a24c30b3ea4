"""The order: skip what is done, run the rest. Knows nothing of diffusion and nothing of Ray.

A stage is done iff its folder holds done.json with the fingerprint computed now:
sha256(stage, its version, the settings it declares in ``reads``, the fingerprints of its ``needs``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.store import RunStore
from workers.contracts import InputError, digest_of


@dataclass(frozen=True)
class Stage:
    """``run(context)`` returns the stage's result as JSON. ``reads``: dotted keys of the job; ``version`` grows with its meaning."""

    name: str
    run: Callable[[Context], dict[str, Any]]
    needs: tuple[str, ...]
    reads: tuple[str, ...]
    ignores: tuple[str, ...] = ()
    """Keys within ``reads`` that change how the stage works and not what it finds."""
    later: Mapping[str, Any] = field(default_factory=dict)
    """Keys, also within ``reads``, which there were not always, with what stands for how it was before: only another value counts."""
    version: int = 1
    holds: Callable[[dict[str, Any]], bool] = lambda result: True
    """Whether what the stage left outside the run folder is still there."""
    fills: str = ""
    """A folder of the run that it fills beside its own, whatever the settings."""
    leaves: Callable[[dict[str, Any]], Sequence[str]] = lambda result: ()
    """Elsewhere in the run folder, what its result came with: paths relative to it, which other settings may share."""
    leans: bool = True
    """Whether its result is worth nothing without what it leaves."""


@dataclass
class Context:
    """What a stage function gets: the job, its own folder, the results before it, and whom to ask for work."""

    job: Any
    cluster: Any
    store: RunStore
    folder: Path
    fingerprint: str
    results: Mapping[str, dict[str, Any]]
    identity: Mapping[str, str]
    say: Callable[[str], None]
    fingerprints: Mapping[str, str]
    reused: bool = False
    """A stage sets it if it found some of its work done, so that what its calls took is not all that it takes."""

    def folder_of(self, stage: str) -> Path:
        """The folder of a stage that is done."""
        return self.store.stage_folder(stage, self.fingerprints[stage])


@dataclass
class Pipeline:
    """The stages in order, for one job. ``identity``: what stands for the model and the data in fingerprints, instead of their paths."""

    stages: Sequence[Stage]
    settings: Mapping[str, Any]
    identity: Mapping[str, str]
    store: RunStore
    fingerprints: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.fingerprints = {}
        for stage in self.stages:
            values = {key: self._value(key, (*stage.ignores, *stage.later)) for key in stage.reads}
            values |= {key: value for key, before in stage.later.items() if (value := self._value(key, ())) != before}
            needs = [self.fingerprints[name] for name in stage.needs]
            self.fingerprints[stage.name] = digest_of([stage.name, stage.version, values, needs])

    def _value(self, key: str, ignores: Sequence[str]) -> Any:
        if key in self.identity:
            return self.identity[key]
        here: Any = self.settings
        for part in key.split("."):
            here = here[part]
        return {name: value for name, value in here.items() if f"{key}.{name}" not in ignores} if isinstance(here, dict) else here

    def states(self) -> dict[str, str]:
        """Stage -> done, partial, stale or new. A stage whose predecessor is not done cannot be done: its fingerprint would differ."""
        found = {stage.name: self.store.state(stage.name, self.fingerprints[stage.name]) for stage in self.stages}
        return found | {stage.name: "partial" for stage in self.stages if found[stage.name] == "done" and self._done(stage) is None}

    def _done(self, stage: Stage) -> dict[str, Any] | None:
        record = self.store.done(stage.name, self.fingerprints[stage.name])
        return record if record is not None and stage.holds(record["result"]) else None

    def after(self, names: Sequence[str]) -> list[str]:
        """The named stages and every stage that builds on one of them, in order."""
        found: list[str] = []
        for stage in self.stages:
            if stage.name in names or set(found) & set(stage.needs):
                found.append(stage.name)
        return found

    def select(self, only: str | None, redone: Sequence[str] = (), until: str | None = None) -> list[Stage]:
        """All stages, those up to and with ``until``, or one.

        Raises: InputError if the predecessors of that one are not done, or are to be ``redone``.
        """
        if only is None:
            names = [stage.name for stage in self.stages]
            return list(self.stages[: names.index(until) + 1 if until else None])
        states = self.states() | {name: "to be made again" for name in redone}
        stage = next(stage for stage in self.stages if stage.name == only)
        missing = [name for name in stage.needs if states[name] != "done"]
        if missing:
            raise InputError(f"--only {only}: stage {missing[0]} is not done ({states[missing[0]]}): run it first")
        return [stage]

    def run(
        self,
        job: Any,
        cluster: Callable[[], Any],
        say: Callable[[str], None],
        only: str | None = None,
        redo: Sequence[str] = (),
        on_stage: Callable[[str, str, float], None] = lambda name, state, seconds: None,
        until: str | None = None,
    ) -> dict[str, dict[str, Any]]:
        """Run what is not done; returns every finished stage's result. ``cluster`` is called when the first stage needs it."""
        redone = self.after(redo)
        chosen, started_cluster = self.select(only, redone, until), None
        if redone:
            started_cluster = cluster()  # before anything moves: a job that does not fit must cost nothing
        for stage in self.stages:
            if stage.name in redone:
                self.store.set_aside(stage.name, self.fingerprints[stage.name], stage.fills, stage.leaves, stage.leans)
        results: dict[str, dict[str, Any]] = {}
        for stage in self.stages:
            fingerprint = self.fingerprints[stage.name]
            record = self._done(stage)
            if record is None and stage in chosen:
                folder = self.store.stage_folder(stage.name, fingerprint)
                started_cluster = started_cluster or cluster()
                resumed = folder.exists()
                folder.mkdir(exist_ok=True)
                on_stage(stage.name, "running", 0.0)
                started = time.time()
                started_cluster.calls.clear()
                context = Context(job, started_cluster, self.store, folder, fingerprint, results, self.identity, say, self.fingerprints)
                result = stage.run(context)
                calls = [call.to_json() for call in started_cluster.calls]
                self.store.finish(stage.name, fingerprint, result, started, time.time() - started, calls, resumed or context.reused)
                on_stage(stage.name, "finished", time.time() - started)
                startup_s = sum(call["wall_s"] for call in calls) - sum(call["busy_s"] for call in calls)
                if startup_s >= 1:
                    say(f"  start-up of processes took {startup_s:.0f} s of it")
                record = self.store.done(stage.name, fingerprint)
            elif record is not None:
                on_stage(stage.name, "already done", record["seconds"])
            if record is not None:
                results[stage.name] = record["result"]
        if started_cluster is not None:
            self.store.tidy()
        return results
