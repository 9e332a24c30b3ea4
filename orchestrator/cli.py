"""The `diffpruning` command. Results go to stdout (one JSON document with --json), everything else to stderr.

Exit codes: 0 ok, 1 failure, 2 usage or configuration, 3 budget unreachable, 4 verification mismatch, 130 interrupt.
Imports of torch, ray and diffusers stay inside the commands, so that --help is instant.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import click

from orchestrator import __version__
from orchestrator.capacity import check_here
from orchestrator.cli_compare import analyze, compare
from orchestrator.cli_convert import convert_ldm
from orchestrator.cli_driver import driver
from orchestrator.cli_evaluate import evaluate
from orchestrator.cli_export import export
from orchestrator.cli_jobs import jobs_group, submit
from orchestrator.cli_options import Number, check_stages, device_here, json_option, printable, run_options, set_option, show
from orchestrator.cli_profile import profile
from orchestrator.cli_registry import registry as registry_commands
from orchestrator.cli_registry import registry_option
from orchestrator.cli_results import results as results_command
from orchestrator.cli_sweep import sweep
from orchestrator.words import gigabytes, gmacs, hours
from workers.contracts import METRICS, InputError, RunFailed

EXIT_CODES = """
\b
Exit codes:
  0    ok
  1    a run failed; the message says how to go on
  2    usage or configuration
  3    a budget cannot be reached
  4    a published file is not what its manifest says
  130  interrupted; the same command continues
"""


class Command(click.Group):
    """Turns the project's errors into one line and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (InputError, RunFailed) as error:
            click.echo("error: " + printable(str(error)).replace("\n", " "), err=True)
            ctx.exit(error.exit_code)
        except (KeyboardInterrupt, click.Abort):
            click.echo("interrupted: the same command continues where this one stopped", err=True)
            _leave(130)
        except OSError as error:
            from orchestrator.store import storage_error

            told = storage_error(error)
            if told is None:
                raise
            click.echo(f"error: {told}", err=True)
            ctx.exit(1)


def _leave(code: int) -> None:
    """End at once: after an interrupt, threads that wait for a trainer must not hold the terminal. What this process has started ends too:
    a local Ray's workers would otherwise train on for seconds."""
    sys.stdout.flush()
    sys.stderr.flush()
    for pid in _descendants(os.getpid()):
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    os._exit(code)


def _descendants(pid: int) -> list[int]:
    """The processes below one, as Linux tells; elsewhere none."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            parent = stat.read_text(errors="replace").rpartition(")")[2].split()[1]
            children.setdefault(int(parent), []).append(int(stat.parent.name))
    below = [pid]
    for one in below:
        below += children.get(one, [])
    return below[1:]


@click.group(cls=Command, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Turn a pretrained diffusion model into a mixture of efficient experts, one per interval of timesteps.

    JOB is a job file, or the name of a bundled one (quickstart). Run the same command again to resume.
    """


main.add_command(convert_ldm)
main.add_command(profile)
main.add_command(evaluate)
main.add_command(sweep)
main.add_command(analyze)
main.add_command(compare)
main.add_command(results_command)
main.add_command(export)
main.add_command(submit)
main.add_command(jobs_group)
main.add_command(registry_commands)


@main.command()
@click.argument("job")
@set_option
@click.option("--simulate", "gpus", metavar="GPUS", help="How long it would take on so many GPUs: 8, or 1,2,6, or 1-1024 by doubling.")
@json_option
def plan(job: str, overrides: tuple[str, ...], gpus: str | None, as_json: bool) -> None:
    """Check a job and print its six stages: what is done, what each needs. Writes nothing."""
    from orchestrator.config import load_job

    config = load_job(job, overrides)
    from orchestrator import simulation

    counts = None if gpus is None else simulation.parse_counts(gpus)
    from orchestrator import planning

    prepared = planning.prepare(config)
    if counts is None:
        found = planning.describe(prepared)
        show(found, as_json, lambda: _plan_text(found))
        return
    cpu, asked = config.resources.device == "cpu", config.resources
    tflops = planning.TFLOPS["cpu"] * asked.cpus_per_worker if cpu else planning.TFLOPS["cuda"] * min(1, asked.gpus_per_worker)
    rows = simulation.simulate(prepared, counts, tflops, 1 if cpu else asked.gpus_per_worker)
    show(rows, as_json, lambda: simulation.text(rows, "workers" if cpu else "GPUs"))


