"""What pipelines ask of a denoiser besides its forward pass: done by every expert of a mixture, or refused in a sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from workers.contracts import InputError


def _refusal(name: str, feature: str) -> Callable[..., None]:
    """A method that says why a mixture cannot take what was trained for the layers of the dense denoiser."""

    def refuse(self: Any, *_: Any, **__: Any) -> None:
        raise InputError(
            f"{name}: {feature} is made for the layers of the dense denoiser, which the experts of a mixture hold narrower or not at "
            "all: fuse it into the dense denoiser before pruning"
        )

    return refuse


class Delegation(nn.Module):
    """Asks every expert. Experts share the dense denoiser's blocks and residual stream, so what works on those works on each."""

    experts: Any
    config: Any

    def _ask(self, name: str, *args: Any, **kwargs: Any) -> None:
        """Call a method of every expert. Raises: InputError if they have none of that name."""
        missing = [type(expert).__name__ for expert in self.experts if not hasattr(expert, name)]
        if missing:
            raise InputError(f"{name}: a {missing[0]} cannot do that, so a mixture of them cannot either")
        for expert in self.experts:
            getattr(expert, name)(*args, **kwargs)

    def _needs_plain_attention(self, name: str) -> None:
        """Raises: InputError if rewrites have changed the attention layers that ``name`` would work on."""
        changed = [rewrite for rewrite in dict(self.config)["rewrites"] if rewrite != "transpose_upsample"]
        if changed:
            raise InputError(
                f"{name}: the attention layers of this mixture were rewritten by {', '.join(changed)}, which already made them cheaper: "
                "go without it, or publish the mixture with export.rewrites=[]"
            )

    def enable_freeu(self, s1: float, s2: float, b1: float, b2: float) -> None:
        self._ask("enable_freeu", s1, s2, b1, b2)

    def disable_freeu(self) -> None:
        self._ask("disable_freeu")

    def fuse_qkv_projections(self) -> None:
        self._needs_plain_attention("fuse_qkv_projections")
        self._ask("fuse_qkv_projections")

    def unfuse_qkv_projections(self) -> None:
        self._ask("unfuse_qkv_projections")

    def set_attention_slice(self, slice_size: Any = "auto") -> None:
        self._needs_plain_attention("set_attention_slice")
        self._ask("set_attention_slice", slice_size)

    def set_default_attn_processor(self) -> None:
        self._needs_plain_attention("set_default_attn_processor")
        self._ask("set_default_attn_processor")

    @property
    def attn_processors(self) -> dict[str, Any]:
        """Of every attention layer of every expert, under the layer's name with ``experts.K.`` before it."""
        layers = ((name, module) for name, module in self.named_modules() if hasattr(module, "get_processor"))
        return {f"{name}.processor": module.get_processor() for name, module in layers}

    def set_attn_processor(self, processor: Any) -> None:
        """One for all attention layers, or a dict like ``attn_processors``. Raises: InputError for other names, or rewritten layers."""
        now = self.attn_processors
        wanted = processor if isinstance(processor, dict) else dict.fromkeys(now, processor)
        odd = sorted(set(wanted) ^ set(now))
        if odd:
            raise InputError(f"set_attn_processor: {odd[0]} is in only one of the dict given and attn_processors: give one for each layer")
        if any(type(wanted[name]) is not type(found) for name, found in now.items()):
            self._needs_plain_attention("set_attn_processor")
        for name, module in self.named_modules():
            if f"{name}.processor" in wanted:
                module.set_processor(wanted[f"{name}.processor"])

    @property
    def add_embedding(self) -> Any:
        """Where the experts have one (SDXL): pipelines read its width, which is the same in all of them."""
        return self.experts[0].add_embedding

    load_lora_adapter = _refusal("load_lora_adapter", "a LoRA")
    add_adapter = _refusal("add_adapter", "a LoRA")
    set_adapters = _refusal("set_adapters", "a LoRA")
    fuse_lora = _refusal("fuse_lora", "a LoRA")
    load_attn_procs = _refusal("load_attn_procs", "a LoRA")
    _load_ip_adapter_weights = _refusal("load_ip_adapter", "an IP-Adapter")
