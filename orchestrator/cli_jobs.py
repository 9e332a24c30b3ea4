"""`diffpruning submit` and `diffpruning jobs`: a job on somebody else's cluster, over the address of its dashboard."""

from __future__ import annotations

import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from orchestrator import __version__
from orchestrator.cli_options import check_stages, json_option, run_options, set_option, show
from workers.contracts import InputError

if TYPE_CHECKING:
    from orchestrator.ray_jobs import Job, Jobs

address_option = click.option(
    "--address",
    envvar="RAY_API_SERVER_ADDRESS",
    metavar="URL",
    help="The cluster's dashboard, e.g. http://HOST:8265; or RAY_API_SERVER_ADDRESS.",
)


@click.command()
@click.argument("job")
@set_option
@address_option
@run_options
@click.option("--detach", is_flag=True, help="Do not follow the log.")
@json_option
def submit(
    job: str,
    overrides: tuple[str, ...],
    address: str | None,
    only: str | None,
    until: str | None,
    redo: tuple[str, ...],
    detach: bool,
    as_json: bool,
) -> None:
    """Run a job on a Ray cluster. The code and bundled files travel, data and results stay on storage that every node sees.

    Follows the log and leaves with the job's exit code; a closed terminal or Ctrl-C ends the following, not the job.
    The same command again resumes.
    """
    from orchestrator import status as view
    from orchestrator import travel

    check_stages(only, until)
    words = [*(("--only", only) if only else ()), *(("--until", until) if until else ()), *(w for stage in redo for w in ("--redo", stage))]
    with tempfile.TemporaryDirectory(prefix="diffpruning-") as folder:
        parcel = travel.pack(job, overrides, Path(folder))
        jobs = _jobs(address)
        id = jobs.submit(
            parcel.config.name,
            shlex.join(["python", "-m", "orchestrator", "run", "job.yaml", *words]),
            Path(folder),
            {"run_folder": parcel.run_folder, "diffpruning": __version__},
        )
    view.submitted(parcel.config.place, id)
    click.echo(
        f"submitted {id} to {jobs.address}: {parcel.files} files, {parcel.bytes / 1e6:.1f} MB; results go to {parcel.run_folder}", err=True
    )
    if detach:
        found = asdict(jobs.get(id))
        show(found, as_json, lambda: f"diffpruning jobs logs {id} --follow")
        return
    _follow(jobs, id, as_json)


@click.group(name="jobs")
def jobs_group() -> None:
    """Jobs on a Ray cluster."""


@jobs_group.command(name="list")
@address_option
@json_option
def list_jobs(address: str | None, as_json: bool) -> None:
    """What was submitted, and how it ended."""
    found = _jobs(address).all()

    def text() -> str:
        head = f"{'job':<24}{'status':<11}{'exit':>5}  {'submitted':<18}{'took':>8}  run folder, or command"
        return "\n".join([head, *map(_row, found)]) if found else "no jobs"

    show([asdict(job) for job in found], as_json, text)


@jobs_group.command()
@click.argument("id", metavar="JOB_ID")
@address_option
@click.option("--follow", "-f", is_flag=True, help="Go on until the job is over, and leave with its exit code.")
@json_option
def logs(id: str, address: str | None, follow: bool, as_json: bool) -> None:
    """What a job has printed."""
    jobs = _jobs(address)
    if follow:
        _follow(jobs, id, as_json)
        return
    text = jobs.logs(id)
    show({"id": id, "logs": text}, as_json, lambda: text.rstrip("\n"))


@jobs_group.command()
@click.argument("id", metavar="JOB_ID")
@address_option
@json_option
def stop(id: str, address: str | None, as_json: bool) -> None:
    """Stop a job; submitted again, it goes on where it was."""
    jobs = _jobs(address)
    before = jobs.get(id)
    job = jobs.stop(id)
    show(asdict(job), as_json, lambda: f"{id} had ended before: {before.status}" if before.over else f"{id} {job.status.lower()}")


def _jobs(address: str | None) -> Jobs:
    if not address:
        raise InputError("which cluster? Give --address http://HOST:8265, that of its dashboard, or set RAY_API_SERVER_ADDRESS")
    from orchestrator.ray_jobs import Jobs

    return Jobs(address)


def _follow(jobs: Jobs, id: str, as_json: bool) -> None:
    """Print the log until the job is over; leave with its exit code. With --json, the log goes to stderr and the outcome to stdout."""
    try:
        job = jobs.follow(id, _writer(as_json))
    except KeyboardInterrupt:
        click.echo(f"\n{id} goes on; `diffpruning jobs logs {id} --follow` shows it, `diffpruning jobs stop {id}` ends it", err=True)
        click.get_current_context().exit(130)
    if job.exit_code:
        told = f": {job.message.splitlines()[0]}" if job.message and job.status == "FAILED" else ""
        click.echo(f"{id} {job.status.lower()}, exit code {job.exit_code}{told}", err=True)
    if as_json:
        show(asdict(job), True, str)
    click.get_current_context().exit(job.exit_code or 0)


def _writer(as_json: bool) -> Callable[[str], Any]:
    stream = sys.stderr if as_json else sys.stdout

    def write(text: str) -> None:
        stream.write(text)
        stream.flush()

    return write


def _row(job: Job) -> str:
    from orchestrator.progress import duration

    when = datetime.fromtimestamp(job.started).strftime("%Y-%m-%d %H:%M") if job.started else ""
    took = duration((job.ended or time.time()) - job.started) if job.started else ""
    code = "" if job.exit_code is None else str(job.exit_code)
    return f"{job.id:<24}{job.status.lower():<11}{code:>5}  {when:<18}{took:>8}  {job.run_folder or job.entrypoint}"
