"""Mixtures for tests of the registry: a real manifest over small files."""

import os
from pathlib import Path
from typing import Any

from workers.contracts import ArchitectureSpec, Budget, Cost, MixtureManifest, MixturePlan, Partition, Protocol, Provenance

SHARED = bytes(range(256)) * 400


def manifest(fingerprint: str = "run-a", name: str = "quickstart", protocol_seed: int = 0, **numbers: Any) -> MixtureManifest:
    cost = Cost(macs=100, params=10)
    plan = MixturePlan(
        budget=Budget("macs", 0.5, "ddim", 20),
        agent="era",
        seed=0,
        partition=Partition.from_boundaries([400], 1000),
        experts=(ArchitectureSpec({"mid": 4}), ArchitectureSpec({"mid": 8})),
        shares=(0.4, 0.6),
        expert_costs=(cost, cost),
        dense_cost=Cost(macs=200, params=20),
        loss=0.1,
    )
    protocol = Protocol((3, 8, 8), protocol_seed, 1.0, "float32").told()
    row = {"denoising_loss": 0.1, "paired_mse": 0.01, "paired_psnr_db": 20.0, "ms_per_step": 3.0, "protocol": protocol, **numbers}
    dense = {"denoising_loss": 0.09, "paired_mse": 0.0, "paired_psnr_db": None, "ms_per_step": 6.0, "frechet": 5.0, "protocol": protocol}
    metrics = {"dense": dense, "macs-0.50": row}
    return MixtureManifest(name, "unet2d", plan, metrics, {}, Provenance(name, fingerprint, "m", "a" * 64, "d", "b" * 64, 0, {}), {})


def folder(at: Path, own: bytes = b"own", shared: bytes = SHARED) -> Path:
    """What a version holds: one expert that others share and one of its own."""
    (at / "scheduler").mkdir(parents=True, exist_ok=True)
    (at / "config.json").write_text("{}")
    (at / "scheduler" / "scheduler_config.json").write_text('{"steps": 20}')
    (at / "model-00001-of-00002.safetensors").write_bytes(shared)
    (at / "model-00002-of-00002.safetensors").write_bytes(own)
    return at


def tree(at: Path) -> dict[str, bytes | None]:
    """Every file with its content, and every folder."""
    found = {}
    for path in sorted(at.rglob("*")):
        found[path.relative_to(at).as_posix()] = path.read_bytes() if path.is_file() and os.access(path, os.R_OK) else None
    return found
