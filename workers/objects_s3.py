"""How S3 is asked: reading goes through pyarrow, so that it needs nothing more; what changes something goes through boto3.

For pyarrow's requests cannot be conditional, and an upload that fails in the middle must be given up, where pyarrow would finish it.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, ClassVar, Self

from workers.contracts import RunFailed

CHUNK = 1 << 20


@dataclass(frozen=True)
class S3:
    """A bucket. Nothing is asked before the first use."""

    OPTIONS: ClassVar = ("endpoint_override", "region", "scheme")
    CONDITION: ClassVar = "If-None-Match"
    LIBRARY: ClassVar = "boto3"
    CREDENTIALS: ClassVar = "put them into AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile"
    VARIABLES: ClassVar = "the AWS_* variables"

    bucket: str
    endpoint: str | None
    region: str | None

    @classmethod
    def of(cls, bucket: str, options: Mapping[str, str]) -> Self:
        endpoint = options.get("endpoint_override") or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        if endpoint and "://" not in endpoint:
            endpoint = f"{options.get('scheme', 'https')}://{endpoint}"
        return cls(bucket, endpoint, options.get("region") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"))

    @staticmethod
    def errors() -> tuple[type[Exception], ...]:
        """What the libraries raise that is no OSError."""
        from pyarrow import ArrowException

        try:
            from boto3.exceptions import Boto3Error
            from botocore.exceptions import BotoCoreError, ClientError
        except ImportError:
            return (ArrowException,)
        return ArrowException, Boto3Error, BotoCoreError, ClientError

    # --- reading ------------------------------------------------------------------------------------------------------

    def find(self, key: str) -> tuple[int, float] | None:
        info = self._reader.get_file_info(f"{self.bucket}/{key}")
        return (info.size, info.mtime.timestamp()) if info.is_file else None

    def names(self, key: str) -> set[str]:
        return {info.base_name for info in self._below(key, recursive=False) if info.base_name}

    def listing(self, key: str) -> Iterator[tuple[str, int, float]]:
        cut = len(self._path(key)) + 1
        for info in self._below(key, recursive=True):
            if info.is_file:
                yield info.path[cut:], info.size, info.mtime.timestamp()

    def chunks(self, key: str, start: int) -> Iterator[bytes]:
        with self._reader.open_input_file(self._path(key)) as file:
            file.seek(start)
            while chunk := file.read(CHUNK):
                yield chunk

    def _path(self, key: str) -> str:
        return f"{self.bucket}/{key}" if key else self.bucket

    def _below(self, key: str, recursive: bool) -> Any:
        from pyarrow.fs import FileSelector

        return self._reader.get_file_info(FileSelector(self._path(key), allow_not_found=True, recursive=recursive))

    @functools.cached_property
    def _reader(self) -> Any:
        from pyarrow import fs

        given = {}
        if self.endpoint:
            given["scheme"], given["endpoint_override"] = self.endpoint.split("://", 1)
        region = self.region or (None if self.endpoint else fs.resolve_s3_region(self.bucket))
        return fs.S3FileSystem(region=region, connect_timeout=10, request_timeout=60, **given)

    # --- writing ------------------------------------------------------------------------------------------------------

    def create(self, key: str, content: bytes) -> bool:
        """Raises: RunFailed if the store stays busy with others who want the same key."""
        from botocore.exceptions import ClientError

        for attempt in range(8):
            try:
                self._client.put_object(Bucket=self.bucket, Key=key, Body=content, IfNoneMatch="*")
                return True
            except ClientError as error:
                code = error.response["ResponseMetadata"]["HTTPStatusCode"]
                if code == 412:  # or it is ours: the answer to a first request was lost, and it was repeated
                    return self._client.get_object(Bucket=self.bucket, Key=key)["Body"].read() == content
                if code != 409:
                    raise
                time.sleep(0.05 * 2**attempt)
        raise RunFailed(f"s3://{self.bucket}/{key}: others are writing it all the time: run the same command again")

    def put(self, key: str, content: bytes) -> None:
        self._client.put_object(Bucket=self.bucket, Key=key, Body=content)

    def upload(self, path: Path, key: str) -> None:
        self._client.upload_file(str(path), self.bucket, key)

    def copy(self, key: str, to: str) -> None:
        self._client.copy({"Bucket": self.bucket, "Key": key}, self.bucket, to)

    def refresh(self, key: str, size: int, path: Path) -> None:
        """Make an object new without sending it, where the store can: up to 5 GB."""
        if size < 5_000_000_000:
            source = {"Bucket": self.bucket, "Key": key}
            self._client.copy_object(Bucket=self.bucket, Key=key, CopySource=source, MetadataDirective="REPLACE", Metadata={})
        else:
            self.upload(path, key)

    def delete(self, key: str) -> None:
        self._client.delete_object(Bucket=self.bucket, Key=key)

    def delete_unless_newer(self, key: str, written: float) -> bool:
        """In two requests: an object that was copied onto itself has the ETag that it had, so no condition tells it from the old one."""
        found = self.find(key)
        if found is not None and found[1] >= written + 1:  # a list may tell milliseconds, a look only seconds
            return False
        self.delete(key)
        return True

    def now(self) -> float:
        answer = self._client.head_bucket(Bucket=self.bucket)
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
