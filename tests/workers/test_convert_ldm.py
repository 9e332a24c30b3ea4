"""Conversion of CompVis checkpoints: the stored outputs of the original code, an oracle for other architectures, and refusals."""

import hashlib
import json
import os
import pickle
import sys
import types
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, LDMPipeline, UNet2DModel, VQModel
from diffusers.models.attention_processor import Attention
from safetensors.torch import save_file
from torch import Tensor

from tests.compvis import Network, decode, encode, loud, settings, unet, write
from workers import conditioning
from workers.conditioning import ClassEmbedder
from workers.contracts import InputError
from workers.convert_ldm import convert
from workers.families import build, load_config, load_denoiser

FIXTURES = Path(os.environ.get("DIFFPRUNING_LDM_REFERENCE") or Path(__file__).parents[3] / "shared" / "fixtures" / "ldm_reference")
UNETS = ("church", "lsun_beds_ffhq_celebahq", "imagenet_cin256_v2")
FIRST_STAGES = ("first_stage_kl_f8", "first_stage_vq_f4")
SIZES = ("tiny", pytest.param("full", marks=pytest.mark.slow))
TOLERANCE = 1e-4

UNET = {
    **{"image_size": 8, "in_channels": 3, "out_channels": 3, "model_channels": 32, "channel_mult": [1, 2]},
    **{"num_res_blocks": 1, "attention_resolutions": [1, 2], "num_heads": 4},
}
CONDITIONAL = {**UNET, "num_heads": 1, "use_spatial_transformer": True, "transformer_depth": 1, "context_dim": 24}
DDCONFIG = {
    **{"double_z": False, "z_channels": 3, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 2]},
    **{"num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0},
}
VQ = {"embed_dim": 3, "n_embed": 64, "ddconfig": DDCONFIG}
KL = {"embed_dim": 3, "ddconfig": {**DDCONFIG, "double_z": True}}
EMBEDDER = {"cond_stage_config": {"target": "ldm.modules.encoders.modules.ClassEmbedder"}}


def first_stage(kind: str, params: dict[str, Any]) -> dict[str, Any]:
    return {"target": f"ldm.models.autoencoder.{kind}", "params": {**params, "lossconfig": {"target": "torch.nn.Identity"}}}


def relative_error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ema_key(key: str) -> str:
    return "model_ema." + key.removeprefix("model.").replace(".", "")


def unet_weights(params: dict[str, Any], make=loud) -> dict[str, Tensor]:
    net = Network(make)
    unet(net, params, noise(1, params["in_channels"], 8, 8), torch.tensor([3]), noise(1, 1, params.get("context_dim", 1)))
    return net.weights


def first_stage_weights(params: dict[str, Any]) -> dict[str, Tensor]:
    net = Network()
    decode(net, params, encode(net, params, noise(1, 3, 16, 16)).chunk(2 if params["ddconfig"]["double_z"] else 1, dim=1)[0])
    return net.weights


# --- the original code's outputs ------------------------------------------------------------------------------------


def quiet(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """The weights with which the stored outputs were made."""
    noise = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape).astype(np.float32)
    if len(shape) > 1:
        return noise * np.float32(0.5 if "embedding" in key else 0.02)
    return (1 + 0.1 * noise).astype(np.float32) if key.endswith(".weight") else (0.02 * noise).astype(np.float32)


def reference(name: str) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """(description, weights, inputs and outputs)"""
    if not (FIXTURES / f"{name}.json").is_file():
        pytest.skip("the outputs of the original code are not here: DIFFPRUNING_LDM_REFERENCE names their folder")
    about = json.loads((FIXTURES / f"{name}.json").read_text())
    weights = {key: torch.from_numpy(quiet(key, tuple(shape))) for key, shape in about["weights"].items()}
    return about, weights, {key: torch.from_numpy(value) for key, value in np.load(FIXTURES / f"{name}.npz").items()}


