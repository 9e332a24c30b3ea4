"""Prints whether the full-size LDM-4 (LSUN-Beds: 274M parameters) trains and goes through the pipeline on this machine.

    PYTHONPATH=. python tests/bench_ldm4.py step [--batch 64] [--random-networks 2] [--variants plain,tf32,...] [--time-limit 540]
    PYTHONPATH=. python tests/bench_ldm4.py pipeline FOLDER [--widths 3] [--time-limit 540]

``step``: elastic training steps as ``workers.training`` takes them, beside steps of the dense denoiser alone. A variant is one of
VARIANTS below or several joined by "+"; what the time limit leaves out is said. ``pipeline``: every stage at a few steps, in this process,
from images to samples of what was published; when the time is up, the same command continues. Random weights and images: the figures are
about time and memory, not about quality. --tiny shrinks everything, to check the script on a CPU. Figures come last.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from orchestrator import planning, report
from orchestrator.cluster import InlineCluster, Need, Task
from orchestrator.config import load_job
from workers import families, training
from workers.contracts import ArchitectureSpec, ElasticSettings, Interval, MixturePlan, Progress, TrainSettings
from workers.cost import cost_table
from workers.diffusion import NoiseSchedule, draw_timesteps
from workers.elastic import ElasticDenoiser
from workers.generate import write_sample_grid
from workers.regional import RegionCompiler, regions

LDM4 = Path(__file__).parents[1] / "jobs" / "ldm" / "lsun_beds"
TINY_STAGE = {
    "_class_name": "VQModel",
    "block_out_channels": [16, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "latent_channels": 3,
    "norm_num_groups": 4,
    "num_vq_embeddings": 64,
    "scaling_factor": 1.0,
}
VARIANTS = {
    "plain": "as the trainer does it",
    "tf32": "TF32 for what autocast leaves in float32",
    "cudnn-benchmark": "cuDNN tries its algorithms out",
    "channels-last": "NHWC weights and samples",
    "compile-teacher": "the teacher's blocks compiled",
    "bf16-teacher": "the teacher's weights in bfloat16, without autocast",
    "compile-students": "the dense and the narrowest network's blocks compiled; the random ones run eagerly",
    "micro-batch-2": "two half batches a step",
    "micro-batch-4": "four quarter batches a step",
}


class TimeIsUp(SystemExit):
    pass


class Clock:
    """Seconds since the start; raises once the limit is passed."""

    def __init__(self, limit_s: float) -> None:
        self.started, self.told, self.limit_s = time.monotonic(), 0.0, limit_s

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def check(self, doing: str) -> None:
        if self.seconds > self.limit_s:
            raise TimeIsUp(f"time is up after {self.seconds:.0f} s, while at {doing}")

    def progress(self, event: Progress) -> None:
        doing = f"{event.stage} {event.unit} {event.step}/{event.steps}"
        if self.seconds > self.told + 10:
            self.told = self.seconds
            print(f"{self.seconds:5.0f} s  {doing}", flush=True)
        self.check(doing)


def wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size else "-"


def reset_peak() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peaks() -> tuple[int, int]:
    """Bytes that tensors took at most, and bytes that were taken from the GPU."""
    return (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) if torch.cuda.is_available() else (0, 0)


# --- one training step ----------------------------------------------------------------------------------------------


class Result(NamedTuple):
    name: str
    seconds: float
    spread: float
    images: int
    networks: int
    peak: int
    reserved: int

    def text(self) -> str:
        rate = self.images / self.seconds
        return (
            f"{self.name:<44}{self.seconds:>9.3f} s +-{self.spread:>5.1%}{rate:>9.1f} images/s{rate * self.networks:>9.1f} network-images/s"
            f"   peak {gib(self.peak)} of {gib(self.reserved)} reserved"
        )


class CompiledStudents(ElasticDenoiser):
    """Compiles the blocks of the two networks that every step has."""

    def __init__(self, model: nn.Module, branches: Any, backend: str) -> None:
        super().__init__(model, branches)
        self.compiler, self.fixed = RegionCompiler(backend), {None, self.space.narrowest}
        self.forwards: dict[Any, list[Any]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> ElasticDenoiser:
        return ElasticDenoiser(copy.deepcopy(self.model, memo), self.branches)

    def forward(self, sample: Tensor, timestep: Any, spec: ArchitectureSpec | None = None, **kwargs: Any) -> Tensor:
        if spec not in self.fixed:
            return super().forward(sample, timestep, spec, **kwargs)
        blocks: list[Any] = list(regions(self.model))
        if spec in self.forwards:
            for block, forward in zip(blocks, self.forwards[spec], strict=True):
                block.forward = forward
        else:
            self.compiler.compile(self.model)
        try:
            return super().forward(sample, timestep, spec, **kwargs)
        finally:
            self.forwards[spec] = [block.forward for block in blocks]
            for block in blocks:
                del block.forward


class Bfloat16(nn.Module):
    """A denoiser in bfloat16 throughout, wherever it is called."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Module.to(inner, dtype=torch.bfloat16)

    def forward(self, sample: Tensor, timestep: Tensor, **told: Tensor) -> Any:
        with torch.autocast(sample.device.type, enabled=False):
            return self.inner(sample.bfloat16(), timestep, **told)


