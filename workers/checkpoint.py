"""A training state on disk: one safetensors file and one JSON that describes it, written beside and renamed."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from workers import files
from workers.contracts import InputError
from workers.files import replacing, sync

SCHEMA = 1
STATE, ABOUT = "state.safetensors", "checkpoint.json"


def write(folder: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Write both files into an existing folder; the JSON last, so that a folder without it is not a checkpoint."""
    try:
        save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, folder / STATE)
    except SafetensorError as error:
        raise _disk_error(error, folder) from error
    sync(folder / STATE)
    with replacing(folder / ABOUT) as path:
        path.write_text(json.dumps({"schema": SCHEMA, **about}, indent=1))


def _disk_error(error: SafetensorError, folder: Path) -> Exception:
    """safetensors tells a full disk in words alone; whoever handles it looks for a number."""
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        if f"(os error {number})" in str(error):
            return OSError(number, os.strerror(number), str(folder))
    return error


def read(folder: str | Path, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors whose name starts with ``prefix`` (which is removed) and the description.

    Raises: InputError naming the folder if it is missing, truncated or of another schema.
    """
    about = describe(folder)
    try:
        state = load_file(Path(folder) / STATE)
    except (OSError, SafetensorError) as error:
        raise InputError(f"checkpoint {folder} cannot be read: {error}") from None
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}, about


def describe(folder: str | Path) -> dict[str, Any]:
    """The description alone, once it is seen that the tensors beside it are all there.

    Raises: InputError as ``read``.
    """
    folder = Path(folder)
    files.needed(folder / ABOUT, folder / STATE)
    try:
        about = json.loads((folder / ABOUT).read_text())
        if not isinstance(about, dict):
            raise InputError(f"checkpoint {folder} cannot be read: {ABOUT} is not a JSON object")
        if about.get("schema") != SCHEMA:
            raise InputError(f"checkpoint {folder} has schema {about.get('schema')}, this version reads {SCHEMA}")
        with safe_open(folder / STATE, "pt"):  # compares the sizes that the header tells with that of the file
            return about
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, SafetensorError) as error:
        raise InputError(f"checkpoint {folder} cannot be read: {error}") from None


def save_step(root: Path, step: int, write_into: Callable[[Path], None], keep: int = 2) -> Path:
    """Make what ``write_into(folder)`` writes the checkpoint ``root/step_0000120``, in one rename; delete all but the newest ``keep``.

    A readable checkpoint of that step stays as it is, for another process may have read it; a broken one is replaced.
    """
    # a name of its own: a process that was given up may write the same step a little longer
    folder, temporary = root / f"step_{step:07d}", root / f".step_{step:07d}.{secrets.token_hex(4)}.tmp"
    if not root.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        sync(root.parent)
    temporary.mkdir()
    try:
        write_into(temporary)
        if not is_whole(folder):
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(temporary, folder)
            sync(root)
            files.finished(folder, last=ABOUT)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in [other for other in _steps(root)[:-keep] if other != folder]:  # not this one, even if later, broken ones lie beside it
        files.remove(old, first=ABOUT)
    return folder


def is_whole(folder: Path) -> bool:
    try:
        describe(folder)
    except InputError:
        return False
    return True


def latest(root: Path, broken: list[str] | None = None) -> Path | None:
    """The newest readable checkpoint under ``root``; a broken one is passed over, and why is put into ``broken``."""
    files.refresh(root, "step_*")
    for folder in reversed(_steps(root)):
        try:
            describe(folder)
            return folder
        except InputError as error:
            if broken is not None:
                broken.append(str(error))
    return None


def sweep(root: Path) -> None:
    """Remove what killed processes have left of checkpoints that they were writing."""
    for temporary in root.glob(".step_*.tmp"):
        shutil.rmtree(temporary, ignore_errors=True)


def _steps(root: Path) -> list[Path]:
    return sorted(root.glob("step_*")) if root.is_dir() else []
