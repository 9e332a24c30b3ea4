"""The drop-in ``unet``: one small denoiser per interval of timesteps, behind the interface of a single one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from workers import families
from workers.contracts import ArchitectureSpec, ElasticSettings, InputError, interval_index
from workers.elastic import extract
from workers.rewrites import apply


def any_width(unit: str) -> ElasticSettings:
    """Settings under which every architecture in units of ``unit`` is legal."""
    return ElasticSettings(width_multiple=1, depth=True, importance="magnitude", unit=unit)


class MixtureDenoiser(ModelMixin, ConfigMixin):
    """K experts; timestep t goes to expert ``interval_index(t, boundaries)``.

    >>> unet = MixtureDenoiser.from_pretrained("registry/quickstart/1")
    >>> pipeline = DDPMPipeline.from_pretrained("path/to/dense", unet=unet)

    Args:
        base: config of the dense denoiser, from which the experts' shapes follow.
        boundaries: the K - 1 inner cuts on the training timestep axis, ascending; a boundary belongs to the noisier expert.
        architectures: kept units per site, one dict per expert, cleanest first.
        in_channels, out_channels, sample_size: as the dense denoiser's; pipelines read them from the config.
        unit: what a ResBlock's unit is, ``group`` or ``channel_per_group``.
        rewrites: names of `workers.rewrites` that were applied to every expert: the same function, fewer operations.
    """

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
    ):
        super().__init__()
        if len(architectures) != len(boundaries) + 1 or list(boundaries) != sorted(set(boundaries)):
            raise InputError(f"{len(architectures)} experts need {len(architectures) - 1} ascending boundaries, not {list(boundaries)}")
        self.boundaries, self.out_channels, self.base = tuple(boundaries), out_channels, dict(base)
        dense = families.build(base)
        branches = families.family_of_config(base).sites(dense, any_width(unit))
        small = [extract(dense, branches, ArchitectureSpec(dict(spec))) for spec in architectures]
        self.experts = nn.ModuleList(apply(expert, rewrites) for expert in small)

    @classmethod
    def of(
        cls,
        base: dict[str, Any],
        boundaries: Sequence[int],
        specs: Sequence[ArchitectureSpec],
        unit: str = "group",
        rewrites: Sequence[str] = (),
    ) -> MixtureDenoiser:
        """An untrained mixture of the given architectures."""
        base = {key: value for key, value in base.items() if key != "_name_or_path"}
        shared = {key: base[key] for key in ("in_channels", "out_channels", "sample_size")}
        architectures = [dict(s.choices) for s in specs]
        return cls(base=base, boundaries=list(boundaries), architectures=architectures, unit=unit, rewrites=list(rewrites), **shared)

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

    def forward(
        self, sample: Tensor, timestep: Tensor | float, told: Tensor | None = None, return_dict: bool = True, **kwargs: Any
    ) -> UNet2DOutput | tuple[Tensor]:
        """Predicted tensor [B, C, H, W] for ``sample`` [B, C, H, W]; ``timestep`` is a number, a 0-d or a [B] tensor, floats allowed.

        Timesteps may differ within a batch: each row then goes to its own expert. ``told`` is what the base takes as its third argument
        (class labels [B], or context [B, tokens, D]); other keyword arguments go to the expert too.
        """
        if told is not None:
            kwargs[families.family_of_config(self.base).conditioning(self.base) or "class_labels"] = told
        if not isinstance(timestep, Tensor) or timestep.dim() == 0 or len(timestep) == 1:
            output = self.experts[int(self.expert_index(timestep))](sample, timestep, **kwargs).sample
        elif len(timestep) != len(sample):
            raise InputError(f"{len(timestep)} timesteps do not fit {len(sample)} samples: give one, or one for each")
        else:
            index = self.expert_index(timestep)
            output = torch.empty(len(sample), self.out_channels, *sample.shape[2:], dtype=sample.dtype, device=sample.device)
            for k, expert in enumerate(self.experts):
                rows = (index == k).nonzero().flatten()
                if len(rows):
                    mine = {name: v[rows] if isinstance(v, Tensor) and len(v) == len(sample) else v for name, v in kwargs.items()}
                    output[rows] = expert(sample[rows], timestep[rows], **mine).sample
        return UNet2DOutput(sample=output) if return_dict else (output,)
