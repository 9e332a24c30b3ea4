"""The `diffpruning profile` command: what does every choice of a job's denoiser cost in time on this machine, and how sure is that?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from orchestrator.cli_options import device_here, json_option, set_option, show
from orchestrator.words import DOUBTFUL_ERROR, kernels
from workers.contracts import InputError, Progress

if TYPE_CHECKING:
    from workers.latency_table import LatencyTable

TOP_SITES = 8


@click.command()
@click.argument("job")
@set_option
@click.option("--device", default="auto", type=click.Choice(["auto", "cpu", "cuda"]), help="What to measure; auto: cuda if there is one.")
@click.option("--batch", help="Images per forward pass, e.g. 1,8,64: a table each. Default: latency.batch of the job.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Default: latency.dtype of the job.")
@click.option("--compile/--no-compile", "compiled", default=None, help="With compiled blocks. Default: latency.compile of the job.")
@click.option("--cuda-graphs/--no-cuda-graphs", default=None, help="Replayed as CUDA graphs. Default: latency.cuda_graphs of the job.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the tables. Default: where the job's runs look for them.")
@json_option
def profile(
    job: str,
    overrides: tuple[str, ...],
    device: str,
    batch: str | None,
    dtype: str | None,
    compiled: bool | None,
    cuda_graphs: bool | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Measure the time of every site choice on this machine, and check the prediction on random whole sub-networks.

    A table that was measured before under the same circumstances is shown again; delete its file to have it measured anew.
    """
    from orchestrator.config import load_job

    config = load_job(job, overrides)
    batches = _batches(batch) if batch is not None else [config.latency.batch]
    device = device_here(device, "--device")
    here = {
        "resources": config.resources.model_copy(update={"device": device}),
        "latency": config.latency.model_copy(update={} if cuda_graphs is None else {"cuda_graphs": cuda_graphs}),
    }
    config = config.model_copy(update=here)
    timing = config.timing()
    timing = replace(timing, dtype=dtype or timing.dtype, compiled=timing.compiled if compiled is None else compiled)
    timing.check(device)
    from orchestrator import planning
    from workers import families, latency
    from workers.latency_table import table_path

    prepared = planning.prepare(config)
    if out is None:
        prepared.store.claim(planning.owner(prepared.job, prepared.pipeline.identity))
        out = prepared.store.folder / "cache"
    elif out.exists() and not out.is_dir():
        raise InputError(f"--out: {out} is a file; give a folder")
    found = []
    for size in batches:
        with prepared.store.followed():
            table = latency.find_or_measure(
                out,
                families.load_config(prepared.job.model.path),
                config.elastic_settings(),
                device,
                replace(timing, batch=size),
                on_progress=_say,
            )
        found.append(_summary(table, table_path(out, table.identity)))
        if table.validation.median_error > DOUBTFUL_ERROR:
            click.echo(
                f"warning: batch {size}: the prediction is {table.validation.median_error:.0%} off, as on a busy machine: "
                f"delete {found[-1]['table']} to measure again",
                err=True,
            )
    show(found, as_json, lambda: _text(found))


def _batches(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"--batch {text!r} is not a list of numbers of images, e.g. 1,8,64")
    return list(dict.fromkeys(map(int, parts)))


def _say(event: Progress) -> None:
    """A line on stderr for every tenth of the work."""
    if event.step * 10 // event.steps > (event.step - 1) * 10 // event.steps:
        click.echo(f"{event.stage} {event.unit}  step {event.step}/{event.steps}  {event.seconds:.0f} s", err=True)


def _summary(table: LatencyTable, path: Path) -> dict[str, Any]:
    by_choice = table.by_choice
    dense = {site: row[max(row)] for site, row in by_choice.items()}
    predicted = table.predict({site: max(row) for site, row in by_choice.items()})
    return {
        "identity": table.identity.to_json(),
        "dense_ms": table.dense_ms,
        "fastest_ms": table.predict(table.fastest),
        "validation": {
            "networks": table.validation.networks,
            "median_error": table.validation.median_error,
            "p95_error": table.validation.p95_error,
        },
        "shares": {"rest": table.rest_ms / predicted, **{site: ms / predicted for site, ms in dense.items()}},
        "table": str(path.resolve()),
    }


def _text(found: list[dict[str, Any]]) -> str:
    kind = found[0]["identity"]
    size, how = f"{kind['sample_size']} x {kind['sample_size']}", kernels(kind["compiled"], kind["cuda_graphs"], kind["fused_kernels"])
    lines = [
        f"{kind['device']}, {kind['dtype']}, samples of {size}, {how}, torch {kind['torch']}",
        "",
        f"{'batch':>5}{'dense ms':>12}{'fastest ms':>12}{'error, median':>15}{'95th pct.':>11}   table",
    ]
    for row in found:
        checked = row["validation"]
        lines.append(
            f"{row['identity']['batch']:>5}{row['dense_ms']:>12.3f}{row['fastest_ms']:>12.3f}"
            f"{checked['median_error']:>15.1%}{checked['p95_error']:>11.1%}   {row['table']}"
        )
    for row in found:
        top = sorted(((share, site) for site, share in row["shares"].items() if site != "rest"), reverse=True)[:TOP_SITES]
        lines += ["", f"share of the dense time, batch {row['identity']['batch']}"]
        lines += [f"{share:>7.1%}  {site}" for share, site in top]
        others = 1 - row["shares"]["rest"] - sum(share for share, _ in top)
        lines += [
            f"{others:>7.1%}  {len(row['shares']) - 1 - len(top)} other sites",
            f"{row['shares']['rest']:>7.1%}  what no choice changes",
        ]
    return "\n".join(lines)
