"""One contract for every model family: all uses of a sub-network agree, and what cannot be loaded is named."""

import copy
import json
import math
import os
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from workers import families
from workers.branches import ShortcutAttention, ShortcutResnet, ShortcutTransformer
from workers.contracts import ArchitectureSpec, BudgetUnreachable, ElasticSettings, InputError, SearchSpace
from workers.cost import CostTable, cost_table, count, require_reachable
from workers.elastic import Branch, Cut, ElasticDenoiser, extract, gated, importance_order, reorder
from workers.families.unet2d import UNet2DModelWithHeads

EVERYTHING = ElasticSettings(width_multiple=1, depth=True, importance="magnitude")
PER_GROUP = replace(EVERYTHING, unit="channel_per_group")
CIFAR = Path(os.environ.get("DIFFPRUNING_ASSETS", Path(__file__).parents[3] / "shared" / "assets")) / "ddpm-cifar32"
SHARED = {"sample_size": 16, "layers_per_block": 2, "flip_sin_to_cos": True, "freq_shift": 0, "norm_eps": 1e-5}
LATENT = {
    "ldm-beds": {
        **SHARED,
        "_class_name": "UNet2DModel",
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": [32, 64, 96, 128],
        "attention_head_dim": 16,
        "down_block_types": ["DownBlock2D", *["AttnDownBlock2D"] * 3],
        "up_block_types": [*["AttnUpBlock2D"] * 3, "UpBlock2D"],
    },
    "ldm-church": {
        **SHARED,
        "_class_name": "UNet2DModelWithHeads",
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [32, 64, 64, 128],
        "num_attention_heads": 8,
        "attn_norm_num_groups": 32,
        "down_block_types": [*["AttnDownBlock2D"] * 3, "ResnetDownsampleBlock2D"],
        "up_block_types": ["ResnetUpsampleBlock2D", *["AttnUpBlock2D"] * 3],
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
    },
    "ldm-imagenet": {
        **SHARED,
        "_class_name": "UNet2DConditionModel",
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": [32, 64, 96, 160],
        "attention_head_dim": 1,
        "cross_attention_dim": 64,
        "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 3],
        "up_block_types": [*["CrossAttnUpBlock2D"] * 3, "UpBlock2D"],
    },
}
"""The three latent-diffusion U-Nets of the paper, as small as their 32 norm groups allow."""
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


class Subject(NamedTuple):
    """One model under contract. ``compared``: how many random sub-networks are worth its run time."""

    model: nn.Module
    config: dict
    settings: ElasticSettings
    branches: tuple[Branch, ...]
    table: CostTable
    compared: int

    @property
    def space(self) -> SearchSpace:
        return self.table.space

    def batch(self) -> tuple[Tensor, Tensor]:
        gen = torch.Generator().manual_seed(0)
        return torch.randn(2, self.config["in_channels"], 16, 16, generator=gen), torch.tensor([10, 700])

    def told(self) -> dict[str, Tensor]:
        """What else the model wants to know: zeros would hide an unused context."""
        _, kwargs = families.example_inputs(self.config, 2, "cpu", torch.float32)
        gen = torch.Generator().manual_seed(1)
        return {name: torch.randn(value.shape, generator=gen) if value.is_floating_point() else value for name, value in kwargs.items()}

    def random_specs(self) -> list[ArchitectureSpec]:
        rng = random.Random(0)
        return [ArchitectureSpec({site.name: rng.choice(site.choices) for site in self.space.sites}) for _ in range(self.compared)]

    def output(self, model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model(*self.batch(), **self.told()).sample

    def active(self, spec: ArchitectureSpec | None = None) -> Tensor:
        with torch.no_grad():
            return ElasticDenoiser(self.model, self.branches)(*self.batch(), spec, **self.told())

    def dense_output(self) -> Tensor:
        return self.output(self.model)


def subject_of(model: nn.Module, compared: int, settings: ElasticSettings) -> Subject:
    config = json.loads(model.to_json_string())
    branches = families.family_of_config(config).sites(model, settings)
    return Subject(model, config, settings, branches, cost_table(config, settings), compared)


UNITS = {"group": EVERYTHING, "channel_per_group": PER_GROUP}
MODELS = [*families.names(), "emoji", *LATENT, pytest.param("cifar", marks=pytest.mark.skipif(not CIFAR.is_dir(), reason="no CIFAR model"))]


@pytest.fixture(scope="module", params=UNITS)
def settings(request: pytest.FixtureRequest) -> ElasticSettings:
    return UNITS[request.param]


@pytest.fixture(scope="module", params=MODELS)
def subject(request: pytest.FixtureRequest, settings: ElasticSettings, emoji: Path) -> Subject:
    if request.param in ("emoji", "cifar"):
        model = families.load_denoiser(emoji if request.param == "emoji" else CIFAR)
        return subject_of(model, 20 if request.param == "emoji" else 5, settings)
    torch.manual_seed(0)
    model = families.family(request.param).tiny() if request.param not in LATENT else families.build(LATENT[request.param]).eval()
    with torch.no_grad():  # a fresh norm's bias is zero, which would hide a gate in the wrong place
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if request.param not in LATENT else 0.02))
    return subject_of(model, 50 if request.param not in LATENT else 12, settings)


