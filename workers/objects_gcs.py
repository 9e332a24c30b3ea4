"""How Google Cloud Storage is asked: through its own library, also for reading, since pyarrow's lists leave out folders.

An object appears when its upload is finished, whatever became of who sent it; a session that was left unfinished ends by itself, with what
it got. A plain-http endpoint is an emulator's, and is told no credentials; else they are the environment's application default credentials.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, ClassVar, Self

from workers.contracts import RunFailed

TIMEOUT_S = (10, 60)
"""To connect; without a byte of the answer."""
PATIENCE_S = 60
"""How long a request is repeated that the store answers with a failure that may pass, or not at all."""
CHUNK = 8 << 20
"""Bytes of a file that are in memory while it is sent or fetched."""
_EMULATOR = "STORAGE_EMULATOR_HOST"


@dataclass(frozen=True)
class GCS:
    """A bucket. Nothing is asked before the first use."""

    OPTIONS: ClassVar = ("endpoint_override", "scheme")
    CONDITION: ClassVar = "ifGenerationMatch"
    LIBRARY: ClassVar = "google-cloud-storage"
    CREDENTIALS: ClassVar = "name their file in GOOGLE_APPLICATION_CREDENTIALS, or `gcloud auth application-default login`"
    VARIABLES: ClassVar = "GOOGLE_APPLICATION_CREDENTIALS"

    bucket: str
    endpoint: str | None

    @classmethod
    def of(cls, bucket: str, options: Mapping[str, str]) -> Self:
        endpoint, scheme = options.get("endpoint_override"), options.get("scheme", "https")
        if not endpoint:
            endpoint, scheme = os.environ.get(_EMULATOR), "http"
        if endpoint and "://" not in endpoint:
            endpoint = f"{scheme}://{endpoint}"
        return cls(bucket, endpoint.rstrip("/") if endpoint else None)

    @staticmethod
    def errors() -> tuple[type[Exception], ...]:
        """What the library raises that is no OSError."""
        try:
            from google.api_core.exceptions import GoogleAPIError
            from google.auth.exceptions import GoogleAuthError
            from google.cloud.storage.exceptions import DataCorruption, InvalidResponse
        except ImportError:
            return ()
        return GoogleAPIError, GoogleAuthError, DataCorruption, InvalidResponse

    # --- reading ------------------------------------------------------------------------------------------------------

    def find(self, key: str) -> tuple[int, float] | None:
        blob = self._bucket.get_blob(key, **self._bounds)
        return None if blob is None else (blob.size, blob.time_created.timestamp())

    def names(self, key: str) -> set[str]:
        found = self._list(key, "items(name),prefixes", delimiter="/")
        cut = len(_folder(key))
        return {blob.name[cut:] for blob in found} | {prefix[cut:-1] for prefix in found.prefixes}

    def listing(self, key: str) -> Iterator[tuple[str, int, float]]:
        for blob in self._list(key, "items(name,size,timeCreated)"):
            if not blob.name.endswith("/"):  # some tools make folders out of empty objects
                yield blob.name[len(_folder(key)) :], blob.size, blob.time_created.timestamp()

    def chunks(self, key: str, start: int) -> Iterator[bytes]:
        """All of one generation, which the answer to the first request names. Raises: FileNotFoundError if there is no such object."""
        from google.api_core.exceptions import NotFound, RequestRangeNotSatisfiable

        blob = self._bucket.blob(key)
        with contextlib.suppress(RequestRangeNotSatisfiable):  # the last chunk was a whole one
            while True:
                try:
                    chunk = blob.download_as_bytes(start=start, end=start + CHUNK - 1, raw_download=True, **self._bounds)
                except NotFound as error:
                    if blob.generation is None:
                        raise FileNotFoundError(str(error)) from error
                    raise  # another one is there now
                yield chunk
                if len(chunk) < CHUNK:
                    return
                start += CHUNK

    def _list(self, key: str, fields: str, **more: str) -> Any:
        return self._client.list_blobs(self.bucket, prefix=_folder(key), fields=f"{fields},nextPageToken", **more, **self._bounds)

    # --- writing ------------------------------------------------------------------------------------------------------

    def create(self, key: str, content: bytes) -> bool:
        from google.api_core.exceptions import PreconditionFailed

        blob = self._bucket.blob(key)
        try:
            blob.upload_from_string(content, if_generation_match=0, **self._bounds)
            return True
        except PreconditionFailed:  # or it is ours: the answer to a first request was lost, and it was repeated
            return blob.download_as_bytes(**self._bounds) == content

    def put(self, key: str, content: bytes) -> None:
        self._bucket.blob(key).upload_from_string(content, **self._bounds)

    def upload(self, path: Path, key: str) -> None:
        """Raises: RunFailed if the store kept less of a part than it was sent, which the library does not send again."""
        try:
            self._bucket.blob(key, chunk_size=CHUNK).upload_from_filename(str(path), **self._bounds)
        except ValueError as error:
            raise RunFailed(f"gs://{self.bucket}/{key}: {path} was sent in part: {error}: run the same command again") from None

    def copy(self, key: str, to: str) -> None:
        source, target, token = self._bucket.blob(key), self._bucket.blob(to), None
        while True:
            token, _, _ = target.rewrite(source, token=token, **self._bounds)
            if token is None:
                return

    def refresh(self, key: str, size: int, path: Path) -> None:
        """Make an object new without sending it."""
        self.copy(key, key)

    def delete(self, key: str) -> None:
        from google.api_core.exceptions import NotFound

        with contextlib.suppress(NotFound):
            self._bucket.blob(key).delete(**self._bounds)

    def delete_unless_newer(self, key: str, written: float) -> bool:
        from google.api_core.exceptions import NotFound, PreconditionFailed

        blob = self._bucket.get_blob(key, **self._bounds)
        if blob is None:
            return True
        if blob.time_created.timestamp() > written:
            return False
        try:
            self._bucket.delete_blob(key, if_generation_match=blob.generation, **self._bounds)
        except NotFound:  # by somebody else, or by us: the answer to a first request was lost, and it was repeated
            return True
        except PreconditionFailed:
            return False
        return True

    def now(self) -> float:
        from google.auth.transport.requests import AuthorizedSession

        url = f"{self._client.api_endpoint}/storage/v1/b/{self.bucket}/o?maxResults=1&fields=kind"
        with AuthorizedSession(self._credentials) as session:
            answer = self._bounds["retry"](session.get)(url, timeout=TIMEOUT_S)
        told = answer.headers.get("date")
        return parsedate_to_datetime(told).timestamp() if told else time.time()

    # --- the library --------------------------------------------------------------------------------------------------

    @functools.cached_property
    def _bounds(self) -> dict[str, Any]:
        """Every request may be repeated: it is conditional, or says again what it said."""
        from google.cloud.storage.retry import DEFAULT_RETRY

        return {"timeout": TIMEOUT_S, "retry": DEFAULT_RETRY.with_delay(initial=0.5, maximum=8.0).with_timeout(PATIENCE_S)}

    @functools.cached_property
    def _bucket(self) -> Any:
        return self._client.bucket(self.bucket)

    @functools.cached_property
    def _client(self) -> Any:
        try:
            from google.cloud.storage import Client
        except ImportError:
            raise RunFailed("gs:// needs google-cloud-storage: pip install 'diffpruning[gcs]'") from None
        os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")  # it asks after the bucket for nobody's traces
        options = {"api_endpoint": self.endpoint} if self.endpoint else None
        return Client(project=None, credentials=self._credentials, client_options=options)

    @functools.cached_property
    def _credentials(self) -> Any:
        import google.auth
        from google.auth.credentials import AnonymousCredentials
        from google.cloud.storage import Client

        if _EMULATOR in os.environ or (self.endpoint and self.endpoint.startswith("http://")):
            return AnonymousCredentials()
        logging.getLogger("google.auth").setLevel(logging.ERROR)  # what it warns of, a project or a quota, is not used here
        with warnings.catch_warnings(action="ignore"):
            return google.auth.default(scopes=Client.SCOPE)[0]


def _folder(key: str) -> str:
    """The prefix of what lies below a folder."""
    return f"{key}/" if key else ""
