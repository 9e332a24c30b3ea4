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
"""Of a GPU, among which matrices are shared: each one's two dozen kernels are too small to fill it."""


class Optimizer:
    """The optimisers of one network, whose parameters have gradients that stay where they are."""

    def __init__(self, model: nn.Module, settings: TrainSettings):
        weights = list(model.parameters())
        chosen = _matrices(model) if settings.optimizer == "muon" else set()
        matrices = [i for i, weight in enumerate(weights) if weight in chosen]
        rest = [i for i in range(len(weights)) if i not in matrices]
        self._decay, self._weights = settings.weight_decay, weights
        self._matrices = [as_matrix(weights[i].data) for i in matrices]
        directions = {i: _direction(weights[i]) for i in matrices}
        self._directions = list[Tensor](directions.values())
        self._muons = [
            (torch.optim.Muon([directions[i] for i in share], lr=1.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"), share)
            for share in _shares(weights, matrices, STREAMS)
        ]
        self._adamw: torch.optim.AdamW | None = None
        self._parts: list[tuple[torch.optim.Optimizer, list[int]]] = [*self._muons]
        if rest:
            fused = weights[0].is_cuda
            self._adamw = torch.optim.AdamW([weights[i] for i in rest], lr=settings.learning_rate, weight_decay=self._decay, fused=fused)
            self._parts.append((self._adamw, rest))
        self._graph: Callable[[], None] | None = None

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Spend the gradients at a learning rate: about how far a number moves, whichever optimiser moves it."""
        if self._matrices:
            (self._graph or self._orthogonalise)()
            torch._foreach_mul_(self._matrices, 1 - rate * self._decay)
            torch._foreach_add_(self._matrices, self._directions, alpha=rate)
        if self._adamw is not None:
            self._adamw.param_groups[0]["lr"] = rate
            self._adamw.step()

    @torch.no_grad()
    def capture(self, graphs: Graphs) -> None:
        """Make a CUDA graph of Muon's part. What is remembered stays as it is, and from now on where it is."""
        if not self._matrices:
            return
        kept = [value.clone() for value in self._momenta()]
        self._graph = graphs.capture(self._orthogonalise)
        if kept:
            torch._foreach_copy_(self._momenta(), kept)
        else:
            torch._foreach_zero_(self._momenta())

    def release(self) -> None:
        """Let the graph go, which refers to this as this to it."""
        self._graph = None

    def _momenta(self) -> list[Tensor]:
        return [slots["momentum_buffer"] for muon, _ in self._muons for slots in muon.state.values() if slots]

    @torch.no_grad()
    def _orthogonalise(self) -> None:
        """Where matrices go at a learning rate of one: what a CUDA graph repeats knows no other rate."""
        torch._foreach_zero_(self._directions)
        if not self._matrices[0].is_cuda:
            for muon, _ in self._muons:
                muon.step()
            return
        here, lanes = torch.cuda.current_stream(), list(zip(self._muons, _streams(torch.cuda.current_device()), strict=False))
        for (muon, _), stream in lanes:
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
        """Remember what ``tensors`` gave, wherever and in whatever layout that was; before a graph is made, which knows places only."""
        assert self._graph is None
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


def _direction(weight: nn.Parameter) -> nn.Parameter:
    """What Muon takes for the matrix itself: zero before every step, and then where the matrix goes."""
    assert weight.grad is not None
    direction = nn.Parameter(torch.zeros_like(as_matrix(weight.data)))
    direction.grad = as_matrix(weight.grad)
    return direction


def _shares(weights: Sequence[Tensor], matrices: Sequence[int], count: int) -> list[list[int]]:
    """At most ``count`` lists of matrices that are about as much work each: the next one goes where there is least."""
    found, work = [list[int]() for _ in range(min(count, len(matrices)))], [0] * min(count, len(matrices))
    for i in sorted(matrices, key=lambda i: _work(weights[i]), reverse=True):
        least = work.index(min(work))
        found[least].append(i)
        work[least] += _work(weights[i])
    return found


def _work(weight: Tensor) -> int:
    """Of one Muon step, about: products of the matrix with its smaller side's square."""
    rows, columns = len(weight), weight[0].numel()
    return min(rows, columns) * rows * columns


@functools.cache
def _streams(device: int) -> tuple[torch.cuda.Stream, ...]:
    """The same ones for every network of a process: cuBLAS keeps memory for every stream that it meets."""
    return tuple(torch.cuda.Stream(device) for _ in range(STREAMS))


def _like(weight: Tensor, value: Tensor) -> Tensor:
    """What an optimiser keeps of a weight, in the weight's shape and layout: a fused one takes numbers as they lie in memory."""
    if value.numel() != weight.numel() or value.dim() == 0:
        return value
    found = torch.empty_like(weight)
    (found if value.shape == weight.shape else as_matrix(found)).copy_(value)
    return found
