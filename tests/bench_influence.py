"""How far does an error of one interval move the samples? One interval at a time is served by a sub-network, fine-tuned or not.

    PYTHONPATH=. python tests/bench_influence.py MODEL IMAGES [--weights RESNET56] [--cuts 150,350,650]
                                                 [--ratio 0.9] [--finetune 40] [--samples 192] [--device cuda]

MODEL: a DDPM pipeline folder; IMAGES: as data.path. Prints per interval the squared error of the sub-network's output against dense's, how
far the samples move from dense's of the same noise, and the ratio of the two per timestep, relative to the cleanest interval, plain and as
a part of dense's error. Distances: Frechet as parts of the variance, in the spread over space of dense's own features, in the means of
those, and, with weights, in the features of a ResNet-56.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.bench_optimizer import calibration, cut, settings_of, tuned, uniform
from workers import conditioning, data, extractors, families
from workers.contracts import ArchitectureSpec, ElasticSettings, ExpertTask, ExtractorRef, ImageTask, Partition
from workers.cost import cost_table
from workers.diffusion import generator
from workers.elastic import ElasticDenoiser
from workers.influence import Probe, moved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("images")
    parser.add_argument("--weights")
    parser.add_argument("--cuts", default="150,350,650")
    parser.add_argument("--samples", type=int, default=192)
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--ratio", type=float, default=0.9, help="of dense's MACs, of the sub-networks")
    parser.add_argument("--widths", type=int, default=4, help="of a branch at most; 1: whole or gone")
    parser.add_argument("--finetune", type=int, default=0, help="steps of 8 images")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(options, Path(folder))


def measure(options: argparse.Namespace, folder: Path) -> None:
    config, scheduler = families.load_config(options.model), families.load_scheduler_config(options.model)
    cache = str(folder / "images.arrow")
    count = data.build_cache(ImageTask(options.images, config["in_channels"], config["sample_size"], False, "refuse", cache)).count
    train, held_out = data.split(count, 256, 0)
    shape = (config["in_channels"], config["sample_size"], config["sample_size"])
    dense = families.load_denoiser(options.model).to(options.device)
    partition = Partition.from_boundaries([int(cut) for cut in options.cuts.split(",")], scheduler["num_train_timesteps"])
    noise = torch.stack([torch.randn(shape, generator=generator("cpu", "bench", i)) for i in range(options.samples)])
    probe = Probe(
        dense=dense,
        levels=families.family_of_config(config).features(dense),
        conditioner=conditioning.load(options.model, options.device),
        config=scheduler,
        partition=partition,
        sampler="ddim-unclipped",
        steps=options.steps,
        guidance_scale=1.0,
        noise=noise.to(options.device),
        labels=None,
        batch=options.batch,
    )
    drawn, elastic = probe.draw_dense(), ElasticSettings(8, depth=True, importance="taylor", most_widths=options.widths)
    table = cost_table(config, elastic)
    spec = uniform(table, options.ratio)
    views = {"spread": lambda x: whole(probe, x), "means": lambda x: whole(probe, x, lambda features: features.mean((2, 3)))}
    if options.weights:
        resnet = extractors.load(ExtractorRef("resnet56", options.weights), options.device)
        views["ResNet-56"] = lambda x: [resnet(x).cpu().numpy()]
    seen = {name: view(torch.as_tensor(drawn["samples"], device=options.device)) for name, view in views.items()}
    print(f"{table.cost(spec).macs / table.dense.macs:.3f} of the MACs, {options.finetune} steps of fine-tuning")
    print(f"{'interval':<12}{'error':>10}{'of dense':>10}" + "".join(f"{name:>12}{'plain':>9}{'relative':>10}" for name in views))
    first: list[tuple[float, float]] = []
    for k, interval in enumerate(partition.intervals):
        settings = settings_of(options.device, batch_size=8, learning_rate=1e-3)
        task = ExpertTask("finetune", options.model, cache, tuple(train.tolist()), interval, elastic, settings, 0, 64, 0, False)
        source = cut(task, folder / f"cut{k}", options.device)
        small = tuned(task, source, spec, options.finetune, folder / str(k), options.device).eval()
        batch = calibration(options, cache, held_out.tolist(), interval)
        with torch.no_grad():
            error = float(F.mse_loss(ElasticDenoiser(small, ())(batch.noisy, batch.timesteps, ArchitectureSpec({})), batch.taught))
        of_dense, samples = float(F.mse_loss(batch.taught, batch.target)), probe.draw({k: small}, drawn)
        assert samples is not None, f"no step falls into {interval.name}: raise --steps"
        told = []
        for i, (name, view) in enumerate(views.items()):
            distance = moved(view(samples), seen[name])
            plain = distance / error / interval.length
            first += [(plain, plain * of_dense)] if k == 0 else []
            told.append(f"{distance:>12.4f}{plain / first[i][0]:>9.3g}{plain * of_dense / first[i][1]:>10.3g}")
        print(f"{interval.name:<12}{error:>10.2g}{of_dense:>10.2g}" + "".join(told), flush=True)


def whole(probe: Probe, samples: Tensor, summary: Callable[[Tensor], Tensor] | None = None) -> list[np.ndarray]:
    """What the probe sees of all samples."""
    parts = [probe.view(samples[rows], rows, summary) for rows in probe.chunks()]
    return [torch.cat(level).cpu().numpy() for level in zip(*parts, strict=True)]


if __name__ == "__main__":
    main()
