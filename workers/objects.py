"""What an object store offers a run folder and a registry: objects by name, whole or not there, and no renames.

``s3://bucket/prefix?endpoint_override=host:port&scheme=http&region=here``, or ``gs://bucket/prefix``; credentials are the environment's.
Assumed of the store: reads and lists see what was written before (S3 since 2020, MinIO, Ceph, R2), and for `create` conditional writes
(``If-None-Match: *``), which `require_conditions` checks. Reading goes through pyarrow. Writing to S3 goes through boto3, since pyarrow's
requests cannot be conditional, and an upload that fails in the middle must be given up, where pyarrow would finish it. Google Cloud Storage
(``gs://``) can therefore be read, not written.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NamedTuple, Self
from urllib.parse import parse_qsl, urlencode, urlsplit

from workers.contracts import InputError, RunFailed
from workers.files import is_plain

OPTIONS = {"s3": ("endpoint_override", "region", "scheme"), "gs": ("endpoint_override", "scheme")}
CHUNK = 1 << 20

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
            raise InputError(
                f"{what} {parts.scheme}://...: a URI must not hold credentials: put them into AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, or a profile"
            )
        known = OPTIONS[parts.scheme]
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
            self._writer.require_conditions(self._key(".conditional"), self.uri(""))

    def names(self, folder: str) -> list[str]:
        """What lies directly in a folder."""
        return sorted({info.base_name for info in self._list(folder, recursive=False)})

    def listing(self, folder: str = "") -> dict[str, Found]:
        """Every object at any depth below a folder, by its name within this store."""
        cut = len(self._key("")) + 1
        return {info.path[cut:]: _found(info) for info in self._list(folder, recursive=True) if info.is_file}

    def find(self, path: str) -> Found | None:
        with self._told(path):
            info = self._fs.get_file_info(self._key(path))
            return _found(info) if info.is_file else None

    def chunks(self, path: str, start: int = 0) -> Iterator[bytes]:
        with self._told(path), self._fs.open_input_file(self._key(path)) as file:
            file.seek(start)
            while chunk := file.read(CHUNK):
                yield chunk

    def create(self, path: str, content: bytes) -> bool:
        """Write an object unless it is there; whether it is ours."""
        with self._told(path):
            return self._writer.create(self._key(path), content)

    def put(self, path: str, content: bytes) -> None:
        with self._told(path):
            self._writer.put(self._key(path), content)

    def upload(self, file: Path, path: str) -> None:
        """A local file's bytes, whole or not at all."""
        with self._told(path):
            self._writer.upload(file, self._key(path))

    def copy(self, path: str, to: str) -> None:
        """Within the store, without the bytes travelling."""
        with self._told(path):
            self._writer.copy(self._key(path), self._key(to))

    def delete(self, path: str) -> None:
        with self._told(path):
            self._writer.delete(self._key(path))

    def now(self) -> float:
        """Seconds since the epoch by the store's clock, where it tells; else by ours."""
        with self._told(""):
            return self._writer.now(self.bucket)

    def _key(self, path: str) -> str:
        return "/".join(part for part in (self.bucket, self.prefix, path) if part)

    def _list(self, folder: str, recursive: bool) -> list[Any]:
        from pyarrow.fs import FileSelector

        with self._told(folder):
            found = self._fs.get_file_info(FileSelector(self._key(folder), allow_not_found=True, recursive=recursive))
            return [info for info in found if info.base_name]

    @functools.cached_property
    def _fs(self) -> Any:
        from pyarrow import fs

        options = dict(self.options)
        if self.scheme == "gs":
            return fs.GcsFileSystem(**options)
        writer, given = self._s3, {}
        if writer.endpoint:
            given["scheme"], given["endpoint_override"] = writer.endpoint.split("://", 1)
        region = writer.region or (None if writer.endpoint else fs.resolve_s3_region(self.bucket))
        return fs.S3FileSystem(region=region, connect_timeout=10, request_timeout=60, **given)

    @functools.cached_property
    def _s3(self) -> S3Writer:
        options = dict(self.options)
        endpoint = options.get("endpoint_override") or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        if endpoint and "://" not in endpoint:
            endpoint = f"{options.get('scheme', 'https')}://{endpoint}"
        region = options.get("region") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        return S3Writer(endpoint, region)

    @property
    def _writer(self) -> S3Writer:
        """Raises: RunFailed for a store that is only read."""
        if self.scheme != "s3":
            raise RunFailed(
                f"{self.uri('')} can be read, but not written: that takes conditional writes, which pyarrow does not offer for Google "
                "Cloud Storage: use s3:// or a shared folder"
            )
        return self._s3

    @contextlib.contextmanager
    def _told(self, path: str) -> Iterator[None]:
        """What a store answers, as one line. A missing file stays FileNotFoundError."""
        try:
            yield
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{self.uri(path)} is not there") from error
        except Exception as error:
            if not isinstance(error, (OSError, *_store_errors())):
                raise
            text = hidden(" ".join(str(error).split()))
            raise RunFailed(
                f"{self.uri(path)}: {text[:400]}: see that the bucket, endpoint_override and the AWS_* variables are right"
            ) from None


def _found(info: Any) -> Found:
    return Found(info.size, info.mtime.timestamp())


def _store_errors() -> list[type[Exception]]:
    from pyarrow import ArrowException

    with contextlib.suppress(ImportError):
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        return [ArrowException, Boto3Error, BotoCoreError, ClientError]
    return [ArrowException]


def hidden(text: str) -> str:
    """Without the credentials of the environment, should a library have put them into its words."""
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID"):
        if len(secret := os.environ.get(name, "")) > 7:
            text = text.replace(secret, "***")
    return text


@dataclass(frozen=True)
class S3Writer:
    """Requests that change something, which pyarrow does not make as they must be. Keys begin with the bucket."""

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

    def copy(self, key: str, to: str) -> None:
        (bucket, name), (into, other) = key.split("/", 1), to.split("/", 1)
        self._client.copy({"Bucket": bucket, "Key": name}, into, other)

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
                raise RunFailed(f"{uri}: the store ignores If-None-Match, so two writers could overwrite each other: nothing was written")
            self.checked.add(key)

    def now(self, bucket: str) -> float:
        answer = self._client.head_bucket(Bucket=bucket)
        told = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
        return parsedate_to_datetime(told).timestamp() if told else time.time()

    @functools.cached_property
    def _client(self) -> Any:
        try:
            import boto3
        except ImportError:
            raise RunFailed("writing to s3:// needs boto3: pip install 'diffpruning[s3]'") from None
        from botocore.config import Config

        config = Config(connect_timeout=10, read_timeout=60, retries={"max_attempts": 5, "mode": "standard"})
        return boto3.client("s3", endpoint_url=self.endpoint, region_name=self.region, config=config)
