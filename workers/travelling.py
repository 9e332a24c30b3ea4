"""Classes whose code may travel with what they save, so that it loads where diffpruning is not installed (`workers.code_file`)."""

from __future__ import annotations

from functools import wraps
from pathlib import Path
from typing import Any, ClassVar

from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

ALIGNMENT = 64
"""Bytes, as torch itself allocates on a CPU."""


def aligned(model: nn.Module) -> None:
    """Copy weights that lie at odd addresses: a CPU's kernels add up in another order there, so that equal weights draw other images.

    Safetensors hands out memory of the file as it lies there, and that of one expert's file lies otherwise than that of all experts.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and type(tensor.data) is Tensor and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()


class Travelling(ModelMixin):
    """A model that passes its code on, where it came with some.

    diffusers writes the name of a class's module into model_index.json, and reads the class from a file of that name in the model's
    folder, if there is one. So the code that travels calls itself by the name of the module that it was cut from.
    """

    code: ClassVar[str | None] = None
    """The text of the file that this class was loaded from; None for a class of the installed package."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As diffusers', but never a pickle unless ``use_safetensors=False`` asks for it, and with ``aligned`` weights."""
        if kwargs.get("use_safetensors") is None:
            kwargs["use_safetensors"] = True
        found = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        aligned(found[0] if isinstance(found, tuple) else found)
        return found

    @wraps(ModelMixin.save_pretrained)
    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        pass_on(self, save_directory)
        super().save_pretrained(save_directory, *args, **kwargs)


def pass_on(instance: Any, folder: str | Path) -> None:
    """Write the code of an instance's class, if it has its own, where diffusers look for it."""
    if instance.code is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"{type(instance).__module__}.py").write_text(instance.code)
