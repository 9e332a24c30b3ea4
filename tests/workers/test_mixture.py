"""A mixture among diffusers: where its experts are, in which precision, compiled, offloaded, told of text, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDPMPipeline,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor

from tests.published import config_of, ddim, mixture_of_dense, random_mixture
from workers import families
from workers.contracts import InputError
from workers.mixture import MixtureDenoiser

TIMES = (999, 750, 700, 699, 301, 300, 299, 0)
SMALL = {
    **{"sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": (8, 16), "norm_num_groups": 4},
    **{"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")},
    **{"attention_head_dim": 2, "cross_attention_dim": 12},
}
SDXL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 6 * 4 + 10}


def tiny_mixture(rewrites: tuple[str, ...] = ()) -> MixtureDenoiser:
    torch.manual_seed(0)
    return random_mixture(config_of(families.family("unet2d").tiny()), [300, 700], rewrites=rewrites)


def text_unet(**more: Any) -> UNet2DConditionModel:
    torch.manual_seed(1)
    return UNet2DConditionModel(**SMALL, **more).eval()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def x() -> Tensor:
    return noise(2, 3, 16, 16)


@torch.no_grad()
def outputs(model: Any, x: Tensor) -> list[Tensor]:
    return [model(x, torch.tensor(t)).sample for t in TIMES]


def equal(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


# --- where experts are ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "there"),
    [
        ("active", [[2], [2], [2], [1], [1], [1], [0], [0]]),
        ("prefetch", [[1, 2], [1, 2], [1, 2], [0, 1], [0, 1], [0, 1], [0], [0]]),
    ],
)
@torch.no_grad()
def test_only_the_experts_that_are_needed_are_on_the_device_and_outputs_stay_the_same(mode, there, x):
    plain, moving = tiny_mixture(), tiny_mixture().residency(mode)
    homes = [[p.data_ptr() for p in expert.parameters()] for expert in moving.experts]
    for t, experts in zip(TIMES, there, strict=True):
        assert torch.equal(moving(x, t).sample, plain(x, t).sample)
        away = [k for k, expert in enumerate(moving.experts) if [p.data_ptr() for p in expert.parameters()] != homes[k]]
        partly = [k for k, e in enumerate(moving.experts) if any(p.data_ptr() != h for p, h in zip(e.parameters(), homes[k], strict=True))]
        assert away == partly == moving._residency.resident == experts
    assert moving._residency.arrivals == 3  # each once on the way down
    moving.residency("all")
    assert [[p.data_ptr() for p in expert.parameters()] for expert in moving.experts] == homes


@torch.no_grad()
def test_going_up_the_next_noisier_expert_is_fetched_ahead(x):
    moving = tiny_mixture().residency("prefetch")
    for t, there in [(0, [0]), (300, [1, 2]), (400, [1, 2]), (700, [2]), (300, [0, 1]), (0, [0])]:
        moving(x, t)
        assert moving._residency.resident == there
    assert moving._residency.arrivals == 5


def test_a_batch_of_mixed_timesteps_brings_every_expert_in_turn(x):
    plain, moving, t = tiny_mixture(), tiny_mixture().residency("active"), torch.tensor([5, 900])
    with torch.no_grad():
        assert torch.equal(moving(x, t).sample, plain(x, t).sample)


def test_moving_or_converting_a_mixture_whose_experts_come_and_go_moves_where_they_go(x, tmp_path):
    moving, plain = tiny_mixture().residency("active"), tiny_mixture().bfloat16()
    outputs(moving, x)
    moving.to("cpu", torch.bfloat16)
    assert moving._residency.resident == [] and moving.dtype == torch.bfloat16 and moving.device == torch.device("cpu")
    assert equal(outputs(moving, x.bfloat16()), outputs(plain, x.bfloat16()))
    moving.save_pretrained(tmp_path)
    again = MixtureDenoiser.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name].bfloat16(), tensor) for name, tensor in plain.state_dict().items())
    moving.residency("all")
    assert equal(outputs(moving, x.bfloat16()), outputs(plain, x.bfloat16()))


def test_converting_alone_leaves_the_device_where_experts_come_and_go():
    moving = tiny_mixture().residency("active", "meta")
    for convert in (lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.float(), lambda m: m.to(dtype=torch.float16)):
        assert convert(moving).device == torch.device("meta")
    assert moving.dtype == torch.float16 and {p.device.type for p in moving.parameters()} == {"cpu"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("mode", "experts"), [("active", 1), ("prefetch", 2)])
@torch.no_grad()
def test_on_a_gpu_the_memory_is_that_of_the_experts_there_and_samples_stay_the_same(mode, experts):
    mixture = random_mixture(config_of(UNet2DModel(sample_size=32, block_out_channels=(128, 256, 256, 512))), [200, 400, 600, 800])
    largest = sum(sorted(sum(p.nbytes for p in expert.parameters()) for expert in mixture.experts)[-experts:])
    pipeline = DDIMPipeline(mixture, ddim()).to("cuda")
    pipeline.set_progress_bar_config(disable=True)

    def draw() -> Tensor:
        images = pipeline(batch_size=2, num_inference_steps=20, generator=torch.Generator("cuda").manual_seed(0), output_type="pt").images
        return torch.as_tensor(images).cpu()

    wanted, whole = draw(), torch.cuda.memory_allocated()
    mixture.residency(mode)
    assert torch.equal(draw(), wanted) and torch.equal(draw(), wanted)
    assert mixture.device.type == "cuda" and mixture._residency.arrivals == 10
    seen = []
    for t in pipeline.scheduler.timesteps:
        mixture(noise(2, 3, 32, 32).cuda(), t)
        seen.append(torch.cuda.memory_allocated())
    assert max(seen) < 1.05 * largest + 2**25 and max(seen) < whole  # a Hopper GPU's cuBLAS keeps 2**25 bytes to work in
    assert mixture.half().device.type == "cuda"
    assert mixture(noise(2, 3, 32, 32).cuda().half(), 5).sample.isfinite().all()


def test_residency_refuses_what_it_cannot_do(x):
    moving = tiny_mixture().residency("active")
    with pytest.raises(InputError, match="residency is 'some': known are all, active, prefetch"):
        moving.residency("some")
    with pytest.raises(InputError, match="training would lose: call eval"):
        moving.train()(x, 5)
    with pytest.raises(InputError, match=r"enable_group_offload: .* call residency\('all'\) first"):
        moving.enable_group_offload(torch.device("cpu"))
    offloaded = tiny_mixture()
    offloaded.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(InputError, match="group offloading already moves"):
        offloaded.residency("prefetch")


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_group_offloading_changes_no_output(kind, x):
    plain, offloaded = tiny_mixture(), tiny_mixture()
    offloaded.enable_group_offload(torch.device("cpu"), torch.device("cpu"), kind, num_blocks_per_group=1)
    assert equal(outputs(offloaded, x), outputs(plain, x))


# --- precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "dtype"), [("torch_dtype", torch.float16), ("dtype", torch.bfloat16)])
def test_a_mixture_loads_and_samples_in_half_precision(key, dtype, tmp_path, x):
    mixture = tiny_mixture(("fuse_qkv", "transpose_upsample", "merge_one_head"))
    mixture.save_pretrained(tmp_path)
    half = MixtureDenoiser.from_pretrained(tmp_path, **{key: dtype})
    assert half.dtype == dtype and {p.dtype for p in half.parameters()} == {dtype}
    for found, wanted in zip(outputs(half, x.to(dtype)), outputs(mixture, x), strict=True):
        assert found.dtype == dtype
        assert (found.float() - wanted).abs().max() < 0.05 * wanted.abs().max()
    with torch.no_grad():
        below, above = (half(x.to(dtype), torch.tensor([t] * 2)).sample for t in (299.9, 300.0))  # 299.9 is 300 in bfloat16
        assert torch.allclose(below.float(), half.experts[0](x.to(dtype), torch.tensor(299.9)).sample.float(), atol=0.05)
        assert torch.allclose(above.float(), half.experts[1](x.to(dtype), torch.tensor(300.0)).sample.float(), atol=0.05)
    for pipeline in (DDIMPipeline(half, ddim(clip_sample=True)), DDPMPipeline(half, DDPMScheduler())):
        pipeline.set_progress_bar_config(disable=True)
        images = pipeline(batch_size=2, num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="pt").images
        images = torch.as_tensor(images)
        assert images.shape[0] == 2 and images.isfinite().all() and images.float().std() > 0.01


# --- compiled -------------------------------------------------------------------------------------------------------


def graphs(run: Any) -> tuple[int, int]:
    """Graphs captured and graph breaks met while ``run`` runs."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    try:
        with torch.no_grad():
            run()
        counters = torch._dynamo.utils.counters
        return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    finally:
        torch._dynamo.reset()


