"""Published mixtures: immutable, numbered versions that are checked file by file.

``<root>/<name>/<number>/`` is one version: its files, ``manifest.json`` with the hash of each, and ``SHA256SUMS`` of them all.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from workers.contracts import InputError, MixtureManifest, VerificationError

MANIFEST = "manifest.json"
SUMS = "SHA256SUMS"

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_NUMBER = re.compile(r"[1-9][0-9]*")


@dataclass(frozen=True)
class Version:
    """One published mixture: ``quickstart:7`` and the folder that holds it."""

    name: str
    number: int
    path: Path

    @property
    def reference(self) -> str:
        return f"{self.name}:{self.number}"

    def manifest(self) -> MixtureManifest:
        """Raises: VerificationError if the manifest is missing or cannot be parsed."""
        try:
            return MixtureManifest.from_json(dict(json.loads((self.path / MANIFEST).read_bytes())))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise VerificationError(f"{self.reference}: {MANIFEST}: cannot be read: {error}") from error


class Registry:
    """Versions below one root folder. Neither construction nor reading creates anything."""

    def __init__(self, uri: str | Path) -> None:
        """``uri``: a local path or ``file:///path``. Raises: InputError for any other scheme."""
        text = str(uri)
        if not text or (":/" in text and not text.startswith("file:///")):
            raise InputError(f"registry {text!r}: only local paths and file:///absolute/path are supported so far")
        self.root = Path(unquote(text.removeprefix("file://"))) if ":/" in text else Path(text).expanduser().absolute()

    def publish(self, name: str, manifest: MixtureManifest, folder: Path) -> Version:
        """Copy the files of ``folder`` into the next version of ``name``; ``manifest.files`` is filled in here.

        Doing it again is safe: an intact version with the same fingerprint, budget and files is returned instead of a second one.
        Raises: InputError for an illegal name, an empty folder, or a file that a version cannot hold.
        """
        home = self._home(name)
        paths = _files(folder, follow_links=True) if folder.is_dir() else []
        if not paths:
            raise InputError(f"nothing to publish as {name}: {folder} holds no files")
        for path in paths:
            if path in (MANIFEST, SUMS) or not _is_plain(path):
                reason = "is the registry's own" if path in (MANIFEST, SUMS) else "holds a backslash or an unprintable character"
                raise InputError(f"{folder}: the file name {path!r} {reason}: rename the file")
        temporary = home / f".publishing-{os.getpid()}-{secrets.token_hex(8)}"
        try:
            for path in paths:
                (temporary / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / path, temporary / path)
            manifest = dataclasses.replace(manifest, files={path: sha256_file(temporary / path) for path in paths})
            page = (json.dumps(manifest.to_json(), indent=2) + "\n").encode()
            hashes = {**manifest.files, MANIFEST: hashlib.sha256(page).hexdigest()}
            (temporary / SUMS).write_bytes("".join(f"{digest}  {path}\n" for path, digest in hashes.items()).encode())
            (temporary / MANIFEST).write_bytes(page)
            _seal(temporary)
            return self._claim(name, manifest, temporary)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def versions(self, name: str | None = None) -> list[Version]:
        """The versions of ``name``, or of every name, by name and number. Hidden and foreign folders are ignored."""
        if name is None:
            names = sorted(entry.name for entry in self.root.iterdir()) if self.root.is_dir() else []
            return [version for name in names if _NAME.fullmatch(name) for version in self.versions(name)]
        found = (Version(name, number, self._home(name) / str(number)) for number in self._numbers(name))
        # Either file makes it ours: a version that lost its manifest stays listed, so that `latest` does not silently step back.
        return [version for version in found if any((version.path / file).is_file() for file in (MANIFEST, SUMS))]

    def resolve(self, reference: str) -> Version:
        """The version meant by ``name``, ``name@latest`` (the same) or ``name:7``. Raises: InputError that lists what there is."""
        name, separator, wanted = reference.partition("@" if "@" in reference else ":")
        versions = self.versions(name)
        if not versions:
            names = sorted({version.name for version in self.versions()})
            there = f"it has {', '.join(names)}" if names else "it is empty or missing: publish a mixture first"
            raise InputError(f"the registry {self.root} has no mixture {name}: {there}")
        if separator == "@" and wanted != "latest":
            raise InputError(f"{name} has no alias {wanted!r}: the only alias is latest")
        numbers = {str(version.number): version for version in versions}
        if separator == ":" and wanted not in numbers:
            raise InputError(f"{name} has no version {wanted!r}: it has {', '.join(numbers)}")
        return numbers[wanted] if separator == ":" else versions[-1]

    def verify(self, version: Version) -> int:
        """Check every file against the manifest, and the manifest against SHA256SUMS; returns how many files the manifest lists.

        Raises: VerificationError, one line that names the version and its first three problems.
        """
        manifest = version.manifest()
        try:
            problems = list(_problems(version.path, manifest))
        except OSError as error:
            raise VerificationError(f"{version.reference}: cannot be read: {error}") from error
        if problems:
            more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise VerificationError(f"{version.reference}: {'; '.join(problems[:3])}{more}")
        return len(manifest.files)

    def _claim(self, name: str, manifest: MixtureManifest, temporary: Path) -> Version:
        """Rename ``temporary`` to the next number, unless an equal version exists."""
        number = 1
        while True:
            # The number is chosen before looking for an equal version: whoever publishes one in between takes that number,
            # our rename fails, and we look again. So no lock is needed.
            number = max([number, *(taken + 1 for taken in self._numbers(name))])
            if equal := self._find_equal(name, manifest):
                return equal
            version = Version(name, number, self._home(name) / str(number))
            try:
                os.rename(temporary, version.path)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                number += 1
                continue
            _sync(version.path.parent)
            _sync(self.root)
            return version

    def _find_equal(self, name: str, manifest: MixtureManifest) -> Version | None:
        wanted = (manifest.provenance.fingerprint, manifest.plan.budget, manifest.files)
        for version in reversed(self.versions(name)):
            try:
                found = version.manifest()
                if (found.provenance.fingerprint, found.plan.budget, found.files) == wanted and self.verify(version):
                    return version
            except VerificationError:
                continue  # A damaged version cannot stand in for a good one.
        return None

    def _home(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise InputError(f"mixture name {name!r} is not 1 to 64 of a-z, 0-9, '.', '_', '-', starting with a letter or digit")
        return self.root / name

    def _numbers(self, name: str) -> list[int]:
        """Every number in use, ascending. An empty numbered folder counts, so it keeps a removed version's number from being reused."""
        home = self._home(name)
        return sorted(int(entry.name) for entry in home.iterdir() if _NUMBER.fullmatch(entry.name)) if home.is_dir() else []


def sha256_file(path: Path) -> str:
    """sha256 (hex) of a file of any size."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path, *, follow_links: bool) -> list[str]:
    """Relative POSIX paths of everything in ``folder`` that is not a folder; a link to a folder counts unless it is followed."""
    found = []
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and (follow_links or not entry.is_symlink()):
            found += [f"{entry.name}/{path}" for path in _files(entry, follow_links=follow_links)]
        else:
            found.append(entry.name)
    return found


def _is_plain(path: str) -> bool:
    """Relative, stays inside its folder, is spelled in one way only, and fits one line of SHA256SUMS."""
    pure = PurePosixPath(path)
    return path == str(pure) != "." and ".." not in pure.parts and not pure.is_absolute() and "\\" not in path and path.isprintable()


def _problems(folder: Path, manifest: MixtureManifest) -> Iterator[str]:
    """Where a version's files, its manifest and its SHA256SUMS disagree. Hashes only regular files found inside ``folder``."""
    present = set(_files(folder, follow_links=False))
    lines = (folder / SUMS).read_text("utf-8", errors="replace").splitlines()
    sums = {path: digest for digest, _, path in (line.partition("  ") for line in lines)}
    expected = [(MANIFEST, sums.pop(MANIFEST, "nothing"), SUMS)]
    expected += [(path, digest, "the manifest") for path, digest in manifest.files.items()]
    for path, digest, source in expected:
        if not _is_plain(path):
            yield f"{path!r}: is not a plain relative path inside the version"
        elif path not in present:
            yield f"{path}: is missing"
        elif (folder / path).is_symlink() or not (folder / path).is_file():
            yield f"{path}: is not a regular file"
        elif (found := sha256_file(folder / path)) != digest:
            yield f"{path}: sha256 is {found[:12]}..., {source} says {digest[:12]}...: the file was changed after publishing"
    if sums != manifest.files:
        yield f"{SUMS}: does not list the files and hashes of the manifest: one of the two was changed after publishing"
    for path in sorted(present - set(manifest.files) - {MANIFEST, SUMS}):
        yield f"{path if path.isprintable() else repr(path)}: is not in the manifest: it was added after publishing"


def _seal(folder: Path) -> None:
    """Make every file read-only, and force files and folders to the disk."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_file():
            path.chmod(0o444)
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
