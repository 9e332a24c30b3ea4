"""A mixture as the unet of Stable Diffusion: prompt, negative prompt, guidance, offloading. Needs transformers (`pip install .[text]`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, EulerDiscreteScheduler, PNDMScheduler, UNet2DConditionModel

from tests.published import ddim, mixture_of_dense, random_mixture
from workers.contracts import InputError
from workers.mixture import MixtureDenoiser

pytestmark = pytest.mark.slow
transformers = pytest.importorskip("transformers", reason="Stable Diffusion's text encoder is transformers': pip install .[text]")

UNET = {
    **{"sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": (16, 32), "norm_num_groups": 4},
    **{"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")},
    **{"attention_head_dim": 2, "cross_attention_dim": 24},
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict[str, Any]:
    """Everything of a tiny Stable Diffusion pipeline but the scheduler, random weights."""
    torch.manual_seed(0)
    words = ["<|startoftext|>", "<|endoftext|>", *"abcdefghijklmnopqrstuvwxyz", *(f"{c}</w>" for c in "abcdefghijklmnopqrstuvwxyz")]
    folder = Path(tmp_path_factory.mktemp("tokenizer"))
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=12)
    text = transformers.CLIPTextConfig(
        **{"vocab_size": len(words), "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"max_position_embeddings": 12, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1},
    )
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return {
        "vae": AutoencoderKL(**levels, block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4).eval(),
        "text_encoder": transformers.CLIPTextModel(text).eval(),
        "tokenizer": tokenizer,
        "unet": UNet2DConditionModel(**UNET).eval(),
        "safety_checker": None,
        "feature_extractor": None,
    }


def pipeline(parts: dict[str, Any], unet: Any, scheduler: Any = None) -> Any:
    from diffusers import StableDiffusionPipeline

    made = StableDiffusionPipeline(**{**parts, "unet": unet}, scheduler=scheduler or ddim(), requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


def draw(made: Any, **how: Any) -> np.ndarray:
    generator = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    given = {"prompt": ["a b c", "d"], "negative_prompt": ["x", "y z"], "guidance_scale": 5.0, "num_inference_steps": 4}
    return made(**given, generator=generator, output_type="np", **how).images


@pytest.mark.parametrize("scheduler", [ddim, PNDMScheduler, EulerDiscreteScheduler])
def test_a_mixture_of_dense_experts_draws_what_stable_diffusion_draws(parts, scheduler):
    dense, mixed = (draw(pipeline(parts, unet, scheduler())) for unet in (parts["unet"], mixture_of_dense(parts["unet"])))
    assert dense.shape == (2, 16, 16, 3) and np.array_equal(dense, mixed)


def test_pruned_experts_draw_the_same_after_saving_and_loading(parts, tmp_path):
    from diffusers import StableDiffusionPipeline

    torch.manual_seed(0)
    made = pipeline(parts, random_mixture(json.loads(parts["unet"].to_json_string()), [300, 700]))
    made.save_pretrained(tmp_path)
    again = StableDiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert type(again.unet) is MixtureDenoiser
    images = draw(again)
    assert np.array_equal(images, draw(StableDiffusionPipeline.from_pretrained(tmp_path))) and np.allclose(images, draw(made), atol=1e-4)
    half = draw(StableDiffusionPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16))
    assert np.isfinite(half).all() and np.abs(half - images).mean() < 0.1


def test_what_the_pipeline_switches_on_is_on_in_every_expert(parts):
    torch.manual_seed(0)
    config = json.loads(parts["unet"].to_json_string())
    plain, made = draw(pipeline(parts, random_mixture(config, [500]))), pipeline(parts, random_mixture(config, [500]))
    for residency in ("active", "prefetch", "all"):
        made.unet.residency(residency)
        assert np.array_equal(draw(made), plain)
    made.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert not np.allclose(draw(made), plain, atol=1e-2)
    made.disable_freeu()
    assert np.array_equal(draw(made), plain)
    made.fuse_qkv_projections()
    assert np.allclose(draw(made), plain, atol=1e-4)


def test_a_controlnet_steers_a_mixture_as_it_steers_the_dense_unet(parts):
    from diffusers import StableDiffusionControlNetPipeline

    torch.manual_seed(3)
    control = ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(8, 16)).eval()
    for layer in (*control.controlnet_down_blocks, control.controlnet_mid_block):
        torch.nn.init.normal_(layer.weight, std=0.3)
    image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    drawn = []
    for unet in (parts["unet"], mixture_of_dense(parts["unet"])):
        made = StableDiffusionControlNetPipeline(
            **{**parts, "unet": unet}, controlnet=control, scheduler=ddim(), requires_safety_checker=False
        )
        made.set_progress_bar_config(disable=True)
        drawn.append(draw(made, image=image))
    assert np.array_equal(*drawn) and not np.allclose(drawn[0], draw(pipeline(parts, parts["unet"])), atol=1e-2)


def test_an_ip_adapter_is_refused_in_a_sentence(parts):
    made = pipeline(parts, mixture_of_dense(parts["unet"]))
    with pytest.raises(InputError, match="an IP-Adapter is made for the layers of the dense denoiser"):
        made.load_ip_adapter(
            {"image_proj": {"a": torch.zeros(1)}, "ip_adapter": {"b": torch.zeros(1)}}, None, None, image_encoder_folder=None
        )
