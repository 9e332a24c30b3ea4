"""diffusers' UNet2DModel: DDPM in pixels, unconditional latent diffusion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import nn

from workers.branches import residual_branches
from workers.contracts import ElasticSettings, InputError
from workers.elastic import Branch

CLASS_NAME = "UNet2DModel"


def load(folder: Path) -> tuple[nn.Module, dict[str, list[str]]]:
    return UNet2DModel.from_pretrained(folder, torch_dtype=torch.float32, use_safetensors=True, output_loading_info=True)


def build(config: dict[str, Any]) -> nn.Module:
    return UNet2DModel.from_config(config)


def check(config: dict[str, Any]) -> None:
    if config.get("num_class_embeds") or config.get("class_embed_type"):
        raise InputError("model.path: this UNet2DModel takes class labels, which are not supported yet")
    if config.get("in_channels") != config.get("out_channels"):
        raise InputError(
            f"model.path: {config.get('out_channels')} output channels for {config.get('in_channels')} input channels: "
            "models that learn their variance are not supported"
        )
    if isinstance(config.get("sample_size"), (list, tuple)) or not config.get("sample_size"):
        raise InputError(f"model.path: sample_size {config.get('sample_size')} is not one number: only square samples are supported")


def sites(model: nn.Module, settings: ElasticSettings) -> tuple[Branch, ...]:
    return tuple(residual_branches(model, settings))


def features(model: Any) -> list[str]:
    """The end of every level: the residual stream, whose shape no architecture changes."""
    down = [f"down_blocks.{i}" for i in range(len(model.down_blocks))]
    return [*down, "mid_block", *(f"up_blocks.{i}" for i in range(len(model.up_blocks)))]


def tiny() -> nn.Module:
    """A random 16 x 16 model with attention of two heads, 1x1 shortcuts and scale-shift conditioning."""
    model: Any = UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=16,
        norm_num_groups=4,
        resnet_time_scale_shift="scale_shift",
    )
    return model.eval()
