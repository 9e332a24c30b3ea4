"""A real S3 server on this machine for tests: moto's, one request at a time, so that what it says was written was written in some order.

One at a time, no two writers meet in it as they do in a real store; ``faults`` says what such a store would have answered.
"""

import io
import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterator

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "AKIAEXAMPLEEXAMPLE",
    "AWS_SECRET_ACCESS_KEY": "hush-hush-hush-hush",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}


class Server:
    """``on_write("before")`` and ``("after")`` are called around every request that changes something, when it is set; if the first returns
    True, the request is lost on its way. A request is whole before anything is done with it, so what its sender does then changes nothing.

    ``on_arrival(method, path, body)`` is called before a request gets its turn, when it is set; others are answered meanwhile.

    ``faults``: what becomes of the next conditional writes: "" nothing; "busy", a 409 instead of it; "busy after", a 409 although it was
    written; "lost", written, and a failure is answered.
    """

    def __init__(self) -> None:
        from werkzeug.serving import make_server

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        app, lock = self.app(), threading.Lock()
        self.on_write: Callable[[str], bool | None] | None = None
        self.on_arrival: Callable[[str, str, bytes], None] | None = None
        self.faults: Iterator[str] = itertools.repeat("")
        self.requests: list[tuple[str, str]] = []
        self.ignores_conditions = False

        def one_at_a_time(environ, start_response):
            writes = environ["REQUEST_METHOD"] in ("PUT", "POST", "DELETE")
            length = None if environ.get("wsgi.input_terminated") else int(environ.get("CONTENT_LENGTH") or 0)
            body = environ["wsgi.input"].read(*([] if length is None else [length]))
            if length is not None and len(body) < length:
                return self.refused(start_response, "400 Bad Request", "IncompleteBody")
            if self.on_arrival:
                self.on_arrival(environ["REQUEST_METHOD"], environ["RAW_URI"], body)
            with lock:
                self.requests.append((environ["REQUEST_METHOD"], environ["PATH_INFO"]))
                if self.ignores_conditions:
                    self.drop_condition(environ)
                fault = next(self.faults) if self.is_conditional(environ) else ""
                if (writes and self.on_write and self.on_write("before")) or fault == "busy":
                    return self.refused(start_response, *self.BUSY)
                told = []
                answer = list(app({**environ, "wsgi.input": io.BytesIO(body)}, lambda *status: told.append(status)))
                if writes and self.on_write:
                    self.on_write("after")
                if fault and told[0][0].startswith("200"):
                    return self.refused(start_response, *(self.LOST if fault == "lost" else self.BUSY))
                start_response(*told[0])
                return answer

        self._server = make_server("127.0.0.1", 0, one_at_a_time, threaded=True)
        self.endpoint = f"127.0.0.1:{self._server.port}"
        self._names = itertools.count(1)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    BUSY = ("409 Conflict", "ConditionalRequestConflict")
    LOST = ("500 Internal Server Error", "InternalError")

    def app(self) -> Callable:
        from moto.server import DomainDispatcherApplication, create_backend_app

        return DomainDispatcherApplication(create_backend_app)

    def is_conditional(self, environ: dict) -> bool:
        return "HTTP_IF_NONE_MATCH" in environ

    def drop_condition(self, environ: dict) -> None:
        environ.pop("HTTP_IF_NONE_MATCH", None)

    def refused(self, start_response, status: str, code: str) -> list[bytes]:
        start_response(status, [("Content-Type", "application/xml")])
        return [f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>made up by a test</Message></Error>".encode()]

    def quiet(self) -> None:
        """As it was when it was new."""
        self.on_write, self.on_arrival, self.ignores_conditions, self.faults = None, None, False, itertools.repeat("")

    def client(self):
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=f"http://{self.endpoint}",
            region_name="us-east-1",
            aws_access_key_id=ENVIRONMENT["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=ENVIRONMENT["AWS_SECRET_ACCESS_KEY"],
        )

    def new_registry(self) -> str:
        """The URI of a registry in a new bucket."""
        bucket = f"bucket-{next(self._names)}"
        self.client().create_bucket(Bucket=bucket)
        return f"s3://{bucket}/mixtures?endpoint_override={self.endpoint}&scheme=http&region=us-east-1"

    def keys(self, uri: str) -> dict[str, int]:
        """Every object of a registry -> its bytes."""
        bucket, prefix = place(uri)
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/")
        return {found["Key"].removeprefix(f"{prefix}/"): found["Size"] for page in pages for found in page.get("Contents", [])}

    def put(self, uri: str, key: str, content: bytes) -> None:
        """As somebody else would."""
        bucket, prefix = place(uri)
        self.client().put_object(Bucket=bucket, Key=f"{prefix}/{key}", Body=content)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def place(uri: str) -> tuple[str, str]:
    """Bucket and prefix."""
    bucket, _, prefix = uri.partition("://")[2].partition("?")[0].partition("/")
    return bucket, prefix
