"""A registry in a bucket: what an object store promises, and how versions are whole there without renames.

    <root>/.blobs/<sha256>                       the bytes of every file of every version, manifests included, once
    <root>/<name>/<number>/SHA256SUMS            one version: which blobs it consists of
    <root>/<name>/.aliases/<alias>/<n>/event.json

A version is one small object that is written last and only if it is not there (``If-None-Match: *``), so of two who want one number one
gets it, and everything that it names is there before it is seen. Assumed of the store: reads and lists see what was written before
(S3 since 2020, MinIO, Ceph, R2), and conditional writes. The first write of a registry checks that conditions are not ignored.
Reading goes through pyarrow. Writing goes through boto3, since pyarrow's requests cannot be conditional, and an upload that fails in the
middle must be given up, where pyarrow would finish it. Google Cloud Storage (``gs://``) can therefore be read, not written.
A killed publisher leaves blobs that nothing names, and at worst the parts of an unfinished upload, which only a lifecycle rule of the
bucket removes; gc deletes such blobs after a day. A publisher must therefore be done within that day.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from orchestrator.registry_files import BLOBS, DIGEST, SUMS, Staged, sha256_file
from workers.contracts import InputError
from workers.objects import ObjectStore

REFRESH_S = 3600.0
"""A blob that was there longer than this is written anew when a version reuses it, so that a gc that runs meanwhile sees it as new."""


@dataclass(frozen=True)
class ObjectFiles(ObjectStore):
    """A bucket, or a prefix in one. Nothing is asked of the store before the first use."""

    def require_writable(self) -> None:
        self.require_conditions()

    def holdings(self, folder: str) -> dict[str, set[str]]:
        above, found = self._key(folder) + "/", dict[str, set[str]]()
        for info in self._list(folder, recursive=True):
            name, _, rest = info.path.removeprefix(above).partition("/")
            if rest and info.is_file:
                found.setdefault(name, set()).add(rest)
        return found

    def locate(self, version: str, path: str, digest: str) -> str:
        if not DIGEST.fullmatch(digest):
            raise FileNotFoundError(f"{digest!r} is no sha256")
        return f"{BLOBS}/{digest}"

    def strangers(self, version: str, known: set[str]) -> list[str]:
        return []  # a version has no folder of its own that somebody could add to

    @contextlib.contextmanager
    def stage(self, name: str, folder: Path, paths: list[str]) -> Iterator[Staged]:
        self.require_writable()
        hashes = {path: self._upload(folder / path) for path in paths}
        yield _ObjectStaged(self, name, hashes)

    def strip(self, version: str) -> None:
        """Nothing: its bytes are blobs that other versions may share; gc deletes those that none does."""

    def debris(self, doomed: list[str], begun: list[str], referenced: set[str]) -> Iterator[tuple[str, int, float]]:
        now = time.time()
        for info in self._list(BLOBS, recursive=False):
            if info.is_file and info.base_name not in referenced:
                yield f"{BLOBS}/{info.base_name}", info.size, now - info.mtime.timestamp()

    def drop(self, path: str) -> None:
        self.delete(path)

    def _upload(self, path: Path) -> str:
        """Make a local file's bytes a blob; its sha256."""
        before, digest = path.stat(), sha256_file(path)
        key = self._key(f"{BLOBS}/{digest}")
        with self._told(f"{BLOBS}/{digest}"):
            there = self._fs.get_file_info(key)
            if not (there.is_file and there.size == before.st_size):
                self._s3.upload(path, key)
            elif time.time() - there.mtime.timestamp() > REFRESH_S:
                self._s3.refresh(key, there.size, path)
        after = path.stat()
        if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            self.delete(f"{BLOBS}/{digest}")  # its bytes may be others than its name says
            raise InputError(f"{path} changed while it was being published: nothing was published")
        return digest


@dataclass
class _ObjectStaged:
    files: ObjectFiles
    name: str
    hashes: dict[str, str]

    def claim(self, number: int, sums: bytes, manifest: bytes) -> bool:
        self.files.put(f"{BLOBS}/{hashlib.sha256(manifest).hexdigest()}", manifest)
        return self.files.create(f"{self.name}/{number}/{SUMS}", sums)
