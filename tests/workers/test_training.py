"""One expert's training: exact resume, derived randomness, data parallelism, and losses that go down."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor

from workers import conditioning, data, dense_error, families, tasks, training
from workers.contracts import ArchitectureSpec, ElasticSettings, ExpertTask, ImageTask, Interval, RunFailed, TrainSettings
from workers.cost import CostTable, cost_table
from workers.diffusion import NoiseSchedule
from workers.elastic import ElasticDenoiser, extract
from workers.samples import open_samples
from workers.session import Session
from workers.trainer import Batch, Taught, Trainer, expert_loss, learning_rate, teachable

SETTINGS = TrainSettings(
    steps=6,
    batch_size=4,
    learning_rate=1e-3,
    warmup_steps=2,
    weight_decay=0.01,
    ema_decay=0.9,
    max_grad_norm=1.0,
    mixed_precision="no",
    checkpoint_every=3,
    outside_fraction=0.2,
    output_weight=1.0,
    feature_weight=0.5,
    denoising_weight=0.1,
    relative_errors=True,
)


@pytest.fixture(scope="module")
def task(emoji, emoji_images, tmp_path_factory) -> ExpertTask:
    out = tmp_path_factory.mktemp("cache") / "images.arrow"
    data.build_cache(ImageTask(str(emoji_images), 3, 32, False, "refuse", str(out)))
    return ExpertTask(
        stage="specialize",
        model=str(emoji),
        images=str(out),
        rows=tuple(range(40)),
        interval=Interval(300, 600),
        elastic=ElasticSettings(width_multiple=8, depth=True, importance="taylor"),
        train=SETTINGS,
        random_networks=1,
        importance_images=4,
        seed=5,
        flip=True,
    )


class Killed(Exception):
    pass


class DiesAfter(Session):
    """A session whose process is lost right after the checkpoint of a step."""

    def save(self, step, write):
        super().save(step, write)
        if step == 3:
            raise Killed


def test_errors_count_by_their_weights_and_weights_of_one_change_nothing():
    predicted, wanted, target = torch.randn(3, 2, 3, 8, 8)
    taught = Taught.of(wanted, [wanted])
    plain = expert_loss(predicted, [wanted], taught, target, SETTINGS)
    torch.testing.assert_close(expert_loss(predicted, [wanted], taught, target, SETTINGS, torch.ones(2)), plain)
    alone = expert_loss(predicted[:1], [wanted], taught._replace(output=wanted[:1]), target[:1], SETTINGS)
    torch.testing.assert_close(expert_loss(predicted, [wanted], taught, target, SETTINGS, torch.tensor([2.0, 0.0])), alone)


def test_an_expert_learns_in_units_of_the_teachers_error(task, tmp_path):
    """The weights of an interval are one over the teacher's error there: multiplied with it they give one everywhere."""
    images, schedule = open_samples(task.images), NoiseSchedule(families.load_scheduler_config(task.model))
    teacher, nobody = families.load_denoiser(task.model), conditioning.load(task.model)
    wide = dataclasses.replace(task, interval=Interval(0, 1000))
    weights = torch.tensor(training._timestep_weights(wide, images, nobody, schedule, teacher, torch.device("cpu")))
    clean, products = images.clean(range(40), "cpu"), []
    for t in (20, 300, 600):
        noise, at = torch.randn(clean.shape, generator=torch.Generator().manual_seed(t)), torch.full((40,), t)
        with torch.no_grad():
            error = (teacher(schedule.noised(clean, noise, at), at).sample - noise).square().mean()
        products.append(float(weights[t] * (error + dense_error.FLOOR)))
    assert all(0.5 < product < 2 for product in products), products
    assert weights[600] > 10 * weights[20]


def test_six_steps_equal_three_and_resume_and_three(task, tmp_path):
    whole = tasks.train_expert(Session(folder=str(tmp_path / "whole")), task)
    with pytest.raises(Killed):
        tasks.train_expert(DiesAfter(folder=str(tmp_path / "halves")), task)
    told = []
    halves = tasks.train_expert(Session(folder=str(tmp_path / "halves"), on_progress=told.append), task)
    assert told[0].first_step == 3, "it started over, and would have been equal anyway"
    one, two = load_file(f"{whole.path}/state.safetensors"), load_file(f"{halves.path}/state.safetensors")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert whole.loss == halves.loss


