"""Which expert of a published mixture costs quality? The Frechet distance with one expert at a time, the dense model serving the rest.

    PYTHONPATH=. python tests/bench_experts.py MODEL VERSION --weights RESNET56 --reference STATS.npz:test [--samples 5000] [--device cuda]

MODEL: the dense pipeline folder; VERSION: a folder of the registry, e.g. registry/cifar10/2. Prints, for dense, the mixture and every
expert alone, the distance to the reference and to dense's images of the same noise, in features of the extractor.
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
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    around, reference = Surroundings.load(options.model, options.device), read_statistics(options.reference)
    extractor = extractors.load(ExtractorRef(options.extractor, options.weights), options.device)
    config, started = families.load_config(options.model), time.monotonic()
    shape = (config["in_channels"], config["sample_size"], config["sample_size"])

    def statistics(model: nn.Module) -> Statistics:
        denoiser = SamplingDenoiser(copy.deepcopy(model), options.device, options.dtype, fused=True)
        sampler = SamplerRef(options.sampler, options.steps, 0.0)
        drawn = around.draw(denoiser, sampler, range(options.samples), shape, options.batch)
        return Statistics.of(torch.cat([extractor(images).cpu() for images, _ in drawn]).numpy())

    dense = families.load_denoiser(options.model)
    of_dense = statistics(dense)
    mixture = pretrained.load(MixtureDenoiser, options.version)
    own, bounds = list(mixture.experts), [0, *mixture.boundaries, mixture.num_timesteps]
    print(f"{'served by':<24}{'distance':>10}{'to dense':>10}{'s':>7}")
    print(f"{'dense':<24}{frechet_distance(of_dense, reference):>10.3f}{0:>10.3f}{time.monotonic() - started:>7.0f}", flush=True)
    for chosen in (range(len(own)), *([k] for k in range(len(own)))):
        mixture.experts = nn.ModuleList(own[k] if k in chosen else dense for k in range(len(own)))
        found = statistics(mixture)
        name = "the mixture" if len(chosen) == len(own) else f"expert t {bounds[chosen[0]]} to {bounds[chosen[0] + 1]}"
        distances = frechet_distance(found, reference), frechet_distance(found, of_dense)
        print(f"{name:<24}{distances[0]:>10.3f}{distances[1]:>10.3f}{time.monotonic() - started:>7.0f}", flush=True)


if __name__ == "__main__":
    main()
