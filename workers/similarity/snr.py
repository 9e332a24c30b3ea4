"""Log-SNR distance: two timesteps are alike when their noise levels are. Needs no model and no image; a baseline.

Each timestep becomes a point on a quarter circle, at an angle proportional to its log-SNR, so that the cosine falls from 1
(same level) to 0 (the two ends of the schedule) and depends on the log-SNR distance alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from workers.similarity import SimilarityProblem

NEEDS_MODEL = False


def embed(problem: SimilarityProblem, timesteps: Sequence[int]) -> np.ndarray:
    """[1, len(timesteps), 2]"""
    cleanest, noisiest = problem.schedule.log_snr([0, problem.schedule.num_timesteps - 1])
    angle = (cleanest - problem.schedule.log_snr(timesteps)) / (cleanest - noisiest) * (np.pi / 2)
    return np.stack([np.cos(angle), np.sin(angle)], axis=-1)[None]
