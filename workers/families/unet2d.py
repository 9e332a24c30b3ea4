"""diffusers' UNet2DModel: DDPM in pixels, unconditional latent diffusion."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ModelMixin as ModelMixin  # a pipeline that holds a class from here looks for its base here
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from torch import nn

from workers.branches import residual_branches
from workers.contracts import ElasticSettings, InputError
from workers.elastic import Branch

CLASS_NAMES = ("UNet2DModel", "UNet2DModelWithHeads")
OUTPUT = "conv_out"


class UNet2DModelWithHeads(UNet2DModel):
    """A UNet2DModel with the same number of heads in every attention, whatever its width (CompVis' ``num_heads``).

    The plain class can only say a head dim. It builds no model of this config, because no attention has heads of no channels:
    from these weights it would make a wrong network.
    """

    def __init__(self, *args: Any, num_attention_heads: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "attention_head_dim": None})
        model: Any = self
        model.register_to_config(num_attention_heads=num_attention_heads, attention_head_dim=0)
        for attention in (module for module in model.modules() if isinstance(module, Attention)):
            if num_attention_heads < 1 or attention.inner_dim % num_attention_heads:
                raise InputError(f"num_attention_heads: {num_attention_heads} heads do not divide {attention.inner_dim} channels")
            attention.heads = attention.sliceable_head_dim = num_attention_heads
            attention.scale = (attention.inner_dim // num_attention_heads) ** -0.5

    # diffusers reads from the signature which keys a config may have
    __init__.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            *inspect.signature(UNet2DModel.__init__).parameters.values(),
            inspect.Parameter("num_attention_heads", inspect.Parameter.KEYWORD_ONLY, default=1),
        ]
    )


def model_class(config: Mapping[str, Any]) -> Any:
    return UNet2DModelWithHeads if config.get("_class_name") == UNet2DModelWithHeads.__name__ else UNet2DModel


def check(config: dict[str, Any]) -> None:
    """Raises: InputError for a config that no U-Net family handles."""
    if config.get("class_embed_type"):
        raise InputError(f"model.path: class_embed_type {config['class_embed_type']!r} is not supported: only class labels are")
    if config.get("in_channels") != config.get("out_channels"):
        raise InputError(
            f"model.path: {config.get('out_channels')} output channels for {config.get('in_channels')} input channels: "
            "models that learn their variance are not supported"
        )
    if isinstance(config.get("sample_size"), (list, tuple)) or not config.get("sample_size"):
        raise InputError(f"model.path: sample_size {config.get('sample_size')} is not one number: only square samples are supported")


def conditioning(config: Mapping[str, Any]) -> str | None:
    """The argument by which the denoiser is told its class, if it is."""
    return "class_labels" if config.get("num_class_embeds") else None


def example_inputs(config: Mapping[str, Any], batch: int, device: Any, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    size = config["sample_size"]
    args = torch.randn(batch, config["in_channels"], size, size, device=device, dtype=dtype), torch.full((batch,), 500, device=device)
    return args, {"class_labels": torch.zeros(batch, dtype=torch.long, device=device)} if conditioning(config) else {}


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
