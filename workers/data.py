"""Images in: folders, Parquet and Hub data sets become one memory-mapped Arrow file that every worker shares.

Legend: B = rows asked for, C = channels, H = W = size of the denoiser's images. Ranges are half-open.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import io
import itertools
import json
import os
import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image, ImageOps, UnidentifiedImageError

from workers.contracts import ImageTask, InputError, derive_seed
from workers.files import finished, sync
from workers.sources import HUB as HUB
from workers.sources import IMAGES as IMAGES
from workers.sources import WINDOW as WINDOW
from workers.sources import Item, Source, find, reason
from workers.sources import resolve as resolve

SCHEMA = 1
ABOUT = b"diffpruning.images"
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")  # no EPS: opening one would run Ghostscript
MODES = {1: "L", 3: "RGB"}
RESIZE_FILTER = Image.Resampling.LANCZOS
MAX_PIXELS = 89_478_485  # above this Pillow warns of a decompression bomb
BATCH_ROWS, BATCH_BYTES = 1024, 64 << 20  # a record batch has at most so many rows and about so many bytes
REPAIR = "repair or remove it, or set data.on_error: skip"


class Decoded(NamedTuple):
    """One image of a data set: item ``row``, uint8 [C, H, W], or None if it cannot be read."""

    row: int
    name: str
    pixels: np.ndarray | None
    label: int | None


def identity(path: str) -> str:
    """sha256 (hex) that tells data sets apart without decoding: relative names and sizes in bytes, and each Parquet file's footer.

    Does not depend on where the folder lies. Does not notice an image file rewritten at exactly equal size, nor a Parquet file
    rewritten with equal size, layout and column statistics.
    """
    return find(path).identity()


def labels(path: str) -> np.ndarray | None:
    """The class of every image, int64 [items], read without the images; None if there are no labels.

    Parquet: the integer column ``label``, -1 where it is null. Image files: the index of the sub-folder of ``path`` that each lies in,
    in sorted order, if all lie in sub-folders and these are two or more. Raises: InputError if there are no images or labels are damaged.
    """
    return find(path).labels()


def check(path: str, channels: int, size: int, resize: bool) -> int:
    """How many images (files, or Parquet rows) are there, read from directory entries and headers alone.

    Raises: InputError if there is none, a Parquet file has no images, or the first image does not fit and ``resize`` is off.
    """
    _check_channels(channels)
    source = find(path)
    count = source.count
    if not count:
        raise InputError(f"data.path: no images under {path}: its Parquet files have no rows")
    found, payload = (size, size), next(source.items()).payload
    # an unreadable image is for the build to refuse or skip
    with contextlib.suppress(Exception), _open_image(payload or b"") as image:
        found = image.size
    if found != (size, size) and not resize:
        raise InputError(f"data.path: images are {_misfit(found, size)}")
    return count


class ImageReader:
    """The images of one data set, found once and read in any range of its items: what the latent cache is made from.

    ``count`` items, in the order of the image cache; ``has_labels``: ``labels`` has some. Raises: InputError as ``check`` does.
    """

    def __init__(self, path: str) -> None:
        self._source = find(path)
        self.count = self._source.count
        self.has_labels = self._source.has_labels

    def identity(self) -> str:
        return self._source.identity()

    def read(self, task: ImageTask, start: int, stop: int, ahead: int = WINDOW) -> Iterator[Decoded]:
        """Items [start, stop), in order; the next ``ahead`` are decoded in threads meanwhile. ``task.path`` and ``task.out`` are not used.

        Raises: InputError naming the image that does not fit, or cannot be read and is not to be skipped; OSError if storage fails.
        """
        _check_channels(task.channels)
        return _decoded(self._source, task, start, stop, ahead)


class ImageCache:
    """The decoded images of one data set, read in place: processes of one machine share the pages, and none of them holds the data.

    ``count`` images of ``shape`` (C, H, W); ``skipped`` names what could not be decoded; ``labels`` is int64 [count], -1 where
    the source has null, or None if it has no labels; ``about`` is what the file says of itself, ``identity`` included.
    """

    def __init__(self, about: dict[str, Any], skipped: tuple[str, ...], blocks: list[np.ndarray], labels: np.ndarray | None) -> None:
        self.about, self.skipped, self.labels = about, skipped, labels
        self.identity: str = about["identity"]
        self.shape: tuple[int, int, int] = tuple(about["shape"])
        self._blocks = blocks
        self._starts = np.cumsum([0, *map(len, blocks)])
        self.count = int(self._starts[-1])

    @classmethod
    def open(cls, path: str | Path) -> ImageCache:
        """Raises: InputError naming the file if it is missing, truncated, or no image cache."""
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            about = json.loads(reader.schema.metadata[ABOUT])
            if about["schema"] != SCHEMA:
                raise InputError(f"{path}: schema {about['schema']} is not {SCHEMA}: use the version of diffpruning that wrote it")
            width = int(np.prod(about["shape"]))
            if reader.schema.field("image").type != pa.binary(width):
                raise ValueError(f"column image is not {width} bytes wide")
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches - 1)]
            skipped = json.loads(reader.get_batch_with_custom_metadata(reader.num_record_batches - 1).custom_metadata[ABOUT])["skipped"]
            blocks = [np.frombuffer(b["image"].buffers()[1], np.uint8, len(b) * width, b["image"].offset * width) for b in batches]
            labels = [batch["label"].fill_null(-1).to_numpy() for batch in batches if "label" in reader.schema.names]
            return cls(about, tuple(skipped), [b.reshape(-1, width) for b in blocks], np.concatenate(labels) if labels else None)
        except InputError:
            raise
        except (pa.ArrowException, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is not a complete image cache ({reason(error)}): remove it and run again") from error

    def load(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """uint8 [B, C, H, W], a copy, in the order asked for. Raises: IndexError outside [0, count)."""
        wanted = np.asarray(rows, dtype=np.int64)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= self.count):
            raise IndexError(f"rows {wanted.min()}..{wanted.max()} are not all within [0, {self.count})")
        pixels = np.empty((len(wanted), int(np.prod(self.shape))), np.uint8)
        owner = np.searchsorted(self._starts, wanted, side="right") - 1
        for block in np.unique(owner):
            mine = owner == block
            pixels[mine] = self._blocks[block][wanted[mine] - self._starts[block]]
        return pixels.reshape(-1, *self.shape)


def build_cache(task: ImageTask) -> ImageCache:
    """Decode ``task.path`` into ``task.out``, or open what is there if it was made from the same data in the same way.

    Images are in the order of their sorted names (Parquet: sorted files, then rows), upright, on white, without colour management.
    Raises: InputError naming the image that does not fit or cannot be read; OSError if storage fails. Neither leaves a file.
    """
    _check_channels(task.channels)
    source, out = find(task.path), Path(task.out)
    resized = RESIZE_FILTER.name.lower() if task.resize else None
    shape = [task.channels, task.size, task.size]
    about = {"schema": SCHEMA, "shape": shape, "channels": MODES[task.channels], "resize": resized, "identity": source.identity()}
    with contextlib.suppress(InputError):
        cache = ImageCache.open(out)
        if cache.about == about and (task.on_error == "skip" or not cache.skipped):
            return cache
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f"{out.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    try:
        _write(beside, about, source, task)
        os.replace(beside, out)
        sync(out.parent)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    finished(out)
    return ImageCache.open(out)


def split(count: int, holdout: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(training rows, held-out rows), both in random order, so that a prefix of either is a fair sample.

    Raises: InputError if nothing is left to train on.
    """
    if holdout >= count:
        raise InputError(f"data.holdout: {holdout} images held out of {count} leave none to train on: hold out fewer or add images")
    rows = np.random.default_rng(derive_seed(seed, "split")).permutation(count)
    return rows[holdout:], rows[:holdout]


