"""GPU kernels for what surrounds a U-Net's convolutions: GroupNorm with SiLU, and biases, on samples laid out channels last.

PyTorch's GroupNorm wants channels first, cuDNN's convolutions channels last: half of a small U-Net's time goes into turning one into the
other, and into biases added, and summed up again, by kernels of their own. torch.compile does as well, but compiles every sub-network anew;
these take any width. They compute in float32 whatever the samples' precision.

All of them are bound by memory. Addresses are counted in runs of UNIT channels, so that the compiler sees that 16 bytes can be moved at
once, and sums stay in their tile's shape until the last one, since adding across threads in every turn takes longer than loading.
Legend: N samples, P pixels, C channels in G groups of W; samples are [N, C, H, W] in memory as [N, P, C].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from workers.tiles import PIXELS, PIXELS_BACKWARD, UNIT, Tiles

FLAT = 1024
"""Elementwise work goes in runs of so many numbers."""
ROWS, COLUMNS = 1024, 32
"""Of a matrix, that one program sums up."""


@triton.jit
def _of_groups(values, group):
    """Per channel, the sum of ``values`` over the channels of its group."""
    return tl.sum(tl.where(group[:, None] == group[None, :], values[None, :], 0.0), 1)


@triton.jit
def _normalise(
    x,
    add,
    weight,
    bias,
    out,
    mean,
    rstd,
    P,
    C_UNITS,
    SPAN_UNITS,
    G,
    W,
    eps,
    ADD: tl.constexpr,
    ACT: tl.constexpr,
    UNIT: tl.constexpr,
    BC: tl.constexpr,
    BP: tl.constexpr,
):
    C, span = C_UNITS * UNIT, SPAN_UNITS * UNIT
    n, block, c = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BC)
    channel = block * span + c
    group, real = channel // W, (c < span) & (channel < C)
    extra = tl.load(add + n * C + channel, mask=real, other=0.0).to(tl.float32) if ADD else tl.zeros([BC], tl.float32)
    total, squares = tl.zeros([BP, BC], tl.float32), tl.zeros([BP, BC], tl.float32)
    for start in range(0, P, BP):
        pixel = start + tl.arange(0, BP)
        inside = (pixel[:, None] < P) & real[None, :]
        value = tl.load(x + n * P * C + pixel[:, None] * C + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        value = tl.where(inside, value + extra[None, :], 0.0)
        total += value
        squares += value * value
    centre = _of_groups(tl.sum(total, 0), group) / (P * W)
    scale = tl.rsqrt(tl.maximum(_of_groups(tl.sum(squares, 0), group) / (P * W) - centre * centre, 0.0) + eps)
    first = real & (channel % W == 0)
    tl.store(mean + n * G + group, centre, mask=first)
    tl.store(rstd + n * G + group, scale, mask=first)
    factor = tl.load(weight + channel, mask=real, other=0.0).to(tl.float32) * scale
    offset = tl.load(bias + channel, mask=real, other=0.0).to(tl.float32) + (extra - centre) * factor
    for start in range(0, P, BP):
        pixel = start + tl.arange(0, BP)
        inside = (pixel[:, None] < P) & real[None, :]
        where = n * P * C + pixel[:, None] * C + channel[None, :]
        value = tl.load(x + where, mask=inside, other=0.0).to(tl.float32) * factor[None, :] + offset[None, :]
        if ACT:
            value = value * tl.sigmoid(value)
        tl.store(out + where, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _slope(x, slope, where, inside, extra, centre, scale, factor, offset, ACT: tl.constexpr):
    """Normalised values and the loss's slope in what the affine map makes of them."""
    value = (tl.load(x + where, mask=inside, other=0.0).to(tl.float32) + extra[None, :] - centre[None, :]) * scale[None, :]
    value = tl.where(inside, value, 0.0)
    gradient = tl.load(slope + where, mask=inside, other=0.0).to(tl.float32)
    if ACT:
        before = value * factor[None, :] + offset[None, :]
        gate = tl.sigmoid(before)
        gradient = gradient * gate * (1 + before * (1 - gate))
    return value, gradient


@triton.jit
def _normalise_backward(
    x,
    add,
    weight,
    bias,
    slope,
    out,
    out_add,
    sums,
    mean,
    rstd,
    P,
    C_UNITS,
    SPAN_UNITS,
    G,
    W,
    ADD: tl.constexpr,
    ACT: tl.constexpr,
    UNIT: tl.constexpr,
    BC: tl.constexpr,
    BP: tl.constexpr,
):
    C, span = C_UNITS * UNIT, SPAN_UNITS * UNIT
    n, block, c = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BC)
    channel = block * span + c
    group, real = channel // W, (c < span) & (channel < C)
    extra = tl.load(add + n * C + channel, mask=real, other=0.0).to(tl.float32) if ADD else tl.zeros([BC], tl.float32)
    centre = tl.load(mean + n * G + group, mask=real, other=0.0)
    scale = tl.load(rstd + n * G + group, mask=real, other=0.0)
    factor = tl.load(weight + channel, mask=real, other=0.0).to(tl.float32)
    offset = tl.load(bias + channel, mask=real, other=0.0).to(tl.float32)
    total, products = tl.zeros([BP, BC], tl.float32), tl.zeros([BP, BC], tl.float32)
    for start in range(0, P, BP):
        pixel = start + tl.arange(0, BP)
        inside = (pixel[:, None] < P) & real[None, :]
        where = n * P * C + pixel[:, None] * C + channel[None, :]
        value, gradient = _slope(x, slope, where, inside, extra, centre, scale, factor, offset, ACT)
        total += gradient
        products += gradient * value
    slope_bias, slope_weight = tl.sum(total, 0), tl.sum(products, 0)
    tl.store(sums + n * 2 * C + channel, slope_weight, mask=real)
    tl.store(sums + n * 2 * C + C + channel, slope_bias, mask=real)
    level = _of_groups(slope_bias * factor, group) / (P * W)
    tilt = _of_groups(slope_weight * factor, group) / (P * W)
    summed = tl.zeros([BP, BC], tl.float32)
    for start in range(0, P, BP):
        pixel = start + tl.arange(0, BP)
        inside = (pixel[:, None] < P) & real[None, :]
        where = n * P * C + pixel[:, None] * C + channel[None, :]
        value, gradient = _slope(x, slope, where, inside, extra, centre, scale, factor, offset, ACT)
        result = scale[None, :] * (gradient * factor[None, :] - level[None, :] - value * tilt[None, :])
        if ADD:
            summed += tl.where(inside, result, 0.0)
        tl.store(out + where, result.to(out.dtype.element_ty), mask=inside)
    if ADD:
        tl.store(out_add + n * C + channel, tl.sum(summed, 0).to(out_add.dtype.element_ty), mask=real)


