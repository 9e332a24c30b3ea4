"""What several commands share: their common options, how a result is printed, and which device is meant."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from workers.contracts import InputError

if TYPE_CHECKING:
    from orchestrator.store import RunStore

set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the job, e.g. --set budgets.0.ratio=0.4"
)


class Number(click.FloatRange):
    """A number of a range, which NaN and infinity are not."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        found = float(super().convert(value, param, ctx))
        if not math.isfinite(found):
            self.fail(f"{value} is not a finite number", param, ctx)
        return found


STAGE_NAMES = ("analyze", "partition", "specialize", "route", "finetune", "publish")


def run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Which of a job's stages: ``only``, ``until`` and ``redo``."""
    stage = click.Choice(STAGE_NAMES)
    for add in (
        click.option(
            "--redo",
            type=stage,
            multiple=True,
            help="Make a stage and all after it again; what was made is set aside, the cache is kept.",
        ),
        click.option("--until", type=stage, help="Run the stages up to this one, and this one."),
        click.option("--only", type=stage, help="Run one stage; those before it must be done."),
    ):
        command = add(command)
    return command


def check_stages(only: str | None, until: str | None) -> None:
    """Raises: InputError if both are given."""
    if only and until:
        raise InputError(f"--only {only} and --until {until} exclude each other: give one")


columns_option = click.option(
    "--all-columns", "more", is_flag=True, help="Also time per image, peak memory, LPIPS and trainer seconds, where they were measured."
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


def run_store(job: str, overrides: Sequence[str]) -> RunStore:
    """A run. ``job``: a job file, the run folder itself, or its URI on an object store. Raises: InputError if there is no run."""
    from orchestrator.config import load_job
    from orchestrator.job_file import find_run
    from orchestrator.place import Place, is_uri
    from orchestrator.store import RunStore

    if is_uri(job):
        store = RunStore.of(Place.of_run(job))
        if not (store.folder / "run.json").is_file():
            raise InputError(f"no run in {store.where()}: start it with `diffpruning run`")
        return store
    folder = find_run(job)
    store = RunStore(folder.resolve()) if folder else RunStore.of(load_job(job, overrides).place)
    if not (store.folder / "run.json").is_file():
        raise InputError(f"no run in {store.where()}: start it with `diffpruning run`")
    return store