def order(count: int, batch_size: int, step: int, seed: int) -> np.ndarray:
    """int64 [batch_size]: positions in [0, count) of the batch of ``step`` (from 0), a pure function of its arguments.

    The stream is one permutation per epoch, one after another, cut into full batches: a batch may span epochs.
    """
    start, stop = step * batch_size, (step + 1) * batch_size
    epochs = range(start // count, -(-stop // count))
    return np.concatenate([_epoch(count, e, seed)[max(start - e * count, 0) : stop - e * count] for e in epochs])


@functools.lru_cache(maxsize=4)
def _epoch(count: int, epoch: int, seed: int) -> np.ndarray:
    return np.random.default_rng(derive_seed(seed, "order", epoch)).permutation(count)


def _check_channels(channels: int) -> None:
    if channels not in MODES:
        raise InputError(f"the model wants {channels} channels; images have 1 or 3")


def _misfit(found: tuple[int, int], size: int) -> str:
    return f"{found[0]}x{found[1]}, the model wants {size}x{size}: set data.resize: true to centre-crop and resize"


# --- decoding --------------------------------------------------------------------------------------------------------


def _open_image(payload: bytes | Path) -> Image.Image:
    image = Image.open(io.BytesIO(payload) if isinstance(payload, bytes) else payload, formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels: a decompression bomb?")
    return image


def _upright(payload: bytes, mode: str) -> Image.Image:
    image = _open_image(payload)
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # Pillow would clip at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of type {image.mode} have no known range")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB").convert(mode) if image.mode != mode else image


def _decode(item: Item, task: ImageTask) -> np.ndarray | str:
    """uint8 [C, H, W], or the reason why the image cannot be read. Raises: InputError if it does not fit; OSError from storage."""
    # Storage is read before decoding starts, so that its failures never pass for corrupt images and get skipped.
    payload = item.payload.read_bytes() if isinstance(item.payload, Path) else item.payload
    if not payload:
        return "empty"
    try:
        image = _upright(payload, MODES[task.channels])
    except UnidentifiedImageError:
        return "not an image"
    except MemoryError:
        raise
    except Exception as error:  # decoders raise almost anything on bad bytes
        return reason(error)
    if image.size != (task.size, task.size):
        if not task.resize:
            raise InputError(f"data.path: {item.name} is {_misfit(image.size, task.size)}")
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side)).resize((task.size, task.size), RESIZE_FILTER)
    return np.asarray(image).reshape(task.size, task.size, task.channels).transpose(2, 0, 1)


