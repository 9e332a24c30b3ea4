"""The latent cache: what a first stage makes of every image and of its mirror image, once, in Arrow shards that every worker maps.

    latents-<key>/shard-00000.arrow ...   rows of items [start, stop), each file written beside and renamed
                  index.json              written last: the key, rows and bytes of every shard, what was skipped
Columns: ``latent`` and ``flipped`` (fixed_size_binary, C-order; the second of the mirrored image, since no autoencoder is exactly
equivariant), ``row`` (int64, the source item) and, when the data has labels, ``label`` (int64 or null).
Legend: a stored latent is [c, h, w], unscaled; c is z for VQ (not quantised) and 2z for KL (mean, then log-variance). Ranges are half-open.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from workers import data, first_stage
from workers.contracts import ImageTask, InputError, digest_of
from workers.files import replacing
from workers.records import Record

if TYPE_CHECKING:
    from torch import Tensor

ABOUT = b"diffpruning.latents"
INDEX = "index.json"
DTYPES = {"float16": np.float16, "float32": np.float32}
LOG_VARIANCE = (-30.0, 20.0)
"""A KL first stage's log-variance is clipped to this range before use, as in diffusers."""
SHARD_ITEMS, SHARD_BYTES = 4096, 256 << 20
"""A shard has at most so many items and about so many bytes: what an interrupted encode may lose, and what a worker holds in memory."""


@dataclass(frozen=True)
class LatentKey(Record):
    """Everything that a stored latent depends on: two caches with equal keys are interchangeable. Nothing of the denoiser is in it."""

    first_stage: str
    """sha256 of the first stage's config and weights."""
    kind: str
    shape: tuple[int, ...]
    """(z, h, w): the denoiser's input."""
    scaling_factor: float
    resolution: int
    """Height and width of the encoded images, in pixels."""
    crop: str | None
    resize: str | None
    dtype: str
    math: str
    """Arithmetic of the first stage on a GPU, ``float32`` or ``tf32``."""
    data: str
    """Identity of the images."""

    def __post_init__(self) -> None:
        if self.math not in first_stage.MATHS:
            raise InputError(f"latents computed in {self.math!r} are unknown: known are {', '.join(first_stage.MATHS)}")
        if self.dtype not in DTYPES:
            raise InputError(f"latents of dtype {self.dtype!r} are unknown: known are {', '.join(DTYPES)}")

    @property
    def digest(self) -> str:
        return digest_of(self.to_json())[:16]

    @property
    def stored_shape(self) -> tuple[int, int, int]:
        z, height, width = self.shape
        return z * (2 if self.kind == "kl" else 1), height, width

    @property
    def row_bytes(self) -> int:
        """Bytes of one stored latent; an item has two."""
        return int(np.prod(self.stored_shape)) * np.dtype(DTYPES[self.dtype]).itemsize


@dataclass(frozen=True)
class EncodeTask(Record):
    """Encode items [start, stop) of the images at ``data`` into one shard. ``first_stage`` is its folder; ``key`` says how."""

    data: str
    first_stage: str
    key: LatentKey
    on_error: str
    batch_size: int
    start: int
    stop: int
    out: str


def key_of(
    where: str | Path, sample_size: int, resize: bool, dtype: str, identity: str, digest: str | None = None, math: str = "float32"
) -> LatentKey:
    """The key of the latents that the first stage in ``where`` makes for a denoiser of ``sample_size``.

    ``identity``: the images'; ``digest``: the first stage's, computed if it is not given.
    """
    info = first_stage.describe(where)
    return LatentKey(
        first_stage=digest or first_stage.digest(where),
        kind=info.kind,
        shape=(info.latent_channels, sample_size, sample_size),
        scaling_factor=info.scaling_factor,
        resolution=sample_size * info.downscale,
        crop="centre" if resize else None,
        resize=data.RESIZE_FILTER.name.lower() if resize else None,
        dtype=dtype,
        math=math,
        data=identity,
    )


