"""Which CompVis weight every diffusers weight comes from.

The names are read from the diffusers model, place by place, so that each of its weights has exactly one source: what has none in
the checkpoint is missing, and what no source names is not expected there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

Names = Mapping[str, str]

UNET_RESNET: Names = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ATTENTION: Names = {"group_norm": "norm", "to_q": "qkv", "to_k": "qkv", "to_v": "qkv", "to_out.0": "proj_out"}
FIRST_STAGE_RESNET: Names = {"conv_shortcut": "nin_shortcut"}
FIRST_STAGE_ATTENTION: Names = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
SAME: Names = MappingProxyType({})
THIRDS = {"to_q": 0, "to_k": 1, "to_v": 2}


@dataclass(frozen=True)
class Place:
    """Where a module of the diffusers model lies in the CompVis model, and the names inside it that differ."""

    ours: str
    theirs: str
    names: Names = field(default_factory=lambda: SAME)


@dataclass(frozen=True)
class Source:
    """The checkpoint's key of a weight; ``third`` of a fused q, k, v weight, whose rows are (heads, 3, head_dim)."""

    key: str
    third: int | None = None
    heads: int = 1

    def fits(self, tensor: Tensor, shape: Sequence[int]) -> bool:
        """Whether the tensor can become a weight of ``shape``: a 1x1 convolution may become a linear layer."""
        rows = shape[0] * (1 if self.third is None else 3)
        return tuple(tensor.shape[: len(shape)]) == (rows, *shape[1:]) and all(size == 1 for size in tensor.shape[len(shape) :])

    def take(self, tensor: Tensor, shape: Sequence[int]) -> Tensor:
        """The weight, in float32 and memory of its own."""
        if self.third is not None:
            tensor = tensor.unflatten(0, (self.heads, 3, -1))[:, self.third]
        return tensor.reshape(*shape).float().clone().contiguous()


def unet_sources(model: Any, split_qkv_first: bool) -> dict[str, Source]:
    """Weight of a U-Net -> its source, without the prefix of the U-Net."""
    return _sources(model, [*_unet_places(model)], 1 if split_qkv_first else None)


def first_stage_sources(model: Any) -> dict[str, Source]:
    """Weight of a VQModel or AutoencoderKL -> its source, without the prefix of the first stage."""
    return _sources(model, [*_first_stage_places(model)])


def same_sources(model: nn.Module) -> dict[str, Source]:
    return {key: Source(key) for key in model.state_dict()}


def ema_key(key: str) -> str:
    """The name of a U-Net weight's moving average: CompVis drops the dots, which a buffer may not have."""
    return "model_ema." + key.removeprefix("model.").replace(".", "")


def _sources(model: nn.Module, places: Sequence[Place], heads: int | None = None) -> dict[str, Source]:
    """``heads``: in the rows of fused weights; None: those of the attention."""
    found = {}
    for place in places:
        module: Any = model.get_submodule(place.ours)
        for key in module.state_dict():
            name, _, kind = key.rpartition(".")
            theirs = place.names.get(name, name)
            source = ".".join(part for part in (place.theirs, theirs, kind) if part)
            fused = theirs == "qkv"
            third = THIRDS[name] if fused else None
            found[f"{place.ours}.{key}"] = Source(source, third, (heads or module.heads) if fused else 1)
    assert found.keys() == model.state_dict().keys()
    return found


def _unet_places(model: Any) -> Iterator[Place]:
    layers, levels = model.config.layers_per_block, len(model.down_blocks)
    yield Place("conv_in", "input_blocks.0.0")
    yield Place("time_embedding", "time_embed", {"linear_1": "0", "linear_2": "2"})
    for level, block in enumerate(model.down_blocks):
        first = 1 + level * (layers + 1)
        yield from _unet_block(block, f"down_blocks.{level}", [f"input_blocks.{first + layer}" for layer in range(layers)])
        for sampler in getattr(block, "downsamplers", None) or ():
            names = {"conv": "op"} if _is_conv(sampler) else UNET_RESNET
            yield Place(f"down_blocks.{level}.downsamplers.0", f"input_blocks.{first + layers}.0", names)
    yield Place("mid_block.resnets.0", "middle_block.0", UNET_RESNET)
    yield Place("mid_block.attentions.0", "middle_block.1", _attention_names(model.mid_block.attentions[0]))
    yield Place("mid_block.resnets.1", "middle_block.2", UNET_RESNET)
    for level, block in enumerate(model.up_blocks):
        first = level * (layers + 1)
        yield from _unet_block(block, f"up_blocks.{level}", [f"output_blocks.{first + layer}" for layer in range(layers + 1)])
        for sampler in getattr(block, "upsamplers", None) or ():
            last = f"output_blocks.{first + layers}.{2 if _attentions(block) else 1}"
            yield Place(f"up_blocks.{level}.upsamplers.0", last, SAME if _is_conv(sampler) else UNET_RESNET)
    assert levels == len(model.up_blocks)
    yield Place("conv_norm_out", "out.0")
    yield Place("conv_out", "out.2")


def _unet_block(block: Any, ours: str, theirs: Sequence[str]) -> Iterator[Place]:
    """The layers of one level: a residual block each, then an attention if the level has any."""
    for layer, place in enumerate(theirs):
        yield Place(f"{ours}.resnets.{layer}", f"{place}.0", UNET_RESNET)
        if _attentions(block):
            yield Place(f"{ours}.attentions.{layer}", f"{place}.1", _attention_names(block.attentions[layer]))


def _attentions(block: Any) -> bool:
    return bool(getattr(block, "attentions", None))


def _attention_names(module: nn.Module) -> Names:
    """A spatial transformer has the same names on both sides."""
    return SAME if hasattr(module, "transformer_blocks") else UNET_ATTENTION


def _is_conv(sampler: nn.Module) -> bool:
    """Whether levels are joined by a convolution, not by a residual block that resamples."""
    return isinstance(getattr(sampler, "conv", None), nn.Conv2d)


def _first_stage_places(model: Any) -> Iterator[Place]:
    levels = len(model.config.block_out_channels)
    for side, below, blocks in (("encoder", "down", model.encoder.down_blocks), ("decoder", "up", model.decoder.up_blocks)):
        yield Place(f"{side}.conv_in", f"{side}.conv_in")
        for i, block in enumerate(blocks):
            ours, theirs = f"{side}.{below}_blocks.{i}", f"{side}.{below}.{i if below == 'down' else levels - 1 - i}"
            for layer in range(len(block.resnets)):
                yield Place(f"{ours}.resnets.{layer}", f"{theirs}.block.{layer}", FIRST_STAGE_RESNET)
                if _attentions(block):
                    yield Place(f"{ours}.attentions.{layer}", f"{theirs}.attn.{layer}", FIRST_STAGE_ATTENTION)
            if getattr(block, f"{below}samplers", None):
                yield Place(f"{ours}.{below}samplers.0", f"{theirs}.{below}sample")
        yield Place(f"{side}.mid_block.resnets.0", f"{side}.mid.block_1", FIRST_STAGE_RESNET)
        yield Place(f"{side}.mid_block.attentions.0", f"{side}.mid.attn_1", FIRST_STAGE_ATTENTION)
        yield Place(f"{side}.mid_block.resnets.1", f"{side}.mid.block_2", FIRST_STAGE_RESNET)
        yield Place(f"{side}.conv_norm_out", f"{side}.norm_out")
        yield Place(f"{side}.conv_out", f"{side}.conv_out")
    for name in ("quant_conv", "post_quant_conv", *(["quantize"] if hasattr(model, "quantize") else [])):
        yield Place(name, name)
