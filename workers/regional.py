"""Regional compilation: the repeated blocks of a denoiser compiled one by one, once for all blocks of equal shapes.

A whole-model compile takes about a minute per sub-network. Sub-networks differ in the shapes of a few blocks only, so what was compiled
for one serves the next. Only speed depends on it: the compiled denoiser computes what the plain one computes.
"""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.utils import _pytree

from workers.branches import ShortcutResnet
from workers.rewrites import TransposedUpsample

REGIONS = (ResnetBlock2D, ShortcutResnet, Attention, Transformer2DModel, Upsample2D, TransposedUpsample, Downsample2D)


def regions(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules that are compiled, in the order of ``modules``."""
    if isinstance(module, REGIONS):
        yield module
        return
    for child in module.children():
        yield from regions(child)


class RegionCompiler:
    """Compiles denoisers in place. Keep one for all sub-networks of a model: a region whose like it has met is not compiled again.

    Every signature gets a code object of its own. Dynamo keeps what it compiled with the code object, so there is one variant each:
    no list of guards to walk through on every call, and no recompile limit behind which blocks would silently run uncompiled.
    """

    def __init__(self, backend: str | Callable[..., Any] = "inductor") -> None:
        self.backend = backend
        self.compiled: dict[Hashable, Callable[..., Any]] = {}

    def compile(self, model: nn.Module) -> nn.Module:
        """Make every region of ``model`` compile itself at its first call, for the inputs that it gets there. Returns ``model``."""
        for region in regions(model):
            region.forward = functools.partial(self._first_call, region)
        return model

    def _first_call(self, region: nn.Module, *args: Any, **kwargs: Any) -> Any:
        key = (*_signature(region), *map(_describe, _pytree.tree_leaves((args, sorted(kwargs.items())))))
        if key not in self.compiled:
            self.compiled[key] = torch.compile(_own_code(type(region).forward), dynamic=False, fullgraph=True, backend=self.backend)
        region.forward = functools.partial(self.compiled[key], region)
        with warnings.catch_warnings():  # of what dynamo found in diffusers' code, for those who write it
            warnings.simplefilter("ignore", UserWarning)
            return region.forward(*args, **kwargs)


def _own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that does what ``function`` does, with a code object that no other function has."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return types.FunctionType(forward.__code__.replace(), globals(), "forward", closure=forward.__closure__)


def _signature(region: nn.Module) -> Iterator[Hashable]:
    """All that a compiled region depends on: classes, plain settings and the layout of weights of all its modules."""
    for name, module in region.named_modules():
        plain = sorted((key, repr(value)) for key, value in vars(module).items() if isinstance(value, (bool, int, float, str)))
        yield name, type(module), *plain
    for name, tensor in (*region.named_parameters(), *region.named_buffers()):
        yield name, _describe(tensor)


def _describe(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype, str(value.device), value.requires_grad
    return repr(value)
