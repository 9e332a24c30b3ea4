"""What a registry can do without: remove versions, and free what nothing names any more.

A removed version's number is never used again: its folder stays, with SHA256SUMS and the mark REMOVED, which says who removed it and when.
The mark comes first, so nobody meets a version that is half there; then aliases are looked at once more, so that of a removal and a
promotion at the same time one gives way. A removal that was killed after its mark is finished by the same command, or by gc.
"""

from __future__ import annotations

import contextlib
import datetime
from dataclasses import dataclass

from orchestrator import aliases
from orchestrator.registry import Registry, Version
from orchestrator.registry_files import BLOBS, MANIFEST, REMOVED, SUMS, Debris, as_json
from workers.contracts import InputError, VerificationError

GRACE_HOURS = 24.0
"""What is younger may belong to a publisher who is still at work."""


def removable(registry: Registry, reference: str) -> Version:
    """The version that ``name:7`` means; also one whose removal was begun and not finished. Raises: InputError."""
    name = reference.partition(":")[0]
    begun = [version for version in registry.half_removed(name) if version.reference == reference]
    return begun[0] if begun else registry.resolve(reference)


def remove(registry: Registry, version: Version) -> None:
    """The same again finishes. Raises: InputError if an alias names it or goes back to it; Conflict if one was moved meanwhile."""
    begun = registry.is_removed(version)
    if use := _use(registry, version, goes_back=not begun):
        way = "promote another version, or roll back" if use.startswith("named") else "promote another version"
        raise InputError(f"{version.reference} is {use}: {way}, then remove it")
    if begun:
        registry.files.strip(version.folder)
        return
    mark = f"{version.folder}/{REMOVED}"
    at = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    registry.files.put(mark, as_json({"schema": 1, "by": aliases.who(), "at": at}))
    if use := _use(registry, version):
        registry.files.delete(mark)
        raise aliases.Conflict(f"conflict: an alias was moved meanwhile, and {version.reference} is {use}: it is not removed")
    registry.files.strip(version.folder)


def _use(registry: Registry, version: Version, goes_back: bool = True) -> str:
    """What aliases need a version for, in words; "" if none does. ``goes_back``: also after a rollback."""
    whole = {each.number for each in registry.versions(version.name)} | {version.number}
    named = [f"{version.name}@{alias}" for alias in registry.aliases_of(version.name).get(version.number, [])]
    back = [f"{version.name}@{alias}" for alias, (_, back) in _needs(registry, version.name, whole).items() if back == version.number]
    told = [f"named by {', '.join(named)}"] * bool(named) + [f"what a rollback of {', '.join(back)} returns to"] * bool(back and goes_back)
    return " and ".join(told)


@dataclass(frozen=True)
class Cleaning:
    """What a gc removes, or would."""

    versions: list[str]
    debris: list[str]
    """Files and folders that nothing names: of removed versions, and what killed publishers and removers left."""
    freed_bytes: int
    too_young: int
    """How many things were left alone because somebody may be writing them."""


