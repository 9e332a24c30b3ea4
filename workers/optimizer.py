"""What turns gradients into steps: Muon for the matrices of a network, AdamW for all else.

Muon lets all directions of a matrix learn at one rate, also those whose gradients are small; on pruned emoji experts it came to the error
of AdamW in two thirds of its steps. A convolution counts as a matrix of its output channels by all that each of them reads.
https://kellerjordan.github.io/posts/muon
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from workers.contracts import TrainSettings

LEAST = 16
"""Channels, on both sides, of a matrix: what reads or makes an image is none."""


class Optimizer:
    """The optimisers of one network, whose parameters have gradients that stay where they are."""

    def __init__(self, model: nn.Module, settings: TrainSettings):
        weights = list(model.parameters())
        chosen = _matrices(model) if settings.optimizer == "muon" else set()
        matrices = [i for i, weight in enumerate(weights) if weight in chosen]
        rest = [i for i in range(len(weights)) if i not in matrices]
        rate, decay = settings.learning_rate, settings.weight_decay
        self._weights, self._parts = weights, list[tuple[torch.optim.Optimizer, list[int]]]()
        if matrices:
            views = [_view(weights[i]) for i in matrices]
            self._parts.append((torch.optim.Muon(views, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"), matrices))
        if rest:
            fused = weights[0].is_cuda
            self._parts.append((torch.optim.AdamW([weights[i] for i in rest], lr=rate, weight_decay=decay, fused=fused), rest))

    def step(self, rate: float) -> None:
        """Spend the gradients at a learning rate: about how far a number moves, whichever optimiser moves it."""
        for optimizer, _ in self._parts:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()

    def tensors(self) -> dict[str, Tensor]:
        """What is remembered of every parameter, as ``index.slot``, in the shape of the parameter."""
        found: dict[str, Tensor] = {}
        for optimizer, indices in self._parts:
            for place, slots in optimizer.state_dict()["state"].items():
                weight = self._weights[indices[place]]
                found |= {f"{indices[place]}.{slot}": _like(weight, torch.as_tensor(value)) for slot, value in slots.items()}
        return found

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Remember what ``tensors`` gave, wherever and in whatever layout that was."""
        for optimizer, indices in self._parts:
            slots: dict[int, dict[str, Tensor]] = {place: {} for place in range(len(indices))}
            for name, value in state.items():
                index, _, slot = name.partition(".")
                if int(index) in indices:
                    value = _like(self._weights[int(index)], value)
                    is_matrix = isinstance(optimizer, torch.optim.Muon)
                    slots[indices.index(int(index))][slot] = as_matrix(value) if is_matrix else value
            optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})


def as_matrix(weight: Tensor) -> Tensor:
    """A view of [out, ...] as [out, rest], its columns in the order of memory: Muon does not care which."""
    order = sorted(range(1, weight.dim()), key=weight.stride, reverse=True)
    return weight.permute(0, *order).view(len(weight), -1)


def _matrices(model: nn.Module) -> set[Tensor]:
    """The weights of convolutions and linear layers between features."""
    layers = (module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear)))
    return {layer.weight for layer in layers if min(layer.weight.shape[:2]) >= LEAST}


def _view(weight: nn.Parameter) -> nn.Parameter:
    assert weight.grad is not None
    view = nn.Parameter(as_matrix(weight.data))
    view.grad = as_matrix(weight.grad)
    return view


def _like(weight: Tensor, value: Tensor) -> Tensor:
    """What an optimiser keeps of a weight, in the weight's shape and layout: a fused one takes numbers as they lie in memory."""
    if value.numel() != weight.numel() or value.dim() == 0:
        return value
    found = torch.empty_like(weight)
    (found if value.shape == weight.shape else as_matrix(found)).copy_(value)
    return found