OURS = (ShortcutResnet, ShortcutAttention, ShortcutTransformer, UNet2DModelWithHeads)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def units_of(parameter: Tensor, cut: Cut, units: int) -> Tensor:
    """The parameter with its units first: [units, ...]."""
    dim = cut.dim % parameter.dim()
    return parameter.unflatten(dim, (cut.lead, units, -1)).movedim(dim + 1, 0)


# --- all uses of a sub-network agree --------------------------------------------------------------------------------


def test_dense_spec_equals_pretrained_output_exactly(subject):
    assert torch.equal(subject.active(subject.space.dense), subject.dense_output())
    assert torch.equal(subject.active(), subject.dense_output())


def test_the_output_is_linear_in_the_layer_that_makes_it(subject):
    scaled = copy.deepcopy(subject.model)
    with torch.no_grad():
        for parameter in scaled.get_submodule(families.family_of_config(subject.config).OUTPUT).parameters():
            parameter *= 2
    assert torch.equal(subject.output(scaled), 2 * subject.dense_output())


def test_reordering_the_units_does_not_change_the_function(subject):
    turned, gen = copy.deepcopy(subject.model), torch.Generator().manual_seed(0)
    orders = {b.site.name: [torch.randperm(b.units, generator=gen).tolist() for _ in range(b.groups)] for b in subject.branches}
    reorder(turned, subject.branches, orders)
    wide = next(b for b in subject.branches if b.units > 1)
    assert not torch.equal(turned.get_parameter(wide.cuts[0].parameter), subject.model.get_parameter(wide.cuts[0].parameter))
    assert relative_error(subject.output(turned), subject.dense_output()) < 1e-5


def gates_of(branches: Sequence[Branch], spec: ArchitectureSpec) -> dict[str, tuple[Tensor, Tensor]]:
    """The 0/1 gates that make the dense network compute ``spec``."""
    return {
        branch.site.name: ((torch.arange(branch.units) < spec[branch.site.name]).float(), torch.tensor(float(spec[branch.site.name] > 0)))
        for branch in branches
    }


def test_active_equals_masked_equals_extracted(subject):
    for spec in [subject.space.smallest, subject.space.narrowest, *subject.random_specs()]:
        active = subject.active(spec)
        with gated(subject.model, subject.branches, gates_of(subject.branches, spec)):
            masked = subject.dense_output()
        assert relative_error(masked, active) < 1e-5, spec
        assert relative_error(subject.output(extract(subject.model, subject.branches, spec)), active) < 1e-5, spec


