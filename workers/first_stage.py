"""The first stage of a latent diffusion pipeline: pixels to latents and back, exactly as the denoiser was trained to see them.

Legend: B images [B, 3, H, W] in [-1, 1]; latents [B, z, h, w] with h = H / downscale. The denoiser sees latents times ``scaling_factor``.
``where`` is the first stage's own folder, as ``locate`` finds it. Torch is loaded only with the weights.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workers import pretrained
from workers.contracts import InputError
from workers.pretrained import read_json, weight_files, weight_shapes
from workers.records import Record

if TYPE_CHECKING:
    import torch
    from torch import Tensor

NAMES = ("vqvae", "vae")
KINDS = {"AutoencoderKL": "kl", "VQModel": "vq"}
DIFFUSERS_SCALE = 0.18215
SCALES = {"kl": DIFFUSERS_SCALE, "vq": 1.0}
"""The scale of a config that states none: Stable Diffusion's for KL; LDM's for VQ, whose latents are not rescaled (VQModel's own
default is wrong for every VQ model of LDM)."""
MATHS = ("float32", "tf32")
"""Arithmetic on a GPU. TF32 keeps 10 bits of a factor's mantissa. On an H200, LDM's first stages (random weights) are 4 to 6 times as
fast with it, and their latents off by at most 0.7% of their standard deviation; float32 is off by 0.002%, storing float16 by 0.16%."""
DECODE_IMAGES = 8
"""Images decoded at once: the distances of one 64 x 64 latent to 8192 codes take 128 MiB."""


@dataclass(frozen=True)
class FirstStageInfo(Record):
    """What can be known of a first stage without its weights. ``latent_channels`` are those that the denoiser sees."""

    kind: str
    in_channels: int
    latent_channels: int
    downscale: int
    scaling_factor: float
    note: str = ""
    """One line for the user where the config is in doubt; else empty."""


def locate(folder: str | Path) -> Path | None:
    """The first stage's folder in a diffusers pipeline folder; None for a pipeline in pixels.

    Raises: InputError if it is listed and missing. A pipeline without model_index.json has the first stage whose folder is there.
    """
    folder = Path(folder)
    index = folder / "model_index.json"
    listed = read_json(index) if index.is_file() else {name: name for name in NAMES if (folder / name / "config.json").is_file()}
    for name in NAMES:
        entry = listed.get(name)
        if entry and entry != [None, None]:
            if not (folder / name / "config.json").is_file():
                raise InputError(
                    f"model.path: model_index.json lists a {name}, but {folder} holds no {name}/config.json: download it whole"
                )
            return folder / name
    return None


def describe(where: str | Path) -> FirstStageInfo:
    """Read from config.json alone. Raises: InputError if the class is unknown or a value is out of range."""
    where = Path(where)
    config = read_json(where / "config.json")
    kind = KINDS.get(str(config.get("_class_name")))
    if kind is None:
        raise InputError(
            f"model.path: {where} holds a {config.get('_class_name')}: first stages of class {' and '.join(KINDS)} are supported"
        )
    for key in ("shift_factor", "latents_mean", "latents_std"):
        if config.get(key) is not None:
            raise InputError(f"model.path: {where} sets {key} {config[key]}: only latents that are scaled and not shifted are supported")
    stated = config.get("scaling_factor")
    scale = SCALES[kind] if stated is None else stated
    levels = config.get("block_out_channels", (64,))
    latent = config.get("latent_channels", 4 if kind == "kl" else 3)
    if kind == "vq" and config.get("vq_embed_dim") is not None:
        latent = config["vq_embed_dim"]
    channels = config.get("in_channels", 3)
    if channels not in (1, 3) or config.get("out_channels", 3) != channels:
        raise InputError(
            f"model.path: {where} encodes {channels} channels and decodes {config.get('out_channels', 3)}: images have 1 or 3 on both sides"
        )
    if not isinstance(scale, (int, float)) or isinstance(scale, bool) or not (isfinite(scale) and scale > 0):
        raise InputError(f"model.path: {where}/config.json states scaling_factor {scale!r}: it is a number above 0")
    if not isinstance(levels, (list, tuple)) or not levels or not isinstance(latent, int) or latent < 1:
        raise InputError(f"model.path: {where}/config.json has block_out_channels {levels!r} and {latent!r} latent channels")
    note = ""
    if kind == "vq" and stated == DIFFUSERS_SCALE:
        note = (
            f"{where}/config.json states scaling_factor {stated}, which diffusers writes whenever a VQModel is saved; the VQ models of "
            "LDM are trained with 1.0: if this is one, write 1.0 there"
        )
    return FirstStageInfo(kind, channels, latent, 2 ** (len(levels) - 1), float(scale), note)


def check(where: str | Path, sample_size: Any, in_channels: int) -> FirstStageInfo:
    """See, by headers alone, that the weights are whole and that the denoiser's input is this first stage's latent.

    ``sample_size``, ``in_channels``: the denoiser's. Raises: InputError.
    """
    where, info = Path(where), describe(where)
    if in_channels != info.latent_channels:
        raise InputError(
            f"model.path: latents of the wrong shape: {where.name} makes {info.latent_channels} x h x w, the denoiser takes {in_channels} "
            f"x {sample_size} x {sample_size}: the two are not of one pipeline"
        )
    if not isinstance(sample_size, int) or sample_size < 1:
        raise InputError(f"model.path: sample_size {sample_size} is not one number: only square latents are supported")
    _check_weights(where, info)
    return info


def digest(where: str | Path) -> str:
    """sha256 (hex) over config and weights: the first stage's identity, wherever it lies. Raises: InputError as ``describe`` does."""
    where, found = Path(where), hashlib.sha256()
    describe(where)
    config = {key: value for key, value in read_json(where / "config.json").items() if key not in ("_name_or_path", "_diffusers_version")}
    found.update(json.dumps(config, sort_keys=True).encode())
    for weights in weight_files(where):
        with weights.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