def _plan_text(found: dict[str, Any]) -> str:
    gpu, model = found["device"] != "cpu", found["model"]
    budgets = ", ".join(f"{budget['ratio']:g} of dense {METRICS[budget['metric']]}" for budget in found["budgets"])
    timed = any(budget["metric"] == "latency" for budget in found["budgets"])
    counted = gmacs(model["macs"], model["macs_without_attention"])
    lines = [
        f"job        {found['job']}, run folder {found['run_folder']}",
        f"model      {model['path']}: {counted}, {model['params'] / 1e6:.2f}M parameters",
        f"data       {found['data']['path']}: {found['data']['images']} images",
        f"budgets    {budgets}",
        f"           the smallest possible is {model['smallest_ratio']:.3f} of dense MACs" + "; time is measured first" * timed,
        f"needs      up to {gigabytes(found['disk_bytes'])} of disk ({gigabytes(found['free_bytes'])} are free); "
        f"about {gigabytes(found['trainer_bytes'])} of memory per trainer",
        "",
        f"{'stage':<12}{'state':<9}{'work':<20}{'per worker':<18}{'estimate':<24}taken",
    ]
    for s in found["stages"]:
        worker = (
            f"{s['cpus_per_worker']:g} CPU" + (f", {s['gpus_per_worker']:g} GPU" if s["gpus_per_worker"] and gpu else "")
            if s["cpus_per_worker"]
            else "-"
        )
        gpu_text = f"{hours(s['gpu_hours'])} GPU-h" + (f" or {hours(s['cpu_core_hours'])} core-h" if found["device"] == "auto" else "")
        estimate = (gpu_text if gpu else f"{hours(s['cpu_core_hours'])} core-h") if s["cpu_core_hours"] >= 0.01 else "seconds"
        taken = "" if s["seconds_taken"] is None else f"{s['seconds_taken']:.0f} s"
        lines.append(f"{s['stage']:<12}{s['state']:<9}{s['work']:<20}{worker:<18}{estimate:<24}{taken}".rstrip())
    lines += [f"warning: {text}" for text in found["warnings"]]
    return "\n".join(lines)


@main.command()
@click.argument("job")
@set_option
@run_options
@click.option("--inline", is_flag=True, help="Run everything in this process, one after the other, without Ray.")
@json_option
def run(
    job: str, overrides: tuple[str, ...], only: str | None, until: str | None, redo: tuple[str, ...], inline: bool, as_json: bool
) -> None:
    """Run a job from similarity to registry. The same command again skips what is done and continues the rest."""
    from orchestrator.config import load_job

    check_stages(only, until)

    config = load_job(job, overrides)
    if not inline:
        # before anything large is read; what is done needs no GPU
        check_here(config, gpus=not (config.place.folder / "run.json").exists())
    from orchestrator import planning, report
    from orchestrator.registry import Registry
    from orchestrator.results import record

    prepared = planning.make_ready(config)
    selected = prepared.pipeline.select(only, prepared.pipeline.after(redo), until)  # refuses before anything is written
    if any(stage.name == "publish" for stage in selected):
        Registry(prepared.job.registry.path).files.require_writable()  # hours before it is needed
    with driver(prepared, inline) as (view, cluster):
        record(prepared.store.folder, job, overrides, config.model_dump(mode="json", exclude={"storage", "registry", "resources"}))
        results = prepared.pipeline.run(prepared.job, cluster, view.say, only, redo, view.on_stage, until)
        page = prepared.store.folder / "report.html"
        if "publish" in results and not report.is_current(prepared):
            page = report.build(prepared)
    published = results.get("publish", {}).get("published", {})
    where = prepared.store.where
    found = {"run_folder": where(), "report": where(page) if page.exists() else None, "published": published}
    show(found, as_json, lambda: _run_text(found))


@main.command()
@click.argument("job")
@set_option
@click.option("--inline", is_flag=True, help="Encode in this process, without Ray.")
@json_option
def encode(job: str, overrides: tuple[str, ...], inline: bool, as_json: bool) -> None:
    """Encode a latent-diffusion job's images into its latent cache. `run` does so by itself; an interrupted encode resumes."""
    from orchestrator.config import load_job

    config = load_job(job, overrides)
    from orchestrator import planning, stages

    prepared = planning.make_ready(config)
    plan = stages.encode_plan(prepared.job, prepared.store, prepared.pipeline.identity)  # refuses before anything is written
    with driver(prepared, inline) as (view, cluster):
        view.on_stage("encode", "already done" if plan.finished else "running", 0.0)
        started = time.monotonic()
        made = stages.encode_images(plan, cluster, view.say)
        if not plan.finished:
            view.on_stage("encode", "finished", time.monotonic() - started)
    made = prepared.store.told(made)
    show(made, as_json, lambda: f"{made['count']} images as latents in {made['path']}")


