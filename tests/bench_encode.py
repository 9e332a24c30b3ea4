"""Prints latents/s of a first stage by batch size, and images/s that training reads from the latent cache beside encoding on the fly.

    .venv/bin/python tests/bench_encode.py FOLDER [device=cuda] [math=tf32] [model=PIPELINE] [kind=vq|kl] [data=IMAGES] [items=512]
        [batch=16]

Images and cache go to FOLDER, which must be new. Without ``model`` the first stage has random weights, which cost the same: on cuda
LDM's VQ-f4 or KL-f8 at full size (256 pixels), on the CPU, on one core, a tiny one (32 pixels). Without ``data``, ``items`` random JPEG
images are written.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from orchestrator import encode
from workers import data, first_stage, latents, samples
from workers.contracts import ImageTask
from workers.diffusion import generator

VQ_F4: dict[str, Any] = {"block_out_channels": (128, 256, 512), "latent_channels": 3, "num_vq_embeddings": 8192, "scaling_factor": 1.0}
KL_F8: dict[str, Any] = {"block_out_channels": (128, 256, 512, 512), "latent_channels": 4, "scaling_factor": 0.22765929}
SECONDS = 3.0
"""Each figure is the rate over at least so long, after one call to warm up."""


def random_pipeline(folder: Path, kind: str, full: bool) -> None:
    import diffusers

    model = first_stage.tiny(kind)
    if full:
        config = VQ_F4 if kind == "vq" else KL_F8
        levels = len(config["block_out_channels"])
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
        model = (diffusers.VQModel if kind == "vq" else diffusers.AutoencoderKL)(**config, **blocks, layers_per_block=2)
    model.save_pretrained(folder / "vae")
    (folder / "model_index.json").write_text(json.dumps({"vae": ["diffusers", type(model).__name__]}))


def random_images(folder: Path, count: int, size: int) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{i:06d}.jpg", quality=90)


def rate(count: int, work: Callable[[int], object], device: str) -> float:
    """Samples per second of ``work(step)``, which handles ``count`` of them."""
    work(0)
    started, steps = time.perf_counter(), 0
    while time.perf_counter() - started < SECONDS:
        steps += 1
        work(steps)
        if device == "cuda":
            torch.cuda.synchronize()
    return count * steps / (time.perf_counter() - started)


def settings() -> Iterator[tuple[str, str]]:
    for word in sys.argv[2:]:
        key, _, value = word.partition("=")
        if key not in ("device", "model", "kind", "data", "items", "batch", "math"):
            sys.exit(f"unknown setting {key}")
        yield key, value


def main() -> None:
    folder, given = Path(sys.argv[1]), dict(settings())
    folder.mkdir(parents=True)
    torch.set_num_threads(1)
    device, items, batch = given.get("device", "cpu"), int(given.get("items", 512)), int(given.get("batch", 16))
    math = given.get("math", "float32")
    if "model" not in given:
        random_pipeline(folder / "model", given.get("kind", "vq"), full=device == "cuda")
    model = Path(given.get("model", folder / "model"))
    where = first_stage.locate(model)
    assert where is not None, f"{model} has no first stage"
    info = first_stage.describe(where)
    pixels = 256 if device == "cuda" else 32
    if "data" not in given:
        random_images(folder / "images", items, pixels)
    path = given.get("data", str(folder / "images"))
    stage = first_stage.load(where, math).to(device)
    print(f"{where}: {info.kind}, 1/{info.downscale}, images of {pixels} x {pixels}, {device}, {math}", flush=True)

    for size in sorted({1, 4, 16, 64, batch}):
        clean = torch.rand(size, info.in_channels, pixels, pixels, device=device) * 2 - 1
        print(f"encoder alone, batch {size:>4}  {rate(size, lambda _, x=clean: stage.encode(x), device):>10.1f} latents/s", flush=True)

    plan = encode.plan(
        folder / "cache",
        model=model,
        data_path=path,
        identity=data.identity(path),
        sample_size=pixels // info.downscale,
        resize=True,
        on_error="skip",
        math=math,
        batch_size=batch,
    )
    started = time.perf_counter()
    latents.encode_shards(plan.tasks, device)
    made, seconds = encode.finish(plan), time.perf_counter() - started
    print(f"encode to the cache        {2 * made['count'] / seconds:>10.1f} latents/s, files, load and index included", flush=True)

    cached = samples.open_samples(made["path"])
    data.build_cache(ImageTask(path, info.in_channels, pixels, True, "skip", str(folder / "images.arrow")))
    decoded = samples.open_samples(folder / "images.arrow")

    def rows(step: int) -> np.ndarray:
        return data.order(cached.count, batch, step, seed=0)

    def read(step: int) -> torch.Tensor:
        gen = generator("cpu", step)
        return cached.clean(rows(step), device, torch.rand(batch, generator=gen) < 0.5, generator(device, step))

    def encode_now(step: int) -> torch.Tensor:
        gen = generator("cpu", step)
        encoded = stage.encode(decoded.clean(rows(step), device, torch.rand(batch, generator=gen) < 0.5))
        return encoded[:, : info.latent_channels] * info.scaling_factor

    fast, slow = rate(batch, read, device), rate(batch, encode_now, device)
    print(f"training reads, batch {batch:>4}  {fast:>10.1f} images/s from the latent cache")
    print(f"                           {slow:>10.1f} images/s encoded on the fly, from decoded images: {fast / slow:.1f} times slower")


if __name__ == "__main__":
    main()
