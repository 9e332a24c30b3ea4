"""InceptionV3 as of the FID: the 2048 pooled values, from torch-fidelity's network and a local weights file.

Images are resized before the network does it: bicubic with antialiasing, as clean-fid does, and then rounded, since the network takes 8
bits. Distances under the resize of the original TensorFlow code, which has no antialiasing, are other numbers.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from workers.contracts import InputError

INPUT_SIZE, RESIZE = 299, "bicubic, antialias, then 8 bits"


class Inception(nn.Module):
    """Images [n, 3, 299, 299] in [-1, 1] -> features [n, 2048]."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(((images + 1) * 127.5).round().clamp(0, 255).byte())


def load(weights: Path) -> nn.Module:
    """Raises: InputError if torch-fidelity is not installed, or not with a torchvision that fits torch."""
    try:
        import torch_fidelity  # noqa: F401
        from torchmetrics.image.fid import NoTrainInceptionV3
    except Exception as error:  # a torchvision of another torch ends in any way
        raise InputError(
            f"evaluate.extractor is inception, which needs the package torch-fidelity ({' '.join(str(error).split())[:100]}): "
            "pip install 'diffpruning[inception]', or choose another extractor"
        ) from error

    return Inception(NoTrainInceptionV3("inception-v3-compat", ["2048"], str(weights)))
