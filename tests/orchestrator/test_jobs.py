"""Every bundled job is planned, with random weights where only configs are bundled; and random weights make a whole pipeline folder."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner

from orchestrator.cli import main
from workers import conditioning, families, first_stage, random_init
from workers.diffusion import make_sampler, sample

JOBS = sorted((Path(__file__).parents[2] / "jobs").glob("*.yaml"))
LDM = Path(__file__).parents[2] / "jobs" / "ldm"


@pytest.fixture(scope="module")
def images(emoji_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough images for any bundled job, each with one of ImageNet's labels."""
    out = tmp_path_factory.mktemp("images") / "images.parquet"
    table = pq.read_table(emoji_images, columns=["image"])
    pq.write_table(table.append_column("label", pa.array([i % 1000 for i in range(len(table))], pa.int64())), out)
    return out


@pytest.mark.parametrize("job", JOBS, ids=lambda path: path.stem)
def test_every_bundled_job_is_planned(job, images, tmp_path):
    given = ["--set", f"data.path={images}", "--set", f"storage.path={tmp_path}", "--set", f"registry.path={tmp_path}"]
    random = [] if job.stem == "quickstart" else ["--set", "model.random_init=true"]
    if job.stem == "cifar10":  # its extractor is not bundled
        random += ["--set", "evaluate.frechet_samples=0", "--set", "evaluate.extractor=null"]
    found = CliRunner().invoke(main, ["plan", str(job), *given, *random])
    assert found.exit_code == 0, found.output
    assert "of memory per trainer" in found.stdout
    assert "GB of disk" in found.stdout
    assert "GPU-h" in found.stdout or job.stem == "quickstart"
    assert list(tmp_path.iterdir()) == []


def small(folder: Path) -> Path:
    """ImageNet's configs, shrunk to a size that a test can fill with weights."""
    shutil.copytree(LDM / "imagenet", folder)
    shrink = {
        "unet": {"block_out_channels": [32, 32, 32, 32], "cross_attention_dim": 8},
        "vqvae": {"block_out_channels": [32, 32, 32], "num_vq_embeddings": 16},
        "class_embedder": {"embed_dim": 8},
    }
    for name, changes in shrink.items():
        path = folder / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def test_random_weights_make_a_whole_pipeline_folder_the_same_for_the_same_seed(tmp_path):
    source = small(tmp_path / "source")
    made = random_init.folder_of(source, tmp_path, 3)
    random_init.make(source, made, 3)
    random_init.make(source, tmp_path / "again", 3)
    random_init.make(source, tmp_path / "other", 4)
    state = families.load_denoiser(made).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in families.load_denoiser(tmp_path / "again").state_dict().items())
    assert families.model_digest(made) == families.model_digest(tmp_path / "again") != families.model_digest(tmp_path / "other")
    where = first_stage.locate(made)
    assert where is not None
    assert first_stage.load(where).info.scaling_factor == 1.0
    assert conditioning.load(made).classes.null == 1000
    assert {path.name for path in tmp_path.iterdir()} == {"source", ".random", "again", "other"}


def test_a_folder_of_configs_without_weights_is_refused_unless_random_ones_are_asked_for(tmp_path, images):
    source = small(tmp_path / "source")
    found = CliRunner().invoke(main, ["plan", "imagenet", "--set", f"model.path={source}", "--set", f"data.path={images}"])
    assert found.exit_code == 2
    assert "holds no .safetensors weights" in found.stderr
    assert len(found.stderr.splitlines()) == 1


def test_eta_adds_noise_to_the_samples_of_ddim_and_to_no_other(emoji):
    config = families.load_scheduler_config(emoji)

    def drawn(name: str, eta: float) -> torch.Tensor:
        return sample(lambda x, t: x / 2, make_sampler(name, config), 5, [1, 2], (3, 4, 4), "cpu", eta)

    assert not torch.equal(drawn("ddim", 0.0), drawn("ddim", 1.0))
    assert torch.equal(drawn("ddim", 1.0), drawn("ddim", 1.0))
    assert torch.equal(drawn("euler", 0.0), drawn("euler", 1.0))
