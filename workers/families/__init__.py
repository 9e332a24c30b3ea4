"""Model families: one file each. A family loads a denoiser, lists its elastic branches and offers a tiny model for tests.

A family module defines
    CLASS_NAMES                     the classes in the model's config.json that it handles
    OUTPUT                          the module that makes the output, which is linear in its parameters
    model_class(config)             the class, a diffusers ModelMixin, of the model of that config
    check(config) -> None           raises InputError for a config it cannot handle
    sites(model, settings)          its elastic branches
    conditioning(config)            the argument by which the denoiser is told its class, or None
    example_inputs(config, batch, device, dtype)    arguments of a forward pass, for counting and timing
    features(model) -> list[str]    modules whose outputs are distilled; their shapes never change
    tiny() -> nn.Module             a small random model for the contract tests
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from workers import extension, names_in, pretrained
from workers.contracts import InputError
from workers.pretrained import read_json as read_json

if TYPE_CHECKING:
    import torch
    from torch import nn


def names() -> list[str]:
    return names_in("families")


def family(name: str) -> ModuleType:
    """Raises: InputError for a name that is no file of this folder."""
    return extension("families", name, "model.family")


def locate(path: str) -> Path:
    """The pipeline folder of a local path or a Hub id (``org/name``, downloaded once). Raises: InputError."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if folder.exists():
        raise InputError(f"model.path: {path} is a file; give the folder that holds model_index.json")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path) or folder.is_absolute() or folder.parent.is_dir():
        raise InputError(f"model.path: no such folder: {path}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # the hub client raises a dozen kinds; the user needs one line
        raise InputError(f"model.path: {path} is neither a local folder nor a model the Hub gave: {type(error).__name__}") from error


def _denoiser_folder(folder: Path) -> Path:
    """Where the denoiser's config.json lies: ``unet/``, or the folder itself in the oldest pipelines."""
    for candidate in (folder / "unet", folder):
        if (candidate / "config.json").is_file():
            return candidate
    raise InputError(f"model.path: {folder} holds no unet/config.json: it is not a diffusers pipeline folder")


def load_config(folder: str | Path) -> dict[str, Any]:
    """The dense denoiser's config; in the folder of a mixture, that of its base. Raises: InputError."""
    config = read_json(_denoiser_folder(Path(folder)) / "config.json")
    return config["base"] if config.get("_class_name") == "MixtureDenoiser" else config


def load_scheduler_config(folder: str | Path) -> dict[str, Any]:
    """The pipeline's scheduler config. Raises: InputError."""
    for candidate in (Path(folder) / "scheduler" / "scheduler_config.json", Path(folder) / "scheduler_config.json"):
        if candidate.is_file():
            return read_json(candidate)
    raise InputError(f"model.path: {folder} holds no scheduler/scheduler_config.json")


def of_class(config: dict[str, Any]) -> ModuleType:
    """The family that builds the class of a denoiser's config; whether it can prune it is another question. Raises: InputError."""
    found = [module for module in map(family, names()) if config.get("_class_name") in module.CLASS_NAMES]
    if not found:
        classes = ", ".join(f"{name} ({', '.join(family(name).CLASS_NAMES)})" for name in names())
        raise InputError(f"model.path: a {config.get('_class_name')} is of no known model family: known are {classes}")
    return found[0]


def family_of_config(config: dict[str, Any]) -> ModuleType:
    """The family of a denoiser's config, which it has checked. Raises: InputError."""
    found = of_class(config)
    found.check(config)
    return found


def family_name(folder: str | Path) -> str:
    """The name of the family that handles the denoiser in ``folder``. Raises: InputError."""
    return family_of_config(load_config(folder)).__name__.rpartition(".")[2]


def example_inputs(config: Mapping[str, Any], batch: int, device: Any, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of one forward pass of ``batch`` images: random sample, a timestep each, zeros for the conditioning."""
    return family_of_config(dict(config)).example_inputs(config, batch, device, dtype)


def build(config: dict[str, Any]) -> nn.Module:
    """An untrained denoiser of ``config``; on the meta device inside ``torch.device("meta")``."""
    return family_of_config(config).model_class(config).from_config(config)


def load_denoiser(folder: str | Path) -> nn.Module:
    """The pretrained denoiser of a diffusers pipeline folder, in float32, on the CPU, in eval mode.

    Raises: InputError if the folder, the config or the weights cannot be used.
    """
    folder = locate(str(folder))
    config = load_config(folder)
    return pretrained.load(family_of_config(config).model_class(config), _denoiser_folder(folder))


def check_files(folder: str | Path) -> None:
    """See that the denoiser's weight files are whole, by their headers alone. Raises: InputError."""
    pretrained.weight_shapes(_denoiser_folder(Path(folder)))


def model_digest(folder: str | Path) -> str:
    """sha256 over the configs and weights of the denoiser, what it is told by, and the scheduler: the model's identity, wherever it lies.

    The first stage is not in it: the latents that it makes have their own identity.
    """
    where, digest = _denoiser_folder(Path(folder)), hashlib.sha256()
    embedder = Path(folder) / "class_embedder"
    configs = [load_config(folder), load_scheduler_config(folder), *([read_json(embedder / "config.json")] if embedder.is_dir() else [])]
    for value in configs:
        digest.update(json.dumps({k: v for k, v in value.items() if k != "_name_or_path"}, sort_keys=True).encode())
    for weights in (*sorted(where.glob("*.safetensors")), *sorted(embedder.glob("*.safetensors"))):
        with weights.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
