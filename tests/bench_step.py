"""Prints images/s of training steps on this machine: the dense denoiser alone, eager and compiled, and elastic steps as experts take them.

    PYTHONPATH=. python tests/bench_step.py [--model FOLDER] [--batches 64,128,256] [--variants plain,channels-last] [--processes 1,3] \\
        [--random-networks 2] [--widths 8] [--repeats 12] [--time-limit 540]

--model is a pipeline folder; without weights (the default, LDM-4) they are random. A variant is one of VARIANTS below or several joined by
"+". --processes: so many elastic trainers at once on one GPU, as fractions of a GPU allow. "GPU busy" is the part of the time in which
kernels ran. What the time limit leaves out is said. --tiny shrinks everything, to check the script on a CPU. Figures come last.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from workers import families, training
from workers.contracts import ElasticSettings, Interval, TrainSettings
from workers.cost import cost_table
from workers.diffusion import NoiseSchedule, draw_timesteps
from workers.elastic import ElasticDenoiser
from workers.regional import RegionCompiler
from workers.trainer import Batch, Trainer

LDM4 = Path(__file__).parents[1] / "jobs" / "ldm" / "lsun_beds"
VARIANTS = {
    "plain": "as the trainer does it",
    "eager": "without CUDA graphs",
    "channels-last": "NHWC weights and samples",
    "compile-teacher": "the teacher's blocks compiled",
    "micro-batch-2": "two half batches a step",
}


class Result(NamedTuple):
    name: str
    batch: int
    seconds: float
    spread: float
    networks: int
    peak: int
    busy: float | None

    def text(self) -> str:
        rate = self.batch / self.seconds
        busy = "" if self.busy is None else f"   GPU busy {self.busy:.0%}"
        return (
            f"{self.name:<42} batch {self.batch:<5}{1e3 * self.seconds:>8.1f} ms +-{self.spread:>4.0%}{rate:>9.1f} images/s"
            f"{rate * self.networks:>9.1f} per network   peak {self.peak / 2**30:.1f} GiB{busy}"
        )


class Bench:
    """One model, and random samples of its shape."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device, tiny = options, options.device, families.family("unet2d").tiny()
        self.config: dict[str, Any] = (
            dict(tiny.config) | {"_class_name": "UNet2DModel"} if options.tiny else families.load_config(options.model)
        )
        self.schedule = NoiseSchedule(families.load_scheduler_config(options.model))
        self.elastic = ElasticSettings(8, depth=True, importance="magnitude", most_widths=options.widths)
        self.started, self.cuda = time.monotonic(), options.device.startswith("cuda")

    def batch(self, size: int) -> Batch:
        side, gen = self.config["sample_size"], torch.Generator(self.device).manual_seed(0)
        shape = (size, self.config["in_channels"], side, side)
        clean, noise = (torch.randn(shape, generator=gen, device=self.device) for _ in range(2))
        return Batch(clean, draw_timesteps(Interval(0, 500), self.schedule.num_timesteps, size, 0.2, gen), noise, {})

    def model(self, channels_last: bool = False) -> Any:
        torch.manual_seed(0)
        with torch.device(self.device):
            model = families.build(self.config).eval()
        return nn.Module.to(model, memory_format=torch.channels_last) if channels_last else model

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def measure(self, name: str, size: int, networks: int, step: Callable[[int], Any]) -> Result:
        """``step(i)`` is called a few times: the first three times untimed, since they choose algorithms, compile and capture."""
        for i in range(3):
            step(i)
            self.wait()
        if time.monotonic() - self.started > self.options.time_limit:
            raise SystemExit(f"time is up at {name}")
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        times = []
        for i in range(3, 3 + self.options.repeats):
            started = time.perf_counter()
            step(i)
            if not self.options.stream:
                self.wait()
            times.append(time.perf_counter() - started)
        started = time.perf_counter()
        for i in range(3, 3 + self.options.repeats):
            step(i)
        self.wait()
        mean, spread = (time.perf_counter() - started) / self.options.repeats, statistics.pstdev(times) / statistics.mean(times)
        peak = torch.cuda.max_memory_allocated() if self.cuda else 0
        return Result(name, size, mean, spread, networks, peak, self.busy(step) if self.cuda and self.options.busy else None)

    def busy(self, step: Callable[[int], Any]) -> float:
        """Part of the time in which the GPU ran kernels, over a few steps, as the profiler sees them."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
            started = time.perf_counter()
            for i in range(3, 7):
                step(i)
            self.wait()
            seconds = time.perf_counter() - started
        return sum(event.device_time_total for event in seen.events()) / 1e6 / seconds

    def dense(self, size: int, compiled: bool, channels_last: bool) -> Result:
        """Forward, backward and AdamW of the dense denoiser alone."""
        model = self.model(channels_last)
        if compiled:
            RegionCompiler(self.options.compile_backend).compile(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=self.cuda)
        clean, timesteps, noise, _ = self.batch(size)
        if channels_last:
            clean, noise = (x.to(memory_format=torch.channels_last) for x in (clean, noise))

        def step(_: int) -> None:
            with torch.autocast(self.device, torch.bfloat16) if self.options.precision == "bf16" else nullcontext():
                predicted = model(self.schedule.noised(clean, noise, timesteps), timesteps).sample
            F.mse_loss(predicted.float(), self.schedule.target(clean, noise, timesteps)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        kind = " ".join(["dense alone,", "compiled" if compiled else "eager", *(["channels-last"] if channels_last else [])])
        return self.measure(kind, size, 1, step)

    def elastic_step(self, size: int, variant: str) -> Result:
        """Trainer.step, the trainer put together as ``training.fit`` does it."""
        chosen = set(variant.split("+"))
        settings = TrainSettings(1000, size, 1e-4, 0, 0.0, 0.9995, 1.0, self.options.precision, 1000, 0.2, 1.0, 0.5, 0.1)
        AcceleratorState._reset_state()
        accelerator = Accelerator(mixed_precision="no", cpu=not self.cuda)
        last = "channels-last" in chosen
        model = self.model(last)
        teacher = copy.deepcopy(model).requires_grad_(False)
        family = families.family_of_config(self.config)
        elastic = ElasticDenoiser(model, family.sites(model, self.elastic))
        if "compile-teacher" in chosen:
            RegionCompiler(self.options.compile_backend).compile(teacher)
        trainer = Trainer.of(accelerator, elastic, teacher, family.features(model), self.schedule, settings)
        networks, batch = self.networks(), self.batch(size)
        if last:
            batch = batch._replace(clean=batch.clean.to(memory_format=torch.channels_last))
        if self.cuda and "eager" not in chosen:
            trainer.capture(batch, networks.repeated, len(networks(0)))
        parts = next((int(name.rpartition("-")[2]) for name in chosen if name.startswith("micro-batch")), 1)

        def step(i: int) -> None:
            for clean, timesteps, noise in zip(*(part.chunk(parts) for part in batch[:3]), strict=True):
                trainer.accumulate(Batch(clean, timesteps, noise, {}), networks(i), parts)
            trainer.update(i)

        return self.measure(f"elastic, {variant}", size, len(networks(0)), step)

    def networks(self) -> training.Networks:
        costs = self.options.costs.split(",")
        table = cost_table(self.config, self.elastic)
        return training.sandwich(table, (float(costs[0]), float(costs[1])), self.options.random_networks, 0, self.options.pool)

    def macs(self) -> float:
        """What the networks of the timed steps cost in all, relative to dense, mean over the steps."""
        table = cost_table(self.config, self.elastic)
        networks = self.networks()
        steps = [sum(table.cost(spec or table.space.dense).macs for spec in networks(3 + i)) for i in range(self.options.repeats)]
        return statistics.mean(steps) / table.dense.macs


def together(options: argparse.Namespace, processes: int, size: int) -> list[str]:
    """So many elastic trainers at once: their rates, and the sum. Each starts to measure when it is ready, and measures for long."""
    command = [
        sys.executable,
        __file__,
        "--model",
        str(options.model),
        "--batches",
        str(size),
        "--variants",
        options.variants.split(",")[0],
    ]
    command += ["--widths", str(options.widths), "--random-networks", str(options.random_networks), "--repeats", str(4 * options.repeats)]
    command += ["--no-dense", "--no-busy", "--as-json", *(["--tiny"] if options.tiny else [])]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    rates = [json.loads(process.communicate()[0].splitlines()[-1])["rate"] for process in running]
    each = ", ".join(f"{rate:.0f}" for rate in rates)
    return [f"{processes} elastic trainers at once, batch {size}: {each}; together {sum(rates):.0f} images/s"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=LDM4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--batches", default="64")
    parser.add_argument("--processes", default="", help="how many trainers at once, several numbers joined by commas")
    parser.add_argument("--random-networks", type=int, default=2)
    parser.add_argument("--costs", default="0.2,1.0", help="the cheapest and the dearest sub-networks, as parts of dense's MACs")
    parser.add_argument("--pool", type=int, default=0, help="draw the random sub-networks from so many; 0: new ones in every step")
    parser.add_argument("--repeats", type=int, default=12, help="timed steps, each with other random networks")
    parser.add_argument("--precision", default="bf16", choices=["bf16", "no"])
    parser.add_argument("--compile-backend", default="inductor", help="aot_eager to check the script on a CPU")
    parser.add_argument("--widths", type=int, default=8, help="widths of a site at most")
    parser.add_argument("--variants", default="plain", help=", ".join(f"{name}: {what}" for name, what in VARIANTS.items()))
    parser.add_argument("--time-limit", type=float, default=540)
    parser.add_argument("--dense", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--busy", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--stream", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--as-json", action="store_true")
    options = parser.parse_args()
    if odd := set(options.variants.replace("+", ",").split(",")) - set(VARIANTS):
        raise SystemExit(f"--variants: {sorted(odd)[0]!r} is none of {', '.join(VARIANTS)}")
    bench, lines, results = Bench(options), [], []
    sizes = [int(size) for size in options.batches.split(",")]
    work: list[tuple[int, Callable[[], Result]]] = []
    for size in sizes:
        if options.dense:
            work += [(size, partial(bench.dense, size, compiled, last)) for compiled, last in ((False, False), (True, False), (True, True))]
        work += [(size, partial(bench.elastic_step, size, variant)) for variant in options.variants.split(",")]
    for _, measure in work:
        try:
            results.append(measure())
            print(f"{time.monotonic() - bench.started:4.0f} s  {results[-1].text()}", flush=True)
        except SystemExit as error:
            lines.append(f"{error}: give a longer --time-limit or fewer --variants")
            break
        except Exception as error:  # one variant that fails must not cost the others
            lines.append(f"{getattr(measure, 'args', '')} failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        gc.collect()
        if bench.cuda:
            torch.cuda.empty_cache()
    if options.as_json:
        print(json.dumps({"rate": results[0].batch / results[0].seconds}))
        return
    for processes in filter(None, options.processes.split(",")):
        lines += [line for size in sizes for line in together(options, int(processes), size)]
    print(f"\n{torch.cuda.get_device_name() if bench.cuda else 'cpu'}, torch {torch.__version__}, {options.precision}")
    print(f"the networks of an elastic step cost {bench.macs():.2f} of dense MACs in all; beside them the teacher, forward alone, 1.00 / 3")
    best = {size: min((r.seconds for r in results if r.batch == size and "compiled" in r.name), default=None) for size in sizes}
    for result in results:
        base = best[result.batch]
        ratio = (
            ""
            if base is None or "compiled" in result.name
            else f"   {result.networks * base / result.seconds:.2f} x dense compiled, per network"
        )
        print(result.text() + ratio)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
