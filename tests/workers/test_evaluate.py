"""What a score may not depend on: batch size, sharding, the order of work. And what it is, by hand."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image

from workers import data, evaluate, families, rewrites, tasks_evaluate
from workers.contracts import (
    REWRITES,
    DenoiserRef,
    EvaluateTask,
    ExtractorRef,
    ImageTask,
    InputError,
    Partition,
    Protocol,
    SamplerRef,
    Timing,
)
from workers.cost import cost_table
from workers.diffusion import NoiseSchedule
from workers.elastic import ElasticDenoiser
from workers.frechet import Statistics, frechet_distance
from workers.generate import SamplingDenoiser, Surroundings
from workers.mixture import MixtureDenoiser, any_width
from workers.regional import RegionCompiler
from workers.rows import RowTask
from workers.session import Session
from workers.tasks_evaluate import evaluate_shard, summarise

PROTOCOL = Protocol((3, 32, 32), 0, 1.0, "float32")


class Pooled(torch.nn.Module):
    """Twelve features: means of quarters of every channel."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


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
        sampler=SamplerRef("ddim", 3, 0.0),
        batch_size=8,
        timesteps=(100, 700),
        seed=0,
        device="cpu",
        out=str(folder / "whole.npz"),
        timing=Timing(2, "float32", False),
    )


@pytest.fixture(scope="module")
def extractor(tmp_path_factory) -> ExtractorRef:
    path = tmp_path_factory.mktemp("extractor") / "pooled.pt"
    torch.jit.script(Pooled()).save(path)
    return ExtractorRef("torchscript", str(path))


@pytest.fixture(scope="module")
def with_features(task, extractor) -> EvaluateTask:
    return dataclasses.replace(task, frechet_seeds=tuple(range(100, 112)), extractor=extractor, batch_size=4)


@pytest.fixture(scope="module")
def whole(with_features, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("whole") / "whole.npz")
    return dict(np.load(evaluate_shard(Session(), dataclasses.replace(with_features, out=out))))


def test_batch_size_changes_no_score(with_features, whole, tmp_path):
    small = dict(np.load(evaluate_shard(Session(), dataclasses.replace(with_features, batch_size=3, out=str(tmp_path / "small.npz")))))
    np.testing.assert_allclose(small["losses"], whole["losses"], rtol=1e-5)
    np.testing.assert_allclose(small["samples"], whole["samples"], atol=1e-5)
    np.testing.assert_allclose(small["features"], whole["features"], atol=1e-4)  # a pixel may fall on the other side of a rounding
    one, other = Statistics.of(small["features"]), Statistics.of(whole["features"])
    assert frechet_distance(one, other) == pytest.approx(0, abs=1e-6)


def row(shards: tuple[EvaluateTask, ...], out: Path, **more) -> dict:
    for shard in shards:
        evaluate_shard(Session(), shard)
    summarise(Session(), (RowTask(shards, PROTOCOL, str(out), **more),))
    return json.loads(out.read_text())


def test_four_shards_equal_one_bit_for_bit(with_features, tmp_path):
    """Rows, samples and seeds of features are shared out in whole batches, of which there are two, two and three."""
    Statistics.of(np.random.default_rng(0).standard_normal((50, 12)).astype(np.float32)).save(tmp_path / "reference.npz")
    shards = [
        dataclasses.replace(
            with_features,
            rows=with_features.rows[4 * i : 4 * i + 4],
            noise_seeds=with_features.noise_seeds[4 * i : 4 * i + 4],
            frechet_seeds=with_features.frechet_seeds[4 * i : 4 * i + 4],
            out=str(tmp_path / f"four.{i}of4-4.npz"),
        )
        for i in range(4)
    ]
    references = dict.fromkeys(("reference", "kid_reference"), str(tmp_path / "reference.npz"))
    one = row((dataclasses.replace(with_features, out=str(tmp_path / "whole.npz")),), tmp_path / "one.json", **references)
    four = row(tuple(shards), tmp_path / "four.json", **references)
    for key in ("denoising_loss", "paired_mse", "frechet", "kid", "kid_std", "drawn"):
        assert four[key] == one[key], "the same images are drawn together"
    assert one["drawn"] == {"batch": 4, "compiled": False}
    np.testing.assert_array_equal(np.load(tmp_path / "four.npz")["samples"], np.load(tmp_path / "one.npz")["samples"])
    assert not list(tmp_path.glob("four.?of4-4.npz")), "shards are of no use once the row is there"


