"""A run folder on an object store, as work sees it: a folder of this machine that is kept like it.

Everything that runs reads and writes plain files. What it finishes goes to the store at the moment of its rename; what is not here comes
from there, before a task begins, or, for the tensors of checkpoints, when somebody reads them. The store is what counts: a file that it has
not is not finished. A file here is the store's own if both have one size and one time, for every copy is given the time of its object.
Names that begin with a dot stay where they are. ``uri`` and ``folder`` are the same on every machine; the folder need not be shared.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from filelock import FileLock

from workers import files
from workers.contracts import RunFailed
from workers.objects import Found, ObjectStore
from workers.records import Record

LAZY = "state.safetensors"
"""Of a checkpoint: comes when it is read."""
BULKY = (".arrow", ".safetensors")
"""What no command needs that only shows what a run has found."""
AT_ONCE = 8
LEASES = ".lock"
"""Numbered objects, of which the highest says which driver has the run."""
SHARED = ("train",)
"""Folders of which a task reads only what is below the part that it names."""
_ASIDE = re.compile(r"\.aside\d+$")


def tells(name: str) -> bool:
    """Whether the object says where a run stands."""
    return is_ours(name) and PurePosixPath(name).name in ("run.json", "progress.json", "done.json")


def shows(name: str) -> bool:
    """Whether a command that only shows a run needs the object."""
    return works(name) and PurePosixPath(name).suffix not in BULKY


def works(name: str) -> bool:
    """Whether a task may need the object without saying so."""
    return is_ours(name) and PurePosixPath(name).name != LAZY and not any(_ASIDE.search(part) for part in PurePosixPath(name).parts)


def is_ours(name: str) -> bool:
    """Whether it is mirrored at all: nothing that begins with a dot, and nothing that leads out of the folder."""
    return files.is_plain(name) and not any(part.startswith(".") for part in PurePosixPath(name).parts)


@dataclass(frozen=True)
class Mirror(Record):
    """``folder``, absolute, holds what this machine has of the run at ``uri``.

    ``lease``: for a worker, the number of its driver's; nothing is sent or removed once another driver has the run. 0: no worker's."""

    folder: str
    uri: str
    lease: int = 0

    @functools.cached_property
    def store(self) -> ObjectStore:
        return ObjectStore.of(self.uri, "storage.path")

    def attach(self, item: object) -> None:
        """For a worker: fetch what its task reads, and follow what is written from now on. ``item``: what the task is handed.

        Raises: RunFailed if the store cannot be read from here, or the run is another driver's."""
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        self._require_current()
        files.follow(self)
        self.fetch(item)

    def fetch(self, item: object) -> None:
        """Bring the folders here whose paths are in the item: a task reads nothing else of a run."""
        for name in sorted(self._read_by(item)):
            if not self.pull(works, name) and "/" not in name and (found := self.store.find(name)):  # a file beside the folders
                self._fetch_missing({name: found}, works, exactly=False)

    def _read_by(self, item: object) -> set[str]:
        """The folders of the run that an item leads into."""
        if isinstance(item, (str, Path)):
            name = self.name_of(Path(item)) if str(item).startswith(self.folder) else None
            parts = PurePosixPath(name).parts if name is not None else ()
            return {"/".join(parts[: 2 if parts[0] in SHARED else 1])} if parts else set()
        if dataclasses.is_dataclass(item):
            return self._read_by(list(vars(item).values()))
        if isinstance(item, Mapping):
            return self._read_by(list(item.values()))
        if isinstance(item, (tuple, list)) and not set(map(type, item)) <= {int, float}:  # rows of data may be many
            return set[str]().union(*map(self._read_by, item))
        return set()

    def _require_current(self) -> None:
        """Raises: RunFailed in a worker whose driver was given up."""
        if self.lease and max((int(name) for name in self.store.names(LEASES) if name.isdecimal()), default=0) > self.lease:
            raise RunFailed(f"{self.uri} was taken over by another diffpruning: its work goes on there, and this worker's ends here")

    def __reduce__(self) -> tuple[type[Mirror], tuple[str, str, int]]:
        """What crosses processes is these; every process has connections of its own."""
        return Mirror, (self.folder, self.uri, self.lease)

    # --- from here to there -------------------------------------------------------------------------------------------

    def finished(self, path: Path, last: str = "") -> None:
        name = self.name_of(path)
        if name is None:
            return
        self._require_current()
        inside = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
        for file in sorted(inside, key=lambda file: (file.name == last, file)):
            self._upload(file)

    def _upload(self, file: Path) -> None:
        name = self.name_of(file)
        if name is None:
            return
        self.store.upload(file, name)
        if found := self.store.find(name):
            with contextlib.suppress(FileNotFoundError):  # replaced by a newer one, whose turn comes
                os.utime(file, (found.written, found.written))

    def removed(self, path: Path, first: str = "") -> None:
        name = self.name_of(path)
        if name is None:
            return
        self._require_current()
        for below in sorted({name, *self.store.listing(name)}, key=lambda below: PurePosixPath(below).name != first):
            self.store.delete(below)

    def move(self, path: Path, to: Path, last: str) -> None:
        """Rename a file or folder here and there; there it is copies, made one by one, the object named ``last`` last, and never one
        moment."""
        name, new = self.name_of(path), self.name_of(to)
        assert name is not None and new is not None, path
        if path.exists():
            path.rename(to)
        for below in sorted(self._below(name), key=lambda below: PurePosixPath(below).name == last):
            self.store.copy(below, new + below.removeprefix(name))
            self.store.delete(below)

    def holds(self, path: Path) -> bool:
        """Whether the store has a file, or files of a folder."""
        name = self.name_of(path)
        return name is not None and bool(self._below(name))

    def _below(self, name: str) -> list[str]:
        """The object of that name, or those below it."""
        return [name] if self.store.find(name) is not None else list(self.store.listing(name))

    # --- from there to here -------------------------------------------------------------------------------------------

    def pull(self, wanted: Callable[[str], bool], below: str = "", exactly: bool = False) -> dict[str, Found]:
        """Fetch what is ``wanted`` and not here; what the store has, by name.

        ``exactly``: what is here and other than there goes, for who holds the run's lock. Else what is newer here is on its way there.
        """
        listing = {name: found for name, found in self.store.listing(below).items() if is_ours(name)}
        self._fetch_missing(listing, wanted, exactly)
        return listing

    def _fetch_missing(self, listing: Mapping[str, Found], wanted: Callable[[str], bool], exactly: bool) -> None:
        def missing() -> list[str]:
            return [name for name, found in listing.items() if not self._is_here(name, found, exactly)]

        if not missing():
            return
        with self._one_at_a_time():
            odd = missing()  # another process of this machine may have fetched some
            for name in odd:
                if not wanted(name):  # it comes when it is read
                    self.path_of(name).unlink(missing_ok=True)
            with ThreadPoolExecutor(AT_ONCE) as threads:
                list(threads.map(lambda name: self._fetch(name, listing[name]), filter(wanted, odd)))

    def prune(self, listing: Mapping[str, Found]) -> None:
        """Delete what is here and not in the listing: work that was not finished. For who holds the run's lock."""
        root = Path(self.folder)
        for path in sorted(root.rglob("*"), reverse=True):  # what is in a folder before the folder
            name = self.name_of(path)
            if name is not None and path.is_dir():
                with contextlib.suppress(OSError):  # not empty
                    path.rmdir()
            elif name is not None and name not in listing:
                path.unlink()

    def needed(self, path: Path) -> None:
        name = self.name_of(path)
        if name is None:
            return
        found = self.store.find(name)
        if found is not None and not self._is_here(name, found, exactly=False):
            with self._one_at_a_time():
                if not self._is_here(name, found, exactly=False):  # another process of this machine has fetched it
                    self._fetch(name, found)

    def refresh(self, folder: Path, pattern: str) -> None:
        name = self.name_of(folder)
        if name is None:
            return
        listing = self.pull(works, name, exactly=True)
        for path in folder.glob(pattern):
            for file in path.iterdir():
                if f"{name}/{path.name}/{file.name}" not in listing:  # it was not finished
                    file.unlink()
            with contextlib.suppress(OSError):  # not empty
                path.rmdir()

    def _is_here(self, name: str, found: Found, exactly: bool) -> bool:
        try:
            here = self.path_of(name).stat()
        except FileNotFoundError:
            return False
        # some stores tell whole seconds in one answer and more in another; what was just written here has a fraction of its own
        times = (int(found.written), found.written)
        same = here.st_size == found.size and any(abs(here.st_mtime - time) < 1e-6 for time in times)
        return same or (not exactly and here.st_mtime > found.written + 1)

    def _fetch(self, name: str, found: Found) -> None:
        target = self.path_of(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            with beside.open("wb") as file:
                for chunk in self.store.chunks(name):
                    file.write(chunk)
            os.utime(beside, (found.written, found.written))
            os.replace(beside, target)
        except FileNotFoundError:  # removed since it was listed
            beside.unlink(missing_ok=True)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise

    @contextlib.contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        """Among the processes of this machine: what one has fetched the others need not."""
        with FileLock(Path(self.folder) / ".fetching"):
            yield

    def name_of(self, path: Path) -> str | None:
        """The object that a path of this machine stands for; None if it stands for none."""
        try:
            name = path.relative_to(self.folder).as_posix()
        except ValueError:
            return None
        return name if is_ours(name) else None

    def path_of(self, name: str) -> Path:
        return Path(self.folder, name)
