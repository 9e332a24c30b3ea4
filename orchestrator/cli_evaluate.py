"""The `diffpruning evaluate` command: the table of a run's mixtures beside the dense model, measured under one protocol."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from orchestrator import tables
from orchestrator.cli_driver import driver
from orchestrator.cli_options import columns_option, json_option, set_option, show
from orchestrator.words import both, measured_under, optional, sampler, sig, timed_on
from workers.contracts import InputError

if TYPE_CHECKING:
    from orchestrator.evaluation import Row
    from orchestrator.pipeline import Context
    from orchestrator.planning import Prepared


@click.command()
@click.argument("job")
@set_option
@click.option(
    "--only",
    multiple=True,
    metavar="LABEL",
    help="Rows to measure, e.g. macs-0.50, 'macs-0.50 ddim:25' or 'dense ddim:25'; dense comes with them.",
)
@click.option("--version", "versions", multiple=True, metavar="MODEL[@alias|:version]", help="A published mixture as one more row.")
@click.option("--inline", is_flag=True, help="Run everything in this process, one after the other, without Ray.")
@columns_option
@json_option
def evaluate(
    job: str,
    overrides: tuple[str, ...],
    only: tuple[str, ...],
    versions: tuple[str, ...],
    inline: bool,
    more: bool,
    as_json: bool,
) -> None:
    """Measure the dense model and the run's mixtures, also under the samplers of evaluate.dense and evaluate.mixtures; print one table.

    What was measured before under the same protocol is not measured again. Before there are mixtures, the rows of the dense model.
    """
    from orchestrator.config import load_job

    config = load_job(job, overrides)
    from orchestrator import evaluation, planning, stages
    from orchestrator.results import TABLE, holding
    from orchestrator.store import read_object, write_json

    prepared = planning.make_ready(config)
    ctx = _context(prepared)
    rows = stages.rows(ctx, _published(prepared, versions))
    chosen = _chosen(rows, only)  # refuses before anything is written
    with driver(prepared, inline) as (view, cluster):
        view.on_stage("evaluate", "running", 0.0)
        started = time.monotonic()
        ctx = replace(ctx, cluster=cluster(), say=view.say)
        stages.evaluate(ctx, chosen, "evaluate")
        measured = {label: file for label, file in evaluation.files_of(ctx, rows, "evaluate").items() if file.exists()}
        metrics = evaluation.read_table(measured, rows)
        view.on_stage("evaluate", "finished", time.monotonic() - started)
        dense, mixtures, table = metrics[evaluation.DENSE], ctx.fingerprints["finetune"], prepared.store.folder / TABLE
        before = read_object(table) or {}
        kept = holding(before.get("rows", {}), dense, before.get("mixtures") == mixtures)  # also what this job no longer asks for
        found = {"protocol": dense["protocol"], "mixtures": mixtures, "rows": {label: metrics[label] for label in chosen}}
        write_json(table, {**found, "rows": {**metrics, **{label: row for label, row in kept.items() if label not in metrics}}})
    show(found, as_json, lambda: text(found, more))


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
        manifest = version.manifest()
        found[version.reference] = DenoiserRef(version.reference, manifest.plan, folder=str(folder), epsilon_scale=manifest.epsilon_scale)
    return found


def _context(prepared: Prepared) -> Context:
    """With the results of the stages that are done, and no cluster yet."""
    from orchestrator.pipeline import Context

    pipeline, store = prepared.pipeline, prepared.store
    records = {name: store.done(name, fingerprint) for name, fingerprint in pipeline.fingerprints.items()}
    results = {name: record["result"] for name, record in records.items() if record is not None}
    return Context(prepared.job, None, store, store.folder, "", results, pipeline.identity, click.echo, pipeline.fingerprints)


def _chosen(rows: dict[str, Row], only: Sequence[str]) -> dict[str, Row]:
    """The rows asked for, dense, and the same mixtures under their own sampler. Raises: InputError."""
    if odd := [label for label in only if label not in rows]:
        raise InputError(f"--only {odd[0]!r} is no row of this job: known are {', '.join(rows)}")
    needed = {"dense", *only, *(base for label in only if (base := rows[label].known_from))}
    return {label: row for label, row in rows.items() if not only or label in needed}


def text(found: Mapping[str, Any], more: bool = False) -> str:
    """The table, one row per denoiser and sampler, and the protocol that holds for all of them. ``more``: all columns."""
    rows, dense = found["rows"], found["rows"]["dense"]
    elsewhere = [label for label, row in rows.items() if row.get("device") != dense.get("device")]
    otherwise = [label for label, row in rows.items() if label not in elsewhere and row.get("drawn") != dense.get("drawn")]
    macs = dense["calls"] * dense["gmacs_per_step"]

    def column(key: str, form: Callable[[float], str] = sig, without: Sequence[str] = ()) -> list[str]:
        cells = {label: optional(row.get(key), form) for label, row in rows.items()}
        return ["-" if cell and label in without else cell for label, cell in cells.items()]

    columns = {
        "": [label + (f" (= {row['same_as']})" if row.get("same_as") else "") for label, row in rows.items()],
        "agent": [row.get("agent") or "" for row in rows.values()],
        "sampler": [sampler(row) for row in rows.values()],
        "GMACs/step": column("gmacs_per_step", "{:.3f}".format),
        "ms/step": column("ms_per_step", "{:.3g}".format, elsewhere),
        "time": column("relative_time", "{:.1%}".format, elsewhere),
        "MACs": [f"{row['calls'] * row['gmacs_per_step'] / macs:.1%}" for row in rows.values()],
        "FD": column("frechet"),
        "KID": column("kid"),
        "MSE to dense": column("paired_mse"),
        "images/s": column("images_per_s", sig, [*elsewhere, *otherwise]),
        "trained on": column("trained_images", "{:,}".format),
        "trainer s": column("trainer_seconds", "{:,.0f}".format),
    }
    if more:
        columns |= {
            "LPIPS to dense": column("paired_lpips"),
            "ms/image": column("ms_per_image", sig, [*elsewhere, *otherwise]),
            "peak MiB": column("peak_memory_mib", "{:,.0f}".format, elsewhere),
        }
    lines = tables.aligned(tables.filled(columns), ("", "agent", "sampler"))
    lines += ["", "time and MACs: of all steps, relative to dense under the job's sampler", timed_on(dense, elsewhere)]
    if any(row["sampler"].get("epsilon_scale", 1) != 1 for row in rows.values()):
        lines.append("sampler: its steps, and by what the predicted noise was divided")
    if (workers := max(row.get("drawn_at_once", 1) for row in rows.values())) > 1:
        lines.append(f"images/s: of one worker, while up to {workers} drew at once")
    if otherwise:
        lines.append(f"images/s of {both(otherwise)} are left out, as they were drawn in other batches than dense's")
    if any(columns["trainer s"]):
        lines.append("trained on: images drawn by all trainers of a mixture; trainer s: the time that they took; both with the elastic")
        lines.append("experts, which mixtures share")
    return "\n".join([*lines, measured_under(found["protocol"], rows.values())])
