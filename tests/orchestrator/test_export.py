"""`diffpruning export`: what lies in the folder, who can load it, and that nothing is written where it is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from diffusers import DDIMPipeline, DDPMPipeline, DiffusionPipeline, EDMEulerScheduler, EulerDiscreteScheduler, LDMPipeline
from huggingface_hub import ModelCard

from orchestrator.cli import main
from orchestrator.registry import Registry
from tests.hub import hub
from tests.published import config_of, ddim, isolated, publish, random_mixture
from workers import families, first_stage
from workers.conditioning import ClassEmbedder
from workers.ldm_pipeline import ClassConditionalLDMPipeline
from workers.mixture import MixtureDenoiser

DRAW = """
import sys
import numpy as np
from diffusers import DiffusionPipeline
def draw(folder, *given):
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    return pipeline, pipeline(*given, num_inference_steps=3, generator=generator, output_type="np").images
"""
AGAIN = """
pipeline, images = draw(sys.argv[1], *eval(sys.argv[4]))
assert type(pipeline.unet).__name__ == "MixtureDenoiser"
np.save(sys.argv[3], images)
pipeline.save_pretrained(sys.argv[2])
"""


def run(*arguments: object) -> Result:
    """The command in this process. An exception that is not turned into a line is the test's failure."""
    return CliRunner().invoke(main, ["export", *map(str, arguments)], catch_exceptions=False)


