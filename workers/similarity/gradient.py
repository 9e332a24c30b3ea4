"""Cosine similarity of the gradients of two timesteps' denoising losses, at the pretrained weights (DiffPruning).

A full gradient is never kept: each is reduced to a CountSketch of D buckets, whose inner products are unbiased with a
relative error of about 1/sqrt(D). All timesteps of a minibatch share images and noise (common random numbers).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.diffusion import generator
from workers.similarity import SimilarityProblem

NEEDS_MODEL = True
AT_ONCE = 1 << 22
"""Entries of a gradient that are moved to their buckets at a time."""


class CountSketch:
    """Random signed sums of a model's gradient: entry i of the flat gradient goes, with a random sign, to bucket (i + shift) mod D.

    The shift is drawn per row of D entries, so entries of one row never collide and those of two rows do with probability 1/D.
    Signs are kept in bits-as-bytes: 1 byte per parameter.
    """

    def __init__(self, model: nn.Module, buckets: int, seed: int):
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        total = sum(p.numel() for p in self.parameters)
        self.buckets, self.rows = buckets, -(-total // buckets)
        device = self.parameters[0].device
        gen = generator("cpu", seed, "count sketch", buckets)
        self.signs = (torch.randint(2, (self.rows * buckets,), generator=gen, dtype=torch.int8) * 2 - 1).to(device)
        self.shifts = torch.randint(buckets, (self.rows,), generator=gen).to(device)

    def __call__(self) -> Tensor:
        """Sketch [D] of the gradients that the parameters hold."""
        gradients = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in self.parameters]
        flat = F.pad(torch.cat(gradients), (0, len(self.signs) - sum(g.numel() for g in gradients))) * self.signs
        sketch, columns = torch.zeros(self.buckets, device=flat.device), torch.arange(self.buckets, device=flat.device)
        size = max(1, AT_ONCE // self.buckets)
        for rows, shifts in zip(flat.view(self.rows, self.buckets).split(size), self.shifts.split(size), strict=True):
            sketch += rows.gather(1, (columns - shifts[:, None]) % self.buckets).sum(0)  # no scattering: atomic sums differ from run to run
        return sketch


def embed(problem: SimilarityProblem, timesteps: Sequence[int]) -> np.ndarray:
    """Sketched gradients [B, len(timesteps), D], float32."""
    model, schedule = problem.model, problem.schedule
    assert model is not None
    sketch = CountSketch(model, problem.buckets, problem.seed)
    out = np.empty((len(problem.minibatches), len(timesteps), problem.buckets), np.float32)
    for i, t in enumerate(timesteps):
        for b, (clean, told) in enumerate(problem.minibatches):
            noise = torch.randn(clean.shape, generator=generator(clean.device, problem.seed, "similarity", b), device=clean.device)
            at = torch.full((len(clean),), t, device=clean.device)
            model.zero_grad(set_to_none=True)
            predicted = model(schedule.noised(clean, noise, at), at, **told).sample
            F.mse_loss(predicted, schedule.target(clean, noise, at)).backward()
            out[b, i] = sketch().cpu().numpy()
        problem.on_timestep()
    model.zero_grad(set_to_none=True)
    return out
