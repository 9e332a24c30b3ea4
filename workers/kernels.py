"""GPU kernels for what surrounds a U-Net's convolutions: GroupNorm with SiLU, and biases, on samples laid out channels last.

PyTorch's GroupNorm wants channels first, cuDNN's convolutions channels last: half of a small U-Net's time goes into turning one into the
other, and into biases added, and summed up again, by kernels of their own. torch.compile does as well, but compiles every sub-network anew;
these take any width. They compute in float32 whatever the samples' precision.
Legend: N samples, P pixels, C channels in G groups of W; samples are [N, C, H, W] in memory as [N, P, C].
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

CHANNELS, PIXELS, FLAT = 64, 64, 1024
"""A tile has so many channels (more if a group has) and pixels; elementwise work goes in runs of FLAT numbers."""
ROWS = 1024
"""Pixels whose channels one program sums up."""


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
    C,
    G,
    W,
    eps,
    ADD: tl.constexpr,
    ACT: tl.constexpr,
    GB: tl.constexpr,
    BC: tl.constexpr,
    BP: tl.constexpr,
):
    n, block, c = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BC)
    channel, group = block * GB * W + c, c // W
    real = (c < GB * W) & (channel < C)
    extra = tl.load(add + n * C + channel, mask=real, other=0.0).to(tl.float32) if ADD else tl.zeros([BC], tl.float32)
    total, squares = tl.zeros([BC], tl.float32), tl.zeros([BC], tl.float32)
    for start in range(0, P, BP):
        pixel = start + tl.arange(0, BP)
        inside = (pixel[:, None] < P) & real[None, :]
        value = tl.load(x + n * P * C + pixel[:, None] * C + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        value = tl.where(inside, value + extra[None, :], 0.0)
        total += tl.sum(value, 0)
        squares += tl.sum(value * value, 0)
    centre = _of_groups(total, group) / (P * W)
    scale = tl.rsqrt(tl.maximum(_of_groups(squares, group) / (P * W) - centre * centre, 0.0) + eps)
    first = real & (c % W == 0)
    tl.store(mean + n * G + block * GB + group, centre, mask=first)
    tl.store(rstd + n * G + block * GB + group, scale, mask=first)
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
    C,
    G,
    W,
    N,
    ADD: tl.constexpr,
    ACT: tl.constexpr,
    GB: tl.constexpr,
    BC: tl.constexpr,
    BP: tl.constexpr,
):
    n, block, c = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BC)
    channel, group = block * GB * W + c, c // W
    real = (c < GB * W) & (channel < C)
    extra = tl.load(add + n * C + channel, mask=real, other=0.0).to(tl.float32) if ADD else tl.zeros([BC], tl.float32)
    centre = tl.load(mean + n * G + block * GB + group, mask=real, other=0.0)
    scale = tl.load(rstd + n * G + block * GB + group, mask=real, other=0.0)
    factor = tl.load(weight + channel, mask=real, other=0.0).to(tl.float32)
    offset = tl.load(bias + channel, mask=real, other=0.0).to(tl.float32)
    total, products = tl.zeros([BC], tl.float32), tl.zeros([BC], tl.float32)
    for start in range(0, P, BP):
        pixel = start + tl.arange(0, BP)
        inside = (pixel[:, None] < P) & real[None, :]
        where = n * P * C + pixel[:, None] * C + channel[None, :]
        value, gradient = _slope(x, slope, where, inside, extra, centre, scale, factor, offset, ACT)
        total += tl.sum(gradient, 0)
        products += tl.sum(gradient * value, 0)
    tl.store(sums + n * C + channel, products, mask=real)
    tl.store(sums + (N + n) * C + channel, total, mask=real)
    level = _of_groups(total * factor, group) / (P * W)
    tilt = _of_groups(products * factor, group) / (P * W)
    summed = tl.zeros([BC], tl.float32)
    for start in range(0, P, BP):
        pixel = start + tl.arange(0, BP)
        inside = (pixel[:, None] < P) & real[None, :]
        where = n * P * C + pixel[:, None] * C + channel[None, :]
        value, gradient = _slope(x, slope, where, inside, extra, centre, scale, factor, offset, ACT)
        result = scale[None, :] * (gradient * factor[None, :] - level[None, :] - value * tilt[None, :])
        if ADD:
            summed += tl.sum(tl.where(inside, result, 0.0), 0)
        tl.store(out + where, result.to(out.dtype.element_ty), mask=inside)
    if ADD:
        tl.store(out_add + n * C + channel, summed.to(out_add.dtype.element_ty), mask=real)


@triton.jit
def _add(x, residual, bias, out, C, total, RESIDUAL: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    value = tl.load(x + at, mask=inside).to(tl.float32) + tl.load(bias + at % C, mask=inside).to(tl.float32)
    if RESIDUAL:
        value += tl.load(residual + at, mask=inside).to(tl.float32)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _sum_rows(x, out, M, C, ROWS: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr):
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    total = tl.zeros([BC], tl.float32)
    for start in range(0, ROWS, BP):
        row = tl.program_id(0).to(tl.int64) * ROWS + start + tl.arange(0, BP)
        inside = (row[:, None] < M) & (channel[None, :] < C)
        total += tl.sum(tl.load(x + row[:, None] * C + channel[None, :], mask=inside, other=0.0).to(tl.float32), 0)
    tl.store(out + tl.program_id(0) * C + channel, total, mask=channel < C)


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _tiles(channels: int, groups: int) -> tuple[int, int, int]:
    """(channels of a group, groups of a program, channels of its tile): as many groups as fit into a tile, alike for all programs."""
    width = channels // groups
    tile = max(CHANNELS, triton.next_power_of_2(width))
    programs = triton.cdiv(groups, tile // width)
    return width, triton.cdiv(groups, programs), tile


class GroupNorm(torch.autograd.Function):
    """Group norm of [N, C, H, W] + ``add`` [N, C] (or None), then SiLU if ``act``; channels last."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, add: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, act: bool) -> Tensor:
        x = _last(x)
        (n, c, h, w), add = x.shape, None if add is None else add.contiguous()
        width, each, tile = _tiles(c, groups)
        out, mean = torch.empty_like(x), torch.empty(n, groups, device=x.device, dtype=torch.float32)
        rstd = torch.empty_like(mean)
        tiles = {"ADD": add is not None, "ACT": act, "GB": each, "BC": tile, "BP": PIXELS}
        _normalise[n, triton.cdiv(groups, each)](x, add, weight, bias, out, mean, rstd, h * w, c, groups, width, eps, **tiles)
        ctx.save_for_backward(x, add, weight, bias, mean, rstd)
        ctx.tiles, ctx.groups, ctx.width = tiles, groups, width
        return out

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        x, add, weight, bias, mean, rstd = ctx.saved_tensors
        n, c, h, w = x.shape
        out, sums = torch.empty_like(x), torch.empty(2, n, c, device=x.device, dtype=torch.float32)
        out_add = None if add is None else torch.empty_like(add)
        grid = n, triton.cdiv(ctx.groups, ctx.tiles["GB"])
        shape = h * w, c, ctx.groups, ctx.width, n
        _normalise_backward[grid](x, add, weight, bias, _last(slope), out, out_add, sums, mean, rstd, *shape, **ctx.tiles)
        slopes = sums.sum(1).to(weight.dtype)
        return out, out_add, slopes[0], slopes[1], None, None, None


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
        n, c, h, w = last.shape
        programs = triton.cdiv(n * h * w, ROWS)
        sums = torch.empty(programs, c, device=slope.device, dtype=torch.float32)
        _sum_rows[programs, triton.cdiv(c, CHANNELS)](last, sums, n * h * w, c, ROWS=ROWS, BC=CHANNELS, BP=PIXELS)
        return last, sums.sum(0).to(slope.dtype), last if ctx.has_residual else None