def test_the_seconds_of_an_expert_are_those_of_all_attempts_that_were_saved(task, tmp_path):
    with pytest.raises(Killed):
        tasks.train_expert(DiesAfter(folder=str(tmp_path)), task)
    [saved] = tmp_path.glob("step_*")
    about = json.loads((saved / "checkpoint.json").read_text())
    assert about["seconds"] > 0
    (saved / "checkpoint.json").write_text(json.dumps({**about, "seconds": 1000.0}))
    expert = tasks.train_expert(Session(folder=str(tmp_path)), task)
    assert expert.seconds == pytest.approx(1000 + expert.ended - expert.started, abs=0.1)
    assert 1000 < json.loads((Path(expert.path) / "checkpoint.json").read_text())["seconds"] <= expert.seconds + 0.01


def test_a_checkpoint_that_was_cut_is_passed_over_and_told_and_the_result_is_the_same(task, tmp_path):
    short = dataclasses.replace(task, train=dataclasses.replace(SETTINGS, steps=2, checkpoint_every=1))
    whole = tasks.train_expert(Session(folder=str(tmp_path)), short)
    state = Path(whole.path) / "state.safetensors"
    before = {name: tensor.clone() for name, tensor in load_file(state).items()}  # the file is mapped
    os.truncate(state, state.stat().st_size // 2)
    told = []
    again = tasks.train_expert(Session(folder=str(tmp_path), on_progress=told.append), short)
    assert told[0].first_step == 1
    assert told[0].note.startswith(f"resumed; passed over: checkpoint {whole.path} cannot be read")
    after = load_file(f"{again.path}/state.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    attempts = json.loads((Path(again.path) / "checkpoint.json").read_text())["attempts"]
    assert [step for step, _ in attempts] == [0, 1]


def test_a_finished_run_trains_no_further(task, tmp_path, monkeypatch):
    session = Session(folder=str(tmp_path))
    first = tasks.train_expert(session, task)

    def no_step(*_: object) -> None:
        raise AssertionError("a finished run took another step")

    monkeypatch.setattr(Trainer, "step", no_step)
    again = tasks.train_expert(session, task)
    assert (again.step, again.loss, again.path) == (first.step, first.loss, first.path)


RANK = """
import json, os, sys
import torch, torch.distributed
from workers import tasks
from workers.contracts import ExpertTask
from workers.session import Session
torch.set_num_threads(1)
rank = int(os.environ["RANK"])
torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
for folder in sys.argv[1:]:
    task = ExpertTask.from_json(json.load(open(f"{folder}/task.json")))
    tasks.train_expert(Session(folder=folder, rank=rank, world_size=2), task)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def one_and_two(task, tmp_path_factory) -> dict[int, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Steps -> the training state of one process, and that of two data-parallel ones. The single step is not clipped."""
    folder = tmp_path_factory.mktemp("ranks")
    single = dataclasses.replace(task, train=dataclasses.replace(task.train, steps=1, max_grad_norm=1e9))
    trained = {1: single, 6: task}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for steps, one in trained.items():
        (folder / f"{steps}").mkdir()
        (folder / f"{steps}" / "task.json").write_text(json.dumps(one.to_json()))
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, *(str(folder / f"{steps}") for steps in trained)],
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",  # two ranks with two threads each would spin on two cores
                "RANK": str(r),
                "LOCAL_RANK": str(r),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
            cwd=Path(__file__).parents[2],
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(2)
    ]
    for rank in ranks:
        _, err = rank.communicate(timeout=300)
        assert rank.returncode == 0, err
    found = {}
    for steps, one in trained.items():
        alone = tasks.train_expert(Session(folder=str(folder / f"alone{steps}")), one)
        found[steps] = load_file(f"{alone.path}/state.safetensors"), load_file(folder / f"{steps}/step_{steps:07d}/state.safetensors")
    return found


