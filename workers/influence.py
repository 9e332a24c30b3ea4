"""How much does an error of each expert count in the samples? Measured: one expert at a time is replaced by a narrow sub-network of it.

All else being dense, how far the samples move from dense's of the same noise, per unit of the sub-network's error, tells that expert's
influence: its root does, as far as it is to be trusted. A noise schedule cannot tell it: where all is noise a small error sends the sampler
down another path, near the clean end it stays where it was made. Distances are taken in what the dense denoiser itself makes of the
samples, so no other network is needed.
Legend: n samples [n, C, H, W] in the denoiser's scale; K experts; d features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from workers.conditioning import Conditioner
from workers.diffusion import make_sampler
from workers.frechet import Statistics, frechet_distance
from workers.timesteps import Partition

STEPS = 25
"""Most steps that samples are drawn with here: what the errors of an interval add up to hardly depends on how many there are."""
ERROR = 0.1
"""Of the narrow sub-networks, as a part of dense's: about alike for all experts, since samples move more than twice as far for twice the
error."""
LEAST, MOST = 0.25, 4.0
"""Bounds of an influence relative to the mean: a few hundred samples do not tell more."""
TRUST = 0.5
"""Power of a measured influence that is believed. Where distances in these features differ between experts of one run by a factor, those in
ResNet-56 features differed by its power of .54 (CIFAR-10 and emoji, experts after 15 to 240 steps; correlation of the logarithms .68)."""
DIRECTIONS = 64
"""Features are compared in at most so many directions, those in which dense's vary most."""


def drawn_with(sampler: str, steps: int) -> tuple[str, int]:
    """The sampler, and its steps, that samples are drawn with here to tell what errors count under another one."""
    return sampler if sampler.startswith("ddim") else "ddim", min(steps, STEPS)