PLAIN = {
    **{"sample_size": 8, "block_out_channels": (4,), "norm_num_groups": 2, "layers_per_block": 1, "add_attention": False},
    **{"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)},
}


@pytest.mark.parametrize("how", ["compile_repeated_blocks", pytest.param("torch.compile", marks=pytest.mark.slow)])
def test_every_expert_is_one_graph_without_breaks(how):
    mixture, x = random_mixture(config_of(UNet2DModel(**PLAIN)), [500]), noise(2, 3, 8, 8)
    wanted, compiled = outputs(mixture, x), mixture

    def run() -> None:
        found = [[compiled(x, form(t)).sample for t in TIMES] for form in (int, torch.tensor)]
        assert equal(found[0], wanted) and equal(found[1], wanted)

    if how == "torch.compile":
        compiled = torch.compile(mixture, backend="eager")
    else:
        mixture.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert graphs(run) == (2, 0)


@pytest.mark.slow
def test_more_experts_than_dynamo_recompiles_are_one_graph_each():
    mixture, x = random_mixture(config_of(UNet2DModel(**PLAIN)), range(100, 1000, 100)), noise(1, 3, 8, 8)
    mixture.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert graphs(lambda: [mixture(x, t) for t in range(950, 0, -100)]) == (10, 0)


@pytest.mark.slow
def test_compiled_experts_with_attention_draw_the_same(x):
    mixture = tiny_mixture(("fuse_qkv", "transpose_upsample"))
    wanted = outputs(mixture, x)
    mixture.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert graphs(lambda: wanted.extend(outputs(mixture, x))) == (3, 0)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(wanted[: len(TIMES)], wanted[len(TIMES) :], strict=True))


