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
import functools
import hashlib
import os
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from orchestrator.registry_files import BLOBS, CHUNK, DIGEST, SUMS, NotAFile, Staged, is_plain, sha256_file
from workers.contracts import InputError, RunFailed

OPTIONS = {"s3": ("endpoint_override", "region", "scheme"), "gs": ("endpoint_override", "scheme")}
REFRESH_S = 3600.0
"""A blob that was there longer than this is written anew when a version reuses it, so that a gc that runs meanwhile sees it as new."""

_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,221}[a-z0-9]")


@dataclass(frozen=True)
class ObjectFiles:
    """A bucket, or a prefix in one. Nothing is asked of the store before the first use."""

    scheme: str
    bucket: str
    prefix: str
    options: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, text: str) -> ObjectFiles:
        """``s3://bucket/prefix?endpoint_override=host:port&scheme=http&region=here``, or ``gs://bucket/prefix``.

        Raises: InputError if it is none, or holds credentials, which are taken from the environment alone.
        """
        try:
            parts = urlsplit(text)
            options = parse_qsl(parts.query, strict_parsing=bool(parts.query))
        except ValueError:
            raise InputError(f"registry {_hidden(text)!r}: is no URI") from None
        if "@" in parts.netloc or any("key" in name or "token" in name for name, _ in options):
            raise InputError(
                f"registry {parts.scheme}://...: a URI must not hold credentials: put them into AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, or a profile"
            )
        known = OPTIONS[parts.scheme]
        if odd := [name for name, _ in options if name not in known]:
            raise InputError(f"registry {text!r}: unknown option {odd[0]!r}: known are {', '.join(known)}")
        if dict(options).get("scheme", "https") not in ("http", "https"):
            raise InputError(f"registry {text!r}: scheme is not http or https")
        prefix = parts.path.strip("/")
        if not _BUCKET.fullmatch(parts.netloc) or (prefix and not is_plain(prefix)) or parts.fragment or not text.isprintable():
            raise InputError(f"registry {text!r}: is not {parts.scheme}://bucket/prefix with a bucket's name and plain folders")
        return cls(parts.scheme, parts.netloc, prefix, tuple(options))

    def uri(self, path: str) -> str:
        below = "/".join(part for part in (self.bucket, self.prefix, path) if part)
        return f"{self.scheme}://{below}" + (f"?{urlencode(self.options, safe=':')}" if self.options else "")

    def require_writable(self) -> None:
        with self._told(""):
            self._writer.require_conditions(self._key(".conditional"), self.uri(""))

    def names(self, folder: str) -> list[str]:
        return sorted({info.base_name for info in self._list(folder, recursive=False)})

    def holdings(self, folder: str) -> dict[str, set[str]]:
        above, found = self._key(folder) + "/", dict[str, set[str]]()
        for info in self._list(folder, recursive=True):
            name, _, rest = info.path.removeprefix(above).partition("/")
            if rest and info.is_file:
                found.setdefault(name, set()).add(rest)
        return found

    def chunks(self, path: str, start: int = 0) -> Iterator[bytes]:
        with self._told(path), self._fs.open_input_file(self._key(path)) as file:
            file.seek(start)
            while chunk := file.read(CHUNK):
                yield chunk

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

    def create(self, path: str, content: bytes) -> bool:
        with self._told(path):
            return self._writer.create(self._key(path), content)

    def put(self, path: str, content: bytes) -> None:
        with self._told(path):
            self._writer.put(self._key(path), content)

    def delete(self, path: str) -> None:
        with self._told(path):
            self._writer.delete(self._key(path))

    def strip(self, version: str) -> None:
        """Nothing: its bytes are blobs that other versions may share; gc deletes those that none does."""

    def debris(self, doomed: list[str], referenced: set[str]) -> Iterator[tuple[str, int, float]]:
        now = time.time()
        for info in self._list(BLOBS, recursive=False):
            if info.is_file and info.base_name not in referenced:
                yield f"{BLOBS}/{info.base_name}", info.size, now - info.mtime.timestamp()

    def drop(self, path: str) -> None:
        self.delete(path)

    def _key(self, path: str) -> str:
        return "/".join(part for part in (self.bucket, self.prefix, path) if part)

    def _list(self, folder: str, recursive: bool) -> list[Any]:
        from pyarrow.fs import FileSelector

        with self._told(folder):
            found = self._fs.get_file_info(FileSelector(self._key(folder), allow_not_found=True, recursive=recursive))
            return [info for info in found if info.base_name]

    def _upload(self, path: Path) -> str:
        """Make a local file's bytes a blob; its sha256."""
        before, digest = path.stat(), sha256_file(path)
        key = self._key(f"{BLOBS}/{digest}")
        with self._told(f"{BLOBS}/{digest}"):
            there = self._fs.get_file_info(key)
            if not (there.is_file and there.size == before.st_size):
                self._writer.upload(path, key)
            elif time.time() - there.mtime.timestamp() > REFRESH_S:
                self._writer.refresh(key, there.size, path)
        after = path.stat()
        if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            self.delete(f"{BLOBS}/{digest}")  # its bytes may be others than its name says
            raise InputError(f"{path} changed while it was being published: nothing was published")
        return digest

    @functools.cached_property
    def _fs(self) -> Any:
        from pyarrow import fs

        options = dict(self.options)
        if self.scheme == "gs":
            return fs.GcsFileSystem(**options)
        writer, given = self._writer, {}
        if writer.endpoint:
            given["scheme"], given["endpoint_override"] = writer.endpoint.split("://", 1)
        region = writer.region or (None if writer.endpoint else fs.resolve_s3_region(self.bucket))
        return fs.S3FileSystem(region=region, connect_timeout=10, request_timeout=60, **given)

    @functools.cached_property
    def _writer(self) -> _S3Writer:
        if self.scheme == "gs":
            raise RunFailed(
                f"{self.uri('')} can be read, but not written: publishing and aliases need conditional writes, which pyarrow does not "
                "offer for Google Cloud Storage: use s3:// or a shared folder"
            )
        options = dict(self.options)
        endpoint = options.get("endpoint_override") or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        if endpoint and "://" not in endpoint:
            endpoint = f"{options.get('scheme', 'https')}://{endpoint}"
        region = options.get("region") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        return _S3Writer(endpoint, region)

    @contextlib.contextmanager
    def _told(self, path: str) -> Iterator[None]:
        """What a store answers, as one line. A missing file stays FileNotFoundError."""
        try:
            yield
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{self.uri(path)} is not there") from error
        except NotAFile:
            raise
        except Exception as error:
            if not isinstance(error, (OSError, *_store_errors())):
                raise
            text = _hidden(" ".join(str(error).split()))
            raise RunFailed(
                f"{self.uri(path)}: {text[:400]}: see that the bucket, endpoint_override and the AWS_* variables are right"
            ) from None


