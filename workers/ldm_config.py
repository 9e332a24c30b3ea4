"""What a CompVis latent-diffusion yaml says, in diffusers' words; what these cannot say is refused by the key that stopped it.

Defaults are those of the CompVis classes (LatentDiffusion, UNetModel, VQModelInterface, AutoencoderKL, ClassEmbedder), which take
no other keys either. Keys that only steer training or logging are read and dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from workers.contracts import InputError

GROUPS = 32  # of every GroupNorm in CompVis' networks
IMAGENET_AND_NULL = 1001
TRAINING = """ckpt_path clip_denoised cond_stage_forward cond_stage_key cond_stage_trainable first_stage_key ignore_keys l_simple_weight
    learn_logvar load_only_unet log_every_t logvar_init loss_type monitor original_elbo_weight scheduler_config use_ema v_posterior"""
FIRST_STAGE_TRAINING = """batch_resize_range ckpt_path colorize_nlabels ignore_keys image_key lossconfig lr_g_factor monitor
    sane_index_shape scheduler_config use_ema"""


@dataclass(frozen=True)
class Part:
    """One model of the pipeline: its folder, its diffusers class and config, and the prefix of its keys in the checkpoint."""

    folder: str
    class_name: str
    config: dict[str, Any]
    prefix: str


@dataclass(frozen=True)
class LatentDiffusion:
    """What the yaml describes. A part that it does not mention is None."""

    unet: Part
    split_qkv_first: bool
    """Whether fused attention weights are (3, heads, head_dim) instead of (heads, 3, head_dim)."""
    first_stage: Part | None
    class_embedder: Part | None
    scheduler: dict[str, Any]
    scale_by_std: bool
    scale_factor: float | None

    @property
    def conditional(self) -> bool:
        return "cross_attention_dim" in self.unet.config


_REQUIRED: Any = object()


class Section:
    """A mapping of the yaml that remembers which keys were read, so that none is overlooked."""

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, dict):
            raise InputError(f"{where}: {_short(values)} is not a mapping of keys")
        self.values, self.where = values, where
        self.unread = {str(key) for key, value in values.items() if value is not None}

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def refuse(self, key: str, why: str) -> NoReturn:
        raise InputError(f"{self.where}.{key}: {_short(self.values.get(key))} {why}")

    def read(self, key: str, kind: Callable[[Any], Any], default: Any = _REQUIRED) -> Any:
        """Raises: InputError if the value is not of the kind, or missing without a default."""
        self.unread.discard(key)
        if self.values.get(key) is None:
            if default is _REQUIRED:
                raise InputError(f"{self.where}.{key} is missing")
            return default
        try:
            return kind(self.values[key])
        except (TypeError, ValueError, OverflowError):
            self.refuse(key, f"is not {kind.__doc__}")

    def only(self, key: str, allowed: Any, why: str) -> None:
        """Refuse every value but the one that diffusers can express, which is also the default."""
        self.unread.discard(key)
        if self.values.get(key, allowed) != allowed:
            self.refuse(key, why)

    def drop(self, *keys: str) -> None:
        self.unread.difference_update(keys)

    def target(self) -> str:
        """The class that the section instantiates, without its module."""
        return self.read("target", text).rpartition(".")[2]

    def inner(self, key: str) -> Section:
        self.unread.discard(key)
        if key not in self.values:
            raise InputError(f"{self.where}.{key} is missing")
        return Section(self.values[key], f"{self.where}.{key}")

    def close(self) -> None:
        for key in sorted(self.unread):
            self.refuse(key, "is not known here")


def _short(value: Any) -> str:
    shown = " ".join(repr(value).split())
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def whole(value: Any) -> int:
    """a positive whole number"""
    if isinstance(value, bool) or int(value) != value or value < 1:
        raise ValueError
    return int(value)


def wholes(value: Any) -> list[int]:
    """a list of positive whole numbers"""
    if not isinstance(value, list):
        raise TypeError
    return [whole(item) for item in value]


def whole_or_none(value: Any) -> int | None:
    """a positive whole number, or -1 for none"""
    return None if value == -1 else whole(value)


def number(value: Any) -> float:
    """a number"""
    if isinstance(value, bool):
        raise TypeError
    return float(value)


def flag(value: Any) -> bool:
    """true or false"""
    if not isinstance(value, bool):
        raise TypeError
    return value


def text(value: Any) -> str:
    """a text"""
    if not isinstance(value, str):
        raise TypeError
    return value


def read_config(path: Path) -> LatentDiffusion:
    """Raises: InputError if the file is no yaml, or for the first key that stops the conversion."""
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"--config: {path} cannot be read: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(values, dict) or "model" not in values:
        raise InputError(f"--config: {path} has no key `model`: it is not the yaml of a latent diffusion model")
    return _latent_diffusion(Section(values["model"], f"{path.name}: model"))


def _latent_diffusion(model: Section) -> LatentDiffusion:
    if model.target() != "LatentDiffusion":
        model.refuse("target", "is not LatentDiffusion")
    params = model.inner("params")
    params.drop(*TRAINING.split())
    scheduler = _scheduler(params)
    unet, split_qkv_first = _unet(params, params.inner("unet_config"))
    if params.read("channels", whole, unet.config["in_channels"]) != unet.config["in_channels"]:
        params.refuse("channels", f"is not the {unet.config['in_channels']} of unet_config.params.in_channels")
    first_stage = _first_stage(params.inner("first_stage_config")) if "first_stage_config" in params else None
    params.drop("first_stage_config")
    if first_stage is not None:
        latent = first_stage.config.get("vq_embed_dim", first_stage.config["latent_channels"])
        if latent != unet.config["in_channels"]:
            params.refuse("first_stage_config", f"has latents of {latent} channels; the U-Net takes {unet.config['in_channels']}")
    class_embedder = _class_embedder(params, unet.config.get("cross_attention_dim"))
    scale_by_std, scale_factor = params.read("scale_by_std", flag, False), params.read("scale_factor", number, None)
    params.close()
    return LatentDiffusion(unet, split_qkv_first, first_stage, class_embedder, scheduler, scale_by_std, scale_factor)


# --- scheduler ------------------------------------------------------------------------------------------------------


def _scheduler(params: Section) -> dict[str, Any]:
    """The DDIMScheduler that walks CompVis' timesteps. What CompVis calls linear is linear in the square roots."""
    schedules = {"linear": "scaled_linear", "sqrt_linear": "linear", "cosine": "squaredcos_cap_v2"}
    schedule = params.read("beta_schedule", text, "linear")
    if schedule not in schedules:
        params.refuse("beta_schedule", f"cannot be expressed; possible are {', '.join(schedules)}")
    if params.read("cosine_s", number, 8e-3) != 8e-3 and schedule == "cosine":
        params.refuse("cosine_s", "cannot be expressed: diffusers' cosine has 0.008")
    params.only("given_betas", None, "cannot be expressed: give linear_start, linear_end and beta_schedule")
    params.only("use_positional_encodings", False, "cannot be expressed")
    params.only("num_timesteps_cond", 1, "cannot be expressed: the conditioning is never noised")
    start, end = params.read("linear_start", number, 1e-4), params.read("linear_end", number, 2e-2)
    if not 0 < start <= end < 1:
        params.refuse("linear_end", f"is no last beta for a first of {start:g}: expected 0 < linear_start <= linear_end < 1")
    predictions = {"eps": "epsilon", "x0": "sample"}
    prediction = params.read("parameterization", text, "eps")
    if prediction not in predictions:
        params.refuse("parameterization", f"is not one of {', '.join(predictions)}")
    return {
        "num_train_timesteps": params.read("timesteps", whole, 1000),
        "beta_start": start,
        "beta_end": end,
        "beta_schedule": schedules[schedule],
        "prediction_type": predictions[prediction],
        "steps_offset": 1,
        "set_alpha_to_one": False,
        "clip_sample": False,
    }


