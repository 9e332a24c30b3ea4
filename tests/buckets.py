"""A tiny whole job on an object store, and machines that share nothing but it: what tests of runs on buckets have in common."""

import io
import json
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
from click.testing import CliRunner, Result
from PIL import Image

from orchestrator.cli import main
from orchestrator.place import Place
from tests.s3 import Server
from workers.objects import ObjectStore

JOB = """
name: small
model: {{path: {model}}}
data: {{path: {folder}/images, holdout: 8}}
similarity: {{timesteps: 6, images: 4, batch_size: 2, bootstrap: 5}}
partition: {{experts: 2}}
elastic: {{width_multiple: 32}}
specialize: {{steps: 4, batch_size: 2, random_networks: 0, importance_images: 2, checkpoint_every: 1}}
router: {{images: 4, era_steps: 2, era_batch: 2, trials: 4, influence_samples: 4}}
budgets: [{{ratio: 0.5}}]
sampler: {{steps: 4}}
finetune: {{steps: 2, batch_size: 2, compare: []}}
evaluate: {{images: 2, samples: 2, timesteps: 2, batch_size: 2}}
latency: {{batch: 2}}
export: {{rewrites: []}}
resources: {{device: cpu, local_cpus: 2}}
"""


def write_job(folder: Path, model: Path, images: Path) -> Path:
    """A folder with the job's file and its images."""
    (folder / "images").mkdir()
    rows = next(pq.ParquetFile(images).iter_batches(48, columns=["image"])).to_pylist()
    for i, row in enumerate(rows):
        Image.open(io.BytesIO(row["image"]["bytes"])).save(folder / "images" / f"{i:02d}.png")
    (folder / "job.yaml").write_text(JOB.format(folder=folder, model=model))
    return folder


@dataclass
class Bucket:
    """A storage.path of its own, the registry beside it, and machines that have nothing but their scratch folder in common with others."""

    server: Server
    uri: str
    folder: Path
    home: Path
    name: str = "small"

    @property
    def run(self) -> str:
        return self.uri.replace("?", f"/{self.name}?")

    def options(self, machine: str = "one") -> list[str]:
        values = {"storage.path": self.uri, "storage.scratch": self.home / machine, "registry.path": self.home / "registry"}
        return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]

    def command(self, name: str, *more: str, machine: str = "one") -> Result:
        return diffpruning(*name.split(), self.folder / "job.yaml", *self.options(machine), *more)

    def held(self) -> dict[str, int]:
        return self.server.keys(self.run)

    def scratch(self, machine: str = "one") -> Path:
        return Place.of(self.uri, self.name, str(self.home / machine)).folder

    def read(self, key: str) -> dict:
        return json.loads(b"".join(ObjectStore.of(self.run, "run").chunks(key)))


def diffpruning(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


def new_bucket(server, folder: Path, home: Path) -> Bucket:
    return Bucket(server, server.new_registry().replace("/mixtures", "/runs"), folder, home)


def published(registry: Path, name: str = "small") -> dict[str, bytes]:
    """All files of the version but those that tell when and where it was made."""
    version = registry / name / "1"
    found = {path.relative_to(version).as_posix(): path.read_bytes() for path in version.rglob("*") if path.is_file()}
    return {name: content for name, content in found.items() if name not in ("manifest.json", "SHA256SUMS")}
