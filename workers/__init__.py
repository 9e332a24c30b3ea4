"""What runs on GPUs: the science of diffpruning, importable and testable without Ray."""

import pkgutil
from pathlib import Path


def names_in(folder: str) -> list[str]:
    """Names of an extension folder (families, similarity, routers): its files, without importing any."""
    return sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).parent / folder)]))
