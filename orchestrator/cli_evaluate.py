"""The `diffpruning evaluate` command: the table of a run's mixtures beside the dense model, measured under one protocol."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from orchestrator.cli_driver import driver
from orchestrator.cli_options import json_option, set_option, show
from orchestrator.words import measured_under, sig, timed_on
from workers.contracts import InputError

if TYPE_CHECKING:
    from orchestrator.evaluation import Row
    from orchestrator.pipeline import Context
    from orchestrator.planning import Prepared


@click.command()
@click.argument("job")
@set_option
@click.option("--only", multiple=True, metavar="LABEL", help="Rows to measure, e.g. macs-0.50 or 'dense ddim:25'; dense comes with them.")
@click.option("--version", "versions", multiple=True, metavar="MODEL[@alias|:version]", help="A published mixture as one more row.")
@click.option("--inline", is_flag=True, help="Run everything in this process, one after the other, without Ray.")
@json_option
def evaluate(job: str, overrides: tuple[str, ...], only: tuple[str, ...], versions: tuple[str, ...], inline: bool, as_json: bool) -> None:
    """Measure the dense model, also under the samplers of evaluate.dense, and the run's mixtures; print one table.

    What was measured before under the same protocol is not measured again. Before there are mixtures, the rows of the dense model.
    """
    from orchestrator.config import load_job

    config = load_job(job, overrides)
    from orchestrator import evaluation, planning, stages
    from orchestrator.results import TABLE
    from orchestrator.store import read_json, write_json

    prepared = planning.make_ready(config)
    ctx = _context(prepared)
    rows = _chosen(stages.rows(ctx, _published(prepared, versions)), only)  # refuses before anything is written
    with driver(prepared, inline) as (view, cluster):
        view.on_stage("evaluate", "running", 0.0)
        started = time.monotonic()
        metrics = evaluation.read_table(stages.evaluate(replace(ctx, cluster=cluster(), say=view.say), rows, "evaluate"))
        view.on_stage("evaluate", "finished", time.monotonic() - started)
        mixtures = ctx.fingerprints["finetune"]
        found = {"protocol": metrics[evaluation.DENSE]["protocol"], "mixtures": mixtures, "rows": metrics}
        table = prepared.store.folder / TABLE
        write_json(table, {**found, "rows": {**metrics, **_still_true(read_json(table) or {}, found)}})
    show(found, as_json, lambda: text(found))


def _still_true(before: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """The rows of the table ``before`` not asked for now that hold beside those that were: of one protocol, timing and mixtures."""
    dense, same = found["rows"]["dense"], before.get("mixtures") == found["mixtures"]
    return {
        label: row
        for label, row in before.get("rows", {}).items()
        if label not in found["rows"]
        and (same or label.startswith("dense "))
        and all(row.get(key) == dense.get(key) for key in ("protocol", "timing", "samples"))
    }


def _published(prepared: Prepared, versions: Sequence[str]) -> dict[str, Any]:
    """Label -> reference to a version whose files are whole. Raises: InputError if it is not of a model like the job's."""
    from orchestrator.registry import Registry
    from orchestrator.registry_pull import local
    from workers import families
    from workers.contracts import DenoiserRef

    registry, mine, found = Registry(prepared.job.registry.path), families.load_config(prepared.job.model.path), {}
    for name in versions:
        version = registry.resolve(name)
        if prepared.store.mirror is not None and not registry.is_local and os.environ.get("RAY_ADDRESS"):
            raise InputError(
                f"--version {name}: with storage.path on an object store, a cluster's other nodes would not see it: use --inline"
            )
        folder = local(registry, version, prepared.store.folder.parent / ".versions")  # where every worker sees it
        theirs = families.load_config(folder)
        for key in ("in_channels", "out_channels", "sample_size"):
            if theirs.get(key) != mine.get(key):
                raise InputError(
                    f"--version {version.reference}: its {key} is {theirs.get(key)}, that of the job's model {mine.get(key)}: "
                    "evaluate it in a job with the model that it was made from"
                )
        found[version.reference] = DenoiserRef(version.reference, version.manifest().plan, folder=str(folder))
    return found


def _context(prepared: Prepared) -> Context:
    """With the results of the stages that are done, and no cluster yet."""
    from orchestrator.pipeline import Context

    pipeline, store = prepared.pipeline, prepared.store
    records = {name: store.done(name, fingerprint) for name, fingerprint in pipeline.fingerprints.items()}
    results = {name: record["result"] for name, record in records.items() if record is not None}
    return Context(prepared.job, None, store, store.folder, "", results, pipeline.identity, click.echo, pipeline.fingerprints)


def _chosen(rows: dict[str, Row], only: Sequence[str]) -> dict[str, Row]:
    """The rows asked for, and dense. Raises: InputError."""
    if odd := [label for label in only if label not in rows]:
        raise InputError(f"--only {odd[0]!r} is no row of this job: known are {', '.join(rows)}")
    return {label: row for label, row in rows.items() if not only or label in only or label == "dense"}


def text(found: Mapping[str, Any]) -> str:
    """The table, one row per denoiser and sampler, and the protocol that holds for all of them."""
    rows = found["rows"]
    width = max(14, *(len(label) + 2 for label in rows))
    distances = any("frechet" in row for row in rows.values())
    head = f"{'':<{width}}{'sampler':<12}{'GMACs/step':>11}{'ms/step':>10}{'time':>8}{'MACs':>8}"
    lines = [head + (f"{'FD':>10}{'KID':>11}" if distances else "") + f"{'MSE to dense':>14}{'images/s':>10}"]
    dense = rows["dense"]
    elsewhere = [label for label, row in rows.items() if row.get("device") != dense.get("device")]
    for label, row in rows.items():
        sampler = f"{row['sampler']['scheduler']}:{row['sampler']['steps']}"
        macs = row["calls"] * row["gmacs_per_step"] / (dense["calls"] * dense["gmacs_per_step"])
        times = f"{'-':>10}{'-':>8}" if label in elsewhere else f"{row['ms_per_step']:>10.3g}{row['relative_time']:>8.1%}"
        cells = f"{sampler:<12}{row['gmacs_per_step']:>11.3f}{times}{macs:>8.1%}"
        if distances:
            cells += f"{_number(row.get('frechet')):>10}{_number(row.get('kid')):>11}"
        rate = "-" if label in elsewhere else _number(row["images_per_s"])
        lines.append(f"{label:<{width}}{cells}{_number(row['paired_mse']):>14}{rate:>10}")
    lines += ["", "time and MACs: of all steps, relative to dense under the job's sampler", timed_on(dense, elsewhere)]
    if (workers := max(row.get("drawn_at_once", 1) for row in rows.values())) > 1:
        lines.append(f"images/s: of one worker, while up to {workers} drew at once")
    return "\n".join([*lines, measured_under(found["protocol"])])


def _number(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else sig(value)
