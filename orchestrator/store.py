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
Folders carry their fingerprint, so settings may change and change back: nothing is overwritten, and nothing that was made is deleted.

On an object store, which knows no folders, renames or locks, the same names are objects, and this machine works in a mirror of them
(`workers.mirror`). The lock is a lease (`lease`), the folder is claimed by writing run.json if it is not there, and setting aside is
copying object by object, done.json last.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from orchestrator.lease import Lease
from orchestrator.place import Place
from workers import mirror
from workers.contracts import InputError, RunFailed
from workers.files import followed_by, replacing, sync
from workers.mirror import Mirror

SCHEMA = 1
Decoded = TypeVar("Decoded")


def write_json(path: Path, value: Any, durable: bool = True) -> None:
    """Atomically: beside, then renamed. ``durable``: see `workers.files.replacing`."""
    with replacing(path, durable) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> Any | None:
    """None if the file is not there. Raises: InputError if it is there and no JSON."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error}): delete it to have it made again") from None


def read_as(path: Path, decode: Callable[[Any], Decoded]) -> Decoded | None:
    """What ``decode`` makes of a JSON file; None if there is nothing. Raises: InputError that names the file, whatever is wrong with it."""
    found = read_json(path)
    try:
        return None if found is None else decode(found)
    except InputError as error:
        raise InputError(f"{path} is damaged ({str(error)[:200]}): delete it to have it made again") from None


def read_object(path: Path, *keys: str) -> dict[str, Any] | None:
    """The JSON object of a file, which has these keys; None if it is not there. Raises: InputError."""

    def decode(found: Any) -> dict[str, Any]:
        if not isinstance(found, dict):
            raise InputError("it is not a JSON object")
        if missing := [key for key in keys if key not in found]:
            raise InputError(f"it has no {missing[0]}")
        return found

    return read_as(path, decode)


class RunStore:
    """One run folder, or the mirror of one. Reading never creates anything but a mirror's copies."""

    def __init__(self, folder: Path, uri: str = ""):
        """``uri``: of the run on an object store, whose mirror the folder is."""
        self.folder = folder
        self.mirror = Mirror(str(folder), uri) if uri else None
        self.workers_mirror = self.mirror
        """While the run is locked, workers stop when the lock goes to another driver."""
        self._foreign = False

    @classmethod
    def of(cls, place: Place, wanted: Callable[[str], bool] = mirror.shows) -> RunStore:
        """The store, a mirror with what is ``wanted`` of it. Raises: InputError if an object store cannot be read."""
        store = cls(place.folder, place.uri)
        store.refresh(wanted)
        return store

    def where(self, path: Path | None = None) -> str:
        """How the folder, or a path within, is called elsewhere."""
        if self.mirror is None:
            return str(path or self.folder)
        return self.mirror.store.uri("" if path is None else path.relative_to(self.folder).as_posix())

    def told(self, value: Any) -> Any:
        """JSON with the paths of a mirror told as what they are copies of."""
        if isinstance(value, dict):
            return {key: self.told(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.told(item) for item in value]
        inside = self.mirror is not None and isinstance(value, str) and Path(value).is_relative_to(self.folder)
        return self.where(Path(value)) if inside and Path(value) != self.folder else self.where() if inside else value

    def refresh(self, wanted: Callable[[str], bool] = mirror.shows) -> None:
        """Bring what a command needs of a run into its mirror; a driver at work on this machine does so itself.

        Raises: InputError if the store cannot be read."""
        if self.mirror is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.folder / ".lock", blocking=False):
                pass
        except Timeout:
            return
        try:
            there = self.mirror.store.names("")
            self._foreign = "run.json" not in there and any(not name.startswith(".") for name in there)
            found = {} if "run.json" not in there else self.mirror.pull(wanted)
        except RunFailed as error:
            raise InputError(f"storage.path: {error}") from None
        if not found:
            self.mirror.prune({})
        for record in self.folder.glob("*/done.json"):
            if self.mirror.name_of(record) not in found:
                record.unlink()

    @contextlib.contextmanager
    def followed(self) -> Iterator[None]:
        """What is written within goes to an object store too."""
        with followed_by(self.mirror):
            yield

    def claim(self, owner: dict[str, Any]) -> None:
        """Make the folder ours, or see that it is. Raises: InputError if it belongs to another job or cannot be written."""
        self.check_owner(owner)
        if self.mirror is not None:
            self._claim_objects(self.mirror, owner)
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / "run.json").exists():
                write_json(self.folder / "run.json", {"schema": SCHEMA, **owner})
        except OSError as error:
            raise InputError(f"storage.path: cannot write {self.folder}: {error.strerror}") from None

    def _claim_objects(self, there: Mirror, owner: dict[str, Any]) -> None:
        try:
            there.store.require_conditions()
            content = json.dumps({"schema": SCHEMA, **owner}, indent=1) + "\n"
            if not (self.folder / "run.json").exists() and not there.store.create("run.json", content.encode()):
                self.refresh()
                self.check_owner(owner)
        except RunFailed as error:
            raise InputError(f"storage.path: {error}") from None

    def check_owner(self, owner: dict[str, Any]) -> None:
        """A list names one thing in several ways (where it lies, what it is); one that agrees is enough.

        Raises: InputError if the folder belongs to another job or is no run folder. Touches nothing."""
        try:
            found = read_object(self.folder / "run.json")
            # what a killed claim leaves behind is hidden, and so is what file managers add
            here = [] if self.mirror or not self.folder.exists() else self.folder.iterdir()
            foreign = self._foreign or (found is None and any(not path.name.startswith(".") for path in here))
        except OSError as error:
            raise InputError(f"storage.path: cannot use {self.folder}: {error.strerror}") from None
        if foreign:
            raise InputError(f"storage.path: {self.where()} is not empty and holds no run: choose another storage.path or name")
        for key, value in owner.items():
            theirs = None if found is None else found.get(key)
            same = theirs == value or (
                isinstance(value, list) and isinstance(theirs, list) and any(a == b for a, b in zip(theirs, value, strict=False))
            )
            if found is not None and not same:
                theirs, ours = (v[0] if isinstance(v, list) else v for v in (theirs, value))
                raise InputError(
                    f"{self.where()} holds the run of another job ({key} {theirs}, this job has {ours}): "
                    "give this job its own name, e.g. --set name=mine"
                )

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """One driver per run folder; the lock goes with its process. Raises: InputError if another holds it."""
        lock = FileLock(self.folder / ".lock", timeout=0 if self.mirror is None else 1)  # who reads a mirror holds it for a moment
        try:
            lock.acquire()
        except Timeout:
            raise InputError(
                f"another diffpruning is running in {self.where()}: wait for it, or watch it with `diffpruning status`"
            ) from None
        try:
            if self.mirror is None:
                self.tidy()
                yield
            else:
                with self._leased(self.mirror):
                    yield
        finally:
            lock.release()

    @contextlib.contextmanager
    def _leased(self, there: Mirror) -> Iterator[None]:
        """The lease of a run on an object store, and its mirror, exact and followed."""
        lease = Lease(there.store, self._machine())
        lease.take()
        try:
            self.workers_mirror = dataclasses.replace(there, lease=lease.number)
            there.prune(there.pull(mirror.works, exactly=True))
            self.tidy()
            with followed_by(lease), followed_by(there):
                try:
                    yield
                finally:
                    with contextlib.suppress(RunFailed, OSError):  # what ended the run is told
                        for rest in ("tensorboard", "ray.log"):
                            there.finished(self.folder / rest) if (self.folder / rest).exists() else None
        except KeyboardInterrupt:
            lease.require_held()
            raise
        finally:
            with contextlib.suppress(RunFailed, OSError):  # it ends by itself
                lease.give_back()

    def _machine(self) -> str:
        """A word that only processes that share this folder on their disk know."""
        file = self.folder / ".machine"
        if not file.exists():
            beside = file.with_name(f".machine.{secrets.token_hex(4)}")
            beside.write_text(secrets.token_hex(16))
            beside.replace(file)
        return file.read_text()

    def stage_folder(self, stage: str, fingerprint: str) -> Path:
        return self.folder / f"{stage}-{fingerprint[:8]}"

    def done(self, stage: str, fingerprint: str) -> dict[str, Any] | None:
        """The stage's done record, if it was finished under exactly this fingerprint."""
        record = read_object(self.stage_folder(stage, fingerprint) / "done.json", "result", "seconds", "started")
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
        """Vouch for what the stage has made, all of which is on the disk by then.

        ``calls``: what the stage asked of the cluster, and how long that took; ``resumed``: some of it was made before."""
        folder = self.stage_folder(stage, fingerprint)
        if self.mirror is None:
            for path in (*folder.rglob("*"), folder, self.folder):
                with contextlib.suppress(FileNotFoundError):  # of a process that was given up
                    if path.is_file() or path.is_dir():
                        sync(path)
        record = {"schema": SCHEMA, "stage": stage, "fingerprint": fingerprint, "started": started, "seconds": seconds}
        write_json(folder / "done.json", {**record, "resumed": resumed, "calls": list(calls), "result": result})

    @contextlib.contextmanager
    def refusing(self) -> Iterator[None]:
        """Whoever refuses an input before anything is made leaves no folder. For who holds the lock of a run that was not there before."""
        try:
            yield
        except InputError:
            made = (path.relative_to(self.folder).parts for path in self.folder.rglob("*") if not path.is_dir())
            if all(parts in (("run.json",), ("job.json",), ("progress.json",), ("ray.log",), (".lock",)) for parts in made):
                shutil.rmtree(self.folder, ignore_errors=True)
            raise

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
        moved = {*leaves(record["result"]), *([fills] if fills else [])}

        def leaning(result: dict[str, Any]) -> bool:
            return any(name in moved or name.partition("/")[0] == fills for name in leaves(result))

        records = {path.parent.name: read_object(path, "result") for path in self.folder.glob(f"{stage}-????????/done.json")}
        others = {name for name, other in records.items() if leans and other and leaning(other["result"])}
        own = self.stage_folder(stage, fingerprint).name
        for path in (self.folder / name for name in (*sorted(moved), *sorted(others - {own}), own)):  # until the last, it can be done again
            if path.exists():
                aside = next(to for n in range(1, 10000) if not self._exists(to := path.with_name(f"{path.name}.aside{n}")))
                if self.mirror is None:
                    path.rename(aside)
                else:
                    self.mirror.move(path, aside, last="done.json")

    def _exists(self, path: Path) -> bool:
        return path.exists() or (self.mirror is not None and self.mirror.holds(path))

    def has(self, path: Path) -> bool:
        """Whether a file is finished, be it here or not."""
        if self.mirror is None:
            return path.exists()
        return self.mirror.store.find(path.relative_to(self.folder).as_posix()) is not None


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