@dataclass(frozen=True)
class Probe:
    """The same n samples, drawn by DDIM without added noise: by dense, or with another network in one interval."""

    dense: nn.Module
    levels: Sequence[str]
    """Modules of the dense denoiser whose outputs are its view of the samples."""
    conditioner: Conditioner
    config: Mapping[str, Any]
    """Of the model's scheduler."""
    partition: Partition
    sampler: str
    steps: int
    guidance_scale: float
    noise: Tensor
    """[n, C, H, W], what the samples are drawn from."""
    labels: Tensor | None
    """Their classes [n], if there are any."""
    batch: int

    def entries(self) -> list[int | None]:
        """The first step that each expert serves; None if it serves none."""
        served = [self.partition.index_of(float(t)) for t in self._sampler().timesteps]
        return [served.index(k) if k in served else None for k in range(len(self.partition))]

    def draw_dense(self) -> dict[str, np.ndarray]:
        """Dense's ``samples``, their features, ``features i`` [n, d], and its states where expert k takes over, ``state k``."""
        found: dict[str, list[Tensor]] = {}
        for rows in self.chunks():
            for step, x in enumerate(self._follow(self.noise[rows], rows, {})):
                for k, entry in enumerate(self.entries()):
                    if entry == step:
                        found.setdefault(f"state {k}", []).append(x)
            found.setdefault("samples", []).append(x)
            for i, level in enumerate(self.view(x, rows)):
                found.setdefault(f"features {i}", []).append(level)
        return {name: torch.cat(parts).cpu().numpy() for name, parts in found.items()}

    def distance(self, networks: Mapping[int, nn.Module], dense: Mapping[str, np.ndarray]) -> float | None:
        """How far the samples move if ``networks`` serve some experts' intervals (`moved`); None if no step falls into those."""
        samples = self.draw(networks, dense)
        if samples is None:
            return None
        views = zip(*(self.view(samples[rows], rows) for rows in self.chunks()), strict=True)
        mine = [torch.cat(parts).cpu().numpy() for parts in views]
        return moved(mine, [dense[name] for name in dense if name.startswith("features")])

    def draw(self, networks: Mapping[int, nn.Module], dense: Mapping[str, np.ndarray]) -> Tensor | None:
        """The samples [n, C, H, W] if ``networks`` serve some experts' intervals; None if no step falls into those."""
        served = [(entry, k) for k, entry in enumerate(self.entries()) if entry is not None and k in networks]
        if not served:
            return None
        found, (entry, expert) = [], min(served)
        for rows in self.chunks():
            start = torch.from_numpy(dense[f"state {expert}"][rows]).to(self.noise.device)
            *_, samples = self._follow(start, rows, networks, entry)
            found.append(samples)
        return torch.cat(found)

    @torch.no_grad()
    def _follow(self, x: Tensor, rows: slice, networks: Mapping[int, nn.Module], first: int = 0) -> Iterator[Tensor]:
        """The states before each step from ``first`` on, and the samples, from ``x``; other than ``networks``, dense serves."""
        sampler, labels = self._sampler(), None if self.labels is None else self.labels[rows]
        predictors: dict[int, Callable[[Tensor, Any], Tensor]] = {}
        for t in sampler.timesteps[first:]:
            yield x
            k = self.partition.index_of(float(t))
            if k not in predictors:
                predictors[k] = self.conditioner.guide(networks.get(k, self.dense), labels, self.guidance_scale)
            x = sampler.step(predictors[k](x, t.to(x.device)).float(), t, x).prev_sample
        yield x

    @torch.no_grad()
    def view(self, samples: Tensor, rows: slice, summary: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
        """Per level, a ``summary`` [n, d] of what the dense denoiser makes of samples at timestep 0: how much it varies over space.

        Means over space hardly tell of lost details: beside the noisy expert at half the MACs they let the clean one count a
        quarter of what it counts in ResNet-56 features (CIFAR-10; emoji), under a little noise a sixth; these are within 1.3 times on
        CIFAR-10, no better on emoji.
        """
        found: list[Tensor] = []

        def see(_: nn.Module, __: Any, output: Any) -> None:  # blocks of the way down answer with a tuple
            found.append((summary or spread)((output[0] if isinstance(output, tuple) else output).float()))

        hooks = [self.dense.get_submodule(name).register_forward_hook(see) for name in self.levels]
        try:
            t = torch.zeros(len(samples), dtype=torch.long, device=samples.device)
            labels = None if self.labels is None else self.labels[rows]
            self.dense(samples, t, **self.conditioner(labels))
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def _sampler(self) -> Any:
        name, steps = drawn_with(self.sampler, self.steps)
        sampler = make_sampler(name, dict(self.config))
        sampler.set_timesteps(steps)
        return sampler

    def chunks(self) -> list[slice]:
        return [slice(i, i + self.batch) for i in range(0, len(self.noise), self.batch)]


def spread(features: Tensor) -> Tensor:
    """Standard deviation over space, [n, C, H, W] -> [n, C]; of one pixel, the values themselves."""
    return features.flatten(1) if features.shape[2:].numel() == 1 else features.std((2, 3), correction=0)


def moved(samples: Sequence[np.ndarray], dense: Sequence[np.ndarray]) -> float:
    """How far samples are from dense's: the Frechet distance as a part of the variance of dense's features [n, d], the mean over levels."""
    found = []
    for mine, theirs in zip(samples, dense, strict=True):
        mine, theirs = mine.astype(np.float64), theirs.astype(np.float64)
        axes = np.linalg.svd(theirs - theirs.mean(0), full_matrices=False)[2][:DIRECTIONS].T
        a, b = Statistics.of(mine @ axes), Statistics.of(theirs @ axes)
        found.append(max(0.0, frechet_distance(a, b)) / max(float(np.trace(b.cov)), 1e-12))
    return float(np.mean(found))


def level_of_error(error: Callable[[float], float], wanted: float = ERROR, rounds: int = 7) -> float:
    """The level (`uniform.at_level`) at which ``error`` is about ``wanted``: it falls from 0, the narrowest, to 2, dense."""
    low, high = 0.0, 2.0
    for _ in range(rounds):
        middle = (low + high) / 2
        low, high = (middle, high) if error(middle) > wanted else (low, middle)
    return low


def influences(distances: Sequence[float | None], errors: Sequence[float], shares: Sequence[float]) -> tuple[float, ...]:
    """What a unit of error of each expert moves the samples, per step it serves, as far as the measure is trusted; the mean over the steps
    is 1.

    ``distances``: how far the samples moved while that expert alone was narrow, None if it served no step; ``errors``: of its sub-network;
    ``shares``: of the steps.
    """
    raw = [
        (d / (s * max(e, 1e-12))) ** TRUST if d is not None and s > 0 else None for d, e, s in zip(distances, errors, shares, strict=True)
    ]
    known = [(value, share) for value, share in zip(raw, shares, strict=True) if value is not None]
    mean = sum(value * share for value, share in known) / max(sum(share for _, share in known), 1e-12)
    if not mean > 0:  # nothing moved at all
        return (1.0,) * len(raw)
    bounded = [1.0 if value is None else min(MOST, max(LEAST, value / mean)) for value in raw]
    mean = sum(value * share for value, share in zip(bounded, shares, strict=True))
    return tuple(value / mean for value in bounded)
