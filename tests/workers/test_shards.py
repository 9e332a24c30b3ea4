"""A mixture's weights as one file per expert: what diffusers reads back, what two versions share, and what it draws."""

import hashlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

from workers import families, golden, shards
from workers.code_file import code_file
from workers.contracts import GOLDEN, ArchitectureSpec, VerificationError
from workers.elastic import search_space
from workers.mixture import MixtureDenoiser, any_width

BASE = json.loads(
    UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        add_attention=False,
    ).to_json_string()
)


def mixture_of(boundaries: list[int], seed: int) -> MixtureDenoiser:
    with torch.device("meta"):
        dense = families.build(BASE)
    space = search_space(families.family_of_config(BASE).sites(dense, any_width("group")))
    specs = [ArchitectureSpec({site.name: site.choices[-1 - k % 2] for site in space.sites}) for k in range(len(boundaries) + 1)]
    torch.manual_seed(seed)
    mixture = MixtureDenoiser.of(BASE, boundaries, specs).eval()
    for k, expert in enumerate(mixture.experts):  # whatever drawing the weights of the dense one took from the generator
        torch.manual_seed(seed + k)
        for parameter in expert.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
    return mixture


def published(folder: Path, mixture: MixtureDenoiser) -> Path:
    shards.save(mixture, folder)
    DDIMScheduler(num_train_timesteps=1000).save_pretrained(folder / "scheduler")
    return folder


@pytest.mark.parametrize("boundaries", [[], [400], [300, 600]])
def test_what_is_saved_is_loaded_by_plain_diffusers_and_saved_again(tmp_path, boundaries):
    mixture = mixture_of(boundaries, 0)
    shards.save(mixture, tmp_path / "one")
    loaded = MixtureDenoiser.from_pretrained(tmp_path / "one")
    loaded.save_pretrained(tmp_path / "two")
    again = MixtureDenoiser.from_pretrained(tmp_path / "two")
    for found in (loaded, again):
        assert found.config["architectures"] == mixture.config["architectures"]
        assert found.state_dict().keys() == mixture.state_dict().keys()
        assert all(torch.equal(tensor, mixture.state_dict()[name]) for name, tensor in found.state_dict().items())
    assert len(list((tmp_path / "one").glob("*.safetensors"))) == len(boundaries) + 1


@pytest.mark.parametrize("travels", [False, True])
def test_a_version_its_copy_and_experts_that_come_and_go_draw_the_same_images_one_at_a_time(tmp_path, travels):
    """A file per expert, and all in one, lay the weights at other addresses, where a CPU adds up in another order."""
    kind = _travelled(tmp_path) if travels else MixtureDenoiser
    shards.save(mixture_of([400], 0), tmp_path / "one")
    loaded = kind.from_pretrained(tmp_path / "one")
    loaded.save_pretrained(tmp_path / "two")
    again = kind.from_pretrained(tmp_path / "two")
    for found in (loaded, again):
        assert not [name for name, tensor in found.state_dict().items() if tensor.data_ptr() % 64]
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first, copied = ([one(x, t).sample for t in (700, 10)] for one in (loaded, again))
        moved = [[loaded.residency(mode)(x, t).sample for t in (700, 10)] for mode in ("active", "prefetch", "all")]
    for other in (copied, *moved):
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def _travelled(folder: Path) -> Any:
    """The class, of the code that travels with an exported folder."""
    (folder / "travelled.py").write_text(code_file("workers.mixture", "MixtureDenoiser", "0"))
    found = importlib.util.spec_from_file_location("travelled", folder / "travelled.py")
    module = importlib.util.module_from_spec(found)
    sys.modules["travelled"] = module
    found.loader.exec_module(module)
    return module.MixtureDenoiser


def test_a_pickle_is_not_read_unless_it_is_asked_for(tmp_path):
    mixture_of([400], 0).save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(OSError, match="safetensors"):
        MixtureDenoiser.from_pretrained(tmp_path)


