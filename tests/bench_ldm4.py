"""Prints how the full-size LDM-4 (LSUN-Beds: 274M parameters) goes through the pipeline on this machine: time and memory of every stage.

    PYTHONPATH=. python tests/bench_ldm4.py FOLDER [--widths 3] [--time-limit 540]

Every stage at a few steps, in this process, from images to samples of what was published; when the time is up, the same command
continues. Random weights and images: the figures are about time and memory, not about quality. --tiny shrinks everything, to check the
script on a CPU. Figures come last.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from orchestrator import planning, report
from orchestrator.cluster import InlineCluster, Need, Task
from orchestrator.config import load_job
from workers import families
from workers.contracts import MixturePlan, Progress
from workers.generate import write_sample_grid

LDM4 = Path(__file__).parents[1] / "jobs" / "ldm" / "lsun_beds"
TINY_STAGE = {
    "_class_name": "VQModel",
    "block_out_channels": [16, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "latent_channels": 3,
    "norm_num_groups": 4,
    "num_vq_embeddings": 64,
    "scaling_factor": 1.0,
}


class TimeIsUp(SystemExit):
    pass


class Clock:
    """Seconds since the start; raises once the limit is passed."""

    def __init__(self, limit_s: float) -> None:
        self.started, self.told, self.limit_s = time.monotonic(), 0.0, limit_s

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def check(self, doing: str) -> None:
        if self.seconds > self.limit_s:
            raise TimeIsUp(f"time is up after {self.seconds:.0f} s, while at {doing}")

    def progress(self, event: Progress) -> None:
        doing = f"{event.stage} {event.unit} {event.step}/{event.steps}"
        if self.seconds > self.told + 10:
            self.told = self.seconds
            print(f"{self.seconds:5.0f} s  {doing}", flush=True)
        self.check(doing)


def wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size else "-"


def reset_peak() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peaks() -> tuple[int, int]:
    """Bytes that tensors took at most, and bytes that were taken from the GPU."""
    return (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) if torch.cuda.is_available() else (0, 0)


class Watched(InlineCluster):
    """Keeps the time and the peak memory of every task in a file, so that a continued run shows all of them."""

    def __init__(self, need: Need, on_progress: Callable[[Progress], None], file: Path) -> None:
        super().__init__(need, on_progress)
        self.file, self.stage = file, ""
        self.seen: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []

    def timed(self, name: str, work: Callable[[], Any]) -> Any:
        reset_peak()
        started, done = time.perf_counter(), False
        try:
            result = work()
            done = True
            return result
        finally:
            wait(self.need.device)
            seconds, (peak, reserved) = time.perf_counter() - started, peaks()
            self.seen.append({"stage": self.stage, "task": name, "seconds": seconds, "peak": peak, "reserved": reserved, "done": done})
            self.file.write_text(json.dumps(self.seen))

    def _watched(self, task: Task) -> Task:
        return lambda session, item: self.timed(getattr(task, "__name__", str(task)), partial(task, session, item))

    def scatter(self, task: Task, items: Sequence[Any]) -> list[Any]:
        return super().scatter(self._watched(task), items)

    def fit_all(self, task: Task, jobs: Mapping[str, Any], storage: Path, on_done: Any) -> dict[str, Any]:
        return super().fit_all(self._watched(task), jobs, storage, on_done)

    def search(self, task: Task, axes: Mapping[str, Sequence[Any]], items: Mapping[str, Any], storage: Path) -> dict[str, Any]:
        plans = {}
        for key, item in items.items():
            plans[key] = self.timed(f"search_plan {key}", partial(task, self._session(), item))
        return plans

    def table(self) -> Iterator[str]:
        """Per stage and task: how many, seconds in all, the highest peak."""
        groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for seen in self.seen:
            groups.setdefault((seen["stage"], seen["task"]), []).append(seen)
        for (stage, task), rows in groups.items():
            peak, reserved, cut = max(r["peak"] for r in rows), max(r["reserved"] for r in rows), sum(not r["done"] for r in rows)
            yield (
                f"{stage:<12}{task:<34}{len(rows):>4} x{sum(r['seconds'] for r in rows):>9.1f} s   peak {gib(peak)} of {gib(reserved)}"
                + (f"   ({cut} cut off)" if cut else "")
            )


def sources(folder: Path, tiny: bool, count: int) -> tuple[Path, Path]:
    """(pipeline folder of configs alone, folder of random images)."""
    images, model = folder / "images", folder / "configs"
    if tiny and not model.exists():
        unet: Any = families.family("unet2d").tiny()
        parts = {"unet/config.json": {**unet.config, "_class_name": "UNet2DModel"}, "vqvae/config.json": TINY_STAGE}
        for name in ("model_index.json", "scheduler/scheduler_config.json"):
            parts[name] = json.loads((LDM4 / name).read_text())
        for name, part in parts.items():
            (model / name).parent.mkdir(parents=True, exist_ok=True)
            (model / name).write_text(json.dumps(part))
    images.mkdir(parents=True, exist_ok=True)
    size, rng = 32 if tiny else 256, np.random.default_rng(0)
    for i in range(count):
        coarse = rng.integers(0, 256, (8, 8, 3), np.uint8)
        if not (path := images / f"{i:04d}.png").exists():
            Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC).save(path)
    return (model if tiny else LDM4), images


def job_of(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    tiny, model_images = options.tiny, sources(folder, options.tiny, options.images)
    precision, batch = ("no", 4) if tiny else ("bf16", options.batch)
    train = {"steps": options.steps, "batch_size": batch, "mixed_precision": precision}
    return {
        "name": "tiny" if tiny else "ldm4",
        "storage": {"path": str(folder / "runs")},
        "registry": {"path": str(folder / "registry")},
        "model": {"path": str(model_images[0]), "random_init": True},
        "data": {"path": str(model_images[1]), "holdout": 16, "flip": True, "encode_math": "tf32"},
        "similarity": {"timesteps": 8, "images": 16, "batch_size": 8, "bootstrap": 10},
        "partition": {"experts": 2},
        "elastic": {"most_widths": options.widths},
        "specialize": {**train, "random_networks": 2, "importance_images": 16},
        "router": {"images": 16, "era_steps": 5, "era_batch": 8, "trials": 5, "influence_samples": 64},
        "budgets": [{"metric": "latency", "ratio": 0.5}, {"metric": "macs", "ratio": 0.5}],
        "sampler": {"scheduler": "ddim", "steps": 10},
        "latency": {"batch": 2, "dtype": "float32"} if tiny else {"batch": options.batch, "dtype": "bfloat16", "compile": True},
        "finetune": {**train, "compare": []},
        "evaluate": {"images": 8, "samples": 8, "timesteps": 4, "batch_size": 8},
        "resources": {"device": options.device},
    }


def run(options: argparse.Namespace) -> None:
    clock, folder = Clock(options.time_limit), options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump(job_of(folder, options)))
    cluster = Watched(Need(options.device, 1, float(options.device != "cpu")), clock.progress, folder / "tasks.json")
    cluster.stage = "prepare"
    prepared = cluster.timed("random weights, digests, plan", lambda: planning.make_ready(load_job(str(file))))
    seconds: dict[str, float] = {}

    def on_stage(name: str, state: str, taken: float) -> None:
        cluster.stage, seconds[name] = name, taken
        print(f"{clock.seconds:5.0f} s  {name} {state}", flush=True)

    results: dict[str, dict[str, Any]] = {}
    try:
        prepared.store.claim(planning.owner(prepared.job, prepared.pipeline.identity))
        with prepared.store.lock():
            results = prepared.pipeline.run(prepared.job, lambda: cluster, lambda text: print(text, flush=True), on_stage=on_stage)
        cluster.stage = "after"
        cluster.timed("report", partial(report.build, prepared))
        for budget, version in results["publish"]["published"].items():
            clock.check(f"sampling of {budget}")
            write = (version["path"], "ddim", 10, range(8), folder / f"{budget}.png", options.device)
            cluster.timed(f"load and sample {budget}", partial(write_sample_grid, *write))
    except TimeIsUp as error:
        print(f"{error}: the same command continues")
    print("\n" + "\n".join(cluster.table()))
    print("stages      " + ", ".join(f"{name} {taken:.0f} s" for name, taken in seconds.items()))
    disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"disk        {gib(disk)}, planned for at most {gib(prepared.disk_bytes)}")
    if "publish" in results:
        metrics = results["publish"]["metrics"]
        dense_ms = metrics["dense"]["ms_per_step"]
        for label, found in metrics.items():
            ms, memory = found["ms_per_step"], found.get("peak_memory_mib", 0) * 2**20
            print(f"{label:<24}{ms:>10.3f} ms/step  {ms / dense_ms:.3f} of dense, {found['gmacs_per_step']:.2f} GMACs, {gib(memory)}")
        for budget, chosen in results["route"]["chosen"].items():
            plan, measured = MixturePlan.from_json(chosen), metrics[budget]["ms_per_step"] / dense_ms
            print(f"{budget:<24}{plan.agent}: planned {plan.cost_ratio:.3f}, measured time {measured:.3f}, MACs {plan.macs_ratio:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--time-limit", type=float, default=540)
    parser.add_argument("--steps", type=int, default=4, help="training steps of every expert")
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--widths", type=int, default=3, help="widths of a site at most: fewer are measured sooner")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