def images(pipeline: Any, *given: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    return pipeline(*given, num_inference_steps=3, generator=generator, output_type="np").images


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def registry(tmp_path_factory) -> Path:
    """A mixture in pixels, one of latents, one of latents and classes."""
    root, made = tmp_path_factory.mktemp("registry"), tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    pixels = config_of(families.family("unet2d").tiny())
    rewrites = ("fuse_qkv", "transpose_upsample")
    publish(root, "pixels", random_mixture(pixels, [300, 700], rewrites=rewrites), ddim(clip_sample=True), made / "pixels")
    publish(root, "latents", random_mixture(pixels, [500]), ddim(), made / "latents", vqvae=first_stage.tiny("vq"))
    guided = random_mixture(config_of(families.family("unet2d_condition").tiny()), [400], rewrites=("fold_context",))
    embedder = ClassEmbedder(11, 24, 10)
    publish(root, "classes", guided, ddim(), made / "classes", vqvae=first_stage.tiny("vq"), class_embedder=embedder)
    return root


@pytest.fixture(scope="module")
def pixels(registry) -> np.ndarray:
    """What the published mixture draws."""
    folder = Registry(registry).resolve("pixels").path
    return images(DDIMPipeline(MixtureDenoiser.from_pretrained(folder), ddim(clip_sample=True)), 2)


@pytest.fixture(scope="module")
def plain(registry, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("plain") / "out"
    done = run("pixels", "--registry", registry, "--out", out)
    assert done.exit_code == 0, done.output
    return out


# --- what is written ------------------------------------------------------------------------------------------------


def test_a_folder_holds_a_whole_pipeline_with_flat_weights_copied_byte_for_byte(registry, plain):
    weights = "diffusion_pytorch_model.safetensors"
    assert files(plain) == ["README.md", "model_index.json", "scheduler/scheduler_config.json", "unet/config.json", f"unet/{weights}"]
    version = Registry(registry).resolve("pixels").path
    assert all((plain / "unet" / name).read_bytes() == (version / name).read_bytes() for name in ("config.json", weights))
    index = json.loads((plain / "model_index.json").read_text())
    assert index["_class_name"] == "DDIMPipeline" and index["unet"] == ["workers.mixture", "MixtureDenoiser"]


def test_the_card_is_one_that_the_hub_reads_and_names_no_place_on_this_machine(plain):
    card = ModelCard.load(plain / "README.md")
    assert card.data.library_name == "diffusers" and card.data.base_model == "dense-model"
    assert {"pruned", "diffpruning"} <= set(card.data.tags)
    assert {r.metric_type: r.metric_value for r in card.data.eval_results} == {"denoising_loss": 0.125, "paired_mse": 0.5}
    assert card.data.model_name == "pixels" and {r.dataset_name for r in card.data.eval_results} == {"images"}
    assert "The noise that it predicts is divided by 1.002 ([epsilon scaling]" in card.text
    assert "| [300, 700) | 33% | 50.0% |" in card.text and "num_inference_steps=20" in card.text
    assert not [name for name in files(plain) if "secret" in (plain / name).read_text(errors="replace")]


def test_the_code_of_the_card_runs_and_draws_what_the_version_draws(plain, pixels, monkeypatch):
    code = (plain / "README.md").read_text().split("```python\n")[1].split("```")[0].replace("FOLDER", str(plain))
    space: dict[str, Any] = {}
    exec(code.rpartition("images =")[0], space)
    assert np.array_equal(images(space["pipeline"], 2), pixels)


def test_with_the_package_imported_it_loads_by_itself_and_with_the_unet_given(plain, pixels, tmp_path):
    whole = DiffusionPipeline.from_pretrained(plain)
    assert type(whole.unet) is MixtureDenoiser and np.array_equal(images(whole, 2), pixels)
    given = DiffusionPipeline.from_pretrained(plain, unet=MixtureDenoiser.from_pretrained(plain / "unet"))
    assert np.array_equal(images(given, 2), pixels)
    given.save_pretrained(tmp_path / "again")
    assert not [name for name in files(tmp_path / "again") if name.endswith(".py")], "the package's own class takes no code along"
    assert np.array_equal(images(DiffusionPipeline.from_pretrained(tmp_path / "again"), 2), pixels)


def test_a_version_of_latents_is_exported_with_its_first_stage(registry, tmp_path):
    done = run("latents", "--registry", registry, "--out", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["pipeline"] == "LDMPipeline"
    version = Registry(registry).resolve("latents").path
    by_hand = LDMPipeline(first_stage.load(version / "vqvae").model, MixtureDenoiser.from_pretrained(version), ddim())
    assert np.array_equal(images(DiffusionPipeline.from_pretrained(tmp_path / "out"), 2), images(by_hand, 2))


def test_a_version_in_a_bucket_is_exported_as_one_on_a_disk_is(registry, plain, server, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    uri, version = server.new_registry(), Registry(registry).resolve("pixels")
    shutil.copytree(version.path, tmp_path / "made", ignore=shutil.ignore_patterns("manifest.json", "SHA256SUMS"))
    Registry(uri).publish("pixels", version.manifest(), tmp_path / "made")
    done = run("pixels@latest", "--registry", uri, "--out", tmp_path / "out")
    assert done.exit_code == 0 and done.stdout.startswith("pixels:1 ") and "file 1 of " in done.stderr
    assert all((plain / name).read_bytes() == (tmp_path / "out" / name).read_bytes() for name in files(plain))
    assert files(tmp_path / "out") == files(plain)


# --- other commands on the same versions ----------------------------------------------------------------------------


def command(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


def test_a_version_without_golden_samples_takes_a_sampling_step_when_it_is_verified(registry):
    done = command("registry", "verify", "pixels", "--registry", registry)
    assert (done.exit_code, done.stderr) == (0, "") and done.stdout.endswith("files, loaded; no golden samples: took one sampling step\n")
    rows = json.loads(command("registry", "verify", "--registry", registry, "--json").stdout)
    assert [row["checks"] for row in rows] == [["hashes", "one sampling step"]] * 3


def test_an_expert_that_predicts_no_numbers_is_found_without_golden_samples(registry, tmp_path):
    mixture = MixtureDenoiser.from_pretrained(Registry(registry).resolve("pixels").path)
    with torch.no_grad():
        next(mixture.experts[1].parameters()).fill_(1e38)
    publish(tmp_path / "registry", "lost", mixture, ddim(), tmp_path / "made")
    done = command("registry", "verify", "--registry", tmp_path / "registry")
    assert (done.exit_code, done.stderr) == (4, "error: lost:1: expert 1 predicts numbers that are not finite\n")


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_samples_that_cannot_be_written_are_one_line(registry):
    done = command("sample", "pixels", "--registry", registry, "--count", 1, "--steps", 1, "--out", "/proc/x.png", "--device", "cpu")
    assert done.exit_code == 2 and re.fullmatch("error: --out: cannot write /proc/x.png: .+\n", done.stderr)
    assert command("sample", "pixels", "--registry", registry, "--seed", 10**23).exit_code == 2


# --- with code ------------------------------------------------------------------------------------------------------


def test_with_code_it_loads_and_is_saved_again_where_diffpruning_is_not_installed(registry, pixels, tmp_path):
    done = run("pixels", "--registry", registry, "--out", tmp_path / "first", "--with-code")
    assert done.exit_code == 0, done.output
    assert "unet/workers.mixture.py" in files(tmp_path / "first")
    isolated(DRAW + AGAIN, tmp_path / "first", tmp_path / "second", tmp_path / "images.npy", "(2,)", cwd=tmp_path)
    assert np.array_equal(np.load(tmp_path / "images.npy"), pixels)
    assert [n for n in files(tmp_path / "first") if n != "README.md"] == files(tmp_path / "second")
    second = MixtureDenoiser.from_pretrained(tmp_path / "second" / "unet")
    assert np.array_equal(images(DDIMPipeline(second, ddim(clip_sample=True)), 2), pixels)


@pytest.mark.slow
def test_what_was_saved_without_diffpruning_is_loaded_without_it(registry, pixels, tmp_path):
    run("pixels", "--registry", registry, "--out", tmp_path / "0", "--with-code")
    for i in range(2):
        isolated(DRAW + AGAIN, tmp_path / f"{i}", tmp_path / f"{i + 1}", tmp_path / "images.npy", "(2,)", cwd=tmp_path)
        assert np.array_equal(np.load(tmp_path / "images.npy"), pixels)
        shutil.rmtree(tmp_path / f"{i}")  # what was loaded from it must not be needed


def test_with_code_but_with_diffpruning_installed_a_given_unet_needs_no_trust(registry, pixels, tmp_path):
    run("pixels", "--registry", registry, "--out", tmp_path / "out", "--with-code")
    unet = MixtureDenoiser.from_pretrained(tmp_path / "out" / "unet")
    assert np.array_equal(images(DiffusionPipeline.from_pretrained(tmp_path / "out", unet=unet), 2), pixels)
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(tmp_path / "out")


@pytest.mark.slow
def test_the_class_conditional_pipeline_and_its_embedder_travel_too(registry, tmp_path):
    version = Registry(registry).resolve("classes").path
    parts = first_stage.load(version / "vqvae").model, MixtureDenoiser.from_pretrained(version)
    embedder = ClassEmbedder.from_pretrained(version / "class_embedder")
    wanted = images(ClassConditionalLDMPipeline(*parts, embedder, ddim()), [3, 9])
    done = run("classes", "--registry", registry, "--out", tmp_path / "first", "--with-code")
    assert done.exit_code == 0, done.output
    assert "pipeline([0, 1, 2, 3], num_inference_steps=20, guidance_scale=2)" in (tmp_path / "first" / "README.md").read_text()
    for i, folder in enumerate(("first", "second")):
        after = ("second", "third")[i]
        isolated(DRAW + AGAIN, tmp_path / folder, tmp_path / after, tmp_path / "images.npy", "([3, 9],)", cwd=tmp_path)
        assert np.array_equal(np.load(tmp_path / "images.npy"), wanted)
    code = ["class_embedder/workers.conditioning.py", "unet/workers.mixture.py", "workers.ldm_pipeline.py"]
    assert [name for name in files(tmp_path / "third") if name.endswith(".py")] == code


@pytest.mark.slow
def test_without_the_package_and_without_trust_nothing_of_the_folder_runs(registry, tmp_path):
    run("pixels", "--registry", registry, "--out", tmp_path / "out", "--with-code")
    (tmp_path / "out" / "unet" / "workers.mixture.py").write_text("raise SystemExit('it ran')")
    code = "import sys\nfrom diffusers import DiffusionPipeline\ntry:\n    DiffusionPipeline.from_pretrained(sys.argv[1])\n"
    assert isolated(code + "except ValueError as e:\n    print(str(e)[:80])", tmp_path / "out", cwd=tmp_path).startswith("The directory")


# --- around it, the dense pipeline ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    """The pipeline whose denoiser was pruned."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dense")
    DDPMPipeline(families.family("unet2d").tiny(), ddim()).save_pretrained(folder)
    return folder


def test_of_a_dense_pipeline_everything_but_the_unet_is_taken(registry, dense, pixels, tmp_path):
    done = run("pixels", "--registry", registry, "--out", tmp_path / "out", "--pipeline", dense)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("pixels:1          DDPMPipeline with DDIMScheduler")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert type(loaded) is DDPMPipeline and not loaded.scheduler.config.clip_sample
    assert type(loaded.unet) is MixtureDenoiser


def test_a_sampler_that_no_pipeline_in_pixels_can_use_is_replaced_and_said(registry, tmp_path):
    version = Registry(registry).resolve("pixels").path
    root = tmp_path / "registry"
    publish(root, "euler", MixtureDenoiser.from_pretrained(version), EulerDiscreteScheduler(), tmp_path / "made")
    done = run("euler", "--registry", root, "--out", tmp_path / "out")
    assert done.exit_code == 0 and "no pipeline in pixels that samples with EulerDiscreteScheduler: DDIM takes its place" in done.stdout
    assert images(DiffusionPipeline.from_pretrained(tmp_path / "out"), 2).shape == (2, 16, 16, 3)


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--push-to-hub", "me/it"], "--push-to-hub needs --with-code"),
        (["--push-to-hub", "../it", "--with-code"], "'../it' is no name of a repository: give OWNER/NAME"),
        (["--pipeline", "nowhere"], "no such folder: nowhere"),
        (["--pipeline", "OTHER"], "holds another denoiser than the one that was pruned: attention_head_dim is 8 there and 16 here"),
        (["--pipeline", "LACKING"], "model_index.json lists a scheduler, but"),
        (["--pipeline", "EDM"], "EDMEulerScheduler gives noise levels, not training timesteps, so a mixture cannot follow it"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_one_line_and_nothing_is_written(registry, dense, tmp_path, options, told):
    folder = tmp_path / "dense"
    shutil.copytree(dense, folder)
    if "OTHER" in options:
        config = json.loads((folder / "unet" / "config.json").read_text())
        (folder / "unet" / "config.json").write_text(json.dumps({**config, "attention_head_dim": 8}))
    if "LACKING" in options:
        shutil.rmtree(folder / "scheduler")
    if "EDM" in options:
        EDMEulerScheduler().save_pretrained(folder / "scheduler")
    options = [str(folder) if option.isupper() else option for option in options]
    done = run("pixels", "--registry", registry, "--out", tmp_path / "out", *options)
    assert done.exit_code == 2 and told in done.stderr and len(done.stderr.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


def test_a_folder_that_is_there_is_left_alone_and_an_empty_one_is_filled(registry, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    for out in (tmp_path / "out", tmp_path / "out" / "mine", tmp_path / "no" / "where"):
        done = run("pixels", "--registry", registry, "--out", out)
        assert done.exit_code == 2 and done.stderr.startswith("error: --out: ")
    assert files(tmp_path) == ["out/mine"]
    (tmp_path / "out" / "mine").unlink()
    assert run("pixels", "--registry", registry, "--out", tmp_path / "out").exit_code == 0
    assert "model_index.json" in files(tmp_path / "out")


def test_a_damaged_version_is_not_exported(registry, tmp_path):
    shutil.copytree(registry, tmp_path / "registry")
    weights = tmp_path / "registry" / "pixels" / "1" / "diffusion_pytorch_model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    done = run("pixels", "--registry", tmp_path / "registry", "--out", tmp_path / "out")
    assert done.exit_code == 4 and not (tmp_path / "out").exists()


# --- the Hub, on this machine ---------------------------------------------------------------------------------------


def push(registry: Path, server: Any, token: str, out: Path, model: str = "pixels") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "orchestrator", "export", model, "--registry", registry, "--out", out]
    env = {**os.environ, "HF_ENDPOINT": server.address, "HF_TOKEN": token, "HF_HOME": str(out.parent / "hf")}
    whole = [*map(str, command), "--with-code", "--push-to-hub", "me/it"]
    return subprocess.run(whole, cwd=Path(__file__).parents[2], env=env, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "given"), [("pixels", "(2,)"), ("classes", "([3, 9],)")])
def test_what_is_uploaded_is_downloaded_and_loaded_by_its_name(registry, model, given, tmp_path):
    with hub("hf_mine") as server:
        done = push(registry, server, "hf_mine", tmp_path / "out", model)
        assert done.returncode == 0, done.stderr
        assert f"pushed            {server.address}/me/it/commit/" in done.stdout
        assert sorted(server.files["me/it"]) == files(tmp_path / "out")
        assert all((tmp_path / "out" / name).read_bytes() == content for name, content in server.files["me/it"].items())
        there = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": server.address, "HF_HUB_DISABLE_TELEMETRY": "1"}
        isolated(DRAW + AGAIN, "me/it", tmp_path / "again", tmp_path / "hub.npy", given, cwd=tmp_path, **there)
    isolated(DRAW + AGAIN, tmp_path / "out", tmp_path / "local", tmp_path / "local.npy", given, cwd=tmp_path)
    assert np.array_equal(np.load(tmp_path / "hub.npy"), np.load(tmp_path / "local.npy"))


@pytest.mark.slow
def test_an_upload_that_the_hub_refuses_is_one_line_and_leaves_the_folder(registry, tmp_path):
    with hub("hf_mine") as server:
        done = push(registry, server, "hf_stolen", tmp_path / "out")
    assert done.returncode == 1 and "Traceback" not in done.stderr and "hf_stolen" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: me/it was not uploaded: ") and "is complete: try `hf upload me/it" in last
    assert "model_index.json" in files(tmp_path / "out") and not server.files