def forward(model: Any, stored: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(stored["x"], stored["t"], *([stored["context"]] if "context" in stored else [])).sample


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", UNETS)
def test_a_converted_unet_gives_the_output_of_the_original_code(tmp_path, name, size):
    about, weights, stored = reference(f"{name}.{size}")
    convert(*write(tmp_path, weights, settings(about["unet_config"])), tmp_path / "out")
    model = load_denoiser(tmp_path / "out")
    assert sum(parameter.numel() for parameter in model.parameters()) == about["parameters"]
    assert relative_error(forward(model, stored), stored["y"]) < TOLERANCE


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", FIRST_STAGES)
def test_a_converted_first_stage_encodes_and_decodes_as_the_original_code(tmp_path, name, size):
    about, weights, stored = reference(f"{name}.{size}")
    latent, quantised = about["embed_dim"], about["n_embed"] is not None
    kind, found = ("VQModelInterface", VQModel) if quantised else ("AutoencoderKL", AutoencoderKL)
    params = {"embed_dim": latent, "ddconfig": about["ddconfig"], **({"n_embed": about["n_embed"]} if quantised else {})}
    net = {**UNET, "in_channels": latent, "out_channels": latent}
    config = settings(net, first_stage_config=first_stage(kind, params), scale_by_std=not quantised)
    buffer = {} if quantised else {"scale_factor": torch.tensor(0.22765929)}
    convert(*write(tmp_path, {**unet_weights(net), **weights, **buffer}, config), tmp_path / "out")
    model = found.from_pretrained(tmp_path / "out" / "vqvae")
    assert sum(parameter.numel() for parameter in model.parameters()) == about["parameters"]
    assert model.config.scaling_factor == pytest.approx(1.0 if quantised else 0.22765929, abs=1e-8)
    with torch.no_grad():
        encoded = model.encode(stored["image"])
        encoded = encoded.latents if quantised else encoded.latent_dist.parameters
        decoded = model.decode(stored["decoder_input"]).sample
    assert relative_error(encoded, stored["encoded"]) < TOLERANCE
    assert relative_error(decoded, stored["decoded"]) < TOLERANCE


@pytest.mark.parametrize("name", [*UNETS, *FIRST_STAGES])
def test_the_oracle_gives_the_output_of_the_original_code(name):
    about, weights, stored = reference(f"{name}.tiny")
    net = Network(quiet)
    if name in UNETS:
        found = {"y": unet(net, about["unet_config"], stored["x"], stored["t"], stored.get("context"))}
    else:
        found = {"encoded": encode(net, about, stored["image"]), "decoded": decode(net, about, stored["decoder_input"])}
    assert net.weights.keys() == weights.keys()
    assert max(relative_error(output, stored[key]) for key, output in found.items()) < TOLERANCE


# --- any architecture -----------------------------------------------------------------------------------------------

CROSS = {"use_spatial_transformer": True, "context_dim": 24}
ARCHITECTURES = {
    "heads by number": (UNET, "UNet2DModelWithHeads"),
    "heads by number at one width": ({**UNET, "attention_resolutions": [2]}, "UNet2DModel"),
    "one head": ({**UNET, "num_heads": 1}, "UNet2DModel"),
    "heads by dim": ({**UNET, "num_head_channels": 16}, "UNet2DModel"),
    "a head dim wins": ({**UNET, "num_heads": 5, "num_heads_upsample": 3, "num_head_channels": 8}, "UNet2DModel"),
    "the same heads upward": ({**UNET, "num_heads_upsample": 4}, "UNet2DModelWithHeads"),
    "heads upward overlooked": ({**UNET, "num_heads_upsample": 2, "legacy": False}, "UNet2DModelWithHeads"),
    "new attention order": ({**UNET, "use_new_attention_order": True}, "UNet2DModelWithHeads"),
    "attention in the middle alone": ({**UNET, "attention_resolutions": [], "num_heads": 8}, "UNet2DModel"),
    "scale and shift": ({**UNET, "use_scale_shift_norm": True}, "UNet2DModelWithHeads"),
    "levels joined by blocks": ({**UNET, "attention_resolutions": [2], "resblock_updown": True, "conv_resample": False}, "UNet2DModel"),
    "blocks with scale and shift": (
        {**UNET, "channel_mult": [1, 2, 2], "attention_resolutions": [1, 4], "resblock_updown": True, "use_scale_shift_norm": True},
        "UNet2DModelWithHeads",
    ),
    "three layers, odd widths": ({**UNET, "num_res_blocks": 3, "channel_mult": [1, 3, 2], "num_heads": 2}, "UNet2DModelWithHeads"),
    "one level": ({**UNET, "channel_mult": [1], "conv_resample": False}, "UNet2DModel"),
    "four channels": ({**UNET, "in_channels": 4, "out_channels": 4, "dropout": 0.1, "use_checkpoint": True}, "UNet2DModelWithHeads"),
    "transformers": ({**UNET, **CROSS}, "UNet2DConditionModel"),
    "deep transformers": ({**UNET, **CROSS, "transformer_depth": 2, "num_heads": 2, "num_heads_upsample": 4}, "UNet2DConditionModel"),
    "transformers with heads by dim": (
        {**UNET, **CROSS, "num_head_channels": 16, "use_scale_shift_norm": True, "legacy": False},
        "UNet2DConditionModel",
    ),
    "transformers at some levels": (
        {**UNET, **CROSS, "channel_mult": [1, 2, 1], "attention_resolutions": [2, 64], "num_head_channels": 16},
        "UNet2DConditionModel",
    ),
}


@pytest.mark.parametrize(("params", "class_name"), ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_the_architecture_is_read_from_the_yaml(tmp_path, params, class_name):
    net = Network()
    x, t, context = noise(2, params["in_channels"], 8, 8), torch.tensor([7, 912]), noise(2, 1, 24)
    expected = unet(net, params, x, t, context)
    config = settings(params)
    convert(*write(tmp_path, net.weights, config), tmp_path / "out")
    model = load_denoiser(tmp_path / "out")
    assert type(model).__name__ == class_name
    assert model.config.sample_size == params["image_size"]
    stored = {"x": x, "t": t} | ({"context": context} if class_name == "UNet2DConditionModel" else {})
    assert relative_error(forward(model, stored), expected) < TOLERANCE


def test_the_oracle_tells_heads_and_orders_apart():
    inputs = noise(1, 3, 8, 8), torch.tensor([7])
    expected = unet(Network(), UNET, *inputs)
    for change in ({"num_heads": 8}, {"num_heads_upsample": 2}, {"use_new_attention_order": True}):
        assert relative_error(unet(Network(), {**UNET, **change}, *inputs), expected) > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("kind", "params"),
    [
        ("VQModelInterface", {**VQ, "embed_dim": 4, "ddconfig": {**DDCONFIG, "attn_resolutions": [16], "ch_mult": [1, 2, 3]}}),
        ("AutoencoderKL", {**KL, "ddconfig": {**KL["ddconfig"], "attn_resolutions": [32], "num_res_blocks": 2}}),
    ],
    ids=["VQ", "KL"],
)
def test_a_first_stage_with_attention_is_converted(tmp_path, kind, params):
    net, image = Network(), noise(1, 3, 16, 16)
    latents = noise(1, params["embed_dim"], 8, 8, seed=1)
    encoded, decoded = encode(net, params, image), decode(net, params, latents)
    denoiser = {**UNET, "in_channels": params["embed_dim"], "out_channels": params["embed_dim"]}
    config = settings(denoiser, first_stage_config=first_stage(kind, params), scale_factor=0.5)
    convert(*write(tmp_path, {**unet_weights(denoiser), **net.weights}, config), tmp_path / "out")
    model = (VQModel if kind == "VQModelInterface" else AutoencoderKL).from_pretrained(tmp_path / "out" / "vqvae")
    with torch.no_grad():
        found = model.encode(image)
        assert relative_error(found.latents if kind == "VQModelInterface" else found.latent_dist.parameters, encoded) < TOLERANCE
        assert relative_error(model.decode(latents).sample, decoded) < TOLERANCE
    assert model.config.scaling_factor == 0.5


@pytest.mark.parametrize(
    ("schedule", "betas"),
    [
        ("linear", torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2),
        ("sqrt_linear", torch.linspace(0.0015, 0.0195, 1000, dtype=torch.float64)),
        ("cosine", None),
    ],
)
def test_the_noise_schedule_is_that_of_the_original_code(tmp_path, schedule, betas):
    if betas is None:
        steps = torch.cos((torch.arange(1001, dtype=torch.float64) / 1000 + 8e-3) / (1 + 8e-3) * torch.pi / 2) ** 2
        betas = (1 - steps[1:] / steps[:-1]).clip(0, 0.999)
    convert(*write(tmp_path, {**unet_weights(UNET), "betas": betas}, settings(UNET, beta_schedule=schedule)), tmp_path / "out")
    scheduler = DDIMScheduler.from_pretrained(tmp_path / "out" / "scheduler")
    assert torch.allclose(scheduler.betas.double(), betas, rtol=1e-4)
    scheduler.set_timesteps(200)
    assert scheduler.timesteps.tolist() == list(range(996, 0, -5))
    assert scheduler.config.prediction_type == "epsilon" and not scheduler.config.clip_sample


# --- a complete checkpoint ------------------------------------------------------------------------------------------

JUNK = {
    **{"betas": torch.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2, "logvar": torch.zeros(1000), "lvlb_weights": torch.ones(1000)},
    **{"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(410000, dtype=torch.int32)},
    **{"first_stage_model.loss.discriminator.main.0.weight": noise(8, 3, 4, 4), "first_stage_model.loss.logvar": torch.zeros(())},
    **{"first_stage_model.model_ema.encoderconv_inweight": noise(32, 3, 3, 3)},
    **{
        key: torch.full((1000,), float("nan"))
        for key in (
            *("alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
            *("log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance"),
            *("posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"),
        )
    },
}


def averaged(key: str, shape: tuple[int, ...]) -> np.ndarray:
    return loud(f"averaged {key}", shape)


@pytest.fixture
def complete() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A class-conditional model with all that CompVis saves, and its yaml."""
    weights = {
        **unet_weights(CONDITIONAL),
        **{ema_key(key): value for key, value in unet_weights(CONDITIONAL, averaged).items()},
        **first_stage_weights(VQ),
        "cond_stage_model.embedding.weight": noise(11, 24),
        "scale_factor": torch.tensor(1.0),
        **JUNK,
    }
    params = {"n_classes": 11, "embed_dim": 24, "key": "class_label", "ucg_rate": 0.1}
    embedder = {"target": "ldm.modules.encoders.modules.ClassEmbedder", "params": params}
    config = settings(
        CONDITIONAL,
        **{"image_size": 8, "channels": 3, "conditioning_key": "crossattn", "cond_stage_key": "class_label", "monitor": "val/loss"},
        **{"first_stage_config": first_stage("VQModelInterface", VQ), "cond_stage_config": embedder, "cond_stage_trainable": True},
    )
    return weights, config


def test_every_part_of_a_complete_checkpoint_is_converted(tmp_path, complete):
    weights, config = complete
    out = tmp_path / "out"
    found = convert(*write(tmp_path, *complete), out)
    assert {path.name for path in out.iterdir()} == {
        *("README.md", "model_index.json", "unet", "vqvae", "class_embedder", "scheduler"),
    }
    assert found["written"].keys() == {"unet", "vqvae", "class_embedder", "scheduler"}
    assert found["left_out"] == {}
    index = json.loads((out / "model_index.json").read_text())
    assert index.pop("_diffusers_version")
    assert index == {
        "_class_name": "ClassConditionalLDMPipeline",
        "class_embedder": ["workers.conditioning", "ClassEmbedder"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vqvae": ["diffusers", "VQModel"],
    }
    embedder = ClassEmbedder.from_pretrained(out / "class_embedder")
    labels = torch.tensor([0, 10, 3])
    assert torch.equal(embedder(labels), weights["cond_stage_model.embedding.weight"][labels][:, None])
    assert embedder.null_class == 10
    image, net = noise(1, 3, 32, 32), Network()
    vqvae = VQModel.from_pretrained(out / "vqvae")
    with torch.no_grad():
        assert relative_error(vqvae.encode(image).latents, encode(net, VQ, image)) < TOLERANCE
        latents = noise(1, 3, 16, 16)
        assert relative_error(vqvae.decode(latents).sample, decode(net, VQ, latents)) < TOLERANCE
    assert vqvae.config.scaling_factor == 1.0


def test_a_class_conditional_folder_is_a_guided_pipeline_and_its_readme_runs(tmp_path, complete, monkeypatch):
    convert(*write(tmp_path, *complete), tmp_path / "this folder")
    readme = (tmp_path / "this folder" / "README.md").read_text()
    code = readme.partition("```python\n")[2].partition("```")[0]
    assert "from workers.ldm_pipeline import ClassConditionalLDMPipeline" in code
    monkeypatch.chdir(tmp_path)
    done: dict[str, Any] = {}
    exec(code.replace("class_labels=[0, 1]", "class_labels=[0, 1], num_inference_steps=2, guidance_scale=3.0"), done)
    assert [image.size for image in done["images"]] == [(16, 16)] * 2
    assert "null_class 10" in readme


@pytest.mark.parametrize(
    ("params", "null_class"),
    [
        ({"n_classes": 1001}, 1000),
        ({"n_classes": 1001, "ucg_rate": 0.0}, None),
        ({"n_classes": 101}, None),
        ({"n_classes": 101, "ucg_rate": 0.1}, 100),
        ({}, None),
    ],
    ids=["cin256-v2", "1001 real classes", "101 real classes", "100 and null", "CompVis' default, 1000"],
)
def test_the_last_class_is_null_only_if_the_yaml_says_so_or_as_in_cin256(tmp_path, params, null_class):
    count = params.get("n_classes", 1000)
    config = settings(
        CONDITIONAL,
        conditioning_key="crossattn",
        cond_stage_config={**EMBEDDER["cond_stage_config"], "params": {"embed_dim": 24, **params}},
    )
    weights = {**unet_weights(CONDITIONAL), "cond_stage_model.embedding.weight": noise(count, 24)}
    found = convert(*write(tmp_path, weights, config), tmp_path / "out")
    assert found["written"]["class_embedder"]["null_class"] == null_class
    classes = conditioning.describe(tmp_path / "out")
    assert (classes.count, classes.null) == (count - (null_class is not None), null_class)
    assert ClassEmbedder.from_pretrained(tmp_path / "out" / "class_embedder").null_class == null_class


@pytest.mark.parametrize(
    ("params", "told"),
    [
        ({"n_classes": 11, "ucg_rate": 1.5}, "ucg_rate: 1.5 is no share of the training images"),
        ({"n_classes": 1, "ucg_rate": 0.1}, "ucg_rate: 0.1 needs a null class after the real ones, but n_classes is 1"),
    ],
)
def test_an_impossible_null_class_is_refused(tmp_path, params, told):
    embedder = {**EMBEDDER["cond_stage_config"], "params": {"embed_dim": 24, **params}}
    config = settings(CONDITIONAL, conditioning_key="crossattn", cond_stage_config=embedder)
    with pytest.raises(InputError, match=told):
        convert(*write(tmp_path, {}, config), tmp_path / "out")


@pytest.mark.parametrize(("ema", "make"), [(True, averaged), (False, loud)], ids=["ema", "no-ema"])
def test_averaged_weights_are_taken_unless_they_are_not_wanted(tmp_path, complete, ema, make):
    found = convert(*write(tmp_path, *complete), tmp_path / "out", ema=ema)
    x, t, context = noise(1, 3, 8, 8), torch.tensor([500]), noise(1, 1, 24)
    expected = unet(Network(make), CONDITIONAL, x, t, context)
    assert relative_error(forward(load_denoiser(tmp_path / "out"), {"x": x, "t": t, "context": context}), expected) < TOLERANCE
    assert found["written"]["unet"]["weights"] == ("ema" if ema else "plain")


def test_a_checkpoint_without_averages_gives_its_plain_weights(tmp_path):
    found = convert(*write(tmp_path, {**unet_weights(UNET), "model_ema.decay": torch.tensor(0.9)}, settings(UNET)), tmp_path / "out")
    assert found["written"]["unet"]["weights"] == "plain"


def test_a_checkpoint_with_averages_alone_is_converted(tmp_path, complete):
    weights = {key: value for key, value in complete[0].items() if not key.startswith("model.")}
    files = write(tmp_path, weights, complete[1])
    assert convert(*files, tmp_path / "out")["written"]["unet"]["weights"] == "ema"
    with pytest.raises(InputError, match=r"\d+ missing keys \(model\.diffusion_model\."):
        convert(*files, tmp_path / "plain", ema=False)


def test_safetensors_and_half_precision_give_the_same_float32_folder(tmp_path):
    weights = {key: value.half() for key, value in unet_weights(UNET).items()}
    checkpoint, yaml_file = write(tmp_path, weights, settings(UNET))
    save_file(weights, tmp_path / "model.safetensors")
    torch.save(weights, tmp_path / "bare.pt")
    torch.save({"state_dict": weights}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    contents = set()
    for i, file in enumerate([checkpoint, tmp_path / "model.safetensors", tmp_path / "bare.pt", tmp_path / "old.ckpt"]):
        convert(file, yaml_file, tmp_path / f"out{i}")
        contents.add((tmp_path / f"out{i}" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes())
    assert len(contents) == 1
    assert {value.dtype for value in load_denoiser(tmp_path / "out0").state_dict().values()} == {torch.float32}


def test_what_lightning_leaves_beside_the_weights_is_overlooked(tmp_path, monkeypatch):
    _, yaml_file = write(tmp_path, {}, settings(UNET))
    with monkeypatch.context() as lightning:
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.callbacks.model_checkpoint"):
            lightning.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules[name].ModelCheckpoint = callback = type("ModelCheckpoint", (), {"__module__": name})
        beside = {"callbacks": {callback: {"best_model_score": np.float64(0.25)}}, "lr_schedulers": [{"_last_lr": [np.float64(1e-4)]}]}
        torch.save({**beside, "state_dict": unet_weights(UNET)}, tmp_path / "trained.ckpt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "trained.ckpt", weights_only=True)
    convert(tmp_path / "trained.ckpt", yaml_file, tmp_path / "out")
    load_denoiser(tmp_path / "out")


def test_parts_that_neither_file_has_are_left_out_and_said_so(tmp_path):
    found = convert(*write(tmp_path, unet_weights(CONDITIONAL), settings(CONDITIONAL)), tmp_path / "out")
    assert found["left_out"].keys() == {"vqvae", "class_embedder"}
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["vqvae"] == index["class_embedder"] == [None, None]
    assert (tmp_path / "out" / "README.md").read_text().count("left out: neither config.yaml nor model.ckpt has one") == 2


@pytest.mark.parametrize("heads", [{"num_head_channels": 16}, {"num_heads": 4}], ids=["by dim", "by number"])
@pytest.mark.parametrize(("kind", "params"), [("VQModelInterface", VQ), ("AutoencoderKL", KL)], ids=["VQ", "KL"])
def test_an_unconditional_folder_is_a_latent_diffusion_pipeline(tmp_path, kind, params, heads):
    net = {**UNET, **heads}
    config = settings(net, first_stage_config=first_stage(kind, params), cond_stage_config="__is_unconditional__")
    convert(*write(tmp_path, {**unet_weights(net), **first_stage_weights(params)}, config), tmp_path / "out")
    passed = LDMPipeline.from_pretrained(tmp_path / "out", unet=load_denoiser(tmp_path / "out"))
    images = []
    for pipeline in (passed, LDMPipeline.from_pretrained(tmp_path / "out")):
        pipeline.set_progress_bar_config(disable=True)
        images.append(pipeline(batch_size=1, num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0)).images)
    assert images[0].shape == (1, 16, 16, 3)
    assert np.abs(images[0] - images[1]).max() < TOLERANCE
    assert "LDMPipeline.from_pretrained" in (tmp_path / "out" / "README.md").read_text()


def test_a_plain_unet_refuses_a_config_whose_heads_it_cannot_say(tmp_path):
    convert(*write(tmp_path, unet_weights(UNET), settings(UNET)), tmp_path / "out")
    assert load_config(tmp_path / "out")["num_attention_heads"] == 4
    with pytest.raises(ZeroDivisionError):
        UNet2DModel.from_pretrained(tmp_path / "out" / "unet")


def test_heads_by_number_survive_saving_and_the_meta_device(tmp_path):
    convert(*write(tmp_path, unet_weights(UNET), settings(UNET)), tmp_path / "out")
    model = load_denoiser(tmp_path / "out")
    model.save_pretrained(tmp_path / "again" / "unet")
    with torch.device("meta"):
        models = [build(load_config(tmp_path / folder)) for folder in ("out", "again")]
    for found in (model, load_denoiser(tmp_path / "again"), *models):
        attentions = [module for module in found.modules() if isinstance(module, Attention)]
        assert [attention.heads for attention in attentions] == [4] * 7
        assert all(attention.scale == (attention.inner_dim / 4) ** -0.5 for attention in attentions)
    assert all(parameter.is_meta for found in models for parameter in found.parameters())
    for heads in (0, 5):
        with pytest.raises(InputError, match=f"num_attention_heads: {heads} heads do not divide 32 channels"):
            build({**load_config(tmp_path / "out"), "num_attention_heads": heads})


def test_the_readme_says_from_what_the_folder_was_made(tmp_path):
    files = write(tmp_path, unet_weights(UNET), settings(UNET))
    convert(*files, tmp_path / "out")
    readme = (tmp_path / "out" / "README.md").read_text()
    for file in files:
        assert f"`{file.name}`, sha256 `{hashlib.sha256(file.read_bytes()).hexdigest()}`" in readme
    assert "load_denoiser" in readme
    assert str(tmp_path) not in readme


def test_converting_twice_gives_the_same_files(tmp_path):
    files = write(tmp_path, unet_weights(UNET), settings(UNET))
    for name in ("a", "b"):
        convert(*files, tmp_path / name)
    contents = [{p.relative_to(tmp_path / n): p.read_bytes() for p in (tmp_path / n).rglob("*") if p.is_file()} for n in "ab"]
    assert contents[0] == contents[1]


@pytest.mark.parametrize(
    ("buffer", "params", "scaling"),
    [
        ({"scale_factor": torch.tensor(0.25)}, {"scale_by_std": True}, 0.25),
        ({"scale_factor": torch.tensor([0.25])}, {"scale_by_std": True, "scale_factor": 0.5}, 0.25),
        ({"scale_factor": torch.tensor(0.25)}, {}, 0.25),
        ({}, {"scale_by_std": True, "scale_factor": 0.5}, 0.5),
        ({}, {"scale_factor": "1.8215e-1"}, 0.18215),
        ({}, {}, 1.0),
    ],
)
def test_the_scale_of_kl_latents_is_the_checkpoints_then_the_yamls(tmp_path, buffer, params, scaling):
    config = settings(UNET, first_stage_config=first_stage("AutoencoderKL", KL), **params)
    convert(*write(tmp_path, {**unet_weights(UNET), **first_stage_weights(KL), **buffer}, config), tmp_path / "out")
    assert AutoencoderKL.from_pretrained(tmp_path / "out" / "vqvae").config.scaling_factor == pytest.approx(scaling)


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain() -> dict[str, Tensor]:
    return unet_weights(UNET)


def refusal(tmp_path: Path, checkpoint: Path, config: Path, out: Path | None = None) -> str:
    """The error's line; nothing may have been written."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError) as caught:
        convert(checkpoint, config, out or tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"dims": 3}, "dims"),
        ({"conv_resample": False}, "conv_resample"),
        ({"num_classes": 10}, "num_classes"),
        ({"n_embed": 8192}, "n_embed"),
        ({"num_heads_upsample": 2}, "num_heads_upsample"),
        ({"num_heads": -1}, "num_heads"),
        ({"num_heads": 5}, "num_heads"),
        ({"num_head_channels": 12}, "num_head_channels"),
        ({"channel_mult": [2, 4]}, "channel_mult"),
        ({"channel_mult": [1, 1.5]}, "channel_mult"),
        ({"channel_mult": []}, "channel_mult"),
        ({"model_channels": 40}, "model_channels"),
        ({"model_channels": "wide"}, "model_channels"),
        ({"model_channels": float("inf")}, "model_channels"),
        ({"num_res_blocks": [1, 2]}, "num_res_blocks"),
        ({"attention_resolutions": 2}, "attention_resolutions"),
        ({"image_size": None}, "image_size"),
        ({"context_dim": 24}, "context_dim"),
        ({"use_spatial_transformer": True}, "context_dim"),
        ({"use_spatial_transformer": True, "context_dim": [24, 24]}, "context_dim"),
        ({"use_spatial_transformer": True, "context_dim": 24, "resblock_updown": True}, "resblock_updown"),
        ({"use_spatial_transformer": True, "context_dim": 24, "use_linear_in_transformer": True}, "use_linear_in_transformer"),
    ],
)
def test_a_unet_that_diffusers_cannot_express_is_refused_by_its_key(tmp_path, plain, changes, key):
    text = refusal(tmp_path, *write(tmp_path, plain, settings({**UNET, **changes})))
    assert text.startswith(f"config.yaml: model.params.unet_config.params.{key}")


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"beta_schedule": "sqrt"}, "beta_schedule"),
        ({"beta_schedule": "cosine", "cosine_s": 0.01}, "cosine_s"),
        ({"given_betas": [0.1, 0.2]}, "given_betas"),
        ({"linear_end": 0.001}, "linear_end"),
        ({"linear_start": "small"}, "linear_start"),
        ({"parameterization": "v"}, "parameterization"),
        ({"num_timesteps_cond": 5}, "num_timesteps_cond"),
        ({"conditioning_key": "concat"}, "conditioning_key"),
        ({"conditioning_key": "adm"}, "conditioning_key"),
        ({"channels": 4}, "channels"),
        ({"unknown": 1}, "unknown"),
        ({"unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.EncoderUNetModel"}}, "unet_config.target"),
        ({"unet_config": 3}, "unet_config"),
        ({"first_stage_config": first_stage("VQModel", VQ)}, "first_stage_config.target"),
        ({"first_stage_config": first_stage("VQModelInterface", {**VQ, "remap": "used.npy"})}, "first_stage_config.params.remap"),
        ({"first_stage_config": first_stage("VQModelInterface", {**VQ, "embed_dim": 4})}, "first_stage_config"),
        ({"first_stage_config": first_stage("AutoencoderKL", {**KL, "embed_dim": 4})}, "first_stage_config.params.embed_dim"),
        ({"first_stage_config": first_stage("AutoencoderKL", VQ)}, "first_stage_config.params.ddconfig.double_z"),
        ({"first_stage_config": first_stage("VQModelInterface", KL)}, "first_stage_config.params.ddconfig.double_z"),
        (
            {"first_stage_config": first_stage("VQModelInterface", {**VQ, "ddconfig": {**DDCONFIG, "attn_type": "linear"}})},
            "first_stage_config.params.ddconfig.attn_type",
        ),
        (
            {"first_stage_config": first_stage("VQModelInterface", {**VQ, "ddconfig": {**DDCONFIG, "resamp_with_conv": False}})},
            "first_stage_config.params.ddconfig.resamp_with_conv",
        ),
        ({"cond_stage_config": {"target": "ldm.modules.encoders.modules.BERTEmbedder"}}, "conditioning_key"),
        (
            {"conditioning_key": "crossattn", "cond_stage_config": {"target": "ldm.modules.encoders.modules.BERTEmbedder"}},
            "cond_stage_config.target",
        ),
        ({"conditioning_key": "crossattn", **EMBEDDER}, "cond_stage_config"),
        ({"concat_mode": False, "cond_stage_config": "__is_first_stage__"}, "cond_stage_config"),
    ],
)
def test_a_model_that_diffusers_cannot_express_is_refused_by_its_key(tmp_path, plain, changes, key):
    config = settings(UNET)
    config["model"]["params"] |= changes
    text = refusal(tmp_path, *write(tmp_path, plain, config))
    assert text.startswith(f"config.yaml: model.params.{key}:")


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"cond_stage_config": "__is_unconditional__"}, "cond_stage_config"),
        (
            {"cond_stage_config": {**EMBEDDER["cond_stage_config"], "params": {"embed_dim": 25}}},
            "cond_stage_config.params.embed_dim",
        ),
    ],
)
def test_a_condition_that_does_not_fit_its_unet_is_refused(tmp_path, changes, key):
    text = refusal(tmp_path, *write(tmp_path, {"a": torch.zeros(1)}, settings(CONDITIONAL, conditioning_key="crossattn", **changes)))
    assert text.startswith(f"config.yaml: model.params.{key}:")


