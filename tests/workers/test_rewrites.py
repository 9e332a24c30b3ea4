"""Rewrites leave the output as it is, cost what they promise, and are rebuilt from the structure alone."""

import copy
import random
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from workers.branches import residual_branches
from workers.contracts import ArchitectureSpec, ElasticSettings, InputError
from workers.elastic import Branch, extract, search_space
from workers.families import unet2d
from workers.rewrites import REWRITES, FoldedContext, TransposedUpsample, apply

EVERYTHING = ElasticSettings(width_multiple=1, depth=True, importance="magnitude")
COMBINATIONS = [*([name] for name in REWRITES), [*REWRITES]]
CONTEXT_WIDTH = 32


def condition(**changes: Any) -> nn.Module:
    """Transformer blocks of one head, cross-attention to a context of width 32: cin256-v2 in small."""
    settings = dict(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=1,
        cross_attention_dim=CONTEXT_WIDTH,
        norm_num_groups=4,
    )
    return UNet2DConditionModel(**{**settings, **changes})


def resampling_resnets() -> nn.Module:
    """ResBlocks that upsample, attention of one head: Churches and the first DDPMs in small."""
    return UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("AttnDownBlock2D", "ResnetDownsampleBlock2D"),
        up_block_types=("ResnetUpsampleBlock2D", "AttnUpBlock2D"),
        attention_head_dim=None,
        attn_norm_num_groups=4,
        norm_num_groups=4,
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
    )


SUBJECTS: dict[str, Callable[[], nn.Module]] = {"heads": unet2d.tiny, "condition": condition, "resampling_resnets": resampling_resnets}


