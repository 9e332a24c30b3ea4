"""Where are the images of a data set, which come in what order, and which class is each of? Nothing is decoded here.

A data set is a folder of image files or of Parquet files, one such file, or the files of one folder that match a pattern.
Ranges are half-open.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from workers.contracts import InputError, digest_of

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
HUB = "hf://datasets/"
WINDOW = 64  # images read ahead of who uses them, decoded in threads


class Item(NamedTuple):
    """One image, undecoded: a file, the bytes of a Parquet row, or None where that is null."""

    row: int
    name: str
    payload: Path | bytes | None
    label: int | None = None


@dataclass(frozen=True)
class Source:
    """The files of one data set, as sorted POSIX names relative to ``root``: one of the two tuples is empty."""

    root: Path
    images: tuple[str, ...]
    parquet: tuple[str, ...]

    @functools.cached_property
    def count(self) -> int:
        return len(self.images) + sum(_open_parquet(self.root / name).metadata.num_rows for name in self.parquet)

    @functools.cached_property
    def classes(self) -> tuple[str, ...]:
        """The first-level sub-folders, sorted, where these are what image files are labelled by.

        An image's label is the index of its sub-folder, as in torchvision's ImageFolder; there are labels only if all images lie in
        sub-folders and these are two or more.
        """
        folders = {folder if below else "" for folder, _, below in (name.partition("/") for name in self.images)}
        return tuple(sorted(folders)) if len(folders) > 1 and "" not in folders else ()

    @functools.cached_property
    def has_labels(self) -> bool:
        return bool(self.classes) or any(_has_labels(_open_parquet(self.root / name)) for name in self.parquet)

    def labels(self) -> np.ndarray | None:
        """int64 [count], -1 where null, or None. Raises: InputError naming the Parquet file whose labels are damaged."""
        if not self.has_labels:
            return None
        if self.images:
            return np.array([self._label(name) for name in self.images], np.int64)
        return np.concatenate([_parquet_labels(self.root / name) for name in self.parquet])

    def identity(self) -> str:
        """sha256 (hex) of what ``data.identity`` says; of the labels too, since they follow from names or are in the footers."""
        sizes = [[name, (self.root / name).stat().st_size] for name in (*self.images, *self.parquet)]
        labelled = {"labels": "sub-folders"} if self.classes else {}
        return digest_of({"files": sizes, "footers": [_footer(self.root / name) for name in self.parquet], **labelled})

    def items(self, start: int = 0, stop: int | None = None) -> Iterator[Item]:
        """The images [start, stop), undecoded, in the cache's order; only a few Parquet rows at a time are in memory."""
        for row, name in enumerate(self.images[start:stop], start):
            yield Item(row, name, self.root / name, self._label(name))
        first = 0
        for name in self.parquet:
            opened = _open_parquet(self.root / name)
            rows = opened.metadata.num_rows
            below, above = max(start - first, 0), rows if stop is None else min(stop - first, rows)
            if below < above:
                yield from (item._replace(row=first + item.row) for item in _parquet_items(name, self.root / name, opened, below, above))
            first += rows

    @functools.cached_property
    def _index(self) -> dict[str, int]:
        return {folder: label for label, folder in enumerate(self.classes)}

    def _label(self, name: str) -> int | None:
        return self._index.get(name.partition("/")[0])


def resolve(path: str) -> Path:
    """The local folder or file that ``path`` names, or the pattern (``FOLDER/train-*.parquet``) if files match it;
    ``hf://datasets/ORG/NAME[/sub/folder]`` is downloaded to the Hub's cache.

    Raises: InputError if it does not exist or the Hub refuses.
    """
    if not path.startswith("hf://"):
        local = Path(path).expanduser()
        if not local.exists() and not _matching(local):
            raise InputError(f"data.path: no such file or folder: {path}")
        return local
    parts = [part for part in path.removeprefix(HUB).split("/") if part]
    if not path.startswith(HUB) or len(parts) < 2 or ".." in parts:
        raise InputError(f"data.path: {path} is not of the form {HUB}ORG/NAME[/sub/folder]")
    import huggingface_hub

    below = "/".join(parts[2:])
    suffixes = [case for suffix in (*IMAGES, ".parquet") for case in (suffix, suffix.upper())]
    patterns = [f"{below}/*{suffix}" if below else f"*{suffix}" for suffix in suffixes] + [below] * bool(below)
    try:
        folder = huggingface_hub.snapshot_download("/".join(parts[:2]), repo_type="dataset", allow_patterns=patterns)
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:  # a full disk is no mistake in data.path
            raise
        raise InputError(f"data.path: {path} cannot be downloaded: {reason(error)}") from error
    if not (Path(folder) / below).exists():
        raise InputError(f"data.path: no images or Parquet files in {path}")
    return Path(folder) / below


