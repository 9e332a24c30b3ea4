"""Elastic denoisers: many sub-networks in one set of weights, run by slicing, searched by gates, extracted as plain modules.

A branch is one residual branch of the network. Its inner units (groups or channels of a ResBlock, heads of an attention, channels of
a feed-forward) are ordered by importance, so that "keep k" means the first k, and an architecture is one small integer per site. The
residual stream keeps its shape, so no branch depends on another. One description of a branch (`Branch`) serves all four uses:
`ElasticDenoiser` (sliced execution), `gated` (differentiable masks), `extract` (small plain modules) and `reorder` (importance).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from workers.contracts import ArchitectureSpec, ElasticSite, SearchSpace


@dataclass(frozen=True)
class Cut:
    """A parameter that shrinks with its branch: units lie along ``dim``, ``lead`` times over.

    A scale-shift projection or a GEGLU holds every unit twice; a layer whose unit is one channel of each of G norm groups, G times.
    """

    parameter: str
    dim: int
    lead: int = 1


@dataclass(frozen=True)
class Branch:
    """One residual branch: its site, and everything that has to change when k of its ``units`` are kept."""

    site: ElasticSite
    units: int
    cuts: tuple[Cut, ...]
    readers: tuple[str, ...]
    """The modules that read the units (conv2, to_out, the feed-forward's last layer): gates go right before them, after every
    normalisation. (A gate before norm2 would leave norm2 a bias: 8.4% error.)"""
    output: str
    """The module whose output the branch adds to the residual stream."""
    channel_dim: int
    """Where a reader's input has its channels: 1 for a convolution, -1 for a linear layer."""
    drop: Callable[[Any], nn.Module]
    """The block without its branch: what remains is the shortcut."""
    counter: str | None = None
    """The attribute that counts the kept units, e.g. ``down_blocks.0.resnets.0.norm2.num_groups``, where there is one."""
    groups: int = 1
    """In how many runs of ``units`` the channels lie: units are ordered within each run, and kept alike in all of them."""
    norm: str | None = None
    """The GroupNorm whose statistics change with the kept units, because a unit is a part of its groups."""

    @property
    def block(self) -> str:
        return self.site.name


def search_space(branches: Sequence[Branch]) -> SearchSpace:
    return SearchSpace(tuple(branch.site for branch in branches))


def _take(parameter: Tensor, cut: Cut, units: int, keep: int) -> Tensor:
    """The first ``keep`` units of a parameter; a view where the layout allows it."""
    dim = cut.dim % parameter.dim()
    if cut.lead == 1:
        return parameter.narrow(dim, 0, parameter.shape[dim] // units * keep)
    return parameter.unflatten(dim, (cut.lead, units, -1)).narrow(dim + 1, 0, keep).flatten(dim, dim + 2)


def _set(model: nn.Module, path: str, value: Any) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, value)


@contextlib.contextmanager
def _structure(model: nn.Module, branches: Sequence[Branch], spec: ArchitectureSpec) -> Iterator[None]:
    """Within the context, blocks count their kept units and dropped blocks run their shortcut only."""
    dropped = []
    try:
        for branch in branches:
            keep = spec[branch.site.name]
            if keep == 0:
                block = model.get_submodule(branch.block)
                block.forward = branch.drop(block).forward
                dropped.append(block)
            elif branch.counter is not None:
                _set(model, branch.counter, keep)
        yield
    finally:
        for block in dropped:
            del block.forward
        for branch in branches:
            if branch.counter is not None:
                _set(model, branch.counter, branch.units)


class ElasticDenoiser(nn.Module):
    """A pretrained denoiser that runs any of its sub-networks, at that sub-network's cost.

    ``forward(sample [B, C, H, W], timestep [B] or scalar, spec)`` returns the predicted tensor [B, C, H, W].
    Parameters are used through slices, so gradients reach exactly the active part of the full weights.
    """

    def __init__(self, model: nn.Module, branches: Sequence[Branch]):
        super().__init__()
        self.model = model
        self.branches = tuple(branches)

    @property
    def space(self) -> SearchSpace:
        return search_space(self.branches)

    def forward(self, sample: Tensor, timestep: Any, spec: ArchitectureSpec | None = None, **kwargs: Any) -> Tensor:
        if spec is None:
            return self.model(sample, timestep, **kwargs).sample
        parameters = dict(self.model.named_parameters())
        sliced = {
            cut.parameter: _take(parameters[cut.parameter], cut, branch.units, spec[branch.site.name])
            for branch in self.branches
            if 0 < spec[branch.site.name] < branch.units
            for cut in branch.cuts
        }
        with _structure(self.model, self.branches, spec):
            return functional_call(self.model, sliced, (sample, timestep), kwargs).sample


@contextlib.contextmanager
def gated(model: nn.Module, branches: Sequence[Branch], gates: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Within the context, site ``s`` multiplies its units by ``gates[s][0]`` and its whole branch by ``gates[s][1]`` (scalar).

    A units gate is [units], or [groups, units] where every run of units has its own. With 0/1 gates the output equals that of the
    sliced and of the extracted sub-network. Gates must keep their gradient, so the dense network is computed: for search and
    importance, not for speed.
    """
    handles = []
    try:
        for branch in branches:
            if branch.site.name not in gates:
                continue
            units, keep = gates[branch.site.name]
            runs = units if units.dim() == 2 else units.expand(branch.groups, -1)

            def read(_: nn.Module, args: tuple[Tensor, ...], runs: Tensor = runs, dim: int = branch.channel_dim) -> tuple[Tensor, ...]:
                mask = _channels(runs, args[0].shape[dim]).to(args[0])
                return (args[0] * (mask[:, None, None] if dim == 1 else mask), *args[1:])

            def normalise(norm: Any, args: tuple[Tensor, ...], _: Tensor, runs: Tensor = runs) -> Tensor:
                return _weighted_group_norm(norm, args[0], _channels(runs, norm.num_channels))

            def add(_: nn.Module, __: tuple[Tensor, ...], output: Tensor, keep: Tensor = keep) -> Tensor:
                return output * keep.to(output.dtype)

            handles += [model.get_submodule(reader).register_forward_pre_hook(read) for reader in branch.readers]
            handles.append(model.get_submodule(branch.output).register_forward_hook(add))
            if branch.norm is not None:
                handles.append(model.get_submodule(branch.norm).register_forward_hook(normalise))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _channels(runs: Tensor, channels: int) -> Tensor:
    """Gates of units [groups, units] -> gates of channels [channels]."""
    return runs.repeat_interleave(channels // runs.numel(), dim=1).flatten()


def _weighted_group_norm(norm: nn.GroupNorm, x: Tensor, mask: Tensor) -> Tensor:
    """GroupNorm of [B, C, H, W] whose statistics count channel c ``mask[c]`` times: with 0/1 masks, the norm of the kept channels."""
    weight = mask.float().view(norm.num_groups, -1)
    weight = weight / weight.sum(1, keepdim=True).clamp_min(1e-6)
    groups = x.float().unflatten(1, (norm.num_groups, -1))
    mean = (groups.mean((-1, -2)) * weight).sum(2)[..., None, None, None]
    centred = groups - mean
    variance = (centred.square().mean((-1, -2)) * weight).sum(2)[..., None, None, None]
    normal = (centred * (variance + norm.eps).rsqrt()).flatten(1, 2).to(x.dtype)
    return normal * norm.weight[:, None, None] + norm.bias[:, None, None]


def extract(model: nn.Module, branches: Sequence[Branch], spec: ArchitectureSpec) -> nn.Module:
    """A copy of ``model`` that holds only the sub-network ``spec``: ordinary modules of the host library, fewer channels, no masks.

    Works on the meta device too, which is how a saved expert is rebuilt before its weights are read.
    Raises: InputError if ``spec`` does not fit the model's search space.
    """
    search_space(branches).check(spec)
    small = copy.deepcopy(model)
    for branch in branches:
        keep = spec[branch.site.name]
        if keep == 0:
            _set(small, branch.block, branch.drop(small.get_submodule(branch.block)))
        elif keep < branch.units:
            for cut in branch.cuts:
                parameter = small.get_parameter(cut.parameter)
                kept = _take(parameter.detach(), cut, branch.units, keep).clone()
                _set(small, cut.parameter, nn.Parameter(kept, parameter.requires_grad))
                _describe(small.get_submodule(cut.parameter.rpartition(".")[0]))
            if branch.counter is not None:
                _set(small, branch.counter, keep)
    return small


def _describe(module: nn.Module) -> None:
    """Make a shrunk layer's attributes tell its true sizes."""
    if isinstance(module, nn.Conv2d):
        module.out_channels, module.in_channels = module.weight.shape[:2]
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = module.weight.shape[0]


@torch.no_grad()
def reorder(model: nn.Module, branches: Sequence[Branch], orders: Mapping[str, Sequence[Sequence[int]]]) -> None:
    """Permute the units of each branch in place, most important first. The function of the network does not change.

    ``orders[site]``: [groups][units], one permutation per run of units.
    """
    device = next(model.parameters()).device
    for branch in branches:
        order = torch.as_tensor(orders[branch.site.name], device=device)
        for cut in branch.cuts:
            parameter = model.get_parameter(cut.parameter)
            runs = torch.arange(cut.lead, device=device)[:, None] * branch.units + order.repeat(cut.lead // branch.groups, 1)
            width = parameter.shape[cut.dim] // runs.numel()
            index = runs.flatten()[:, None] * width + torch.arange(width, device=device)
            parameter.copy_(parameter.index_select(cut.dim, index.flatten()))


def importance_order(
    model: nn.Module, branches: Sequence[Branch], losses: Iterator[Tensor] | Callable[[], Iterator[Tensor]], measure: str = "taylor"
) -> dict[str, list[list[int]]]:
    """Units of every branch, most important first, as `reorder` takes them: [groups][units].

    ``taylor``: mean over minibatches of the squared first-order change of the loss when the unit is gated off (dL/dgate);
    ``losses()`` yields one loss per minibatch, computed inside this function's gates.
    ``magnitude``: L2 norm of the weights that read the unit; no data needed.
    """
    if measure == "magnitude":
        scores = {b.site.name: sum((_by_unit(model.get_submodule(r), b) for r in b.readers), torch.zeros(())) for b in branches}
    else:
        device = next(model.parameters()).device
        ones = {b.site.name: torch.ones(b.groups, b.units, device=device, requires_grad=True) for b in branches}
        keep = torch.ones((), device=device)
        scores = {name: torch.zeros_like(one) for name, one in ones.items()}
        # statistics of a norm are those of the dense network here: one channel less hardly moves them
        with gated(model, [replace(b, norm=None) for b in branches], {name: (one, keep) for name, one in ones.items()}):
            for loss in losses() if callable(losses) else losses:
                for name, gradient in zip(ones, torch.autograd.grad(loss, list(ones.values())), strict=True):
                    scores[name] += gradient.square()
    return {name: torch.argsort(score, dim=1, descending=True, stable=True).tolist() for name, score in scores.items()}


def _by_unit(reader: nn.Module, branch: Branch) -> Tensor:
    """Squared weights that read each unit: [groups, units]."""
    weight = reader.get_parameter("weight").detach().cpu()
    return weight.unflatten(1, (branch.groups, branch.units, -1)).movedim((1, 2), (0, 1)).flatten(2).square().sum(2)
