"""How a CompVis latent-diffusion checkpoint and its yaml become a diffusers pipeline folder.

Everything is read and checked before anything is written: the yaml says which models there are, every weight of theirs must have
its source in the checkpoint, and every key of the checkpoint must be a source or known not to matter. A pickled checkpoint is read
by torch's weights-only reader; what else it names, and therefore wants to run, is refused.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import re
import shutil
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel, UNet2DModel, VQModel
from torch import Tensor

from workers import ldm_config, ldm_layout
from workers.conditioning import ClassEmbedder
from workers.contracts import InputError
from workers.families.unet2d import UNet2DModelWithHeads
from workers.ldm_config import LatentDiffusion, Part
from workers.ldm_layout import Source

CLASSES: dict[str, Any] = {
    found.__name__: found for found in (UNet2DModel, UNet2DModelWithHeads, UNet2DConditionModel, VQModel, AutoencoderKL, ClassEmbedder)
}
BUFFERS = re.compile(
    r"betas|(log_one_minus_|sqrt_|sqrt_one_minus_|sqrt_recip_|sqrt_recipm1_)?alphas_cumprod(_prev)?"
    r"|posterior_(variance|log_variance_clipped|mean_coef1|mean_coef2)|lvlb_weights|logvar|scale_factor"
)
NO_WEIGHT = re.compile(rf"({BUFFERS.pattern})|model_ema\.(decay|num_updates)|first_stage_model\.((loss|model_ema)\..*|colorize)")
NAMED = 3  # keys named in an error


class Placeholder:
    """What training left in a checkpoint beside its tensors: read as nothing, never looked at."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


PLACEHOLDERS = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
)


@dataclass(frozen=True)
class Prepared:
    """A model without weights, and where each of them comes from (with the prefix of the part)."""

    part: Part
    model: Any
    sources: dict[str, Source]


def convert(checkpoint: str | Path, config: str | Path, out: str | Path, ema: bool = True) -> dict[str, Any]:
    """Write the pipeline folder ``out``, which appears whole or not at all, and tell what is in it.

    The U-Net gets the averaged (EMA) weights if the checkpoint has any and ``ema`` is true.
    Raises: InputError if the checkpoint, the yaml or ``out`` cannot be used; nothing is written then.
    """
    checkpoint, config, out = Path(checkpoint).expanduser(), Path(config).expanduser(), Path(os.path.abspath(Path(out).expanduser()))
    _check_out(out)
    _check_file(checkpoint, "CKPT")
    _check_file(config, "--config")
    plan = ldm_config.read_config(config)
    weights = _read(checkpoint)
    averaged = ema and any(key.startswith("model_ema.") and not NO_WEIGHT.fullmatch(key) for key in weights)
    parts = [_prepare(part, plan) for part in (plan.unet, plan.first_stage, plan.class_embedder) if part is not None]
    _check_keys(weights, parts, averaged, f"{checkpoint.name} does not fit {config.name}")
    scheduler: Any = DDIMScheduler(**plan.scheduler)
    _check_betas(weights, scheduler, f"{checkpoint.name} does not fit {config.name}")
    if averaged:
        parts[0] = replace(parts[0], sources={k: replace(s, key=ldm_layout.ema_key(s.key)) for k, s in parts[0].sources.items()})
    _check_finite(weights, parts, checkpoint)
    scaling = _scaling(weights, plan, f"{checkpoint.name}: scale_factor")
    about = _about(checkpoint, config, plan, parts, averaged, scaling)
    _write(out, weights, parts, scheduler, scaling, about)
    return {"out": str(out), **about}


# --- reading --------------------------------------------------------------------------------------------------------


def _check_out(out: Path) -> None:
    if out.is_dir():
        if any(out.iterdir()):
            raise InputError(f"--out: {out} is not empty: give a new folder")
    elif out.exists() or out.is_symlink():
        raise InputError(f"--out: {out} is a file: give a new folder")


def _check_file(path: Path, argument: str) -> None:
    if not path.exists():
        raise InputError(f"{argument}: no such file: {path}")
    if not path.is_file():
        raise InputError(f"{argument}: {path} is not a file")