def shaken(module: nn.Module) -> nn.Module:
    """Random weights without a zero bias or a unit scale among them."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module.eval()


class Subject(NamedTuple):
    """One dense model under test and how to build its structure again."""

    build: Callable[[], nn.Module]
    model: nn.Module

    @property
    def branches(self) -> tuple[Branch, ...]:
        return tuple(residual_branches(self.model, EVERYTHING))

    def random_specs(self, number: int) -> list[ArchitectureSpec]:
        rng, sites = random.Random(0), search_space(self.branches).sites
        return [ArchitectureSpec({site.name: rng.choice(site.choices) for site in sites}) for _ in range(number)]

    def run(self, model: nn.Module, sample: Tensor | None = None, size: tuple[int, int] = (16, 16), tokens: int = 1) -> Tensor:
        """The model's output for a fixed batch of two, in the model's own precision and on its device."""
        gen, like = torch.Generator().manual_seed(0), next(model.parameters())
        sample = torch.randn(2, 3, *size, generator=gen) if sample is None else sample
        inputs = [sample.to(like), torch.tensor([10, 700], device=like.device)]
        if isinstance(model, UNet2DConditionModel):
            inputs.append(torch.randn(2, tokens, CONTEXT_WIDTH, generator=gen).to(like))
        return model(*inputs).sample

    def macs(self, model: nn.Module) -> tuple[int, dict[str, int]]:
        """MACs of one forward pass of two samples: all, and of every module."""
        meta = copy.deepcopy(model).to("meta")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            self.run(meta)
        prefix = type(model).__name__ + "."
        return counter.get_total_flops() // 2, {k.removeprefix(prefix): sum(v.values()) // 2 for k, v in counter.get_flop_counts().items()}


@pytest.fixture(scope="module", params=SUBJECTS)
def subject(request: pytest.FixtureRequest) -> Subject:
    torch.manual_seed(0)
    return Subject(SUBJECTS[request.param], shaken(SUBJECTS[request.param]()))


@pytest.fixture(scope="module")
def conditioned() -> Subject:
    torch.manual_seed(0)
    return Subject(condition, shaken(condition()))


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def rewritten(model: nn.Module, names: list[str]) -> nn.Module:
    return apply(copy.deepcopy(model), names)


def state_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def modules_of(model: nn.Module, kind: type) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


# --- the output stays -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", COMBINATIONS, ids="+".join)
@torch.no_grad()
def test_a_rewritten_dense_model_gives_the_same_output(subject, names):
    assert relative_error(subject.run(rewritten(subject.model, names)), subject.run(subject.model)) < 1e-5


@torch.no_grad()
def test_rewritten_sub_networks_give_the_same_output(subject):
    space = search_space(subject.branches)
    for spec in [space.smallest, space.narrowest, *subject.random_specs(20)]:
        small = extract(subject.model, subject.branches, spec)
        expected = subject.run(small)
        assert relative_error(subject.run(apply(small, [*REWRITES])), expected) < 1e-5, spec


@pytest.mark.parametrize("name", REWRITES)
def test_every_rewrite_finds_something_to_do(name):
    assert any(state_of(apply(build(), [name])) != state_of(build()) for build in SUBJECTS.values())


@pytest.mark.parametrize("size", [(8, 8), (12, 20), (32, 16)])
@torch.no_grad()
def test_other_sample_sizes_give_the_same_output(subject, size):
    small = rewritten(subject.model, [*REWRITES])
    assert relative_error(subject.run(small, size=size), subject.run(subject.model, size=size)) < 1e-5


@pytest.mark.parametrize("size", [(15, 15), (16, 13), (7, 24)])
@torch.no_grad()
def test_odd_sample_sizes_give_the_same_output(conditioned, size):
    small = rewritten(conditioned.model, [*REWRITES])
    assert modules_of(small, TransposedUpsample)
    assert relative_error(conditioned.run(small, size=size), conditioned.run(conditioned.model, size=size)) < 1e-5


@pytest.mark.parametrize(("options", "out"), [({}, 8), ({"conv_shortcut_bias": False}, 12), ({"output_scale_factor": 2.0}, 12)])
@torch.no_grad()
def test_a_resblock_that_upsamples_gives_the_same_output(options, out):
    torch.manual_seed(0)
    block = shaken(ResnetBlock2D(in_channels=8, out_channels=out, temb_channels=4, groups=4, up=True, **options))
    inputs = torch.randn(2, 8, 5, 6), torch.randn(2, 4)
    expected = block(*inputs)
    assert relative_error(apply(block, ["transpose_upsample"])(*inputs), expected) < 1e-5
    assert isinstance(block.conv1, nn.ConvTranspose2d)


@pytest.mark.parametrize(
    "options",
    [
        {"attention_bias": True},
        {"attention_out_bias": False},
        {"attention_bias": True, "attention_out_bias": False},
        {"upcast_attention": True},
        {"only_cross_attention": True},
        {"dropout": 0.5},
    ],
    ids=str,
)
@torch.no_grad()
def test_a_transformer_block_of_any_options_gives_the_same_output(options):
    torch.manual_seed(0)
    block = shaken(BasicTransformerBlock(16, 1, 16, cross_attention_dim=CONTEXT_WIDTH, **options))
    for attention in modules_of(block, Attention).values():
        attention.rescale_output_factor = 3.0
    inputs: dict[str, Any] = dict(
        hidden_states=torch.randn(2, 6, 16),
        encoder_hidden_states=torch.randn(2, 1, CONTEXT_WIDTH),
        encoder_attention_mask=torch.tensor([[[0.0]], [[-10000.0]]]),
    )
    expected = block(**inputs)
    found = apply(block, [*REWRITES])(**inputs)
    assert isinstance(block.attn2, FoldedContext)
    assert isinstance(block.norm2, nn.Identity)
    assert relative_error(found, expected) < 1e-5


@torch.no_grad()
def test_attention_to_several_tokens_is_left_alone_unless_folded(conditioned):
    names = [name for name in REWRITES if name != "fold_context"]
    expected = conditioned.run(conditioned.model, tokens=2)
    assert relative_error(conditioned.run(rewritten(conditioned.model, names), tokens=2), expected) < 1e-5


@pytest.mark.parametrize(
    "upsample",
    [
        lambda: Upsample2D(8),
        lambda: Upsample2D(8, use_conv_transpose=True),
        lambda: Upsample2D(8, use_conv=True, kernel_size=1, padding=0),
        lambda: Upsample2D(8, use_conv=True, interpolate=False),
        lambda: Upsample2D(8, use_conv=True, norm_type="rms_norm", eps=1e-5, elementwise_affine=True),
    ],
)
def test_upsampling_that_is_not_nearest_and_3x3_is_left_alone(upsample):
    model = nn.Sequential(upsample())
    before = state_of(model)
    assert state_of(apply(model, ["transpose_upsample"])) == before
    assert isinstance(model[0], Upsample2D)


@torch.no_grad()
def test_upsampling_by_its_older_name_is_found():
    torch.manual_seed(0)
    model, sample = shaken(nn.Sequential(Upsample2D(8, use_conv=True, out_channels=4, name="Conv2d_0"))), torch.randn(2, 8, 5, 6)
    expected = model(sample)
    assert relative_error(apply(model, ["transpose_upsample"])(sample), expected) < 1e-5
    assert isinstance(model[0], TransposedUpsample)


def test_a_head_narrower_than_its_input_is_not_merged():
    attention = Attention(query_dim=16, heads=1, dim_head=8)
    before = state_of(attention)
    assert state_of(apply(attention, ["merge_one_head"])) == before


@pytest.mark.parametrize("names", COMBINATIONS, ids="+".join)
@torch.no_grad()
def test_bfloat16_loses_no_more_than_it_did(subject, names):
    expected = subject.run(subject.model)
    before = relative_error(subject.run(copy.deepcopy(subject.model).bfloat16()).float(), expected)
    after = relative_error(subject.run(rewritten(subject.model, names).bfloat16()).float(), expected)
    direct = relative_error(subject.run(apply(copy.deepcopy(subject.model).bfloat16(), names)).float(), expected)
    assert max(after, direct) < 2 * before < 0.1


@pytest.mark.parametrize("names", COMBINATIONS, ids="+".join)
def test_gradients_flow_to_the_input_and_to_every_weight(subject, names):
    sample = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    gradients = []
    for model in (subject.model, rewritten(subject.model, names)):
        leaf = sample.clone().requires_grad_()
        subject.run(model, leaf).square().mean().backward()
        gradients.append(leaf.grad)
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        model.zero_grad(set_to_none=True)
    assert relative_error(gradients[1], gradients[0]) < 1e-4


# --- the structure is a function of the model and the names ---------------------------------------------------------


@pytest.mark.parametrize("names", COMBINATIONS, ids="+".join)
@torch.no_grad()
def test_a_saved_expert_is_rebuilt_on_the_meta_device(subject, names):
    for spec in subject.random_specs(3):
        saved = apply(extract(subject.model, subject.branches, spec), names)
        with torch.device("meta"):
            dense = subject.build().eval()
        rebuilt = apply(extract(dense, tuple(residual_branches(dense, EVERYTHING)), spec), names)
        assert all(tensor.is_meta for tensor in rebuilt.state_dict().values())
        rebuilt.load_state_dict(saved.state_dict(), assign=True)
        assert torch.equal(subject.run(rebuilt), subject.run(saved))


@torch.no_grad()
def test_applying_twice_or_one_by_one_or_in_another_order_changes_nothing(subject):
    once = rewritten(subject.model, [*REWRITES])
    expected, state = subject.run(once), {name: tensor.clone() for name, tensor in once.state_dict().items()}
    assert apply(once, [*REWRITES]) is once
    singly = copy.deepcopy(subject.model)
    for name in reversed(REWRITES):
        apply(singly, [name])
    for model in (once, singly, rewritten(subject.model, [*reversed(REWRITES)])):
        assert model.state_dict().keys() == state.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        assert torch.equal(subject.run(model), expected)


@torch.no_grad()
def test_no_name_no_change(subject):
    assert torch.equal(subject.run(rewritten(subject.model, [])), subject.run(subject.model))


def test_an_unknown_name_is_named_with_the_known_ones():
    with pytest.raises(InputError, match="rewrites: 'attic' is unknown: known are fold_context, "):
        apply(nn.Identity(), ["fold_context", "attic"])


def test_precision_mode_and_frozen_weights_are_kept(subject):
    model = copy.deepcopy(subject.model).half().requires_grad_(False)
    small = apply(model, [*REWRITES])
    assert not any(module.training for module in small.modules())
    assert {(p.dtype, p.requires_grad) for p in small.parameters()} == {(torch.float16, False)}


@pytest.mark.parametrize("tokens", [2, 0])
def test_a_folded_model_refuses_any_number_of_tokens_but_one(conditioned, tokens):
    small = rewritten(conditioned.model, ["fold_context"])
    with pytest.raises(InputError, match=rf"encoder_hidden_states is \[2, {tokens}, 32\].*exactly one token"):
        conditioned.run(small, tokens=tokens)


def test_a_folded_model_refuses_to_do_without_a_context(conditioned):
    [*_, folded] = modules_of(rewritten(conditioned.model, ["fold_context"]), FoldedContext).values()
    with pytest.raises(InputError, match="encoder_hidden_states is NoneType"):
        folded(torch.zeros(2, 4, 32))


# --- what is saved --------------------------------------------------------------------------------------------------


def test_a_transposed_upsample_costs_four_ninths(subject):
    before, old = subject.macs(subject.model)
    after, new = subject.macs(rewritten(subject.model, ["transpose_upsample"]))
    convolutions = [f"{name}.conv" for name in modules_of(subject.model, Upsample2D) if f"{name}.conv" in old]
    convolutions += [f"{name}.conv1" for name, block in modules_of(subject.model, ResnetBlock2D).items() if block.upsample is not None]
    assert len(convolutions) == 1
    for name in convolutions:
        assert new[name] * 9 == old[name] * 4
    assert before - after == sum(old[name] for name in convolutions) * 5 // 9


def test_a_folded_context_costs_one_small_product(conditioned):
    small = rewritten(conditioned.model, ["fold_context"])
    (before, old), (after, new) = conditioned.macs(conditioned.model), conditioned.macs(small)
    folded = modules_of(small, FoldedContext)
    assert len(folded) == 4
    for name, module in folded.items():
        assert new[name] == 2 * CONTEXT_WIDTH * module.linear.out_features  # a batch of two
    assert before - after == sum(old[name] - new[name] for name in folded)


@torch.no_grad()
def test_one_head_costs_two_projections_instead_of_four():
    attention = Attention(query_dim=16, heads=1, dim_head=16).to("meta")
    counts = []
    for names in ([], ["merge_one_head"]):
        apply(attention, names)
        with FlopCounterMode(display=False) as counter:
            attention(torch.empty(1, 10, 16, device="meta"))
        counts.append(counter.get_total_flops() // 2)
    assert counts == [4 * 10 * 16 * 16 + 2 * 10 * 10 * 16, 2 * 10 * 16 * 16 + 2 * 10 * 10 * 16]


class Operations(TorchDispatchMode):
    """Counts every operation that reaches a device."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(operation)] += 1
        return operation(*args, **(kwargs or {}))