def test_a_model_of_another_class_is_refused(tmp_path, plain):
    config = settings(UNET)
    config["model"]["target"] = "ldm.models.diffusion.ddpm.DDPM"
    assert "model.target: 'ldm.models.diffusion.ddpm.DDPM' is not LatentDiffusion" in refusal(tmp_path, *write(tmp_path, plain, config))


@pytest.mark.parametrize("content", [b"", b"model: [", b"name: x", b"- 1", b"\xff\xfe", b"model: 3", b"model: {params: {}}"])
def test_a_yaml_of_something_else_is_named(tmp_path, plain, content):
    checkpoint, yaml_file = write(tmp_path, plain, {})
    yaml_file.write_bytes(content)
    assert "config.yaml" in refusal(tmp_path, checkpoint, yaml_file)


def test_missing_and_unexpected_keys_are_counted_and_the_first_named(tmp_path, plain):
    kept = {key: value for key, value in plain.items() if ".out_layers.0." not in key}
    assert len(plain) - len(kept) == 16
    text = refusal(tmp_path, *write(tmp_path, {**kept, "model.diffusion_model.attic.bias": torch.zeros(1)}, settings(UNET)))
    first = "model.diffusion_model.input_blocks.1.0.out_layers.0."
    assert f"model.ckpt does not fit config.yaml: 16 missing keys ({first}bias, {first}weight, " in text
    assert text.endswith(", ...); 1 unexpected key (model.diffusion_model.attic.bias)")


