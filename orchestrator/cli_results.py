"""The `diffpruning results` command: one table and one figure over several runs."""

from __future__ import annotations

from pathlib import Path

import click

from orchestrator.cli_options import columns_option, json_option, run_store, show
from workers.contracts import InputError


@click.command()
@click.argument("runs", metavar="RUN [RUN ...]", nargs=-1, required=True)
@click.option("--group", is_flag=True, help="Runs that differ in their seed alone become one: mean and standard deviation.")
@click.option("--out", type=click.Path(path_type=Path), help="Markdown file to write the table to, with the commands that make its runs.")
@click.option("--figure", type=click.Path(path_type=Path), help="PNG file to write: quality against cost.")
@columns_option
@json_option
def results(runs: tuple[str, ...], group: bool, out: Path | None, figure: Path | None, more: bool, as_json: bool) -> None:
    """What several runs measured, in one table sorted by measured time. Each RUN is a job file, a run folder, or the name of one in runs.

    All must be of one model and measured under one protocol; the dense model then stands in the table once.
    """
    for option, path in (("--out", out), ("--figure", figure)):
        if path is not None and not path.parent.is_dir():
            raise InputError(f"{option}: no such folder: {path.parent}")
        if path is not None and path.is_dir():
            raise InputError(f"{option}: {path} is a folder; give the name of a file")
    stores = [run_store(run, ()) for run in runs]
    from orchestrator import results as table
    from workers.files import replacing

    found = table.collect([table.load(store.folder) for store in stores], group)
    for store in stores:
        found = store.told(found)
    if figure is not None:
        from orchestrator import figures_quality

        picture = figures_quality.pareto_of_runs(found)
        with replacing(figure) as path:
            path.write_bytes(picture)
    if out is not None:
        with replacing(out) as path:
            path.write_text(table.markdown(found, more))
    found |= {"out": out and str(out.resolve()), "figure": figure and str(figure.resolve())}
    show(found, as_json, lambda: table.text(found, more))