def operations(function: Callable[[], object]) -> Counter[str]:
    with Operations() as seen, torch.no_grad():
        function()
    return seen.counts


def test_dropped_branches_leave_no_operation_behind(subject):
    """All-dropped = dense, less everything inside the sites, plus the resampling and 1x1 convolution that a ResBlock's shortcut keeps."""
    smallest = search_space(subject.branches).smallest
    inputs: dict[str, Tensor] = {}
    handles = [
        subject.model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0].clone()}))
        for name, units in smallest.choices.items()
        if units == 0
    ]
    with torch.no_grad():
        subject.run(subject.model)
    for handle in handles:
        handle.remove()
    assert len(inputs) == len(handles) > 0

    expected = operations(lambda: subject.run(subject.model))
    with Operations() as seen, torch.no_grad():
        open_hooks = []
        for name in inputs:
            block, marks = subject.model.get_submodule(name), []
            open_hooks.append(block.register_forward_pre_hook(lambda _, __, marks=marks: marks.append(seen.counts.copy())))
            open_hooks.append(block.register_forward_hook(lambda _, __, ___, marks=marks: expected.subtract(seen.counts - marks.pop())))
        subject.run(subject.model)
    for handle in open_hooks:
        handle.remove()
    for name, value in inputs.items():
        block = subject.model.get_submodule(name)
        kept = [block.upsample, block.downsample, block.conv_shortcut] if isinstance(block, ResnetBlock2D) else []
        path = nn.Sequential(*(module for module in kept if module is not None))
        expected.update(operations(lambda path=path, value=value: path(value)))

    small = extract(subject.model, subject.branches, smallest)
    assert operations(lambda: subject.run(small)) == +expected