@pytest.mark.parametrize("key", ["cond_stage_model.embedding.weight", "first_stage_model.quantize.embedding.weight", "model_ema.more"])
def test_weights_of_a_part_that_the_yaml_does_not_have_are_unexpected(tmp_path, plain, key):
    weights = {**plain, **{ema_key(name): value for name, value in plain.items()}, key: torch.zeros(3, 4)}
    assert f"1 unexpected key ({key})" in refusal(tmp_path, *write(tmp_path, weights, settings(UNET)))


def test_a_part_that_only_the_yaml_has_is_missing(tmp_path, plain):
    config = settings(UNET, first_stage_config=first_stage("VQModelInterface", VQ))
    expected = len(first_stage_weights(VQ))
    assert f": {expected} missing keys (first_stage_model.decoder." in refusal(tmp_path, *write(tmp_path, plain, config))


def test_incomplete_averages_are_missing_keys(tmp_path, complete):
    weights, config = complete
    lost = next(key for key in weights if key.startswith("model_ema.diffusion"))
    del weights[lost]
    assert f"1 missing key ({lost})" in refusal(tmp_path, *write(tmp_path, weights, config))


def test_the_yaml_of_a_wider_model_is_told_by_its_shapes(tmp_path, plain):
    text = refusal(tmp_path, *write(tmp_path, plain, settings({**UNET, "model_channels": 64})))
    assert f"{len(plain) - 1} keys of another kind (" in text  # conv_out's bias has the image's channels
    assert "float32 [" in text


