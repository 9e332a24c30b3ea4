"""A model's folder as diffusers writes it: config.json, safetensors, and the model with all its weights. Torch comes with the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from workers.errors import InputError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises: InputError."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"model.path: {path} cannot be read: {_line(error)}") from None
    if not isinstance(value, dict):
        raise InputError(f"model.path: {path} is not a JSON object")
    return value


def weight_files(where: Path) -> list[Path]:
    """Raises: InputError if there is none."""
    files = sorted(where.glob("*.safetensors"))
    if not files:
        kept = "safe_serialization=True, and keep the scaling_factor that the config.json of a first stage has"
        raise InputError(f"model.path: {where} holds no .safetensors weights; re-save the pipeline with {kept}")
    return files


def weight_shapes(where: Path) -> dict[str, list[int]]:
    """Tensor -> shape, by the headers of the weight files alone. Raises: InputError if a file is not whole."""
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, list[int]] = {}
    for file in weight_files(where):
        try:
            with safe_open(file, framework="numpy") as opened:
                shapes |= {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise InputError(f"model.path: {file} cannot be read: {_line(error)}: download it again") from None
    return shapes


def load(kind: Any, where: Path) -> Any:
    """The model of class ``kind`` (a diffusers ModelMixin) in ``where``: float32, on the CPU, in eval mode.

    Raises: InputError, in one line, if a weight is missing, too many, of another shape, or not finite.
    """
    import torch
    from diffusers.utils import logging

    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model, found = kind.from_pretrained(where, torch_dtype=torch.float32, use_safetensors=True, output_loading_info=True)
    except Exception as error:  # a truncated file, a missing file and a wrong shape each have their own kind
        raise InputError(f"model.path: the weights in {where} cannot be read: {_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
    odd = [f"{word} {key}" for word in ("missing", "unexpected") for key in sorted(found[f"{word}_keys"])]
    if odd:
        raise InputError(f"model.path: the weights in {where} do not fit their config: {len(odd)} keys, {', '.join(odd[:3])}")
    bad = [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]
    if bad:
        raise InputError(f"model.path: the weights in {where} are damaged: {bad[0]} holds NaN or infinity: download them again")
    return model.eval()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