def _read(path: Path) -> dict[str, Tensor]:
    """The checkpoint's tensors, by their keys. Raises: InputError if it holds anything that would have to be run."""
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([(Placeholder, name) for name in PLACEHOLDERS]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a truncated file alone has half a dozen kinds
        named = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if named is not None:
            raise InputError(
                f"CKPT: {path} holds pickled code ({named.group(1)}), which was not run: give a file that holds tensors only"
            ) from None
        raise InputError(f"CKPT: {path} cannot be read: it is damaged, or no checkpoint ({_reason(error)})") from None
    found = found.get("state_dict", found) if isinstance(found, dict) else None
    if not isinstance(found, dict) or not found:
        raise InputError(f"CKPT: {path} holds no state_dict")
    odd = [str(key) for key, value in found.items() if not isinstance(value, Tensor)]
    if odd:
        raise InputError(f"CKPT: {path} holds no state_dict of tensors alone: {_some(odd)}")
    return {str(key): value for key, value in found.items()}


def _reason(error: Exception) -> str:
    """Torch explains at length, and invites to run the file: its first words and ours suffice."""
    if isinstance(error, pickle.UnpicklingError):
        return "not written by torch.save"
    return " ".join(str(error).split())[:120] or type(error).__name__


# --- what comes from where ------------------------------------------------------------------------------------------


def _prepare(part: Part, plan: LatentDiffusion) -> Prepared:
    with torch.device("meta"):
        model = CLASSES[part.class_name](**part.config).eval()
    if part.folder == "unet":
        sources = ldm_layout.unet_sources(model, plan.split_qkv_first)
    elif part.folder == "vqvae":
        sources = ldm_layout.first_stage_sources(model)
    else:
        sources = ldm_layout.same_sources(model)
    return Prepared(part, model, {key: replace(source, key=part.prefix + source.key) for key, source in sources.items()})


def _check_keys(weights: dict[str, Tensor], parts: Sequence[Prepared], averaged: bool, what: str) -> None:
    """Raises: InputError if a weight has no source or one of another shape, or if nobody knows a key of the checkpoint."""
    plain = {part.part.folder: [source.key for source in part.sources.values()] for part in parts}
    averages = [ldm_layout.ema_key(key) for key in plain["unet"]]
    needed = {key for keys in plain.values() for key in keys}
    if averaged:
        needed |= set(averages)
        if not any(key in weights for key in plain["unet"]):  # a copy that was stripped to its averages
            needed -= set(plain["unet"])
    missing = sorted(needed - weights.keys())
    extra = sorted(key for key in weights.keys() - needed - set(averages) if not NO_WEIGHT.fullmatch(key))
    odd = sorted({_told(key, weights[key], shape) for source, key, shape in _uses(parts, averaged) if _unfit(weights, source, key, shape)})
    found = [f"{len(keys)} {word} ({_some(keys)})" for keys, word in _counted(missing, extra, odd) if keys]
    if found:
        raise InputError(f"CKPT: {what}: {'; '.join(found)}")


def _counted(missing: list[str], extra: list[str], odd: list[str]) -> list[tuple[list[str], str]]:
    def keys(found: list[str]) -> str:
        return "key" if len(found) == 1 else "keys"

    return [(missing, f"missing {keys(missing)}"), (extra, f"unexpected {keys(extra)}"), (odd, f"{keys(odd)} of another kind")]


def _uses(parts: Sequence[Prepared], averaged: bool) -> Iterator[tuple[Source, str, Sequence[int]]]:
    """(source, key in the checkpoint, shape of the weight); a U-Net weight twice if there are averages."""
    for part in parts:
        state = part.model.state_dict()
        for name, source in part.sources.items():
            yield source, source.key, state[name].shape
            if averaged and part.part.folder == "unet":
                yield source, ldm_layout.ema_key(source.key), state[name].shape


def _unfit(weights: dict[str, Tensor], source: Source, key: str, shape: Sequence[int]) -> bool:
    return key in weights and not (_is_dense(weights[key]) and source.fits(weights[key], shape))


def _is_dense(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.layout == torch.strided and not tensor.is_meta


def _told(key: str, tensor: Tensor, shape: Sequence[int]) -> str:
    return f"{key}: {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} for {list(shape)}"


def _some(keys: Sequence[str]) -> str:
    return ", ".join(keys[:NAMED]) + (", ..." if len(keys) > NAMED else "")


def _check_betas(weights: dict[str, Tensor], scheduler: Any, what: str) -> None:
    """Raises: InputError if the checkpoint was trained with another noise schedule than the yaml's."""
    betas = weights.get("betas")
    if betas is None or not _is_dense(betas) or betas.dim() != 1:
        return
    if not bool(((betas > 0) & (betas < 1)).all() and (betas.diff() >= 0).all()):
        return  # not a schedule at all: sampling never reads it
    if betas.shape != scheduler.betas.shape:
        raise InputError(f"CKPT: {what}: it has {len(betas)} betas for {len(scheduler.betas)} timesteps")
    if not torch.allclose(betas.float(), scheduler.betas, rtol=1e-3):
        raise InputError(
            f"CKPT: {what}: its betas run from {betas[0]:.4g} to {betas[-1]:.4g}, "
            f"those of the yaml from {scheduler.betas[0]:.4g} to {scheduler.betas[-1]:.4g}"
        )


def _check_finite(weights: dict[str, Tensor], parts: Sequence[Prepared], checkpoint: Path) -> None:
    keys = sorted({source.key for part in parts for source in part.sources.values()})
    bad = [key for key in keys if not bool(weights[key].isfinite().all())]
    if bad:
        raise InputError(f"CKPT: {checkpoint}: {len(bad)} of {len(keys)} tensors hold NaN or infinity ({_some(bad)})")


def _scaling(weights: dict[str, Tensor], plan: LatentDiffusion, what: str) -> float | None:
    """What latents are multiplied by before the U-Net sees them; None without a first stage."""
    if plan.first_stage is None:
        return None
    buffer = weights.get("scale_factor") if plan.scale_by_std or plan.first_stage.class_name == "AutoencoderKL" else None
    if buffer is not None and not (_is_dense(buffer) and buffer.numel() == 1):
        raise InputError(f"CKPT: {what} is no number, but {str(buffer.dtype).removeprefix('torch.')} {list(buffer.shape)}")
    if buffer is None and plan.scale_factor is None and plan.scale_by_std:
        raise InputError(f"CKPT: {what} is missing, and the yaml says scale_by_std: add the value as model.params.scale_factor")
    scaling = float(buffer) if buffer is not None else plan.scale_factor if plan.scale_factor is not None else 1.0
    if not 0 < scaling < float("inf"):
        raise InputError(f"CKPT: {what} is {scaling}: expected a positive number")
    return scaling


# --- writing --------------------------------------------------------------------------------------------------------


def _about(
    checkpoint: Path, config: Path, plan: LatentDiffusion, parts: Sequence[Prepared], averaged: bool, scaling: float | None
) -> dict[str, Any]:
    """What was made from what, for the user and for the folder's README."""
    written: dict[str, Any] = {
        part.part.folder: {
            "class": part.part.class_name,
            "parameters": sum(parameter.numel() for parameter in part.model.parameters()),
        }
        for part in parts
    }
    written["unet"]["weights"] = "ema" if averaged else "plain"
    if plan.class_embedder is not None:
        written["class_embedder"]["null_class"] = plan.class_embedder.config["null_class"]
    if scaling is not None:
        written["vqvae"]["scaling_factor"] = scaling
    written["scheduler"] = {"class": "DDIMScheduler", **{k: plan.scheduler[k] for k in ("beta_schedule", "beta_start", "beta_end")}}
    left_out = []
    if plan.first_stage is None:
        left_out.append("vqvae")
    if plan.conditional and plan.class_embedder is None:
        left_out.append("class_embedder")
    return {
        "pipeline": "ClassConditionalLDMPipeline" if plan.conditional else "LDMPipeline",
        "written": written,
        "left_out": {name: f"neither {config.name} nor {checkpoint.name} has one" for name in left_out},
        "made_from": [{"file": path.name, "sha256": _sha256(path)} for path in (checkpoint, config)],
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(
    out: Path,
    weights: dict[str, Tensor],
    parts: Sequence[Prepared],
    scheduler: Any,
    scaling: float | None,
    about: dict[str, Any],
) -> None:
    beside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        beside.mkdir(parents=True)
        for part in parts:
            shapes = {name: weight.shape for name, weight in part.model.state_dict().items()}
            taken = {name: source.take(weights[source.key], shapes[name]) for name, source in part.sources.items()}
            part.model.load_state_dict(taken, assign=True)
            if part.part.folder == "vqvae":
                part.model.register_to_config(scaling_factor=scaling)
            part.model.save_pretrained(beside / part.part.folder)
            part.model.to("meta")
        scheduler.save_pretrained(beside / "scheduler")
        (beside / "model_index.json").write_text(json.dumps(_index(parts, about), indent=2) + "\n")
        (beside / "README.md").write_text(_readme(about))
        beside.replace(out)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.ENAMETOOLONG):
            raise
        raise InputError(f"--out: {out} cannot be made: {error.strerror}") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _index(parts: Sequence[Prepared], about: dict[str, Any]) -> dict[str, Any]:
    entries: dict[str, Any] = {name: [None, None] for name in about["left_out"]}
    for part in parts:
        library = type(part.model).__module__
        entries[part.part.folder] = ["diffusers" if library.startswith("diffusers.") else library, part.part.class_name]
    entries["scheduler"] = ["diffusers", "DDIMScheduler"]
    return {"_class_name": about["pipeline"], "_diffusers_version": diffusers.__version__, **dict(sorted(entries.items()))}


def _readme(about: dict[str, Any]) -> str:
    lines = [
        "---",
        "library_name: diffusers",
        "---",
        "",
        "# Latent diffusion",
        "",
        "Converted from a CompVis checkpoint by diffpruning:",
        "",
    ]
    lines += [f"- `{made['file']}`, sha256 `{made['sha256']}`" for made in about["made_from"]]
    lines += ["", "| part | what |", "|---|---|"]
    for name, facts in about["written"].items():
        lines.append(f"| `{name}` | {', '.join(str(v) if k == 'class' else f'{k} {v}' for k, v in facts.items())} |")
    lines += [f"| `{name}` | left out: {why} |" for name, why in about["left_out"].items()]
    lines += ["", "```python", *_example(about), "```", ""]
    return "\n".join(lines)


def _example(about: dict[str, Any]) -> list[str]:
    pipeline = about["pipeline"]
    library, arguments = ("diffusers", "") if pipeline == "LDMPipeline" else ("workers.ldm_pipeline", "class_labels=[0, 1]")
    if about["left_out"]:
        return ["from workers.families import load_denoiser", "", 'unet = load_denoiser("this folder")']
    return [
        *sorted([f"from {library} import {pipeline}", "from workers.families import load_denoiser"]),
        "",
        'unet = load_denoiser("this folder")',
        f'pipeline = {pipeline}.from_pretrained("this folder", unet=unet)',
        f"images = pipeline({arguments}).images",
    ]
