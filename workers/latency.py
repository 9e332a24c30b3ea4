"""How long does every choice of every site take on this device? Measured inside whole networks, and checked against whole networks.

Many sites are measured at once: a network gives every site some choice, runs as users run it, and each site's block is timed where it
stands, among the neighbours, the clock and the launch queue of a real forward pass. The time of a sub-network is what all have in common
plus what its choices take; how well that holds is measured on random whole sub-networks, and kept with the table.
"""

from __future__ import annotations

import contextlib
import functools
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import diffusers
import numpy as np
import torch
from torch import Tensor, nn

from workers import families
from workers.contracts import ArchitectureSpec, ElasticSettings, Progress, SearchSpace, Timing, derive_seed, digest_of
from workers.elastic import Branch, extract, search_space
from workers.fused import fuse
from workers.graphs import Graphs
from workers.latency_table import LatencyIdentity, LatencyTable, LatencyValidation, find, table_path
from workers.regional import RegionCompiler
from workers.rewrites import apply
from workers.training import random_network

WEIGHT_STD = 0.02
"""Weights do not change the time, but zeros would: a chip that multiplies zeros draws less power and clocks higher."""


class Clock(Protocol):
    """Takes moments where the work is done. Spans may be read after ``wait`` only."""

    def mark(self) -> Any: ...
    def wait(self) -> None: ...
    def span_ms(self, start: Any, stop: Any) -> float: ...


def clock_of(device: str) -> Clock:
    return CudaClock() if device.startswith("cuda") else CpuClock()


def time_ms(run: Callable[[], object], clock: Clock) -> float:
    """Time of one of two passes in a row: the device may spend the first on what has changed, and the host runs ahead of the second."""
    run()
    start = clock.mark()
    run()
    stop = clock.mark()
    clock.wait()
    return clock.span_ms(start, stop)


class CpuClock:
    def mark(self) -> float:
        return time.perf_counter()

    def wait(self) -> None:
        pass

    def span_ms(self, start: float, stop: float) -> float:
        return 1e3 * (stop - start)


class CudaClock:
    """Events in the stream: the host runs ahead, as it does in sampling. One that a CUDA graph captures is taken anew by every replay."""

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True, external=True)
        event.record()
        return event

    def wait(self) -> None:
        torch.cuda.synchronize()

    def span_ms(self, start: torch.cuda.Event, stop: torch.cuda.Event) -> float:
        return start.elapsed_time(stop)


@dataclass
class Observation:
    """One sub-network and its times, one per visit, in ms: of the whole forward pass, and of every site's block during another one."""

    spec: ArchitectureSpec
    total_ms: list[float] = field(default_factory=list)
    site_ms: dict[str, list[float]] = field(default_factory=dict)

    @property
    def ms(self) -> float:
        return statistics.median(self.total_ms)


# --- which networks ---------------------------------------------------------------------------------------------------


FEWEST_NETWORKS = 24
"""Networks that a table is made from at least: where sites have few choices, each is measured in more of them."""


def covering_networks(space: SearchSpace, seed: int) -> list[ArchitectureSpec]:
    """Networks in which every choice of every site occurs twice or more, where there are that many networks; the dense one is the first.

    In some all sites have about the same rank, so that small and large networks occur; in the others ranks are mixed, so that every choice
    has different neighbours.
    """
    ranks = max(len(site.choices) for site in space.sites)
    rng = random.Random(derive_seed(seed, "latency", "covering"))
    networks = [{s.name: s.choices[round(rank * (len(s.choices) - 1) / max(1, ranks - 1))] for s in space.sites} for rank in range(ranks)]
    while len(networks) < max(2 * ranks, FEWEST_NETWORKS):
        turns = {site.name: rng.randrange(len(site.choices)) for site in space.sites}
        networks += [{s.name: s.choices[(rank + turns[s.name]) % len(s.choices)] for s in space.sites} for rank in range(ranks)]
    return list(dict.fromkeys([space.dense, *map(ArchitectureSpec, networks)]))


def random_networks(space: SearchSpace, count: int, seed: int) -> list[ArchitectureSpec]:
    """Sub-networks of random overall size: those that the prediction is checked on."""
    rng = random.Random(derive_seed(seed, "latency", "validation"))
    return [random_network(space, rng) for _ in range(count)]


# --- running them -----------------------------------------------------------------------------------------------------


