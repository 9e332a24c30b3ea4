"""Train one expert: sandwich of sub-networks, distilled from the frozen dense model, on its own timesteps. Resumes bit for bit.

Everything random in a step is derived from (seed, step) alone; ranks share the sub-networks and take turns at the rows of one batch.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from workers import checkpoint, conditioning, data, dense_error
from workers.contracts import ArchitectureSpec, ExpertCheckpoint, ExpertTask, Interval, Progress, RunFailed, SearchSpace, derive_seed
from workers.cost import CostTable
from workers.diffusion import NoiseSchedule, draw_timesteps, generator
from workers.elastic import ElasticDenoiser
from workers.samples import Samples, open_samples
from workers.session import Session
from workers.trainer import Batch, Trainer

LEAST_IMAGES, SCALE_STEPS = 64, 4
"""Behind the scale of an expert's output: as many images as so many steps take, or at least so many."""
MOST_SCALE = 1.25
"""It is bounded by this, and by its inverse."""
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
    output: str,
) -> ExpertCheckpoint:
    """Train ``elastic`` for ``task.train.steps`` steps, from the session's last checkpoint if it has one.

    ``about`` goes into every checkpoint's description, and so do the ``attempts``: from which step each began, and when; and in ``seconds``
    how long all of them took. ``output``: the layer that makes the denoiser's output.
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
        reach = task.interval.widened(schedule.num_timesteps)
        looks = _looks(task, images, conditioner, schedule, device, interval=reach, count=dense_error.IMAGES, chunk=16, name="weights")
        weights = torch.tensor(session.agree(_timestep_weights(schedule, teacher, looks)), device=device)
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
        if step == settings.steps and settings.scale_output:
            scale = _scale(task, images, conditioner, schedule, trainer, output, session)
            about = {**about, "output_scale": round(scale, 6)}
            if scale == MOST_SCALE:
                report(step, f"its output is scaled by {scale:g}, the most that is allowed: the plan leaves this expert too little")
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


class Look(NamedTuple):
    """Noisy samples [n, C, H, W] at timesteps [n], what else is told of them, the target, and how much an output counts in them [n]."""

    noisy: Tensor
    timesteps: Tensor
    told: dict[str, Tensor]
    target: Tensor
    counts: Tensor


def _looks(
    task: ExpertTask,
    images: Samples,
    conditioner: conditioning.Conditioner,
    schedule: NoiseSchedule,
    device: torch.device,
    *,
    interval: Interval,
    count: int,
    chunk: int,
    name: str,
) -> Iterator[Look]:
    """``count`` of the training images, one per timestep of an even grid over ``interval``, in chunks; always the same ones."""
    timesteps = [interval.start + (2 * i + 1) * interval.length // (2 * count) for i in range(count)]
    for i in range(0, count, chunk):
        rows = [task.rows[(j * len(task.rows)) // count] for j in range(i, min(i + chunk, count))]
        gen, t = generator(device, task.seed, name, i), torch.tensor(timesteps[i : i + chunk], device=device)
        clean = images.clean(rows, device)
        noise = torch.randn(clean.shape, generator=gen, device=device)
        labels = None if conditioner.classes.argument is None else images.labels_of(rows).to(device)
        target = schedule.target(clean, noise, t)
        yield Look(schedule.noised(clean, noise, t), t, conditioner(labels), target, schedule.weight_of_output(t))


def _timestep_weights(schedule: NoiseSchedule, teacher: nn.Module, looks: Iterable[Look]) -> list[float]:
    """[T]: the inverse of the teacher's denoising error (`dense_error`), measured where an expert's timesteps reach."""
    timesteps: list[int] = []
    errors: list[Tensor] = []
    energies: list[Tensor] = []
    for look in looks:
        with torch.no_grad():
            output = teacher(look.noisy, look.timesteps, **look.told).sample
        timesteps += look.timesteps.tolist()
        errors.append((output - look.target).square().flatten(1).mean(1))
        energies.append(look.target.square().mean())
    energy = float(torch.stack(energies).mean())
    return (1 / dense_error.DenseError.fit(schedule, timesteps, torch.cat(errors).tolist(), energy)()).tolist()


def output_scale(answers: Callable[[Tensor, Tensor, dict[str, Tensor]], tuple[Tensor, Tensor]], looks: Iterable[Look]) -> float:
    """By what a student's outputs s are to be multiplied so that they rise with the teacher's T one to one: <T, T> / <s, T>.

    What least squares learn is too faint: of what a smaller network cannot tell, it answers the mean, and sampling adds that up. The
    squared error rises a little. Noise counts as it is in the noisy samples: near the clean end, where most is missed, it hardly does.
    ``answers``: noisy samples [n, C, H, W], timesteps [n] and what else is told -> (T, s).
    """
    energy, inner = 0.0, 0.0
    for look in looks:
        taught, mine = (answer.double() for answer in answers(look.noisy, look.timesteps, look.told))
        counts = look.counts.double().view(-1, *[1] * (taught.dim() - 1))
        energy, inner = energy + float((counts * taught.square()).sum()), inner + float((counts * taught * mine).sum())
    return min(MOST_SCALE, max(1 / MOST_SCALE, energy / inner)) if inner > 0 else 1.0


def _scale(
    task: ExpertTask,
    images: Samples,
    conditioner: conditioning.Conditioner,
    schedule: NoiseSchedule,
    trainer: Trainer,
    output: str,
    session: Session,
) -> float:
    """After the last step: scale what the layer ``output`` of the averaged network makes; returns by what."""
    settings = task.train
    trainer.release()
    looks = _looks(
        task,
        images,
        conditioner,
        schedule,
        trainer.accelerator.device,
        interval=task.interval,
        count=max(LEAST_IMAGES, SCALE_STEPS * settings.batch_size),
        chunk=max(1, min(64, settings.batch_size // session.world_size)),
        name="scale",
    )
    scale = session.agree(output_scale(trainer.finished(), looks))
    trainer.scale_output(output, scale)
    return scale


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
