"""From a published version to a folder that diffusers load: its pipeline around it, weights flat in unet/, a model card, and its code."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers

from workers import conditioning, families, first_stage
from workers.code_file import code_file
from workers.contracts import InputError, MixtureManifest, RunFailed
from workers.diffusion import TRAINING_CLASSES
from workers.model_card import Exported, card, model_name

DENOISER = ("workers.mixture", "MixtureDenoiser")
GUIDED = ("workers.ldm_pipeline", "ClassConditionalLDMPipeline")
PIXELS = {"DDIMScheduler": "DDIMPipeline", "DDPMScheduler": "DDPMPipeline", "DPMSolverMultistepScheduler": "DDPMPipeline"}
"""The scheduler -> diffusers' pipeline in pixels that samples with it. DDPMPipeline scales no input, and hands every step a generator."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.msgpack", "*.h5", "*.onnx")
"""Weights that are not copied: beside safetensors they are the same once more."""
REPO = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True)
class Surroundings:
    """A pipeline around a mixture: its class, and of every part but the unet its module and class, and the folder to copy."""

    pipeline: tuple[str, str]
    parts: dict[str, tuple[str, str, Path | None]]
    scheduler: dict[str, Any]
    note: str = ""


def export(
    version: Path, manifest: MixtureManifest, reference: str, out: Path, made_by: str, with_code: bool = False, pipeline: str | None = None
) -> dict[str, Any]:
    """Write the pipeline folder ``out``, which must not exist or be empty; all of it, or nothing. ``made_by``: diffpruning's version.

    ``pipeline``: a folder or Hub id of the dense pipeline, whose class, scheduler and other parts are then taken instead of the version's.
    Returns what was written. Raises: InputError.
    """
    if not out.parent.is_dir():
        raise InputError(f"--out: no such folder: {out.parent}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out: {out} is already there: give a folder that does not exist, or an empty one")
    around = _given(version, pipeline) if pipeline is not None else _own(version)
    if around.scheduler.get("_class_name") not in TRAINING_CLASSES:
        raise InputError(f"{around.scheduler.get('_class_name')} gives noise levels, not training timesteps, so a mixture cannot follow it")
    with _whole(out) as folder:
        weights = _copy_weights(version, folder / "unet")
        index: dict[str, Any] = {"_class_name": around.pipeline[1], "_diffusers_version": diffusers.__version__, "unet": list(DENOISER)}
        codes = [(folder / "unet", DENOISER)]
        for name, (module, kind, source) in around.parts.items():
            index[name] = [module, kind]
            if source is not None:
                shutil.copytree(source, folder / name, copy_function=shutil.copyfile, ignore=shutil.ignore_patterns(*PICKLES))
            if module.startswith("workers."):
                codes.append((folder / name, (module, kind)))
        (folder / "scheduler").mkdir(exist_ok=True)
        _write_json(folder / "scheduler" / "scheduler_config.json", around.scheduler)
        if with_code:
            if around.pipeline[0].startswith("workers."):
                index["_class_name"] = [around.pipeline[0], around.pipeline[1]]
                codes.append((folder, around.pipeline))
            for where, (module, kind) in codes:
                (where / f"{module}.py").write_text(code_file(module, kind, made_by))
        _write_json(folder / "model_index.json", index)
        dense = model_name(manifest.provenance.model)
        if pipeline is not None and REPO.fullmatch(pipeline) and not Path(pipeline).exists():
            dense = pipeline
        made = Exported(
            around.pipeline[1],
            f"from {around.pipeline[0]} import {around.pipeline[1]}",
            _call(around, manifest),
            with_code,
            dense,
            weights,
        )
        (folder / "README.md").write_text(card(manifest, reference, made))
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {"out": str(out.resolve()), "pipeline": around.pipeline[1], "scheduler": around.scheduler["_class_name"], "files": files} | (
        {"note": around.note} if around.note else {}
    )


