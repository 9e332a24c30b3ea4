"""ResNet-56 of CIFAR-10 (akamaster/pytorch_resnet_cifar10): the 64 pooled values before its classifier. Images of 32 x 32."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.extractors import read_weights

INPUT_SIZE, RESIZE = 32, "bicubic, antialias"


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; where the shape changes, the shortcut takes every second pixel and pads channels with zeros (option A)."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.stride, self.pad = out // channels, (out - channels) // 2
        self.conv1 = nn.Conv2d(channels, out, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + shortcut)


class ResNet56(nn.Module):
    """Images [n, 3, 32, 32] in [-1, 1] -> features [n, 64]."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        widths = (16, 16, 32, 64)
        for i, (before, width) in enumerate(zip(widths, widths[1:], strict=False), 1):
            self.add_module(f"layer{i}", nn.Sequential(BasicBlock(before, width), *(BasicBlock(width, width) for _ in range(8))))
        self.register_buffer("mean", torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(((images + 1) / 2 - self.mean) / self.std)))
        for name in ("layer1", "layer2", "layer3"):
            x = self.get_submodule(name)(x)
        return x.mean((2, 3))


def load(weights: Path) -> nn.Module:
    """From the published checkpoint, or .safetensors with the same keys; the classifier in it is not used."""
    found = {key.removeprefix("module."): value for key, value in read_weights(weights).items()}
    network = ResNet56()
    network.load_state_dict({key: value for key, value in found.items() if not key.startswith("linear.")})
    return network
