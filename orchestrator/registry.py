"""Published mixtures: immutable, numbered versions that are checked file by file, and movable names for them.

``<root>/<name>/<number>/`` is one version: its files, ``manifest.json`` with the hash of each, and ``SHA256SUMS`` of them all.
On a disk it is a plain folder (`registry_files`); in a bucket `registry_objects` says what takes its place.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from orchestrator import aliases
from orchestrator.aliases import one_line
from orchestrator.registry_files import MANIFEST, REMOVED, SUMS, Files, LocalFiles, NotAFile, as_json, files_below, read, sha256
from orchestrator.registry_objects import ObjectFiles
from workers.contracts import GOLDEN, InputError, MixtureManifest, VerificationError
from workers.files import is_plain
from workers.objects import KINDS

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_NUMBER = re.compile(r"[1-9][0-9]{0,17}")


@dataclass(frozen=True)
class Version:
    """One published mixture: ``quickstart:7``, and the storage that holds it."""

    name: str
    number: int
    files: Files = field(repr=False)

    @property
    def reference(self) -> str:
        return f"{self.name}:{self.number}"

    @property
    def folder(self) -> str:
        """Relative to the registry."""
        return f"{self.name}/{self.number}"

    @property
    def where(self) -> str:
        """Its folder or URI."""
        return self.files.uri(self.folder)

    @property
    def path(self) -> Path:
        """Its folder. Only of a registry on a disk."""
        assert isinstance(self.files, LocalFiles), self.where
        return self.files.root / self.folder

    def sums(self) -> dict[str, str]:
        """SHA256SUMS: path -> sha256 of every other file. Raises: OSError; VerificationError if it is too large to be one."""
        try:
            text = read(self.files, f"{self.folder}/{SUMS}").decode("utf-8", errors="replace")
        except InputError as error:
            raise VerificationError(f"{self.reference}: {error}") from None
        return {path: digest for digest, _, path in (line.partition("  ") for line in text.splitlines())}

    def manifest(self) -> MixtureManifest:
        """Raises: VerificationError if the manifest is missing, cannot be parsed, or says what cannot be."""
        try:
            digest = "" if isinstance(self.files, LocalFiles) else self.sums().get(MANIFEST, "")
            page = read(self.files, self.files.locate(self.folder, MANIFEST, digest))
            found = MixtureManifest.from_json(dict(json.loads(page)))
            if not all(isinstance(row, dict) for row in found.metrics.values()):
                raise InputError("a row of metrics is not an object")
            if not found.plan.experts:
                raise InputError("a mixture without experts")
            float(found.plan.cost_ratio + found.plan.macs_ratio)
        except (OSError, ValueError, TypeError, AssertionError, ArithmeticError, RecursionError) as error:
            said = one_line(error) or type(error).__name__
            raise VerificationError(f"{self.reference}: {MANIFEST}: cannot be read: {said}") from error
        return found


class Registry:
    """Versions below one root. Neither construction nor reading creates anything."""

    def __init__(self, uri: str | Path) -> None:
        """``uri``: a local path, ``file:///path``, ``s3://bucket/prefix`` or ``gs://bucket/prefix``. Raises: InputError for any other."""
        text = str(uri)
        is_uri = ":/" in text
        scheme = text.partition(":")[0].lower() if is_uri else ""
        self.files: Files
        if scheme in KINDS:
            self.files = ObjectFiles.of(re.sub("^[^:]*:/+", f"{scheme}://", text), "registry")  # a Path has one slash
        elif not text or (is_uri and not text.startswith("file:///")) or not text.isprintable():
            known = "a local path, file:///absolute/path, s3://bucket/prefix or gs://bucket/prefix"
            raise InputError(f"registry {text!r}: is not {known}")
        else:
            self.files = LocalFiles(Path(unquote(urlsplit(text).path)) if is_uri else Path(text).expanduser().absolute())

    @property
    def root(self) -> Path:
        """Only of a registry on a disk."""
        assert isinstance(self.files, LocalFiles), self.files.uri("")
        return self.files.root

    @property
    def is_local(self) -> bool:
        return isinstance(self.files, LocalFiles)

    def publish(self, name: str, manifest: MixtureManifest, folder: Path) -> Version:
        """Copy the files of ``folder`` into the next version of ``name``; ``manifest.files`` is filled in here.

        Doing it again is safe: an intact version of the same mixture is returned instead of a second one, with the results that it has.
        Raises: InputError for an illegal name, an empty folder, or a file that a version cannot hold.
        """
        self.checked(name)
        paths = files_below(folder, follow_links=True) if folder.is_dir() else []
        if not paths:
            raise InputError(f"nothing to publish as {name}: {folder} holds no files")
        for path in paths:
            if path in (MANIFEST, SUMS, REMOVED) or not is_plain(path):
                reason = "holds a backslash or an unprintable character" if not is_plain(path) else "is the registry's own"
                raise InputError(f"{folder}: the file name {path!r} {reason}: rename the file")
        with self.files.stage(name, folder, paths) as staged:
            manifest = dataclasses.replace(manifest, files=staged.hashes)
            page = as_json(manifest.to_json())
            hashes = {**manifest.files, MANIFEST: hashlib.sha256(page).hexdigest()}
            sums = "".join(f"{digest}  {path}\n" for path, digest in hashes.items()).encode()
            number, looked_at = 1, set[int]()
            while True:
                # The number is chosen before looking for an equal version: whoever publishes one in between takes that number,
                # our claim fails, and we look again. So no lock is needed.
                number = max([number, *(taken + 1 for taken in self._numbers(name))])
                if equal := self._find_equal(name, manifest, looked_at):
                    return equal
                if staged.claim(number, sums, page):
                    return Version(name, number, self.files)
                number += 1

    def versions(self, name: str | None = None) -> list[Version]:
        """The versions of ``name``, or of every name, by name and number; not those that were removed. Foreign folders are ignored."""
        if name is None:
            names = [name for name in self.files.names("") if _NAME.fullmatch(name)]
            return [version for name in names for version in self.versions(name)]
        # Either file makes it ours: a version that lost its manifest stays listed, so that `latest` does not silently step back.
        found = self._numbers(name)
        return [Version(name, number, self.files) for number, held in found.items() if {MANIFEST, SUMS} & held and REMOVED not in held]

    def some_versions(self, name: str | None = None) -> list[Version]:
        """As ``versions``, at least one. Raises: InputError that lists what there is."""
        versions = self.versions(name)
        if not versions:
            names = sorted({version.name for version in self.versions()})
            there = f"it has {', '.join(names)}" if names else "it is empty or missing: publish a mixture first"
            raise InputError(f"the registry {self.files.uri('')} has no mixture{'' if name is None else f' {name}'}: {there}")
        return versions

    def resolve(self, reference: str) -> Version:
        """The version meant by ``name``, ``name@latest`` (the same), ``name@alias`` or ``name:7``.

        Raises: InputError that lists what there is; VerificationError if an alias cannot be read.
        """
        name, separator, wanted = reference.partition("@" if "@" in reference else ":")
        versions = self.some_versions(name)
        if separator == "@" and wanted != aliases.LATEST:
            moved = aliases.current(self.files, name)
            if wanted not in moved:
                there = f"its aliases are {', '.join([*moved, aliases.LATEST])}" if moved else "the only alias is latest"
                raise InputError(f"{name} has no alias {wanted!r}: {there}")
            separator, wanted = ":", str(moved[wanted])
        numbers = {str(version.number): version for version in versions}
        if separator == ":" and wanted not in numbers:
            removed = _NUMBER.fullmatch(wanted) and REMOVED in self._numbers(name).get(int(wanted), ())
            gone = f"{name}:{wanted} was removed" if removed else f"{name} has no version {wanted!r}"
            raise InputError(f"{gone}: it has {', '.join(numbers)}")
        return numbers[wanted] if separator == ":" else versions[-1]

    def verify(self, version: Version) -> int:
        """Check every file against the manifest, and the manifest against SHA256SUMS; returns how many files the manifest lists.

        Raises: VerificationError, one line that names the version and its first three problems.
        """
        manifest = version.manifest()
        try:
            problems = list(_problems(version, manifest))
        except OSError as error:
            raise VerificationError(f"{version.reference}: cannot be read: {one_line(error)}") from error
        if problems:
            more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise VerificationError(f"{version.reference}: {'; '.join(problems[:3])}{more}")
        return len(manifest.files)

    def aliases_of(self, name: str) -> dict[int, list[str]]:
        """Number of a version -> the aliases that name it now. Raises: VerificationError if an alias cannot be read."""
        found: dict[int, list[str]] = {}
        for alias, number in aliases.current(self.files, self.checked(name)).items():
            found.setdefault(number, []).append(alias)
        return found

    def is_removed(self, version: Version) -> bool:
        return REMOVED in self._numbers(version.name).get(version.number, ())

    def half_removed(self, name: str | None = None) -> list[Version]:
        """Versions whose removal was begun, and which hold more than what stays of one."""
        if name is None:
            return [version for name in self.files.names("") if _NAME.fullmatch(name) for version in self.half_removed(name)]
        found = self._numbers(name)
        return [Version(name, number, self.files) for number, held in found.items() if REMOVED in held and held - {SUMS, REMOVED}]

    def _find_equal(self, name: str, manifest: MixtureManifest, looked_at: set[int]) -> Version | None:
        """An intact version of the same files and the same plan. Samples drawn at publication may differ by the machine that drew them."""

        def content(files: Mapping[str, str]) -> dict[str, str]:
            return {path: digest for path, digest in files.items() if path not in (MANIFEST, GOLDEN)}

        for version in reversed(self.versions(name)):
            if version.number in looked_at:
                continue
            looked_at.add(version.number)
            try:
                if content(version.sums()) != content(manifest.files):
                    continue
                found = version.manifest()
                if _same_plan(found, manifest) and content(found.files) == content(manifest.files) and self.verify(version):
                    return version
            except (OSError, VerificationError):
                continue  # A damaged version cannot stand in for a good one.
        return None

    def checked(self, name: str) -> str:
        """Raises: InputError for a name that no mixture can have."""
        if not _NAME.fullmatch(name):
            raise InputError(f"mixture name {name!r} is not 1 to 64 of a-z, 0-9, '.', '_', '-', starting with a letter or digit")
        return name

    def _numbers(self, name: str) -> dict[int, set[str]]:
        """Every number in use, ascending -> what its folder holds. An empty folder counts, so that its number is not used again."""
        held = self.files.holdings(self.checked(name))
        return {number: held[str(number)] for number in sorted(int(entry) for entry in held if _NUMBER.fullmatch(entry))}


