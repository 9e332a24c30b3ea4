"""Files appear whole or not at all: written beside, forced to the disk, then renamed. Standard library only.

Where a run folder is the mirror of one on an object store, a ``Follower`` is told what is finished, what goes, and what somebody is about
to read; on a file system nobody is.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Protocol


class Follower(Protocol):
    """Hears of every path, and passes over those that are none of its own."""

    def finished(self, path: Path, last: str) -> None:
        """A file or folder is in place; of a folder's files, one named ``last`` says that all are there."""

    def removed(self, path: Path, first: str) -> None:
        """A file or folder is gone; ``first``: as ``last`` above."""

    def needed(self, path: Path) -> None:
        """Somebody is about to read a file, which may not be here."""

    def refresh(self, folder: Path, pattern: str) -> None:
        """Somebody is about to look which folders ``pattern`` matches."""


_followers: list[Follower] = []


def follow(follower: Follower) -> None:
    """From now on in this process."""
    if follower not in _followers:
        _followers.append(follower)


@contextlib.contextmanager
def followed_by(follower: Follower | None) -> Iterator[None]:
    """Within the block; None: nobody."""
    if follower is None:
        yield
        return
    _followers.append(follower)
    try:
        yield
    finally:
        _followers.remove(follower)


@contextlib.contextmanager
def replacing(path: Path, durable: bool = True) -> Iterator[Path]:
    """A name to write to; it becomes ``path`` when the block ends well, and is gone when it does not. Its suffix is that of ``path``.

    ``durable``: it survives a machine that loses power, and what is replaced after it does not outlive it.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    if _followers:  # this machine's mirror may have nothing of the folder yet
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        if durable:
            sync(temporary)
        os.replace(temporary, path)
        if durable:
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
    finished(path)


def sync(path: Path) -> None:
    """Force a file's content, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems know it of files alone
            raise
    finally:
        os.close(descriptor)


def finished(path: Path, last: str = "") -> None:
    """To be called by whoever puts a file or folder in its place in another way than ``replacing``."""
    for follower in _followers:
        follower.finished(path, last)


def remove(path: Path, first: str = "") -> None:
    """Delete a file or folder, if it is there. ``first``: see ``Follower.removed``."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
    for follower in _followers:
        follower.removed(path, first)


def needed(*paths: Path) -> None:
    """To be called before files are read that a mirror leaves out until then: checkpoints."""
    for follower in _followers:
        for path in paths:
            follower.needed(path)


def refresh(folder: Path, pattern: str) -> None:
    """To be called before it is looked which of the folders ``pattern`` another machine may have left."""
    for follower in _followers:
        follower.refresh(folder, pattern)


def is_plain(path: str) -> bool:
    """Relative, stays inside its folder, is spelled in one way only, and fits one line of SHA256SUMS."""
    pure = PurePosixPath(path)
    return path == str(pure) != "." and ".." not in pure.parts and not pure.is_absolute() and "\\" not in path and path.isprintable()
