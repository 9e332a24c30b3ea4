"""Movable names of versions: an append-only log for each alias. The last event says what the alias names now.

Event n is written only if there is no event n, so of two who move an alias at once one does, and the other is told.
"""

from __future__ import annotations

import datetime
import getpass
import json
import re
import secrets
import socket
from dataclasses import dataclass

from orchestrator.registry_files import Files, as_json, read
from workers.contracts import InputError, RunFailed, VerificationError
from workers.records import Record

LATEST = "latest"
"""The newest version: no log, and nobody can move it."""
DEFAULT = "champion"
"""Which alias is meant where none is given."""

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_NUMBER = re.compile(r"[1-9][0-9]{0,17}")
_PAGE = "event.json"


class Conflict(RunFailed):
    """Somebody else was faster; nothing was changed. Exit code 1."""


@dataclass(frozen=True)
class AliasEvent(Record):
    """``champion`` was moved, by whom, when and from where. ``version`` None: it names nothing any more."""

    number: int
    alias: str
    action: str
    """``promote``, or ``rollback``: the last promotion that still holds is undone."""
    version: int | None
    previous: int | None
    by: str
    at: str
    """UTC, to the second."""
    id: str
    """Tells two equal moves apart."""
    required: tuple[str, ...] = ()
    """What the version had to fulfil."""

    def __post_init__(self) -> None:
        if self.action not in ("promote", "rollback") or any(v is not None and v < 1 for v in (self.version, self.previous, self.number)):
            raise InputError(f"event {self.number} of {self.alias!r}: {self.action!r} of {self.version} is none")


def checked(alias: str) -> str:
    """Raises: InputError for a name that no alias can have."""
    if not _NAME.fullmatch(alias):
        raise InputError(f"alias {alias!r} is not 1 to 64 of a-z, 0-9, '.', '_', '-', starting with a letter or digit")
    if alias == LATEST:
        raise InputError(f"{LATEST} always names the newest version: give the alias another name, e.g. {DEFAULT}")
    return alias


def known(files: Files, name: str) -> list[str]:
    """Aliases that name a version of ``name`` now, or did once."""
    return [alias for alias in files.names(f"{name}/.aliases") if _NAME.fullmatch(alias) and alias != LATEST]


def history(files: Files, name: str, alias: str) -> list[AliasEvent]:
    """All events, oldest first. Raises: VerificationError if one cannot be read."""
    return [_event(files, name, alias, number) for number in _numbers(files, name, alias)]


def last(files: Files, name: str, alias: str) -> AliasEvent | None:
    """The event that counts now. Raises: VerificationError if it cannot be read."""
    numbers = _numbers(files, name, alias)
    return _event(files, name, alias, numbers[-1]) if numbers else None


def current(files: Files, name: str) -> dict[str, int]:
    """Alias -> number of the version that it names. Raises: VerificationError if that of one cannot be read."""
    events = ((alias, last(files, name, alias)) for alias in known(files, name))
    return {alias: event.version for alias, event in events if event is not None and event.version is not None}


def standing(events: list[AliasEvent]) -> list[int]:
    """The versions that were promoted and not rolled back, oldest first."""
    found: list[int] = []
    for event in events:
        if event.action == "promote" and event.version is not None:
            found.append(event.version)
        else:  # back to a version that was promoted before; those above it are undone
            while found and found[-1] != event.version:
                found.pop()
    return found


def returns_to(standing: list[int], whole: set[int]) -> int | None:
    """Which version a rollback goes back to: the newest before the last that is ``whole``; None if there is none."""
    return next((number for number in reversed(standing[:-1]) if number in whole and number != standing[-1]), None)


def append(
    files: Files, name: str, alias: str, before: AliasEvent | None, action: str, version: int | None, required: tuple[str, ...] = ()
) -> AliasEvent:
    """Add the event that follows ``before``. Raises: Conflict if another one follows it already."""
    number = 1 if before is None else before.number + 1
    at = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    previous = None if before is None else before.version
    event = AliasEvent(number, alias, action, version, previous, who(), at, secrets.token_hex(8), required)
    if not files.create(f"{name}/.aliases/{alias}/{number}/{_PAGE}", as_json(event.to_json())):
        raise conflict(files, name, alias, previous)
    return event


def conflict(files: Files, name: str, alias: str, expected: int | None) -> Conflict:
    """What to say when the alias names something else than it should."""
    found = last(files, name, alias)
    said = "nothing" if found is None or found.version is None else f"{name}:{found.version}"
    by = "" if found is None else f" (moved by {found.by} at {found.at})"
    wanted = "nothing" if expected is None else f"{name}:{expected}"
    return Conflict(
        f"conflict: {name}@{alias} was expected to name {wanted}, but another move came first and it names {said}{by}: nothing was "
        f"changed; see `diffpruning registry history {name}@{alias}`, then decide again"
    )


def who() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = "unknown"
    return "".join(c if c.isprintable() else "?" for c in f"{user}@{socket.gethostname()}")


def _numbers(files: Files, name: str, alias: str) -> list[int]:
    found = files.holdings(f"{name}/.aliases/{alias}")
    return sorted(int(number) for number, held in found.items() if _NUMBER.fullmatch(number) and _PAGE in held)


def _event(files: Files, name: str, alias: str, number: int) -> AliasEvent:
    path = f"{name}/.aliases/{alias}/{number}/{_PAGE}"
    try:
        event = AliasEvent.from_json(json.loads(read(files, path, most_bytes=1 << 20)))
        if (event.number, event.alias) != (number, alias):
            raise InputError(f"it is event {event.number} of {event.alias!r}")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise VerificationError(f"{name}@{alias}: event {number}: cannot be read: {one_line(error)}") from error
    return event


def one_line(error: object) -> str:
    """An error's words, made of what a stranger may have written: printable, on one line, of some length."""
    text = " ".join(str(error).split())
    return "".join(c if c.isprintable() else "?" for c in text)[:300]
