"""The residual branches of diffusers' blocks as elastic branches. Families share them; no block is copied or rewritten."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from workers.contracts import ElasticSettings, ElasticSite
from workers.elastic import Branch, Cut


class ShortcutResnet(nn.Module):
    """A ResnetBlock2D whose residual branch was dropped: resampling and 1x1 shortcut stay."""

    def __init__(self, block: ResnetBlock2D):
        super().__init__()
        self.resample = block.upsample or block.downsample
        self.conv_shortcut = block.conv_shortcut
        self.output_scale_factor = block.output_scale_factor

    def forward(self, hidden_states: Tensor, temb: Tensor | None = None) -> Tensor:
        if self.resample is not None:
            hidden_states = self.resample(hidden_states)
        if self.conv_shortcut is not None:
            hidden_states = self.conv_shortcut(hidden_states)
        return hidden_states if self.output_scale_factor == 1 else hidden_states / self.output_scale_factor


class ShortcutAttention(nn.Module):
    """A residual Attention whose branch was dropped: the identity."""

    def __init__(self, block: Attention):
        super().__init__()
        self.rescale_output_factor = block.rescale_output_factor

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states if self.rescale_output_factor == 1 else hidden_states / self.rescale_output_factor


class ShortcutTransformer(nn.Module):
    """A Transformer2DModel whose branch was dropped: the identity."""

    def __init__(self, block: Transformer2DModel):
        super().__init__()

    def forward(self, hidden_states: Tensor, *_: Any, return_dict: bool = True, **__: Any) -> Any:
        return Transformer2DModelOutput(sample=hidden_states) if return_dict else (hidden_states,)


def _choices(units: int, unit_width: int, settings: ElasticSettings) -> tuple[int, ...]:
    """Kept units whose width the hardware likes, evenly thinned to ``most_widths``; the dense one always, 0 if whole branches may go."""
    legal = [k for k in range(1, units) if k * unit_width % settings.width_multiple == 0] + [units]
    if len(legal) > settings.most_widths:
        step = (len(legal) - 1) / max(1, settings.most_widths - 1)
        legal = [legal[len(legal) - 1 - round(i * step)] for i in range(settings.most_widths)]
    return tuple(sorted({*legal} | ({0} if settings.depth else set())))


def resnet_branch(name: str, block: ResnetBlock2D, settings: ElasticSettings) -> Branch:
    """Unit: one GroupNorm group of norm2, so that the statistics of the kept groups stay exact; or one channel of every group."""
    groups, channels = block.norm2.num_groups, block.norm2.num_channels
    whole = settings.unit == "group"
    units, runs = (groups, 1) if whole else (channels // groups, groups)
    cuts = [Cut(f"{name}.{parameter}", 0, runs) for parameter in ("conv1.weight", "conv1.bias", "norm2.weight", "norm2.bias")]
    cuts.append(Cut(f"{name}.conv2.weight", 1, runs))
    if block.time_emb_proj is not None:
        lead = 2 * runs if block.time_embedding_norm == "scale_shift" else runs
        cuts += [Cut(f"{name}.time_emb_proj.{parameter}", 0, lead) for parameter in ("weight", "bias")]
    return Branch(
        ElasticSite(name, _choices(units, channels // units, settings), settings.unit),
        units,
        tuple(cuts),
        readers=(f"{name}.conv2",),
        output=f"{name}.conv2",
        channel_dim=1,
        drop=ShortcutResnet,
        counter=f"{name}.norm2.num_groups" if whole else None,
        groups=runs,
        norm=None if whole else f"{name}.norm2",
    )


def attention_branch(name: str, block: Attention, settings: ElasticSettings) -> Branch:
    """Unit: one head. A layer with one head can only be kept or dropped, so that the softmax scale stays right."""
    cuts = [Cut(f"{name}.{layer}.weight", 0) for layer in ("to_q", "to_k", "to_v")]
    cuts += [Cut(f"{name}.{layer}.bias", 0) for layer in ("to_q", "to_k", "to_v") if block.get_submodule(layer).bias is not None]
    cuts.append(Cut(f"{name}.to_out.0.weight", 1))
    return Branch(
        ElasticSite(name, _choices(block.heads, block.inner_dim // block.heads, settings), "head"),
        block.heads,
        tuple(cuts),
        readers=(f"{name}.to_out.0",),
        output=f"{name}.to_out.0",
        channel_dim=-1,
        drop=ShortcutAttention,
        counter=f"{name}.heads",
    )


FEED_FORWARD_UNIT = 32
"""Channels of a feed-forward's unit at most: any multiple of it suits the hardware."""


def transformer_branch(name: str, block: Transformer2DModel, settings: ElasticSettings) -> Branch:
    """Unit: 32 channels of the feed-forward's inner width (of every block, where there are several); 0 drops the whole transformer.

    Its attentions are kept whole: where they have one head each, as in the LDMs, fewer q/k dims would break the softmax scale.
    """
    cuts, readers, inner = [], [], 0
    for i, inside in enumerate(block.transformer_blocks):
        feed, path = inside.ff.net, f"{name}.transformer_blocks.{i}.ff.net"
        inner = feed[2].in_features
        lead = 2 if isinstance(feed[0], GEGLU) else 1
        cuts += [Cut(f"{path}.0.proj.weight", 0, lead), Cut(f"{path}.0.proj.bias", 0, lead), Cut(f"{path}.2.weight", 1)]
        readers.append(f"{path}.2")
    width = math.gcd(inner, FEED_FORWARD_UNIT)
    return Branch(
        ElasticSite(name, _choices(inner // width, width, settings), f"{width} feed-forward channels"),
        inner // width,
        tuple(cuts),
        readers=tuple(readers),
        output=f"{name}.proj_out",
        channel_dim=-1,
        drop=ShortcutTransformer,
    )


def residual_branches(model: nn.Module, settings: ElasticSettings) -> Iterator[Branch]:
    """Every ResBlock, residual self-attention and spatial transformer of a diffusers U-Net, in the order of ``named_modules``."""
    for name, module in model.named_modules():
        if isinstance(module, ResnetBlock2D):
            yield resnet_branch(name, module, settings)
        elif isinstance(module, Transformer2DModel):
            yield transformer_branch(name, module, settings)
        elif isinstance(module, Attention) and module.residual_connection:
            yield attention_branch(name, module, settings)