# --- U-Net ----------------------------------------------------------------------------------------------------------


def _unet(model: Section, section: Section) -> tuple[Part, bool]:
    """The U-Net, and whether its fused attention weights are split into q, k, v before heads."""
    if section.target() != "UNetModel":
        section.refuse("target", "is not UNetModel")
    params = section.inner("params")
    section.close()
    params.drop("use_checkpoint", "use_fp16")
    params.only("dims", 2, "cannot be expressed: only images are")
    params.only("num_classes", None, "cannot be expressed: the class must come by cross-attention")
    params.only("n_embed", None, "cannot be expressed: the U-Net must predict latents, not codes")
    base, mult = params.read("model_channels", whole), params.read("channel_mult", wholes, [1, 2, 4, 8])
    if base % GROUPS:
        params.refuse("model_channels", f"is no multiple of the {GROUPS} groups of its normalisations")
    if mult[:1] != [1]:
        params.refuse("channel_mult", "cannot be expressed: the first level must have 1")
    widths = [base * m for m in mult]
    factors = params.read("attention_resolutions", wholes)
    attended = [2**level in factors for level in range(len(mult))]
    resnets, shift = params.read("resblock_updown", flag, False), params.read("use_scale_shift_norm", flag, False)
    if not params.read("conv_resample", flag, True) and not resnets and len(mult) > 1:
        params.refuse("conv_resample", "cannot be expressed: levels must be joined by convolutions or by resblock_updown")
    config: dict[str, Any] = {
        "sample_size": model.read("image_size", whole, params.read("image_size", whole)),
        "in_channels": params.read("in_channels", whole),
        "out_channels": params.read("out_channels", whole),
        "block_out_channels": widths,
        "layers_per_block": params.read("num_res_blocks", whole),
        "dropout": params.read("dropout", number, 0.0),
        "resnet_time_scale_shift": "scale_shift" if shift else "default",
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "downsample_padding": 1,
        "norm_num_groups": GROUPS,
        "norm_eps": 1e-5,
    }
    transformers = params.read("use_spatial_transformer", flag, False)
    heads = _heads(params, widths, attended, transformers)
    split_qkv_first = params.read("use_new_attention_order", flag, False)
    if transformers:
        class_name, down, up = "UNet2DConditionModel", "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
        if resnets:
            params.refuse("resblock_updown", "cannot be expressed together with use_spatial_transformer")
        config |= {
            "cross_attention_dim": params.read("context_dim", whole),
            "transformer_layers_per_block": params.read("transformer_depth", whole, 1),
            "attention_head_dim": heads[-1] if {*heads} <= {heads[-1], 0} else [h or 1 for h in heads],  # a number of heads, in truth
        }
    else:
        down, up = "AttnDownBlock2D", "AttnUpBlock2D"
        params.drop("transformer_depth")
        params.only("context_dim", None, "cannot be expressed without use_spatial_transformer")
        resample = "resnet" if resnets else "conv"
        config |= {"downsample_type": resample, "upsample_type": resample, "attn_norm_num_groups": GROUPS if shift else None}
        class_name, said = _say_heads([(width, h) for width, h in zip(widths, heads, strict=True) if h])
        config |= said
    params.close()
    plain_down, plain_up = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if resnets else ("DownBlock2D", "UpBlock2D")
    config["down_block_types"] = [down if here else plain_down for here in attended]
    config["up_block_types"] = [up if here else plain_up for here in reversed(attended)]
    return Part("unet", class_name, config, "model.diffusion_model."), split_qkv_first


