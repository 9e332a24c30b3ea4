"""A pipeline folder with random weights, from one that holds configs alone: to plan, time and try things out without a checkpoint."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from workers import families
from workers.contracts import InputError, derive_seed, digest_of

MODELS = ("unet", "vqvae", "vae", "class_embedder")


def folder_of(source: Path, storage: Path, seed: int) -> Path:
    """Where the random copy of ``source`` lies, made or not: named by the configs and the seed."""
    configs = {path.relative_to(source).as_posix(): families.read_json(path) for path in sorted(source.rglob("*.json"))}
    return storage / ".random" / digest_of([configs, seed])[:12]


def make(source: Path, out: Path, seed: int) -> None:
    """Write ``out``, whole or not at all. Raises: InputError for a class that is none of the pipeline's."""
    import diffusers
    import torch

    from workers.conditioning import ClassEmbedder

    out.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        shutil.copytree(source, beside, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors", "*.bin", "*.md"))
        for name in MODELS:
            if not (beside / name / "config.json").is_file():
                continue
            config = families.read_json(beside / name / "config.json")
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive_seed(seed, "random init", name))
                if name == "unet":
                    model: Any = families.build(config)
                else:
                    kind = ClassEmbedder if name == "class_embedder" else getattr(diffusers, str(config.get("_class_name")), None)
                    if kind is None:
                        raise InputError(f"model.random_init: {source / name} is a {config.get('_class_name')}, which cannot be built")
                    model = kind.from_config(config)
            model.save_pretrained(beside / name, safe_serialization=True)
        os.replace(beside, out)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