def find(path: str) -> Source:
    """Raises: InputError if there are no images, or images beside Parquet files; as ``resolve`` does."""
    root = resolve(path)
    if root.is_dir():
        names = sorted(_walk(root))
    else:
        names, root = [root.name] if root.is_file() else _matching(root), root.parent
    images = tuple(name for name in names if name.lower().endswith(IMAGES))
    parquet = tuple(name for name in names if name.lower().endswith(".parquet"))
    if images and parquet:
        raise InputError(f"data.path: {path} holds both images ({images[0]}) and Parquet ({parquet[0]}): point it at one kind")
    if not images and not parquet:
        raise InputError(f"data.path: no images under {path} (looked for {', '.join(IMAGES)} and .parquet)")
    return Source(root, images, parquet)


def _matching(pattern: Path) -> list[str]:
    """Sorted names of the files of one folder whose names match."""
    return sorted(file.name for file in pattern.parent.glob(pattern.name) if file.is_file())


def _walk(root: Path) -> Iterator[str]:
    """Relative POSIX names of the files below, through links to folders but never round in circles; hidden ones are not data."""

    def fail(error: OSError) -> NoReturn:  # os.walk would pass over a folder it cannot read
        raise error

    for folder, below, files in os.walk(root, onerror=fail, followlinks=True):
        above = Path(folder).resolve()
        targets = {name: Path(folder, name).resolve() for name in below}
        below[:] = [name for name in below if not name.startswith(".") and not above.is_relative_to(targets[name])]
        yield from (Path(folder, name).relative_to(root).as_posix() for name in files if not name.startswith("."))


def reason(error: Exception) -> str:
    """An error's text in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


# --- Parquet ---------------------------------------------------------------------------------------------------------


def _footer(file: Path) -> str:
    """A Parquet file ends with its footer, the footer's length in 4 bytes, and PAR1."""
    _open_parquet(file)
    with file.open("rb") as stream:
        stream.seek(-8, os.SEEK_END)
        length = int.from_bytes(stream.read(4), "little")
        stream.seek(-8 - length, os.SEEK_END)
        return stream.read(length).hex()


def _open_parquet(file: Path) -> pq.ParquetFile:
    """Raises: InputError if it is no Parquet or has no images."""
    try:
        opened = pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)  # page by page, not a row group at once
    except pa.ArrowException as error:
        raise InputError(f"data.path: {file} is not a readable Parquet file: {reason(error)}") from error
    schema = opened.schema_arrow
    kind = schema.field("image").type if "image" in schema.names else None
    if kind is not None and pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if kind is None or not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise InputError(
            f"data.path: {file} has no column image of struct{{bytes, path}} or binary; its columns: {', '.join(schema.names)}"
        )
    return opened


def _has_labels(opened: pq.ParquetFile) -> bool:
    schema = opened.schema_arrow
    return "label" in schema.names and pa.types.is_integer(schema.field("label").type)


def _parquet_labels(file: Path) -> np.ndarray:
    """int64 [rows], -1 where null or where the file has no labels; the images are not read."""
    opened = _open_parquet(file)
    if not _has_labels(opened):
        return np.full(opened.metadata.num_rows, -1, np.int64)
    try:
        return opened.read(columns=["label"])["label"].cast(pa.int64()).fill_null(-1).to_numpy()
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # storage failed; Arrow's own has no number
            raise
        raise InputError(f"data.path: the labels in {file} cannot be read: {reason(error)}") from error


def _parquet_items(name: str, file: Path, opened: pq.ParquetFile, start: int, stop: int) -> Iterator[Item]:
    """Rows [start, stop) of one file; row groups outside are not read, rows before ``start`` in its group are not unpacked."""
    sizes = [opened.metadata.row_group(i).num_rows for i in range(opened.num_row_groups)]
    starts = [0, *itertools.accumulate(sizes)]
    groups = [i for i, size in enumerate(sizes) if starts[i] < stop and start < starts[i] + size]
    row = starts[groups[0]]
    try:
        columns = ["image", "label"] if _has_labels(opened) else ["image"]
        for batch in opened.iter_batches(WINDOW, row_groups=groups, columns=columns):
            skip, row = max(start - row, 0), row + len(batch)
            at = row - len(batch) + skip
            for record in batch.slice(skip, max(stop - at, 0)).to_pylist():
                image = record["image"]
                payload = image["bytes"] if isinstance(image, dict) else image
                yield Item(at, f"{name} row {at}", payload, record.get("label"))
                at += 1
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # storage failed; Arrow's own has no number
            raise
        raise InputError(f"data.path: {file} is damaged after row {row}: {reason(error)}") from error
