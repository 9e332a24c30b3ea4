"""Train one expert: sandwich of sub-networks, distilled from the frozen dense model, on its own timesteps. Resumes bit for bit.

Everything random in a step is derived from (seed, step) alone; ranks share the sub-networks and take turns at the rows of one batch.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from workers import checkpoint, conditioning, data, dense_error
from workers.contracts import ArchitectureSpec, ExpertCheckpoint, ExpertTask, Progress, RunFailed, SearchSpace, derive_seed
from workers.cost import CostTable
from workers.diffusion import NoiseSchedule, draw_timesteps, generator
from workers.elastic import ElasticDenoiser
from workers.samples import Samples, open_samples
from workers.session import Session
from workers.trainer import Batch, Trainer

SHIFT = 0.3
"""How far the sites of a random sub-network lie from its overall size, at most, as a part of their choices."""


def random_network(space: SearchSpace, rng: random.Random) -> ArchitectureSpec:
    """A random sub-network of random overall size, so that small and large ones come as often as middling ones."""
    size = rng.random()
    return _sized(space, size, _shifts(space, rng))


def network_of_cost(table: CostTable, target: float, rng: random.Random) -> ArchitectureSpec:
    """A random sub-network that costs ``target`` of dense's MACs or a little less; the cheapest of its kind if none does."""
    shifts, low, high = _shifts(table.space, rng), -SHIFT, 1 + SHIFT
    for _ in range(12):
        middle = (low + high) / 2
        fits = table.cost(_sized(table.space, middle, shifts)).macs <= target * table.dense.macs
        low, high = (middle, high) if fits else (low, middle)
    return _sized(table.space, low, shifts)


def _shifts(space: SearchSpace, rng: random.Random) -> dict[str, float]:
    return {site.name: rng.uniform(-SHIFT, SHIFT) for site in space.sites}


def _sized(space: SearchSpace, size: float, shifts: Mapping[str, float]) -> ArchitectureSpec:
    """Every site at the part ``size`` of its choices, shifted by its own."""
    ranks = {s.name: min(1.0, max(0.0, size + shifts[s.name])) * (len(s.choices) - 1) for s in space.sites}
    return ArchitectureSpec({s.name: s.choices[round(ranks[s.name])] for s in space.sites})


@dataclass(frozen=True)
class Networks:
    """Which sub-networks a step trains: ``count`` random ones, and one of the ``ends``, which take turns.

    The ends are a small one and the largest (None): slimmable networks' sandwich rule at two thirds of its cost. With a ``pool``, random
    ones are drawn from it; without, they are new in every step. A pure function of ``seed`` and the step.
    """

    ends: tuple[ArchitectureSpec | None, ...]
    draw: Callable[[random.Random], ArchitectureSpec] | None = None
    count: int = 0
    seed: int = 0
    pool: tuple[ArchitectureSpec, ...] = ()

    def __call__(self, step: int) -> list[ArchitectureSpec | None]:
        rng = random.Random(derive_seed(self.seed, "sandwich", step))
        drawn = rng.sample(self.pool, self.count) if self.pool else [self.draw(rng) for _ in range(self.count) if self.draw]
        return [*drawn, self.ends[step % len(self.ends)]]

    @property
    def repeated(self) -> tuple[ArchitectureSpec | None, ...]:
        """Those that come again and again."""
        return (*self.pool, *self.ends)


WHOLE = Networks((None,))
"""No sub-networks: the denoiser itself in every step."""


def sandwich(table: CostTable, costs: tuple[float, float], count: int, seed: int, pool: int = 0) -> Networks:
    """The ends, and sub-networks that cost between ``costs`` of dense's MACs, cheap ones as often as dear ones (by the logarithm).

    The small end is the narrowest; where branches are whole or gone, one of the least of the ``costs``.
    ``pool``: how many random ones there are in all; 0 for new ones in every step. A small pool is learned by heart: of those outside it a
    search would think too little.
    """
    low, high = costs

    def draw(rng: random.Random) -> ArchitectureSpec:
        return network_of_cost(table, low * (high / low) ** rng.random(), rng)

    rng = random.Random(derive_seed(seed, "sandwich", "pool"))
    members = tuple(draw(rng) for _ in range(max(pool, count))) if pool else ()
    small = table.space.narrowest
    if small == table.space.dense:
        small = network_of_cost(table, low, random.Random(derive_seed(seed, "sandwich", "end")))
    return Networks((small, None), draw, count, seed, members)


