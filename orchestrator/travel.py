"""What of a job travels to a cluster: one resolved job file, this package's code, and what is bundled with it. Data stays where it is.

FOLDER/job.yaml                    every key spelt out; needs no other job file
       orchestrator/, workers/     the code of this installation
       jobs/                       the bundled models and images that the job names, if any
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from orchestrator.config import JobConfig, load_job
from orchestrator.job_file import BUNDLED, PATH_KEYS, Beside, file_of, read_job
from orchestrator.place import is_uri
from workers.contracts import InputError

CODE = ("orchestrator", "workers")
LIMIT_BYTES = 500 * 10**6
"""Ray takes 512 MiB."""


@dataclass(frozen=True)
class Parcel:
    """What was packed, and for whom."""

    config: JobConfig
    run_folder: str
    """On the cluster."""
    files: int
    bytes: int


def pack(job: str, overrides: Sequence[str], folder: Path) -> Parcel:
    """Fill the empty ``folder``. Raises: InputError for a path that means nothing on another machine, and for too much to carry."""
    config, written = load_job(job, overrides), read_job(job, overrides)
    values = config.model_dump(mode="json")
    wrong = [_not_shared(f"{section}.path", values[section]["path"]) for section in ("storage", "registry")]
    scratch = values["storage"]["scratch"] or "/"
    if not scratch.startswith("/"):
        wrong.append(f"storage.scratch is {scratch}: on a cluster give an absolute path on the disk of every node")
    bundled = []
    for section, key in PATH_KEYS:
        path = values[section][key]
        inside = None if path is None else _bundled(path)
        if inside is not None:
            values[section][key] = f"./jobs/{inside}"
            bundled.append(file_of(inside))
        elif path is not None:
            wrong.append(_not_there(f"{section}.{key}", path, (written.get(section) or {}).get(key)))
    if any(wrong):
        raise InputError("; ".join(filter(None, wrong)))
    for name in bundled:
        _copy(BUNDLED / name, folder / "jobs" / name)
    for package in CODE:
        _copy(BUNDLED.parent / package, folder / package)
    (folder / "job.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    sizes = {path.relative_to(folder): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    if sum(sizes.values()) > LIMIT_BYTES:
        largest = max(sizes, key=lambda path: sizes[path])
        raise InputError(
            f"{sum(sizes.values()) / 1e6:.0f} MB would travel with the job, and Ray takes 512 MiB; the largest file is {largest} "
            f"({sizes[largest] / 1e6:.0f} MB): put it on the cluster's storage and give its path there"
        )
    where = config.place.uri or f"{values['storage']['path'].rstrip('/')}/{config.name}"
    return Parcel(config, where, len(sizes), sum(sizes.values()))


def _not_shared(key: str, path: str) -> str:
    """What is wrong with a place for results: all nodes have to mean the same by it. Whether they see it, the driver asks them."""
    if path.startswith("/") or is_uri(path):
        return ""
    example = f"--set {key}=/mnt/shared/{Path(path).name or 'runs'}"
    return f"{key} is {path}: a job on a cluster needs storage that every node sees, at an absolute path: {example}"


def _not_there(key: str, path: str, written: Any) -> str:
    """What is wrong with a path that is not bundled: it is the cluster's, so absolute, or the name of something to be downloaded there."""
    text = written.written if isinstance(written, Beside) else path
    hub = path.startswith("hf://") or (key == "model.path" and path.count("/") <= 1 and path[0] not in "./~")
    function = key == "evaluate.lpips" and ":" in path
    if not isinstance(written, Beside) and (path.startswith("/") or hub or function):
        return ""
    return (
        f"{key} is {text}: only code and bundled files travel with a job, so give its absolute path on the cluster's storage: "
        f"--set {key}=/mnt/shared/{Path(file_of(text)).name}"
    )


def _bundled(path: str) -> str | None:
    """Relative to the bundled jobs, if it is one of their files."""
    local = Path(path)
    return (
        local.relative_to(BUNDLED).as_posix()
        if local.is_absolute() and local.is_relative_to(BUNDLED) and Path(file_of(path)).exists()
        else None
    )


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", ".*"), dirs_exist_ok=True)
    else:
        shutil.copyfile(source, target)