@triton.jit
def _add(x, residual, bias, out, C, total, RESIDUAL: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    value = tl.load(x + at, mask=inside).to(tl.float32) + tl.load(bias + at % C, mask=inside).to(tl.float32)
    if RESIDUAL:
        value += tl.load(residual + at, mask=inside).to(tl.float32)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _sum_rows(x, out, M, EACH, C_UNITS, UNIT: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr):
    C, channel = C_UNITS * UNIT, tl.program_id(1) * BC + tl.arange(0, BC)
    total = tl.zeros([BP, BC], tl.float32)
    for start in range(0, EACH, BP):
        offset = start + tl.arange(0, BP)
        row = tl.program_id(0).to(tl.int64) * EACH + offset
        inside = (offset[:, None] < EACH) & (row[:, None] < M) & (channel[None, :] < C)
        total += tl.load(x + row[:, None] * C + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(out + tl.program_id(0) * C + channel, tl.sum(total, 0), mask=channel < C)


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def sum_rows(x: Tensor) -> Tensor:
    """The sum [C] of the rows of [M, C], one or more, in float32."""
    (m, c), unit = x.shape, UNIT if x.shape[1] % UNIT == 0 else 1
    programs = triton.cdiv(m, ROWS)
    out = torch.empty(programs, c, device=x.device, dtype=torch.float32)
    _sum_rows[programs, triton.cdiv(c, COLUMNS)](x, out, m, min(m, ROWS), c // unit, UNIT=unit, BC=COLUMNS, BP=ROWS // 8)
    return out[0] if programs == 1 else sum_rows(out)


class GroupNorm(torch.autograd.Function):
    """Group norm of [N, C, H, W] + ``add`` [N, C] (or None), then SiLU if ``act``; channels last."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, add: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, act: bool) -> Tensor:
        x = _last(x)
        (n, c, h, w), add = x.shape, None if add is None else add.contiguous()
        tiles = Tiles.of(c, groups, h * w)
        out, mean = torch.empty_like(x), torch.empty(n, groups, device=x.device, dtype=torch.float32)
        rstd = torch.empty_like(mean)
        ctx.grid, ctx.shape = (n, tiles.programs), (h * w, c // tiles.unit, tiles.span // tiles.unit, groups, tiles.width)
        ctx.tiles = {"ADD": add is not None, "ACT": act, "UNIT": tiles.unit, "BC": tiles.channels, "BP": tiles.pixels}
        warps = 8 if h * w > PIXELS else 4
        _normalise[ctx.grid](x, add, weight, bias, out, mean, rstd, *ctx.shape, eps, **ctx.tiles, num_warps=warps)
        ctx.save_for_backward(x, add, weight, bias, mean, rstd)
        return out

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        x, add, weight, bias, mean, rstd = ctx.saved_tensors
        n, c = x.shape[:2]
        out, sums = torch.empty_like(x), torch.empty(n, 2 * c, device=x.device, dtype=torch.float32)
        out_add = None if add is None else torch.empty_like(add)
        tiles = ctx.tiles | {"BP": min(PIXELS_BACKWARD, ctx.tiles["BP"])}
        _normalise_backward[ctx.grid](x, add, weight, bias, _last(slope), out, out_add, sums, mean, rstd, *ctx.shape, **tiles)
        slopes = sum_rows(sums).to(weight.dtype)
        return out, out_add, slopes[:c], slopes[c:], None, None, None


class AddBias(torch.autograd.Function):
    """[N, C, H, W] + ``bias`` [C] + ``residual`` [N, C, H, W] (or None); channels last."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
        x, residual = _last(x), None if residual is None else _last(residual)
        ctx.has_residual, out = residual is not None, torch.empty_like(x)
        grid = (triton.cdiv(x.numel(), FLAT),)
        _add[grid](x, residual, bias, out, x.shape[1], x.numel(), RESIDUAL=ctx.has_residual, BLOCK=FLAT)
        return out

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        last = _last(slope)
        rows = last.permute(0, 2, 3, 1).reshape(-1, last.shape[1])
        return last, sum_rows(rows).to(slope.dtype), last if ctx.has_residual else None


class Linear(torch.autograd.Function):
    """PyTorch's, whose slope of the bias takes longer than all the rest where there are few channels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        rows = slope.reshape(-1, slope.shape[-1]).contiguous()
        return slope @ weight, rows.t() @ x.reshape(-1, x.shape[-1]), sum_rows(rows).to(slope.dtype)
