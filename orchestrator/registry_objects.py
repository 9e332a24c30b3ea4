"""A registry in a bucket: what an object store promises, and how versions are whole there without renames.

    <root>/.blobs/<sha256>                       the bytes of every file of every version, manifests included, once
    <root>/<name>/<number>/SHA256SUMS            one version: which blobs it consists of
    <root>/<name>/.aliases/<alias>/<n>/event.json

A version is one small object that is written last and only if it is not there (`workers.objects`), so of two who want one number one
gets it, and everything that it names is there before it is seen. The first write of a registry checks that conditions are not ignored.
A killed publisher leaves blobs that nothing names, and on S3 at worst the parts of an unfinished upload, which only a lifecycle rule of the
bucket removes (on Google Cloud Storage they go by themselves); gc deletes such blobs after a day. A publisher must therefore be done within
that day.

A gc may meet a publisher who uses an old blob again. The publisher makes the blob new first, and gc looks again before it deletes one and
leaves what is newer than it was in the list. On Google Cloud Storage that look and the deletion are one; S3 has no condition for it, since
equal bytes have the same ETag. So before its claim, and after it, the publisher sends again what is gone; and gc, when it has deleted, says
so if a version that appeared meanwhile lacks a blob.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from orchestrator.registry_files import BLOBS, DIGEST, SUMS, Debris, Staged, sha256_file
from workers.contracts import InputError, RunFailed
from workers.objects import ObjectStore

REFRESH_S = 3600.0
"""A blob that was there longer than this is written anew when a version reuses it, so that a gc that runs meanwhile sees it as new."""


@dataclass(frozen=True)
class ObjectFiles(ObjectStore):
    """A bucket, or a prefix in one. Nothing is asked of the store before the first use."""

    def require_writable(self) -> None:
        self.require_conditions()

    def holdings(self, folder: str) -> dict[str, set[str]]:
        found = dict[str, set[str]]()
        for path in self.listing(folder):
            name, _, rest = path.removeprefix(f"{folder}/").partition("/")
            if rest:
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
        yield _ObjectStaged(self, name, folder, hashes)

    def strip(self, version: str) -> None:
        """Nothing: its bytes are blobs that other versions may share; gc deletes those that none does."""

    def debris(self, doomed: list[str], begun: list[str], referenced: set[str], name: str | None = None) -> Iterator[Debris]:
        now = time.time()
        for path, blob in self.listing(BLOBS).items():
            digest = path.removeprefix(f"{BLOBS}/")
            if "/" not in digest and digest not in referenced:
                yield Debris(path, blob.size, now - blob.written, blob.written)

    def drop(self, found: Debris) -> bool:
        return self.delete_unless_newer(found.path, found.written)

    def _upload(self, path: Path) -> str:
        """Make a local file's bytes a blob; its sha256."""
        before, digest = path.stat(), sha256_file(path)
        there = self.find(f"{BLOBS}/{digest}")
        is_ours = there is None or there.size != before.st_size
        if is_ours:
            self.upload(path, f"{BLOBS}/{digest}")
        elif there is not None and time.time() - there.written > REFRESH_S:
            self._refresh(digest, there.size, path)
        after = path.stat()
        if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            if is_ours:
                self.delete(f"{BLOBS}/{digest}")  # its bytes may be others than its name says
            raise InputError(f"{path} changed while it was being published: nothing was published")
        return digest

    def _refresh(self, digest: str, size: int, path: Path) -> None:
        try:
            self.refresh(f"{BLOBS}/{digest}", size, path)
        except (FileNotFoundError, RunFailed):
            if self.find(f"{BLOBS}/{digest}") is not None:
                raise
            self.upload(path, f"{BLOBS}/{digest}")  # a gc was faster


@dataclass
class _ObjectStaged:
    files: ObjectFiles
    name: str
    folder: Path
    hashes: dict[str, str]

    def claim(self, number: int, sums: bytes, manifest: bytes) -> bool:
        page = f"{BLOBS}/{hashlib.sha256(manifest).hexdigest()}"
        self.files.put(page, manifest)
        self._send_what_is_gone()
        if not self.files.create(f"{self.name}/{number}/{SUMS}", sums):
            return False
        if self.files.find(page) is None:
            self.files.put(page, manifest)
        self._send_what_is_gone()  # a gc that looked for versions before there was this one may have deleted until now
        return True

    def _send_what_is_gone(self) -> None:
        for path, digest in self.hashes.items():
            if self.files.find(f"{BLOBS}/{digest}") is None:
                self.files.upload(self.folder / path, f"{BLOBS}/{digest}")