class FirstStage:
    """A frozen autoencoder in float32 and eval mode. ``info`` describes it, ``model`` is diffusers' AutoencoderKL or VQModel."""

    def __init__(self, model: Any, info: FirstStageInfo, math: str = "float32") -> None:
        assert math in MATHS, math
        self.model, self.info, self.math = model.eval().requires_grad_(False), info, math

    def to(self, device: torch.device | str) -> FirstStage:
        self.model.to(device)  # not channels_last, which is slower in float32 and in TF32
        return self

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, C, H, W] in [-1, 1] -> unscaled latents: KL [B, 2z, h, w], mean and log-variance; VQ [B, z, h, w], not quantised."""
        with _arithmetic(self.math):
            encoded = self.model.encode(pixels)
        return encoded.latent_dist.parameters if self.info.kind == "kl" else encoded.latents

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, z, h, w] in the denoiser's scale -> pixels [B, C, H, W] in [-1, 1]. VQ: a vector becomes its nearest code first."""
        import torch

        with _arithmetic(self.math):
            parts = (latents.float() / self.info.scaling_factor).split(DECODE_IMAGES)
            return torch.cat([self.model.decode(part).sample.clamp(-1, 1) for part in parts])


def load(where: str | Path, math: str = "float32") -> FirstStage:
    """The first stage on the CPU, to compute in ``math`` (one of MATHS) on a GPU.

    Raises: InputError in one line if config or weights cannot be used.
    """
    import diffusers

    where, info = Path(where), describe(where)
    _check_weights(where, info)
    kind = getattr(diffusers, next(name for name in KINDS if KINDS[name] == info.kind))
    return FirstStage(pretrained.load(kind, where), info, math)


def tiny(kind: str, seed: int = 0) -> Any:
    """A small random AutoencoderKL (``kl``, 4 channels) or VQModel (``vq``, 3 channels) of downscale 2, for tests."""
    import diffusers
    import torch

    levels = {"block_out_channels": (8, 16), "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "kl":
            model: Any = diffusers.AutoencoderKL(**levels, norm_num_groups=4, latent_channels=4, scaling_factor=0.5)
        else:
            model = diffusers.VQModel(**levels, norm_num_groups=4, latent_channels=3, num_vq_embeddings=32, scaling_factor=1.0)
            torch.nn.init.normal_(model.quantize.embedding.weight)
    return model.eval()


@contextlib.contextmanager
def _arithmetic(math: str) -> Iterator[None]:
    """No gradients, repeatable kernels, and TF32 only if it is asked for, whatever the process is set to."""
    import torch

    precision, fast = torch.get_float32_matmul_precision(), math == "tf32"
    torch.set_float32_matmul_precision("high" if fast else "highest")
    try:
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=fast):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def _check_weights(where: Path, info: FirstStageInfo) -> None:
    """See by their headers that the weight files are whole and of the config's shape. Raises: InputError."""
    config, shapes = read_json(where / "config.json"), weight_shapes(where)
    for name, expected in _expected(config, info).items():
        if shapes.get(name) != expected:
            found = shapes.get(name, "missing")
            raise InputError(f"model.path: the weights in {where} do not fit their config: {name} is {found}, the config says {expected}")


def _expected(config: Mapping[str, Any], info: FirstStageInfo) -> dict[str, list[int]]:
    """Shapes that betray another first stage's weights."""
    levels = config.get("block_out_channels", (64,))
    inner = config.get("latent_channels", info.latent_channels)
    expected = {"encoder.conv_in.weight": [levels[0], info.in_channels, 3, 3], "decoder.conv_in.weight": [levels[-1], inner, 3, 3]}
    if info.kind == "vq":
        expected["quantize.embedding.weight"] = [config.get("num_vq_embeddings", 256), info.latent_channels]
    return expected
