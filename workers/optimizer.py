"""What turns gradients into steps: Muon for the matrices of a network, AdamW for all else.

Muon lets all directions of a matrix learn at one rate, also those whose gradients are small; on pruned emoji experts it came to the error
of AdamW in two thirds of its steps. A convolution counts as a matrix of its output channels by all that each of them reads.
https://kellerjordan.github.io/posts/muon
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from workers.contracts import TrainSettings
from workers.graphs import Graphs

LEAST = 16
"""Channels, on both sides, of a matrix: what reads or makes an image is none."""
STREAMS = 8
"""Of a GPU, on which matrices take their turns: each one's two dozen kernels are too small to fill it."""


class Optimizer:
    """The optimisers of one network, whose parameters have gradients that stay where they are."""

    def __init__(self, model: nn.Module, settings: TrainSettings):
        weights = list(model.parameters())
        chosen = _matrices(model) if settings.optimizer == "muon" else set()
        matrices = [i for i, weight in enumerate(weights) if weight in chosen]
        rest = [i for i in range(len(weights)) if i not in matrices]
        cuda = weights[0].is_cuda
        self._decay, self._weights, self._parts = settings.weight_decay, weights, list[tuple[torch.optim.Optimizer, list[int]]]()
        self._matrices = [as_matrix(weights[i].data) for i in matrices]
        moves = {i: _move(weights[i]) for i in matrices}
        self._moves = list[Tensor](moves.values())
        self._move: Callable[[], None] = self._muon
        self._streams = _streams() if cuda and matrices else ()
        self._muons: list[torch.optim.Muon] = []
        for share in _shares(weights, matrices, max(1, len(self._streams))):
            self._muons.append(torch.optim.Muon([moves[i] for i in share], lr=1.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
            self._parts.append((self._muons[-1], share))
        self._adamw = None
        if rest:
            self._adamw = torch.optim.AdamW([weights[i] for i in rest], lr=settings.learning_rate, weight_decay=self._decay, fused=cuda)
            self._parts.append((self._adamw, rest))

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Spend the gradients at a learning rate: about how far a number moves, whichever optimiser moves it."""
        if self._matrices:
            self._move()
            torch._foreach_mul_(self._matrices, 1 - rate * self._decay)
            torch._foreach_add_(self._matrices, self._moves, alpha=rate)
        if self._adamw is not None:
            self._adamw.param_groups[0]["lr"] = rate
            self._adamw.step()

    @torch.no_grad()
    def capture(self, graphs: Graphs) -> None:
        """Make a CUDA graph of Muon's part. What is remembered stays as it is."""
        if not self._matrices:
            return
        kept = [value.clone() for value in self._momenta()]
        self._move = graphs.capture(self._muon)
        if kept:
            torch._foreach_copy_(self._momenta(), kept)
        else:
            torch._foreach_zero_(self._momenta())

    def release(self) -> None:
        """Let the graph go, which refers to this as this to it."""
        self._move = self._muon

    def _momenta(self) -> list[Tensor]:
        return [slots["momentum_buffer"] for muon in self._muons for slots in muon.state.values() if slots]

    @torch.no_grad()
    def _muon(self) -> None:
        """Where matrices go at a learning rate of one: what a CUDA graph repeats knows no other rate."""
        torch._foreach_zero_(self._moves)
        if not self._streams:
            self._muons[0].step()
            return
        here, lanes = torch.cuda.current_stream(), list(zip(self._muons, self._streams, strict=False))
        for muon, stream in lanes:
            stream.wait_stream(here)
            with torch.cuda.stream(stream):
                muon.step()
        for _, stream in lanes:
            here.wait_stream(stream)

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


def _move(weight: nn.Parameter) -> nn.Parameter:
    """What Muon takes for the matrix itself: it starts at zero in every step and ends at how far the matrix goes."""
    assert weight.grad is not None
    move = nn.Parameter(torch.zeros_like(as_matrix(weight.data)))
    move.grad = as_matrix(weight.grad)
    return move


def _shares(weights: Sequence[Tensor], matrices: Sequence[int], count: int) -> list[list[int]]:
    """At most ``count`` lists of matrices, of about the same size in all."""
    ordered = sorted(matrices, key=lambda i: weights[i].numel(), reverse=True)
    return [ordered[k::count] for k in range(min(count, len(ordered)))]


@functools.cache
def _streams() -> tuple[torch.cuda.Stream, ...]:
    """The same ones for every network of a process: cuBLAS keeps memory for every stream that it meets."""
    return tuple(torch.cuda.Stream() for _ in range(STREAMS))


def _like(weight: Tensor, value: Tensor) -> Tensor:
    """What an optimiser keeps of a weight, in the weight's shape and layout: a fused one takes numbers as they lie in memory."""
    if value.numel() != weight.numel() or value.dim() == 0:
        return value
    found = torch.empty_like(weight)
    (found if value.shape == weight.shape else as_matrix(found)).copy_(value)
    return found
