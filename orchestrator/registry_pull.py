"""A published version as a plain local folder: fetched file by file, continued where it stopped, and checked.

Everything is written beside the folder and renamed at the end, so the folder is whole or not there.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from orchestrator.aliases import one_line
from orchestrator.registry import Registry, Version
from orchestrator.registry_files import DIGEST, MANIFEST, SUMS, NotAFile, files_below, sha256_file
from workers.contracts import InputError, VerificationError
from workers.files import is_plain


def pull(version: Version, out: Path, say: Callable[[str], None] = lambda line: None) -> int:
    """Make ``out`` the version's folder; returns the bytes that were fetched, 0 if it was there already. The same again continues.

    Raises: InputError if ``out`` holds something else; VerificationError if the version is not what its manifest says.
    """
    out = Path(os.path.abspath(out))
    if not out.name:
        raise InputError(f"--out: {out} cannot become a version's folder: give a folder to make")
    if not out.parent.is_dir():
        raise InputError(f"--out: no such folder: {out.parent}")
    with _locked(out.with_name(f".{out.name}.pulling")) as beside:
        try:
            return _pull(version, out, beside, say)
        except (InputError, VerificationError):
            shutil.rmtree(beside, ignore_errors=True)
            raise


def local(registry: Registry, version: Version, cache: Path, say: Callable[[str], None] = lambda line: None) -> Path:
    """The folder of a version whose files are whole: its own on a disk, else one below ``cache``, fetched if it is not there.

    Raises: VerificationError.
    """
    if registry.is_local:
        registry.verify(version)
        return version.path
    folder = cache / hashlib.sha256(version.where.encode()).hexdigest()[:16] / version.name
    folder.mkdir(parents=True, exist_ok=True)
    pull(version, folder / str(version.number), say)
    return folder / str(version.number)


def cache_folder() -> Path:
    """Where versions of remote registries are kept on this machine."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffpruning" / "versions"


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[Path]:
    """The folder, made if it is not there, for one process at a time."""
    while True:
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
        if folder.is_symlink() or not folder.is_dir():
            raise InputError(f"{folder} is in the way: remove it")
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):  # else whom we waited for has renamed it
                if os.path.samestat(os.fstat(descriptor), folder.stat()):
                    yield folder
                    return
        finally:
            os.close(descriptor)


def _pull(version: Version, out: Path, beside: Path, say: Callable[[str], None]) -> int:
    manifest, sums = version.manifest(), _sums(version)
    hashes = {**manifest.files, MANIFEST: sums.get(MANIFEST, "")}
    for path, digest in hashes.items():
        if not is_plain(path) or path == SUMS:
            raise VerificationError(f"{version.reference}: {path!r}: is not a plain relative path inside the version")
        if not DIGEST.fullmatch(digest):
            raise VerificationError(f"{version.reference}: {path}: the manifest says {digest[:64]!r}, which is no sha256")
    page = "".join(f"{digest}  {path}\n" for path, digest in hashes.items()).encode()
    if sums != hashes:
        raise VerificationError(f"{version.reference}: {SUMS}: does not list the files and hashes of the manifest")
    if (out.is_symlink() or out.exists()) and (not out.is_dir() or any(out.iterdir())):
        _require_same(version, out, hashes, page)
        shutil.rmtree(beside)
        return 0
    fetched = 0
    for i, (path, digest) in enumerate(hashes.items(), 1):
        say(f"{version.reference}  file {i} of {len(hashes)}  {path}")
        try:
            fetched += _fetch(version, path, digest, beside)
        except FileNotFoundError:
            raise VerificationError(f"{version.reference}: {path}: is missing") from None
        except OSError as error:
            if not isinstance(error, NotAFile) and error.errno not in (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST):
                raise
            raise VerificationError(f"{version.reference}: {path}: cannot be a file: {error.strerror}") from None
    (beside / SUMS).write_bytes(page)
    for stray in set(files_below(beside, follow_links=False)) - {*hashes, SUMS}:  # of another version, pulled before
        (beside / stray).unlink()
    for folder in sorted((path for path in beside.rglob("*") if path.is_dir()), reverse=True):
        if not any(folder.iterdir()):
            folder.rmdir()
    if out.is_dir():
        out.rmdir()
    try:
        os.rename(beside, out)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise InputError(f"--out: {out} was made by somebody else meanwhile: give another folder") from None
    return fetched


def _sums(version: Version) -> dict[str, str]:
    try:
        return version.sums()
    except OSError as error:
        raise VerificationError(f"{version.reference}: {SUMS}: cannot be read: {one_line(error)}") from error


def _fetch(version: Version, path: str, digest: str, folder: Path) -> int:
    """Bring one file to its place unless it is there; what an earlier pull left of it is continued. Bytes fetched."""
    target = folder / path
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_file() and sha256_file(target) == digest:
        return 0
    part = target.with_name(f".{target.name}.{digest[:12]}.part")
    fetched = 0
    for start in sorted({part.stat().st_size if part.is_file() else 0, 0}, reverse=True):  # once more from 0, should the rest not fit
        with part.open("ab" if start else "wb") as file:
            for chunk in version.files.chunks(version.files.locate(version.folder, path, digest), start):
                file.write(chunk)
                fetched += len(chunk)
        found = sha256_file(part)
        if found == digest:
            os.replace(part, target)
            return fetched
    raise VerificationError(f"{version.reference}: {path}: sha256 is {found[:12]}..., the manifest says {digest[:12]}...")


def _require_same(version: Version, out: Path, hashes: dict[str, str], page: bytes) -> None:
    """Raises: InputError unless ``out`` is the version's folder already, file by file."""
    same = out.is_dir() and not out.is_symlink() and sorted(files_below(out, follow_links=False)) == sorted([*hashes, SUMS])
    if not same or not all(sha256_file(out / path) == digest for path, digest in hashes.items()) or (out / SUMS).read_bytes() != page:
        raise InputError(f"--out: {out} is there and is not {version.reference}: give another folder, or remove it")
