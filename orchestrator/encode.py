"""Which latents are still to be made: the shards of a latent cache as tasks, shared out over the cluster, and the index at the end.

A cache lies in a folder named by its key, so another first stage, resolution or data set gets a folder of its own, and changing the
denoiser alone finds the old one. What is there and whole is not made again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workers import data, first_stage, latents
from workers.contracts import InputError

SPREAD = (0.3, 3.0)
"""Standard deviations of latents that need no remark: those of a VQ model, scaled by .18215 in error, lie below."""


@dataclass(frozen=True)
class EncodePlan:
    """The work left: ``tasks``, one per missing shard of ``folder``. ``count``: items of the data set; ``finished``: the index is there."""

    folder: Path
    key: latents.LatentKey
    count: int
    tasks: tuple[latents.EncodeTask, ...]
    finished: bool

    @property
    def items(self) -> int:
        """Images still to be encoded, each with its mirror image."""
        return sum(task.stop - task.start for task in self.tasks)

    @property
    def bytes(self) -> int:
        """Disk space that they will take."""
        return self.items * 2 * self.key.row_bytes


def plan(
    cache: Path,
    *,
    model: str | Path,
    data_path: str,
    identity: str,
    sample_size: int,
    resize: bool,
    on_error: str,
    dtype: str = "float16",
    math: str = "float32",
    batch_size: int = 16,
    digest: str | None = None,
) -> EncodePlan:
    """The work left to have the latents of ``data_path`` in a folder under ``cache``. Writes nothing.

    ``model``: the pipeline folder; ``identity``: that of the images; ``sample_size``: the denoiser's; ``digest``: the first stage's, if
    it is known; ``math``: one of first_stage.MATHS. Sixteen images a batch are the fastest in float32 on an H200.
    Raises: InputError if the pipeline has no first stage, or the folder holds other latents or an image that is refused.
    """
    where = first_stage.locate(model)
    if where is None:
        raise InputError(f"model.path: {model} is a pipeline in pixels: it has no vqvae or vae to encode with, and needs no latents")
    key = latents.key_of(where, sample_size, resize, dtype, identity, digest, math)
    folder = Path(cache) / f"latents-{key.digest}"
    found = _finished(folder, key)
    if found is not None:
        if found.skipped and on_error != "skip":
            raise InputError(f"data.path: {found.skipped[0]} cannot be read: {data.REPAIR}")
        return EncodePlan(folder, key, found.count + len(found.skipped), (), finished=True)
    count = data.check(data_path, first_stage.describe(where).in_channels, key.resolution, resize)
    tasks = [
        latents.EncodeTask(data_path, str(where), key, on_error, batch_size, start, stop, str(folder / latents.shard_name(i)))
        for i, (start, stop) in enumerate(latents.shard_ranges(count, key))
    ]
    return EncodePlan(folder, key, count, tuple(task for task in tasks if latents.read_shard(task) is None), finished=False)


def _finished(folder: Path, key: latents.LatentKey) -> latents.LatentCache | None:
    """The cache in ``folder``; None if something is missing or damaged. Raises: InputError if it is whole and of another key."""
    try:
        cache = latents.LatentCache.open(folder)
    except InputError:
        return None
    return cache if cache.key == key else latents.LatentCache.open(folder, key)


def batches(tasks: Sequence[latents.EncodeTask], slots: int) -> list[tuple[latents.EncodeTask, ...]]:
    """The tasks, shared out in runs of neighbouring shards, each of which lists the images and loads the first stage once.

    Two runs a slot, since they take unequal time.
    """
    parts = min(len(tasks), 2 * max(1, slots))
    return [tuple(tasks[len(tasks) * i // parts : len(tasks) * (i + 1) // parts]) for i in range(parts)]


def finish(found: EncodePlan) -> dict[str, Any]:
    """Write the index, if it is not there; what is known of the cache, as JSON. ``note``: a doubt to tell the user, or empty.

    Raises: InputError naming a shard that is missing or damaged, or if no image could be read.
    """
    if found.finished:
        cache = latents.LatentCache.open(found.folder, found.key)
    else:
        cache = latents.write_index(found.folder, found.key, latents.shard_ranges(found.count, found.key))
        for left in found.folder.glob(".*.tmp*"):  # of killed writers: nobody writes here any more
            left.unlink(missing_ok=True)
    spread, note = cache.spread(), ""
    if not SPREAD[0] <= spread <= SPREAD[1]:
        note = (
            f"latents have a standard deviation of {spread:.2g} in the denoiser's scale, where about 1 is usual: "
            f"see that scaling_factor ({found.key.scaling_factor:g}) in the first stage's config.json is the denoiser's"
        )
    return {"path": str(found.folder), "count": cache.count, "skipped": list(cache.skipped), "spread": spread, "note": note}