# --- what pipelines read and call -----------------------------------------------------------------------------------


def test_the_config_answers_with_what_the_dense_one_says_and_saves_only_its_own(tmp_path):
    dense = text_unet()
    mixture = mixture_of_dense(dense)
    keys = ("in_channels", "sample_size", "time_cond_proj_dim", "addition_time_embed_dim", "cross_attention_dim", "encoder_hid_dim_type")
    assert {key: mixture.config[key] for key in keys} == {key: dense.config[key] for key in keys}
    assert mixture.config.cross_attention_dim == 12 and "_class_name" not in mixture.config
    mixture.save_pretrained(tmp_path)
    saved = MixtureDenoiser.load_config(tmp_path)
    own = {"base", "boundaries", "architectures", "in_channels", "out_channels", "sample_size", "unit", "rewrites", "num_timesteps"}
    assert {key for key in saved if not key.startswith("_")} == own
    assert MixtureDenoiser.from_pretrained(tmp_path).config["boundaries"] == [500]


@torch.no_grad()
def told(model: Any, timestep: Any, **more: Any) -> Tensor:
    context = noise(2, 7, 12, seed=3)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    return model(noise(2, 4, 8, 8), timestep, context, encoder_attention_mask=mask, return_dict=False, **more)[0]


def controls(model: UNet2DConditionModel) -> dict[str, Any]:
    """Residuals such as a ControlNet gives, of random content."""
    shapes: list[torch.Size] = []
    hooks = [m.register_forward_hook(lambda _, __, out: shapes.append(out.shape)) for m in (model.conv_in, model.mid_block)]
    handles = [b.register_forward_hook(lambda _, __, out: shapes.extend(r.shape for r in out[1])) for b in model.down_blocks]
    told(model, 5)
    for handle in hooks + handles:
        handle.remove()
    first, *down, middle = shapes
    residuals = tuple(0.3 * noise(*shape, seed=i) for i, shape in enumerate((first, *down)))
    return {"down_block_additional_residuals": residuals, "mid_block_additional_residual": 0.3 * noise(*middle, seed=9)}


