"""A server on this machine that speaks the JSON API of Google Cloud Storage, as far as Google's library asks it for us, for tests.

Objects are in memory, one request at a time is answered, and `tests.s3.Server` says what goes wrong when. An object is there when its
upload is finished: in one request, or with the last part of a session.
"""

import base64
import email.parser
import email.policy
import email.utils
import itertools
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, unquote, urlencode

from tests import s3

Answer = tuple[str, list[tuple[str, str]], bytes]
"""Status, headers, body."""
PAGE = 100
"""Names in one answer to a list; the real store gives 1000."""
_OBJECTS = re.compile(r"/(?:upload/|download/)?storage/v1/b/([^/]+)/o")
_OBJECT = re.compile(r"/(?:download/)?storage/v1/b/([^/]+)/o/([^/]+)")
_REWRITE = re.compile(r"/storage/v1/b/([^/]+)/o/([^/]+)/rewriteTo/b/([^/]+)/o/([^/]+)")


class Refused(Exception):
    def __init__(self, status: str, told: str):
        super().__init__(status, told)
        self.status, self.told = status, told


@dataclass(frozen=True)
class Stored:
    content: bytes
    generation: int
    written: float


@dataclass
class Session:
    """An upload in parts, and under what condition its object may appear."""

    bucket: str
    name: str
    query: dict[str, str]
    content: bytearray = field(default_factory=bytearray)
    answer: dict[str, Any] | None = None


@dataclass
class Request:
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes


