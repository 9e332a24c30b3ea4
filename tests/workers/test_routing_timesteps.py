"""One router of timesteps: the partition, the step counts and the mixture send every timestep of every sampler to the same expert."""

import copy
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, UNet2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from workers import diffusion, families
from workers.contracts import ArchitectureSpec, InputError, Partition
from workers.diffusion import make_sampler, sampler_timesteps, steps_per_expert
from workers.elastic import extract, search_space
from workers.mixture import MixtureDenoiser, any_width

ROOT = Path(__file__).parents[2]
T = 1000
SMALLEST_BASE = json.loads(
    UNet2DModel(
        sample_size=8,
        block_out_channels=(4,),
        norm_num_groups=2,
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        add_attention=False,
    ).to_json_string()
)


def space_of(config: dict):
    with torch.device("meta"):
        model = families.build(config)
    return search_space(families.family_of_config(config).sites(model, any_width("group")))


SMALLEST = space_of(SMALLEST_BASE).smallest


def mixture_of(config: dict, boundaries: list[int], seed: int = 0) -> MixtureDenoiser:
    """Random architectures with random weights."""
    rng, space = random.Random(seed), space_of(config)
    specs = [ArchitectureSpec({site.name: rng.choice(site.choices) for site in space.sites}) for _ in range(len(boundaries) + 1)]
    torch.manual_seed(seed)
    mixture = MixtureDenoiser.of(config, boundaries, specs).eval()
    with torch.no_grad():
        for parameter in mixture.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return mixture


# --- the same expert, whoever asks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", diffusion.SAMPLERS)
@given(data=st.data())
@settings(max_examples=15, deadline=None, derandomize=True, database=None)
def test_partition_and_mixture_agree_on_every_timestep_of_a_sampler(name, data, emoji):
    spacing = data.draw(st.sampled_from(["leading", "linspace", "trailing"]))
    steps = data.draw(st.integers(2, 100))
    config = {**families.load_scheduler_config(emoji), "timestep_spacing": spacing}
    sampler = make_sampler(name, config)
    sampler.set_timesteps(steps)
    met = sorted({int(t) for t in sampler.timesteps} - {0})  # boundaries that lie exactly on a timestep are the hard ones
    boundaries = sorted(set(data.draw(st.lists(st.one_of(st.integers(1, T - 1), st.sampled_from(met)), max_size=5))))

    partition = Partition.from_boundaries(boundaries, T)
    mixture = MixtureDenoiser.of(SMALLEST_BASE, boundaries, [SMALLEST] * len(partition))
    expected = [partition.index_of(float(t)) for t in sampler.timesteps]
    assert expected == np.searchsorted(boundaries, [float(t) for t in sampler.timesteps], side="right").tolist()
    assert all(0 <= k < len(partition) for k in expected)
    assert [mixture.expert_index(float(t)) for t in sampler.timesteps] == expected
    assert [int(mixture.expert_index(t)) for t in sampler.timesteps] == expected
    index = mixture.expert_index(sampler.timesteps)
    assert index.dtype == torch.int64
    assert index.tolist() == expected
    for t, k in zip(sampler.timesteps, expected, strict=True):
        if float(t).is_integer():
            assert mixture.expert_index(int(t)) == partition.index_of(int(t)) == k

    timesteps = sampler_timesteps(name, config, steps)
    assert timesteps == [float(t) for t in sampler.timesteps]
    served = steps_per_expert(partition, timesteps)
    assert sum(served) == len(sampler.timesteps)
    assert served == [expected.count(k) for k in range(len(partition))]


@pytest.mark.parametrize(
    ("name", "spacing", "served"),
    [
        ("ddim", "leading", [6, 8, 6]),
        ("ddim", "trailing", [6, 8, 6]),
        ("unipc", "linspace", [5, 9, 6]),
        ("dpmpp-karras", "leading", [7, 5, 8]),
    ],
)
def test_steps_per_expert_of_known_schedules(name, spacing, served, emoji):
    config = {**families.load_scheduler_config(emoji), "timestep_spacing": spacing}
    assert steps_per_expert(Partition.from_boundaries([300, 700], T), sampler_timesteps(name, config, 20)) == served


# --- the mixture's forward pass -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixture() -> MixtureDenoiser:
    torch.manual_seed(0)
    return mixture_of(json.loads(families.family("unet2d").tiny().to_json_string()), [300, 700])


@pytest.fixture(scope="module")
def sample() -> Tensor:
    return torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float64])
@torch.no_grad()
def test_a_batch_of_mixed_timesteps_equals_a_loop_over_its_rows(mixture, sample, dtype):
    timesteps = torch.tensor([299, 700, 300, 0, 999], dtype=dtype)
    found = mixture(sample, timesteps).sample
    for row, (t, k) in enumerate(zip(timesteps, [0, 2, 1, 0, 2], strict=True)):
        alone = mixture(sample[row : row + 1], t).sample
        assert torch.equal(alone, mixture.experts[k](sample[row : row + 1], t).sample)
        assert torch.allclose(found[row : row + 1], alone, atol=1e-5)
    assert found.dtype == sample.dtype
    assert found.shape == sample.shape


