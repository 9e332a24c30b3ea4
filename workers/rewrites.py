"""Which rewrites make a denoiser cheaper and leave its output as it is: one name each, applied at export.

Every rewrite is exact in real arithmetic; the new weights are derived in float64 and rounded once. What a rewrite does follows from the
structure alone, so on the meta device it rebuilds the modules of a saved expert before its weights are read. Rewritten networks are for
sampling: dropout inside a merged layer is gone, and an elastic family no longer finds the layers it could shrink.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0, FusedAttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from workers.contracts import InputError

# Row k: which taps of a 3-tap kernel, after x2 nearest upsampling, let input pixel i reach output pixel 2i + k - 1; and its left inverse.
SPREAD = ((0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 0))
GATHER = ((0.25, -0.25, 0.25, 0.75), (-0.5, 0.5, 0.5, -0.5), (0.75, 0.25, -0.25, 0.25))


def _parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(value.to(like.dtype).contiguous(), like.requires_grad)


def _linear(weight: Tensor, bias: Tensor | None, like: nn.Linear) -> nn.Linear:
    """A linear layer of these float64 values, in the precision of ``like``."""
    layer: Any = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = _parameter(weight, like.weight)
    layer.bias = None if bias is None else _parameter(bias, like.weight)
    return layer


def _compose(outer: nn.Linear, inner: nn.Linear, divisor: float = 1.0) -> nn.Linear:
    """One layer that computes ``outer(inner(x)) / divisor``."""
    weight = outer.weight.detach().double()
    biases = [] if inner.bias is None else [weight @ inner.bias.detach().double()]
    biases += [] if outer.bias is None else [outer.bias.detach().double()]
    return _linear(weight @ inner.weight.detach().double() / divisor, torch.stack(biases).sum(0) / divisor if biases else None, outer)


def _is_stock(attention: Any) -> bool:
    """Whether a module is an Attention of four plain projections, run by a processor that the rewrites know."""
    return (
        isinstance(attention, Attention)
        and type(attention.processor) in (AttnProcessor, AttnProcessor2_0)
        and attention.added_kv_proj_dim is None
        and attention.to_out is not None
        and all(type(layer) is nn.Linear for layer in (attention.to_q, attention.to_k, attention.to_v, attention.to_out[0]))
    )


def _self_attentions(model: nn.Module) -> Iterator[Any]:
    """Every stock attention that reads nothing but its own input. (``attn2`` is always given the context.)"""
    for name, module in model.named_modules():
        if isinstance(module, Attention) and _is_stock(module) and not module.is_cross_attention and name.rpartition(".")[2] != "attn2":
            yield module


# --- cross-attention to one token -----------------------------------------------------------------------------------


class FoldedContext(nn.Module):
    """Cross-attention to exactly one token: the softmax over one key is 1, so every query gets ``to_out(to_v(context))``."""

    def __init__(self, attention: Any):
        super().__init__()
        self.linear = _compose(attention.to_out[0], attention.to_v, attention.rescale_output_factor)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: object) -> Tensor:
        """[B, 1, C], which broadcasts over the queries, for ``encoder_hidden_states`` [B, 1, D]. Raises: InputError if there are more."""
        if not isinstance(encoder_hidden_states, Tensor) or encoder_hidden_states.dim() != 3 or encoder_hidden_states.shape[1] != 1:
            found = list(encoder_hidden_states.shape) if isinstance(encoder_hidden_states, Tensor) else type(encoder_hidden_states).__name__
            raise InputError(
                f"fold_context: encoder_hidden_states is {found}, but this model's cross-attention was folded for exactly one token, "
                "[batch, 1, width]: give one token, or publish the mixture without fold_context"
            )
        return self.linear(encoder_hidden_states)


def fold_context(model: nn.Module) -> None:
    """Cross-attention in transformer blocks becomes one linear layer of the one context token; its query norm goes too.

    Exact only for one token, which ``FoldedContext`` checks. Masks have no say: a softmax over one key is 1 whatever its bias.
    """
    for block in list(model.modules()):
        if not isinstance(block, BasicTransformerBlock) or block.norm_type != "layer_norm":
            continue
        for norm, name in (("norm1", "attn1"), ("norm2", "attn2")):
            attention = getattr(block, name)
            if _is_stock(attention) and attention.is_cross_attention and not attention.norm_cross and not attention.residual_connection:
                setattr(block, norm, nn.Identity())
                setattr(block, name, FoldedContext(attention))


# --- self-attention -------------------------------------------------------------------------------------------------


class Contiguous(nn.Module):
    """The identity, laid out the way attention kernels want their keys."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states.contiguous()


def _is_one_head(attention: Any) -> bool:
    """Whether a stock attention has a single head as wide as its input."""
    layers = (attention.to_q, attention.to_k, attention.to_v, attention.to_out[0])
    square = all(layer.weight.shape == (attention.query_dim, attention.query_dim) for layer in layers)
    return square and attention.heads == 1 and attention.norm_q is None and attention.norm_k is None


def merge_one_head(model: nn.Module) -> None:
    """Self-attention of one head as wide as its input needs two of its four projections.

    With X [N, C]: scores are X Wq' Wk X', so Wk goes into the query and the keys are X itself; terms that are the same for every key leave
    the softmax as it is. Rows of the softmax sum to 1, so Wo and both biases go into the value. Narrower heads would grow: left alone.
    """
    for attention in list(_self_attentions(model)):
        if not _is_one_head(attention):
            continue
        query, out = attention.to_q, attention.to_out[0]
        turn = attention.to_k.weight.detach().double().T
        bias = None if query.bias is None else turn @ query.bias.detach().double()
        attention.to_q = _linear(turn @ query.weight.detach().double(), bias, query)
        attention.to_k = Contiguous()
        attention.to_v = _compose(out, attention.to_v)
        attention.to_out[0] = nn.Identity()


