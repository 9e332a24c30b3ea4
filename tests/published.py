"""Random mixtures, and versions of a registry that hold them, for tests of what happens to a mixture after it was published."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from orchestrator.registry import Registry, Version
from workers import families
from workers.contracts import ArchitectureSpec, Budget, Cost, MixtureManifest, MixturePlan, Partition, Provenance, SearchSpace
from workers.elastic import search_space
from workers.mixture import MixtureDenoiser, untrained

HIDDEN = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("workers", "orchestrator", "jobs"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hidden())
"""
"""The first lines of a process in which diffpruning is not installed."""


def config_of(model: Any) -> dict[str, Any]:
    return json.loads(model.to_json_string())


def space_of(config: dict[str, Any], unit: str = "group") -> SearchSpace:
    with torch.device("meta"):
        return search_space(untrained(config, unit)[1])


def random_mixture(config: dict[str, Any], boundaries: Sequence[int], seed: int = 0, rewrites: Sequence[str] = ()) -> MixtureDenoiser:
    """Random architectures with random weights."""
    rng, space = random.Random(seed), space_of(config)
    specs = [ArchitectureSpec({site.name: rng.choice(site.choices) for site in space.sites}) for _ in range(len(boundaries) + 1)]
    torch.manual_seed(seed)
    mixture = MixtureDenoiser.of(config, boundaries, specs, rewrites=rewrites, num_timesteps=1000).eval()
    with torch.no_grad():
        for parameter in mixture.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return mixture


def mixture_of_dense(model: nn.Module, boundaries: Sequence[int] = (500,)) -> MixtureDenoiser:
    """Every expert is the dense denoiser."""
    config = config_of(model)
    mixture = MixtureDenoiser.of(config, boundaries, [space_of(config).dense] * (len(boundaries) + 1), num_timesteps=1000).eval()
    for expert in mixture.experts:
        expert.load_state_dict(model.state_dict())
    return mixture


def publish(registry: Path, name: str, mixture: MixtureDenoiser, scheduler: Any, folder: Path, **parts: Any) -> Version:
    """A version as a run publishes it: the mixture, its sampler, and ``parts`` around it (saved under their names)."""
    mixture.save_pretrained(folder)
    scheduler.save_pretrained(folder / "scheduler")
    for part, model in parts.items():
        model.save_pretrained(folder / part)
    experts = len(mixture.experts)
    plan = MixturePlan(
        budget=Budget("macs", 0.5, "ddim", 20),
        agent="era",
        seed=0,
        partition=Partition.from_boundaries(mixture.boundaries, 1000),
        experts=tuple(ArchitectureSpec(dict(spec)) for spec in mixture.config["architectures"]),
        shares=(1 / experts,) * experts,
        expert_costs=(Cost(macs=100, params=10),) * experts,
        dense_cost=Cost(macs=200, params=20),
        loss=0.1,
    )
    rows = {"dense": {"denoising_loss": 0.1}, "macs-0.50": {"denoising_loss": 0.125, "paired_mse": 0.5, "frechet": None}}
    came = Provenance(name, "f" * 64, "/somewhere/secret/dense-model", "a" * 64, "/somewhere/secret/images", "b" * 64, 0, {"torch": "2"})
    family = families.of_class(mixture.config["base"]).__name__.rpartition(".")[2]
    manifest = MixtureManifest(name, family, plan, rows, {"sampler": {"guidance_scale": 2.0, "epsilon_scale": 1.002}}, came, {})
    return Registry(registry).publish(name, manifest, folder)


def ddim(**settings: Any) -> diffusers.DDIMScheduler:
    return diffusers.DDIMScheduler(**{"clip_sample": False, **settings})


def isolated(code: str, *arguments: object, cwd: Path, **environment: str) -> str:
    """Run code in a new process without diffpruning and without a network; its last line of output."""
    env = {"PATH": "/usr/bin:/bin", "HOME": str(cwd), "HF_HOME": str(cwd / "hf"), "HF_HUB_OFFLINE": "1", **environment}
    threads = "import torch; torch.set_num_threads(1)\n"
    command = [sys.executable, "-I", "-c", HIDDEN + threads + code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().rpartition("\n")[2]