def test_every_branch_matters_to_the_output(subject):
    for site in subject.space.sites:
        without = subject.active(subject.space.dense.replace(site.name, site.choices[0]))
        assert relative_error(without, subject.dense_output()) > 1e-5, site.name


def test_extracting_leaves_the_original_alone(subject):
    before = {name: tensor.clone() for name, tensor in subject.model.state_dict().items()}
    small = extract(subject.model, subject.branches, subject.space.narrowest)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in subject.model.state_dict().items())


def test_an_illegal_spec_cannot_be_extracted(subject):
    site = subject.space.sites[0]
    with pytest.raises(InputError, match=site.name):
        extract(subject.model, subject.branches, subject.space.dense.replace(site.name, site.dense + 1))


def test_gradients_of_inactive_units_are_exactly_zero(subject):
    elastic = ElasticDenoiser(subject.model, subject.branches)
    for spec in [subject.space.narrowest, *subject.random_specs()[:4]]:
        subject.model.zero_grad(set_to_none=True)
        elastic(*subject.batch(), spec, **subject.told()).square().mean().backward()
        for branch in subject.branches:
            keep = spec[branch.site.name]
            for cut in branch.cuts:
                gradient = subject.model.get_parameter(cut.parameter).grad
                if keep == 0:
                    assert gradient is None, cut.parameter
                    continue
                units = units_of(gradient, cut, branch.units)
                assert not units[keep:].any(), cut.parameter
                # a key's bias shifts all of a query's scores alike, so the softmax gives it no gradient at all;
                # a norm group of one channel takes away what a bias before it adds
                alone = isinstance(block := subject.model.get_submodule(branch.block), ResnetBlock2D) and block.norm2.num_channels == 32
                assert units[:keep].any() or cut.parameter.endswith("to_k.bias") or alone, cut.parameter
    subject.model.zero_grad(set_to_none=True)


def structure(model: nn.Module) -> dict:
    return {
        name: (m.num_groups if isinstance(m, nn.GroupNorm) else m.heads if isinstance(m, Attention) else None, "forward" in vars(m))
        for name, m in model.named_modules()
    }


def test_a_forward_pass_leaves_the_structure_as_it_was(subject):
    before = structure(subject.model)
    for spec in [subject.space.smallest, subject.space.narrowest, subject.random_specs()[0]]:
        subject.active(spec)
        assert structure(subject.model) == before


def test_a_failed_forward_pass_leaves_the_structure_as_it_was(subject):
    before, expected = structure(subject.model), subject.dense_output()

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    last = list(subject.model.children())[-1].register_forward_hook(fail)
    for spec in [subject.space.smallest, subject.space.narrowest]:
        with pytest.raises(ZeroDivisionError):
            subject.active(spec)
        assert structure(subject.model) == before
    last.remove()
    assert torch.equal(subject.dense_output(), expected)


def test_gates_go_when_the_context_ends(subject):
    with pytest.raises(ZeroDivisionError), gated(subject.model, subject.branches, gates_of(subject.branches, subject.space.smallest)):
        raise ZeroDivisionError
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in subject.model.modules())


@pytest.mark.parametrize("measure", ["taylor", "magnitude"])
def test_a_unit_that_nothing_reads_is_the_least_important(subject, measure):
    model = copy.deepcopy(subject.model)
    with torch.no_grad():
        for branch in subject.branches:
            for reader in branch.readers:
                model.get_submodule(reader).get_parameter("weight").unflatten(1, (branch.groups, branch.units, -1))[:, :, 0] = 0

    def losses() -> Iterator[Tensor]:
        yield F.mse_loss(model(*subject.batch(), **subject.told()).sample, torch.ones(()).expand(subject.batch()[0].shape))

    for branch, order in zip(subject.branches, importance_order(model, subject.branches, losses, measure).values(), strict=True):
        assert len(order) == branch.groups
        for run in order:
            assert sorted(run) == list(range(branch.units))
            assert run[-1] == 0, branch.site.name


