"""One training step: sub-networks distilled from the frozen dense model, weights in float32, arithmetic in the precision asked for.

In bfloat16 the networks run on a copy of the weights that is rounded anew after every step: autocast would convert weights and activations
again for every layer of every sub-network, and norms would run in float32. On a GPU that copy and the teacher are fused (`workers.fused`),
and what is the same in every step is replayed as CUDA graphs: launching a small U-Net's kernels one by one takes longer than running them.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from workers import rewrites
from workers.contracts import ArchitectureSpec, TrainSettings
from workers.diffusion import NoiseSchedule
from workers.elastic import ElasticDenoiser
from workers.fused import channels_last, fuse
from workers.graphs import Graphs
from workers.optimizer import Optimizer

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16}


def fuses(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether networks run by `workers.fused`: on a GPU, where there is a copy for it."""
    return device.type == "cuda" and dtype != torch.float32


def learning_rate(step: int, settings: TrainSettings) -> float:
    """Linear warm-up, then a cosine to zero: a pure function of the step."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


class Features:
    """Collects the outputs of the named modules during a forward pass."""

    def __init__(self, model: nn.Module, names: Sequence[str]):
        self.names, self.outputs = tuple(names), list[Tensor]()
        for name in names:
            model.get_submodule(name).register_forward_hook(self._collect)

    def _collect(self, _: nn.Module, __: Any, output: Any) -> None:
        self.outputs.append(output[0] if isinstance(output, tuple) else output)

    def take(self) -> list[Tensor]:
        outputs, self.outputs = self.outputs, []
        return outputs


def teachable(levels: Sequence[str], spec: ArchitectureSpec) -> list[str]:
    """The levels whose features a sub-network can learn: those where it has kept a branch. What a level without one makes of its input
    cannot match the teacher's, and would only pull at the levels before it."""
    return [level for level in levels if any(kept and site.startswith(f"{level}.") for site, kept in spec.choices.items())]


class Taught(NamedTuple):
    """What the teacher makes of a batch: its output [B, C, H, W], its features, and the mean square of each of those."""

    output: Tensor
    features: list[Tensor]
    energies: list[Tensor]

    @classmethod
    def of(cls, output: Tensor, features: list[Tensor]) -> Taught:
        return cls(output.float(), features, [_mean_square(feature).clamp_min(1e-8) for feature in features])

    def only(self, chosen: Sequence[bool]) -> Taught:
        """Of the features, the chosen ones."""
        features, energies = (list(itertools.compress(values, chosen)) for values in (self.features, self.energies))
        return Taught(self.output, features, energies)


def _mean_square(values: Tensor) -> Tensor:
    """Summed in float32, without a float32 copy of the values."""
    return torch.linalg.vector_norm(values, dtype=torch.float32).square() / values.numel()


def expert_loss(
    predicted: Tensor, features: Sequence[Tensor], taught: Taught, target: Tensor, settings: TrainSettings, weights: Tensor | None = None
) -> Tensor:
    """Output distillation + feature distillation (each level relative to the teacher's energy; none if there are none) + denoising.

    ``weights`` [B]: how much each image's errors of the output count.
    """
    ratios = [_mean_square(mine - theirs) / energy for mine, theirs, energy in zip(features, taught.features, taught.energies, strict=True)]
    return (
        settings.output_weight * _weighted_error(predicted, taught.output, weights)
        + (settings.feature_weight * torch.stack(ratios).mean() if ratios else 0.0)
        + settings.denoising_weight * _weighted_error(predicted, target, weights)
    )


def _weighted_error(predicted: Tensor, wanted: Tensor, weights: Tensor | None) -> Tensor:
    """Mean squared error of a batch [B, C, H, W] whose images count ``weights`` [B]."""
    if weights is None:
        return F.mse_loss(predicted.float(), wanted)
    return ((predicted.float() - wanted).square().flatten(1).mean(1) * weights).mean()


class Batch(NamedTuple):
    """One rank's rows of one step: clean samples and noise [B, C, H, W], timesteps [B], and what else the denoiser is told."""

    clean: Tensor
    timesteps: Tensor
    noise: Tensor
    told: dict[str, Tensor]

    def copy_(self, other: Batch) -> None:
        """Take over another batch's values, in place."""
        for mine, theirs in zip((*self[:3], *self.told.values()), (*other[:3], *other.told.values()), strict=True):
            mine.copy_(theirs)


