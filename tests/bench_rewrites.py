"""Prints what each rewrite gains on this machine: on every layer that it touches in the three LDM U-Nets, then on the whole U-Nets.

    python tests/bench_rewrites.py [--seconds 240] [--tiny]

Random weights, bfloat16 (float32 on a CPU), median of 20 alternating runs after 5. A cell is "before>after" in ms, marked ! where after
is more than 2% slower; NCHW is the contiguous layout, NHWC channels_last; compiled means every block separately. What the time limit left
out shows as "-". --tiny shrinks everything, to check the script on a CPU.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from workers.regional import RegionCompiler
from workers.rewrites import apply

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
MODES = [(how, layout) for how in ("eager", "compiled") for layout in LAYOUTS]
CONTEXT_WIDTH = 512
NOTES = {
    "transpose_upsample": "Churches: its Upsample2D have no convolution; the 4 ResBlocks around them are measured, conv1 is rewritten",
    "fold_context": "x + attn2(norm2(x)), one token",
    "merge_one_head": "x + attn1(norm1(x)), one head",
    "fuse_qkv": "the residual Attention, several heads",
}


class Part(nn.Module):
    """One attention of a transformer block, with its norm and its residual addition."""

    def __init__(self, channels: int, name: str):
        super().__init__()
        self.block = BasicTransformerBlock(channels, 1, channels, cross_attention_dim=CONTEXT_WIDTH)
        self.name = name

    def forward(self, hidden_states: Tensor, context: Tensor) -> Tensor:
        if self.name == "attn1":
            return hidden_states + self.block.attn1(self.block.norm1(hidden_states))
        return hidden_states + self.block.attn2(self.block.norm2(hidden_states), encoder_hidden_states=context)


class Subject(NamedTuple):
    """What is measured: rewritten by ``names``, built by ``build()``, called with ``inputs(batch)``."""

    group: str
    model: str
    what: str
    names: tuple[str, ...]
    build: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Tensor, ...]]
    whole: bool = False

    @property
    def layouts(self) -> list[str]:
        """A layer that reads [B, N, C] knows no layout."""
        return [*LAYOUTS] if self.inputs(1)[0].dim() == 4 else ["NCHW"]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=DTYPE)


def layers(tiny: bool) -> Iterator[Subject]:
    """Every layer that a rewrite touches, by model, width and input side."""

    def small(channels: int, side: int) -> tuple[int, int]:
        return (64, min(side, 8)) if tiny else (channels, side)

    upsamples = {"LDM-4": ((896, 8), (672, 16), (448, 32)), "cin256": ((960, 8), (576, 16), (384, 32))}
    for model, sizes in upsamples.items():
        for c, side in sizes:
            c, side = small(c, side)
            yield Subject(
                "transpose_upsample",
                model,
                f"{c}@{side}",
                ("transpose_upsample",),
                lambda c=c: nn.Sequential(Upsample2D(c, use_conv=True)),
                lambda batch, c=c, side=side: (random(batch, c, side, side),),
            )
    for c, side in ((768, 2), (768, 4), (384, 8), (384, 16)):
        c, side = small(c, side)
        yield Subject(
            "transpose_upsample",
            "Churches",
            f"{c}@{side}",
            ("transpose_upsample",),
            lambda c=c: ResnetBlock2D(in_channels=c, temb_channels=CONTEXT_WIDTH, time_embedding_norm="scale_shift", up=True),
            lambda batch, c=c, side=side: (random(batch, c, side, side), random(batch, CONTEXT_WIDTH)),
        )
    for group, part in (("fold_context", "attn2"), ("merge_one_head", "attn1")):
        for c, side in ((960, 8), (576, 16), (384, 32)):
            c, side = small(c, side)
            yield Subject(
                group,
                "cin256",
                f"{c}@{side}",
                (group,),
                lambda c=c, part=part: Part(c, part),
                lambda batch, c=c, side=side: (random(batch, side * side, c), random(batch, 1, CONTEXT_WIDTH)),
            )
    for model, c, side, heads in (
        ("LDM-4", 896, 8, 28),
        ("LDM-4", 672, 16, 21),
        ("LDM-4", 448, 32, 14),
        ("Churches", 384, 8, 8),
        ("Churches", 384, 16, 8),
        ("Churches", 192, 32, 8),
    ):
        c, side = small(c, side)
        heads = 2 if tiny else heads
        yield Subject(
            "fuse_qkv",
            model,
            f"{c}@{side}",
            ("fuse_qkv",),
            lambda c=c, h=heads: Attention(c, heads=h, dim_head=c // h, bias=True, norm_num_groups=32, residual_connection=True),
            lambda batch, c=c, side=side: (random(batch, c, side, side),),
        )


def ldm4(tiny: bool) -> nn.Module:
    return UNet2DModel(
        sample_size=64,
        layers_per_block=2,
        block_out_channels=(32, 64, 96, 128) if tiny else (224, 448, 672, 896),
        attention_head_dim=32,
        down_block_types=("DownBlock2D", *["AttnDownBlock2D"] * 3),
        up_block_types=(*["AttnUpBlock2D"] * 3, "UpBlock2D"),
        freq_shift=0,
    )


def cin256(tiny: bool) -> nn.Module:
    return UNet2DConditionModel(
        sample_size=64,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 64, 96, 128) if tiny else (192, 384, 576, 960),
        attention_head_dim=1,
        cross_attention_dim=CONTEXT_WIDTH,
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * 3),
        up_block_types=(*["CrossAttnUpBlock2D"] * 3, "UpBlock2D"),
    )


def churches(tiny: bool) -> nn.Module:
    model = UNet2DModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        layers_per_block=2,
        block_out_channels=(32, 32, 32, 64, 64) if tiny else (192, 384, 384, 768, 768),
        attention_head_dim=8 if tiny else 24,
        attn_norm_num_groups=32,
        down_block_types=(*["AttnDownBlock2D"] * 4, "ResnetDownsampleBlock2D"),
        up_block_types=("ResnetUpsampleBlock2D", *["AttnUpBlock2D"] * 4),
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
        freq_shift=0,
    )
    for module in model.modules():
        if isinstance(module, Attention):
            module.heads, module.scale = 8, (module.inner_dim / 8) ** -0.5
    return model


def models(tiny: bool) -> Iterator[Subject]:
    """The three U-Nets, with each of their rewrites alone and with all of them."""
    for model, build, channels, side, rewrites in (
        ("LDM-4", ldm4, 3, 64, ("transpose_upsample", "fuse_qkv")),
        ("cin256", cin256, 3, 64, ("transpose_upsample", "fold_context", "merge_one_head")),
        ("Churches", churches, 4, 32, ("transpose_upsample", "fuse_qkv")),
    ):
        side = 16 if tiny else side

        def inputs(batch: int, model: str = model, channels: int = channels, side: int = side) -> tuple[Tensor, ...]:
            context = (random(batch, 1, CONTEXT_WIDTH),) if model == "cin256" else ()
            return random(batch, channels, side, side), torch.arange(batch, device=DEVICE) * 7 + 10, *context

        for names in (*((name,) for name in rewrites), rewrites):
            what = names[0] if len(names) == 1 else "all of them"
            yield Subject("whole U-Net", model, what, names, lambda build=build: build(tiny), inputs, True)


def sample_ms(function: Callable[[], object]) -> Callable[[], float]:
    """Start one run; the returned function tells its milliseconds once the device is done."""
    if DEVICE == "cpu":
        began = time.perf_counter()
        function()
        elapsed = (time.perf_counter() - began) * 1000
        return lambda: elapsed
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    function()
    stop.record()
    return lambda: start.elapsed_time(stop)


def median_ms(functions: list[Callable[[], object]], repeats: int) -> list[float]:
    """Median time of each function, run by turns so that a change of clock touches all alike."""
    for _ in range(max(1, repeats // 4)):
        for function in functions:
            function()
    runs = [[sample_ms(function) for function in functions] for _ in range(repeats)]
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return [statistics.median(run[i]() for run in runs) for i in range(len(functions))]


@dataclass
class Bench:
    """Runs measurements until the time is over and keeps their results."""

    deadline: float
    repeats: int
    cells: dict[tuple[Subject, int], dict[tuple[str, str], str]]

    @torch.no_grad()
    def run(self, subjects: list[Subject], batch: int, mode: tuple[str, str]) -> None:
        how, layout = mode
        began, measured = time.monotonic(), 0
        compilers = {subject.model: RegionCompiler() for subject in subjects}  # what one rewrite left alone is not compiled for the next
        for subject in subjects:
            row = self.cells.setdefault((subject, batch), {})
            if time.monotonic() < self.deadline and layout in subject.layouts:
                try:
                    row[mode] = self.measure(subject, batch, layout, compilers[subject.model] if how == "compiled" else None)
                    measured += 1
                except RuntimeError as error:  # one kernel that this machine lacks must not cost the table
                    row[mode] = "failed"
                    reason = str(error).strip().splitlines()[0][:200]
                    print(f"{subject.model} {subject.what}, batch {batch}, {how} {layout}: {reason}", flush=True)
        print(f"# {how} {layout}, batch {batch}: {measured} of {len(subjects)} in {time.monotonic() - began:.0f} s", flush=True)

    def measure(self, subject: Subject, batch: int, layout: str, compiler: RegionCompiler | None) -> str:
        torch.manual_seed(0)
        with torch.device(DEVICE):
            dense = subject.build().eval()
        nn.Module.to(dense, DTYPE)  # diffusers' own would warn that no module is kept in float32
        pair = [dense, apply(copy.deepcopy(dense), subject.names)]
        inputs = [t.to(memory_format=LAYOUTS[layout]) if t.dim() == 4 else t for t in subject.inputs(batch)]
        for model in pair:
            model.to(memory_format=LAYOUTS[layout])
            if compiler and subject.whole:
                compiler.compile(model)
            elif compiler:
                torch._dynamo.reset()
                model.compile(dynamic=False)
        before, after = median_ms([lambda model=model: model(*inputs) for model in pair], self.repeats)
        return f"{before:.3f}>{after:.3f}{'!' if after > 1.02 * before else ''}"

    def table(self) -> Iterator[str]:
        yield f"{'ms, before>after':<30}{'batch':>5}" + "".join(f"{f'{how} {layout}':>17}" for how, layout in MODES)
        group = ""
        for (subject, batch), row in sorted(self.cells.items(), key=lambda item: item[0][0].group):  # stable: subjects keep their order
            if subject.group != group:
                group = subject.group
                yield f"{group}  {NOTES.get(group, '')}"
            columns = (row.get(mode, "-" if mode[1] in subject.layouts else "") for mode in MODES)
            yield f"  {f'{subject.model} {subject.what}':<28}{batch:>5}" + "".join(f"{cell:>17}" for cell in columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=240, help="start no measurement after this time")
    parser.add_argument("--tiny", action="store_true", help="small shapes and few runs, to check the script")
    arguments = parser.parse_args()
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    print(f"# {device}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}", flush=True)

    bench = Bench(time.monotonic() + arguments.seconds, 3 if arguments.tiny else 20, {})
    parts, unets = list(layers(arguments.tiny)), list(models(arguments.tiny))
    one, eight, many = (1, 2, 3) if arguments.tiny else (1, 8, 64)
    fused = [part for part in parts if part.group == "fuse_qkv"]
    asked = [part for part in parts if part.group != "fuse_qkv"]
    small, large = [u for u in unets if u.model == "Churches"], [u for u in unets if u.model != "Churches"]
    for batch in (one, eight, many):  # the most telling first, in case the time is short
        for layout in LAYOUTS:
            bench.run(parts, batch, ("eager", layout))
    for layout in LAYOUTS:
        bench.run(large, many, ("eager", layout))
    bench.run(asked, many, ("compiled", "NCHW"))
    bench.run(large, many, ("compiled", "NCHW"))
    bench.run(asked, many, ("compiled", "NHWC"))
    bench.run(unets, one, ("eager", "NCHW"))
    for layout in LAYOUTS:
        bench.run(small, many, ("eager", layout))
    for batch in (eight, one):
        for layout in LAYOUTS:
            bench.run(asked, batch, ("compiled", layout))
    bench.run(large, many, ("compiled", "NHWC"))
    bench.run(fused, many, ("compiled", "NCHW"))
    for layout in LAYOUTS:
        bench.run(small, many, ("compiled", layout))
    print(*bench.table(), sep="\n")


if __name__ == "__main__":
    main()
