"""Gradients of the denoising objective, compared minibatch by minibatch: does a step on timestep i also serve timestep j?

On a converged model the expected gradient is nearly zero, and what is left after averaging a few hundred images is chance: its cosines do
not repeat. The gradients of single minibatches are large, and those of two timesteps on the same images and noise agree or do not.
"""

from workers.similarity.gradient import NEEDS_MODEL as NEEDS_MODEL
from workers.similarity.gradient import embed as embed

PAIRED = True