def clean(
    registry: Registry,
    name: str | None = None,
    keep_aliased: bool = False,
    keep_last: int | None = None,
    dry_run: bool = False,
    grace_hours: float = GRACE_HOURS,
) -> Cleaning:
    """Free what nothing names. ``keep_aliased``: and remove the versions that no alias names. ``keep_last``: but for the newest so many.

    A version that an alias names or would name after a rollback, and the newest of each name, always stay. ``name``: touch no other
    mixture; blobs that no version names belong to none, and are freed in any case. Raises: InputError if there is no such registry or
    name; VerificationError, before anything is removed, if an alias, or in a bucket a version, cannot be read: what it names is not known.
    """
    if not grace_hours >= 0:
        raise InputError(f"--grace-hours {grace_hours:g}: is no number of hours")
    names = registry.files.names("")
    if name is None and not names or name is not None and registry.checked(name) not in names:
        registry.some_versions(name)  # refuses with what there is
    half = registry.half_removed(name) if registry.is_local else []
    begun = [version.folder for version in half if version.number not in registry.aliases_of(version.name)]
    doomed: list[Version] = []
    if keep_aliased or keep_last is not None:
        for each in sorted({version.name for version in registry.versions(name)}):
            versions = registry.versions(each)
            named, last = _in_use(registry, each, versions), versions[-max(1, keep_last or 1) :]
            doomed += [version for version in versions if version not in last and version.number not in named]
    staying = [version for version in registry.versions() if version not in doomed]
    referenced = set() if registry.is_local else _referenced(staying)
    if not dry_run:
        doomed = [version for version in doomed if _removed(registry, version)]
        if not registry.is_local:  # somebody may have published meanwhile, or have promoted what was to go
            referenced |= _referenced([version for version in registry.versions() if version not in staying])
    found = list(registry.files.debris([version.folder for version in doomed], begun, referenced, name))
    old = [each for each in found if each.age_s >= grace_hours * 3600]
    if not dry_run:
        old = [each for each in old if _dropped(registry, each, begun)]
        if not registry.is_local and old:
            _require_whole([version for version in registry.versions() if version not in staying], {each.path for each in old})
    freed = sum(each.size for each in old)
    return Cleaning([version.reference for version in doomed], [each.path for each in old], freed, len(found) - len(old))


def _dropped(registry: Registry, found: Debris, begun: list[str]) -> bool:
    """Whether it is gone: somebody may have used it again meanwhile."""
    if found.path in begun:
        registry.files.strip(found.path)
        return True
    return registry.files.drop(found)


def _require_whole(new: list[Version], dropped: set[str]) -> None:
    """Raises: Conflict if a version that was published meanwhile lacks what was deleted; its publisher may be about to mend it."""
    for version in new:
        with contextlib.suppress(FileNotFoundError):  # removed already
            lost = {f"{BLOBS}/{digest}" for digest in version.sums().values()} & dropped
            if lost - {f"{BLOBS}/{blob}" for blob in version.files.names(BLOBS)}:
                raise aliases.Conflict(
                    f"conflict: {version.reference} was published at this moment, and a file that it uses again was deleted: its publisher "
                    f"sends it again, unless it has ended already: see `diffpruning registry verify {version.reference}`; if it is "
                    "damaged, remove it and publish it again"
                )


def _in_use(registry: Registry, name: str, versions: list[Version]) -> set[int]:
    """What the aliases name, and what each would name after a rollback."""
    needs = _needs(registry, name, {version.number for version in versions})
    return {number for pair in needs.values() for number in pair if number is not None}


def _needs(registry: Registry, name: str, whole: set[int]) -> dict[str, tuple[int, int | None]]:
    """Alias -> what it names, and which of the ``whole`` versions it would name after a rollback."""
    found = {}
    for alias in aliases.known(registry.files, name):
        if standing := aliases.standing(aliases.history(registry.files, name, alias)):
            found[alias] = standing[-1], aliases.returns_to(standing, whole)
    return found


def _removed(registry: Registry, version: Version) -> bool:
    """Whether it could be removed: an alias may have been moved to it meanwhile."""
    try:
        remove(registry, version)
    except (InputError, aliases.Conflict):
        return False
    return True


def _referenced(versions: list[Version]) -> set[str]:
    """The hashes of all their files. Raises: VerificationError if one is damaged: what it needs is not known."""
    found: set[str] = set()
    for version in versions:
        try:
            files, sums = version.manifest().files, version.sums()
        except OSError as error:
            raise VerificationError(f"{version.reference}: cannot be read: {aliases.one_line(error)}: nothing was removed") from error
        if {path: digest for path, digest in sums.items() if path != MANIFEST} != files:
            raise VerificationError(f"{version.reference}: {SUMS} and {MANIFEST} disagree: nothing was removed: verify it, then remove it")
        found |= set(sums.values())
    return found
