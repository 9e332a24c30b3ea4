"""Prints how well a latency table predicts whole sub-networks of a latent-diffusion model on this machine.

    PYTHONPATH=. python tests/bench_latency.py [--config ldm4] [--batch 64] [--dtype bfloat16] [--no-compile] [--cuda-graphs] \\
        [--rewrites] [--ratio 0.5] [--unit group] [--widths 3] [--visits 7] [--time-limit 480] [--out table.json] [--raw observations.json]

Random weights. With --ratio, mixtures of two experts are then planned by the table, from random sensitivities, and measured beside dense.
--widths limits the widths of a site, spread evenly over the legal ones: fewer are compiled sooner. Figures come last.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from workers import families, latency
from workers.contracts import METRICS, REWRITES, ArchitectureSpec, ElasticSettings, Timing
from workers.cost import CostTable, cost_table
from workers.elastic import search_space
from workers.graphs import Graphs
from workers.regional import RegionCompiler
from workers.routers import RouteProblem, Specs, greedy

ROOT = Path(__file__).parents[1]
LDM: dict[str, Any] = {"layers_per_block": 2, "flip_sin_to_cos": True, "freq_shift": 0, "norm_eps": 1e-5, "downsample_padding": 1}
CONFIGS: dict[str, dict[str, Any]] = {
    "ldm4": {
        **LDM,
        "_class_name": "UNet2DModel",
        "sample_size": 64,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": [224, 448, 672, 896],
        "attention_head_dim": 32,
        "down_block_types": ["DownBlock2D", *["AttnDownBlock2D"] * 3],
        "up_block_types": [*["AttnUpBlock2D"] * 3, "UpBlock2D"],
    },
    "church": {
        **LDM,
        "_class_name": "UNet2DModelWithHeads",
        "sample_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [192, 384, 384, 768, 768],
        "num_attention_heads": 8,
        "attn_norm_num_groups": 32,
        "down_block_types": [*["AttnDownBlock2D"] * 4, "ResnetDownsampleBlock2D"],
        "up_block_types": ["ResnetUpsampleBlock2D", *["AttnUpBlock2D"] * 4],
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
    },
    "cin256": {
        **LDM,
        "_class_name": "UNet2DConditionModel",
        "sample_size": 64,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": [192, 384, 576, 960],
        "attention_head_dim": 1,
        "cross_attention_dim": 512,
        "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 3],
        "up_block_types": [*["CrossAttnUpBlock2D"] * 3, "UpBlock2D"],
    },
}


def config_of(name: str) -> dict[str, Any]:
    if name == "emoji":
        return families.load_config(ROOT / "jobs" / "quickstart" / "ddpm-emoji32")
    if name == "tiny":
        tiny: Any = families.family("unet2d").tiny()
        return {**tiny.config, "_class_name": "UNet2DModel"}
    return CONFIGS[name]


def plan(table: CostTable, ratio: float, metric: str, seed: int) -> Specs:
    """Two experts, equal shares, that would be best if every choice of every site hurt by a random amount that grows as it shrinks."""
    rng = random.Random(seed)
    hurts = []
    for _ in range(2):
        weight = {site.name: rng.lognormvariate(0, 1) for site in table.space.sites}
        rises = {
            s.name: {c: weight[s.name] * (1 - i / (len(s.choices) - 1)) ** 2 for i, c in enumerate(s.choices)} for s in table.space.sites
        }
        hurts.append(rises)
    nobody: Any = (None, None)
    problem = RouteProblem(nobody, table, (0.5, 0.5), ratio, (), (), hurts, metric)
    return greedy.fit_budget(problem, (table.space.dense, table.space.dense))


class Progress:
    """A line every ten seconds; ends the bench when the time is up, saying how far it came."""

    def __init__(self, limit_s: float) -> None:
        self.started, self.told, self.limit_s = time.monotonic(), 0.0, limit_s
        self.seconds: list[float] = []

    def __call__(self, step: int, steps: int) -> None:
        self.seconds.append(time.monotonic() - self.started)
        if self.seconds[-1] > self.limit_s:
            raise SystemExit(f"time is up at step {step} of {steps}: give a longer --time-limit, fewer --widths or fewer --visits")
        if self.seconds[-1] > self.told + 10 or step == steps:
            self.told = self.seconds[-1]
            print(f"step {step}/{steps}  {self.told:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="ldm4", choices=[*CONFIGS, "emoji", "tiny"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--cuda-graphs", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--rewrites", action=argparse.BooleanOptionalAction, default=False, help="give every network all exact rewrites")
    parser.add_argument("--ratio", type=float, help="a budget of which mixtures are planned and measured")
    parser.add_argument("--unit", default="group", choices=["group", "channel_per_group"])
    parser.add_argument("--widths", type=int, default=3)
    parser.add_argument("--width-multiple", type=int, default=8)
    parser.add_argument("--fused-kernels", action="store_true", help="norms and biases by workers.fused; with --no-compile")
    parser.add_argument("--visits", type=int, default=7)
    parser.add_argument("--time-limit", type=float, default=480)
    parser.add_argument("--out", type=Path, help="where to save the table")
    parser.add_argument("--raw", type=Path, help="where to save every measured time, as JSON")
    options = parser.parse_args()
    if options.cuda_graphs and not options.device.startswith("cuda"):
        parser.error(f"--cuda-graphs: the device is {options.device}")

    config = config_of(options.config)
    settings = ElasticSettings(
        width_multiple=options.width_multiple, depth=True, importance="taylor", unit=options.unit, most_widths=options.widths
    )
    rewrites = REWRITES if options.rewrites else ()
    timing = Timing(options.batch, options.dtype, options.compile, tuple(rewrites), options.cuda_graphs, options.fused_kernels)
    identity = latency.identity_of(config, settings, options.device, timing)
    model, branches = latency.meta_model(config, settings)
    space = search_space(branches)
    covering, unseen = latency.covering_networks(space, 0), latency.random_networks(space, 30, 0)
    compiler, progress, dtype = RegionCompiler(), Progress(options.time_limit), getattr(torch, options.dtype)
    weights = latency.Weights(options.device, dtype, 0, timing.fused_kernels)

    def observe(specs: list[ArchitectureSpec]) -> list[latency.Observation]:
        return latency.observe(
            specs,
            model,
            branches,
            families.example_inputs(config, options.batch, options.device, dtype),
            timing=timing,
            weights=weights,
            compiler=compiler if options.compile else None,
            graphs=Graphs() if options.cuda_graphs else None,
            clock=latency.clock_of(options.device),
            visits=options.visits,
            seed=0,
            on_step=progress,
        )

    found = observe([*covering, *unseen])
    if options.raw:
        options.raw.write_text(json.dumps([dataclasses.asdict(seen) for seen in found]))
    measured, checked = found[: len(covering)], found[len(covering) :]
    table = latency.tabulate(identity, measured, checked)
    if options.out:
        table.save(options.out)

    networks = len(covering) + len(unseen)
    first, visits = progress.seconds[networks - 1], progress.seconds[-1] - progress.seconds[networks - 1]
    error = table.validation
    spread = [max(seen.total_ms) / min(seen.total_ms) - 1 for seen in checked]
    ratios = [(table.predict(seen.spec.choices), seen.ms) for seen in checked]
    print(f"{options.config}: {json.dumps(identity.to_json())}")
    print(f"sites {len(space.sites)}, choices {sum(len(s.choices) for s in space.sites)}, networks {len(covering)} + {len(unseen)} checked")
    print(f"first passes {first:.0f} s ({len(compiler.compiled)} regions compiled), {options.visits} visits {visits:.0f} s")
    print(f"dense {table.dense_ms:.3f} ms measured, {table.predict(space.dense.choices):.3f} predicted; rest {table.rest_ms:.3f} ms")
    for name, spec in (("smallest", space.smallest), ("narrowest", space.narrowest)):
        print(f"{name} {table.predict(spec.choices):.3f} ms predicted")
    print(f"checked networks take {min(ms for _, ms in ratios):.3f} to {max(ms for _, ms in ratios):.3f} ms")
    print(f"spread of a network's visits: median {sorted(spread)[len(spread) // 2]:.2%}, most {max(spread):.2%}")
    print("predicted / measured - 1: " + " ".join(f"{predicted / ms - 1:+.3f}" for predicted, ms in sorted(ratios, key=lambda r: r[1])))
    if options.ratio:
        prices = cost_table(config, settings).with_latency(table)
        plans = [(metric, plan(prices, options.ratio, metric, seed)) for metric in METRICS for seed in range(3)]
        dense, *rest = observe([space.dense, *(spec for _, specs in plans for spec in specs)])
        for i, (metric, specs) in enumerate(plans):
            ms = statistics.mean(seen.ms for seen in rest[2 * i : 2 * i + 2])
            macs, time_ratio = (statistics.mean(prices.cost(s).of(m) for s in specs) / prices.dense.of(m) for m in METRICS)
            print(f"mixture of {options.ratio} by {metric}: MACs {macs:.3f}, predicted time {time_ratio:.3f}, measured {ms / dense.ms:.3f}")
    print(f"prediction error: median {error.median_error:.2%}, 95th percentile {error.p95_error:.2%} over {error.networks} networks")


if __name__ == "__main__":
    main()