def test_equal_experts_of_two_mixtures_are_equal_files(tmp_path):
    one, two = mixture_of([400], 0), mixture_of([400], 5)
    two.experts[0].load_state_dict(one.experts[0].state_dict())
    for name, mixture in (("one", one), ("two", two)):
        shards.save(mixture, tmp_path / name)
    names = [f"diffusion_pytorch_model-0000{k}-of-00002.safetensors" for k in (1, 2)]
    digests = [[hashlib.sha256((tmp_path / run / name).read_bytes()).hexdigest() for run in ("one", "two")] for name in names]
    assert [a == b for a, b in digests] == [True, False]


def test_golden_samples_are_drawn_again_and_another_mixture_is_told_apart(tmp_path):
    folder = published(tmp_path / "version", mixture_of([400], 0))
    golden.make(folder, "ddim", 4, "cpu")
    first = (folder / GOLDEN).read_bytes()
    assert load_file(folder / GOLDEN)["images"].shape == (4, 3, 8, 8)
    assert golden.compare(folder, "cpu") == {"samples": 4, "difference": 0.0}
    golden.make(folder, "ddim", 4, "cpu")
    assert (folder / GOLDEN).read_bytes() == first
    shards.save(mixture_of([400], 9), folder)
    with pytest.raises(VerificationError, match=r"golden/samples.safetensors: expert \d predicts something else"):
        golden.compare(folder, "cpu")


def test_golden_images_tell_another_sampler_apart_though_every_expert_is_the_same(tmp_path):
    folder = published(tmp_path / "version", mixture_of([400], 0))
    golden.make(folder, "ddim", 4, "cpu")
    DDIMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2").save_pretrained(folder / "scheduler")
    with pytest.raises(
        VerificationError, match=r"golden/samples.safetensors: seed \d draws another image than when it was published \(on cpu\)"
    ):
        golden.compare(folder, "cpu")


def test_golden_samples_meet_every_expert_and_stay_few(tmp_path):
    folder = published(tmp_path / "version", mixture_of([20, 40], 0))
    golden.make(folder, "ddpm", 1000, "cpu")
    weights = folder / "diffusion_pytorch_model-00002-of-00003.safetensors"
    save_file({name: tensor * 3 for name, tensor in load_file(weights).items()}, weights, metadata={"format": "pt"})
    with pytest.raises(VerificationError, match=r"expert 1 predicts something else than when it was published \(on cpu\): the difference"):
        golden.compare(folder, "cpu")


@pytest.mark.parametrize(
    ("about", "told"),
    [
        ({"steps": 100_000}, "asks for the seeds"),
        ({"steps": 0}, "asks for the seeds"),
        ({"seeds": [-1, 0, 1, 2]}, "asks for the seeds"),
        ({"seeds": [0]}, "is of another kind"),
        ({"seeds": 4}, "cannot be loaded and sampled"),
        ({"schema": 2}, "is of another kind"),
        ({"scheduler": "magic"}, "magic"),
        (None, "cannot be loaded and sampled"),
    ],
)
def test_golden_samples_that_ask_for_what_cannot_be_are_refused(tmp_path, about, told):
    folder = published(tmp_path / "version", mixture_of([], 0))
    golden.make(folder, "ddim", 2, "cpu")
    images = load_file(folder / GOLDEN)
    known = {"schema": 1, "scheduler": "ddim", "steps": 2, "seeds": [0, 1, 2, 3], "device": "cpu"}
    save_file(images, folder / GOLDEN, metadata={"golden": json.dumps({**known, **about})} if about else None)
    with pytest.raises(VerificationError, match=told) as caught:
        golden.compare(folder, "cpu")
    assert "\n" not in str(caught.value)


def test_a_mixture_that_cannot_be_loaded_is_one_line(tmp_path):
    folder = published(tmp_path / "version", mixture_of([400], 0))
    golden.make(folder, "ddim", 2, "cpu")
    (folder / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(VerificationError, match="cannot be loaded and sampled: ") as caught:
        golden.compare(folder, "cpu")
    assert "\n" not in str(caught.value)