@pytest.mark.parametrize("kind", ["text", "control", "sdxl"])
def test_a_mixture_of_dense_text_denoisers_is_the_dense_one_whatever_it_is_told(kind):
    dense = text_unet(**(SDXL if kind == "sdxl" else {}))
    mixture, more = mixture_of_dense(dense), {}
    if kind == "control":
        more = controls(dense)
        assert not torch.allclose(told(dense, 5), told(dense, 5, **more), atol=1e-3)
    elif kind == "sdxl":
        more = {"added_cond_kwargs": {"text_embeds": noise(2, 10, seed=4), "time_ids": noise(2, 6, seed=5)}}
        assert mixture.add_embedding.linear_1.in_features == dense.add_embedding.linear_1.in_features == 34
    for t in (5, torch.tensor(900), torch.tensor([499.5])):
        assert torch.equal(told(mixture, t, cross_attention_kwargs={}, **more), told(dense, t, **more))
    mixed = torch.tensor([900, 5])
    assert torch.allclose(told(mixture, mixed, **more), told(dense, mixed, **more), atol=1e-5)


def test_freeu_and_fused_projections_are_done_by_every_expert():
    dense, mixture = text_unet(), mixture_of_dense(text_unet())
    before = told(dense, 5)
    for name, arguments in (("enable_freeu", (0.9, 0.2, 1.2, 1.4)), ("disable_freeu", ()), ("fuse_qkv_projections", ())):
        for model in (dense, mixture):
            getattr(model, name)(*arguments)
        assert all(torch.equal(told(mixture, t), told(dense, t)) for t in (5, 900))
        assert torch.allclose(told(dense, 5), before, atol=1e-5) == (name != "enable_freeu")
    mixture.unfuse_qkv_projections()
    assert torch.equal(told(mixture, 900), told(text_unet(), 900))


def test_attention_processors_are_read_and_set_expert_by_expert(x):
    mixture = tiny_mixture()
    found = mixture.attn_processors
    assert set(found) == {f"{name}.processor" for name, module in mixture.named_modules() if hasattr(module, "get_processor")}
    assert {name.split(".")[1] for name in found} == {"0", "2"}, "expert 1 was drawn without attention"
    assert {type(p) for p in found.values()} == {AttnProcessor2_0}
    wanted = outputs(mixture, x)
    mixture.set_attn_processor(AttnProcessor())
    assert {type(p) for p in mixture.attn_processors.values()} == {AttnProcessor}
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(outputs(mixture, x), wanted, strict=True))
    mixture.set_attn_processor(found)
    assert equal(outputs(mixture, x), wanted)
    with pytest.raises(InputError, match="is in only one of the dict given and attn_processors"):
        mixture.set_attn_processor({"mid_block.processor": AttnProcessor()})


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda m: m.enable_freeu(1, 1, 1, 1), "enable_freeu: a UNet2DModel cannot do that, so a mixture of them cannot either"),
        (lambda m: m.load_lora_adapter({}), "load_lora_adapter: a LoRA is made for the layers of the dense denoiser"),
        (lambda m: m._load_ip_adapter_weights([]), "load_ip_adapter: an IP-Adapter is made for the layers of the dense"),
        (lambda m: m.set_attn_processor(AttnProcessor()), "were rewritten by fuse_qkv, which already made them cheaper"),
        (lambda m: m.fuse_qkv_projections(), r"go without it, or publish the mixture with export.rewrites=\[\]"),
    ],
)
def test_what_a_mixture_cannot_do_is_refused_in_a_sentence(call, told):
    with pytest.raises(InputError, match=told) as caught:
        call(tiny_mixture(("fuse_qkv",)))
    assert "\n" not in str(caught.value)


# --- samplers of other kinds ----------------------------------------------------------------------------------------


def test_noise_levels_are_refused_where_they_cannot_be_timesteps(x):
    edm, flow = EDMEulerScheduler(), FlowMatchEulerDiscreteScheduler()
    edm.set_timesteps(4)
    flow.set_timesteps(4)
    mixture = tiny_mixture()
    for t in (edm.timesteps[-1], flow.timesteps[0], torch.tensor([5, 1000]), torch.tensor([-1.0, 5.0]), -1, 1000.0):
        with pytest.raises(InputError, match=r"is not in \[0, (1000|T)\), where this denoiser was trained: EDM and flow-matching"):
            mixture(x, t)