def shard_ranges(count: int, key: LatentKey) -> list[tuple[int, int]]:
    """Items of every shard: a function of the images and the latent's size alone, so that any cluster continues any other's work."""
    size = max(1, min(SHARD_ITEMS, SHARD_BYTES // (2 * key.row_bytes)))
    return [(start, min(start + size, count)) for start in range(0, count, size)]


def shard_name(index: int) -> str:
    return f"shard-{index:05d}.arrow"


# --- writing ---------------------------------------------------------------------------------------------------------


def encode_shards(tasks: Sequence[EncodeTask], device: str, on_progress: Callable[[int], None] = lambda items: None) -> None:
    """Write the shards that are not there yet, one after another; the images are found and the first stage is loaded once.

    ``on_progress(items)`` after every batch: items done so far, those of shards that were there included. All tasks share their images
    and first stage. Raises: InputError if these are not those of the key, or an image cannot be used; OSError if storage fails.
    """
    first, done = tasks[0], 0
    reader = data.ImageReader(first.data)
    key, identity = first.key, reader.identity()
    found = key_of(first.first_stage, key.shape[-1], key.resize is not None, key.dtype, identity, math=key.math)
    if differences := found.differences(key):
        raise InputError(f"model or data changed while their latents were made ({'; '.join(differences)}): run the same command again")
    stage: first_stage.FirstStage | None = None
    for task in tasks:
        if read_shard(task) is None:
            stage = stage or first_stage.load(first.first_stage, key.math).to(device)
            for items in _write_shard(task, reader, stage, device):
                on_progress(done + items)
        done += task.stop - task.start
        on_progress(done)


def _write_shard(task: EncodeTask, reader: data.ImageReader, stage: first_stage.FirstStage, device: str) -> Iterator[int]:
    """Yields, after every batch, how many items of the shard are done; the file is there when the iteration has ended."""
    key, most = task.key, task.stop - task.start
    stored: dict[str, np.ndarray] = {name: np.empty((most, *key.stored_shape), DTYPES[key.dtype]) for name in ("latent", "flipped")}
    rows: list[int] = []
    labels: list[int | None] = []
    skipped: list[str] = []
    how = ImageTask(task.data, stage.info.in_channels, key.resolution, key.resize is not None, task.on_error, "")

    def readable() -> Iterator[data.Decoded]:
        for image in reader.read(how, task.start, task.stop, ahead=max(data.WINDOW, 2 * task.batch_size)):
            if image.pixels is None:
                skipped.append(image.name)
            else:
                yield image

    for images, *encoded in _encode(readable(), task.batch_size, stage, device, key.dtype):
        for column, values in zip(stored.values(), encoded, strict=True):
            if not np.isfinite(values).all():
                odd = images[int((~np.isfinite(values)).reshape(len(images), -1).any(1).argmax())]
                raise InputError(f"the latent of {odd.name} is not finite in {key.dtype}: leave the image out, or store float32")
            column[len(rows) : len(rows) + len(images)] = values
        rows += [image.row for image in images]
        labels += [image.label for image in images]
        yield rows[-1] + 1 - task.start
    about = {"key": key.to_json(), "start": task.start, "stop": task.stop, "skipped": skipped}
    kind = pa.binary(key.row_bytes)
    columns = {
        name: pa.FixedSizeBinaryArray.from_buffers(kind, len(rows), [None, pa.py_buffer(values[: len(rows)])])
        for name, values in stored.items()
    }
    columns["row"] = pa.array(rows, pa.int64())
    if reader.has_labels:
        columns["label"] = pa.array(labels, pa.int64())
    table = pa.record_batch(list(columns.values()), schema=_schema(columns, about))
    out = Path(task.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as beside, beside.open("wb") as file:
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write_batch(table)
        file.flush()
        os.fsync(file.fileno())


def _schema(columns: dict[str, pa.Array], about: dict[str, Any]) -> pa.Schema:
    return pa.schema(
        [pa.field(name, column.type, nullable=name == "label") for name, column in columns.items()], metadata={ABOUT: json.dumps(about)}
    )


def _encode(
    images: Iterable[data.Decoded], batch_size: int, stage: first_stage.FirstStage, device: str, dtype: str
) -> Iterator[tuple[list[data.Decoded], np.ndarray, np.ndarray]]:
    """(images, their latents [B, c, h, w], those of their mirror images). A GPU works on one batch while the last one is collected."""
    import torch

    from workers.diffusion import pixels

    def collect(latents: Tensor) -> np.ndarray:
        return latents.contiguous().cpu().numpy()

    source, last = iter(images), None
    while batch := list(itertools.islice(source, batch_size)):
        clean = pixels(np.stack([image.pixels for image in batch if image.pixels is not None]), device)
        latents, flipped = (stage.encode(side).to(getattr(torch, dtype)) for side in (clean, clean.flip(-1)))
        if last is not None:
            yield last[0], collect(last[1]), collect(last[2])
        last = batch, latents, flipped
    if last is not None:
        yield last[0], collect(last[1]), collect(last[2])


# --- reading ---------------------------------------------------------------------------------------------------------


class Shard(NamedTuple):
    """One shard, its columns read in place: ``latent`` and ``flipped`` [n, c, h, w], ``rows`` [n]; ``labels`` [n], -1 where null."""

    latent: np.ndarray
    flipped: np.ndarray
    rows: np.ndarray
    labels: np.ndarray | None
    skipped: tuple[str, ...]
    bytes: int


def _read(path: Path, key: LatentKey, start: int, stop: int) -> Shard:
    """Raises: InputError naming the file if it is missing, truncated, or holds anything but items [start, stop) under ``key``."""
    try:
        with pa.memory_map(str(path)) as mapped:
            size = mapped.size()
            reader = pa.ipc.open_file(mapped)
            about = json.loads(reader.schema.metadata[ABOUT])
            if differences := LatentKey.from_json(about["key"]).differences(key):
                raise InputError(f"{path} holds other latents: {'; '.join(differences)}")
            if (about["start"], about["stop"]) != (start, stop):
                raise InputError(f"{path} holds items {about['start']}..{about['stop']}, wanted {start}..{stop}")
            batch = reader.get_batch(0)
        if batch.schema.field("latent").type != pa.binary(key.row_bytes) or len(batch) + len(about["skipped"]) != stop - start:
            raise ValueError(f"{len(batch)} rows of {batch.schema.field('latent').type}")

        dtype: np.dtype = np.dtype(DTYPES[key.dtype])

        def column(name: str) -> np.ndarray:
            values = np.frombuffer(batch[name].buffers()[1], dtype, len(batch) * key.row_bytes // dtype.itemsize)
            return values.reshape(-1, *key.stored_shape)

        labels = batch["label"].fill_null(-1).to_numpy() if "label" in batch.schema.names else None
        return Shard(column("latent"), column("flipped"), batch["row"].to_numpy(), labels, tuple(about["skipped"]), size)
    except InputError:
        raise
    except (pa.ArrowException, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{path} is not a complete shard of latents ({reason}): encode again, which makes only what is missing") from error


def read_shard(task: EncodeTask) -> Shard | None:
    """What the task would make, if it is there, whole, and skipped nothing that the task refuses to skip."""
    try:
        shard = _read(Path(task.out), task.key, task.start, task.stop)
    except InputError:
        return None
    return shard if task.on_error == "skip" or not shard.skipped else None


def write_index(folder: Path, key: LatentKey, ranges: Sequence[tuple[int, int]]) -> LatentCache:
    """Close a cache whose shards, of the items ``ranges``, are all there. Raises: InputError if one is not, or no image could be read."""
    shards = [_read(folder / shard_name(i), key, start, stop) for i, (start, stop) in enumerate(ranges)]
    count = ranges[-1][1]
    skipped = [name for shard in shards for name in shard.skipped]
    if len(skipped) == count:
        raise InputError(f"data.path: none of the {count} images can be read; the first is {skipped[0]}")
    records = [
        {"file": shard_name(i), "start": start, "stop": stop, "rows": len(shard.rows), "bytes": shard.bytes}
        for i, (shard, (start, stop)) in enumerate(zip(shards, ranges, strict=True))
    ]
    with replacing(folder / INDEX) as path:
        path.write_text(json.dumps({"key": key.to_json(), "items": count, "skipped": skipped, "shards": records}, indent=1) + "\n")
    return LatentCache.open(folder)


class LatentCache:
    """Every latent of one data set, read in place: the processes of one machine share the pages, and none of them holds the data.

    ``count`` latents of ``shape`` (z, h, w); ``rows`` [count] are their source items; ``skipped`` names what could not be decoded;
    ``labels`` is int64 [count], -1 where the source has null, or None. Rows are numbered as in the image cache of the same images.
    """

    def __init__(self, key: LatentKey, shards: Sequence[Shard]) -> None:
        self.key, self.identity = key, key.data
        z, height, width = key.shape
        self.shape = z, height, width
        self.rows = np.concatenate([shard.rows for shard in shards])
        self.skipped = tuple(name for shard in shards for name in shard.skipped)
        labels = [shard.labels for shard in shards if shard.labels is not None]
        self.labels = np.concatenate(labels) if labels else None
        self.count = len(self.rows)
        self._sides = [shard.latent for shard in shards], [shard.flipped for shard in shards]
        self._starts = np.cumsum([0, *(len(shard.rows) for shard in shards)])

    @classmethod
    def open(cls, path: str | Path, expected: LatentKey | None = None) -> LatentCache:
        """Raises: InputError naming what differs from ``expected``, or the file that is missing, truncated, or foreign."""
        folder = Path(path)
        try:
            index = json.loads((folder / INDEX).read_text())
            key = LatentKey.from_json(index["key"])
            shards = [(folder / str(record["file"]), int(record["start"]), int(record["stop"])) for record in index["shards"]]
        except FileNotFoundError:
            raise InputError(f"{folder} holds no {INDEX}: it is no latent cache, or is not finished: encode again to finish it") from None
        except (OSError, ValueError, LookupError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{folder / INDEX} is damaged ({error}): delete it and encode again") from None
        if expected is not None and (differences := key.differences(expected)):
            raise InputError(f"{folder} holds other latents: {'; '.join(differences)}: remove it or encode elsewhere")
        return cls(key, [_read(file, key, start, stop) for file, start, stop in shards])

    def load(self, rows: Sequence[int] | np.ndarray, flip: np.ndarray | None = None) -> np.ndarray:
        """Stored latents [B, c, h, w], a copy, in the order asked for; those of the mirror images where ``flip`` (bool [B]) is set.

        Raises: IndexError outside [0, count).
        """
        wanted = np.asarray(rows, dtype=np.int64)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= self.count):
            raise IndexError(f"rows {wanted.min()}..{wanted.max()} are not all within [0, {self.count})")
        latents = np.empty((len(wanted), *self.key.stored_shape), DTYPES[self.key.dtype])
        owner = np.searchsorted(self._starts, wanted, side="right") - 1
        side = np.zeros(len(wanted), np.int64) if flip is None else flip.astype(np.int64)
        for shard, flipped in set(zip(owner.tolist(), side.tolist(), strict=True)):
            mine = (owner == shard) & (side == flipped)
            latents[mine] = self._sides[flipped][shard][wanted[mine] - self._starts[shard]]
        return latents

    def spread(self, most: int = 256) -> float:
        """Standard deviation of the latents in the denoiser's scale, from at most so many of them: about 1 if the scale is right."""
        z = self.shape[0]
        stored = self.load(np.arange(0, self.count, -(-self.count // most))).astype(np.float64)
        variance = stored[:, :z].var()
        if self.key.kind == "kl":
            variance += np.exp(stored[:, z:].clip(*LOG_VARIANCE)).mean()
        return float(np.sqrt(variance) * self.key.scaling_factor)
