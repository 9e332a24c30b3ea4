"""How wrong is the dense model at each timestep? The yardstick for errors of small ones: in training, and when a budget is shared out.

A dense model's error falls by a factor of a thousand from the clean end to the noisy one, and how much a unit of error does to the
samples rises as steeply (measured on two models, by replacing one interval alone: within a factor of five the product is the same for
all intervals, where plain errors are off by a hundred). So an error counts as a part of dense's, and of a little more: where nearly all
is noise dense errs by less than a thousandth, and errors there do not count that much more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from workers.diffusion import NoiseSchedule

DEGREE = 2
FLOOR = 0.002
"""What is added to dense's error, as a part of the energy of what it predicts: so the noisiest timesteps count like those before."""
IMAGES = 64
"""Of which the curve is fitted for one expert's training."""


@dataclass(frozen=True)
class DenseError:
    """Squared error per number of the dense model's output, smooth in the timestep: log(error) is a parabola in log-SNR.

    Fitted where it was measured, with the mean that was measured there, and constant outside.
    """

    log_snr: np.ndarray
    """Of every timestep [T]."""
    coefficients: tuple[float, ...]
    bounds: tuple[float, float]
    floor: float

    @classmethod
    def fit(cls, schedule: NoiseSchedule, timesteps: Sequence[int], errors: Sequence[float], energy: float) -> DenseError:
        """From errors of single images, at timesteps spread over an interval; ``energy``: mean square of what the model predicts."""
        log_snr = schedule.log_snr(range(schedule.num_timesteps))
        x, y = log_snr[np.asarray(timesteps, dtype=np.int64)], np.log(np.maximum(np.asarray(errors, dtype=np.float64), 1e-10))
        degree = DEGREE if len(np.unique(x)) > 4 * DEGREE else 0
        found = np.polynomial.Polynomial.fit(x, y, degree) if degree else np.polynomial.Polynomial([y.mean()])
        scale = np.mean(np.exp(y)) / np.mean(np.exp(found(x)))  # the mean of a logarithm is not the logarithm of the mean
        coefficients = tuple(float(c) for c in (found.convert() + np.log(scale)).coef)
        return cls(log_snr, coefficients, (float(x.min()), float(x.max())), FLOOR * energy)

    def __call__(self, device: torch.device | str = "cpu") -> Tensor:
        """What errors are parts of at every timestep [T], float32."""
        error = np.exp(np.polynomial.Polynomial(self.coefficients)(self.log_snr.clip(*self.bounds)))
        return torch.tensor(error + self.floor, dtype=torch.float32, device=device)