def test_weights_that_are_no_real_numbers_are_named(tmp_path, plain):
    key = "model.diffusion_model.out.2.bias"
    for odd in (plain[key].long(), plain[key].to_sparse()):
        text = refusal(tmp_path, *write(tmp_path, {**plain, key: odd}, settings(UNET)))
        assert f"1 key of another kind ({key}: {str(odd.dtype)[6:]} [3] for [3])" in text


def test_the_yaml_of_another_architecture_is_told_by_its_keys(tmp_path, plain):
    text = refusal(tmp_path, *write(tmp_path, plain, settings({**UNET, "attention_resolutions": [2]})))
    assert "unexpected keys (model.diffusion_model.input_blocks.1.1.norm.bias, " in text


@pytest.mark.parametrize("changes", [{"linear_end": 0.0155}, {"timesteps": 500}])
def test_the_yaml_of_another_noise_schedule_is_told_by_the_betas(tmp_path, plain, changes):
    files = write(tmp_path, {**plain, "betas": JUNK["betas"]}, settings(UNET, **changes))
    assert "model.ckpt does not fit config.yaml: " in (text := refusal(tmp_path, *files))
    assert "betas" in text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers_are_counted_and_named(tmp_path, plain, value):
    weights = {key: tensor.clone() for key, tensor in plain.items()}
    weights["model.diffusion_model.out.2.weight"][0, 0, 0, 0] = value
    text = refusal(tmp_path, *write(tmp_path, weights, settings(UNET)))
    assert f"1 of {len(plain)} tensors hold NaN or infinity (model.diffusion_model.out.2.weight)" in text


