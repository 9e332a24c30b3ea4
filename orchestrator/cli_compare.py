"""The `diffpruning analyze` and `compare` commands: how alike timesteps are, where to cut, and whether two models agree on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from orchestrator.cli_driver import driver
from orchestrator.cli_options import json_option, run_store, set_option, show
from workers.contracts import InputError


@click.command()
@click.argument("job")
@set_option
@click.option("--inline", is_flag=True, help="Run everything in this process, one after the other, without Ray.")
@json_option
def analyze(job: str, overrides: tuple[str, ...], inline: bool, as_json: bool) -> None:
    """Compare a job's timesteps and cut them: the first two stages of `run`, which finds them done."""
    from orchestrator.config import load_job

    config = load_job(job, overrides)
    from orchestrator import planning

    prepared = planning.make_ready(config)
    with driver(prepared, inline) as (view, cluster):
        results = prepared.pipeline.run(prepared.job, cluster, view.say, on_stage=view.on_stage, until="partition")
        found = _analysis(prepared, results)
    show(found, as_json, lambda: _analysis_text(found))


def _analysis(prepared: Any, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the two stages found, as JSON; the picture is drawn beside the cuts."""
    from statistics import median

    from orchestrator import figures
    from workers.contracts import Partition, SimilarityMatrix
    from workers.files import replacing

    matrix, cut = SimilarityMatrix.from_json(results["analyze"]["similarity"]), results["partition"]
    chosen = Partition.from_json(cut["partition"])
    partitions = {"chosen": (chosen, cut["cost"])}
    partitions |= {name: (Partition.from_json(other["partition"]), other["cost"]) for name, other in cut["baselines"].items()}
    figure = prepared.store.stage_folder("partition", prepared.pipeline.fingerprints["partition"]) / "similarity.png"
    curve = {int(k): value for k, value in cut["curve"].items()}
    with replacing(figure) as path:
        path.write_bytes(figures.similarity(matrix, partitions, cut["boundary_frequency"], curve))
    return {
        "run_folder": prepared.store.where(),
        "measure": matrix.measure,
        "images": matrix.images,
        "timesteps": list(matrix.timesteps),
        "boundaries": list(chosen.boundaries),
        "boundary_frequency": cut["boundary_frequency"],
        "rule": cut.get("rule", "learned"),
        "cost": {name: cost for name, (_, cost) in partitions.items()},
        "reliability": {"median": median(matrix.reliability), "by_timestep": list(matrix.reliability)},
        "figure": prepared.store.where(figure),
    }


def _analysis_text(found: dict[str, Any]) -> str:
    reliability, costs = found["reliability"], found["cost"]
    lowest = min(zip(reliability["by_timestep"], found["timesteps"], strict=True))
    lines = [f"{found['measure']} similarity of {len(found['timesteps'])} timesteps, {found['images']} images"]
    returned = "returned" if found["rule"] == "learned" else f"is {found['rule']}; a learned one came there"
    lines += [
        f"  cut at t = {boundary:<6} {returned} in {frequency:.0%} of resamplings"
        for boundary, frequency in zip(found["boundaries"], found["boundary_frequency"], strict=True)
    ]
    lines += [
        f"cost         {', '.join(f'{name} {cost:.3f}' for name, cost in costs.items())} (one interval: 1)",
        f"reliability  median {reliability['median']:.2f}, lowest {lowest[0]:.2f} at t = {lowest[1]}",
        f"figure       {found['figure']}",
    ]
    return "\n".join(lines)


@click.command()
@click.argument("run_a", metavar="RUN_A")
@click.argument("run_b", metavar="RUN_B")
@click.option("--out", default="compare.html", show_default=True, type=click.Path(path_type=Path), help="HTML file to write.")
@json_option
def compare(run_a: str, run_b: str, out: Path, as_json: bool) -> None:
    """Do the timesteps of two models cluster alike? Each RUN is a job file or a run folder that is analyzed."""
    if not out.parent.is_dir():
        raise InputError(f"--out: no such folder: {out.parent}")
    if out.is_dir():
        raise InputError(f"--out: {out} is a folder; give the name of an HTML file")
    stores = [run_store(run, ()) for run in (run_a, run_b)]
    from orchestrator import compare as comparing

    found = comparing.compare(comparing.load(stores[0].folder), comparing.load(stores[1].folder))
    for store in stores:
        found = store.told(found)
    comparing.write_page(found, out)
    found["page"] = str(out.resolve())
    show(found, as_json, lambda: f"{comparing.text(found)}\n\npage  {found['page']}")