def _heads(params: Section, widths: list[int], attended: list[bool], transformers: bool) -> list[int]:
    """Heads at each level, 0 where there is no attention; the middle attends like the last level. A given head dim wins over a number."""
    number_of, head_dim = params.read("num_heads", whole_or_none, None), params.read("num_head_channels", whole_or_none, None)
    upward, legacy = params.read("num_heads_upsample", whole_or_none, None), params.read("legacy", flag, True)
    if number_of is None and head_dim is None:
        params.refuse("num_heads", "is no number of heads, and num_head_channels gives none either")
    used = [*attended[:-1], True]
    attended_widths = [width for width, here in zip(widths, used, strict=True) if here]
    if any(width % (head_dim or number_of) for width in attended_widths):
        params.refuse("num_head_channels" if head_dim else "num_heads", f"does not divide the widths with attention, {attended_widths}")
    heeded = legacy and not head_dim and not transformers and any(attended)  # elsewhere CompVis overlooks num_heads_upsample
    if heeded and upward not in (None, number_of):
        params.refuse("num_heads_upsample", f"cannot be expressed: it is not num_heads, {number_of}")
    return [(width // head_dim if head_dim else number_of) if here else 0 for width, here in zip(widths, used, strict=True)]


def _say_heads(attentions: list[tuple[int, int]]) -> tuple[str, dict[str, Any]]:
    """The class and the config that give attentions of (width, heads) their heads: by one head dim, as one head each, or by number."""
    head_dims, heads = {width // h for width, h in attentions}, attentions[0][1]
    if len(head_dims) == 1:
        return "UNet2DModel", {"attention_head_dim": head_dims.pop()}
    if heads == 1:
        return "UNet2DModel", {"attention_head_dim": None}
    return "UNet2DModelWithHeads", {"num_attention_heads": heads}


# --- first stage and class embedder ---------------------------------------------------------------------------------


def _first_stage(section: Section) -> Part:
    kind = section.target()
    if kind not in ("VQModelInterface", "AutoencoderKL"):
        section.refuse("target", "cannot be expressed: VQModelInterface and AutoencoderKL are")
    params = section.inner("params")
    section.close()
    params.drop(*FIRST_STAGE_TRAINING.split())
    embed_dim, layers = params.read("embed_dim", whole), params.inner("ddconfig")
    z_channels, double_z = layers.read("z_channels", whole), layers.read("double_z", flag, True)
    width, mult = layers.read("ch", whole), layers.read("ch_mult", wholes, [1, 2, 4, 8])
    resolution, attended = layers.read("resolution", whole), layers.read("attn_resolutions", wholes)
    if width % GROUPS:
        layers.refuse("ch", f"is no multiple of the {GROUPS} groups of its normalisations")
    if not mult or resolution % 2 ** (len(mult) - 1):
        layers.refuse("ch_mult", f"does not halve the resolution {resolution} once a level")
    layers.drop("dropout")  # of training; diffusers' autoencoders have none
    layers.only("resamp_with_conv", True, "cannot be expressed: levels must be joined by convolutions")
    layers.only("use_linear_attn", False, "cannot be expressed")
    layers.only("attn_type", "vanilla", "cannot be expressed: only vanilla is")
    layers.only("give_pre_end", False, "cannot be expressed")
    layers.only("tanh_out", False, "cannot be expressed")
    here = [resolution // 2**level in attended for level in range(len(mult))]
    config: dict[str, Any] = {
        "in_channels": layers.read("in_channels", whole),
        "out_channels": layers.read("out_ch", whole),
        "block_out_channels": [width * m for m in mult],
        "layers_per_block": layers.read("num_res_blocks", whole),
        "latent_channels": z_channels,
        "norm_num_groups": GROUPS,
        "sample_size": resolution,
        "down_block_types": ["AttnDownEncoderBlock2D" if attends else "DownEncoderBlock2D" for attends in here],
        "up_block_types": ["AttnUpDecoderBlock2D" if attends else "UpDecoderBlock2D" for attends in reversed(here)],
    }
    if kind == "VQModelInterface":
        class_name = "VQModel"
        params.only("remap", None, "cannot be expressed: the codes must be used as they are")
        if double_z:
            layers.refuse("double_z", "(the default is true) does not fit a VQModelInterface: it must be false")
        config |= {"vq_embed_dim": embed_dim, "num_vq_embeddings": params.read("n_embed", whole)}
    else:
        class_name = "AutoencoderKL"
        if not double_z:
            layers.refuse("double_z", "does not fit an AutoencoderKL: it must be true")
        if embed_dim != z_channels:
            params.refuse("embed_dim", f"cannot be expressed: it is not the {z_channels} of ddconfig.z_channels")
    layers.close()
    params.close()
    return Part("vqvae", class_name, config, "first_stage_model.")


def _class_embedder(params: Section, context_dim: int | None) -> Part | None:
    """None for an unconditional model, and where the yaml leaves it out."""
    key, concat = params.read("conditioning_key", text, None), params.read("concat_mode", flag, True)
    stage = params.values.get("cond_stage_config")
    params.drop("cond_stage_config")
    if key not in (None, "crossattn"):
        params.refuse("conditioning_key", "cannot be expressed: only crossattn is")
    if stage is None:
        return None
    if stage == "__is_unconditional__":
        if context_dim is not None:
            params.refuse("cond_stage_config", f"gives no context to a U-Net that has context_dim {context_dim}")
        return None
    if key is None and concat:
        params.refuse("conditioning_key", "stands for concat, which cannot be expressed: only crossattn is")
    section = params.inner("cond_stage_config")
    if section.target() != "ClassEmbedder":
        section.refuse("target", "cannot be expressed: only ClassEmbedder is")
    if context_dim is None:
        params.refuse("cond_stage_config", "needs a U-Net that has use_spatial_transformer")
    inner = section.inner("params")
    section.close()
    inner.drop("key")
    config: dict[str, Any] = {"num_classes": inner.read("n_classes", whole, 1000), "embed_dim": inner.read("embed_dim", whole)}
    if config["embed_dim"] != context_dim:
        inner.refuse("embed_dim", f"is not the {context_dim} of unet_config.params.context_dim")
    config["null_class"] = _null_class(inner, config["num_classes"])
    inner.close()
    return Part("class_embedder", "ClassEmbedder", config, "cond_stage_model.")


def _null_class(params: Section, num_classes: int) -> int | None:
    """The class that stands for no class: the last one, or None.

    CompVis' later ClassEmbedder says how often training replaced a class by the last one (``ucg_rate``), the one that cin256-v2 was
    trained with does not. Without that key, the last of 1001 classes counts as the null class, and any other number as real classes.
    """
    said = params.read("ucg_rate", number, None)
    if said is not None and not 0 <= said <= 1:
        params.refuse("ucg_rate", "is no share of the training images: expected 0 to 1")
    if said and num_classes == 1:
        params.refuse("ucg_rate", "needs a null class after the real ones, but n_classes is 1")
    return num_classes - 1 if said or (said is None and num_classes == IMAGENET_AND_NULL) else None
