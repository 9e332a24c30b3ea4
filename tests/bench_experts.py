"""Which expert of a published mixture costs quality, and what does epsilon scaling (arXiv 2308.15321) bring?

    PYTHONPATH=. python tests/bench_experts.py MODEL VERSION --weights RESNET56 --reference STATS.npz:test [--samples 5000] [--device cuda]
    ... --epsilon-scales 1,1.001,1.002 [--no-parts]

MODEL: the dense pipeline folder; VERSION: a folder of the registry, e.g. registry/cifar10/2. Prints the distance to the reference and to
dense's images of the same noise, in features of the extractor: for dense, the mixture and, unless --no-parts, every expert alone while
dense serves the rest. With noise that is divided by a scale other than 1: for the mixture with one expert scaled at a time instead.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import torch
from torch import nn

from workers import extractors, families, pretrained
from workers.contracts import ExtractorRef, SamplerRef
from workers.frechet import Statistics, frechet_distance, read_statistics
from workers.generate import SamplingDenoiser, Surroundings
from workers.mixture import MixtureDenoiser


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("version", type=Path)
    parser.add_argument("--extractor", default="resnet56")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--reference", required=True)
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=500)
    parser.add_argument("--sampler", default="ddim-unclipped")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--epsilon-scales", default="1", help="what predicted noise is divided by: several, with commas")
    parser.add_argument("--parts", action=argparse.BooleanOptionalAction, default=True, help="experts one at a time too")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    around, reference = Surroundings.load(options.model, options.device), read_statistics(options.reference)
    extractor = extractors.load(ExtractorRef(options.extractor, options.weights), options.device)
    config, started = families.load_config(options.model), time.monotonic()
    shape = (config["in_channels"], config["sample_size"], config["sample_size"])

    def statistics(model: nn.Module, scale: float = 1.0) -> Statistics:
        denoiser = SamplingDenoiser(copy.deepcopy(model), options.device, options.dtype, fused=True)
        sampler = SamplerRef(options.sampler, options.steps, 0.0, scale)
        drawn = around.draw(denoiser, sampler, range(options.samples), shape, options.batch)
        return Statistics.of(torch.cat([extractor(images).cpu() for images, _ in drawn]).numpy())

    dense = families.load_denoiser(options.model)
    of_dense = statistics(dense)
    mixture = pretrained.load(MixtureDenoiser, options.version)
    bounds = [0, *mixture.boundaries, mixture.num_timesteps]
    print(f"{'':<36}{'divided by':>12}{'distance':>10}{'to dense':>10}{'s':>7}")

    def tell(name: str, scale: float, found: Statistics) -> None:
        distances = frechet_distance(found, reference), frechet_distance(found, of_dense)
        print(f"{name:<36}{scale:>12g}{distances[0]:>10.3f}{distances[1]:>10.3f}{time.monotonic() - started:>7.0f}", flush=True)

    for scale in map(float, options.epsilon_scales.split(",")):
        tell("dense", scale, of_dense if scale == 1 else statistics(dense, scale))
        tell("the mixture", scale, statistics(mixture, scale))
        for k in range(len(mixture.experts)) if options.parts else ():
            one, name = copy.deepcopy(mixture), f"expert t {bounds[k]} to {bounds[k + 1]}"
            if scale == 1:
                one.experts = nn.ModuleList(expert if k == j else dense for j, expert in enumerate(one.experts))
            else:
                for parameter in one.experts[k].conv_out.parameters():
                    parameter.data /= scale
            tell(f"  {name} alone" if scale == 1 else f"  {name} alone scaled", scale, statistics(one))


if __name__ == "__main__":
    main()
