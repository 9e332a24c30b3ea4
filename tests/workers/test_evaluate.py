"""What a score may not depend on: batch size, sharding, the order of work. And what it is, by hand."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from workers import data, evaluate, families, rewrites, tasks
from workers.contracts import REWRITES, DenoiserRef, EvaluateTask, ImageTask, InputError, Partition, Timing
from workers.cost import cost_table
from workers.diffusion import NoiseSchedule
from workers.mixture import any_width
from workers.regional import RegionCompiler
from workers.session import Session


@pytest.fixture(scope="module")
def task(emoji, emoji_images, tmp_path_factory) -> EvaluateTask:
    folder = tmp_path_factory.mktemp("evaluate")
    data.build_cache(ImageTask(str(emoji_images), 3, 32, False, "refuse", str(folder / "images.arrow")))
    return EvaluateTask(
        denoiser=DenoiserRef("dense"),
        model=str(emoji),
        images=str(folder / "images.arrow"),
        rows=tuple(range(8)),
        noise_seeds=tuple(range(8)),
        partition=Partition.from_boundaries([500], 1000),
        scheduler="ddim",
        steps=3,
        batch_size=8,
        timesteps=(100, 700),
        seed=0,
        device="cpu",
        out=str(folder / "whole.npz"),
        timing=Timing(2, "float32", False),
    )


@pytest.fixture(scope="module")
def whole(task):
    return dict(np.load(tasks.evaluate_shard(Session(), task)))


def test_batch_size_changes_no_score(task, whole, tmp_path):
    small = dict(np.load(tasks.evaluate_shard(Session(), dataclasses.replace(task, batch_size=3, out=str(tmp_path / "small.npz")))))
    np.testing.assert_allclose(small["losses"], whole["losses"], rtol=1e-5)
    np.testing.assert_allclose(small["samples"], whole["samples"], atol=1e-5)


def test_four_shards_equal_one(task, whole, tmp_path):
    shards = [
        dataclasses.replace(task, rows=task.rows[i : i + 2], noise_seeds=task.noise_seeds[i : i + 2], out=str(tmp_path / f"{i}.npz"))
        for i in range(0, 8, 2)
    ]
    for shard in shards:
        tasks.evaluate_shard(Session(), shard)
    one = tasks.summarise(Session(), ((task,), str(tmp_path / "one.npz")))["dense"]
    four = tasks.summarise(Session(), (tuple(shards), str(tmp_path / "four.npz")))["dense"]
    assert four["denoising_loss"] == pytest.approx(one["denoising_loss"], rel=1e-6)
    np.testing.assert_allclose(np.load(tmp_path / "four.npz")["dense"], np.load(tmp_path / "one.npz")["dense"], atol=1e-5)


def test_the_denoising_loss_is_that_of_the_ddpm_equation(emoji):
    model = families.load_denoiser(emoji)
    schedule = NoiseSchedule(families.load_scheduler_config(emoji))
    images = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
    noise = torch.randn(1, 3, 32, 32, generator=evaluate.generator("cpu", 9, "held out").clone_state())[0:1]
    abar = schedule.scheduler.alphas_cumprod[400]
    with torch.no_grad():
        predicted = model(abar.sqrt() * images + (1 - abar).sqrt() * noise, 400).sample
    found = evaluate.denoising_losses(model, schedule, images, {}, [9], [400])
    assert found[0, 0] == pytest.approx(float((predicted - noise).square().mean()), rel=1e-4)


def test_paired_metrics_by_hand():
    dense = np.zeros((2, 3, 16, 16), np.float32)
    found = evaluate.paired_metrics(dense + 0.5, dense)
    assert found["paired_mse"] == pytest.approx(0.25)
    assert found["paired_psnr_db"] == pytest.approx(10 * math.log10(2**2 / 0.25), abs=1e-4)
    assert evaluate.paired_metrics(dense, dense) == {"paired_mse": 0.0, "paired_psnr_db": None, "paired_ssim": 1.0}


def test_cost_per_step_is_that_of_the_very_model(task, emoji):
    found = evaluate.cost_per_step(families.load_denoiser(emoji), task, "cpu", repeats=1)
    assert found["ms_per_step"] > 0
    assert found["gmacs_per_step"] == pytest.approx(cost_table(families.load_config(emoji), any_width("group")).dense.macs / 1e9)
    lighter = evaluate.cost_per_step(rewrites.apply(families.load_denoiser(emoji), REWRITES), task, "cpu", repeats=1)
    assert lighter["gmacs_per_step"] < found["gmacs_per_step"]


def test_cuda_graphs_hold_every_expert_once_and_are_replayed_for_every_repeat(task, emoji, monkeypatch):
    captured, replayed = [], []

    def capture(run):
        captured.append(run.func)
        run()
        return lambda: replayed.append(run.func)

    class FakeGraphs:
        def __init__(self):
            self.capture = capture

    monkeypatch.setattr(evaluate, "Graphs", FakeGraphs)
    monkeypatch.setattr(Timing, "check", lambda self, device: None)
    model = torch.nn.Module()
    model.experts = torch.nn.ModuleList(families.load_denoiser(emoji) for _ in range(2))
    graphed = dataclasses.replace(task, timing=Timing(2, "float32", False, cuda_graphs=True))
    evaluate.cost_per_step(model, graphed, "cpu", repeats=3)
    assert captured == list(model.experts)
    assert replayed == [expert for expert in model.experts for _ in range(5)]


def test_cuda_graphs_of_a_cpu_are_refused(task, emoji):
    graphed = dataclasses.replace(task, timing=Timing(2, "float32", False, cuda_graphs=True))
    with pytest.raises(InputError, match=r"latency\.cuda_graphs is true, but the device is cpu: set it to false"):
        evaluate.cost_per_step(families.load_denoiser(emoji), graphed, "cpu")


def test_with_one_compiler_a_second_denoiser_of_the_same_blocks_compiles_nothing(task, emoji):
    torch._dynamo.reset()
    compiler, compiled = RegionCompiler("eager"), dataclasses.replace(task, timing=Timing(2, "float32", True))
    evaluate.cost_per_step(families.load_denoiser(emoji), compiled, "cpu", repeats=1, compiler=compiler)
    known = set(compiler.compiled)
    evaluate.cost_per_step(families.load_denoiser(emoji), compiled, "cpu", repeats=1, compiler=compiler)
    assert known
    assert set(compiler.compiled) == known
