"""Which optimiser, learning rate and batch bring a pruned expert's error down? One interval, cut uniformly from the pretrained weights.

    PYTHONPATH=. python tests/bench_optimizer.py MODEL IMAGES --interval 300,650 adamw:4e-4 muon:1e-3 muon:1e-3:8
                                                 [--images 2400] [--batch 16] [--ratio 0.5] [--widths 4] [--device cuda]

Every run gets as many images; OPTIMIZER:RATE[:BATCH[:FEATURE_WEIGHT]]. Prints the squared error against the dense model on held-out
images, in units of the dense model's own denoising error there, and images/s once it is under way.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from workers import checkpoint, data, families, routers, tasks
from workers.contracts import ArchitectureSpec, ElasticSettings, ExpertTask, ImageTask, Interval, Progress, TrainSettings
from workers.cost import CostTable, cost_table
from workers.diffusion import NoiseSchedule, generator
from workers.elastic import extract
from workers.routers.uniform import at_level
from workers.samples import open_samples
from workers.session import Session

HELD_OUT = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("runs", nargs="+", metavar="OPTIMIZER:RATE[:BATCH[:FEATURE_WEIGHT]]")
    parser.add_argument("--interval", default="300,650")
    parser.add_argument("--images", type=int, default=2400)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--widths", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(options, Path(folder))


def measure(options: argparse.Namespace, folder: Path) -> None:
    config = families.load_config(options.model)
    cache, interval = str(folder / "images.arrow"), Interval(*map(int, options.interval.split(",")))
    count = data.build_cache(ImageTask(options.data, config["in_channels"], config["sample_size"], False, "refuse", cache)).count
    train, held_out = data.split(count, HELD_OUT, 0)
    elastic = ElasticSettings(8, depth=True, importance="taylor", most_widths=options.widths)
    settings = settings_of(options.device, batch_size=options.batch, learning_rate=1e-3)
    task = ExpertTask("finetune", options.model, cache, tuple(train.tolist()), interval, elastic, settings, 0, 128, 0, False)
    table, source = cost_table(config, elastic), cut(task, folder / "cut", options.device)
    spec, held = uniform(table, options.ratio), calibration(options, cache, held_out.tolist(), interval)
    part = table.cost(spec).macs / table.dense.macs
    print(f"{part:.3f} of the MACs, t {interval.start} to {interval.stop}, {options.images} images a run")
    for number, run in enumerate(options.runs):
        name, rate, batch, feature_weight = [*run.split(":"), "", ""][:4]
        size = int(batch or options.batch)
        weight = float(feature_weight or settings.feature_weight)
        train_settings = dataclasses.replace(settings, optimizer=name, learning_rate=float(rate), batch_size=size, feature_weight=weight)
        told: list[tuple[float, int]] = []
        hear = functools.partial(_hear, told)
        small = dataclasses.replace(task, train=train_settings)
        network = tuned(small, source, spec, options.images // size, folder / str(number), options.device, hear)
        (since, first), (until, last) = told[1], told[-1]
        error = held.error(network)
        print(f"{run:<20} error {error:.4f}   {(last - first) * size / (until - since):.0f} images/s", flush=True)


def settings_of(device: str, **changes: Any) -> TrainSettings:
    """As job files have them by default; no steps yet."""
    settings = TrainSettings(
        steps=0,
        batch_size=16,
        learning_rate=1e-3,
        warmup_steps=0,
        weight_decay=0.0,
        ema_decay=0.98,
        max_grad_norm=1.0,
        mixed_precision="no" if device == "cpu" else "bf16",
        checkpoint_every=10**6,
        outside_fraction=0.2,
        output_weight=1.0,
        feature_weight=0.5,
        denoising_weight=0.1,
        relative_errors=True,
    )
    return dataclasses.replace(settings, **changes)


def uniform(table: CostTable, ratio: float) -> ArchitectureSpec:
    """The largest sub-network, alike everywhere, within a part of dense's MACs."""
    levels = (at_level(table.space, i / 200) for i in range(400, -1, -1))
    return next(spec for spec in levels if table.cost(spec).macs <= ratio * table.dense.macs)


def cut(task: ExpertTask, folder: Path, device: str) -> str:
    """The checkpoint of the pretrained denoiser with its channels in the order of their importance."""
    return tasks.train_expert(Session(str(folder), device), task).path


def tuned(
    task: ExpertTask,
    source: str,
    spec: ArchitectureSpec,
    steps: int,
    folder: Path,
    device: str,
    hear: Callable[[Progress], None] = lambda event: None,
) -> nn.Module:
    """A sub-network of a checkpoint after so many steps of the task's training, its average."""
    elastic = tasks.load_elastic(source, task.model, task)
    network = extract(elastic.model, elastic.branches, spec)
    if steps:
        train = dataclasses.replace(task.train, steps=steps, warmup_steps=min(10, steps // 5))
        small = dataclasses.replace(task, train=train, source=source, spec=spec)
        found = tasks.train_expert(Session(str(folder), device, on_progress=hear), small)
        network.load_state_dict(checkpoint.read(found.path, prefix="ema.")[0])
    return network.to(device)


def _hear(told: list[tuple[float, int]], event: Progress) -> None:
    told.append((time.monotonic(), event.step))


@torch.no_grad()
def calibration(options: argparse.Namespace, cache: str, rows: list[int], interval: Interval) -> routers.CalibrationBatch:
    schedule = NoiseSchedule(families.load_scheduler_config(options.model))
    clean = open_samples(cache).clean(rows, options.device)
    t = (interval.start + (torch.arange(len(rows), device=clean.device) + 0.5) * interval.length / len(rows)).long()
    noise = torch.randn(clean.shape, generator=generator(options.device, 0, "held out"), device=clean.device)
    noisy, teacher = schedule.noised(clean, noise, t), families.load_denoiser(options.model).to(options.device)
    return routers.CalibrationBatch(noisy, t, schedule.target(clean, noise, t), routers.predict(teacher, noisy, t, {}))


if __name__ == "__main__":
    main()