@dataclass
class Captured:
    """The parts of a step that do not change, as CUDA graphs over a batch that stays where it is."""

    batch: Batch
    teach: Callable[[], None]
    learn: dict[ArchitectureSpec | None, Callable[[], None]]
    losses: dict[ArchitectureSpec | None, Tensor]
    lesson: Lesson


class Lesson(NamedTuple):
    """What every sub-network of a step gets: noisy samples [B, C, H, W], timesteps [B], what else it is told, and two right answers."""

    noisy: Tensor
    timesteps: Tensor
    told: dict[str, Tensor]
    target: Tensor
    taught: Taught


@dataclass
class Trainer:
    """What one step needs. The model is not wrapped in DistributedDataParallel, whose bookkeeping breaks on sub-networks that leave
    parameters unused; gradients are averaged once a step instead."""

    accelerator: Accelerator
    model: ElasticDenoiser
    """Weights in float32."""
    running: ElasticDenoiser
    """What computes: ``model`` itself, or its copy in lower precision."""
    teacher: nn.Module
    optimizer: Optimizer
    averaged: nn.Module
    """The denoiser with the averaged weights."""
    schedule: NoiseSchedule
    features: Features
    taught_features: Features
    settings: TrainSettings
    weights: Tensor | None
    """How much an error at each timestep counts [T]; None: all the same."""
    captured: Captured | None = field(default=None, init=False)

    @classmethod
    def of(
        cls,
        accelerator: Accelerator,
        elastic: ElasticDenoiser,
        teacher: nn.Module,
        features: Sequence[str],
        schedule: NoiseSchedule,
        settings: TrainSettings,
        weights: Tensor | None = None,
    ) -> Trainer:
        """``features``: the modules of both networks whose outputs are distilled. Both are on the accelerator's device; the teacher is
        converted to the precision of the steps."""
        dtype = DTYPES[settings.mixed_precision]
        fused = fuses(accelerator.device, dtype)
        if fused:
            channels_last(elastic)  # laid out like the copy, or every step would turn the weights over
        averaged = copy.deepcopy(elastic.model).requires_grad_(False)
        running = elastic if dtype == torch.float32 else nn.Module.to(copy.deepcopy(elastic), dtype=dtype)
        if fused:
            rewrites.apply(teacher, ("transpose_upsample", "fuse_qkv"))
        nn.Module.to(teacher, dtype=dtype).requires_grad_(False)
        if fused:
            fuse(running)
            fuse(teacher)
        for parameter in (*elastic.parameters(), *running.parameters()):
            parameter.grad = torch.zeros_like(parameter)  # graphs write to where it is
        optimizer = Optimizer(elastic, settings)
        hooks, taught = Features(running.model, features), Features(teacher, features)
        return cls(accelerator, elastic, running, teacher, optimizer, averaged, schedule, hooks, taught, settings, weights)

    def step(self, step: int, batch: Batch, networks: Sequence[ArchitectureSpec | None]) -> Tensor:
        """One optimiser step; returns the mean loss over the sub-networks (0-d, on the device)."""
        loss = self.accumulate(batch, networks)
        self.update(step)
        return loss

    def accumulate(self, batch: Batch, networks: Sequence[ArchitectureSpec | None], parts: int = 1) -> Tensor:
        """Add the gradient of the mean loss over the sub-networks, which it returns; ``parts``: of how many equal batches this is one."""
        captured, total = self.captured, torch.zeros((), device=batch.clean.device)
        share = 1 / (len(networks) * parts)
        if captured is None:
            lesson = self._teach(batch)
            self._join(lesson.taught)
            for spec in networks:
                total += self._learn(lesson, spec, share)
            return total
        captured.batch.copy_(batch)
        captured.teach()
        self._join(captured.lesson.taught)
        for spec in networks:
            if spec in captured.learn:
                captured.learn[spec]()
                total += captured.losses[spec]
            else:
                total += self._learn(captured.lesson, spec, share)
        return total

    def capture(self, batch: Batch, repeated: Collection[ArchitectureSpec | None], count: int) -> None:
        """Make CUDA graphs of the teacher and of the ``repeated`` sub-networks, for steps of ``count`` sub-networks on batches like this
        one. Gradients are zero afterwards."""
        graphs = Graphs()
        clean, timesteps, noise, told = batch
        stay = Batch(clean.clone(), timesteps.clone(), noise.clone(), {name: value.clone() for name, value in told.items()})
        lessons: list[Lesson] = []
        teach = graphs.capture(lambda: lessons.append(self._teach(stay)))
        lesson, learn, losses = lessons[-1], {}, {}
        del lessons[:]
        for spec in repeated:
            found: list[Tensor] = []
            learn[spec] = graphs.capture(lambda spec=spec, found=found: found.append(self._learn(lesson, spec, 1 / count)))  # type: ignore[misc]
            losses[spec] = found[-1]
        self.captured = Captured(stay, teach, learn, losses, lesson)
        self._forget()
        self.optimizer.capture(graphs)

    def release(self) -> None:
        """Let the graphs go: they refer to this trainer as it to them, and the memory of one expert would outlast it."""
        self.captured = None
        self.optimizer.release()

    def _teach(self, batch: Batch) -> Lesson:
        dtype = DTYPES[self.settings.mixed_precision]
        clean, timesteps, noise, told = batch
        noisy, target = self.schedule.noised(clean, noise, timesteps).to(dtype), self.schedule.target(clean, noise, timesteps)
        told = {name: value.to(dtype) if value.is_floating_point() else value for name, value in told.items()}
        with torch.no_grad():
            taught = Taught.of(self.teacher(noisy, timesteps, **told).sample, self.taught_features.take())
        return Lesson(noisy, timesteps, told, target, taught)

    @torch.no_grad()
    def _join(self, taught: Taught) -> None:
        """Energies of the whole batch, not of this worker's part: a mean of ratios is no ratio of means, and two workers would train
        something else than one. In place, where graphs read them."""
        if self.accelerator.num_processes > 1 and taught.energies:
            whole = self.accelerator.reduce(torch.stack(taught.energies), reduction="mean")
            torch._foreach_copy_(taught.energies, list(whole.unbind()))

    def _learn(self, lesson: Lesson, spec: ArchitectureSpec | None, share: float) -> Tensor:
        """One sub-network's gradient, times ``share``; returns its loss, times ``share``."""
        predicted = self.running(lesson.noisy, lesson.timesteps, spec, **lesson.told)
        weights = None if self.weights is None else self.weights[lesson.timesteps]
        levels = self.features.names if spec is None else teachable(self.features.names, spec)
        taught = lesson.taught.only([name in levels for name in self.features.names])
        mine = [feature for name, feature in zip(self.features.names, self.features.take(), strict=True) if name in levels]
        loss = expert_loss(predicted, mine, taught, lesson.target, self.settings, weights) * share
        self.accelerator.backward(loss)
        return loss.detach()

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Spend the gradient: weights, then their average."""
        weights = list[Tensor](self.model.parameters())
        if self.running is not self.model:
            torch._foreach_copy_(_gradients(self.model), _gradients(self.running))
        self.average_gradients()
        self.accelerator.clip_grad_norm_(weights, self.settings.max_grad_norm)
        self.optimizer.step(learning_rate(step, self.settings))
        decay = min(self.settings.ema_decay, (1 + step) / (10 + step))  # it warms up, so that short runs are averaged too
        torch._foreach_lerp_(list[Tensor](self.averaged.parameters()), weights, 1 - decay)
        self._round()
        self._forget()

    @torch.no_grad()
    def _round(self) -> None:
        """Give the running copy the weights."""
        if self.running is not self.model:
            torch._foreach_copy_(list(self.running.parameters()), list(self.model.parameters()))

    def _forget(self) -> None:
        torch._foreach_zero_(_gradients(self.running))

    def average_gradients(self) -> None:
        """Mean over this expert's data-parallel workers: one reduction of one flat tensor."""
        if self.accelerator.num_processes == 1:
            return
        gradients = _gradients(self.model)
        flat = self.accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), reduction="mean")
        parts = flat.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)])

    def tensors(self) -> dict[str, Tensor]:
        """The whole training state as named tensors."""
        state = {f"model.{name}": tensor for name, tensor in self.model.model.state_dict().items()}
        state |= {f"ema.{name}": tensor for name, tensor in self.averaged.state_dict().items()}
        return state | {f"optimizer.{name}": tensor for name, tensor in self.optimizer.tensors().items()}

    def load(self, state: dict[str, Tensor]) -> None:
        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}

        self.model.model.load_state_dict(part("model."))
        self.averaged.load_state_dict(part("ema."))
        self.optimizer.load(part("optimizer."))
        self._round()


def _gradients(model: nn.Module) -> list[Tensor]:
    """One per parameter, in place since `Trainer.of`."""
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