def fit(
    session: Session,
    elastic: ElasticDenoiser,
    teacher: nn.Module,
    features: Sequence[str],
    schedule: NoiseSchedule,
    task: ExpertTask,
    networks: Networks,
    about: dict[str, Any],
) -> ExpertCheckpoint:
    """Train ``elastic`` for ``task.train.steps`` steps, from the session's last checkpoint if it has one.

    ``about`` goes into every checkpoint's description, and so do the ``attempts``: from which step each began, and when; and in ``seconds``
    how long all of them took.
    Raises: RunFailed if the loss is not finite.
    """
    started, settings = time.time(), task.train
    images, conditioner = open_samples(task.images), conditioning.load(task.model)
    AcceleratorState._reset_state()  # in one process (--inline) the last run may have had another precision
    accelerator = Accelerator(mixed_precision="no", cpu=session.device == "cpu")  # the trainer sees to precision itself
    device = accelerator.device
    teacher.to(device).requires_grad_(False)
    elastic.to(device)
    conditioner.to(device)
    weights = None
    if settings.relative_errors:
        found = session.agree(_timestep_weights(task, images, conditioner, schedule, teacher, device))
        weights = torch.tensor(found, device=device)
    trainer = Trainer.of(accelerator, elastic, teacher, features, schedule, settings, weights)

    step, history, attempts, spent = 0, [], [], 0.0
    with session.resume() as folder:
        if folder is not None:
            state, saved = checkpoint.read(folder)
            trainer.load(state)
            step, history, attempts = saved["step"], saved["history"], saved.get("attempts", [])
            spent = saved.get("seconds", 0.0)
    attempts = [*attempts, [step, round(started, 2)]]
    if device.type == "cuda" and settings.cuda_graphs and step < settings.steps:
        batch = _batch(task, images, conditioner, schedule, step, device, session)
        trainer.capture(batch, networks.repeated, len(networks(step)))

    def save(at: int) -> None:
        record = {**about, "stage": task.stage, "interval": task.interval.to_json(), "step": at, "history": history, "attempts": attempts}
        record["seconds"] = round(spent + time.time() - started, 2)
        session.save(at, lambda folder: checkpoint.write(folder, trainer.tensors(), record))

    def report(at: int, note: str = "") -> None:
        seconds = time.time() - started
        rate = (at - first) * settings.batch_size / seconds if at > first else None
        loss = history[-1][1] if history else None
        session.report(Progress(task.stage, task.unit, at, settings.steps, loss, rate, seconds, first, note))

    first, told, every = step, 0.0, max(1, settings.steps // 100)
    lost = [f"passed over: {reason}" for reason in session.broken]
    report(step, "; ".join((["resumed"] if step else []) + lost))
    if settings.steps == 0:
        save(0)
    while step < settings.steps:
        mean = trainer.step(step, _batch(task, images, conditioner, schedule, step, device, session), networks(step))
        step += 1
        due = step % settings.checkpoint_every == 0 or step == settings.steps
        if step % every == 0 or due:
            history.append([step, round(float(accelerator.reduce(mean, reduction="mean")), 6)])
            if not math.isfinite(history[-1][1]):  # before it is saved: a checkpoint must be worth resuming
                raise RunFailed(
                    f"{task.stage} {task.interval.name}: the loss is {history[-1][1]} at step {step}: lower {task.stage}.learning_rate"
                )
        if due:
            save(step)
        if time.time() - told > 0.5 or step == settings.steps:
            report(step)
            told = time.time()
    trainer.release()
    loss = history[-1][1] if history else 0.0
    ended = time.time()
    return ExpertCheckpoint(task.interval, session.checkpoint_path(step), step, loss, started, ended, spent + ended - started)


def _timestep_weights(
    task: ExpertTask,
    images: Samples,
    conditioner: conditioning.Conditioner,
    schedule: NoiseSchedule,
    teacher: nn.Module,
    device: torch.device,
) -> list[float]:
    """[T]: the inverse of the teacher's denoising error (`dense_error`), measured where an expert's timesteps reach."""
    interval, chunk = task.interval.widened(schedule.num_timesteps), 16
    timesteps = [interval.start + (2 * i + 1) * interval.length // (2 * dense_error.IMAGES) for i in range(dense_error.IMAGES)]
    errors: list[Tensor] = []
    energies: list[Tensor] = []
    for i in range(0, len(timesteps), chunk):
        rows = [task.rows[(j * len(task.rows)) // len(timesteps)] for j in range(i, i + chunk)]
        gen, t = generator(device, task.seed, "weights", i), torch.tensor(timesteps[i : i + chunk], device=device)
        clean = images.clean(rows, device)
        noise = torch.randn(clean.shape, generator=gen, device=device)
        labels = None if conditioner.classes.argument is None else images.labels_of(rows).to(device)
        with torch.no_grad():
            output = teacher(schedule.noised(clean, noise, t), t, **conditioner(labels)).sample
        target = schedule.target(clean, noise, t)
        errors.append((output - target).square().flatten(1).mean(1))
        energies.append(target.square().mean())
    energy = float(torch.stack(energies).mean())
    return (1 / dense_error.DenseError.fit(schedule, timesteps, torch.cat(errors).tolist(), energy)()).tolist()


def _batch(
    task: ExpertTask,
    images: Samples,
    conditioner: conditioning.Conditioner,
    schedule: NoiseSchedule,
    step: int,
    device: torch.device,
    session: Session,
) -> Batch:
    """This rank's rows of the batch of one step. The whole batch is drawn on every rank, so that it is the same for any number of them."""
    size, mine = task.train.batch_size, slice(session.rank, None, session.world_size)
    rows = [task.rows[p] for p in data.order(len(task.rows), size, step, task.seed)]
    gen = generator(device, task.seed, task.interval.start, "train", step)
    flip = torch.rand(size, generator=torch.Generator().manual_seed(gen.initial_seed())) < 0.5 if task.flip else None  # on the CPU: no wait
    timesteps = draw_timesteps(task.interval, schedule.num_timesteps, size, task.train.outside_fraction, gen)
    noise = torch.randn(size, *images.shape, generator=gen, device=device)
    clean = images.clean(rows, device, flip, gen, mine)
    labels = None if conditioner.classes.argument is None else images.labels_of(rows).to(device)
    labels = conditioner.forget(labels, task.class_dropout, gen)
    return Batch(clean, timesteps[mine], noise[mine], conditioner(None if labels is None else labels[mine]))
