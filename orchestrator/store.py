"""The run folder: fingerprints, atomic writes, done records, one lock. Knows nothing of diffusion.

    <storage>/<name>/run.json                     whose folder it is
                     job.json                     the job and the command of the last `run`
                     cache/                       decoded images, shared by all stages
                     <stage>-<fingerprint>/       one stage under one set of settings; done.json is written last
                     train/<stage>-<unit>-<key>/  checkpoints of the trainers, shared by all settings that ask for the same
                     search/                      trials of plan searches, shared alike
                     evaluation/                  what was measured, a file per row of the table
                     tensorboard/                 curves of every expert, a folder each
                     progress.json                what is at work now, or how it ended
                     report.html, figures/        written by publish
Folders carry their fingerprint, so settings may change and change back: nothing is overwritten and nothing is deleted.
"""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from workers.contracts import InputError
from workers.files import replacing

SCHEMA = 1


def write_json(path: Path, value: Any) -> None:
    """Atomically: beside, then renamed."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> Any | None:
    """None if the file is not there. Raises: InputError if it is there and no JSON."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is damaged ({error}): delete it to have it made again") from None


class RunStore:
    """One run folder. Reading never creates anything."""

    def __init__(self, folder: Path):
        self.folder = folder

    def claim(self, owner: dict[str, Any]) -> None:
        """Make the folder ours, or see that it is. Raises: InputError if it belongs to another job or cannot be written."""
        self.check_owner(owner)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / "run.json").exists():
                write_json(self.folder / "run.json", {"schema": SCHEMA, **owner})
        except OSError as error:
            raise InputError(f"storage.path: cannot write {self.folder}: {error.strerror}") from None

    def check_owner(self, owner: dict[str, Any]) -> None:
        """A list names one thing in several ways (where it lies, what it is); one that agrees is enough.

        Raises: InputError if the folder belongs to another job or is no run folder. Touches nothing."""
        try:
            found = read_json(self.folder / "run.json")
            # what a killed claim leaves behind is hidden, and so is what file managers add
            foreign = found is None and self.folder.exists() and any(not path.name.startswith(".") for path in self.folder.iterdir())
        except OSError as error:
            raise InputError(f"storage.path: cannot use {self.folder}: {error.strerror}") from None
        if foreign:
            raise InputError(f"storage.path: {self.folder} is not empty and holds no run: choose another storage.path or name")
        for key, value in owner.items():
            theirs = None if found is None else found.get(key)
            same = theirs == value or (
                isinstance(value, list) and isinstance(theirs, list) and any(a == b for a, b in zip(theirs, value, strict=False))
            )
            if found is not None and not same:
                theirs, ours = (v[0] if isinstance(v, list) else v for v in (theirs, value))
                raise InputError(
                    f"{self.folder} holds the run of another job ({key} {theirs}, this job has {ours}): "
                    "give this job its own name, e.g. --set name=mine"
                )

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """One driver per run folder; the lock goes with its process. Raises: InputError if another holds it."""
        lock = FileLock(self.folder / ".lock", blocking=False)
        try:
            lock.acquire()
        except Timeout:
            raise InputError(
                f"another diffpruning is running in {self.folder}: wait for it, or watch it with `diffpruning status`"
            ) from None
        try:
            self.tidy()
            yield
        finally:
            lock.release()

    def stage_folder(self, stage: str, fingerprint: str) -> Path:
        return self.folder / f"{stage}-{fingerprint[:8]}"

    def done(self, stage: str, fingerprint: str) -> dict[str, Any] | None:
        """The stage's done record, if it was finished under exactly this fingerprint."""
        record = read_json(self.stage_folder(stage, fingerprint) / "done.json")
        return record if record is not None and record.get("fingerprint") == fingerprint else None

    def finish(
        self,
        stage: str,
        fingerprint: str,
        result: dict[str, Any],
        started: float,
        seconds: float,
        calls: Sequence[dict[str, Any]] = (),
        resumed: bool = False,
    ) -> None:
        """``calls``: what the stage asked of the cluster, and how long that took; ``resumed``: some of it was made before."""
        record = {"schema": SCHEMA, "stage": stage, "fingerprint": fingerprint, "started": started, "seconds": seconds}
        write_json(
            self.stage_folder(stage, fingerprint) / "done.json", {**record, "resumed": resumed, "calls": list(calls), "result": result}
        )

    def tidy(self) -> None:
        """Remove what killed processes have left of files that they were writing; for who holds the lock, and no work under way."""
        for left in (*self.folder.glob("*/.*.tmp*"), *self.folder.glob("*/*/.*.tmp*"), *self.folder.glob("cache/*.tmp")):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
        for left in self.folder.glob(".*.tmp*"):  # here, commands that need no lock write too
            if left.is_file() and not _writer_lives(left):
                left.unlink(missing_ok=True)

    def state(self, stage: str, fingerprint: str) -> str:
        """done; partial (started under these settings); stale (done under other settings); or new."""
        if self.done(stage, fingerprint) is not None:
            return "done"
        if self.stage_folder(stage, fingerprint).is_dir():
            return "partial"
        return "stale" if any(self.folder.glob(f"{stage}-????????/done.json")) else "new"

    def set_aside(
        self,
        stage: str,
        fingerprint: str,
        fills: str = "",
        leaves: Callable[[dict[str, Any]], Sequence[str]] = lambda result: (),
        leans: bool = True,
    ) -> None:
        """Rename what was finished under this fingerprint, the folder that the stage ``fills``, and all that it ``leaves``, so that it is
        made again; if it ``leans`` on that, results under other settings that lean on the same go with it.

        Nothing is deleted, and unfinished work goes on.
        """
        record = self.done(stage, fingerprint)
        if record is None:
            return
        left = {*leaves(record["result"]), *([fills] if fills else [])}

        def points_to_it(result: dict[str, Any]) -> bool:
            return any(name in left or name.partition("/")[0] == fills for name in leaves(result))

        records = {path.parent.name: read_json(path) for path in self.folder.glob(f"{stage}-????????/done.json")}
        names = {self.stage_folder(stage, fingerprint).name, *left}
        names |= {name for name, other in records.items() if leans and other and points_to_it(other["result"])}
        for path in (self.folder / name for name in sorted(names)):
            if path.exists():
                number = next(n for n in range(1, 10000) if not path.with_name(f"{path.name}.aside{n}").exists())
                path.rename(path.with_name(f"{path.name}.aside{number}"))


def _writer_lives(temporary: Path) -> bool:
    """Whether the process in the name of a temporary file runs on this machine."""
    number = temporary.name.partition(".tmp")[0].rpartition(".")[2]
    return number.isdecimal() and Path("/proc", number).exists()


def storage_error(error: OSError) -> str | None:
    """One line for a disk that is full or cannot be used; None for any other error."""
    where = error.filename or "the storage"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"cannot write to {where}: {error.strerror}: make room and run the same command again; finished work is kept"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"no access to {where}: {error.strerror}"
    return None
