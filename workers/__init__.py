"""What runs on GPUs: the science of diffpruning, importable and testable without Ray."""

import importlib
import pkgutil
from pathlib import Path
from types import ModuleType

from workers.errors import InputError


def names_in(folder: str) -> list[str]:
    """Names of an extension folder (families, similarity, routers, extractors): its files, without importing any."""
    return sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).parent / folder)]))


def extension(folder: str, name: str, key: str) -> ModuleType:
    """The module of an extension folder. Raises: InputError, naming the job's ``key``, for a name that is no file of it."""
    if name not in names_in(folder):
        raise InputError(f"{key} {name!r} is unknown: known are {', '.join(names_in(folder))}")
    return importlib.import_module(f"workers.{folder}.{name}")