def _decoded(source: Source, task: ImageTask, start: int = 0, stop: int | None = None, ahead: int = WINDOW) -> Iterator[Decoded]:
    """Images [start, stop) in order, up to ``ahead`` of them being decoded while the caller is busy with the last one.

    Raises: InputError for an unreadable image, unless it is to be skipped.
    """
    items = source.items(start, stop)
    threads = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    try:
        waiting = collections.deque((item, threads.submit(_decode, item, task)) for item in itertools.islice(items, ahead))
        while waiting:
            item, decoding = waiting.popleft()
            decoded = decoding.result()
            for following in itertools.islice(items, 1):
                waiting.append((following, threads.submit(_decode, following, task)))
            if isinstance(decoded, str) and task.on_error != "skip":
                raise InputError(f"data.path: {item.name} cannot be read ({decoded}): {REPAIR}")
            yield Decoded(item.row, item.name, None if isinstance(decoded, str) else decoded, item.label)
    finally:
        threads.shutdown(cancel_futures=True)


def _write(path: Path, about: dict[str, Any], source: Source, task: ImageTask) -> None:
    """Stream every image into an Arrow file. A last batch without rows carries what is known only at the end: the skipped names."""
    width = int(np.prod(about["shape"]))
    fields = [pa.field("image", pa.binary(width), nullable=False)]
    if source.has_labels:
        fields.append(pa.field("label", pa.int64()))
    schema = pa.schema(fields, metadata={ABOUT: json.dumps(about)})

    def batch(rows: list[tuple[np.ndarray, int | None]]) -> pa.RecordBatch:
        columns = [pa.array([pixels.tobytes() for pixels, _ in rows], pa.binary(width)), pa.array([label for _, label in rows], pa.int64())]
        return pa.record_batch(columns[: len(fields)], schema=schema)

    skipped: list[str] = []

    def readable() -> Iterator[tuple[np.ndarray, int | None]]:
        for image in _decoded(source, task):
            if image.pixels is None:
                skipped.append(image.name)
            else:
                yield image.pixels, image.label

    decoded = readable()
    with path.open("wb") as file:
        with pa.ipc.new_file(file, schema) as writer:
            while rows := list(itertools.islice(decoded, max(1, min(BATCH_ROWS, BATCH_BYTES // width)))):
                writer.write_batch(batch(rows))
            if not writer.stats.num_record_batches:
                first = f"; the first is {skipped[0]}" if skipped else ""
                raise InputError(f"data.path: none of the {len(skipped)} images under {task.path} can be read{first}")
            writer.write_batch(batch([]), custom_metadata={ABOUT: json.dumps({"skipped": skipped})})
        file.flush()
        os.fsync(file.fileno())