def test_a_row_of_the_dense_model_under_another_sampler_costs_no_second_measurement(task, tmp_path, monkeypatch):
    dense = row((dataclasses.replace(task, out=str(tmp_path / "s.npz")),), tmp_path / "dense.json")
    monkeypatch.setattr(evaluate, "cost_per_step", lambda *_, **__: pytest.fail("measured again"))
    fewer = dataclasses.replace(
        task, denoiser=DenoiserRef("dense ddim:2"), sampler=SamplerRef("ddim", 2, 0.0), rows=(), out=str(tmp_path / "t.npz")
    )
    found = row((fewer,), tmp_path / "fewer.json", dense=str(tmp_path / "dense.json"), known_from=str(tmp_path / "dense.json"))
    for key in ("ms_per_step", "gmacs_per_step", "denoising_loss", "timesteps"):
        assert found[key] == dense[key]
    assert dense["paired_mse"] == 0 < found["paired_mse"]
    assert [r["sampler"]["steps"] for r in (dense, found)] == [r["calls"] for r in (dense, found)] == [3, 2]
    assert found["protocol"] == dense["protocol"]
    assert found["images_per_s"] == pytest.approx(1e3 / found["ms_per_image"])


def test_a_row_is_timed_beside_dense_also_where_the_row_of_dense_is_older(tiny, tmp_path, monkeypatch):
    clock = itertools.count(1)
    monkeypatch.setattr(
        evaluate, "cost_per_step", lambda *_, **__: {"ms_per_step": float(next(clock)), "gmacs_per_step": 1.0, "parameters": 1}
    )

    def times(*labels: str) -> list[tuple[float, float]]:
        tasks = [
            dataclasses.replace(tiny, denoiser=DenoiserRef(label), rows=(0,), timesteps=(5,), out=f"{tmp_path}/{label}.0of1.npz")
            for label in labels
        ]
        for task in tasks:
            evaluate_shard(Session(), task)
        outs = {task.denoiser.label: tmp_path / f"{task.denoiser.label}.json" for task in tasks}
        dense = str(tmp_path / "dense.json")
        items = [
            RowTask((task,), PROTOCOL, str(outs[task.denoiser.label]), None if task.denoiser.label == "dense" else dense) for task in tasks
        ]
        rows = [json.loads(Path(out).read_text()) for out in summarise(Session(), tuple(items))]
        return [(row["dense_ms_per_step"], row["ms_per_step"]) for row in rows]

    assert times("dense", "a") == [(1, 1), (1, 2)]
    assert times("b", "c") == [(3, 4), (3, 5)]


def test_rows_that_are_there_are_not_made_again(task, tmp_path):
    item = RowTask((dataclasses.replace(task, out="nowhere"),), PROTOCOL, str(tmp_path / "row.json"))
    (tmp_path / "row.json").write_text("{}")
    assert summarise(Session(), (item,)) == [str(tmp_path / "row.json")]


