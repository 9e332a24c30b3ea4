"""Where a run lives: in a folder, or on an object store with a folder of this machine that is its mirror."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from workers.contracts import InputError
from workers.objects import KINDS, ObjectStore

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Place:
    """``folder``: on this machine; ``uri``: of the run on the object store, or empty."""

    folder: Path
    uri: str = ""

    @classmethod
    def of(cls, storage: str, name: str, scratch: str | None = None) -> Place:
        """The place of the run ``name``. ``storage``: of all runs; ``scratch``: where mirrors of those on object stores lie.

        Raises: InputError, naming the key, for what is neither a path nor the URI of a known kind of store.
        """
        if not is_uri(storage):
            if scratch is not None:
                raise InputError(f"storage.scratch is {scratch}, but storage.path {storage} is a folder, which needs none: leave it out")
            return cls(Path(storage).expanduser().resolve() / name)
        if urlsplit(storage).scheme not in KINDS:
            raise InputError(f"storage.path {storage!r}: is not a local path, s3://bucket/prefix or gs://bucket/prefix")
        root = ObjectStore.of(storage, "storage.path")
        below = default_scratch() if scratch is None else Path(scratch).expanduser().resolve()
        run = ObjectStore(root.scheme, root.bucket, "/".join(filter(None, (root.prefix, name))), root.options)
        return cls(below / hashlib.sha256(root.uri("").encode()).hexdigest()[:16] / name, run.uri(""))

    @classmethod
    def of_run(cls, uri: str) -> Place:
        """The place of the run that a URI names: ``s3://bucket/runs/NAME`` or ``gs://...``. Raises: InputError."""
        path, mark, options = uri.partition("?")
        storage, _, name = path.rstrip("/").rpartition("/")
        if not _NAME.fullmatch(name) or storage.endswith("/"):
            raise InputError(f"{uri!r}: is not the URI of a run, s3://bucket/prefix/NAME or gs://bucket/prefix/NAME")
        return cls.of(storage + mark + options, name)


def is_uri(path: str) -> bool:
    return "://" in path


def default_scratch() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffpruning" / "scratch"