# --- what is extracted ----------------------------------------------------------------------------------------------


def test_an_extracted_expert_is_made_of_the_host_librarys_modules(subject):
    for spec in [subject.space.smallest, subject.space.narrowest]:
        for module in extract(subject.model, subject.branches, spec).modules():
            assert type(module).__module__.split(".")[0] in ("torch", "diffusers") or type(module) in OURS


def test_a_shrunk_layer_tells_its_true_sizes(subject):
    for module in extract(subject.model, subject.branches, subject.space.narrowest).modules():
        if isinstance(module, nn.Conv2d):
            assert (module.out_channels, module.in_channels) == module.weight.shape[:2]
        elif isinstance(module, nn.Linear):
            assert (module.out_features, module.in_features) == module.weight.shape
        elif isinstance(module, nn.GroupNorm):
            assert module.num_channels == len(module.weight)


def test_saved_weights_load_in_an_expert_rebuilt_on_the_meta_device(subject):
    for spec in subject.random_specs()[:3]:
        small = extract(subject.model, subject.branches, spec)
        with torch.device("meta"):
            dense = families.build(subject.config)
        rebuilt = extract(dense, families.family_of_config(subject.config).sites(dense, subject.settings), spec).eval()
        rebuilt.load_state_dict(small.state_dict(), assign=True)
        assert torch.equal(subject.output(rebuilt), subject.output(small))


def test_distilled_features_keep_their_shapes_in_every_sub_network(subject):
    names, shapes = families.family_of_config(subject.config).features(subject.model), []

    def note(_: nn.Module, __: object, output: object) -> None:
        shapes[-1].append((output[0] if isinstance(output, tuple) else output).shape)

    handles = [subject.model.get_submodule(name).register_forward_hook(note) for name in names]
    for spec in [subject.space.dense, subject.space.smallest, subject.space.narrowest]:
        shapes.append([])
        subject.active(spec)
    for handle in handles:
        handle.remove()
    assert len(names) == len(shapes[0]) > 0
    assert shapes[0] == shapes[1] == shapes[2]


# --- cost -----------------------------------------------------------------------------------------------------------


def test_cost_falls_with_every_smaller_choice_of_every_site(subject):
    for site in subject.space.sites:
        costs = [subject.table.cost(subject.space.dense.replace(site.name, choice)) for choice in site.choices]
        assert len(costs) > 1
        for smaller, larger in zip(costs, costs[1:], strict=False):
            assert 0 < smaller.macs < larger.macs, site.name
            assert 0 < smaller.params < larger.params, site.name


