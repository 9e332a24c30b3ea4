"""The residual branches of diffusers' blocks as elastic branches. Families share them; no block is copied or rewritten."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
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


def _choices(units: int, unit_width: int, settings: ElasticSettings) -> tuple[int, ...]:
    """Kept units whose width the hardware likes, the dense one always, 0 if whole branches may go."""
    legal = {k for k in range(1, units) if k * unit_width % settings.width_multiple == 0}
    return tuple(sorted(legal | {units} | ({0} if settings.depth else set())))


def resnet_branch(name: str, block: ResnetBlock2D, settings: ElasticSettings) -> Branch:
    """Unit: one GroupNorm group of norm2, so that the statistics of the kept groups stay exact."""
    groups, channels = block.norm2.num_groups, block.norm2.num_channels
    cuts = [Cut(f"{name}.{parameter}", 0) for parameter in ("conv1.weight", "conv1.bias", "norm2.weight", "norm2.bias")]
    cuts.append(Cut(f"{name}.conv2.weight", 1))
    if block.time_emb_proj is not None:
        lead = 2 if block.time_embedding_norm == "scale_shift" else 1
        cuts += [Cut(f"{name}.time_emb_proj.{parameter}", 0, lead) for parameter in ("weight", "bias")]
    site = ElasticSite(name, _choices(groups, channels // groups, settings), "group")
    return Branch(site, groups, tuple(cuts), f"{name}.norm2.num_groups", f"{name}.conv2", 1, ShortcutResnet)


def attention_branch(name: str, block: Attention, settings: ElasticSettings) -> Branch:
    """Unit: one head. A layer with one head can only be kept or dropped, so that the softmax scale stays right."""
    cuts = [Cut(f"{name}.{layer}.weight", 0) for layer in ("to_q", "to_k", "to_v")]
    cuts += [Cut(f"{name}.{layer}.bias", 0) for layer in ("to_q", "to_k", "to_v") if block.get_submodule(layer).bias is not None]
    cuts.append(Cut(f"{name}.to_out.0.weight", 1))
    site = ElasticSite(name, _choices(block.heads, block.inner_dim // block.heads, settings), "head")
    return Branch(site, block.heads, tuple(cuts), f"{name}.heads", f"{name}.to_out.0", -1, ShortcutAttention)


def residual_branches(model: nn.Module, settings: ElasticSettings) -> Iterator[Branch]:
    """Every ResBlock and every residual self-attention of a diffusers U-Net, in the order of ``named_modules``."""
    for name, module in model.named_modules():
        if isinstance(module, ResnetBlock2D):
            yield resnet_branch(name, module, settings)
        elif isinstance(module, Attention) and module.residual_connection:
            yield attention_branch(name, module, settings)
