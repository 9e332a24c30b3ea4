"""Where a registry's bytes lie on a disk, and what every kind of storage has to offer a registry. `registry_objects` is the other kind.

    <root>/<name>/<number>/                 one version, a plain folder: its files, manifest.json and SHA256SUMS
    <root>/<name>/.aliases/<alias>/<n>/     event n of an alias: event.json
    <root>/.blobs/<sha256>                  every file once more, as a hard link: equal files of all versions are one file

What a disk promises, local or NFS: a version and an event of an alias appear by one rename of a folder that is written beside, and a
rename onto a folder that is there already fails. So what is seen is whole, and of two who want one number one gets it, without locks.
A file system that refuses hard links, between its users or at all, stores equal files twice. Over NFS other machines may see a new version
late, by the time for which they remember a folder (seconds); a rename whose answer is lost is repeated by the client and then looks
refused, so whoever is refused looks first whether what is there is their own.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import stat
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol

from workers.contracts import InputError
from workers.files import sync

MANIFEST = "manifest.json"
SUMS = "SHA256SUMS"
REMOVED = "REMOVED"
BLOBS = ".blobs"
CHUNK = 1 << 20
DIGEST = re.compile(r"[0-9a-f]{64}")

_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)


class NotAFile(OSError):
    """A link, a folder or a device stands where a file should."""


class Debris(NamedTuple):
    """What nothing needs any more. ``written``: when, by the clock of the storage, in seconds since the epoch."""

    path: str
    size: int
    age_s: float
    written: float


class Staged(Protocol):
    """The files of a version to be, in place but not yet seen by anyone."""

    hashes: dict[str, str]
    """Path -> sha256."""

    def claim(self, number: int, sums: bytes, manifest: bytes) -> bool:
        """Make it that version, in one step; False if the number is taken."""


class Files(Protocol):
    """A registry's storage. Paths are relative to its root, with slashes."""

    def uri(self, path: str) -> str:
        """As people write it; without credentials."""

    def require_writable(self) -> None:
        """Raises: RunFailed if nothing can be published here; a folder on a disk tells when it is written to."""

    def names(self, folder: str) -> list[str]:
        """What lies directly in a folder; nothing if there is none."""

    def holdings(self, folder: str) -> dict[str, set[str]]:
        """The folders directly in a folder -> what lies in them."""

    def chunks(self, path: str, start: int = 0) -> Iterator[bytes]:
        """A file's bytes from ``start``. Raises: FileNotFoundError; NotAFile."""

    def locate(self, version: str, path: str, digest: str) -> str:
        """Where the bytes of a version's file are. Raises: FileNotFoundError if the digest is none."""

    def strangers(self, version: str, known: set[str]) -> list[str]:
        """Files in a version's folder that it does not know of."""

    def stage(self, name: str, folder: Path, paths: list[str]) -> contextlib.AbstractContextManager[Staged]:
        """Bring the files of a local folder in. What is not claimed is gone when the block ends."""

    def create(self, path: str, content: bytes) -> bool:
        """Make a file that is alone in its folder, whole; False if it is there already."""

    def put(self, path: str, content: bytes) -> None:
        """Write a file, whole or not at all, over what is there."""

    def delete(self, path: str) -> None:
        """A file, if it is there."""

    def strip(self, version: str) -> None:
        """Free what a removed version takes, but for SHA256SUMS and REMOVED."""

    def debris(self, doomed: list[str], begun: list[str], referenced: set[str], name: str | None = None) -> Iterator[Debris]:
        """What nothing needs when the ``doomed`` versions are gone.

        ``begun``: versions whose removal is not finished, to be stripped; ``referenced``: the hashes that the other versions name;
        ``name``: leave what lies below other names.
        """

    def drop(self, found: Debris) -> bool:
        """Delete what ``debris`` named; False if it came into use meanwhile and stays."""


def read(files: Files, path: str, most_bytes: int = 64 << 20) -> bytes:
    """A small file. Raises: FileNotFoundError; NotAFile; InputError if it is larger than ``most_bytes``."""
    found = bytearray()
    for chunk in files.chunks(path):
        found += chunk
        if len(found) > most_bytes:
            raise InputError(f"{files.uri(path)} is larger than {most_bytes >> 20} MiB: it is not what its name says")
    return bytes(found)


def sha256(files: Files, path: str) -> str:
    """Of a file of any size. Raises: FileNotFoundError; NotAFile."""
    digest = hashlib.sha256()
    for chunk in files.chunks(path):
        digest.update(chunk)
    return digest.hexdigest()


