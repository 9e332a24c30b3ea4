"""The guided pipeline: what it draws is what a loop by hand draws, whichever denoiser is in it and whoever shares the batch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler
from PIL import Image
from torch import Tensor

from workers import conditioning, families, first_stage
from workers.conditioning import ClassEmbedder
from workers.contracts import ElasticSettings, InputError
from workers.cost import cost_table
from workers.ldm_pipeline import ClassConditionalLDMPipeline
from workers.mixture import MixtureDenoiser

CLASSES, STEPS = 10, 4
DDIM = {"beta_schedule": "scaled_linear", "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}


def pipeline_of(kind: str = "vq", null: bool = True) -> ClassConditionalLDMPipeline:
    torch.manual_seed(0)
    unet = families.family("unet2d_condition").tiny()
    if kind == "kl":
        unet = type(unet).from_config({**unet.config, "in_channels": 4, "out_channels": 4}).eval()
    embedder = ClassEmbedder(CLASSES + 1, 24, CLASSES) if null else ClassEmbedder(CLASSES, 24)
    vqvae = first_stage.tiny(kind)
    vqvae.register_to_config(scaling_factor=0.5)
    pipeline = ClassConditionalLDMPipeline(vqvae, unet, embedder, DDIMScheduler(**DDIM))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pipeline() -> ClassConditionalLDMPipeline:
    return pipeline_of()


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory) -> Path:
    """The pipeline as ``convert-ldm`` writes one."""
    folder = tmp_path_factory.mktemp("pipeline")
    pipeline.save_pretrained(folder)
    return folder


def gens(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw(pipeline: Any, labels: Any, **how: Any) -> np.ndarray:
    return pipeline(labels, **{"num_inference_steps": STEPS, "output_type": "np"} | how).images


def noise(*seeds: int, channels: int = 3) -> Tensor:
    return torch.cat([torch.randn(1, channels, 16, 16, generator=gen) for gen in gens(*seeds)])


@torch.no_grad()
def by_hand(pipeline: Any, labels: list[int], x: Tensor, scale: float | None) -> np.ndarray:
    """DDIM without noise, one forward pass for each side; unguided if ``scale`` is None."""
    unet, table, vqvae = pipeline.unet, pipeline.class_embedder.embedding.weight, pipeline.vqvae
    abar = DDIMScheduler(**DDIM).alphas_cumprod.tolist()
    stride = 1000 // STEPS
    for t in [1 + stride * i for i in reversed(range(STEPS))]:
        e = unet(x, t, encoder_hidden_states=table[labels][:, None]).sample
        if scale is not None:
            nothing = unet(x, t, encoder_hidden_states=table[[CLASSES] * len(labels)][:, None]).sample
            e = (1 - scale) * nothing + scale * e
        before = abar[t - stride] if t >= stride else abar[0]
        clean = (x - (1 - abar[t]) ** 0.5 * e) / abar[t] ** 0.5
        x = before**0.5 * clean + (1 - before) ** 0.5 * e
    codes = vqvae.quantize.embedding.weight
    nearest = torch.cdist((x / 0.5).permute(0, 2, 3, 1).flatten(0, 2), codes).argmin(1)
    quantised = codes[nearest].view(len(x), 16, 16, 3).permute(0, 3, 1, 2)
    images = vqvae.decode(quantised, force_not_quantize=True).sample
    return (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("scale", [0.0, 1.5, 4.0])
def test_guided_images_are_those_of_a_loop_by_hand(pipeline, scale):
    found = draw(pipeline, [3, 9], guidance_scale=scale, generator=gens(1, 2))
    assert found.shape == (2, 32, 32, 3) and found.dtype == np.float32
    assert np.allclose(found, by_hand(pipeline, [3, 9], noise(1, 2), scale), atol=1e-4)


def test_scale_one_is_unguided_and_another_scale_is_not(pipeline):
    plain = draw(pipeline, [3, 9], latents=noise(1, 2))
    assert np.allclose(plain, by_hand(pipeline, [3, 9], noise(1, 2), None), atol=1e-4)
    assert np.allclose(plain, by_hand(pipeline, [3, 9], noise(1, 2), 1.0), atol=1e-4)
    assert not np.allclose(plain, draw(pipeline, [3, 9], latents=noise(1, 2), guidance_scale=3.0), atol=1e-2)
    assert not np.allclose(plain, draw(pipeline, [4, 8], latents=noise(1, 2)), atol=1e-2)


def test_guidance_takes_one_double_batch_a_step_and_no_guidance_a_single_one(pipeline, monkeypatch):
    sizes, forward = [], pipeline.unet.forward
    monkeypatch.setattr(pipeline.unet, "forward", lambda x, *args, **kwargs: sizes.append(len(x)) or forward(x, *args, **kwargs))
    draw(pipeline, [3, 9, 1])
    draw(pipeline, [3, 9, 1], guidance_scale=2.0)
    assert sizes == [3] * STEPS + [6] * STEPS


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_with_a_generator_for_each_image_the_batch_does_not_matter(pipeline, eta):
    labels, seeds, how = [3, 9, 3], [1, 2, 3], {"eta": eta, "guidance_scale": 2.0}
    whole = draw(pipeline, labels, generator=gens(*seeds), **how)
    alone = [draw(pipeline, label, generator=gens(seed), **how)[0] for label, seed in zip(labels, seeds, strict=True)]
    assert np.allclose(whole, alone, atol=1e-4)
    assert not np.allclose(whole[0], whole[2], atol=1e-2)


def test_eta_adds_noise_of_the_generator(pipeline):
    drawn = [draw(pipeline, 3, eta=1.0, latents=noise(1), generator=gens(seed)) for seed in (1, 1, 2)]
    assert np.array_equal(drawn[0], drawn[1]) and not np.allclose(drawn[0], drawn[2], atol=1e-2)


def mixture_of_dense(unet: Any) -> MixtureDenoiser:
    config = {**unet.config, "_class_name": type(unet).__name__}
    dense = cost_table(config, ElasticSettings(width_multiple=1, depth=True, importance="magnitude")).space.dense
    mixture = MixtureDenoiser.of(config, [500], [dense] * 2).eval()
    for expert in mixture.experts:
        expert.load_state_dict(unet.state_dict())
    return mixture


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_mixture_of_two_dense_experts_draws_what_the_dense_model_draws(pipeline, folder, scale):
    mixed = ClassConditionalLDMPipeline.from_pretrained(folder, unet=mixture_of_dense(pipeline.unet))
    mixed.set_progress_bar_config(disable=True)
    assert isinstance(mixed.unet, MixtureDenoiser)
    assert np.array_equal(*(draw(p, [3, 9], guidance_scale=scale, generator=gens(1, 2)) for p in (mixed, pipeline)))


def test_a_saved_pipeline_is_loaded_whole_and_with_a_mixture_saved_again(pipeline, folder, tmp_path):
    expected = draw(pipeline, [3], guidance_scale=2.0, latents=noise(1))
    loaded = ClassConditionalLDMPipeline.from_pretrained(folder)
    ClassConditionalLDMPipeline(loaded.vqvae, mixture_of_dense(loaded.unet), loaded.class_embedder, loaded.scheduler).save_pretrained(
        tmp_path
    )
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["class_embedder"] == ["workers.conditioning", "ClassEmbedder"] and index["unet"] == ["workers.mixture", "MixtureDenoiser"]
    for found in (loaded, ClassConditionalLDMPipeline.from_pretrained(tmp_path)):
        found.set_progress_bar_config(disable=True)
        assert found.class_embedder.null_class == CLASSES and found.vqvae.config.scaling_factor == 0.5
        assert np.array_equal(draw(found, [3], guidance_scale=2.0, latents=noise(1)), expected)


def test_one_import_suffices_in_a_new_process(folder):
    code = "import sys\nfrom workers.ldm_pipeline import ClassConditionalLDMPipeline as P\nP.from_pretrained(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, folder], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Expected types" not in done.stderr


def test_the_general_pipeline_class_says_which_class_it_lacks(folder):
    with pytest.raises(AttributeError, match="module diffusers has no attribute ClassConditionalLDMPipeline"):
        DiffusionPipeline.from_pretrained(folder)


def test_images_come_as_asked_for(pipeline):
    array = draw(pipeline, [3, 9], latents=noise(1, 2))
    how = {"num_inference_steps": STEPS, "latents": noise(1, 2)}
    images = pipeline([3, 9], **how).images
    assert all(isinstance(image, Image.Image) for image in images) and [image.size for image in images] == [(32, 32)] * 2
    assert np.array_equal(np.asarray(images[1]), (array[1] * 255).round().astype(np.uint8))
    tensor = pipeline([3, 9], output_type="pt", return_dict=False, **how)[0]
    assert tensor.shape == (2, 3, 32, 32) and np.array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)


def test_labels_come_as_a_number_a_list_or_a_tensor(pipeline):
    found = [draw(pipeline, labels, latents=noise(1)) for labels in (3, [3], (3,), np.array([3]), torch.tensor(3), torch.tensor([3]))]
    assert all(np.array_equal(found[0], other) for other in found[1:])


def test_many_images_are_decoded_a_few_at_a_time(pipeline, monkeypatch):
    sizes, decode = [], pipeline.vqvae.decode
    monkeypatch.setattr(pipeline.vqvae, "decode", lambda x, *args, **kwargs: sizes.append(len(x)) or decode(x, *args, **kwargs))
    assert draw(pipeline, [0] * 9, num_inference_steps=1).shape == (9, 32, 32, 3)
    assert sizes == [8, 1]


def test_a_kl_first_stage_and_another_sampler_serve_too():
    pipeline = pipeline_of("kl")
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    found = draw(pipeline, [3, 9], guidance_scale=2.0, eta=1.0, generator=gens(1, 2))
    assert found.shape == (2, 32, 32, 3) and np.isfinite(found).all()


@pytest.mark.parametrize(
    ("labels", "how", "told"),
    [
        ([0, CLASSES], {}, "class_labels: image 1 has label 10, but the model has the classes 0 to 9"),
        (-1, {}, "image 0 has label -1"),
        ([], {}, "class_labels: .. is neither a label nor a list of labels"),
        ([[1, 2]], {}, "neither a label nor"),
        (1.5, {}, "1.5 is neither a label nor"),
        (True, {}, "True is neither a label nor"),
        (1, {"generator": gens(1, 2)}, "2 generators do not fit 1 class labels"),
        (1, {"latents": noise(1, 2)}, r"latents are of shape \[2, 3, 16, 16\], for 1 class labels they must be \[1, 3, 16, 16\]"),
        (1, {"output_type": "jpeg"}, "output_type is 'jpeg': known are pil, np, pt"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(pipeline, labels, how, told):
    with pytest.raises(InputError, match=told) as caught:
        draw(pipeline, labels, **how)
    assert "\n" not in str(caught.value)


def test_a_model_without_null_class_has_its_last_class_and_refuses_guidance():
    pipeline = pipeline_of(null=False)
    assert draw(pipeline, CLASSES - 1).shape == (1, 32, 32, 3)
    with pytest.raises(InputError, match="guidance_scale is 2, but the model has no null class"):
        draw(pipeline, 1, guidance_scale=2.0)


def test_the_pipeline_and_the_worker_agree_on_the_classes_of_a_folder(pipeline, folder):
    assert conditioning.describe(folder) == conditioning.load(folder).classes == pipeline.class_embedder.classes
