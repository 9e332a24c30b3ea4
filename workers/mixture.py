"""The drop-in ``unet``: one small denoiser per interval of timesteps, behind the interface of a single one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict, register_to_config
from diffusers.hooks.group_offloading import _is_group_offload_enabled
from diffusers.models.modeling_utils import ModelMixin  # a pipeline that holds a class from here looks for its base here
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from workers import families
from workers.contracts import ArchitectureSpec, ElasticSettings, InputError, interval_index
from workers.delegation import Delegation
from workers.elastic import Branch, extract
from workers.residency import MODES, Residency
from workers.rewrites import apply
from workers.travelling import Travelling


def any_width(unit: str) -> ElasticSettings:
    """Settings under which every architecture in units of ``unit`` is legal."""
    return ElasticSettings(width_multiple=1, depth=True, importance="magnitude", unit=unit)


def untrained(base: dict[str, Any], unit: str) -> tuple[nn.Module, tuple[Branch, ...]]:
    """The dense denoiser of a config, with random weights, and its elastic branches. What it is told (text, sizes) does not matter."""
    family = families.of_class(base)
    dense = family.model_class(base).from_config(base)
    return dense, family.sites(dense, any_width(unit))


class MixtureDenoiser(Delegation, Travelling, ConfigMixin):
    """K experts; timestep t goes to expert ``interval_index(t, boundaries)``.

    >>> unet = MixtureDenoiser.from_pretrained("registry/quickstart/1")
    >>> pipeline = DDPMPipeline.from_pretrained("path/to/dense", unet=unet)

    ``config`` also answers with what the base's config says, because pipelines ask; only the arguments below are saved.
    Args:
        base: config of the dense denoiser, from which the experts' shapes follow.
        boundaries: the K - 1 inner cuts on the training timestep axis, ascending; a boundary belongs to the noisier expert.
        architectures: kept units per site, one dict per expert, cleanest first.
        in_channels, out_channels, sample_size: as the dense denoiser's; pipelines read them from the config.
        unit: what a ResBlock's unit is, ``group`` or ``channel_per_group``.
        rewrites: names of `workers.rewrites` that were applied to every expert: the same function, fewer operations.
        num_timesteps: of training; a timestep beyond is none, and is refused. None: not known.
    """

    config_name: Any = ModelMixin.config_name
    """ConfigMixin has none by default."""

    @register_to_config
    def __init__(
        self,
        base: dict[str, Any],
        boundaries: Sequence[int],
        architectures: Sequence[dict[str, int]],
        in_channels: int,
        out_channels: int,
        sample_size: int,
        unit: str = "group",
        rewrites: Sequence[str] = (),
        num_timesteps: int | None = None,
    ):
        super().__init__()
        if len(architectures) != len(boundaries) + 1 or list(boundaries) != sorted(set(boundaries)):
            raise InputError(f"{len(architectures)} experts need {len(architectures) - 1} ascending boundaries, not {list(boundaries)}")
        self.boundaries, self.out_channels, self.num_timesteps = tuple(boundaries), out_channels, num_timesteps
        dense, branches = untrained(base, unit)
        small = [extract(dense, branches, ArchitectureSpec(dict(spec))) for spec in architectures]
        self.experts = nn.ModuleList(apply(expert, rewrites) for expert in small)
        self._repeated_blocks = [type(dense).__name__]
        self._residency: Residency | None = None

    @classmethod
    def of(
        cls,
        base: dict[str, Any],
        boundaries: Sequence[int],
        specs: Sequence[ArchitectureSpec],
        unit: str = "group",
        rewrites: Sequence[str] = (),
        num_timesteps: int | None = None,
    ) -> MixtureDenoiser:
        """An untrained mixture of the given architectures."""
        base = {key: value for key, value in base.items() if key != "_name_or_path"}
        shared = {key: base[key] for key in ("in_channels", "out_channels", "sample_size")}
        built = {"unit": unit, "rewrites": list(rewrites), "num_timesteps": num_timesteps}
        return cls(base=base, boundaries=list(boundaries), architectures=[dict(s.choices) for s in specs], **shared, **built)

    def compile_repeated_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Compile every expert, one graph each (``fullgraph=True`` holds). Arguments are those of ``torch.compile``."""
        if "isolate_recompiles" in inspect.signature(torch.compile).parameters:  # else dynamo allows eight experts together
            kwargs.setdefault("isolate_recompiles", True)
        super().compile_repeated_blocks(*args, **kwargs)

    @property
    def config(self) -> Any:
        own: Any = super().config
        return FrozenDict({**{key: value for key, value in own["base"].items() if not key.startswith("_")}, **own})

    def expert_index(self, timestep: Tensor | float) -> Any:
        """Which expert serves a timestep: an int for a number, an integer tensor for a tensor."""
        return interval_index(timestep, self.boundaries)

    @torch.no_grad()
    def rewrite(self, names: Sequence[str]) -> MixtureDenoiser:
        """Apply exact rewrites to every expert, weights included, and note them in the config. Raises: InputError for an unknown name."""
        for expert in self.experts:
            apply(expert, names)
        self.register_to_config(rewrites=[*dict(self.config)["rewrites"], *names])
        return self

    @torch.no_grad()
    def scale_epsilon(self, epsilon_scale: float) -> MixtureDenoiser:
        """Divide the noise that every expert predicts by ``epsilon_scale`` (epsilon scaling, arXiv 2308.15321). The inverse undoes it.

        It goes into the last layer's weights. Raises: InputError unless they are float32, since bfloat16 rounds a factor of 1.002 away
        (convert afterwards: rounded as they are then, the weights hold it on average), or under ``residency``.
        """
        if self._residency is not None or self.dtype != torch.float32:
            raise InputError("scale_epsilon changes float32 weights: call it before the mixture is converted, or its experts come and go")
        output = families.of_class(self.config["base"]).OUTPUT
        for expert in self.experts:
            for parameter in expert.get_submodule(output).parameters():
                parameter /= epsilon_scale
        return self

    # --- where experts are ------------------------------------------------------------------------------------------

    def residency(self, mode: str = "all", device: str | torch.device | None = None) -> MixtureDenoiser:
        """Which experts are on ``device`` (default: where the mixture is): ``all``; the ``active`` one; or ``prefetch``: it and the next.

        The others wait in host memory. Outputs are the same. Moving the mixture then moves where experts visit. For sampling only:
        weights are not to be changed, and a CUDA graph would keep what has left. Raises: InputError for another mode, or under diffusers'
        group offloading.
        """
        if mode not in MODES:
            raise InputError(f"residency is {mode!r}: known are {', '.join(MODES)}")
        if _is_group_offload_enabled(self):
            raise InputError(f"residency({mode!r}): group offloading already moves this mixture's weights: load it again without")
        target = torch.device(self.device if device is None else device)
        if self._residency is not None:
            self._residency.release()
            self._residency = None
        if mode == "all":
            whole: Any = self
            return whole.to(target)
        self._residency = Residency(self.experts, target, ahead=mode == "prefetch")
        return self

    @property
    def device(self) -> torch.device:
        return super().device if self._residency is None else self._residency.device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MixtureDenoiser:
        if self._residency is None:
            return super()._apply(fn, recurse)
        self._residency.apply(fn)
        return self

    def enable_group_offload(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers. Raises: InputError while experts come and go by ``residency``."""
        if self._residency is not None:
            raise InputError("enable_group_offload: residency already moves whole experts: call residency('all') first")
        super().enable_group_offload(*args, **kwargs)

    # --- a forward pass ---------------------------------------------------------------------------------------------

    @torch.compiler.disable(recursive=False)  # which expert is decided outside of the graphs, one each
    def forward(
        self, sample: Tensor, timestep: Tensor | float, told: Tensor | None = None, return_dict: bool = True, **kwargs: Any
    ) -> UNet2DOutput | tuple[Tensor]:
        """Predicted tensor [B, C, H, W] for ``sample`` [B, C, H, W]; ``timestep`` is a number, a 0-d or a [B] tensor, floats allowed.

        Timesteps may differ within a batch: each row then goes to its own expert. ``told`` is what the base takes as its third argument
        (class labels [B], or context [B, tokens, D]); other keyword arguments go to the expert too. Raises: InputError for a timestep
        that is none of training, as samplers of other kinds than DDPM's give them.
        """
        context = () if told is None else (told,)
        if not isinstance(timestep, Tensor) or timestep.numel() == 1:
            number = float(timestep)
            self._check(number, number)
            if type(timestep) is int:  # to a compiled expert, every other int would be another network
                timestep = torch.tensor(timestep)
            output = self.expert(int(self.expert_index(number)))(sample, timestep, *context, **kwargs).sample
        elif len(timestep) != len(sample):
            raise InputError(f"{len(timestep)} timesteps do not fit {len(sample)} samples: give one, or one for each")
        else:
            self._check(float(timestep.min()), float(timestep.max()))
            index = self.expert_index(timestep)
            output = torch.empty(len(sample), self.out_channels, *sample.shape[2:], dtype=sample.dtype, device=sample.device)
            for k in range(len(self.experts)):
                rows = (index == k).nonzero().flatten()
                if len(rows):
                    given = _rows((context, kwargs), rows.to(sample.device), len(sample))
                    output[rows] = self.expert(k)(sample[rows], timestep[rows], *given[0], **given[1]).sample
        return UNet2DOutput(sample=output) if return_dict else (output,)

    def expert(self, k: int) -> nn.Module:
        """Expert ``k``, ready to run on the mixture's device. Raises: InputError if that would lose what training changes."""
        if self._residency is not None:
            if self.training:
                raise InputError("residency moves copies of the weights, which training would lose: call eval(), or residency('all')")
            self._residency.fetch(k)
        return self.experts[k]

    def _check(self, lowest: float, highest: float) -> None:
        if lowest < 0 or (self.num_timesteps is not None and highest >= self.num_timesteps):
            odd, end = (lowest, "") if lowest < 0 else (highest, self.num_timesteps)
            raise InputError(
                f"timestep {odd:g} is not in [0, {end or 'T'}), where this denoiser was trained: EDM and flow-matching samplers give noise "
                "levels instead; use one on training timesteps, such as DDIM, DPM++ or UniPC"
            )


def _rows(value: Any, rows: Tensor, count: int) -> Any:
    """Every tensor of ``count`` rows inside ``value`` (a tuple, list or dict of such), these rows of it."""
    if isinstance(value, Tensor):
        return value[rows] if value.dim() and len(value) == count else value
    if isinstance(value, dict):
        return {key: _rows(item, rows, count) for key, item in value.items()}
    return type(value)(_rows(item, rows, count) for item in value) if isinstance(value, (tuple, list)) else value