def test_two_workers_train_what_one_trains_with_the_joined_batch(task, one_and_two):
    a, b = one_and_two[6]
    weights = [name for name in a if name.startswith(("model.", "ema."))]
    start = families.load_denoiser(task.model).state_dict()
    moved = max(float((a[f"model.{name}"] - tensor).abs().max()) for name, tensor in start.items())
    apart = max(float((a[name] - b[name]).abs().max()) for name in weights)
    assert apart < 0.02 * moved, f"one and two workers are {apart} apart, training moved {moved}"


def test_the_gradient_of_two_workers_is_that_of_one_with_the_joined_batch(one_and_two):
    """After one step AdamW's first moment is (1 - beta1) times the gradient, if nothing clips it."""
    a, b = one_and_two[1]
    gradients = [name for name in a if name.endswith(".exp_avg")]
    largest = max(float(a[name].abs().max()) for name in gradients)
    apart = max(float((a[name] - b[name]).abs().max()) for name in gradients)
    assert largest > 0
    assert apart < 1e-5 * largest, f"gradients are {apart / largest:.1e} of the largest apart"


def test_a_finetuned_expert_is_small_and_its_loss_falls(task, tmp_path):
    elastic = tasks.train_expert(
        Session(folder=str(tmp_path / "elastic")), dataclasses.replace(task, train=dataclasses.replace(SETTINGS, steps=1))
    )
    model = families.load_denoiser(task.model)
    space = families.family("unet2d").sites(model, task.elastic)
    narrow = training.SearchSpace(tuple(branch.site for branch in space)).narrowest
    long = dataclasses.replace(SETTINGS, steps=30, checkpoint_every=30, learning_rate=2e-3)
    small = dataclasses.replace(task, stage="finetune", source=elastic.path, spec=narrow, train=long)
    done = tasks.train_expert(Session(folder=str(tmp_path / "small")), small)
    state, about = tasks.checkpoint.read(done.path, prefix="ema.")
    assert sum(t.numel() for t in state.values()) < 0.5 * sum(p.numel() for p in model.parameters())
    losses = [loss for _, loss in about["history"]]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_a_loss_that_is_not_finite_stops_the_run_with_the_key_to_change(task, tmp_path):
    wild = dataclasses.replace(task, train=dataclasses.replace(SETTINGS, learning_rate=1e30, max_grad_norm=1e30, warmup_steps=0))
    with pytest.raises(RunFailed, match=r"t0300-0600: the loss is .* lower specialize.learning_rate"):
        tasks.train_expert(Session(folder=str(tmp_path)), wild)


def test_two_half_batches_add_up_to_the_gradient_of_the_whole(emoji):
    """The feature loss is relative to the teacher's energy over what it sees at once, so it is left out."""
    model, teacher = families.family("unet2d").tiny(), families.family("unet2d").tiny()
    elastic = ElasticDenoiser(model, families.family("unet2d").sites(model, ElasticSettings(8, True, "taylor")))
    accelerator, names = Accelerator(cpu=True), families.family("unet2d").features(model)
    schedule, settings = NoiseSchedule(families.load_scheduler_config(emoji)), dataclasses.replace(SETTINGS, feature_weight=0.0)
    trainer = Trainer.of(accelerator, elastic, teacher, names, schedule, settings)
    whole = Batch(torch.randn(4, 3, 16, 16), torch.tensor([5, 300, 600, 900]), torch.randn(4, 3, 16, 16), {})
    networks, found = [elastic.space.narrowest, None], []
    for parts in (1, 2):
        for clean, timesteps, noise in zip(*(tensor.chunk(parts) for tensor in whole[:3]), strict=True):
            trainer.accumulate(Batch(clean, timesteps, noise, {}), networks, parts)
        found.append([p.grad.clone() for p in elastic.parameters()])
        trainer._forget()
    for one, two in zip(*found, strict=True):
        assert torch.allclose(one, two, atol=1e-6, rtol=1e-3)


