"""Any network saved as TorchScript: images float32 [n, 3, H, W] in [-1, 1] -> features [n, d], at the size that the images have."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

INPUT_SIZE, RESIZE = None, "none"


def load(weights: Path) -> nn.Module:
    """An attribute ``input_size`` of the saved module, if it has one, is the size that images are resized to."""
    return torch.jit.load(str(weights), map_location="cpu")
