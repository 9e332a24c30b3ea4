"""A job file's keys as they are written: YAML, what it ``extends``, ``--set a.b=c``; paths made absolute. Nothing is checked here."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from workers.contracts import InputError

BUNDLED = Path(__file__).resolve().parent.parent / "jobs"
RUNS = Path("runs")
"""Where run folders are unless ``storage.path`` says otherwise."""
PATH_KEYS = (
    ("model", "path"),
    ("data", "path"),
    ("evaluate", "extractor_weights"),
    ("evaluate", "reference"),
    ("evaluate", "kid_reference"),
    ("evaluate", "lpips"),
)


class Beside(str):
    """A path that was ``written`` relative to its job file, or on the command line to the current folder, made absolute."""

    written: str

    @classmethod
    def of(cls, folder: Path, path: str) -> str:
        if Path(path).is_absolute():
            return str(Path(path).resolve())
        made = cls((folder / path).resolve())
        made.written = path
        return made


def find_job(job: str) -> Path:
    """The job file of a path, or of the name of a bundled job. Raises: InputError."""
    path = Path(os.path.expanduser(job))
    if os.path.isfile(path):
        return path.resolve()
    bundled = _bundled(job)
    if bundled is None:
        raise InputError(f"no such job file: {job[:300]}; bundled jobs: {_bundled_names()}")
    return bundled


def _bundled(job: str) -> Path | None:
    """The file of a bundled job by its name, with or without .yaml; None if there is none."""
    name = job.removesuffix(".yaml")
    file = BUNDLED / f"{name}.yaml"
    return file if name and Path(name).name == name and os.path.isfile(file) else None


def _bundled_names() -> str:
    return ", ".join(sorted(path.stem for path in BUNDLED.glob("*.yaml")))


def find_run(job: str) -> Path | None:
    """The run folder that the words name, by its path or, under the default ``storage.path``, its name; None if they name a job.

    Raises: InputError for another folder."""
    folder = Path(os.path.expanduser(job))
    if Path(job).name == job and not os.path.exists(folder) and _bundled(job) is None and os.path.isfile(RUNS / job / "run.json"):
        return RUNS / job
    if os.path.isfile(folder / "run.json"):
        return folder
    if os.path.isdir(folder) and _bundled(job) is None:
        raise InputError(f"{folder} is a folder, but no run folder (it has no run.json): give a job file or a run folder")
    return None


def read_job(job: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A job's keys as files and overrides say them, unchecked; paths that were relative are ``Beside``. Raises: InputError."""
    values = _read_layers(find_job(job), ())
    for override in overrides:
        _apply(values, override)
    return values


def _read_layers(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """A job file merged over the files that it extends."""
    if path in seen:
        raise InputError(f"{path}: extends itself through {' -> '.join(p.name for p in (*seen, path))}")
    try:
        values = _parse(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())[:500]}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: a job is a mapping of keys to values, not {type(values).__name__}")
    for section, key in PATH_KEYS:
        here = values.get(section)
        if not isinstance(here, dict) or not isinstance(here.get(key), str):
            continue
        if here[key].startswith(("./", "../")) or os.path.exists(path.parent / file_of(here[key])):  # else perhaps a name on the Hub
            here[key] = Beside.of(path.parent, here[key])
    base = values.pop("extends", None)
    if base is None:
        return values
    beside = path.parent / base if isinstance(base, str) else None
    if beside is None or not os.path.isfile(beside):
        beside = _bundled(base) if isinstance(base, str) else None
    if beside is None:
        told = _short(base) if isinstance(base, str) else reprlib.repr(base)
        raise InputError(f"{path.name}: extends: no such file: {told}; bundled jobs: {_bundled_names()}")
    return _merge(_read_layers(beside.resolve(), (*seen, path)), values)


def _parse(text: str) -> Any:
    """Raises: yaml.YAMLError, whatever is wrong."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except Exception as error:  # PyYAML hands on what Python says of a number or a date that is none
        raise yaml.YAMLError(f"a value is not what it seems: {error}") from None


def file_of(value: str) -> str:
    """Without the prefix that may follow a file of statistics."""
    return value.partition(".npz:")[0] + ".npz" if ".npz:" in value else value


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        merged[key] = _merge(merged[key], value) if isinstance(value, dict) and isinstance(merged.get(key), dict) else value
    return merged


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."


def _is_index(part: str, here: list[Any]) -> bool:
    return part.isdecimal() and len(part) < 10 and int(part) < len(here)


def _apply(values: dict[str, Any], override: str) -> None:
    """``a.b=c`` with c read as YAML; list items by number (``budgets.0.ratio=0.4``)."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise InputError(f"--set {_short(repr(override))} is not of the form key.subkey=value")
    told = _short(key)
    try:
        value = _parse(text)
    except yaml.YAMLError:
        raise InputError(f"--set {told}: {_short(repr(text))} is not a YAML value") from None
    *parents, last = key.strip().split(".")
    here: Any = values
    for i, part in enumerate(parents):
        if isinstance(here, list) and _is_index(part, here):
            here = here[int(part)]
        elif isinstance(here, dict):
            if here.get(part) is None:
                here[part] = {}
            here = here[part]
        else:
            raise InputError(f"--set {told}: {_short('.'.join(parents[:i]))} has no part {_short(repr(part))}")
    if isinstance(here, list) and _is_index(last, here):
        here[int(last)] = value
    elif isinstance(here, dict):
        paths = {f"{section}.{name}" for section, name in PATH_KEYS}
        if key.strip() in paths and isinstance(value, str) and os.path.exists(os.path.expanduser(file_of(value))):
            value = Beside.of(Path.cwd(), os.path.expanduser(value))
        here[last] = value
    else:
        raise InputError(f"--set {told}: {_short('.'.join(parents))} has no part {_short(repr(last))}")
