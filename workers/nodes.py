"""May this node work for this run: does it see the run folder, and does it run the same code? Standard library only."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from workers.contracts import RunFailed
from workers.records import Record

if TYPE_CHECKING:
    from workers.mirror import Mirror

SAME_EVERYWHERE = ("torch", "diffusers")
"""Packages whose versions decide what comes out."""
PATIENCE_S = 5.0
"""Network file systems may show a new file a little late."""


@dataclass(frozen=True)
class Node(Record):
    """What a node says of itself when the driver asks."""

    sees: bool
    """It sees the driver's marker file, or reads and writes the object store."""
    code: str
    """sha256 over the sources of this package."""
    versions: dict[str, str]
    why: str = ""
    """What the object store said to it, if it does not."""


def this_node(marker: str, mirror: Mirror | None = None) -> Node:
    """``mirror``: of a run on an object store, which is tried instead of the marker."""
    why = ""
    if mirror is not None:
        try:
            mirror.store.require_conditions()
        except RunFailed as error:
            why = str(error)
    return Node(_sees(marker) if mirror is None else not why, code_digest(), versions(), why)


def code_digest() -> str:
    """sha256 over the sources of this package: two nodes with the same digest run the same code."""
    root, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Without what only says how a package was built (+cpu, +cu128)."""
    found = {}
    for name in SAME_EVERYWHERE:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name).partition("+")[0]
    return found


def require_storage(marker: str, mirror: Mirror | None = None, item: object = None) -> None:
    """Before every task: have this node's mirror of an object store follow what the others have made. ``item``: what the task is handed.

    Raises: RunFailed on a node, come after the driver had asked, that does not see the driver's marker file, or cannot read the store."""
    if mirror is not None:
        mirror.attach(item)
    if marker and not _sees(marker):
        raise RunFailed(f"node {socket.gethostname()} does not see the run folder {Path(marker).parent}: mount the shared storage there")


def _sees(marker: str) -> bool:
    deadline = time.monotonic() + PATIENCE_S
    while not os.path.exists(marker):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True