class Subject:
    """LDM-4, or its tiny stand-in, with one batch of random latents."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device, tiny = options, options.device, families.family("unet2d").tiny()
        self.config: dict[str, Any] = dict(tiny.config) | {"_class_name": "UNet2DModel"} if options.tiny else families.load_config(LDM4)
        self.schedule = NoiseSchedule(families.load_scheduler_config(LDM4))
        self.elastic = ElasticSettings(8, depth=True, importance="magnitude", most_widths=options.widths)
        size, gen = self.config["sample_size"], torch.Generator(self.device).manual_seed(0)
        shape = (options.batch, self.config["in_channels"], size, size)
        clean, noise = (torch.randn(shape, generator=gen, device=self.device) for _ in range(2))
        timesteps = draw_timesteps(Interval(0, 500), self.schedule.num_timesteps, options.batch, 0.2, gen)
        self.batch = training.Batch(clean, timesteps, noise, {})

    def model(self, channels_last: bool = False) -> Any:
        torch.manual_seed(0)
        with torch.device(self.device):
            model = families.build(self.config).eval()
        return nn.Module.to(model, memory_format=torch.channels_last) if channels_last else model

    def optimizer(self, model: nn.Module) -> Any:
        return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=self.device.startswith("cuda"))

    def measure(self, name: str, networks: int, step: Callable[[int], Any], clock: Clock) -> Result:
        """``step(i)`` is called a few times: the first two times untimed, since they choose algorithms and compile."""
        times = []
        for i in range(2 + self.options.repeats):
            if i == 2:
                reset_peak()
            wait(self.device)
            started = time.perf_counter()
            step(i)
            wait(self.device)
            times.append(time.perf_counter() - started)
            if i < 2:
                print(f"{clock.seconds:5.0f} s  {name}: step {i} took {times[-1]:.2f} s", flush=True)
            clock.check(name)
        timed = times[2:]
        return Result(
            name, statistics.mean(timed), statistics.pstdev(timed) / statistics.mean(timed), self.options.batch, networks, *peaks()
        )

    def dense(self, precision: str, clock: Clock) -> Result:
        """Forward, backward and AdamW of the dense denoiser alone, eagerly."""
        model = self.model()
        optimizer, (clean, timesteps, noise, _) = self.optimizer(model), self.batch

        def step(_: int) -> None:
            with torch.autocast(self.device, torch.bfloat16) if precision == "bf16" else nullcontext():
                predicted = model(self.schedule.noised(clean, noise, timesteps), timesteps).sample
            F.mse_loss(predicted.float(), self.schedule.target(clean, noise, timesteps)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        with tf32(precision == "tf32"):
            return self.measure(f"dense alone, eager, {precision}", 1, step, clock)

    def elastic_step(self, variant: str, clock: Clock) -> Result:
        """Trainer.step, the trainer put together as ``training.fit`` does it."""
        chosen = set(variant.split("+"))
        settings = TrainSettings(1000, self.options.batch, 1e-4, 0, 0.0, 0.9995, 1.0, self.options.precision, 1000, 0.2, 1.0, 0.5, 0.1)
        AcceleratorState._reset_state()
        accelerator = Accelerator(mixed_precision=settings.mixed_precision, cpu=self.device == "cpu")
        model, last = self.model("channels-last" in chosen), torch.channels_last
        teacher = copy.deepcopy(model).requires_grad_(False)
        branches = families.family_of_config(self.config).sites(model, self.elastic)
        elastic, backend = ElasticDenoiser(model, branches), self.options.compile_backend
        if "compile-students" in chosen:
            elastic = CompiledStudents(model, branches, backend)
        ema = AveragedModel(elastic, multi_avg_fn=training._ema_update(settings.ema_decay)).requires_grad_(False)
        names = families.family_of_config(self.config).features(model)
        hooks, taught = training.Features(model, names), training.Features(teacher, names)
        if "compile-teacher" in chosen:
            RegionCompiler(backend).compile(teacher)
        told: Any = Bfloat16(teacher) if "bf16-teacher" in chosen else teacher
        optimizer = accelerator.prepare(self.optimizer(elastic))
        trainer = training.Trainer(accelerator, elastic, told, optimizer, ema, self.schedule, hooks, taught, settings)
        networks, clean, noise = training.sandwich(elastic.space, self.options.random_networks, 0), self.batch.clean, self.batch.noise
        if "channels-last" in chosen:
            clean, noise = clean.to(memory_format=last), noise.to(memory_format=last)
        batch = self.batch._replace(clean=clean, noise=noise)
        parts = next((int(name.rpartition("-")[2]) for name in chosen if name.startswith("micro-batch")), 1)
        count = len(networks(0))

        def step(i: int) -> None:
            if parts == 1:
                trainer.step(i, batch, networks(i))
                return
            for clean, timesteps, noise in zip(*(part.chunk(parts) for part in batch[:3]), strict=True):
                trainer.accumulate(training.Batch(clean, timesteps, noise, {}), networks(i), parts)
            trainer.update(i)

        torch.backends.cudnn.benchmark = "cudnn-benchmark" in chosen
        try:
            with tf32("tf32" in chosen):
                return self.measure(f"elastic, {count} networks, {variant}", count, step, clock)
        finally:
            torch.backends.cudnn.benchmark = False

    def macs(self) -> float:
        """What the networks of the timed steps cost in all, relative to dense, mean over the steps."""
        table = cost_table(self.config, self.elastic)
        networks = training.sandwich(table.space, self.options.random_networks, 0)
        steps = [sum(table.cost(spec or table.space.dense).macs for spec in networks(2 + i)) for i in range(self.options.repeats)]
        return statistics.mean(steps) / table.dense.macs


class tf32:
    """Within the context, float32 matrix products and convolutions may use TF32, or not."""

    def __init__(self, allowed: bool) -> None:
        self.allowed = allowed

    def _set(self, allowed: bool) -> None:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed

    def __enter__(self) -> None:
        self.before = torch.backends.cudnn.allow_tf32
        self._set(self.allowed)

    def __exit__(self, *_: object) -> None:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, self.before


def step_command(options: argparse.Namespace) -> None:
    if odd := set(options.variants.replace("+", ",").split(",")) - set(VARIANTS):
        raise SystemExit(f"--variants: {sorted(odd)[0]!r} is none of {', '.join(VARIANTS)}")
    clock, subject = Clock(options.time_limit), Subject(options)
    work: list[tuple[str, Callable[[], Result]]] = [
        (precision, partial(subject.dense, precision, clock)) for precision in ("float32", "tf32", "bf16")
    ]
    work[1:1] = [(variant, partial(subject.elastic_step, variant, clock)) for variant in options.variants.split(",")]
    results: list[Result] = []
    notes = []
    for name, measure in work:
        try:
            results.append(measure())
            print(results[-1].text(), flush=True)
        except TimeIsUp as error:
            notes.append(f"{error}: give a longer --time-limit or fewer --variants")
            break
        except Exception as error:  # one variant that fails must not cost the others
            notes.append(f"{name} failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        reset_peak()
    print(f"\n{torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu'}, torch {torch.__version__}, batch {options.batch}")
    print(f"networks of a step cost {subject.macs():.2f} of dense MACs in all; beside them the teacher, forward alone, 1.00 / 3")
    dense = {result.name.rpartition(" ")[2]: result for result in results if result.name.startswith("dense")}
    for result in results:
        ratios = ", ".join(
            f"{base.seconds / result.seconds:.2f} ({result.networks * base.seconds / result.seconds:.2f}) x {precision}"
            for precision, base in dense.items()
        )
        print(result.text() + (f"\n    images/s (network-images/s) against dense alone: {ratios}" if result not in dense.values() else ""))
    print("\n".join(notes))


# --- the pipeline ---------------------------------------------------------------------------------------------------


class Watched(InlineCluster):
    """Keeps the time and the peak memory of every task in a file, so that a continued run shows all of them."""

    def __init__(self, need: Need, on_progress: Callable[[Progress], None], file: Path) -> None:
        super().__init__(need, on_progress)
        self.file, self.stage = file, ""
        self.seen: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []

    def timed(self, name: str, work: Callable[[], Any]) -> Any:
        reset_peak()
        started, done = time.perf_counter(), False
        try:
            result = work()
            done = True
            return result
        finally:
            wait(self.need.device)
            seconds, (peak, reserved) = time.perf_counter() - started, peaks()
            self.seen.append({"stage": self.stage, "task": name, "seconds": seconds, "peak": peak, "reserved": reserved, "done": done})
            self.file.write_text(json.dumps(self.seen))

    def _watched(self, task: Task) -> Task:
        return lambda session, item: self.timed(getattr(task, "__name__", str(task)), partial(task, session, item))

    def scatter(self, task: Task, items: Sequence[Any]) -> list[Any]:
        return super().scatter(self._watched(task), items)

    def fit_all(self, task: Task, jobs: Mapping[str, Any], storage: Path, on_done: Any) -> dict[str, Any]:
        return super().fit_all(self._watched(task), jobs, storage, on_done)

    def search(self, task: Task, axes: Mapping[str, Sequence[Any]], items: Mapping[str, Any], storage: Path) -> dict[str, Any]:
        plans = {}
        for key, item in items.items():
            plans[key] = self.timed(f"search_plan {key}", partial(task, self._session(), item))
        return plans

    def table(self) -> Iterator[str]:
        """Per stage and task: how many, seconds in all, the highest peak."""
        groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for seen in self.seen:
            groups.setdefault((seen["stage"], seen["task"]), []).append(seen)
        for (stage, task), rows in groups.items():
            peak, reserved, cut = max(r["peak"] for r in rows), max(r["reserved"] for r in rows), sum(not r["done"] for r in rows)
            yield (
                f"{stage:<12}{task:<34}{len(rows):>4} x{sum(r['seconds'] for r in rows):>9.1f} s   peak {gib(peak)} of {gib(reserved)}"
                + (f"   ({cut} cut off)" if cut else "")
            )


def sources(folder: Path, tiny: bool, count: int) -> tuple[Path, Path]:
    """(pipeline folder of configs alone, folder of random images)."""
    images, model = folder / "images", folder / "configs"
    if tiny and not model.exists():
        unet: Any = families.family("unet2d").tiny()
        parts = {"unet/config.json": {**unet.config, "_class_name": "UNet2DModel"}, "vqvae/config.json": TINY_STAGE}
        for name in ("model_index.json", "scheduler/scheduler_config.json"):
            parts[name] = json.loads((LDM4 / name).read_text())
        for name, part in parts.items():
            (model / name).parent.mkdir(parents=True, exist_ok=True)
            (model / name).write_text(json.dumps(part))
    images.mkdir(parents=True, exist_ok=True)
    size, rng = 32 if tiny else 256, np.random.default_rng(0)
    for i in range(count):
        coarse = rng.integers(0, 256, (8, 8, 3), np.uint8)
        if not (path := images / f"{i:04d}.png").exists():
            Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC).save(path)
    return (model if tiny else LDM4), images


def job_of(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    tiny, model_images = options.tiny, sources(folder, options.tiny, options.images)
    precision, batch = ("no", 4) if tiny else ("bf16", options.batch)
    train = {"steps": options.steps, "batch_size": batch, "mixed_precision": precision}
    return {
        "name": "tiny" if tiny else "ldm4",
        "storage": {"path": str(folder / "runs")},
        "registry": {"path": str(folder / "registry")},
        "model": {"path": str(model_images[0]), "random_init": True},
        "data": {"path": str(model_images[1]), "holdout": 16, "flip": True, "encode_math": "tf32"},
        "similarity": {"timesteps": 8, "images": 16, "batch_size": 8, "bootstrap": 10},
        "partition": {"experts": 2},
        "elastic": {"most_widths": options.widths},
        "specialize": {**train, "random_networks": 2, "importance_images": 16},
        "router": {"images": 16, "era_steps": 5, "era_batch": 8},
        "budgets": [{"metric": "latency", "ratio": 0.5}, {"metric": "macs", "ratio": 0.5}],
        "sampler": {"scheduler": "ddim", "steps": 10},
        "latency": {"batch": 2, "dtype": "float32"} if tiny else {"batch": options.batch, "dtype": "bfloat16", "compile": True},
        "finetune": {**train, "compare_uniform": False},
        "evaluate": {"images": 8, "samples": 8, "timesteps": 4, "batch_size": 8},
        "resources": {"device": options.device},
    }


def pipeline_command(options: argparse.Namespace) -> None:
    clock, folder = Clock(options.time_limit), options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump(job_of(folder, options)))
    cluster = Watched(Need(options.device, 1, float(options.device != "cpu")), clock.progress, folder / "tasks.json")
    cluster.stage = "prepare"
    prepared = cluster.timed("random weights, digests, plan", lambda: planning.make_ready(load_job(str(file))))
    seconds: dict[str, float] = {}

    def on_stage(name: str, state: str, taken: float) -> None:
        cluster.stage, seconds[name] = name, taken
        print(f"{clock.seconds:5.0f} s  {name} {state}", flush=True)

    results: dict[str, dict[str, Any]] = {}
    try:
        prepared.store.claim(planning.owner(prepared.job, prepared.pipeline.identity))
        with prepared.store.lock():
            results = prepared.pipeline.run(prepared.job, lambda: cluster, lambda text: print(text, flush=True), on_stage=on_stage)
        cluster.stage = "after"
        cluster.timed("report", partial(report.build, prepared))
        for budget, version in results["publish"]["published"].items():
            clock.check(f"sampling of {budget}")
            write = (version["path"], "ddim", 10, range(8), folder / f"{budget}.png", options.device)
            cluster.timed(f"load and sample {budget}", partial(write_sample_grid, *write))
    except TimeIsUp as error:
        print(f"{error}: the same command continues")
    print("\n" + "\n".join(cluster.table()))
    print("stages      " + ", ".join(f"{name} {taken:.0f} s" for name, taken in seconds.items()))
    disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"disk        {gib(disk)}, planned for at most {gib(prepared.disk_bytes)}")
    if "publish" in results:
        metrics = results["publish"]["metrics"]
        dense_ms = metrics["dense"]["ms_per_step"]
        for label, found in metrics.items():
            ms, memory = found["ms_per_step"], found.get("peak_memory_mib", 0) * 2**20
            print(f"{label:<24}{ms:>10.3f} ms/step  {ms / dense_ms:.3f} of dense, {found['gmacs_per_step']:.2f} GMACs, {gib(memory)}")
        for budget, chosen in results["route"]["chosen"].items():
            plan, measured = MixturePlan.from_json(chosen), metrics[budget]["ms_per_step"] / dense_ms
            print(f"{budget:<24}{plan.agent}: planned {plan.cost_ratio:.3f}, measured time {measured:.3f}, MACs {plan.macs_ratio:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="step | pipeline")
    step, pipeline = commands.add_parser("step"), commands.add_parser("pipeline")
    for command, run in ((step, step_command), (pipeline, pipeline_command)):
        command.set_defaults(run=run)
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        command.add_argument("--tiny", action="store_true")
        command.add_argument("--batch", type=int, default=64)
        command.add_argument("--time-limit", type=float, default=540)
    step.add_argument("--random-networks", type=int, default=2)
    step.add_argument("--repeats", type=int, default=6, help="timed steps, each with other random networks")
    step.add_argument("--precision", default="bf16", choices=["bf16", "no"])
    step.add_argument("--compile-backend", default="inductor", help="aot_eager to check the script on a CPU")
    step.add_argument("--widths", type=int, default=8, help="widths of a site at most")
    step.add_argument("--variants", default="plain", help=", ".join(f"{name}: {what}" for name, what in VARIANTS.items()))
    pipeline.add_argument("folder", type=Path)
    pipeline.add_argument("--steps", type=int, default=4, help="training steps of every expert")
    pipeline.add_argument("--images", type=int, default=96)
    pipeline.add_argument("--widths", type=int, default=3, help="widths of a site at most: fewer are measured sooner")
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
