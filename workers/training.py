"""Train one expert: sandwich of sub-networks, distilled from the frozen dense model, on its own timesteps. Resumes bit for bit.

Everything random in a step is derived from (seed, step) alone; ranks share the sub-networks and take turns at the rows of one batch.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from workers import checkpoint, conditioning, data
from workers.contracts import ArchitectureSpec, ExpertCheckpoint, ExpertTask, Progress, RunFailed, SearchSpace, TrainSettings, derive_seed
from workers.diffusion import NoiseSchedule, draw_timesteps, generator
from workers.elastic import ElasticDenoiser
from workers.samples import Samples, open_samples
from workers.session import Session

Networks = Callable[[int], Sequence[ArchitectureSpec | None]]


def random_network(space: SearchSpace, rng: random.Random) -> ArchitectureSpec:
    """A random sub-network of random overall size, so that small and large ones are trained as often as middling ones."""
    size = rng.random()
    ranks = {s.name: min(1.0, max(0.0, size + rng.uniform(-0.3, 0.3))) * (len(s.choices) - 1) for s in space.sites}
    return ArchitectureSpec({s.name: s.choices[round(ranks[s.name])] for s in space.sites})


def sandwich(space: SearchSpace, count: int, seed: int) -> Networks:
    """Step -> ``count`` random sub-networks, the narrowest, and the largest (slimmable networks' sandwich rule)."""

    def networks(step: int) -> list[ArchitectureSpec | None]:
        rng = random.Random(derive_seed(seed, "sandwich", step))
        return [*(random_network(space, rng) for _ in range(count)), space.narrowest, None]

    return networks


def learning_rate(step: int, settings: TrainSettings) -> float:
    """Linear warm-up, then a cosine to zero: a pure function of the step."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


class Features:
    """Collects the outputs of the named modules during a forward pass."""

    def __init__(self, model: nn.Module, names: Sequence[str]):
        self.outputs: list[Tensor] = []
        for name in names:
            model.get_submodule(name).register_forward_hook(self._collect)

    def _collect(self, _: nn.Module, __: Any, output: Any) -> None:
        self.outputs.append(output[0] if isinstance(output, tuple) else output)

    def take(self) -> list[Tensor]:
        outputs, self.outputs = self.outputs, []
        return outputs


def expert_loss(
    predicted: Tensor,
    features: Sequence[Tensor],
    taught: Tensor,
    taught_features: Sequence[Tensor],
    target: Tensor,
    settings: TrainSettings,
) -> Tensor:
    """Output distillation + feature distillation (each level relative to the teacher's energy) + denoising."""
    ratios = [
        F.mse_loss(a.float(), b.float()) / b.float().square().mean().clamp_min(1e-8) for a, b in zip(features, taught_features, strict=True)
    ]
    return (
        settings.output_weight * F.mse_loss(predicted.float(), taught.float())
        + settings.feature_weight * torch.stack(ratios).mean()
        + settings.denoising_weight * F.mse_loss(predicted.float(), target)
    )


class Batch(NamedTuple):
    """One rank's rows of one step: clean samples and noise [B, C, H, W], timesteps [B], and what else the denoiser is told."""

    clean: Tensor
    timesteps: Tensor
    noise: Tensor
    told: dict[str, Tensor]


@dataclass
class Trainer:
    """What one step needs. The model is not wrapped in DistributedDataParallel, whose bookkeeping breaks on sub-networks that leave
    parameters unused; gradients are averaged once a step instead."""

    accelerator: Accelerator
    model: ElasticDenoiser
    teacher: nn.Module
    optimizer: torch.optim.Optimizer
    ema: AveragedModel
    schedule: NoiseSchedule
    features: Features
    taught_features: Features
    settings: TrainSettings

    def step(self, step: int, batch: Batch, networks: Sequence[ArchitectureSpec | None]) -> Tensor:
        """One optimiser step; returns the mean loss over the sub-networks (0-d, on the device)."""
        loss = self.accumulate(batch, networks)
        self.update(step)
        return loss

    def accumulate(self, batch: Batch, networks: Sequence[ArchitectureSpec | None], parts: int = 1) -> Tensor:
        """Add the gradient of the mean loss over the sub-networks, which it returns; ``parts``: of how many equal batches this is one."""
        clean, timesteps, noise, told = batch
        noisy, target = self.schedule.noised(clean, noise, timesteps), self.schedule.target(clean, noise, timesteps)
        with torch.no_grad(), self.accelerator.autocast():
            taught, taught_features = self.teacher(noisy, timesteps, **told).sample, self.taught_features.take()
        total = torch.zeros((), device=clean.device)
        for spec in networks:
            with self.accelerator.autocast():
                predicted = self.model(noisy, timesteps, spec, **told)
            loss = expert_loss(predicted, self.features.take(), taught, taught_features, target, self.settings) / (len(networks) * parts)
            self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def update(self, step: int) -> None:
        """Spend the gradient: weights, then their average."""
        self.average_gradients()
        self.accelerator.clip_grad_norm_(self.model.parameters(), self.settings.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.settings)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update_parameters(self.model)

    def average_gradients(self) -> None:
        """Mean over this expert's data-parallel workers: one reduction of one flat tensor."""
        if self.accelerator.num_processes == 1:
            return
        parameters = list(self.model.parameters())
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
        flat = self.accelerator.reduce(flat, reduction="mean")
        for p, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad = gradient.view_as(p)

    @property
    def averaged(self) -> nn.Module:
        """The denoiser that holds the averaged weights."""
        return self.ema.module.get_submodule("model")

    def tensors(self) -> dict[str, Tensor]:
        """The whole training state as named tensors."""
        state = {f"model.{name}": tensor for name, tensor in self.model.model.state_dict().items()}
        state |= {f"ema.{name}": tensor for name, tensor in self.averaged.state_dict().items()}
        state["updates"] = self.ema.n_averaged
        for index, slots in self.optimizer.state_dict()["state"].items():
            state |= {f"optimizer.{index}.{slot}": torch.as_tensor(value) for slot, value in slots.items()}
        return state

    def load(self, state: dict[str, Tensor]) -> None:
        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}

        self.model.model.load_state_dict(part("model."))
        self.averaged.load_state_dict(part("ema."))
        self.ema.n_averaged.copy_(state["updates"])
        slots: dict[int, dict[str, Tensor]] = {}
        for name, tensor in part("optimizer.").items():
            index, _, slot = name.partition(".")
            slots.setdefault(int(index), {})[slot] = tensor
        self.optimizer.load_state_dict({"state": slots, "param_groups": self.optimizer.state_dict()["param_groups"]})


def _ema_update(decay: float) -> Callable[..., None]:
    """Decay that warms up with the number of updates, so that short runs are averaged too."""

    @torch.no_grad()
    def update(averaged: list[Tensor], current: list[Tensor], updates: Tensor) -> None:
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + float(updates)) / (10 + float(updates))))

    return update


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

    ``about`` goes into every checkpoint's description. Raises: RunFailed if the loss is not finite.
    """
    started, settings = time.time(), task.train
    images, conditioner = open_samples(task.images), conditioning.load(task.model)
    AcceleratorState._reset_state()  # in one process (--inline) the last run may have had another precision
    accelerator = Accelerator(mixed_precision=settings.mixed_precision, cpu=session.device == "cpu")
    device = accelerator.device
    teacher.to(device).requires_grad_(False)
    elastic.to(device)
    conditioner.to(device)
    ema = AveragedModel(elastic, multi_avg_fn=_ema_update(settings.ema_decay)).requires_grad_(False)
    hooks = Features(elastic.model, features)
    optimizer = torch.optim.AdamW(
        elastic.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=device.type == "cuda"
    )
    optimizer = accelerator.prepare(optimizer)
    trainer = Trainer(accelerator, elastic, teacher, optimizer, ema, schedule, hooks, Features(teacher, features), settings)

    step, history = 0, []
    with session.resume() as folder:
        if folder is not None:
            state, saved = checkpoint.read(folder)
            trainer.load(state)
            step, history = saved["step"], saved["history"]

    def save(at: int) -> None:
        record = {**about, "stage": task.stage, "interval": task.interval.to_json(), "step": at, "history": history}
        session.save(at, lambda folder: checkpoint.write(folder, trainer.tensors(), record))

    unit = f"{task.label} {task.interval.name}".strip()

    def report(at: int, note: str = "") -> None:
        seconds = time.time() - started
        rate = (at - first) * settings.batch_size / seconds if at > first else None
        loss = history[-1][1] if history else None
        session.report(Progress(task.stage, unit, at, settings.steps, loss, rate, seconds, first, note))

    first, told, every = step, 0.0, max(1, settings.steps // 100)
    report(step, "resumed" if step else "")
    while step < settings.steps:
        loss = trainer.step(step, _batch(task, images, conditioner, schedule, step, device, session), networks(step))
        step += 1
        due = step % settings.checkpoint_every == 0 or step == settings.steps
        if step % every == 0 or due:
            history.append([step, round(float(accelerator.reduce(loss, reduction="mean")), 6)])
            if not math.isfinite(history[-1][1]):  # before it is saved: a checkpoint must be worth resuming
                raise RunFailed(
                    f"{task.stage} {task.interval.name}: the loss is {history[-1][1]} at step {step}: lower {task.stage}.learning_rate"
                )
        if due:
            save(step)
        if time.time() - told > 0.5 or step == settings.steps:
            report(step)
            told = time.time()
    return ExpertCheckpoint(task.interval, session.checkpoint_path(step), step, history[-1][1], started, time.time())


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