def test_a_scale_that_is_no_number_is_refused(tmp_path, plain):
    config = settings(UNET, first_stage_config=first_stage("AutoencoderKL", KL), scale_by_std=True)
    weights = {**plain, **first_stage_weights(KL)}
    assert "scale_factor is missing" in refusal(tmp_path, *write(tmp_path, weights, config))
    for value in (torch.tensor(float("nan")), torch.tensor(0.0), torch.zeros(3), torch.tensor(1j)):
        assert "scale_factor is" in refusal(tmp_path, *write(tmp_path, {**weights, "scale_factor": value}, config))


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
@pytest.mark.parametrize("kept", [0, 8, 100, 5000, -1])
def test_a_truncated_checkpoint_is_named(tmp_path, plain, suffix, kept):
    _, yaml_file = write(tmp_path, plain, settings(UNET))
    file = tmp_path / f"cut.{suffix}"
    if suffix == "safetensors":
        save_file(plain, file)
    else:
        torch.save({"state_dict": plain}, file)
    file.write_bytes(file.read_bytes()[:kept])
    assert f"CKPT: {file} cannot be read: it is damaged, or no checkpoint" in refusal(tmp_path, file, yaml_file)


class Trap:
    def __reduce__(self):
        return os.mkdir, ("sprung",)


