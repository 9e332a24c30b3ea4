"""Where a mixture's experts wait: all on the device, or one (two, when the next is fetched ahead) there and the rest in host memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

MODES = ("all", "active", "prefetch")


class Residency:
    """Keeps one expert on the device, or with ``ahead`` also the one that a sampler asks for next. For sampling: weights are only read.

    Host memory holds every weight once, pinned for a GPU, and keeps it; what the device holds is a copy that is dropped, never written
    back. Copies are allocated on the stream that computes, so dropping them needs no wait. Timesteps descend, so every expert comes in
    once per image, and with ``ahead`` it comes in while the one before it computes.
    """

    def __init__(self, experts: Sequence[nn.Module], device: torch.device, ahead: bool) -> None:
        self.experts, self.device, self.ahead = list(experts), device, ahead
        self.arrivals = 0
        """Copies of an expert to the device so far."""
        self._last: int | None = None
        self._step = -1
        self._arriving: dict[int, Any] = {}
        self._stream: Any = None
        self._settle()

    @property
    def resident(self) -> list[int]:
        """Which experts are on the device, those on their way included."""
        return sorted(self._arriving)

    def fetch(self, k: int) -> None:
        """See that expert ``k`` is on the device, and nothing else but the next one on its way."""
        if self._last is not None and k != self._last:
            self._step = 1 if k > self._last else -1
        near = k + self._step
        wanted = {k, near} if self.ahead and 0 <= near < len(self.experts) else {k}
        for other in set(self._arriving) - wanted:
            self._leave(other)
        for other in sorted(wanted, key=lambda index: index != k):
            if other not in self._arriving:
                self._arrive(other, beside=other != k)
        if self._arriving[k] is not None:
            torch.cuda.current_stream(self.device).wait_event(self._arriving[k])
            self._arriving[k] = None
        self._last = k

    def release(self) -> None:
        """All experts back to host memory, where they can be converted, trained or moved."""
        for k in self.resident:
            self._leave(k)

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """What ``nn.Module._apply`` does, but a device only becomes the one that experts visit. One tensor at a time passes through it."""
        self.release()
        self.device = function(torch.empty(0, device=self.device)).device  # unless a device is named, it stays
        for expert in self.experts:
            expert._apply(lambda tensor: function(tensor).to("cpu"))
        self._settle()

    def _settle(self) -> None:
        """Host memory becomes where every weight stays."""
        self._homes: list[list[Tensor]] = []
        for expert in self.experts:
            for tensor in _tensors(expert):
                home = tensor.data.to("cpu")
                tensor.data = home.pin_memory() if self.device.type == "cuda" else home
            self._homes.append([tensor.data for tensor in _tensors(expert)])
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def _arrive(self, k: int, beside: bool) -> None:
        """``beside``: on a stream of its own, while the device computes."""
        copies = [torch.empty_like(home, device=self.device) for home in self._homes[k]]
        aside = beside and self._stream is not None
        if aside:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))  # which may still read what this memory held before
        with torch.cuda.stream(self._stream) if aside else contextlib.nullcontext():
            for copy, home in zip(copies, self._homes[k], strict=True):
                copy.copy_(home, non_blocking=True)
            self._arriving[k] = self._stream.record_event() if aside else None
        for tensor, copy in zip(_tensors(self.experts[k]), copies, strict=True):
            tensor.data = copy
        self.arrivals += 1

    def _leave(self, k: int) -> None:
        arriving = self._arriving.pop(k)
        if arriving is not None:  # its memory must not be given away while it is still written
            torch.cuda.current_stream(self.device).wait_event(arriving)
        for tensor, home in zip(_tensors(self.experts[k]), self._homes[k], strict=True):
            tensor.data = home

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        raise TypeError("a mixture whose experts come and go cannot be copied: call residency('all') first")


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
