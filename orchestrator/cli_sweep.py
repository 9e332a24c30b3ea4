"""The `diffpruning sweep` commands: other budgets, samplers, agents and seeds over the experts that a run has trained."""

from __future__ import annotations

import click

from orchestrator.cli_driver import driver
from orchestrator.cli_options import json_option, run_store, set_option, show


@click.group()
def sweep() -> None:
    """Many plans from one run's elastic experts: budgets x samplers x agents x seeds."""


@sweep.command()
@click.argument("job")
@set_option
@click.option("--budgets", metavar="RATIOS", help="Parts of the dense model's cost, e.g. 0.35,0.5,0.65. Default: those of the job.")
@click.option("--metric", type=click.Choice(["macs", "latency"]), help="What the budgets limit. Default: that of the job.")
@click.option("--agents", metavar="NAMES", help="Agents that search, e.g. greedy,era; uniform always does. Default: those of the job.")
@click.option("--seeds", metavar="NUMBERS", help="Seeds that each agent searches with, e.g. 0,1,2. Default: those of the job.")
@click.option("--samplers", metavar="NAMES", help="Samplers with their steps, e.g. ddim:50,ddim:20,dpmpp:20. Default: that of the job.")
@click.option(
    "--stop-early/--no-stop-early",
    default=True,
    help="Stop trials that fall behind others at the same budget and sampler (with Ray). A search that serves all budgets never is.",
)
@click.option("--inline", is_flag=True, help="Run everything in this process, one after the other, without Ray.")
@json_option
def run(
    job: str,
    overrides: tuple[str, ...],
    budgets: str | None,
    metric: str | None,
    agents: str | None,
    seeds: str | None,
    samplers: str | None,
    stop_early: bool,
    inline: bool,
    as_json: bool,
) -> None:
    """Search a plan for every combination; leaves a table and a figure in the run folder.

    Runs the job up to its elastic experts first, if it has none. The same command again continues what was interrupted, and does nothing
    once it is done.
    """
    from orchestrator.config import load_job

    config = load_job(job, overrides)
    from orchestrator import planning
    from orchestrator import sweep as sweeps

    axes = sweeps.axes_of(
        config, budgets=budgets, metric=metric, agents=agents, seeds=seeds, samplers=samplers, stop_early=stop_early and not inline
    )
    prepared = sweeps.with_sweep(planning.make_ready(config), axes)
    with driver(prepared, inline) as (view, cluster):
        prepared.pipeline.run(prepared.job, cluster, view.say, on_stage=view.on_stage, until="sweep")
    found = prepared.store.told(sweeps.read(prepared.store.folder, prepared.pipeline.fingerprints["sweep"][:8]))
    show(found, as_json, lambda: sweeps.text(found))


@sweep.command(name="show")
@click.argument("job")
@set_option
@click.option("--id", "name", help="Which sweep. Default: the newest.")
@json_option
def show_command(job: str, overrides: tuple[str, ...], name: str | None, as_json: bool) -> None:
    """A finished sweep's table. JOB is a job file or a run folder. Reads files only."""
    from orchestrator import sweep as sweeps

    store = run_store(job, overrides)
    found = store.told(sweeps.read(store.folder, name))
    show(found, as_json, lambda: sweeps.text(found))
