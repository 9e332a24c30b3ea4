"""A U-Net with the kernels of `workers.kernels` in place of PyTorch's: the same function, in less time on a GPU.

The modules stay where they are and keep their parameters; only what they do with them changes, so slices of the parameters work as well.
Hooks on the norms and convolutions inside a ResBlock no longer see anything: for training and sampling, not for searches by gates.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn


def group_norm(x: Tensor, norm: nn.GroupNorm, act: bool = False, add: Tensor | None = None) -> Tensor:
    """Norm of [N, C, H, W] or [N, C, P], of [N, C, H, W] + ``add`` [N, C], then SiLU if ``act``."""
    if not x.is_cuda:
        normal = F.group_norm(x if add is None else x + add[..., None, None], norm.num_groups, norm.weight, norm.bias, norm.eps)
        return F.silu(normal) if act else normal
    from workers import kernels

    shaped = x if x.dim() == 4 else x[..., None]
    normal = kernels.GroupNorm.apply(shaped, add, norm.weight, norm.bias, norm.num_groups, norm.eps, act)
    return normal if x.dim() == 4 else normal[..., 0]


def add_bias(x: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
    """[N, C, H, W] + ``bias`` [C] + ``residual`` [N, C, H, W], if there is one."""
    if not x.is_cuda:
        return x + bias[:, None, None] if residual is None else x + bias[:, None, None] + residual
    from workers import kernels

    return kernels.AddBias.apply(x, bias, residual)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """[..., D] -> [..., C]."""
    if not x.is_cuda:
        return F.linear(x, weight, bias)
    from workers import kernels

    return kernels.Linear.apply(x, weight, bias)


class FusedGroupNorm(nn.GroupNorm):
    def forward(self, input: Tensor) -> Tensor:
        return group_norm(input, self)


class FusedConv2d(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return add_bias(_convolve(self, input), _bias(self))


class FusedLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class FusedResnet(ResnetBlock2D):
    """The bias of the first convolution goes with that of the timestep into the norm after it, that of the second into the sum with the
    shortcut."""

    def forward(self, input_tensor: Tensor, temb: Tensor, *_: Any, **__: Any) -> Tensor:
        hidden = _convolve(self.conv1, group_norm(input_tensor, self.norm1, act=True))
        told, bias = self.time_emb_proj, _bias(self.conv1)
        if told is None:
            extra = bias.expand(len(hidden), -1)
        else:
            extra = linear(temb if self.skip_time_act else F.silu(temb), told.weight, told.bias + bias)
        hidden = _convolve(self.conv2, group_norm(hidden, self.norm2, act=True, add=extra))
        bias, shortcut = _bias(self.conv2), self.conv_shortcut
        if shortcut is None:
            return add_bias(hidden, bias, input_tensor)
        return add_bias(hidden, bias if shortcut.bias is None else bias + shortcut.bias, _convolve(shortcut, input_tensor))


def _convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Without the bias."""
    return conv._conv_forward(x, conv.weight, None)


def _bias(conv: nn.Conv2d) -> Tensor:
    assert conv.bias is not None  # or it would not have been fused
    return conv.bias


def _fits(block: ResnetBlock2D) -> bool:
    """Whether ``FusedResnet`` does what this block does."""
    plain = block.upsample is None and block.downsample is None and block.output_scale_factor == 1
    silu = isinstance(block.nonlinearity, nn.SiLU) and block.time_embedding_norm == "default"
    still = not block.training or block.dropout.p == 0
    layers = (block.conv1, block.conv2, block.time_emb_proj)
    return plain and silu and still and all(layer is None or layer.bias is not None for layer in layers)


def fuse(model: nn.Module) -> nn.Module:
    """Fuse what can be fused, in place and for good, and lay the weights out channels last; returns the model.

    Any U-Net of diffusers, a mixture of them too. On a CPU, PyTorch's own kernels go on. A block that was fused in eval mode drops nothing
    out in training mode either.
    """
    for module in model.modules():
        if type(module) is ResnetBlock2D and _fits(module):
            module.__class__ = FusedResnet
        elif type(module) is nn.GroupNorm and module.affine:
            module.__class__ = FusedGroupNorm
        elif type(module) is nn.Conv2d and module.padding_mode == "zeros" and module.bias is not None:
            module.__class__ = FusedConv2d
        elif type(module) is nn.Linear and module.bias is not None:
            module.__class__ = FusedLinear
    return channels_last(model)


def channels_last(model: nn.Module) -> nn.Module:
    """The weights of convolutions laid out as samples are, in place."""
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return model
