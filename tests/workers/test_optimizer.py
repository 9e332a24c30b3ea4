"""Muon for matrices, AdamW for the rest: each is PyTorch's own, and what they remember survives a file, a device and a layout."""

from __future__ import annotations

import copy
import dataclasses
import gc
import weakref

import pytest
import torch
from torch import nn

from tests.workers.test_training import SETTINGS
from workers.graphs import Graphs
from workers.optimizer import Optimizer, _shares, _work, as_matrix

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.read = nn.Conv2d(3, 32, 3)
        self.wide = nn.Conv2d(32, 16, 3)
        self.flat = nn.Linear(16, 16)
        self.classes = nn.Embedding(20, 16)
        self.norm = nn.GroupNorm(4, 32)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def optimizer(net: nn.Module, **changes: object) -> Optimizer:
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return Optimizer(net, dataclasses.replace(SETTINGS, **changes))


def taught(net: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in net.parameters():
        assert parameter.grad is not None
        parameter.grad.copy_(torch.randn(parameter.shape, generator=generator))


def test_matrices_move_as_under_muon_and_all_else_as_under_adamw(net):
    mine, other = optimizer(net), copy.deepcopy(net)
    for parameter in other.parameters():
        parameter.grad = torch.zeros_like(parameter)
    matrices = [other.wide.weight, other.flat.weight]
    flat = [nn.Parameter(weight.detach().flatten(1).clone()) for weight in matrices]
    muon = torch.optim.Muon(flat, weight_decay=SETTINGS.weight_decay, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([p for p in other.parameters() if not any(p is m for m in matrices)], weight_decay=SETTINGS.weight_decay)
    for step, rate in enumerate((1e-2, 5e-3, 0.0)):
        taught(net, step)
        taught(other, step)
        for view, weight in zip(flat, matrices, strict=True):
            view.grad = weight.grad.flatten(1)
        for reference in (muon, adamw):
            reference.param_groups[0]["lr"] = rate
            reference.step()
        mine.step(rate)
    for name, parameter in other.named_parameters():
        if all(parameter is not matrix for matrix in matrices):
            torch.testing.assert_close(net.get_parameter(name), parameter, rtol=0, atol=0)
    torch.testing.assert_close(net.wide.weight.flatten(1), flat[0], rtol=0, atol=1e-7)  # it adds rate x move: rounded once more
    torch.testing.assert_close(net.flat.weight, flat[1], rtol=0, atol=1e-7)


def test_without_muon_everything_moves_as_under_adamw(net):
    mine, other = optimizer(net, optimizer="adamw"), copy.deepcopy(net)
    adamw = torch.optim.AdamW(other.parameters(), lr=1e-2, weight_decay=SETTINGS.weight_decay)
    taught(net, 0)
    for parameter, same in zip(net.parameters(), other.parameters(), strict=True):
        same.grad = parameter.grad.clone()
    adamw.step()
    mine.step(1e-2)
    for parameter, same in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter, same, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["muon", "adamw"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_what_is_remembered_goes_from_one_layout_to_the_other(net, name, layout):
    """Muon's arithmetic is bfloat16 and its sums have another order there: equal to that."""
    mine = optimizer(net, optimizer=name)
    taught(net, 0)
    mine.step(1e-2)
    kept = {key: value.clone() for key, value in mine.tensors().items()}
    resumed = copy.deepcopy(net).to(memory_format=layout)
    other = optimizer(resumed, optimizer=name)
    other.load(kept)
    for key, value in other.tensors().items():
        torch.testing.assert_close(value, kept[key], rtol=0, atol=0)
    for each, steps in ((net, mine), (resumed, other)):
        taught(each, 1)
        steps.step(1e-2)
    exact = layout == torch.contiguous_format or name == "adamw"
    for parameter, same in zip(net.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(parameter, same, rtol=0, atol=0 if exact else 2e-3)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_matrix_is_a_view_of_its_weight(kernel, layout):
    weight = torch.randn(8, 6, kernel, kernel).to(memory_format=layout)
    matrix = as_matrix(weight)
    assert matrix.shape == (8, 6 * kernel * kernel)
    assert matrix.data_ptr() == weight.data_ptr()
    torch.testing.assert_close(matrix.sort(1).values, weight.flatten(1).sort(1).values)


class Again:
    """Captures as `workers.graphs` does, on a CPU: what is captured has run before."""

    def capture(self, run):
        for _ in range(4):
            run()
        return run


@pytest.mark.parametrize("graphs", [Again, pytest.param(Graphs, marks=(pytest.mark.gpu, NEEDS_CUDA))])
@pytest.mark.parametrize("before", [0, 2])
def test_captured_steps_go_where_others_go_whatever_came_before(graphs, before):
    torch.manual_seed(0)
    deep = nn.Sequential(*(Net() for _ in range(6)))  # more matrices than streams
    nets = [deep.to("cuda" if graphs is Graphs else "cpu", memory_format=torch.channels_last), copy.deepcopy(deep)]
    eager, captured = (optimizer(each) for each in nets)
    for step in range(before + 3):
        for each, steps in zip(nets, (eager, captured), strict=True):
            taught(each, step)
            if step == before and steps is captured:
                captured.capture(graphs())
            steps.step(1e-2 / (1 + step))
    for name, value in eager.tensors().items():
        torch.testing.assert_close(captured.tensors()[name], value, rtol=0, atol=0)
    for parameter, same in zip(*(each.parameters() for each in nets), strict=True):
        torch.testing.assert_close(parameter, same, rtol=0, atol=0 if graphs is Again else 2e-4)


def test_a_released_optimizer_is_gone_with_its_last_user(net):
    steps = optimizer(net)
    steps.capture(Again())
    steps.release()
    gone, weight = weakref.ref(steps), weakref.ref(net.wide.weight)
    gc.disable()
    try:
        del steps, net.wide
        assert gone() is None and weight() is None
    finally:
        gc.enable()


def test_shares_of_matrices_are_about_equal_work_and_miss_none():
    weights = [torch.empty(size, 9 * size) for size in (9, 1, 5, 7, 3, 8)]
    shares = _shares(weights, [0, 2, 3, 4, 5], 2)
    assert sorted(sum(shares, [])) == [0, 2, 3, 4, 5]
    work = [sum(_work(weights[i]) for i in share) for share in shares]
    assert max(work) < 1.1 * sum(work) / 2
    assert _shares(weights, [1], 8) == [[1]]
    assert _shares(weights, [], 8) == []