@pytest.mark.parametrize(("t", "k"), [(0, 0), (299, 0), (299.75, 0), (300, 1), (699.5, 1), (700.0, 2), (999, 2)])
@torch.no_grad()
def test_one_timestep_for_the_whole_batch_goes_to_one_expert(mixture, sample, t, k):
    others = [expert(sample, t).sample for i, expert in enumerate(mixture.experts) if i != k]
    for form in (t, torch.tensor(t), torch.tensor([t]), torch.tensor([t] * len(sample))):
        found = mixture(sample, form).sample
        assert torch.equal(found, mixture.experts[k](sample, form).sample)
        assert not any(torch.allclose(found, other, atol=1e-3) for other in others)


@torch.no_grad()
def test_without_return_dict_the_answer_is_a_tuple(mixture, sample):
    for t in (5, torch.tensor([5, 300, 600, 800, 999])):
        found = mixture(sample, t, return_dict=False)
        assert isinstance(found, tuple)
        assert len(found) == 1
        assert torch.equal(found[0], mixture(sample, t).sample)


@torch.no_grad()
def test_a_mixture_of_one_expert_is_that_expert(sample):
    alone = mixture_of(json.loads(families.family("unet2d").tiny().to_json_string()), [])
    for t in (5, 700.5, torch.tensor(9), torch.tensor([0, 250, 500, 750, 999])):
        assert torch.equal(alone(sample, t).sample, alone.experts[0](sample, t).sample)
    assert alone.expert_index(torch.tensor([0, 999])).tolist() == [0, 0]


@torch.no_grad()
def test_a_mixture_of_dense_experts_is_the_dense_model(emoji):
    dense, config = families.load_denoiser(emoji), families.load_config(emoji)
    whole = MixtureDenoiser.of(config, [500], [space_of(config).dense] * 2).eval()
    for expert in whole.experts:
        expert.load_state_dict(dense.state_dict())
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([20, 900])
    assert torch.allclose(whole(x, t).sample, dense(x, t).sample, atol=1e-5)
    assert torch.equal(whole(x, t[1]).sample, dense(x, t[1]).sample)


def test_gradients_reach_the_experts_that_were_asked(mixture, sample):
    trained = copy.deepcopy(mixture).train()
    trained(sample[:2], torch.tensor([5, 900])).sample.mean().backward()
    assert [any(p.grad is not None for p in expert.parameters()) for expert in trained.experts] == [True, False, True]


@pytest.mark.parametrize("boundaries", [[300], [300, 700, 800], [700, 300], [300, 300]])
def test_boundaries_that_do_not_fit_the_experts_are_refused(boundaries):
    with pytest.raises(InputError, match="3 experts need 2 ascending boundaries"):
        MixtureDenoiser.of(SMALLEST_BASE, boundaries, [SMALLEST] * 3)


# --- saved, and loaded by somebody else -----------------------------------------------------------------------------

IN_A_NEW_PROCESS = """
import sys, torch
from diffusers import DDPMPipeline
from safetensors.torch import load_file, save_file
from workers.mixture import MixtureDenoiser
torch.set_num_threads(1)
saved, base, inputs, out = sys.argv[1:]
mixture = MixtureDenoiser.from_pretrained(saved)
assert not mixture.training
given = load_file(inputs)
pipeline = DDPMPipeline.from_pretrained(base, unet=mixture)
assert pipeline.unet is mixture
pipeline.set_progress_bar_config(disable=True)
images = pipeline(2, torch.Generator().manual_seed(0), num_inference_steps=2, output_type="np").images
with torch.no_grad():
    predicted = mixture(given["sample"], given["timestep"]).sample
save_file({"predicted": predicted, "images": torch.from_numpy(images).contiguous()}, out)
"""


def test_a_saved_mixture_is_the_same_in_a_new_process_and_in_its_pipeline(emoji, tmp_path):
    mixture = mixture_of(families.load_config(emoji), [300, 700])
    mixture.save_pretrained(tmp_path / "mixture")
    assert {path.name for path in (tmp_path / "mixture").iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    given = {"sample": torch.randn(3, 3, 32, 32), "timestep": torch.tensor([5.0, 400.0, 999.0])}
    save_file(given, tmp_path / "inputs")
    arguments = [tmp_path / "mixture", emoji, tmp_path / "inputs", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-c", IN_A_NEW_PROCESS, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    found, loaded = load_file(tmp_path / "out"), MixtureDenoiser.from_pretrained(tmp_path / "mixture")
    saved = mixture.state_dict()
    assert loaded.state_dict().keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in loaded.state_dict().items())
    with torch.no_grad():
        assert torch.equal(found["predicted"], loaded(given["sample"], given["timestep"]).sample)
        # weights mapped from a file are aligned otherwise than weights in memory, which is enough for CPU kernels to round otherwise
        assert torch.allclose(found["predicted"], mixture(given["sample"], given["timestep"]).sample, atol=1e-5)
    pipeline = DDPMPipeline(loaded, DDPMPipeline.from_pretrained(emoji).scheduler)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(2, torch.Generator().manual_seed(0), num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 32, 32, 3)
    assert np.array_equal(found["images"].numpy(), images)


def test_a_mixture_holds_its_experts_extracted(mixture, sample):
    """Rebuilt from config alone, the modules are those that extraction makes."""
    config = mixture.config["base"]
    with torch.device("meta"):
        dense = families.build(config)
    branches = families.family_of_config(config).sites(dense, any_width("group"))
    for expert, choices in zip(mixture.experts, mixture.config["architectures"], strict=True):
        small: nn.Module = extract(dense, branches, ArchitectureSpec(choices))
        assert {n: p.shape for n, p in small.named_parameters()} == {n: p.shape for n, p in expert.named_parameters()}
