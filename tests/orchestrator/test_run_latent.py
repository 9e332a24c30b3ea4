"""Latent diffusion from the CompVis checkpoint to drawn samples: unconditional with KL, class-conditional with VQ."""

import functools
import html
import json
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner, Result
from diffusers import LDMPipeline
from PIL import Image

from orchestrator.cli import main
from tests.compvis import Network, decode, encode, settings, unet, write
from workers import families, latency
from workers.contracts import MixturePlan
from workers.latency_table import LatencyTable
from workers.latents import LatentCache
from workers.ldm_pipeline import ClassConditionalLDMPipeline
from workers.mixture import MixtureDenoiser

CLASSES = 4
UNET = {
    **{"image_size": 8, "model_channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1, "attention_resolutions": [1, 2]},
    "church": {"in_channels": 4, "out_channels": 4, "num_heads": 4, "use_scale_shift_norm": True, "resblock_updown": True},
    "imagenet": {"in_channels": 3, "out_channels": 3, "num_heads": 1, "use_spatial_transformer": True, "context_dim": 24},
}
FIRST_STAGE = {
    "church": ("AutoencoderKL", {"embed_dim": 4}),
    "imagenet": ("VQModelInterface", {"embed_dim": 3, "n_embed": 64}),
}
JOB = """
name: {kind}
storage: {{path: {folder}/runs}}
registry: {{path: {folder}/registry}}
model: {{path: {folder}/model}}
data: {{path: {folder}/images.parquet, holdout: 4, flip: true, encode_batch: 5}}
similarity: {{timesteps: 6, images: 4, batch_size: 2, bootstrap: 5}}
partition: {{experts: 2}}
specialize: {{steps: 2, batch_size: 2, random_networks: 0, importance_images: 2}}
router: {{images: 4, era_steps: 2, era_batch: 2, trials: 4, influence_samples: 4, agents: [greedy, era]}}
budgets: [{{ratio: 0.6}}]
sampler: {{steps: 4}}
finetune: {{steps: 2, batch_size: 2, compare: []}}
evaluate: {{images: 2, samples: 2, timesteps: 2, batch_size: 2}}
latency: {{batch: 2}}
resources: {{device: cpu}}
"""


@dataclass
class Latent:
    kind: str
    folder: Path
    job: Path
    first: Result

    @property
    def cache(self) -> Path:
        [folder] = (self.folder / "runs" / self.kind / "cache").glob("latents-*")
        return folder

    @property
    def version(self) -> Path:
        return self.folder / "registry" / self.kind / "1"


def diffpruning(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def quiet(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Weights near a network's at its start, so that activations stay small."""
    noise = np.random.default_rng(len(key)).standard_normal(shape).astype(np.float32)
    return 0.05 * noise if len(shape) > 1 or key.endswith("bias") else 1 + 0.1 * noise


def checkpoint(folder: Path, kind: str) -> tuple[Path, Path]:
    """A complete CompVis checkpoint and its yaml."""
    params = {key: value for key, value in UNET.items() if key not in FIRST_STAGE} | UNET[kind]
    name, stage = FIRST_STAGE[kind]
    latent = params["in_channels"]
    double = kind == "church"
    ddconfig = {"double_z": double, "z_channels": latent, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 2]}
    stage = {**stage, "ddconfig": {**ddconfig, "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}}
    net = Network(quiet)
    unet(net, params, torch.randn(1, latent, 8, 8), torch.tensor([3]), torch.randn(1, 1, 24))
    decode(net, stage, encode(net, stage, torch.randn(1, 3, 16, 16))[:, :latent])
    weights: dict[str, Any] = dict(net.weights)
    for key, weight in weights.items():  # let the class be heard in the pixels
        if "attn2" in key:
            weight *= 20
    more: dict[str, Any] = {"first_stage_config": {"target": f"ldm.models.autoencoder.{name}", "params": stage}}
    if double:
        weights["scale_factor"] = torch.tensor(0.7)
        more["scale_by_std"] = True
    else:
        weights["cond_stage_model.embedding.weight"] = torch.randn(CLASSES + 1, 24, generator=torch.Generator().manual_seed(0))
        embedder = {"n_classes": CLASSES + 1, "embed_dim": 24, "key": "class_label", "ucg_rate": 0.1}
        more |= {"conditioning_key": "crossattn", "cond_stage_config": {"target": "ldm.modules.encoders.modules.ClassEmbedder"}}
        more["cond_stage_config"]["params"] = embedder
    return write(folder, weights, settings(params, **more))


def images(out: Path, labels: bool) -> None:
    rng = np.random.default_rng(0)
    folder = out.parent / "png"
    folder.mkdir()
    rows = []
    for i in range(20):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / f"{i}.png")
        rows.append({"bytes": (folder / f"{i}.png").read_bytes(), "path": f"{i}.png"})
    columns = {"image": rows} | ({"label": [i % CLASSES for i in range(20)]} if labels else {})
    pq.write_table(pa.table(columns), out)


@pytest.fixture(scope="module", params=FIRST_STAGE)
def latent(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Latent:
    kind: str = request.param
    folder = tmp_path_factory.mktemp(kind)
    ckpt, config = checkpoint(folder, kind)
    converted = diffpruning("convert-ldm", ckpt, "--config", config, "--out", folder / "model")
    assert converted.exit_code == 0, converted.output
    images(folder / "images.parquet", labels=kind == "imagenet")
    job = folder / "job.yaml"
    job.write_text(JOB.format(kind=kind, folder=folder))
    return Latent(kind, folder, job, diffpruning("run", job, "--inline", "--json"))


def test_a_converted_model_runs_from_latents_to_the_registry(latent):
    assert latent.first.exit_code == 0, latent.first.output
    assert latent.version.is_dir()
    assert (latent.folder / "runs" / latent.kind / "report.html").is_file()


def test_the_report_counts_what_is_published_rewrites_included(latent):
    manifest = json.loads((latent.version / "manifest.json").read_text())
    plan, metrics = MixturePlan.from_json(manifest["plan"]), manifest["metrics"]["macs-0.60"]
    mixture = MixtureDenoiser.from_pretrained(latent.version)
    assert metrics["parameters"] == sum(p.numel() for p in mixture.parameters())
    assert 0 < metrics["gmacs_per_step"] < plan.macs / 1e9


def test_the_latents_are_encoded_once_whatever_changes_about_the_denoiser(latent):
    before = {path: path.stat().st_mtime_ns for path in latent.cache.iterdir()}
    again = diffpruning("encode", latent.job, "--inline", "--json")
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["count"] == 20
    assert again.stderr.split()[:3] == ["encode", "already", "done"]
    more = diffpruning("run", latent.job, "--inline", "--only", "analyze", "--set", "similarity.buckets=128")
    assert more.exit_code == 0, more.output
    assert {path: path.stat().st_mtime_ns for path in latent.cache.iterdir()} == before
    cache = LatentCache.open(latent.cache)
    assert (cache.labels is not None) == (latent.kind == "imagenet")


def test_a_published_version_draws_images_by_itself(latent, tmp_path):
    version = ["sample", f"{latent.kind}:1", "--registry", latent.folder / "registry", "--count", 3, "--steps", 3]
    drawn = diffpruning(*version, "--out", tmp_path / "a.png")
    assert drawn.exit_code == 0, drawn.output
    assert Image.open(tmp_path / "a.png").size == (3 * 16, 16)
    guided = diffpruning(*version, "--class-label", 2, "--guidance-scale", 3, "--out", tmp_path / "b.png")
    if latent.kind == "church":
        assert guided.exit_code == 2
        assert "this model is not told a class" in guided.output
    else:
        assert guided.exit_code == 0, guided.output
        assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()
        beyond = diffpruning(*version, "--class-label", CLASSES, "--out", tmp_path / "c.png")
        assert beyond.exit_code == 2
        assert f"has the classes 0 to {CLASSES - 1}" in beyond.output


def test_the_mixture_takes_the_place_of_the_dense_denoiser_in_its_pipeline(latent):
    mixture = MixtureDenoiser.from_pretrained(latent.version)
    gen = torch.Generator().manual_seed(0)
    if latent.kind == "church":
        dense = families.load_denoiser(latent.folder / "model")
        assert LDMPipeline.from_pretrained(latent.folder / "model", unet=dense).unet is dense
        pipeline: Any = LDMPipeline.from_pretrained(latent.folder / "model", unet=mixture)
        drawn = pipeline(batch_size=2, num_inference_steps=3, generator=gen, output_type="np").images
    else:
        pipeline = ClassConditionalLDMPipeline.from_pretrained(latent.folder / "model", unet=mixture)
        drawn = pipeline([1, 2], num_inference_steps=3, guidance_scale=2.0, generator=gen, output_type="np").images
    assert drawn.shape == (2, 16, 16, 3)
    assert np.isfinite(drawn).all()


def test_the_report_ends_with_code_that_draws_images_in_a_new_process(latent, tmp_path):
    page = (latent.folder / "runs" / latent.kind / "report.html").read_text()
    code, command = (html.unescape(block) for block in re.findall(r"<pre>(.*?)</pre>", page, re.DOTALL))
    assert ("ClassConditionalLDMPipeline" in code) == ("--class-label 0" in command) == (latent.kind == "imagenet")
    code += "\nprint([image.size for image in images])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str([(16, 16)] * (2 if latent.kind == "imagenet" else 1))
    drawn = diffpruning(*shlex.split(command.splitlines()[0])[1:], "--count", 1, "--out", tmp_path / "a.png")
    assert drawn.exit_code == 0, drawn.output


def test_a_latency_budget_measures_its_table_first_and_is_met_by_it(latent, monkeypatch):
    monkeypatch.setattr(latency, "FEWEST_NETWORKS", 1)
    monkeypatch.setattr(latency, "measure", functools.partial(latency.measure, visits=1, validation_networks=2))
    timed = ["run", latent.job, "--inline", "--json", "--set", "latency.batch=1", "--set", "name=timed"]
    found = diffpruning(*timed, "--set", "budgets=[{metric: latency, ratio: 0.7}]")
    assert found.exit_code == 0, found.output
    assert found.stderr.count("sub-networks are predicted with a median error of") == 1
    manifest = json.loads((latent.folder / "registry" / "timed" / "1" / "manifest.json").read_text())
    plan = MixturePlan.from_json(manifest["plan"])
    assert plan.budget.name == "latency-0.70"
    assert plan.cost_ratio <= 0.7
    [path] = (latent.folder / "runs" / "timed" / "cache").glob("latency-*.json")
    table = LatencyTable.load(path)
    for expert, cost in zip(plan.experts, plan.expert_costs, strict=True):
        assert cost.latency_ms == pytest.approx(table.predict(expert.choices))
    page = (latent.folder / "runs" / "timed" / "report.html").read_text()
    assert "at 70% of the dense model&#39;s time" in page
    assert "of dense MACs" not in page
    assert table.identity.device in html.unescape(page)
    shown = diffpruning("registry", "show", "timed", "--registry", latent.folder / "registry")
    assert "70% of dense time" in shown.stdout
    assert "for a batch of 1 in float32, not compiled" in shown.stdout
    impossible = diffpruning(*timed, "--set", "budgets=[{metric: latency, ratio: 0.001}]")
    assert impossible.exit_code == 3
    assert "of the dense model's measured time" in impossible.stderr


REFUSED = {
    "church": {
        "sampler.guidance_scale=2": "sampler.guidance_scale is 2, but the model has no null class",
        "export.rewrites=[shrink]": "export.rewrites 'shrink' is unknown",
    },
    "imagenet": {"data.holdout=19": "training needs at least 4 more"},
}


def test_what_does_not_fit_is_refused_in_one_line(latent):
    for override, text in REFUSED[latent.kind].items():
        refused = diffpruning("plan", latent.job, "--set", override)
        assert refused.exit_code == 2
        assert text in refused.stderr
        assert len(refused.stderr.splitlines()) == 1