def fuse_qkv(model: nn.Module) -> None:
    """The three projections of a self-attention as one matrix product: the same MACs, a third of the kernels.

    diffusers' own ``fuse_qkv_projections`` keeps the three layers beside the fused one; here they go. What ``merge_one_head`` can halve
    is left to it.
    """
    for attention in list(_self_attentions(model)):
        layers = (attention.to_q, attention.to_k, attention.to_v)
        same = len({layer.weight.shape for layer in layers}) == 1
        if _is_one_head(attention) or not same or type(attention.processor) is not AttnProcessor2_0:
            continue
        weight = torch.cat([layer.weight.detach().double() for layer in layers])
        bias = None if layers[0].bias is None else torch.cat([layer.bias.detach().double() for layer in layers])
        attention.to_qkv = _linear(weight, bias, attention.to_q)
        attention.to_q = attention.to_k = attention.to_v = None
        attention.fused_projections = True
        attention.set_processor(FusedAttnProcessor2_0())


# --- upsampling -----------------------------------------------------------------------------------------------------


def _transposed(conv: nn.Conv2d) -> nn.ConvTranspose2d:
    """The layer that computes ``conv(nearest upsampling of x by 2)``: 16 MACs per input pixel and channel pair instead of 36."""
    layer: Any = nn.ConvTranspose2d(conv.in_channels, conv.out_channels, 4, stride=2, padding=1, bias=conv.bias is not None, device="meta")
    kernel = conv.weight.detach().double()
    spread = kernel.new_tensor(SPREAD)
    layer.weight = _parameter(torch.einsum("ka,lb,oiab->iokl", spread, spread, kernel), conv.weight)
    layer.bias = conv.bias
    return layer


class TransposedUpsample(nn.Module):
    """Nearest upsampling by 2 and its 3x3 convolution as one transposed convolution."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.conv = _transposed(conv)

    def forward(self, hidden_states: Tensor, output_size: Sequence[int] | None = None, *_: object, **__: object) -> Tensor:
        """[B, C', 2H, 2W] for ``hidden_states`` [B, C, H, W].

        Another ``output_size`` (a U-Net asks for it when the sample's side is no multiple of its downsampling) is computed as it was
        before, with the 3x3 kernel read back from this one.
        """
        if output_size is None or tuple(output_size) == tuple(2 * side for side in hidden_states.shape[2:]):
            return self.conv(hidden_states)
        gather = torch.tensor(GATHER, device=self.conv.weight.device)
        kernel = torch.einsum("ak,bl,iokl->oiab", gather, gather, self.conv.weight.float()).to(self.conv.weight.dtype)
        return F.conv2d(F.interpolate(hidden_states, size=tuple(output_size)), kernel, self.conv.bias, padding=1)


def _doubles(upsample: Any) -> bool:
    """Whether a module starts by repeating every pixel 2 x 2, whatever convolution follows."""
    return type(upsample) is Upsample2D and upsample.norm is None and upsample.interpolate and not upsample.use_conv_transpose


def _is_3x3(conv: Any) -> bool:
    return (
        type(conv) is nn.Conv2d
        and (conv.kernel_size, conv.stride, conv.padding, conv.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))
        and conv.groups == 1
        and conv.padding_mode == "zeros"
    )


def _transpose_resnet(block: Any) -> None:
    """``conv1`` follows the upsampling of a ResBlock. The shortcut is upsampled last, not first: its 1x1 convolution commutes with that."""
    block.conv1 = _transposed(block.conv1)
    if block.conv_shortcut is None:
        block.conv_shortcut = block.upsample
    else:
        block.conv_shortcut = nn.Sequential(block.conv_shortcut, Upsample2D(block.conv_shortcut.out_channels))
    block.upsample = None


def transpose_upsample(model: nn.Module) -> None:
    """Nearest upsampling by 2 before a 3x3 convolution becomes one transposed convolution, of 4/9 of the MACs."""
    for parent in list(model.modules()):
        if isinstance(parent, ResnetBlock2D) and _doubles(parent.upsample) and _is_3x3(parent.conv1):
            _transpose_resnet(parent)
        for name, child in list(parent.named_children()):
            conv: Any = (child.conv if child.name == "conv" else child.Conv2d_0) if _doubles(child) else None
            if _is_3x3(conv):
                setattr(parent, name, TransposedUpsample(conv))


# --- all of them ----------------------------------------------------------------------------------------------------

REWRITES: dict[str, Callable[[nn.Module], None]] = {
    rewrite.__name__: rewrite for rewrite in (fold_context, merge_one_head, fuse_qkv, transpose_upsample)
}


def apply(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """Apply the named rewrites to a diffusers U-Net of any width, in place, wherever they are exact; the model is returned.

    Rewrites commute, so that neither the order of ``names`` nor how they are spread over calls matters; a second time does nothing.
    Convert the memory layout afterwards. Raises: InputError for a name that is none of ``REWRITES``.
    """
    unknown = sorted(set(names) - set(REWRITES))
    if unknown:
        raise InputError(f"rewrites: {unknown[0]!r} is unknown: known are {', '.join(REWRITES)}")
    for name, rewrite in REWRITES.items():
        if name in names:
            rewrite(model)
    return model.train(model.training)  # new modules too
