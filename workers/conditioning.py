"""What is a class-conditional denoiser told? Labels as keyword arguments, the null class, and guidance. B = batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin as ModelMixin  # a pipeline that holds a class from here looks for its base here
from torch import Tensor, nn

from workers import families, pretrained
from workers.contracts import InputError, derive_seed
from workers.travelling import Travelling

EMBEDDER = "class_embedder"


@dataclass(frozen=True)
class Classes:
    """What a pipeline's denoiser wants to know of the class. ``argument`` is None for an unconditional one."""

    argument: str | None
    count: int = 0
    """Labels are [0, count); the null class is not among them."""
    null: int | None = None
    """The label that stands for no class, where the model has one; guidance needs it."""

    def check(self, labels: np.ndarray | None, of: str) -> None:
        """Raises: InputError if images carry no labels where they are needed, or one beyond the model's classes."""
        if self.argument is None:
            return
        if labels is None:
            raise InputError(f"{of} has no labels, but the model is told a class: give Parquet with a column label, or a folder per class")
        odd = np.flatnonzero((labels < 0) | (labels >= self.count))
        if len(odd):
            raise InputError(f"{of}: image {odd[0]} has label {labels[odd[0]]}, but the model has the classes 0 to {self.count - 1}")

    def of_seeds(self, seeds: Sequence[int]) -> list[int] | None:
        """One class per sample, drawn from the sample's own seed."""
        return None if self.argument is None else [derive_seed(seed, "class") % self.count for seed in seeds]


class ClassEmbedder(Travelling, ConfigMixin):
    """Labels [B] -> context [B, 1, embed_dim].

    Args:
        num_classes: rows of the embedding, the null class included.
        null_class: the label that stands for no class in classifier-free guidance: the last one, or None if the model has none.
    """

    config_name: Any = ModelMixin.config_name

    @register_to_config
    def __init__(self, num_classes: int = 1001, embed_dim: int = 512, null_class: int | None = None) -> None:
        super().__init__()
        _classes_of(num_classes, null_class)
        self.null_class = null_class
        self.embedding = nn.Embedding(num_classes, embed_dim)

    @property
    def classes(self) -> Classes:
        return _classes_of(self.embedding.num_embeddings, self.null_class)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding(labels)[:, None]


def _classes_of(num_classes: Any, null_class: Any) -> Classes:
    """What the numbers of an embedder's config mean. Raises: InputError if they mean nothing."""
    if not isinstance(num_classes, int) or num_classes < 1:
        raise InputError(f"{EMBEDDER}: num_classes is {num_classes!r}: it is a whole number above 0")
    if null_class is None:
        return Classes("encoder_hidden_states", num_classes)
    if null_class != num_classes - 1 or not null_class:
        raise InputError(f"{EMBEDDER}: null_class is {null_class!r}: it is the last of {num_classes} classes, after a real one, or null")
    return Classes("encoder_hidden_states", null_class, null_class)


def describe(folder: str | Path) -> Classes:
    """What the configs of a pipeline folder say of classes. Raises: InputError if nothing says how the denoiser is told its class."""
    config = families.load_config(folder)
    argument = families.family_of_config(config).conditioning(config)
    if argument is None:
        return Classes(None)
    if argument == "class_labels":
        return Classes(argument, config["num_class_embeds"])
    about = Path(folder) / EMBEDDER / "config.json"
    if not about.is_file():
        raise InputError(f"model.path: {folder} holds no {EMBEDDER}: only class-conditional models are supported, not text")
    found = families.read_json(about)
    if found.get("embed_dim") != config["cross_attention_dim"]:
        wanted = config["cross_attention_dim"]
        raise InputError(f"model.path: {EMBEDDER} makes tokens of {found.get('embed_dim')} numbers, the denoiser wants {wanted}")
    return _classes_of(found.get("num_classes"), found.get("null_class"))


class Conditioner(nn.Module):
    """Labels -> the keyword arguments by which the denoiser is told them; nothing for an unconditional one."""

    def __init__(self, classes: Classes, embedder: nn.Module | None):
        super().__init__()
        self.classes, self.embedder = classes, embedder

    def forward(self, labels: Tensor | None) -> dict[str, Tensor]:
        if self.classes.argument is None:
            return {}
        assert labels is not None
        return {self.classes.argument: labels if self.embedder is None else self.embedder(labels)}

    def forget(self, labels: Tensor | None, fraction: float, gen: torch.Generator) -> Tensor | None:
        """Labels [B] of which a random part became the null class, where there is one: what guidance is trained by."""
        if labels is None or self.classes.null is None:
            return labels
        lost = torch.rand(len(labels), generator=gen, device=labels.device) < fraction
        return torch.where(lost, self.classes.null, labels)

    def guide(self, model: Callable[..., Any], labels: Tensor | None, scale: float) -> Callable[[Tensor, Any], Tensor]:
        """``predict(x [B, C, H, W], t)`` for images of the given classes, with classifier-free guidance if ``scale`` is not 1.

        Guidance takes two forward passes a step, done as one of a double batch. Raises: InputError if the model has no null class.
        """
        if scale == 1:
            told = self(labels)
            return lambda x, t: model(x, t, **told).sample
        if self.classes.null is None or labels is None:
            raise InputError(f"guidance_scale is {scale:g}, but the model has no null class to be guided away from: set it to 1")
        told = self(torch.cat([torch.full_like(labels, self.classes.null), labels]))

        def predict(x: Tensor, t: Any) -> Tensor:
            without, given = model(torch.cat([x, x]), t, **told).sample.chunk(2)
            return without + scale * (given - without)

        return predict


def load(folder: str | Path, device: str | torch.device = "cpu") -> Conditioner:
    """The conditioner of a pipeline folder, frozen. Raises: InputError."""
    classes = describe(folder)
    if classes.argument != "encoder_hidden_states":
        return Conditioner(classes, None).to(device)
    embedder = pretrained.load(ClassEmbedder, Path(folder) / EMBEDDER)
    return Conditioner(classes, embedder).requires_grad_(False).eval().to(device)
