"""What several commands share: their common options, how a result is printed, and which device is meant."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from workers.contracts import InputError

set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the job, e.g. --set budgets.0.ratio=0.4"
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


def show(value: Any, as_json: bool, text: Callable[[], str]) -> None:
    click.echo(json.dumps(value, indent=1) if as_json else text())


def printable(text: str) -> str:
    """What strangers wrote into names and manifests cannot steer the terminal; lines stay."""
    return "".join(c if c == "\n" or c.isprintable() else "?" for c in text)


def device_here(wanted: str, key: str) -> str:
    """cpu or cuda for ``wanted`` (auto, cpu or cuda) on this machine. Raises: InputError, naming ``key``, if there is no such device."""
    from workers.session import local_device

    here = local_device()
    if wanted == "cuda" != here:
        raise InputError(f"{key} is cuda, but this machine has no usable GPU: set it to cpu")
    return here if wanted == "auto" else wanted


def run_folder(job: str, overrides: Sequence[str]) -> Path:
    """The folder of a run. ``job``: a job file or the folder itself. Raises: InputError if there is no run."""
    from orchestrator.config import load_job

    folder = Path(job).expanduser()
    if folder.is_dir() and not (folder / "run.json").is_file():
        raise InputError(f"{folder} is a folder, but no run folder (it has no run.json): give a job file or a run folder")
    if not folder.is_dir():
        folder = load_job(job, overrides).run_folder
    if not (folder / "run.json").is_file():
        raise InputError(f"no run in {folder}: start it with `diffpruning run`")
    return folder.resolve()
