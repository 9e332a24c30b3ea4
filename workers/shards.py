"""A mixture's weights on disk: one file per expert, so that versions which share an expert share its file.

The folder is what diffusers calls a sharded checkpoint: `MixtureDenoiser.from_pretrained` reads it as any other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from workers.mixture import MixtureDenoiser


def save(mixture: MixtureDenoiser, folder: Path) -> None:
    """Write config and weights into ``folder``. Equal experts at the same place of two mixtures give equal files.

    Raises: SafetensorError if the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mixture.save_config(folder)
    count = len(mixture.experts)
    stem = Path(SAFETENSORS_WEIGHTS_NAME).stem
    shards: dict[str, dict[str, Tensor]] = {}
    for name, tensor in mixture.state_dict().items():
        module, k, *_ = name.split(".")
        assert module == "experts", name
        shards.setdefault(f"{stem}-{int(k) + 1:05d}-of-{count:05d}.safetensors", {})[name] = tensor.detach().cpu().contiguous()
    for file, tensors in shards.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(_index(shards), indent=1) + "\n")


def _index(shards: Mapping[str, Mapping[str, Tensor]]) -> dict[str, object]:
    size = sum(tensor.numel() * tensor.element_size() for tensors in shards.values() for tensor in tensors.values())
    return {"metadata": {"total_size": size}, "weight_map": {name: file for file, tensors in shards.items() for name in tensors}}