def _same_plan(one: MixtureManifest, other: MixtureManifest) -> bool:
    """The same run's plan for the same budget; or that of another, but for the seconds that its search took."""
    if one.provenance.fingerprint == other.provenance.fingerprint:
        return one.plan.budget == other.plan.budget
    return dataclasses.replace(one.plan, search_seconds=0.0) == dataclasses.replace(other.plan, search_seconds=0.0)


def is_published(where: str) -> bool:
    """Whether a version's folder or URI, as `Version.where` gives it, still holds a version."""
    above, _, query = where.partition("?") if ":/" in where else (where, "", "")
    root, name, number = above.rsplit("/", 2)
    registry = Registry(f"{root}?{query}" if query else root)
    return any(str(version.number) == number for version in registry.versions(name))


def _problems(version: Version, manifest: MixtureManifest) -> Iterator[str]:
    """Where a version's files, its manifest and its SHA256SUMS disagree. Hashes only regular files found inside the registry."""
    files, sums = version.files, version.sums()
    expected = [(MANIFEST, sums.pop(MANIFEST, "nothing"), SUMS)]
    expected += [(path, digest, "the manifest") for path, digest in manifest.files.items()]
    for path, digest, source in expected:
        if not is_plain(path):
            yield f"{path!r}: is not a plain relative path inside the version"
            continue
        try:
            found = sha256(files, files.locate(version.folder, path, digest))
        except FileNotFoundError:
            yield f"{path}: is missing"
        except NotAFile:
            yield f"{path}: is not a regular file"
        else:
            if found != digest:
                told = one_line(digest)[:12]
                yield f"{path}: sha256 is {found[:12]}..., {source} says {told}...: the file was changed after publishing"
            elif path.endswith(".index.json"):
                yield from _index_problems(version, path, digest, manifest)
    if sums != manifest.files:
        yield f"{SUMS}: does not list the files and hashes of the manifest: one of the two was changed after publishing"
    for path in files.strangers(version.folder, {*manifest.files, MANIFEST, SUMS}):
        yield f"{path if path.isprintable() else repr(path)}: is not in the manifest: it was added after publishing"


def _index_problems(version: Version, path: str, digest: str, manifest: MixtureManifest) -> Iterator[str]:
    """An index of shards makes whoever loads it open the files that it names: they must be the version's own."""
    beside = f"{path.rpartition('/')[0]}/".removeprefix("/")
    try:
        page = json.loads(read(version.files, version.files.locate(version.folder, path, digest)))
        shards = {str(shard) for shard in dict(page["weight_map"]).values()}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        yield f"{path}: is no index of shards"
        return
    for shard in sorted(shards):
        if f"{beside}{shard}" not in manifest.files:
            yield f"{path}: names the shard {shard!r}, which is no file of the version"
