"""Classes whose code may travel with what they save, so that it loads where diffpruning is not installed (`workers.code_file`)."""

from __future__ import annotations

from functools import wraps
from pathlib import Path
from typing import Any, ClassVar

from diffusers.models.modeling_utils import ModelMixin


class Travelling(ModelMixin):
    """A model that passes its code on, where it came with some.

    diffusers writes the name of a class's module into model_index.json, and reads the class from a file of that name in the model's
    folder, if there is one. So the code that travels calls itself by the name of the module that it was cut from.
    """

    code: ClassVar[str | None] = None
    """The text of the file that this class was loaded from; None for a class of the installed package."""

    @wraps(ModelMixin.save_pretrained)
    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        pass_on(self, save_directory)
        super().save_pretrained(save_directory, *args, **kwargs)


def pass_on(instance: Any, folder: str | Path) -> None:
    """Write the code of an instance's class, if it has its own, where diffusers look for it."""
    if instance.code is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"{type(instance).__module__}.py").write_text(instance.code)