def _run_text(found: dict[str, Any]) -> str:
    lines = [f"{p['reference']:<16}{name:<14}{p['path']}" for name, p in found["published"].items()]
    if found["report"]:
        lines.append(f"{'report':<30}{found['report']}")
    return "\n".join(lines) or f"run folder {found['run_folder']}"


@main.command()
@click.argument("job")
@set_option
@click.option("--watch", is_flag=True, help="Until the run ends, and leave with its exit code. With --json one document per line.")
@json_option
def status(job: str, overrides: tuple[str, ...], watch: bool, as_json: bool) -> None:
    """Where a run stands: JOB is a job file, a run folder, or its s3:// or gs:// URI. Any machine that sees the storage will do."""
    from orchestrator import status as view

    if watch:
        click.get_current_context().exit(view.watch(job, overrides, view.teller(as_json)))
    found = view.read(job, overrides)
    show(found, as_json, lambda: view.text(found))


@main.command(name="report")
@click.argument("job")
@set_option
@json_option
def report_command(job: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Write the report of a finished job again, and print its path."""
    from orchestrator.config import load_job

    config = load_job(job, overrides)
    from orchestrator import planning, report

    prepared = planning.prepare(config)
    with prepared.store.followed():
        page = prepared.store.where(report.build(prepared))
    show({"report": page}, as_json, lambda: page)


@main.command()
@click.argument("model", metavar="MODEL[@alias|:version]")
@registry_option
@click.option("--steps", type=click.IntRange(1), help="Sampling steps; default: those the mixture was planned for.")
@click.option("--scheduler", help="ddpm, ddim, dpmpp, dpmpp-karras, unipc or euler; default: the planned one.")
@click.option("--class-label", type=click.IntRange(0), help="Class of all images, for a class-conditional model; default: each its own.")
@click.option("--guidance-scale", default=1.0, show_default=True, type=Number(0), help="Classifier-free guidance; 1 is none.")
@click.option("--eta", default=0.0, show_default=True, type=Number(0, 1), help="Noise that DDIM adds: 0 none, 1 as much as DDPM.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 1 << 62), help="Of the first image; the next has the next.")
@click.option("--count", default=16, show_default=True, type=click.IntRange(1, 4096), help="Images to draw.")
@click.option("--out", default="samples.png", show_default=True, type=click.Path(path_type=Path), help="PNG file: a grid of all images.")
@click.option("--device", default="auto", type=click.Choice(["auto", "cpu", "cuda"]), help="Where to compute; auto: cuda if there is one.")
@json_option
def sample(
    model: str,
    uri: str,
    steps: int | None,
    scheduler: str | None,
    class_label: int | None,
    guidance_scale: float,
    eta: float,
    seed: int,
    count: int,
    out: Path,
    device: str,
    as_json: bool,
) -> None:
    """Draw images from a published mixture."""
    from orchestrator import registry_pull
    from orchestrator.registry import Registry
    from orchestrator.store import storage_error

    books = Registry(uri)
    version = books.resolve(model)
    if not out.parent.is_dir():
        raise InputError(f"--out: no such folder: {out.parent}")
    if out.is_dir():
        raise InputError(f"--out: {out} is a folder; give the name of a PNG file")
    budget = version.manifest().plan.budget
    device = device_here(device, "--device")
    folder = registry_pull.local(books, version, registry_pull.cache_folder(), lambda line: click.echo(line, err=True))
    from workers.generate import write_sample_grid

    seeds = range(seed, seed + count)
    try:
        write_sample_grid(
            str(folder), scheduler or budget.scheduler, steps or budget.steps, seeds, out, device, class_label, guidance_scale, eta
        )
    except OSError as error:
        if error.filename != str(out) or storage_error(error) is not None:
            raise
        raise InputError(f"--out: cannot write {out}: {error.strerror or error}") from None
    show({"version": version.reference, "out": str(out.resolve())}, as_json, lambda: str(out))


@main.command()
def schema() -> None:
    """Print the JSON schema of a job file, for editors."""
    from orchestrator.config import job_schema

    click.echo(json.dumps(job_schema(), indent=1))