def _store_errors() -> list[type[Exception]]:
    from pyarrow import ArrowException

    with contextlib.suppress(ImportError):
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        return [ArrowException, Boto3Error, BotoCoreError, ClientError]
    return [ArrowException]


def _hidden(text: str) -> str:
    """Without the credentials of the environment, should a library have put them into its words."""
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID"):
        if len(secret := os.environ.get(name, "")) > 7:
            text = text.replace(secret, "***")
    return text


@dataclass
class _ObjectStaged:
    files: ObjectFiles
    name: str
    hashes: dict[str, str]

    def claim(self, number: int, sums: bytes, manifest: bytes) -> bool:
        self.files.put(f"{BLOBS}/{hashlib.sha256(manifest).hexdigest()}", manifest)
        return self.files.create(f"{self.name}/{number}/{SUMS}", sums)


@dataclass(frozen=True)
class _S3Writer:
    """Requests that pyarrow does not make. Keys begin with the bucket."""

    endpoint: str | None
    region: str | None
    checked: set[str] = field(default_factory=set, compare=False)

    def create(self, key: str, content: bytes) -> bool:
        """Raises: RunFailed if the store stays busy with others who want the same key."""
        from botocore.exceptions import ClientError

        bucket, name = key.split("/", 1)
        for attempt in range(8):
            try:
                self._client.put_object(Bucket=bucket, Key=name, Body=content, IfNoneMatch="*")
                return True
            except ClientError as error:
                code = error.response["ResponseMetadata"]["HTTPStatusCode"]
                if code == 412:  # or it is ours: the answer to a first request was lost, and it was repeated
                    return self._client.get_object(Bucket=bucket, Key=name)["Body"].read() == content
                if code != 409:
                    raise
                time.sleep(0.05 * 2**attempt)
        raise RunFailed(f"s3://{key}: others are writing it all the time: run the same command again")

    def put(self, key: str, content: bytes) -> None:
        bucket, name = key.split("/", 1)
        self._client.put_object(Bucket=bucket, Key=name, Body=content)

    def upload(self, path: Path, key: str) -> None:
        bucket, name = key.split("/", 1)
        self._client.upload_file(str(path), bucket, name)

    def refresh(self, key: str, size: int, path: Path) -> None:
        """Make an object new without sending it, where the store can: up to 5 GB."""
        bucket, name = key.split("/", 1)
        if size < 5_000_000_000:
            source = {"Bucket": bucket, "Key": name}
            self._client.copy_object(Bucket=bucket, Key=name, CopySource=source, MetadataDirective="REPLACE", Metadata={})
        else:
            self.upload(path, key)

    def delete(self, key: str) -> None:
        bucket, name = key.split("/", 1)
        self._client.delete_object(Bucket=bucket, Key=name)

    def require_conditions(self, key: str, uri: str) -> None:
        """Raises: RunFailed if the store writes what it was told not to."""
        if key not in self.checked:
            if self.create(key, secrets.token_hex(16).encode()) and self.create(key, secrets.token_hex(16).encode()):
                raise RunFailed(f"{uri}: the store ignores If-None-Match, so publishers could overwrite each other: nothing was published")
            self.checked.add(key)

    @functools.cached_property
    def _client(self) -> Any:
        try:
            import boto3
        except ImportError:
            raise RunFailed("writing to s3:// needs boto3: pip install 'diffpruning[s3]'") from None
        from botocore.config import Config

        config = Config(connect_timeout=10, read_timeout=60, retries={"max_attempts": 5, "mode": "standard"})
        return boto3.client("s3", endpoint_url=self.endpoint, region_name=self.region, config=config)