def test_the_cost_table_equals_the_count_of_the_extracted_model(subject):
    with torch.device("meta"):
        dense = families.build(subject.config).eval()
    branches = families.family_of_config(subject.config).sites(dense, subject.settings)
    for spec in [subject.space.dense, subject.space.smallest, *subject.random_specs()[: subject.compared // 5]]:
        assert subject.table.cost(spec) == count(extract(dense, branches, spec), subject.config)[0]


def test_macs_tell_the_products_of_attention_apart(subject):
    """Convolutions, linear layers, and queries x keys x width for the scores and again for the mix, all counted by hand."""
    linear = products = 0

    def layer(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal linear
        linear += output[0].numel() * module.weight[0].numel()

    def attention(module: Attention, args: tuple[Tensor, ...], kwargs: dict, _: Tensor) -> None:
        nonlocal products
        queries = args[0][0, 0].numel() if args[0].dim() == 4 else args[0].shape[1]
        context = kwargs.get("encoder_hidden_states")
        products += 2 * queries * (queries if context is None else context.shape[1]) * module.inner_dim

    handles = [m.register_forward_hook(layer) for m in subject.model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    attentions = [m for m in subject.model.modules() if isinstance(m, Attention)]
    handles += [m.register_forward_hook(attention, with_kwargs=True) for m in attentions]
    args, kwargs = families.example_inputs(subject.config, 1, "cpu", torch.float32)
    with torch.no_grad():
        subject.model(*args, **kwargs)
    for handle in handles:
        handle.remove()
    assert products > 0
    assert subject.table.dense.attention_macs == products
    assert subject.table.dense.macs_without_attention == linear
    assert subject.table.dense.params == sum(p.numel() for p in subject.model.parameters())


def test_a_budget_below_the_smallest_sub_network_is_refused_at_once(subject):
    smallest = subject.table.smallest_ratio()
    require_reachable(subject.table, smallest, "budgets.ratio")
    with pytest.raises(BudgetUnreachable, match=f"budgets.ratio is .* needs {smallest:.3f}"):
        require_reachable(subject.table, smallest * 0.999, "budgets.ratio")


@pytest.mark.parametrize("multiple", [8, 16])
def test_widths_are_multiples_that_the_hardware_likes(subject, multiple):
    limits = replace(subject.settings, width_multiple=multiple, depth=False, most_widths=4)
    branches = families.family_of_config(subject.config).sites(subject.model, limits)
    assert any(len(branch.site.choices) > 1 for branch in branches)
    for branch in branches:
        width = subject.model.get_submodule(branch.readers[0]).weight.shape[1] // branch.units
        assert branch.site.dense == branch.units
        assert branch.site.choices[0] > 0
        assert len(branch.site.choices) <= 4
        assert all(choice * width % multiple == 0 for choice in branch.site.choices[:-1])


FULL = {
    "ldm-beds": ({"sample_size": 64, "block_out_channels": [224, 448, 672, 896], "attention_head_dim": 32}, 274_056_163, 96.02, 101.20),
    "ldm-church": (
        {
            "sample_size": 32,
            "block_out_channels": [192, 384, 384, 768, 768],
            "down_block_types": [*["AttnDownBlock2D"] * 4, "ResnetDownsampleBlock2D"],
            "up_block_types": ["ResnetUpsampleBlock2D", *["AttnUpBlock2D"] * 4],
        },
        294_966_916,
        18.64,
        20.92,
    ),
    "ldm-imagenet": (
        {"sample_size": 64, "block_out_channels": [192, 384, 576, 960], "cross_attention_dim": 512},
        400_920_579,
        99.77,
        104.22,
    ),
}


@pytest.mark.parametrize("name", FULL)
def test_the_full_size_latent_models_cost_what_the_papers_say(name):
    changes, params, without_attention, with_attention = FULL[name]
    cost = cost_table({**LATENT[name], **changes}, EVERYTHING).dense
    assert cost.params == params
    assert cost.macs_without_attention / 1e9 == pytest.approx(without_attention, rel=1e-3)
    assert cost.macs / 1e9 == pytest.approx(with_attention, rel=1e-3)


# --- loading --------------------------------------------------------------------------------------------------------


@pytest.fixture
def pipeline(tmp_path: Path, emoji: Path) -> Path:
    """A copy of the bundled pipeline, to be broken."""
    return Path(shutil.copytree(emoji, tmp_path / "ddpm"))


def error_of(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        families.load_denoiser(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit_config(pipeline: Path, **changes: object) -> None:
    path = pipeline / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_missing_folder_is_named(tmp_path):
    assert f"no such folder: {tmp_path / 'nowhere'}" in error_of(tmp_path / "nowhere")


def test_a_file_instead_of_a_folder_is_named(pipeline):
    assert f"{pipeline / WEIGHTS} is a file" in error_of(pipeline / WEIGHTS)


def test_a_folder_without_a_config_is_named(tmp_path):
    assert f"{tmp_path} holds no unet/config.json" in error_of(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_an_unreadable_config_is_named(pipeline, text):
    (pipeline / "unet" / "config.json").write_text(text, encoding="latin-1")
    assert str(pipeline / "unet" / "config.json") in error_of(pipeline)


def test_an_unknown_class_is_named_with_the_known_ones(pipeline):
    edit_config(pipeline, _class_name="UNet3DModel")
    text = error_of(pipeline)
    assert "UNet3DModel" in text
    assert all(name in text for name in families.names())


def test_a_class_embedding_of_another_kind_is_refused(pipeline):
    edit_config(pipeline, class_embed_type="timestep")
    assert "class_embed_type 'timestep' is not supported" in error_of(pipeline)


@pytest.mark.parametrize("size", [None, [32, 64]])
def test_samples_that_are_not_square_are_refused(pipeline, size):
    edit_config(pipeline, sample_size=size)
    assert "sample_size" in error_of(pipeline)


@pytest.mark.parametrize("kept", [0, 4, 1000, 1_000_000])
def test_truncated_weights_are_named(pipeline, kept):
    content = (pipeline / WEIGHTS).read_bytes()
    (pipeline / WEIGHTS).write_bytes(content[:kept])
    assert f"the weights in {pipeline / 'unet'} cannot be read" in error_of(pipeline)


def test_missing_weights_are_named(pipeline):
    (pipeline / WEIGHTS).unlink()
    assert f"the weights in {pipeline / 'unet'} cannot be read" in error_of(pipeline)


def test_weights_of_another_shape_are_named(pipeline):
    edit_config(pipeline, block_out_channels=[32, 64, 128])
    assert f"the weights in {pipeline / 'unet'}" in error_of(pipeline)


def test_a_missing_key_is_named(pipeline):
    weights = load_file(pipeline / WEIGHTS)
    del weights["conv_out.bias"]
    save_file(weights, pipeline / WEIGHTS, metadata={"format": "pt"})
    assert "missing conv_out.bias" in error_of(pipeline)


def test_an_extra_key_is_named(pipeline):
    save_file({**load_file(pipeline / WEIGHTS), "attic.bias": torch.zeros(1)}, pipeline / WEIGHTS, metadata={"format": "pt"})
    assert "unexpected attic.bias" in error_of(pipeline)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_named(pipeline, value):
    weights = load_file(pipeline / WEIGHTS)
    weights["conv_out.bias"][0] = value
    save_file(weights, pipeline / WEIGHTS, metadata={"format": "pt"})
    assert "conv_out.bias holds NaN or infinity" in error_of(pipeline)


def test_the_oldest_pipeline_layout_loads(pipeline, tmp_path, emoji):
    flat = tmp_path / "flat"
    shutil.copytree(pipeline / "unet", flat)
    shutil.copy(pipeline / "scheduler" / "scheduler_config.json", flat)
    loaded, expected = families.load_denoiser(flat).state_dict(), families.load_denoiser(emoji).state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert families.load_scheduler_config(flat) == families.load_scheduler_config(emoji)
    assert families.model_digest(flat) == families.model_digest(emoji)


def test_a_model_is_loaded_in_float32_in_eval_mode(emoji):
    model = families.load_denoiser(emoji)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_the_models_digest_follows_weights_and_configs_only(pipeline, emoji):
    before = families.model_digest(emoji)
    edit_config(pipeline, _name_or_path="elsewhere")
    assert families.model_digest(pipeline) == before
    weights = load_file(pipeline / WEIGHTS)
    weights["conv_out.bias"] += 1
    save_file(weights, pipeline / WEIGHTS, metadata={"format": "pt"})
    changed = families.model_digest(pipeline)
    edit_config(pipeline, norm_eps=1e-6)
    assert len({before, changed, families.model_digest(pipeline)}) == 3


def test_a_pipeline_without_a_scheduler_is_named(pipeline):
    shutil.rmtree(pipeline / "scheduler")
    with pytest.raises(InputError, match="holds no scheduler/scheduler_config.json"):
        families.load_scheduler_config(pipeline)


def test_an_unknown_family_is_named():
    with pytest.raises(InputError, match="model.family 'attic' is unknown: known are .*unet2d"):
        families.family("attic")
