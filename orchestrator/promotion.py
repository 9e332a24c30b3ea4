"""Which version an alias names: promote it, if it is good enough, and roll back. `aliases` keeps the log.

A requirement is ``NAME<=NUMBER`` (or ``<``, ``>=``, ``>``). NAME is a number of the version's own row of results (``frechet``, ``kid``,
``paired_mse``, ``ms_per_step`` ...) or of its plan (``macs_ratio``, ``cost_ratio``); ``fd`` is short for ``frechet``. With ``_delta``
behind it, the difference from the version that the alias names now; with ``_dense_delta``, from the dense model's row.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator import aliases
from orchestrator.aliases import AliasEvent
from orchestrator.registry import Registry, Version
from workers.contracts import InputError, MixtureManifest, RunFailed

OPERATORS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
SHORT = {"fd": "frechet"}
DISTANCES = ("frechet", "kid", "kid_std")
"""Numbers that only hold under their protocol."""

_REQUIREMENT = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_]*)\s*(<=|>=|<|>)\s*(\S+)\s*")


def promote(
    registry: Registry, version: Version, alias: str, expected: int | None | str = "any", required: Sequence[str] = ()
) -> AliasEvent | None:
    """Let ``alias`` name ``version``; None if it does already, and fulfils what is ``required`` (a difference from itself is 0).

    ``expected``: the number that the alias must name now, None for nothing.

    Raises: InputError; VerificationError if the version is not whole; RunFailed if it does not fulfil a requirement; Conflict if the alias
    names something else than expected, or was moved while we looked. In each case the alias stays as it is.
    """
    name, files = version.name, registry.files
    before = aliases.last(files, name, aliases.checked(alias))
    now = None if before is None else before.version
    if expected != "any" and expected != now:
        raise aliases.conflict(files, name, alias, None if expected is None else int(expected))
    rules = [_parsed(text) for text in required]
    manifest = version.manifest()
    relative = any(wanted.endswith("_delta") and not wanted.endswith("_dense_delta") for wanted, _, _ in rules)
    champion = registry.resolve(f"{name}:{now}").manifest() if relative and now is not None else None
    for text, (wanted, compare, limit) in zip(required, rules, strict=True):
        found = _value(wanted, manifest, champion, f"{name}@{alias}")
        if not OPERATORS[compare](found, limit):
            told = f"is {alias} already, but" if now == version.number else f"is not promoted to {alias}:"
            raise RunFailed(f"{version.reference} {told} {wanted} is {found:.6g}, required is {text.strip()}")
    registry.verify(version)
    if now == version.number:
        return None
    event = aliases.append(files, name, alias, before, "promote", version.number, tuple(text.strip() for text in required))
    if registry.is_removed(version):  # by somebody who looked for aliases just before there was this one
        aliases.append(files, name, alias, event, "rollback", now)
        raise aliases.Conflict(f"conflict: {version.reference} was removed meanwhile: {name}@{alias} names what it did before")
    return event


def rollback(registry: Registry, name: str, alias: str) -> AliasEvent:
    """Undo the last promotion of ``alias`` that still holds: back to the newest version before it that is there; of the first, to nothing.

    Raises: InputError if it names nothing, or if all that it named before were removed; Conflict if it was moved while we looked.
    """
    events = aliases.history(registry.files, registry.checked(name), aliases.checked(alias))
    standing = aliases.standing(events)
    if not standing:
        moved = aliases.current(registry.files, name)
        there = f"its aliases are {', '.join(moved)}" if moved else "it has none but latest, which always names the newest version"
        raise InputError(f"{name}@{alias} names nothing that could be rolled back: {there}")
    whole = {version.number for version in registry.versions(name)}
    back = aliases.returns_to(standing, whole)
    if back is None and (gone := [number for number in standing if number != standing[-1]]):
        raise InputError(
            f"{name}@{alias} cannot go back: {name}:{gone[-1]}, which it named before {name}:{standing[-1]}, was removed: promote another "
            "version"
        )
    event = aliases.append(registry.files, name, alias, events[-1], "rollback", back)
    if back is not None and registry.is_removed(Version(name, back, registry.files)):  # by somebody who looked just before for aliases
        aliases.append(registry.files, name, alias, event, "promote", standing[-1])
        raise aliases.Conflict(f"conflict: {name}:{back} was removed meanwhile: {name}@{alias} names what it did before")
    return event


def numbers(manifest: MixtureManifest) -> dict[str, float]:
    """What a requirement may name: the numbers of the version's own row, and of its plan."""
    row = manifest.metrics.get(manifest.plan.budget.name, {})
    return {**_finite(row), "cost_ratio": manifest.plan.cost_ratio, "macs_ratio": manifest.plan.macs_ratio}


def _finite(row: Mapping[str, Any]) -> dict[str, float]:
    return {
        key: float(value)
        for key, value in row.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    }


def _parsed(text: str) -> tuple[str, str, float]:
    """(name, operator, number). Raises: InputError."""
    match = _REQUIREMENT.fullmatch(text)
    try:
        limit = float(match[3]) if match else math.nan
    except ValueError:
        limit = math.nan
    if match is None or math.isnan(limit):
        raise InputError(f"--require {text!r} is not of the form name<=number, e.g. 'fd_delta<=0.3'; the signs are {', '.join(OPERATORS)}")
    return match[1], match[2], limit


def _value(wanted: str, manifest: MixtureManifest, champion: MixtureManifest | None, alias: str) -> float:
    """The number that a requirement is about. Raises: InputError that lists the known ones, or says what it cannot be compared with."""
    mine = numbers(manifest)
    name, against = wanted, ""
    for suffix in ("_dense_delta", "_delta"):
        if wanted.endswith(suffix):
            name, against = wanted.removesuffix(suffix), suffix
            break
    name = SHORT.get(name, name)
    if name not in mine:
        raise InputError(f"--require {wanted}: {name} was not measured for this version: known are {', '.join(sorted(mine))}")
    if not against:
        return mine[name]
    dense = manifest.metrics.get("dense", {})
    if against == "_delta" and champion is None:
        raise InputError(f"--require {wanted}: {alias} names nothing yet, so there is nothing to compare with: promote without it")
    theirs = (
        {**_finite(dense), "cost_ratio": 1.0, "macs_ratio": 1.0} if champion is None or against == "_dense_delta" else numbers(champion)
    )
    told = "the dense model" if against == "_dense_delta" else f"the version that {alias} names"
    if name not in theirs:
        raise InputError(f"--require {wanted}: {name} was not measured for {told}: both have {', '.join(sorted(set(mine) & set(theirs)))}")
    if against == "_delta" and champion is not None and name in DISTANCES:
        ours, other = (_protocol(found) for found in (manifest, champion))
        if ours != other:
            raise InputError(
                f"--require {wanted}: {name} was measured under protocol {ours} here and under {other} for {told}: "
                "measure both under one (`diffpruning evaluate --version`)"
            )
    return mine[name] - theirs[name]


def _protocol(manifest: MixtureManifest) -> str:
    protocol = manifest.metrics.get(manifest.plan.budget.name, {}).get("protocol")
    return str(protocol.get("id")) if isinstance(protocol, dict) else "none"