def sha256_file(path: Path) -> str:
    """sha256 (hex) of a file of any size."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_below(folder: Path, *, follow_links: bool) -> list[str]:
    """Relative POSIX paths of everything in ``folder`` that is not a folder; a link to a folder counts unless it is followed."""
    found = []
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and (follow_links or not entry.is_symlink()):
            found += [f"{entry.name}/{path}" for path in files_below(entry, follow_links=follow_links)]
        else:
            found.append(entry.name)
    return found


@dataclass(frozen=True)
class LocalFiles:
    """A folder on a disk, local or shared. Nothing is read or written through a link below it."""

    root: Path

    def uri(self, path: str) -> str:
        return str(self.root / path)

    def require_writable(self) -> None:
        pass

    def names(self, folder: str) -> list[str]:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return sorted(entry.name for entry in self._at(folder, to_the_end=True).iterdir())
        return []

    def holdings(self, folder: str) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for name in self.names(folder):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # removed meanwhile, or a file
                found[name] = {entry.name for entry in (self.root / folder / name).iterdir()}
        return found

    def chunks(self, path: str, start: int = 0) -> Iterator[bytes]:
        at = self._at(path)
        try:
            descriptor = os.open(at, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe must not wait for its other end
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO):
                raise NotAFile(error.errno, "is not a regular file", str(at)) from None
            raise
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise NotAFile(errno.EINVAL, "is not a regular file", str(at))
            file.seek(start)
            while chunk := file.read(CHUNK):
                yield chunk

    def locate(self, version: str, path: str, digest: str) -> str:
        return f"{version}/{path}"

    def strangers(self, version: str, known: set[str]) -> list[str]:
        return sorted(set(files_below(self._at(version, to_the_end=True), follow_links=False)) - known)

    @contextlib.contextmanager
    def stage(self, name: str, folder: Path, paths: list[str]) -> Iterator[Staged]:
        temporary = self._temporary(name, "publishing")
        try:
            hashes = {path: self._bring(folder / path, temporary / path) for path in paths}
            yield _LocalStaged(self, name, temporary, hashes)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def create(self, path: str, content: bytes) -> bool:
        folder = PurePosixPath(path).parent
        temporary = self._temporary(str(folder.parent), "writing")
        try:
            temporary.mkdir(parents=True)
            page = temporary / PurePosixPath(path).name
            page.write_bytes(content)
            page.chmod(0o444)
            sync(page)
            return claim(temporary, self._at(str(folder))) or read(self, path) == content  # ours, if an answer was lost
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def put(self, path: str, content: bytes) -> None:
        target = self._at(path)
        temporary = self._temporary(str(PurePosixPath(path).parent.parent), "writing")  # beside the version, where gc finds it
        try:
            temporary.mkdir()
            (temporary / target.name).write_bytes(content)
            sync(temporary / target.name)
            os.replace(temporary / target.name, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        sync(target.parent)

    def delete(self, path: str) -> None:
        self._at(path).unlink(missing_ok=True)

    def strip(self, version: str) -> None:
        folder = self._at(version, to_the_end=True)
        for entry in folder.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                with contextlib.suppress(FileNotFoundError):  # somebody else is at it too
                    shutil.rmtree(entry)
            elif entry.name not in (SUMS, REMOVED):
                entry.unlink(missing_ok=True)

    def debris(self, doomed: list[str], begun: list[str], referenced: set[str], name: str | None = None) -> Iterator[Debris]:
        now, going = time.time(), Counter[int]()
        for version in doomed:
            with contextlib.suppress(FileNotFoundError):
                going.update(_inodes(self._at(version, to_the_end=True)))
        newest: dict[int, float] = {}
        for path in (*self._unclaimed(name), *begun):
            with contextlib.suppress(FileNotFoundError):
                size, written = _weigh(self.root / path)
                if path in begun:
                    written = (self.root / path / REMOVED).lstat().st_ctime
                inodes = _inodes(self.root / path)
                going.update(inodes)
                newest |= {inode: max(written, newest.get(inode, 0.0)) for inode in inodes}
                yield Debris(path, size, now - written, written)
        for blob in self.names(BLOBS):
            with contextlib.suppress(FileNotFoundError):
                found = (self.root / BLOBS / blob).lstat()
                if blob.startswith("."):
                    yield Debris(f"{BLOBS}/{blob}", 0, now - found.st_ctime, found.st_ctime)
                elif found.st_nlink - going[found.st_ino] == 1:
                    # Of no version: no age protects it, since whoever links it just now keeps the bytes under another name.
                    written = newest.get(found.st_ino, -math.inf)
                    yield Debris(f"{BLOBS}/{blob}", found.st_size, now - written, written)

    def _unclaimed(self, only: str | None) -> Iterator[str]:
        """What publishers and promoters write beside, and what killed ones left of it."""
        for name in self.names("") if only is None else [only]:
            if not name.startswith("."):
                for home in (name, *(f"{name}/.aliases/{alias}" for alias in self.names(f"{name}/.aliases"))):
                    yield from (f"{home}/{entry}" for entry in self.names(home) if entry.startswith((".publishing-", ".writing-")))

    def drop(self, found: Debris) -> bool:
        target = self._at(found.path)
        if found.path.startswith(f"{BLOBS}/"):
            target.unlink(missing_ok=True)  # whoever links it just now keeps the bytes
        else:
            shutil.rmtree(target, ignore_errors=True)
        return True

    def _at(self, path: str, to_the_end: bool = False) -> Path:
        """Raises: FileNotFoundError if a folder on the way, or with ``to_the_end`` the last part too, is a link."""
        parts, here = PurePosixPath(path).parts, self.root
        assert ".." not in parts and not path.startswith("/"), path  # names are checked where they come in
        for i, part in enumerate(parts):
            here = here / part
            if (to_the_end or i + 1 < len(parts)) and here.is_symlink():
                raise FileNotFoundError(errno.ENOENT, "is a link, and a registry follows none", str(here))
        return here

    def _temporary(self, folder: str, why: str) -> Path:
        return self._at(folder, to_the_end=True) / f".{why}-{os.getpid()}-{secrets.token_hex(8)}"

    def _bring(self, source: Path, target: Path) -> str:
        """Copy a file, read-only and on the disk, or link the equal file that is there already; its sha256."""
        target.parent.mkdir(parents=True, exist_ok=True)
        blobs = self._at(BLOBS, to_the_end=True)
        digest = sha256_file(source)
        if _is_intact(blobs / digest, digest) and _link(blobs / digest, target):
            return digest
        shutil.copyfile(source, target)
        digest = sha256_file(target)  # of what was copied, should the source have changed
        target.chmod(0o444)
        sync(target)
        blobs.mkdir(exist_ok=True)
        blob = blobs / digest
        if not _link(target, blob) and blob.exists():
            if _is_intact(blob, digest):  # made by another publisher meanwhile
                _link_over(blob, target)
            else:
                _link_over(target, blob)
        return digest


@dataclass
class _LocalStaged:
    files: LocalFiles
    name: str
    temporary: Path
    hashes: dict[str, str]
    is_sealed: bool = False

    def claim(self, number: int, sums: bytes, manifest: bytes) -> bool:
        if not self.is_sealed:
            for page, content in ((SUMS, sums), (MANIFEST, manifest)):
                (self.temporary / page).write_bytes(content)
                (self.temporary / page).chmod(0o444)
                sync(self.temporary / page)
            for folder in [path for path in self.temporary.rglob("*") if path.is_dir()]:
                sync(folder)
            self.is_sealed = True
        return claim(self.temporary, self.files.root / self.name / str(number))


def claim(temporary: Path, folder: Path) -> bool:
    """Rename a folder to a name that no other has; False if one has it."""
    sync(temporary)
    try:
        os.rename(temporary, folder)
    except OSError as error:
        repeated = error.errno == errno.ENOENT and not temporary.exists() and folder.exists()  # by a client whose first answer was lost
        if error.errno in _TAKEN or repeated:
            return False
        raise
    for above in (folder.parent, folder.parent.parent):
        sync(above)
    return True


def _is_intact(path: Path, digest: str) -> bool:
    try:
        return not path.is_symlink() and path.is_file() and sha256_file(path) == digest
    except OSError:
        return False


def _link(source: Path, target: Path) -> bool:
    """Another name for a file; False if the file system, its owner's rights or a file in the way do not allow it."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        return False
    return True


def _link_over(source: Path, target: Path) -> None:
    """As `_link`, in the place of a file; where that is not allowed, the file stays."""
    beside = target.with_name(f".{target.name}-{secrets.token_hex(8)}")
    if _link(source, beside):
        try:
            os.replace(beside, target)
        except PermissionError:
            beside.unlink(missing_ok=True)


def _inodes(folder: Path) -> list[int]:
    return [(folder / path).lstat().st_ino for path in files_below(folder, follow_links=False)]


def _weigh(folder: Path) -> tuple[int, float]:
    """Bytes in a folder, and when it was last written to."""
    size, newest = 0, 0.0
    with contextlib.suppress(FileNotFoundError):
        for path in [folder, *folder.rglob("*")]:
            found = path.lstat()
            size, newest = size + found.st_size * (not path.is_dir()), max(newest, found.st_ctime)
    return size, newest


def as_json(value: Mapping[str, Any]) -> bytes:
    """One page of a registry."""
    return (json.dumps(value, indent=2) + "\n").encode()
