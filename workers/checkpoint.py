"""A training state on disk: one safetensors file and one JSON that describes it, written beside and renamed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from workers.contracts import InputError
from workers.files import replacing

SCHEMA = 1
STATE, ABOUT = "state.safetensors", "checkpoint.json"


def write(folder: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Write both files into an existing folder; the JSON last, so that a folder without it is not a checkpoint."""
    save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, folder / STATE)
    with replacing(folder / ABOUT) as path:
        path.write_text(json.dumps({"schema": SCHEMA, **about}, indent=1))


def read(folder: str | Path, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors whose name starts with ``prefix`` (which is removed) and the description.

    Raises: InputError naming the folder if it is missing, truncated or of another schema.
    """
    folder = Path(folder)
    try:
        about = json.loads((folder / ABOUT).read_text())
        if not isinstance(about, dict):
            raise InputError(f"checkpoint {folder} cannot be read: {ABOUT} is not a JSON object")
        if about.get("schema") != SCHEMA:
            raise InputError(f"checkpoint {folder} has schema {about.get('schema')}, this version reads {SCHEMA}")
        state = load_file(folder / STATE)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, SafetensorError) as error:
        raise InputError(f"checkpoint {folder} cannot be read: {error}") from None
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}, about


def save_step(root: Path, step: int, write_into: Callable[[Path], None], keep: int = 2) -> Path:
    """Make what ``write_into(folder)`` writes the checkpoint ``root/step_0000120``, in one rename; delete all but the newest ``keep``."""
    folder, temporary = root / f"step_{step:07d}", root / f".step_{step:07d}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write_into(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    for old in [other for other in _steps(root)[:-keep] if other != folder]:  # not this one, even if later, broken ones lie beside it
        shutil.rmtree(old, ignore_errors=True)
    return folder


def latest(root: Path) -> Path | None:
    """The newest readable checkpoint under ``root``; a broken one is passed over."""
    for folder in reversed(_steps(root)):
        with contextlib.suppress(InputError):
            read(folder, prefix="no tensor, just check that it opens")
            return folder
    return None


def _steps(root: Path) -> list[Path]:
    return sorted(root.glob("step_*")) if root.is_dir() else []