@pytest.mark.parametrize("form", ["torch", "old torch", "pickle"])
def test_pickled_code_is_refused_and_not_run(tmp_path, plain, monkeypatch, form):
    monkeypatch.chdir(tmp_path)
    checkpoint, yaml_file = write(tmp_path, plain, settings(UNET))
    if form == "pickle":
        checkpoint.write_bytes(pickle.dumps({"state_dict": Trap()}, protocol=2))
    else:
        torch.save({"state_dict": plain, "callbacks": Trap()}, checkpoint, _use_new_zipfile_serialization=form == "torch")
    text = refusal(tmp_path, checkpoint, yaml_file)
    assert "holds pickled code (" in text and "mkdir), which was not run" in text
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("content", [[1, 2], {}, {"state_dict": {}}, {"state_dict": {"a": 1}}, {"epoch": 3}, torch.zeros(3)])
def test_a_file_without_a_state_dict_is_named(tmp_path, plain, content):
    _, yaml_file = write(tmp_path, plain, settings(UNET))
    torch.save(content, tmp_path / "other.ckpt")
    assert "holds no state_dict" in refusal(tmp_path, tmp_path / "other.ckpt", yaml_file)


def test_missing_files_are_named(tmp_path, plain):
    checkpoint, yaml_file = write(tmp_path, plain, settings(UNET))
    assert refusal(tmp_path, tmp_path / "no.ckpt", yaml_file) == f"CKPT: no such file: {tmp_path / 'no.ckpt'}"
    assert refusal(tmp_path, checkpoint, tmp_path / "no.yaml") == f"--config: no such file: {tmp_path / 'no.yaml'}"
    assert refusal(tmp_path, tmp_path, yaml_file) == f"CKPT: {tmp_path} is not a file"


def test_an_output_that_holds_something_is_refused(tmp_path, plain):
    files = write(tmp_path, plain, settings(UNET))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("all of it")
    assert "full is not empty" in refusal(tmp_path, *files, tmp_path / "full")
    assert "config.yaml is a file" in refusal(tmp_path, *files, files[1])
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    assert "gone is a file" in refusal(tmp_path, *files, tmp_path / "gone")
    assert "cannot be made" in refusal(tmp_path, *files, files[1] / "below")


def test_an_empty_folder_and_missing_parents_may_be_the_output(tmp_path, plain, monkeypatch):
    files = write(tmp_path, plain, settings(UNET))
    (tmp_path / "empty").mkdir()
    convert(*files, tmp_path / "empty")
    convert(*files, tmp_path / "models" / "mine" / "church")
    monkeypatch.chdir(tmp_path)
    convert(*files, "relative")
    for folder in ("empty", "models/mine/church", "relative"):
        load_denoiser(tmp_path / folder)
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_conversion_that_dies_leaves_nothing(tmp_path, plain, monkeypatch):
    files = write(tmp_path, plain, settings(UNET))

    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(DDIMScheduler, "save_pretrained", full_disk)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OSError, match="No space left"):
        convert(*files, tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before
