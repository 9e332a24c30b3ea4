"""The first stage: the same numbers as diffusers' classes, and every unusable folder named in one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from workers import first_stage
from workers.contracts import InputError
from workers.diffusion import generator

COMPONENT = {"kl": "vae", "vq": "vqvae"}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def pipeline(folder: Path, kind: str, **config) -> Path:
    """A pipeline folder with a random first stage; ``config`` changes its config.json, None removes a key."""
    where = folder / COMPONENT[kind]
    first_stage.tiny(kind).save_pretrained(where)
    entry = ["diffusers", {"kl": "AutoencoderKL", "vq": "VQModel"}[kind]]
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "LDMPipeline", COMPONENT[kind]: entry}))
    stored = {**json.loads((where / "config.json").read_text()), **config}
    (where / "config.json").write_text(json.dumps({key: value for key, value in stored.items() if value is not None}))
    return where


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator("cpu", "test"))


def images(count: int = 3, size: int = 16) -> torch.Tensor:
    return noise(count, 3, size, size).clamp(-1, 1)


# --- finding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_the_component_of_the_index_is_found_by_either_name(tmp_path, kind):
    where = pipeline(tmp_path, kind)
    assert first_stage.locate(tmp_path) == where
    (tmp_path / "model_index.json").unlink()
    assert first_stage.locate(tmp_path) == where


@pytest.mark.parametrize("entry", [None, [None, None]])
def test_an_empty_entry_of_the_index_is_no_first_stage(tmp_path, entry):
    (tmp_path / "model_index.json").write_text(json.dumps({"vae": entry, "unet": ["diffusers", "UNet2DModel"]}))
    assert first_stage.locate(tmp_path) is None


def test_a_pipeline_in_pixels_has_none(emoji):
    assert first_stage.locate(emoji) is None


def test_a_listed_component_that_is_missing_is_named(tmp_path):
    where = pipeline(tmp_path, "vq")
    shutil.rmtree(where)
    with pytest.raises(InputError, match="lists a vqvae, but .* holds no vqvae/config.json"):
        first_stage.locate(tmp_path)


# --- describing ------------------------------------------------------------------------------------------------------


def test_describe_needs_no_weights(tmp_path):
    for kind, channels, scale in (("kl", 4, 0.5), ("vq", 3, 1.0)):
        where = pipeline(tmp_path / kind, kind)
        (where / WEIGHTS).unlink()
        info = first_stage.describe(where)
        assert info == first_stage.FirstStageInfo(kind, 3, channels, 2, scale)
        assert first_stage.FirstStageInfo.from_json(info.to_json()) == info


def test_a_vq_model_without_a_stated_scale_has_scale_one_and_a_kl_model_that_of_diffusers(tmp_path):
    assert first_stage.describe(pipeline(tmp_path / "1", "vq", scaling_factor=None)).scaling_factor == 1.0
    assert first_stage.describe(pipeline(tmp_path / "2", "kl", scaling_factor=None)).scaling_factor == 0.18215


def test_a_stated_scale_is_used_and_that_which_diffusers_adds_on_its_own_is_remarked_upon(tmp_path):
    stated = first_stage.describe(pipeline(tmp_path / "1", "vq", scaling_factor=0.7))
    assert (stated.scaling_factor, stated.note) == (0.7, "")
    doubtful = first_stage.describe(pipeline(tmp_path / "2", "vq", scaling_factor=0.18215))
    assert doubtful.scaling_factor == 0.18215 and "diffusers writes whenever a VQModel is saved" in doubtful.note
    assert not first_stage.describe(pipeline(tmp_path / "3", "kl", scaling_factor=0.18215)).note


def test_the_channels_of_a_vq_latent_are_those_of_its_codes(tmp_path):
    assert first_stage.describe(pipeline(tmp_path, "vq", vq_embed_dim=5)).latent_channels == 5


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"_class_name": "AutoencoderTiny"}, "holds a AutoencoderTiny: first stages of class AutoencoderKL and VQModel are supported"),
        ({"shift_factor": 0.1}, "sets shift_factor 0.1: only latents that are scaled and not shifted"),
        ({"scaling_factor": 0}, "scaling_factor 0: it is a number above 0"),
        ({"scaling_factor": "1"}, "scaling_factor '1': it is a number above 0"),
        ({"scaling_factor": float("nan")}, "scaling_factor nan: it is a number above 0"),
        ({"in_channels": 4}, "encodes 4 channels and decodes 3"),
        ({"block_out_channels": []}, "block_out_channels"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused_in_one_line(tmp_path, config, said):
    where = pipeline(tmp_path, "kl", **config)
    for refused in (first_stage.describe, first_stage.load, first_stage.digest, lambda where: first_stage.check(where, 8, 4)):
        with pytest.raises(InputError, match=said) as caught:
            refused(where)
        assert "\n" not in str(caught.value)


def test_a_config_that_is_no_json_is_named(tmp_path):
    where = pipeline(tmp_path, "kl")
    (where / "config.json").write_text("{")
    with pytest.raises(InputError, match="vae/config.json cannot be read"):
        first_stage.describe(where)


def test_digest_depends_on_config_and_weights_and_not_on_place_or_version(tmp_path):
    where = pipeline(tmp_path / "a", "vq")
    before = first_stage.digest(where)
    assert first_stage.digest(pipeline(tmp_path / "b", "vq", _diffusers_version="0.0.1", _name_or_path="elsewhere")) == before
    changed = first_stage.digest(pipeline(tmp_path / "c", "vq", scaling_factor=2.0))
    first_stage.tiny("vq", seed=1).save_pretrained(where)
    assert len({before, changed, first_stage.digest(where)}) == 3


# --- encoding and decoding -------------------------------------------------------------------------------------------


def test_kl_latents_are_the_mean_and_log_variance_of_diffusers(tmp_path):
    stage, x = first_stage.load(pipeline(tmp_path, "kl")), images()
    encoded = stage.encode(x)
    with torch.no_grad():
        posterior = first_stage.tiny("kl").encode(x).latent_dist
    assert encoded.shape == (3, 8, 8, 8) and not encoded.requires_grad
    assert torch.equal(encoded, torch.cat([posterior.mean, posterior.logvar], 1))


def test_vq_latents_are_those_before_quantisation(tmp_path):
    stage, x = first_stage.load(pipeline(tmp_path, "vq")), images()
    model = first_stage.tiny("vq")
    with torch.no_grad():
        expected = model.quant_conv(model.encoder(x))
    assert torch.equal(stage.encode(x), expected)
    codes = model.quantize.embedding.weight
    assert torch.cdist(expected.movedim(1, -1).reshape(-1, 3), codes).min(1).values.median() > 0.01


def test_decoding_vq_latents_takes_the_nearest_code_of_the_unscaled_latent(tmp_path):
    stage, model = first_stage.load(pipeline(tmp_path, "vq", scaling_factor=4.0)), first_stage.tiny("vq")
    latents = noise(2, 3, 8, 8)
    codes = model.quantize.embedding.weight.detach()
    nearest = (latents.movedim(1, -1)[..., None, :] - codes).square().sum(-1).argmin(-1)
    with torch.no_grad():
        expected = model.decoder(model.post_quant_conv(codes[nearest].movedim(-1, 1))).clamp(-1, 1)
    assert torch.allclose(stage.decode(latents * 4), expected, atol=1e-5)


def test_decoding_kl_latents_undoes_the_scale_and_stays_within_the_range_of_pixels(tmp_path):
    stage, model = first_stage.load(pipeline(tmp_path, "kl")), first_stage.tiny("kl")
    latents = 30 * noise(2, 4, 8, 8)
    with torch.no_grad():
        expected = model.decode(latents).sample
    decoded = stage.decode(latents * 0.5)
    assert expected.abs().max() > 1 and torch.allclose(decoded, expected.clamp(-1, 1), atol=1e-5)


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_a_batch_changes_nothing(tmp_path, kind, monkeypatch):
    stage, x = first_stage.load(pipeline(tmp_path, kind)), images(5)
    together = stage.encode(x)
    assert torch.allclose(together, torch.cat([stage.encode(one[None]) for one in x]), atol=1e-5)
    latents = together[:, : stage.info.latent_channels]
    decoded = stage.decode(latents)
    monkeypatch.setattr(first_stage, "DECODE_IMAGES", 2)
    assert torch.allclose(stage.decode(latents), decoded, atol=1e-5)


def test_a_loaded_first_stage_is_frozen_float32_in_eval_mode_also_from_half_weights(tmp_path):
    where = pipeline(tmp_path, "vq")
    save_file({name: tensor.half() for name, tensor in load_file(where / WEIGHTS).items()}, where / WEIGHTS, {"format": "pt"})
    model = first_stage.load(where).model
    assert not model.training and all(p.dtype == torch.float32 and not p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("math", first_stage.MATHS)
def test_arithmetic_is_what_was_asked_for_whatever_the_process_is_set_to_and_is_put_back(tmp_path, math):
    stage, seen = first_stage.load(pipeline(tmp_path, "kl"), math), []
    stage.model.encoder.register_forward_hook(
        lambda *_: seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.is_grad_enabled()))
    )
    before = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("medium")
    try:
        stage.encode(images())
        assert seen == [("high", True, False) if math == "tf32" else ("highest", False, False)]
        assert torch.get_float32_matmul_precision() == "medium" and torch.backends.cudnn.allow_tf32 == before
    finally:
        torch.set_float32_matmul_precision("highest")


# --- bad weights -----------------------------------------------------------------------------------------------------


def test_truncated_missing_and_foreign_weights_are_refused_by_the_headers_alone(tmp_path):
    where = pipeline(tmp_path, "vq")
    whole = (where / WEIGHTS).read_bytes()
    assert first_stage.check(where, 8, 3).kind == "vq"
    for broken, said in (
        (whole[:-100], "safetensors cannot be read"),
        (b"text", "safetensors cannot be read"),
        (None, "holds no .safetensors weights; re-save"),
    ):
        (where / WEIGHTS).unlink(missing_ok=True)
        if broken is not None:
            (where / WEIGHTS).write_bytes(broken)
        for refused in (first_stage.load, lambda where: first_stage.check(where, 8, 3)):
            with pytest.raises(InputError, match=said) as caught:
                refused(where)
            assert "\n" not in str(caught.value)
    first_stage.tiny("kl").save_pretrained(tmp_path / "kl")
    shutil.copy(tmp_path / "kl" / WEIGHTS, where / WEIGHTS)
    with pytest.raises(InputError, match="do not fit their config: decoder.conv_in.weight is .16, 4, 3, 3., the config says .16, 3, 3, 3."):
        first_stage.check(where, 8, 3)


def test_weights_that_lack_a_tensor_or_hold_nan_are_named(tmp_path):
    where = pipeline(tmp_path, "kl")
    tensors = load_file(where / WEIGHTS)
    save_file({name: tensor for name, tensor in tensors.items() if name != "quant_conv.bias"}, where / WEIGHTS, {"format": "pt"})
    with pytest.raises(InputError, match="do not fit their config: 1 keys, missing quant_conv.bias"):
        first_stage.load(where)
    tensors["quant_conv.bias"][0] = float("nan")
    save_file(tensors, where / WEIGHTS, {"format": "pt"})
    with pytest.raises(InputError, match="damaged: quant_conv.bias holds NaN"):
        first_stage.load(where)


def test_a_denoiser_of_other_latents_is_refused_with_both_shapes(tmp_path):
    where = pipeline(tmp_path, "kl")
    with pytest.raises(InputError, match="latents of the wrong shape: vae makes 4 x h x w, the denoiser takes 3 x 8 x 8"):
        first_stage.check(where, 8, 3)
    with pytest.raises(InputError, match="only square latents"):
        first_stage.check(where, [8, 16], 4)
