"""Fused denoisers compute what plain ones compute: by PyTorch's kernels on a CPU, by this project's on a GPU."""

from __future__ import annotations

import copy
import dataclasses
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.workers.test_training import DiesAfter, Killed, task  # noqa: F401
from workers import families, tasks, trainer
from workers.elastic import ElasticDenoiser, extract
from workers.families import unet2d
from workers.fused import FusedResnet, fuse
from workers.session import Session
from workers.training import random_network

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.detach() - wanted).norm() / wanted.norm())


def output_and_gradient(model, spec=None, device="cpu") -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(3)
    x, t = torch.randn(2, 3, 32, 32, generator=gen).to(device), torch.tensor([7, 800], device=device)
    model.zero_grad()
    output = model(x, t, spec) if spec is not None else model.model(x, t).sample
    output.square().mean().backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return output.detach(), torch.cat([gradient.contiguous().flatten() for gradient in gradients])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=(pytest.mark.gpu, NEEDS_CUDA))])
def test_fused_denoisers_and_their_sub_networks_compute_the_same(task, device, monkeypatch):  # noqa: F811
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model = families.load_denoiser(task.model).to(device)
    plain = ElasticDenoiser(model, unet2d.sites(model, task.elastic))
    fused = copy.deepcopy(plain)
    fuse(fused)
    assert sum(type(module) is FusedResnet for module in fused.modules()) == sum(
        "ResnetBlock2D" in type(m).__name__ for m in model.modules()
    )
    rng = random.Random(0)
    for spec in (None, plain.space.narrowest, *(random_network(plain.space, rng) for _ in range(3))):
        for found, wanted in zip(output_and_gradient(fused, spec, device), output_and_gradient(plain, spec, device), strict=True):
            assert relative(found, wanted) < 2e-5
        small = extract(plain.model, plain.branches, spec or plain.space.dense)
        assert relative(output_and_gradient(ElasticDenoiser(fuse(small), ()), None, device)[0], wanted_output(plain, spec, device)) < 2e-5


def wanted_output(plain: ElasticDenoiser, spec, device: str) -> Tensor:
    return output_and_gradient(plain, spec, device)[0]


def test_scale_shift_blocks_are_left_to_the_library_and_only_lose_their_kernels():
    model = families.family("unet2d").tiny()
    fused = fuse(copy.deepcopy(model))
    assert not any(type(module) is FusedResnet for module in fused.modules())
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([1, 900])
    with torch.no_grad():
        torch.testing.assert_close(fused(x, t).sample, model(x, t).sample, rtol=1e-5, atol=1e-5)


def test_training_with_fused_networks_is_the_same_training_and_resumes_bit_for_bit(task, tmp_path, monkeypatch):  # noqa: F811
    """As on a GPU: weights, averages and optimiser state laid out channels last."""
    task = dataclasses.replace(task, train=dataclasses.replace(task.train, mixed_precision="bf16"))
    plain = tasks.train_expert(Session(str(tmp_path / "plain")), task)
    monkeypatch.setattr(trainer, "fuses", lambda device, dtype: True)
    whole = tasks.train_expert(Session(str(tmp_path / "whole")), task)
    with pytest.raises(Killed):
        tasks.train_expert(DiesAfter(str(tmp_path / "halves")), task)
    tasks.train_expert(Session(str(tmp_path / "halves")), task)
    state = "step_0000006/state.safetensors"
    assert (tmp_path / "whole" / state).read_bytes() == (tmp_path / "halves" / state).read_bytes()
    assert abs(plain.loss / whole.loss - 1) < 0.05


@pytest.mark.gpu
@NEEDS_CUDA
@pytest.mark.parametrize("act", [True, False])
@pytest.mark.parametrize(
    ("channels", "groups", "side"), [(24, 8, 5), (96, 32, 32), (192, 32, 7), (36, 3, 6), (96, 1, 4), (1568, 32, 4), (288, 32, 1)]
)
def test_the_norm_kernel_and_its_gradients_are_those_of_pytorch(channels, groups, side, act):
    from workers import kernels

    torch.manual_seed(0)
    x, add, weight, bias, slope = (
        torch.randn(shape, device="cuda")
        for shape in ((3, channels, side, side), (3, channels), channels, channels, (3, channels, side, side))
    )
    mine, theirs = ([value.clone().requires_grad_() for value in (x, add, weight, bias)] for _ in range(2))
    found = kernels.GroupNorm.apply(*mine, groups, 1e-5, act)
    wanted = F.group_norm(theirs[0] + theirs[1][:, :, None, None], groups, theirs[2], theirs[3], 1e-5)
    wanted = F.silu(wanted) if act else wanted
    found.backward(slope)
    wanted.backward(slope)
    for a, b in ((found, wanted), *((a.grad, b.grad) for a, b in zip(mine, theirs, strict=True))):
        assert relative(a, b.detach()) < 1e-5


@pytest.mark.gpu
@NEEDS_CUDA
def test_the_linear_layer_and_its_gradients_are_those_of_pytorch(monkeypatch):
    from workers import kernels

    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 50, 24, device="cuda"), torch.randn(36, 24, device="cuda"), torch.randn(36, device="cuda")
    mine, theirs = ([value.clone().requires_grad_() for value in (x, weight, bias)] for _ in range(2))
    found, wanted = kernels.Linear.apply(*mine), F.linear(*theirs)
    found.square().sum().backward()
    wanted.square().sum().backward()
    for a, b in ((found, wanted), *((a.grad, b.grad) for a, b in zip(mine, theirs, strict=True))):
        assert relative(a, b.detach()) < 1e-5


@pytest.mark.gpu
@NEEDS_CUDA
@pytest.mark.parametrize("residual", [True, False])
def test_the_bias_kernel_and_its_gradients_are_those_of_pytorch(residual):
    from workers import kernels

    torch.manual_seed(0)
    x, bias, other = torch.randn(3, 96, 7, 7, device="cuda"), torch.randn(96, device="cuda"), torch.randn(3, 96, 7, 7, device="cuda")
    mine, theirs = ([value.clone().requires_grad_() for value in (x, bias, other)] for _ in range(2))
    found = kernels.AddBias.apply(mine[0], mine[1], mine[2] if residual else None)
    wanted = theirs[0] + theirs[1][:, None, None] + (theirs[2] if residual else 0)
    found.square().sum().backward()
    wanted.square().sum().backward()
    for a, b in zip(mine, theirs, strict=True):
        assert (a.grad is None) == (b.grad is None) == (not residual and a is mine[2])
        assert a.grad is None or relative(a.grad, b.grad) < 1e-5
