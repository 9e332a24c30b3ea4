"""What an object store offers a run folder and a registry: objects by name, whole or not there, and no renames.

``s3://bucket/prefix?endpoint_override=host:port&scheme=http&region=here``, or ``gs://bucket/prefix?endpoint_override=host:port&scheme=http``;
credentials are the environment's. Assumed of the store: reads and lists see what was written before (S3 since 2020, MinIO, Ceph, R2, Google
Cloud Storage), and for `create` conditional writes (``If-None-Match: *``, ``ifGenerationMatch=0``), which `require_conditions` checks. How
the two kinds are asked is in `objects_s3` and `objects_gcs`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self
from urllib.parse import parse_qsl, urlencode, urlsplit

from workers.contracts import InputError, RunFailed
from workers.files import is_plain
from workers.objects_gcs import GCS
from workers.objects_s3 import S3

KINDS: dict[str, type[S3] | type[GCS]] = {"s3": S3, "gs": GCS}
"""By the scheme of their URIs."""

_SESSION = re.compile(r"(upload_id=)[^&\s)'\"]+")
"""Who knows it may go on with an upload."""
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,221}[a-z0-9]")


class Found(NamedTuple):
    """An object's size in bytes, and when it was written by the store's clock, in seconds since the epoch."""

    size: int
    written: float


@dataclass(frozen=True)
class ObjectStore:
    """A bucket, or a prefix in one. Nothing is asked of the store before the first use."""

    scheme: str
    bucket: str
    prefix: str
    options: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, text: str, what: str) -> Self:
        """The store that a URI names; ``what``: whose URI it is, for messages.

        Raises: InputError if it is none, or holds credentials, which are taken from the environment alone.
        """
        try:
            parts = urlsplit(text)
            options = parse_qsl(parts.query, strict_parsing=bool(parts.query))
        except ValueError:
            raise InputError(f"{what} {hidden(text)!r}: is no URI") from None
        if "@" in parts.netloc or any("key" in name or "token" in name for name, _ in options):
            raise InputError(f"{what} {parts.scheme}://...: a URI must not hold credentials: {KINDS[parts.scheme].CREDENTIALS}")
        known = KINDS[parts.scheme].OPTIONS
        if odd := [name for name, _ in options if name not in known]:
            raise InputError(f"{what} {text!r}: unknown option {odd[0]!r}: known are {', '.join(known)}")
        if dict(options).get("scheme", "https") not in ("http", "https"):
            raise InputError(f"{what} {text!r}: scheme is not http or https")
        prefix = parts.path.strip("/")
        if not _BUCKET.fullmatch(parts.netloc) or (prefix and not is_plain(prefix)) or parts.fragment or not text.isprintable():
            raise InputError(f"{what} {text!r}: is not {parts.scheme}://bucket/prefix with a bucket's name and plain folders")
        return cls(parts.scheme, parts.netloc, prefix, tuple(options))

    def uri(self, path: str) -> str:
        below = "/".join(part for part in (self.bucket, self.prefix, path) if part)
        return f"{self.scheme}://{below}" + (f"?{urlencode(self.options, safe=':')}" if self.options else "")

    def require_conditions(self) -> None:
        """Raises: RunFailed if the store cannot be written to, or writes what it was told not to."""
        with self._told(""):
            if not self._is_conditional:
                told = f"the store ignores {self.kind.CONDITION}, so two writers could overwrite each other: nothing was written"
                raise RunFailed(f"{self.uri('')}: {told}")

    def names(self, folder: str) -> list[str]:
        """What lies directly in a folder."""
        with self._told(folder):
            return sorted(self.kind.names(self._key(folder)))

    def listing(self, folder: str = "") -> dict[str, Found]:
        """Every object at any depth below a folder, by its name within this store."""
        above = f"{folder}/" if folder else ""
        with self._told(folder):
            return {above + name: Found(size, written) for name, size, written in self.kind.listing(self._key(folder))}

    def find(self, path: str) -> Found | None:
        with self._told(path):
            found = self.kind.find(self._key(path))
            return None if found is None else Found(*found)

    def chunks(self, path: str, start: int = 0) -> Iterator[bytes]:
        with self._told(path):
            yield from self.kind.chunks(self._key(path), start)

    def create(self, path: str, content: bytes) -> bool:
        """Write an object unless it is there; whether it is ours."""
        with self._told(path):
            return self.kind.create(self._key(path), content)

    def put(self, path: str, content: bytes) -> None:
        with self._told(path):
            self.kind.put(self._key(path), content)

    def upload(self, file: Path, path: str) -> None:
        """A local file's bytes, whole or not at all."""
        with self._told(path):
            self.kind.upload(file, self._key(path))

    def copy(self, path: str, to: str) -> None:
        """Within the store, without the bytes travelling."""
        with self._told(path):
            self.kind.copy(self._key(path), self._key(to))

    def refresh(self, path: str, size: int, file: Path) -> None:
        """Make an object new that holds a local file's bytes, without sending them, where the store can."""
        with self._told(path):
            self.kind.refresh(self._key(path), size, file)

    def delete(self, path: str) -> None:
        with self._told(path):
            self.kind.delete(self._key(path))

    def delete_unless_newer(self, path: str, written: float) -> bool:
        """Delete an object, unless it was written anew after the time that `listing` told of it; whether it is gone."""
        with self._told(path):
            return self.kind.delete_unless_newer(self._key(path), written)

    def now(self) -> float:
        """Seconds since the epoch by the store's clock, where it tells; else by ours."""
        with self._told(""):
            return self.kind.now()

    def _key(self, path: str) -> str:
        return "/".join(part for part in (self.prefix, path) if part)

    @functools.cached_property
    def _is_conditional(self) -> bool:
        return not all(self.kind.create(self._key(".conditional"), secrets.token_hex(16).encode()) for _ in range(2))

    @functools.cached_property
    def kind(self) -> S3 | GCS:
        return KINDS[self.scheme].of(self.bucket, dict(self.options))

    @contextlib.contextmanager
    def _told(self, path: str) -> Iterator[None]:
        """What a store answers, as one line. A missing file stays FileNotFoundError."""
        try:
            yield
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{self.uri(path)} is not there") from error
        except Exception as error:
            if not isinstance(error, (OSError, *self.kind.errors())):
                raise
            text = hidden(" ".join(str(error).split()))
            advice = f"see that the bucket, endpoint_override and {self.kind.VARIABLES} are right"
            raise RunFailed(f"{self.uri(path)}: {text[:400]}: {advice}") from None


def hidden(text: str) -> str:
    """Without the credentials of the environment, should a library have put them into its words."""
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID"):
        if len(secret := os.environ.get(name, "")) > 7:
            text = text.replace(secret, "***")
    return _SESSION.sub(r"\1***", text)