def push(folder: Path, repo: str) -> str:
    """Upload an exported folder to the Hub repository ``org/name``, which is made if there is none; returns its address.

    Raises: RunFailed, in one line, if the Hub does not take it; the folder stays.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repo, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Exported by diffpruning"))
    except Exception as error:  # the hub client raises a dozen kinds; the user needs one line
        line = " ".join(str(error).split())[:200] or type(error).__name__
        raise RunFailed(f"{repo} was not uploaded: {line}; {folder} is complete: try `hf upload {repo} {folder}`") from error


def check_repo(repo: str) -> None:
    """Raises: InputError if it is no name of a Hub repository."""
    if not REPO.fullmatch(repo) or len(repo) > 96:
        raise InputError(f"--push-to-hub: {repo!r} is no name of a repository: give OWNER/NAME")


def _own(version: Path) -> Surroundings:
    """From what a version holds: first stage, class embedder, and the sampler that it was planned for."""
    scheduler, stage, classes = families.load_scheduler_config(version), first_stage.locate(version), conditioning.describe(version)
    kind = str(scheduler.get("_class_name"))
    parts: dict[str, tuple[str, str, Path | None]] = {}
    if classes.argument == "class_labels":
        raise InputError("no pipeline of diffusers tells a UNet2DModel its class: give --pipeline, or load the version's MixtureDenoiser")
    if classes.argument is not None:
        parts[conditioning.EMBEDDER] = "workers.conditioning", "ClassEmbedder", version / conditioning.EMBEDDER
        if stage is None:
            raise InputError(f"{version} holds no first stage, without which {GUIDED[1]} cannot decode: give --pipeline")
    note = ""
    if stage is None and kind not in PIXELS:
        scheduler = {k: v for k, v in diffusers.DDIMScheduler.from_config(scheduler).config.items() if not k.startswith("_use")}
        scheduler["_class_name"], note = (
            "DDIMScheduler",
            f"diffusers have no pipeline in pixels that samples with {kind}: DDIM takes its place",
        )
    parts["scheduler"] = "diffusers", str(scheduler["_class_name"]), None
    if stage is None:
        return Surroundings(("diffusers", PIXELS[parts["scheduler"][1]]), parts, scheduler, note)
    parts["vqvae"] = "diffusers", str(families.read_json(stage / "config.json")["_class_name"]), stage
    return Surroundings(("diffusers", "LDMPipeline") if classes.argument is None else GUIDED, parts, scheduler)


def _given(version: Path, pipeline: str) -> Surroundings:
    """From the dense pipeline's folder. Raises: InputError if it is not a pipeline around this mixture's base, or lacks a part."""
    folder = families.locate(pipeline)
    index = families.read_json(folder / "model_index.json")
    base, found = families.load_config(version), families.load_config(folder)
    odd = sorted(key for key in {*base, *found} if not key.startswith("_") and base.get(key) != found.get(key))
    if odd:
        told = f"{odd[0]} is {found.get(odd[0])!r} there and {base.get(odd[0])!r} here"
        raise InputError(f"--pipeline: {pipeline} holds another denoiser than the one that was pruned: {told}")
    parts: dict[str, tuple[str, str, Path | None]] = {}
    for name, value in index.items():
        if name == "unet" or not isinstance(value, list) or len(value) != 2 or value[0] is None or name.startswith("_"):
            continue
        if not name.isidentifier() or not (folder / name).is_dir():
            raise InputError(f"--pipeline: model_index.json lists a {name}, but {folder} holds no such folder: download it whole")
        kinds = {file.suffix for file in (folder / name).iterdir()}
        if ".safetensors" not in kinds and kinds & {pattern[1:] for pattern in PICKLES}:
            raise InputError(f"--pipeline: {folder / name} holds no .safetensors weights: re-save it with safe_serialization=True")
        parts[name] = str(value[0]), str(value[1]), folder / name
    kind = index.get("_class_name")
    if "unet" not in index or not isinstance(kind, str):
        raise InputError(f"--pipeline: {folder} is of class {kind!r}, which has no unet or brings its own code: give one of diffusers' own")
    if "scheduler" not in parts:
        raise InputError(f"--pipeline: model_index.json of {folder} lists no scheduler")
    return Surroundings(GUIDED if kind == GUIDED[1] else ("diffusers", kind), parts, families.load_scheduler_config(folder))


def _copy_weights(version: Path, to: Path) -> int:
    """The mixture's config and weights, byte for byte, side by side; how many bytes of weights there are."""
    to.mkdir(parents=True)
    files = [version / "config.json", *sorted(version.glob("*.safetensors")), *sorted(version.glob("*.safetensors.index.json"))]
    for file in files:
        shutil.copyfile(file, to / file.name)
    return sum(file.stat().st_size for file in files if file.suffix == ".safetensors")


def _call(around: Surroundings, manifest: MixtureManifest) -> str:
    first = "[0, 1, 2, 3]" if around.pipeline == GUIDED else "batch_size=4"
    if around.pipeline[1] not in (GUIDED[1], "LDMPipeline", *PIXELS.values()):
        first = '"a prompt"'
    guidance = manifest.config.get("sampler", {}).get("guidance_scale", 1)
    guided = f", guidance_scale={guidance:g}" if around.pipeline == GUIDED and guidance != 1 else ""
    return f"{first}, num_inference_steps={manifest.plan.budget.steps}{guided}"


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """A folder to write to; it becomes ``out`` when the block ends well, and is gone when it does not."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir()
        yield temporary
        if out.is_dir():
            out.rmdir()
        os.rename(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