class Weights:
    """Random weights that all sub-networks share, a storage per name: a hundred of them take the memory of one."""

    def __init__(self, device: str, dtype: torch.dtype, seed: int, channels_last: bool = False) -> None:
        self.dtype, self.channels_last = dtype, channels_last
        self.generator = torch.Generator(device).manual_seed(seed)
        self.storages: dict[str, Tensor] = {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        dtype, count = self.dtype if dtype.is_floating_point else dtype, int(np.prod(shape))
        if name not in self.storages or self.storages[name].numel() < count:
            values = torch.randn(count, generator=self.generator, device=self.generator.device) * WEIGHT_STD
            self.storages[name] = values.to(dtype)
        values = self.storages[name][:count]
        if self.channels_last and len(shape) == 4:
            return values.view(shape[0], *shape[2:], shape[1]).permute(0, 3, 1, 2)
        return values.view(*shape)

    def fill(self, model: nn.Module) -> nn.Module:
        """Give a model of the meta device weights. Returns it."""
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            parent, _, attribute = name.rpartition(".")
            values = self.take(name, tensor.shape, tensor.dtype)
            kept = nn.Parameter(values, requires_grad=False) if isinstance(tensor, nn.Parameter) else values
            setattr(model.get_submodule(parent), attribute, kept)
        return model


@contextlib.contextmanager
def _marked(model: nn.Module, branches: Sequence[Branch], clock: Clock) -> Iterator[dict[str, list[Any]]]:
    """Within the context, a forward pass puts the moments in which every site's block starts and stops into the dictionary."""
    marks: dict[str, list[Any]] = {branch.site.name: [] for branch in branches}
    handles = []
    for branch in branches:
        block, moments = model.get_submodule(branch.block), marks[branch.site.name]

        def mark(*_: Any, moments: list[Any] = moments) -> None:
            moments.append(clock.mark())

        handles += [block.register_forward_pre_hook(mark), block.register_forward_hook(mark)]
    try:
        yield marks
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Passes:
    """How a network is run: ``whole`` is a forward pass, ``parts`` another one, which gives the moments that ``_marked`` describes."""

    whole: Callable[[], object]
    parts: Callable[[], dict[str, list[Any]]]


def _passes(model: nn.Module, inputs: Any, branches: Sequence[Branch], clock: Clock, graphs: Graphs | None) -> Passes:
    """A network's passes, warmed up. No hook runs in a replay: one graph holds the network with the moments, another the network alone."""
    args, kwargs = inputs
    run = functools.partial(model, *args, **kwargs)
    if graphs is not None:
        with _marked(model, branches, clock) as marks:
            replay_marked = graphs.capture(run)
        captured = {site: moments[-2:] for site, moments in marks.items()}  # those before were of the warm-up

        def replayed() -> dict[str, list[Any]]:
            replay_marked()
            return captured

        return Passes(graphs.capture(run), replayed)

    def marked() -> dict[str, list[Any]]:
        with _marked(model, branches, clock) as marks:
            run()
        return marks

    run()
    return Passes(run, marked)


def _visit(observation: Observation, passes: Passes, clock: Clock) -> None:
    """Three forward passes in a row: one that the device may spend on the change of network, one timed whole, one timed in parts."""
    passes.whole()
    start = clock.mark()
    passes.whole()
    stop = clock.mark()
    marks = passes.parts()
    clock.wait()
    observation.total_ms.append(clock.span_ms(start, stop))
    for site, (first, last) in marks.items():
        observation.site_ms.setdefault(site, []).append(clock.span_ms(first, last))


@torch.no_grad()
def observe(
    specs: Sequence[ArchitectureSpec],
    model: nn.Module,
    branches: Sequence[Branch],
    inputs: Any,
    *,
    timing: Timing,
    weights: Weights,
    compiler: RegionCompiler | None,
    graphs: Graphs | None,
    clock: Clock,
    visits: int,
    seed: int,
    on_step: Callable[[int, int], None],
) -> list[Observation]:
    """Time sub-networks of ``model`` (on the meta device), each ``visits`` times, in a new order each time, so that a clock that drifts
    or a neighbour that interferes does not meet the same ones. ``on_step(done, all)``."""
    found, networks, steps = [Observation(spec) for spec in specs], [], len(specs) * (1 + visits)
    for spec in specs:
        small = weights.fill(apply(extract(model, branches, spec), timing.rewrites)).eval()
        if timing.fused_kernels:
            fuse(small)
        networks.append(_passes(small if compiler is None else compiler.compile(small), inputs, branches, clock, graphs))
        clock.wait()
        on_step(len(networks), steps)
    for visit in range(visits):
        order = random.Random(derive_seed(seed, "latency", "order", visit)).sample(range(len(specs)), len(specs))
        for step, i in enumerate(order, 1 + len(specs) * (1 + visit)):
            _visit(found[i], networks[i], clock)
            on_step(step, steps)
    return found


# --- the table --------------------------------------------------------------------------------------------------------


def fit(observations: Sequence[Observation]) -> tuple[float, dict[str, dict[str, float]]]:
    """(rest_ms, ms of every site's choices), such that rest + choices is nearest to the networks' totals, in relative least squares.

    A choice takes the median of all its times. One factor common to all sites and the rest are fitted: what a block costs its neighbours
    (launches, caches) lies outside of the block, and grows with it. Neither is negative: it is 0 then, and the other one fitted alone.
    """
    times: dict[str, dict[int, list[float]]] = {}
    for seen in observations:
        for site, found in seen.site_ms.items():
            times.setdefault(site, {}).setdefault(seen.spec[site], []).extend(found)
    blocks = {site: {choice: statistics.median(row[choice]) for choice in sorted(row)} for site, row in times.items()}
    totals = np.array([seen.ms for seen in observations])
    sums = np.array([sum(row[seen.spec[site]] for site, row in blocks.items()) for seen in observations])
    of_rest, of_blocks = 1 / totals, sums / totals
    rest, factor = np.linalg.lstsq(np.stack([of_rest, of_blocks], 1), np.ones(len(totals)), rcond=None)[0]
    if rest < 0:
        rest, factor = 0.0, of_blocks.sum() / (of_blocks @ of_blocks)
    elif factor < 0:
        rest, factor = of_rest.sum() / (of_rest @ of_rest), 0.0
    return float(rest), {site: {str(choice): float(factor * ms) for choice, ms in row.items()} for site, row in blocks.items()}


def tabulate(identity: LatencyIdentity, measured: Sequence[Observation], unseen: Sequence[Observation]) -> LatencyTable:
    """The table of ``measured``, the dense network first; its prediction error over ``unseen`` networks."""
    rest, sites = fit(measured)
    table = LatencyTable(identity, rest, sites, measured[0].ms, LatencyValidation(0, 0.0, 0.0))
    errors = [abs(table.predict(seen.spec.choices) / seen.ms - 1) for seen in unseen]
    return replace(table, validation=LatencyValidation(len(errors), float(np.median(errors)), float(np.percentile(errors, 95))))


def meta_model(config: dict[str, Any], settings: ElasticSettings) -> tuple[nn.Module, tuple[Branch, ...]]:
    """The dense denoiser without weights, and its elastic branches."""
    with torch.device("meta"):
        model = families.build(config).eval()
    return model, families.family_of_config(config).sites(model, settings)


def identity_of(config: dict[str, Any], settings: ElasticSettings, device: str, timing: Timing) -> LatencyIdentity:
    """What a table measured here and now would hold for. ``device``: cpu or cuda."""
    space = search_space(meta_model(config, settings)[1])
    plain = {key: value for key, value in config.items() if key == "_class_name" or not key.startswith("_")}
    return LatencyIdentity(
        device=device_name(device),
        dtype=timing.dtype,
        batch=timing.batch,
        sample_size=config["sample_size"],
        compiled=timing.compiled,
        architecture=digest_of({"config": plain, "space": space.to_json()}),
        torch=torch.__version__,
        diffusers=diffusers.__version__,
        cuda=torch.version.cuda if device.startswith("cuda") else None,
        rewrites=tuple(sorted(timing.rewrites)),
        cuda_graphs=timing.cuda_graphs,
        fused_kernels=timing.fused_kernels,
    )


def device_name(device: str) -> str:
    """Of the GPU; of the processor and how many of its threads are used: times of two names are of two things."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        facts = dict(line.partition(":")[::2] for line in Path("/proc/cpuinfo").read_text().splitlines())
        name = {key.strip(): value.strip() for key, value in facts.items()}.get("model name", name)
    return f"{name}, threads: {torch.get_num_threads()}"


def measure(
    config: dict[str, Any],
    settings: ElasticSettings,
    device: str,
    timing: Timing,
    *,
    visits: int = 7,
    validation_networks: int = 30,
    seed: int = 0,
    on_progress: Callable[[Progress], None] = lambda event: None,
    clock: Clock | None = None,
) -> LatencyTable:
    """Measure the table of every site choice of a denoiser, and its error on ``validation_networks`` random sub-networks.

    ``device``: cpu or cuda. Every network is visited ``visits`` times. Nothing else should run on the device meanwhile.
    """
    identity, dtype = identity_of(config, settings, device, timing), getattr(torch, timing.dtype)
    model, branches = meta_model(config, settings)
    covering = covering_networks(search_space(branches), seed)
    unseen = random_networks(search_space(branches), validation_networks, seed)
    started = time.monotonic()

    def on_step(step: int, steps: int) -> None:
        on_progress(Progress("profile", f"batch {timing.batch}", step, steps, seconds=time.monotonic() - started))

    found = observe(
        [*covering, *unseen],
        model,
        branches,
        families.example_inputs(config, timing.batch, device, dtype),
        timing=timing,
        weights=Weights(device, dtype, derive_seed(seed, "latency", "weights"), timing.fused_kernels),
        compiler=RegionCompiler() if timing.compiled else None,
        graphs=Graphs() if timing.cuda_graphs else None,
        clock=clock or clock_of(device),
        visits=visits,
        seed=seed,
        on_step=on_step,
    )
    return tabulate(identity, found[: len(covering)], found[len(covering) :])


def find_or_measure(
    folder: Path,
    config: dict[str, Any],
    settings: ElasticSettings,
    device: str,
    timing: Timing,
    *,
    on_progress: Callable[[Progress], None] = lambda event: None,
) -> LatencyTable:
    """The table of this denoiser, here and now: from ``folder`` if it was measured before, else measured and put there.

    Raises: InputError if the file that should hold it is damaged or another's.
    """
    identity = identity_of(config, settings, device, timing)
    table = find(folder, identity)
    if table is None:
        table = measure(config, settings, device, timing, on_progress=on_progress)
        table.save(table_path(folder, identity))
    return table
