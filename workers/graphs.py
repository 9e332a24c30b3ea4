"""Work of a GPU as CUDA graphs: what was captured once is launched whole, without the host between one kernel and the next.

Inputs and outputs stay where they are. What is captured may go on in other streams, if it comes back from them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

WARM_UP = 2
"""Runs on the capturing stream before a capture: in them kernels are loaded and chosen, which no capture allows."""


class Graphs:
    """Captures work on the current GPU. All graphs share the memory of their intermediates: none may run while another does."""

    def __init__(self) -> None:
        self.stream = _capturing_stream()
        self.pool = torch.cuda.graph_pool_handle()

    def capture(self, run: Callable[[], object]) -> Callable[[], None]:
        """A function that does on the current stream what ``run`` did there, and keeps all that ``run`` refers to.

        ``run`` must neither wait for the device nor copy from the host, but for what it does the first time only.
        """
        run()  # blocks that compile themselves do so here, in no particular stream
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(WARM_UP):
                run()
        torch.cuda.current_stream().wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            run()

        def replay(kept: object = run) -> None:  # a graph knows addresses only: weights have to live as long
            graph.replay()

        return replay


@functools.cache
def _capturing_stream() -> torch.cuda.Stream:
    """One for all captures of a process. cuBLAS keeps memory for every stream that it meets: it meets this one before anybody counts."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        one = torch.ones(1, 1, device="cuda")
        torch.mm(one, one)
    stream.synchronize()
    return stream
