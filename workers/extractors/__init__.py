"""What sees whether images look alike? Feature extractors, one file each, for the Frechet and kernel distances.

An extractor module defines
    INPUT_SIZE, RESIZE      what images are resized to, and how; None for the size that they have
    load(weights)           the network, from a local file: images float32 [n, 3, H, W] in [-1, 1] -> features [n, d]
``package.module:function`` names a function of the user's that does what ``load`` does; ``weights`` may then be None. If its network
has an attribute ``input_size``, images are resized to that.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers import extension, names_in
from workers.contracts import ExtractorRef, InputError

LEVELS = 256
"""Images are rounded to 8 bits before anything looks at them, as they are when saved to files."""


def names() -> list[str]:
    return names_in("extractors")


@dataclass(frozen=True)
class Extractor:
    """A network that turns images into features, and all that its features depend on."""

    network: nn.Module
    input_size: int | None
    resize: str
    digest: str
    """sha256 (hex) of the adapter's name and the weights."""

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features float32 [n, d] of images float32 [n, 1 or 3, H, W] in [-1, 1], rounded to 8 bits first. Never with TF32.

        Raises: InputError if the network's answer to finite images is no finite matrix of n rows.
        """
        images = rounded(images)
        images = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
        if self.input_size is not None and images.shape[-2:] != (self.input_size, self.input_size):
            images = F.interpolate(images, size=(self.input_size,) * 2, mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            features = self.network(images)
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(images):
            told = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise InputError(f"evaluate.extractor: {len(images)} images must give features [{len(images)}, d], not {told}")
        if bool(images.isfinite().all()) and not bool(features.isfinite().all()):
            raise InputError("evaluate.extractor: the features hold NaN or infinity: are these weights for this extractor?")
        return features.float()

    def features(self, channels: int, size: int) -> int:
        """How many features an image [channels, size, size] has. Raises: InputError if the network cannot take it."""
        try:
            return self(torch.zeros(2, channels, size, size)).shape[1]
        except InputError:
            raise
        except Exception as error:  # a network may refuse a size in any way
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"evaluate.extractor: images of {channels} x {size} x {size} cannot be given to it: {reason}") from error


def rounded(images: Tensor) -> Tensor:
    """Images in [-1, 1], moved to the nearest of 256 levels."""
    return ((images + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1


def load(ref: ExtractorRef, device: str = "cpu") -> Extractor:
    """Raises: InputError if there is no such extractor, or its weights cannot be used."""
    weights = None if ref.weights is None else Path(ref.weights)
    if weights is not None and not weights.is_file():
        raise InputError(f"evaluate.extractor_weights: no such file: {weights}")
    if ":" in ref.name:
        build, size, resize = imported(ref.name, "evaluate.extractor"), None, "bicubic, antialias"
    else:
        module = extension("extractors", ref.name, "evaluate.extractor")
        if weights is None:
            raise InputError(f"evaluate.extractor is {ref.name}: give the file with its weights as evaluate.extractor_weights")
        build, size, resize = module.load, module.INPUT_SIZE, module.RESIZE
    try:
        network = build(weights)
    except InputError:
        raise
    except Exception as error:  # unpickling, a wrong shape and a wrong file each have their own kind
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"evaluate.extractor_weights: {weights} cannot be read as weights of {ref.name}: {reason}") from error
    if not isinstance(network, nn.Module):
        raise InputError(f"evaluate.extractor: {ref.name} gave a {type(network).__name__}, not a torch.nn.Module")
    size = getattr(network, "input_size", size)
    return Extractor(network.eval().to(device), size, resize if size else "none", digest(ref.name, weights, network))


def imported(name: str, key: str) -> Callable[..., Any]:
    """The function that ``package.module:function`` names. Raises: InputError, naming the job's ``key``."""
    where, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(where), function)
    except Exception as error:  # a user's module may fail in any way
        raise InputError(f"{key}: {name} cannot be imported: {type(error).__name__}: {error}") from error


def digest(name: str, weights: Path | None, network: nn.Module) -> str:
    """sha256 (hex) of a name, and of a file of weights or else of the network's own."""
    found = hashlib.sha256(name.encode())
    if weights is not None:
        with weights.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    else:
        for key, tensor in sorted(network.state_dict().items()):
            found.update(key.encode())
            found.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a checkpoint that holds nothing but tensors, ``state_dict`` unwrapped."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    found = torch.load(path, map_location="cpu", weights_only=True)
    return found.get("state_dict", found)
