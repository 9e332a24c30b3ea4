"""Regional compilation: the same function, every region compiled once however many sub-networks use it, and none left uncompiled."""

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from workers import families, latency
from workers.contracts import ElasticSettings
from workers.elastic import extract, search_space
from workers.regional import RegionCompiler, regions

SETTINGS = ElasticSettings(width_multiple=4, depth=True, importance="magnitude")


class CountingBackend:
    """Runs what dynamo captured as it is, and counts how often it was asked to compile."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        self.count += 1
        return graph


@pytest.fixture(autouse=True)
def no_gradients():
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def tiny(name: str) -> tuple[nn.Module, tuple, dict]:
    model = families.family(name).tiny().requires_grad_(False)
    return model, *families.example_inputs({**model.config, "_class_name": type(model).__name__}, 2, "cpu", torch.float32)


@pytest.mark.parametrize("name", families.names())
def test_a_compiled_denoiser_computes_what_the_plain_one_computes(name):
    model, args, kwargs = tiny(name)
    expected = model(*args, **kwargs).sample
    compiler = RegionCompiler(CountingBackend())
    compiler.compile(model)
    for _ in range(2):
        torch.testing.assert_close(model(*args, **kwargs).sample, expected)
    assert compiler.backend.count == len(compiler.compiled) > 0


def test_regions_are_outermost_and_hold_every_residual_block():
    model, _, _ = tiny("unet2d")
    found = list(regions(model))
    inside = {id(module) for region in found for module in region.modules()}
    assert not any(id(other) in {id(m) for m in region.modules()} for region in found for other in found if other is not region)
    assert all(id(module) in inside for module in model.modules() if isinstance(module, ResnetBlock2D))


def test_another_denoiser_of_the_same_shapes_compiles_nothing():
    model, args, kwargs = tiny("unet2d")
    other = tiny("unet2d")[0]
    other.load_state_dict({name: tensor + 0.1 for name, tensor in model.state_dict().items()})
    expected = other(*args, **kwargs).sample
    compiler = RegionCompiler(CountingBackend())
    compiler.compile(model)(*args, **kwargs)
    before = compiler.backend.count
    torch.testing.assert_close(compiler.compile(other)(*args, **kwargs).sample, expected)
    assert compiler.backend.count == before


def test_more_shapes_than_dynamo_s_recompile_limit_are_each_compiled_once():
    model, args, kwargs = tiny("unet2d")
    branches = families.family("unet2d").sites(model, SETTINGS)
    compiler = RegionCompiler(CountingBackend())
    space = search_space(branches)
    for spec in (space.dense, space.narrowest, *latency.random_networks(space, 2, seed=0)):
        small = extract(model, branches, spec)
        expected = small(*args, **kwargs).sample
        torch.testing.assert_close(compiler.compile(small)(*args, **kwargs).sample, expected)
    blocks = {key for key in compiler.compiled if any(part[1:2] == (ResnetBlock2D,) for part in key if isinstance(part, tuple))}
    assert len(blocks) > torch._dynamo.config.recompile_limit
    assert compiler.backend.count == len(compiler.compiled)