def test_learning_rate_is_a_pure_function_that_warms_up_and_ends_near_zero():
    settings = dataclasses.replace(SETTINGS, steps=100, warmup_steps=10)
    rates = [learning_rate(step, settings) for step in range(100)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[10] == max(rates) == pytest.approx(1e-3)
    assert rates[-1] < 1e-5


def tiny_table() -> CostTable:
    model = families.family("unet2d").tiny()
    return cost_table(dict(model.config) | {"_class_name": "UNet2DModel"}, ElasticSettings(8, True, "taylor"))


def test_all_ranks_and_all_reruns_train_the_same_sub_networks():
    table = tiny_table()
    first, again = training.sandwich(table, (0.3, 1.0), 2, 7), training.sandwich(table, (0.3, 1.0), 2, 7)
    assert [first(step) for step in (0, 3, 1)] == [again(step) for step in (0, 3, 1)]
    assert first(0) != first(1)
    assert [first(step)[-1] for step in range(3)] == [table.space.narrowest, None, table.space.narrowest]


def test_where_branches_are_whole_or_gone_the_small_end_is_one_of_the_least_cost():
    model = families.family("unet2d").tiny()
    table = cost_table(dict(model.config) | {"_class_name": "UNet2DModel"}, ElasticSettings(8, True, "taylor", most_widths=1))
    small, largest, again = (training.sandwich(table, (0.6, 1.0), 2, 7)(step)[-1] for step in range(3))
    assert small == again and largest is None
    assert 0.3 < table.cost(small).macs / table.dense.macs <= 0.6


def test_a_pool_is_all_that_random_sub_networks_are_drawn_from():
    table = tiny_table()
    networks = training.sandwich(table, (0.3, 1.0), 2, 7, pool=5)
    drawn = {spec for step in range(40) for spec in networks(step)[:-1]}
    assert drawn == set(networks.pool)
    assert len(networks.pool) == 5
    assert set(networks.repeated) == drawn | {table.space.narrowest, None}
    assert networks(3) == training.sandwich(table, (0.3, 1.0), 2, 7, pool=5)(3)


def test_sub_networks_cost_what_was_asked_for_small_ones_as_often_as_large_ones():
    table = tiny_table()
    networks = training.sandwich(table, (0.4, 0.8), 3, 7)
    costs = [table.cost(spec).macs / table.dense.macs for step in range(100) for spec in networks(step)[:-1]]
    assert max(costs) <= 0.8
    assert 0.3 < min(costs) < 0.45
    assert abs(sum(cost < (0.4 * 0.8) ** 0.5 for cost in costs) / len(costs) - 0.5) < 0.15


def test_a_level_without_a_branch_teaches_nothing():
    kept = {"down_blocks.0.resnets.0": 2, "down_blocks.1.resnets.0": 0, "down_blocks.1.attentions.0": 0, "mid_block.resnets.0": 1}
    levels = ["down_blocks.0", "down_blocks.1", "mid_block"]
    assert teachable(levels, ArchitectureSpec(kept)) == ["down_blocks.0", "mid_block"]


def test_distilling_a_sub_network_is_distilling_its_extracted_self(emoji):
    """Also of the features: both learn those of the same levels."""
    config, model = families.load_config(emoji), families.load_denoiser(emoji)
    elastic = ElasticDenoiser(model, families.family("unet2d").sites(model, ElasticSettings(8, True, "taylor")))
    gone = ("down_blocks.2", "mid")
    spec = ArchitectureSpec({site: 0 if site.startswith(gone) else kept for site, kept in elastic.space.dense.choices.items()})
    names, schedule = families.family_of_config(config).features(model), NoiseSchedule(families.load_scheduler_config(emoji))
    batch = Batch(torch.randn(2, 3, 32, 32), torch.tensor([5, 600]), torch.randn(2, 3, 32, 32), {})
    small = ElasticDenoiser(extract(model, elastic.branches, spec), ())
    losses = []
    for network, levels, asked in ((elastic, names, spec), (small, teachable(names, spec), None)):
        trainer = Trainer.of(Accelerator(cpu=True), network, families.load_denoiser(emoji), levels, schedule, SETTINGS)
        losses.append(float(trainer.accumulate(batch, [asked])))
    assert len(teachable(names, spec)) < len(names)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_random_networks_span_small_and_large_and_are_legal():
    model = families.family("unet2d").tiny()
    elastic = ElasticDenoiser(model, families.family("unet2d").sites(model, ElasticSettings(8, True, "taylor")))
    rng = random.Random(0)
    sizes = []
    for _ in range(200):
        spec = training.random_network(elastic.space, rng)
        elastic.space.check(spec)
        sizes.append(sum(spec.choices.values()) / sum(elastic.space.dense.choices.values()))
    assert min(sizes) < 0.2
    assert max(sizes) > 0.9


def test_without_steps_the_expert_is_the_pretrained_net_in_the_order_of_importance(task, tmp_path):
    none = dataclasses.replace(task, train=dataclasses.replace(SETTINGS, steps=0))
    done = tasks.train_expert(Session(folder=str(tmp_path)), none)
    elastic, dense = tasks.load_elastic(done.path, task.model, task), families.load_denoiser(task.model)
    sample, timestep = torch.randn(2, 3, 32, 32), torch.tensor([7, 500])
    assert torch.allclose(elastic(sample, timestep), dense(sample, timestep).sample, atol=1e-5)
    assert done.step == 0


def steps_of(emoji: Path, device: str, settings: TrainSettings, capture: bool, count: int = 5) -> tuple[Trainer, list[float]]:
    """A trainer of the tiny net after a few steps, and their losses."""
    torch.manual_seed(0)
    model, teacher = families.family("unet2d").tiny(), families.family("unet2d").tiny()
    teacher.load_state_dict(model.state_dict())
    elastic = ElasticDenoiser(model, families.family("unet2d").sites(model, ElasticSettings(8, True, "taylor"))).to(device)
    names, schedule = families.family("unet2d").features(model), NoiseSchedule(families.load_scheduler_config(emoji))
    trainer = Trainer.of(Accelerator(cpu=device == "cpu"), elastic, teacher.to(device), names, schedule, settings)
    networks, losses = training.sandwich(tiny_table(), (0.3, 1.0), 2, 7, pool=3), []
    for step in range(count):
        gen = torch.Generator().manual_seed(step)
        clean, noise = (torch.randn(4, 3, 16, 16, generator=gen).to(device) for _ in range(2))
        batch = Batch(clean, torch.randint(0, 1000, (4,), generator=gen).to(device), noise, {})
        if capture and step == 0:
            trainer.capture(batch, networks.repeated, 3)
        losses.append(float(trainer.step(step, batch, networks(step))))
    return trainer, losses


def test_steps_in_bfloat16_keep_float32_weights_and_go_where_float32_steps_go(emoji):
    whole, losses = steps_of(emoji, "cpu", SETTINGS, capture=False)
    rounded, about = steps_of(emoji, "cpu", dataclasses.replace(SETTINGS, mixed_precision="bf16"), capture=False)
    assert {p.dtype for p in rounded.model.parameters()} == {p.dtype for p in rounded.averaged.parameters()} == {torch.float32}
    assert about == pytest.approx(losses, rel=0.05)
    assert rounded.tensors().keys() == whole.tensors().keys()
    running = dict(rounded.running.named_parameters())
    assert all(torch.equal(running[name], p.bfloat16()) for name, p in rounded.model.named_parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_on_a_gpu_captured_steps_train_what_eager_steps_train(emoji, precision):
    settings = dataclasses.replace(SETTINGS, mixed_precision=precision)
    (eager, losses), (captured, again) = (steps_of(emoji, "cuda", settings, capture) for capture in (False, True))
    assert again == pytest.approx(losses, rel=1e-3)
    for one, two in zip(eager.model.parameters(), captured.model.parameters(), strict=True):
        assert torch.allclose(one, two, atol=2e-3)
