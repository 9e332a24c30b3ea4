"""diffusers' UNet2DConditionModel with one context token: class-conditional latent diffusion (the LDM for ImageNet)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from workers.contracts import InputError
from workers.families import unet2d

CLASS_NAMES = ("UNet2DConditionModel",)
OUTPUT = "conv_out"
OTHER_INPUTS = ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim", "num_class_embeds")

sites = unet2d.sites
features = unet2d.features


def model_class(config: Mapping[str, Any]) -> Any:
    return UNet2DConditionModel


def check(config: dict[str, Any]) -> None:
    unet2d.check(config)
    for key in OTHER_INPUTS:
        if config.get(key):
            raise InputError(f"model.path: {key} {config[key]!r} needs an input that is not supported: only one class token is")


def conditioning(config: Mapping[str, Any]) -> str | None:
    """The argument by which the denoiser is told its class: a context of one token."""
    return "encoder_hidden_states"


def example_inputs(config: Mapping[str, Any], batch: int, device: Any, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args, _ = unet2d.example_inputs(config, batch, device, dtype)
    return args, {"encoder_hidden_states": torch.randn(batch, 1, config["cross_attention_dim"], device=device, dtype=dtype)}


def tiny() -> nn.Module:
    """A random 16 x 16 model with spatial transformers of one head and one context token."""
    model: Any = UNet2DConditionModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=1,
        cross_attention_dim=24,
        norm_num_groups=4,
    )
    return model.eval()