class Server(s3.Server):
    BUSY = ("429 Too Many Requests", "rateLimitExceeded")
    LOST = ("503 Service Unavailable", "backendError")

    def app(self) -> Callable:
        self.buckets: dict[str, dict[str, Stored]] = {}
        self.sessions: dict[str, Session] = {}
        self._generations = itertools.count(1)
        self.authorized: list[str] = []
        """Paths of requests that came with a credential."""
        self.short = 0
        """So many bytes less are kept of the next part of an upload than were sent."""

        def app(environ, start_response):
            request = Request(
                environ["REQUEST_METHOD"],
                environ["RAW_URI"].partition("?")[0],
                dict(parse_qsl(environ["QUERY_STRING"])),
                {name.removeprefix("HTTP_"): value for name, value in environ.items() if isinstance(value, str)},
                environ["wsgi.input"].read(),
            )
            self.authorized += [request.path] * ("AUTHORIZATION" in request.headers)
            try:
                status, headers, body = self.answer(request)
            except Refused as error:
                return self.refused(start_response, error.status, error.told)
            start_response(status, [*headers, ("Content-Length", str(len(body)))])
            return [body]

        return app

    def is_conditional(self, environ: dict) -> bool:
        return "ifGenerationMatch=" in environ["QUERY_STRING"]

    def drop_condition(self, environ: dict) -> None:
        query = [(name, value) for name, value in parse_qsl(environ["QUERY_STRING"]) if name != "ifGenerationMatch"]
        query = [(name, value) for name, value in parse_qsl(environ["QUERY_STRING"]) if name != "ifGenerationMatch"]
        environ["QUERY_STRING"] = urlencode(query)

    def refused(self, start_response, status: str, code: str) -> list[bytes]:
        start_response(status, [("Content-Type", "application/json")])
        return [json.dumps({"error": {"code": int(status[:3]), "message": code, "errors": [{"reason": code, "message": code}]}}).encode()]

    # --- what is asked ------------------------------------------------------------------------------------------------

    def answer(self, asked: Request) -> Answer:
        if asked.method == "PUT" and asked.query.get("upload_id"):
            return self.go_on(asked, self.sessions[asked.query["upload_id"]])
        if match := _REWRITE.fullmatch(asked.path):
            bucket, name, into, other = map(unquote, match.groups())
            content, done = self.found(bucket, name).content, "rewriteToken" in asked.query
            more = {"resource": self.write(into, other, content, asked.query)} if done else {"rewriteToken": "the second time"}
            size = str(len(content))
            return told({"done": done, "objectSize": size, "totalBytesRewritten": size if done else "0", **more})
        if match := _OBJECT.fullmatch(asked.path):
            return self.of_object(asked, *map(unquote, match.groups()))
        if match := _OBJECTS.fullmatch(asked.path):
            return self.listed(match[1], asked.query) if asked.method == "GET" else self.upload(asked, match[1])
        raise Refused("501 Not Implemented", f"{asked.method} {asked.path}")

    def of_object(self, asked: Request, bucket: str, name: str) -> Answer:
        found = self.found(bucket, name)
        if asked.query.get("generation", str(found.generation)) != str(found.generation):
            raise Refused("404 Not Found", f"No such object: {bucket}/{name}")
        if asked.method == "DELETE":
            self.require(bucket, name, asked.query)
            del self.buckets[bucket][name]
            return "204 No Content", [], b""
        if asked.query.get("alt") != "media":
            return told(resource(bucket, name, found))
        headers = [("Content-Type", "application/octet-stream"), ("X-Goog-Generation", str(found.generation)), hashed(found.content)]
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", asked.headers.get("RANGE", ""))
        if not match:
            return "200 OK", headers, found.content
        size, start = len(found.content), int(match[1])
        if start >= size:
            raise Refused("416 Range Not Satisfiable", "requestedRangeNotSatisfiable")
        part = found.content[start : int(match[2]) + 1 if match[2] else None]
        return "206 Partial Content", [*headers, ("Content-Range", f"bytes {start}-{start + len(part) - 1}/{size}")], part

    def listed(self, bucket: str, query: dict[str, str]) -> Answer:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        rows: dict[str, Stored | None] = {}
        for name, stored in self.held(bucket).items():
            if name.startswith(prefix):
                before, cut, _ = name[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
                rows |= {prefix + before + cut: None} if cut else {name: stored}
        names = sorted(name for name in rows if name > query.get("pageToken", ""))
        page = names[: min(int(query.get("maxResults", PAGE)), PAGE)]
        items = [resource(bucket, name, found) for name in page if (found := rows[name]) is not None]
        answer = {"kind": "storage#objects", "items": items, "prefixes": [name for name in page if rows[name] is None]}
        return told(answer | ({"nextPageToken": page[-1]} if len(page) < len(names) else {}))

    def upload(self, asked: Request, bucket: str) -> Answer:
        if asked.query["uploadType"] == "resumable":
            name, id = asked.query.get("name") or json.loads(asked.body)["name"], str(next(self._generations))
            self.require(bucket, name, asked.query)
            self.sessions[id] = Session(bucket, name, asked.query)
            return "200 OK", [("Location", f"http://{self.endpoint}{asked.path}?uploadType=resumable&upload_id={id}")], b""
        head = f"Content-Type: {asked.headers['CONTENT_TYPE']}\r\n\r\n".encode()
        message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + asked.body)
        about, _ = message.iter_parts()
        mark = b"\r\n--" + message.get_boundary().encode()
        content = asked.body.split(mark)[1].partition(b"\r\n\r\n")[2]
        return told(self.write(bucket, asked.query.get("name") or json.loads(about.get_content())["name"], content, asked.query))

    def go_on(self, asked: Request, session: Session) -> Answer:
        start, _, total = re.fullmatch(r"bytes (\d+|\*)(?:-(\d+))?/(\d+|\*)", asked.headers["CONTENT_RANGE"]).groups()
        if session.answer is not None:  # its last part comes again
            return told(session.answer)
        if start != "*":
            kept, self.short = asked.body[: len(asked.body) - self.short], 0
            assert int(start) <= len(session.content), "a gap"
            session.content[int(start) :] = kept
        if total == "*" or len(session.content) < int(total):
            headers = [("Range", f"bytes=0-{len(session.content) - 1}")] if session.content else []
            return "308 Resume Incomplete", headers, b""
        session.answer = self.write(session.bucket, session.name, bytes(session.content), session.query)
        return told(session.answer)

    # --- what is held -------------------------------------------------------------------------------------------------

    def held(self, bucket: str) -> dict[str, Stored]:
        if bucket not in self.buckets:
            raise Refused("404 Not Found", "The specified bucket does not exist.")
        return self.buckets[bucket]

    def found(self, bucket: str, name: str) -> Stored:
        if name not in self.held(bucket):
            raise Refused("404 Not Found", f"No such object: {bucket}/{name}")
        return self.buckets[bucket][name]

    def require(self, bucket: str, name: str, query: dict[str, str]) -> None:
        there, wanted = self.held(bucket).get(name), query.get("ifGenerationMatch")
        if wanted is not None and int(wanted) != (there.generation if there else 0):
            raise Refused("412 Precondition Failed", "At least one of the pre-conditions you specified did not hold.")

    def write(self, bucket: str, name: str, content: bytes, query: dict[str, str]) -> dict[str, Any]:
        self.require(bucket, name, query)
        self.buckets[bucket][name] = stored = Stored(content, next(self._generations), time.time())
        return resource(bucket, name, stored)

    def new_registry(self) -> str:
        """The URI of a registry in a new bucket."""
        bucket = f"bucket-{next(self._names)}"
        self.buckets[bucket] = {}
        return f"gs://{bucket}/mixtures?endpoint_override={self.endpoint}&scheme=http"

    def keys(self, uri: str) -> dict[str, int]:
        bucket, prefix = s3.place(uri)
        held = dict(self.buckets.get(bucket, {}))
        return {name.removeprefix(f"{prefix}/"): len(each.content) for name, each in held.items() if name.startswith(f"{prefix}/")}

    def put(self, uri: str, key: str, content: bytes) -> None:
        bucket, prefix = s3.place(uri)
        self.write(bucket, f"{prefix}/{key}", content, {})


def told(answer: dict[str, Any]) -> Answer:
    return "200 OK", [("Content-Type", "application/json; charset=UTF-8")], json.dumps(answer).encode()


def crc32c(content: bytes) -> str:
    import google_crc32c

    return base64.b64encode(google_crc32c.Checksum(content).digest()).decode()


def hashed(content: bytes) -> tuple[str, str]:
    return "X-Goog-Hash", f"crc32c={crc32c(content)}"


def resource(bucket: str, name: str, stored: Stored) -> dict[str, Any]:
    written = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(stored.written)) + f".{int(stored.written % 1 * 1000):03d}Z"
    return {
        "kind": "storage#object",
        "id": f"{bucket}/{name}/{stored.generation}",
        "name": name,
        "bucket": bucket,
        "generation": str(stored.generation),
        "metageneration": "1",
        "contentType": "application/octet-stream",
        "timeCreated": written,
        "updated": written,
        "size": str(len(stored.content)),
        "crc32c": crc32c(stored.content),
        "etag": str(stored.generation),
    }