def test_samples_in_bfloat16_are_near_those_in_float32(task, tmp_path):
    found = {}
    for dtype in ("float32", "bfloat16"):
        shard = dataclasses.replace(task, dtype=dtype, rows=(), noise_seeds=(1, 2), out=str(tmp_path / f"{dtype}.npz"))
        found[dtype] = np.load(evaluate_shard(Session(), shard))["samples"]
    assert found["bfloat16"].dtype == np.float32
    assert 0 < np.abs(found["bfloat16"] - found["float32"]).mean() < 0.02


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> EvaluateTask:
    """The task of a tiny random model."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    DDPMPipeline(families.family("unet2d").tiny(), DDPMScheduler()).save_pretrained(folder / "model")
    for i in range(2):
        Image.fromarray(np.full((16, 16, 3), 100 * i, np.uint8)).save(folder / f"{i}.png")
    data.build_cache(ImageTask(str(folder), 3, 16, False, "refuse", str(folder / "images.arrow")))
    cuts, timing = Partition.from_boundaries([500], 1000), Timing(2, "float32", False)
    one = EvaluateTask(
        DenoiserRef("dense"),
        str(folder / "model"),
        str(folder / "images.arrow"),
        (),
        (1, 2, 3),
        cuts,
        SamplerRef("ddim", 3, 0.0),
        2,
        (),
        0,
        "cpu",
        "",
        timing,
    )
    return dataclasses.replace(one, out=str(folder / "out.npz"))


def test_compiled_samples_are_the_plain_ones_and_one_size_of_batch_is_compiled(tiny, tmp_path, monkeypatch):
    torch._dynamo.reset()
    compiler = RegionCompiler("eager")
    monkeypatch.setattr(tasks_evaluate, "_compiler", lambda: compiler)
    plain, compiled = (
        np.load(evaluate_shard(Session(), dataclasses.replace(tiny, compiled=on, out=str(tmp_path / f"{on}.npz")))) for on in (False, True)
    )
    np.testing.assert_allclose(compiled["samples"], plain["samples"], atol=1e-4)
    assert compiled["batches"][:, 0].tolist() == [2, 1]
    assert compiler.compiled
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled for another size"))
    evaluate_shard(Session(), dataclasses.replace(tiny, compiled=True, noise_seeds=(1,), out=str(tmp_path / "one.npz")))


def test_a_mixture_samples_as_when_a_pipeline_calls_it(tiny):
    config = families.load_config(tiny.model)
    space = ElasticDenoiser(
        dense := families.load_denoiser(tiny.model), families.family_of_config(config).sites(dense, any_width("group"))
    ).space
    torch.manual_seed(0)
    mixture = MixtureDenoiser.of(config, [500], (space.narrowest, space.dense)).eval()
    around = Surroundings.load(tiny.model, "cpu")

    def drawn(model: Any, epsilon_scale: float = 1.0) -> torch.Tensor:
        sampler = SamplerRef("ddim", 4, 0.0, epsilon_scale)
        return torch.cat([x for x, _ in around.draw(model, sampler, [1, 2], (3, 16, 16), 2)])

    plain = drawn(mixture)
    torch.testing.assert_close(drawn(SamplingDenoiser(mixture, "cpu")), plain, atol=0, rtol=0)
    scaled = drawn(SamplingDenoiser(mixture, "cpu"), 1.25)
    assert (scaled - plain).abs().max() > 0.01
    torch.testing.assert_close(drawn(mixture.scale_epsilon(1.25)), scaled, atol=1e-5, rtol=0)
    torch.testing.assert_close(drawn(mixture.scale_epsilon(1 / 1.25)), plain, atol=1e-5, rtol=0)


def test_a_scale_too_small_for_the_rounding_of_bfloat16_holds_there_too(emoji):
    config = families.load_config(emoji)
    space = ElasticDenoiser(
        dense := families.load_denoiser(emoji), families.family_of_config(config).sites(dense, any_width("group"))
    ).space
    mixture = MixtureDenoiser.of(config, [], (space.dense,)).eval()
    mixture.experts[0].load_state_dict(dense.state_dict())
    x = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    predicted = [copy.deepcopy(m).bfloat16()(x, 500).sample.double() for m in (mixture, copy.deepcopy(mixture).scale_epsilon(1.002))]
    ratio = (predicted[0] * predicted[1]).sum() / predicted[1].square().sum()
    assert float(ratio.detach()) == pytest.approx(1.002, abs=4e-4)
    with pytest.raises(InputError, match="scale_epsilon changes float32 weights"):
        mixture.bfloat16().scale_epsilon(1.002)


def test_what_fills_the_last_batch_up_is_thrown_away(task, emoji):
    around, sampler = Surroundings.load(emoji, "cpu"), SamplerRef("ddim", 2, 0.0)
    model = SamplingDenoiser(families.load_denoiser(emoji), "cpu")
    drawn = {pad: [x for x, _ in around.draw(model, sampler, [1, 2, 3], (3, 32, 32), 2, pad=pad)] for pad in (False, True)}
    assert [len(part) for part in drawn[True]] == [2, 1]
    torch.testing.assert_close(torch.cat(drawn[True]), torch.cat(drawn[False]), atol=1e-5, rtol=0)


def test_the_speed_is_that_of_whole_batches_without_the_one_that_warms_up_each_shard():
    first, last, warmed = np.array([[4, 100.0], [4, 1.0], [2, 9.0]]), np.array([[4, 50.0], [4, 3.0]]), np.array([[4, 2.0]])
    assert evaluate.speed([first]) == {"images_per_s": 4.0, "ms_per_image": 250.0}
    assert evaluate.speed([first, last, np.zeros((0, 2))]) == {"images_per_s": 2.0, "ms_per_image": 500.0}
    assert evaluate.speed([warmed]) == {"images_per_s": 2.0, "ms_per_image": 500.0}, "all that there is"
    assert evaluate.speed([np.array([[2, 8.0]]), warmed]) == {"images_per_s": 2.0, "ms_per_image": 500.0}


def test_a_batch_is_drawn_before_only_where_none_could_be_timed_after_it():
    assert evaluate.lone_batch([range(3), range(10, 14)], 4) == range(10, 14)
    assert evaluate.lone_batch([range(6)], 4) == range(4)
    assert evaluate.lone_batch([range(4), range(8)], 4) == ()
    assert evaluate.lone_batch([(), ()], 4) == ()


def test_a_lone_batch_is_warmed_up_by_one_that_is_thrown_away(tiny, tmp_path, monkeypatch):
    """Where warming up takes long: with compiled blocks here, and on every GPU."""
    torch._dynamo.reset()
    drawn, draw = [], Surroundings.draw

    def spy(self, model, sampler, seeds, *arguments, **more):
        drawn.append(tuple(seeds))
        return draw(self, model, sampler, seeds, *arguments, **more)

    monkeypatch.setattr(Surroundings, "draw", spy)
    monkeypatch.setattr(tasks_evaluate, "_compiler", lambda: RegionCompiler("eager"))
    for compiled, seeds, expected in (
        (True, (1, 2), [(1, 2), (1, 2)]),
        (True, (1, 2, 3, 4), [(), (1, 2, 3, 4)]),
        (False, (1, 2), [(1, 2)]),
    ):
        drawn.clear()
        told: list[int] = []
        session = Session(on_progress=lambda event, told=told: told.append(event.step))
        task = dataclasses.replace(tiny, noise_seeds=seeds, compiled=compiled, out=str(tmp_path / f"{compiled}{len(seeds)}.npz"))
        found = np.load(evaluate_shard(session, task))
        assert drawn == expected
        assert found["batches"][:, 0].tolist() == [2] * (len(seeds) // 2)
        assert told == [0, *range(2, len(seeds) + 1, 2)], "what is thrown away is no progress"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_in_bfloat16_four_shards_draw_the_bits_of_one(tiny, tmp_path):
    whole = dataclasses.replace(tiny, noise_seeds=tuple(range(8)), device="cuda", dtype="bfloat16", out=str(tmp_path / "whole.npz"))
    parts = [dataclasses.replace(whole, noise_seeds=tuple(range(i, i + 2)), out=str(tmp_path / f"{i}.npz")) for i in range(0, 8, 2)]
    found = [np.load(evaluate_shard(Session(device="cuda"), task))["samples"] for task in (whole, *parts)]
    np.testing.assert_array_equal(np.concatenate(found[1:]), found[0])


def test_a_perceptual_distance_is_the_mean_over_pairs(tmp_path, monkeypatch):
    (tmp_path / "perceptual.py").write_text(
        "import torch\nclass Far(torch.nn.Module):\n    def forward(self, a, b): return (a - b).abs().amax((1, 2, 3), keepdim=True)\n"
        "def odd(): return 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    a, b = np.zeros((5, 1, 4, 4), np.float32), np.zeros((5, 1, 4, 4), np.float32)
    a[2, 0, 1, 1] = 0.5
    assert evaluate.lpips("perceptual:Far", a, b, "cpu", batch=2) == pytest.approx(0.1)
    assert evaluate.lpips_digest("perceptual:Far") == evaluate.lpips_digest("perceptual:Far")
    for spec, told in (("perceptual:odd", "gave a int"), ("perceptual:no", "cannot be imported"), ("perceptual", "cannot be imported")):
        with pytest.raises(InputError, match=rf"evaluate\.lpips: {spec} {told}"):
            evaluate.load_lpips(spec)


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
    assert replayed == [expert for expert in model.experts for _ in range(1 + 2 * 3)], "one warms up, of every two the second is timed"


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
