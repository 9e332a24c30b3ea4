"""Images in: what comes out of the cache is what Pillow decodes, and every mistake is named."""

import dataclasses
import errno
import io
import os
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from workers import data
from workers.contracts import ImageTask, InputError

EMOJI = Path(__file__).parents[2] / "jobs" / "quickstart" / "noto-emoji-32.parquet"
SIZE = 8


def noise(seed: int, mode: str = "RGB", width: int = SIZE, height: int = SIZE) -> Image.Image:
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, bands), dtype=np.uint8)
    return Image.fromarray(pixels[..., 0] if bands == 1 else pixels)


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def write_images(folder: Path, count: int = 5) -> Path:
    """Names sort otherwise than they are written, and one lies in a sub-folder."""
    (folder / "class").mkdir(parents=True)
    for i in reversed(range(count)):
        noise(i).save(folder / ("class" if i == 1 else "") / f"{i:03d}.png")
    return folder


def write_parquet(file: Path, images: list, **columns) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": image, "path": f"{i}.png"} for i, image in enumerate(images)]
    pq.write_table(pa.table({"image": pa.array(rows, kind), **columns}), file)
    return file


def task(path: Path, out: Path, **changes) -> ImageTask:
    return dataclasses.replace(ImageTask(str(path), 3, SIZE, False, "refuse", str(out / "images.arrow")), **changes)


def pixels_of(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


# --- the cache is what Pillow decodes --------------------------------------------------------------------------------


def test_cache_of_a_folder_is_the_decoded_images_in_order_of_their_names(tmp_path):
    folder = write_images(tmp_path / "in")
    cache = data.build_cache(task(folder, tmp_path))
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.png"))
    assert (cache.count, cache.shape, cache.skipped, cache.labels) == (5, (3, SIZE, SIZE), (), None)
    assert np.array_equal(cache.load(range(5)), [pixels_of(Image.open(folder / name)) for name in names])


def test_cache_of_the_bundled_parquet_equals_the_same_images_as_a_folder(tmp_path):
    records = pq.read_table(EMOJI)["image"].slice(0, 100).to_pylist()
    kept = write_parquet(tmp_path / "in" / "part.parquet", [record["bytes"] for record in records])
    (tmp_path / "png").mkdir()
    for i, record in enumerate(records):
        (tmp_path / "png" / f"{i:04d}.png").write_bytes(record["bytes"])
    one = data.build_cache(task(kept.parent, tmp_path / "1", size=32))
    other = data.build_cache(task(tmp_path / "png", tmp_path / "2", size=32))
    assert np.array_equal(one.load(range(100)), other.load(range(100)))
    assert one.identity != other.identity


def test_bundled_images_fill_several_record_batches_and_any_row_can_be_asked_for(tmp_path):
    cache = data.build_cache(task(EMOJI, tmp_path, size=32))
    assert cache.count == data.check(str(EMOJI), 3, 32, False) == pq.read_metadata(EMOJI).num_rows
    assert pa.ipc.open_file(str(tmp_path / "images.arrow")).num_record_batches > 3
    rows = [cache.count - 1, 0, 1024, 1023, 2048, 1024]
    found = cache.load(rows)
    everything = cache.load(np.arange(cache.count))
    assert found.dtype == np.uint8 and np.array_equal(found, everything[rows])
    source = pq.read_table(EMOJI)["image"]
    for row, pixels in zip(rows, found, strict=True):
        rgba = Image.open(io.BytesIO(source[row].as_py()["bytes"])).convert("RGBA")
        white = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba)
        assert np.array_equal(pixels, pixels_of(white))


def test_rows_outside_the_cache_are_errors(tmp_path):
    cache = data.build_cache(task(write_images(tmp_path / "in"), tmp_path))
    assert cache.load([]).shape == (0, 3, SIZE, SIZE)
    for row in (-1, 5):
        with pytest.raises(IndexError, match=r"\[0, 5\)"):
            cache.load([0, row])


def test_batches_shrink_when_images_are_large(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "BATCH_BYTES", 2 * 3 * SIZE * SIZE)
    cache = data.build_cache(task(write_images(tmp_path / "in"), tmp_path))
    assert pa.ipc.open_file(tmp_path / "images.arrow").num_record_batches == 4  # 2 + 2 + 1 images, then the empty last
    assert np.array_equal(cache.load([4])[0], pixels_of(noise(1)))  # class/001.png sorts behind the digits


def test_transparent_pixels_become_white(tmp_path):
    see_through = noise(0, "RGBA")
    see_through.putalpha(Image.new("L", (SIZE, SIZE), 0))
    (tmp_path / "in").mkdir()
    see_through.save(tmp_path / "in" / "alpha.png")
    palette = Image.new("P", (SIZE, SIZE), 1)
    palette.putpalette([0, 0, 0, 200, 10, 20])
    palette.save(tmp_path / "in" / "palette.png", transparency=1)
    noise(0).convert("L").point(lambda _: 7).save(tmp_path / "in" / "grey.png", transparency=7)
    assert (data.build_cache(task(tmp_path / "in", tmp_path)).load([0, 1, 2]) == 255).all()


def test_half_transparent_black_becomes_grey(tmp_path):
    Image.new("RGBA", (SIZE, SIZE), (0, 0, 0, 128)).save(tmp_path / "a.png")
    assert (data.build_cache(task(tmp_path / "a.png", tmp_path)).load([0]) == 127).all()


def test_one_channel_is_luminance_and_other_counts_are_refused(tmp_path):
    noise(0).save(tmp_path / "a.png")
    cache = data.build_cache(task(tmp_path / "a.png", tmp_path, channels=1))
    assert np.array_equal(cache.load([0])[0, 0], np.asarray(noise(0).convert("L")))
    for refused in (
        lambda: data.build_cache(task(tmp_path / "a.png", tmp_path, channels=4)),
        lambda: data.check(str(tmp_path), 4, 8, True),
    ):
        with pytest.raises(InputError, match="4 channels; images have 1 or 3"):
            refused()


def test_sixteen_bit_grey_keeps_its_high_byte(tmp_path):
    deep = np.arange(SIZE * SIZE, dtype=np.uint16).reshape(SIZE, SIZE) * 1000
    Image.fromarray(deep).save(tmp_path / "a.png")
    assert np.array_equal(data.build_cache(task(tmp_path / "a.png", tmp_path)).load([0])[0, 2], deep >> 8)


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    noise(0).save(tmp_path / "a.png", exif=exif)
    upright = noise(0).transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(data.build_cache(task(tmp_path / "a.png", tmp_path)).load([0])[0], pixels_of(upright))


# --- sizes -----------------------------------------------------------------------------------------------------------


def test_resize_crops_the_centre_and_records_its_filter(tmp_path):
    wide = noise(0, width=21, height=12)
    wide.save(tmp_path / "a.png")
    cache = data.build_cache(task(tmp_path / "a.png", tmp_path, resize=True))
    expected = wide.crop((4, 0, 16, 12)).resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    assert np.array_equal(cache.load([0])[0], pixels_of(expected))
    assert cache.about["resize"] == "lanczos"


def test_wrong_size_is_refused_with_both_sizes_and_the_remedy(tmp_path):
    folder = write_images(tmp_path / "in")
    noise(0, width=64, height=48).save(folder / "odd.png")
    with pytest.raises(InputError, match="odd.png is 64x48, the model wants 8x8: set data.resize: true"):
        data.build_cache(task(folder, tmp_path, on_error="skip"))
    with pytest.raises(InputError, match="images are 8x8, the model wants 32x32: set data.resize: true to centre-crop and resize"):
        data.check(str(folder), 3, 32, False)
    assert data.check(str(folder), 3, 32, True) == data.check(str(folder), 3, SIZE, False) == 6


# --- bad input -------------------------------------------------------------------------------------------------------


def bad_payloads() -> dict[str, bytes]:
    return {"cut.png": png(noise(0, width=64, height=64))[:2000], "text.png": b"not an image", "empty.png": b""}


@pytest.mark.parametrize("name", bad_payloads())
def test_corrupt_image_is_refused_by_name_or_skipped_and_recorded(tmp_path, name):
    folder = write_images(tmp_path / "in")
    (folder / name).write_bytes(bad_payloads()[name])
    with pytest.raises(InputError, match=f"{name} cannot be read .*set data.on_error: skip") as caught:
        data.build_cache(task(folder, tmp_path))
    assert "0x" not in str(caught.value) and "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
    cache = data.build_cache(task(folder, tmp_path, on_error="skip"))
    assert (cache.count, cache.skipped) == (5, (name,))
    assert data.ImageCache.open(tmp_path / "images.arrow").skipped == (name,)


def test_cache_with_skipped_images_does_not_satisfy_a_task_that_refuses_them(tmp_path):
    folder = write_images(tmp_path / "in")
    (folder / "bad.png").write_bytes(b"bad")
    data.build_cache(task(folder, tmp_path, on_error="skip"))
    with pytest.raises(InputError, match="bad.png"):
        data.build_cache(task(folder, tmp_path))
    assert data.ImageCache.open(tmp_path / "images.arrow").count == 5


def test_corrupt_parquet_row_is_named_by_file_and_row(tmp_path):
    payloads = [png(noise(i)) for i in range(20)]
    payloads[17], payloads[3] = b"bad", None
    file = write_parquet(tmp_path / "in" / "file.parquet", payloads)
    with pytest.raises(InputError, match="file.parquet row 3 cannot be read"):
        data.build_cache(task(file.parent, tmp_path))
    cache = data.build_cache(task(file.parent, tmp_path, on_error="skip"))
    assert (cache.count, cache.skipped) == (18, ("file.parquet row 3", "file.parquet row 17"))
    assert np.array_equal(cache.load([17])[0], pixels_of(noise(19)))


def test_nothing_readable_is_an_error_even_when_skipping(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"bad")
    with pytest.raises(InputError, match="none of the 1 images .* can be read; the first is a.png"):
        data.build_cache(task(tmp_path / "in", tmp_path, on_error="skip"))
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_decompression_bomb_counts_as_corrupt(tmp_path, monkeypatch):
    folder = write_images(tmp_path / "in")
    noise(0, width=64, height=64).save(folder / "huge.png")
    monkeypatch.setattr(data, "MAX_PIXELS", 64 * 64 - 1)
    with pytest.raises(InputError, match="huge.png cannot be read .*64x64 pixels"):
        data.build_cache(task(folder, tmp_path, resize=True))


def test_missing_empty_and_mixed_folders_are_told_apart(tmp_path):
    with pytest.raises(InputError, match="data.path: no such file or folder: .*nowhere"):
        data.check(str(tmp_path / "nowhere"), 3, SIZE, False)
    with pytest.raises(InputError, match=r"data.path: no images under .*looked for .png, .jpg"):
        data.check(str(tmp_path), 3, SIZE, False)
    write_parquet(tmp_path / "none.parquet", [])
    with pytest.raises(InputError, match="no rows"):
        data.check(str(tmp_path), 3, SIZE, False)
    noise(0).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="both images .a.png. and Parquet .none.parquet."):
        data.check(str(tmp_path), 3, SIZE, False)


def test_parquet_without_images_names_its_columns(tmp_path):
    pq.write_table(pa.table({"img": [b"x"], "label": [1]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="a.parquet has no column image .*its columns: img, label"):
        data.check(str(tmp_path), 3, SIZE, False)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 is not enough")
    with pytest.raises(InputError, match="a.parquet is not a readable Parquet file"):
        data.identity(str(tmp_path))


def test_check_leaves_unreadable_images_to_the_build(tmp_path):
    (tmp_path / "a.png").write_bytes(b"bad")
    assert data.check(str(tmp_path), 3, SIZE, False) == 1


def test_hidden_files_are_not_data_and_linked_folders_are(tmp_path):
    folder, elsewhere = write_images(tmp_path / "in"), write_images(tmp_path / "elsewhere", count=2)
    (folder / "._000.png").write_bytes(b"resource fork")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "loop").symlink_to(folder)
    assert data.check(str(folder), 3, SIZE, False) == 7


# --- Parquet ---------------------------------------------------------------------------------------------------------


def test_plain_binary_column_is_accepted_and_files_follow_in_sorted_order(tmp_path):
    for name, seeds in (("b", (2, 3)), ("a", (0, 1))):
        pq.write_table(pa.table({"image": [png(noise(i)) for i in seeds]}), tmp_path / f"{name}.parquet")
    cache = data.build_cache(task(tmp_path, tmp_path / "out"))
    assert np.array_equal(cache.load(range(4)), [pixels_of(noise(i)) for i in range(4)])


def test_labels_are_kept_and_null_is_minus_one(tmp_path):
    payloads = [png(noise(i)) for i in range(3)]
    write_parquet(tmp_path / "a.parquet", payloads, label=pa.array([4, None, 9], pa.int32()))
    write_parquet(tmp_path / "b.parquet", payloads)
    cache = data.build_cache(task(tmp_path, tmp_path / "out"))
    assert cache.labels.dtype == np.int64 and cache.labels.tolist() == [4, -1, 9, -1, -1, -1]


def test_labels_stay_with_their_images_when_some_are_skipped(tmp_path):
    write_parquet(tmp_path / "a.parquet", [png(noise(0)), b"bad", png(noise(2))], label=pa.array([0, 1, 2]))
    assert data.build_cache(task(tmp_path, tmp_path / "out", on_error="skip")).labels.tolist() == [0, 2]


def test_labels_that_are_no_integers_are_left_out(tmp_path):
    write_parquet(tmp_path / "a.parquet", [png(noise(0))], label=pa.array(["cat"]))
    assert data.build_cache(task(tmp_path, tmp_path / "out")).labels is None
    assert data.labels(str(tmp_path)) is None


def test_labels_of_parquet_are_read_without_its_images(tmp_path, monkeypatch):
    write_parquet(tmp_path / "a.parquet", [b"no image"] * 3, label=pa.array([4, None, 9], pa.uint8()))
    write_parquet(tmp_path / "b.parquet", [])
    write_parquet(tmp_path / "c.parquet", [b"no image"] * 2)
    columns, read = [], pq.ParquetFile.read
    monkeypatch.setattr(pq.ParquetFile, "read", lambda file, columns: asked(columns) or read(file, columns=columns))
    asked = columns.extend
    labels = data.labels(str(tmp_path))
    assert labels.dtype == np.int64 and labels.tolist() == [4, -1, 9, -1, -1]
    assert columns == ["label"]
    write_parquet(tmp_path / "c.parquet", [], label=pa.array([], pa.int64()))
    assert data.labels(str(tmp_path)).tolist() == [4, -1, 9]


def test_damaged_labels_are_refused_with_the_file(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", [b"no image"] * 100, label=pa.array(range(100)))
    column = pq.read_metadata(file).row_group(0).column(2)
    assert column.path_in_schema == "label"
    with file.open("r+b") as stream:
        stream.seek(column.dictionary_page_offset or column.data_page_offset)
        stream.write(b"\xff" * column.total_compressed_size)
    with pytest.raises(InputError, match="data.path: the labels in .*a.parquet cannot be read: "):
        data.labels(str(tmp_path))


# --- a folder per class ----------------------------------------------------------------------------------------------


def write_classes(folder: Path) -> list[tuple[str, int]]:
    """Four images of three classes, in an order of their own; returns every name and its label, in the order of the names."""
    names = ["n02/c.JPEG", "n01/b.png", "n01-x/deep/a.png", "n01/a.png"]  # "-" sorts before "/"
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise(i).save(folder / name)
    (folder / "n02" / "about.txt").write_text("no image")
    (folder / "a-folder-without-images").mkdir()
    (folder / ".hidden").mkdir()
    noise(9).save(folder / ".hidden" / "a.png")
    return sorted((name, {"n01": 0, "n01-x": 1, "n02": 2}[name.partition("/")[0]]) for name in names)


def test_a_folder_per_class_gives_labels_in_the_order_of_the_folders_names(tmp_path):
    named = write_classes(tmp_path / "in")
    expected = [label for _, label in named]
    assert expected == [1, 0, 0, 2]
    labels = data.labels(str(tmp_path / "in"))
    assert labels.dtype == np.int64 and labels.tolist() == expected
    cache = data.build_cache(task(tmp_path / "in", tmp_path, on_error="skip"))
    assert cache.labels.tolist() == expected
    reader = data.ImageReader(str(tmp_path / "in"))
    read = list(reader.read(task(tmp_path / "in", tmp_path), 1, 4))
    assert reader.has_labels and [(image.name, image.label) for image in read] == named[1:]


@pytest.mark.parametrize("name", ["c.png", None], ids=["an image beside the folders", "one folder"])
def test_folders_that_are_no_classes_give_no_labels(tmp_path, name):
    (tmp_path / "in" / "a" / "b").mkdir(parents=True)
    for file in ("a/b/a.png", "a/b.png", *([f"d/{name}", name] if name else [])):
        (tmp_path / "in" / file).parent.mkdir(exist_ok=True)
        noise(0).save(tmp_path / "in" / file)
    assert data.labels(str(tmp_path / "in")) is None
    assert not data.ImageReader(str(tmp_path / "in")).has_labels
    assert data.build_cache(task(tmp_path / "in", tmp_path)).labels is None
    assert data.labels(str(tmp_path / "in" / "a" / "b.png")) is None


def test_labels_by_folder_stay_with_their_images_when_some_are_skipped(tmp_path):
    named = write_classes(tmp_path / "in")
    (tmp_path / "in" / named[1][0]).write_bytes(b"bad")
    assert data.build_cache(task(tmp_path / "in", tmp_path, on_error="skip")).labels.tolist() == [1, 0, 2]


def test_a_cache_is_made_anew_when_its_labels_change(tmp_path):
    write_classes(tmp_path / "in")
    found = [data.build_cache(task(tmp_path / "in", tmp_path))]
    (tmp_path / "in" / "n01-x").rename(tmp_path / "in" / "n09")
    found.append(data.build_cache(task(tmp_path / "in", tmp_path)))
    noise(5).save(tmp_path / "in" / "beside.png")
    found.append(data.build_cache(task(tmp_path / "in", tmp_path)))
    assert [None if cache.labels is None else cache.labels.tolist() for cache in found] == [[1, 0, 0, 2], [0, 0, 1, 2], None]
    assert len({cache.identity for cache in found}) == 3


# --- the file on disk ------------------------------------------------------------------------------------------------


def test_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    folder, decode = write_images(tmp_path / "in"), data._decode

    def interrupted(item, task):
        if item.name == "003.png":
            raise KeyboardInterrupt
        return decode(item, task)

    monkeypatch.setattr(data, "_decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        data.build_cache(task(folder, tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
    monkeypatch.undo()
    assert data.build_cache(task(folder, tmp_path)).count == 5


def test_failing_storage_is_not_taken_for_corrupt_images_and_leaves_nothing(tmp_path, monkeypatch):
    folder = write_images(tmp_path / "in")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for owner, name in ((os, "fsync"), (Path, "read_bytes")):
        monkeypatch.setattr(owner, name, full)
        with pytest.raises(OSError, match="No space left"):
            data.build_cache(task(folder, tmp_path, on_error="skip"))
        monkeypatch.undo()
        assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_second_build_opens_the_first_and_a_changed_request_rebuilds(tmp_path):
    folder, out = write_images(tmp_path / "in"), tmp_path / "images.arrow"
    first = data.build_cache(task(folder, tmp_path))
    made = out.stat().st_ino
    again = data.build_cache(task(folder, tmp_path))
    assert out.stat().st_ino == made and np.array_equal(first.load(range(5)), again.load(range(5)))
    noise(9).save(folder / "009.png")
    assert data.build_cache(task(folder, tmp_path)).count == 6
    assert data.build_cache(task(folder, tmp_path, channels=1)).shape == (1, SIZE, SIZE)
    assert data.build_cache(task(folder, tmp_path, size=4, resize=True)).shape == (3, 4, 4)
    assert first.load([0]).shape == (1, 3, SIZE, SIZE)  # the replaced file stays readable to who had it open
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images.arrow", "in"]


def test_truncated_or_foreign_file_is_named_and_rebuilt(tmp_path):
    folder, out = write_images(tmp_path / "in"), tmp_path / "images.arrow"
    data.build_cache(task(folder, tmp_path))
    whole = out.read_bytes()
    foreign = io.BytesIO()
    with pa.ipc.new_file(foreign, pa.schema([("image", pa.binary(3))])) as writer:
        writer.write_batch(pa.record_batch([pa.array([b"abc"], pa.binary(3))], names=["image"]))
    for broken in (whole[:-1], whole[: len(whole) // 2], b"", b"text", foreign.getvalue()):
        out.write_bytes(broken)
        with pytest.raises(InputError, match="images.arrow is not a complete image cache"):
            data.ImageCache.open(out)
    assert data.build_cache(task(folder, tmp_path)).count == 5 and out.read_bytes() == whole
    with pytest.raises(InputError, match="missing.arrow"):
        data.ImageCache.open(tmp_path / "missing.arrow")


# --- identity --------------------------------------------------------------------------------------------------------


def test_identity_does_not_depend_on_place_and_notices_change(tmp_path):
    folder = write_images(tmp_path / "in")
    before = data.identity(str(folder))
    shutil.copytree(folder, tmp_path / "elsewhere" / "deep")
    assert data.identity(str(tmp_path / "elsewhere" / "deep")) == before
    (folder / "000.png").rename(folder / "0.png")
    renamed = data.identity(str(folder))
    (folder / "0.png").write_bytes((folder / "0.png").read_bytes() + b"!")
    assert len({before, renamed, data.identity(str(folder))}) == 3


def test_identity_of_parquet_notices_other_content_of_equal_size(tmp_path):
    found = set()
    for name, content in (("a", b"\x01"), ("b", b"\x02"), ("c", b"\x01")):
        file = write_parquet(tmp_path / name / "x.parquet", [content * 50])
        found.add((file.stat().st_size, data.identity(str(file.parent))))
    assert len({size for size, _ in found}) == 1 and len(found) == 2
    (tmp_path / "alone").mkdir()
    shutil.copy(EMOJI, tmp_path / "alone")
    assert data.identity(str(EMOJI)) == data.identity(str(EMOJI)) == data.identity(str(tmp_path / "alone"))


# --- the Hub ---------------------------------------------------------------------------------------------------------


def test_hub_data_set_is_downloaded_and_its_sub_folder_used(tmp_path, monkeypatch):
    write_images(tmp_path / "snapshot" / "train")
    asked = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda repo, **kw: asked.update(repo=repo, **kw) or str(tmp_path / "snapshot")
    )
    assert data.check("hf://datasets/org/name/train", 3, SIZE, False) == 5
    assert asked["repo"] == "org/name" and asked["repo_type"] == "dataset"
    assert {"train/*.png", "train/*.JPG", "train/*.parquet"} <= set(asked["allow_patterns"])
    with pytest.raises(InputError, match="no images or Parquet files in hf://datasets/org/name/test"):
        data.resolve("hf://datasets/org/name/test")


def test_hub_refusal_is_one_line_and_a_full_disk_is_not_the_users_mistake(monkeypatch):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    error = huggingface_hub.errors.LocalEntryNotFoundError("Repository Not Found\n\nfor url: x")
    with pytest.raises(InputError, match="^data.path: hf://datasets/org/name cannot be downloaded: Repository Not Found for url: x$"):
        data.resolve("hf://datasets/org/name")
    error = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="No space left"):
        data.resolve("hf://datasets/org/name")


@pytest.mark.parametrize("path", ["hf://models/org/name", "hf://datasets/org", "hf://datasets/org/name/../x"])
def test_malformed_hub_path_is_refused(path):
    with pytest.raises(InputError, match="hf://datasets/ORG/NAME"):
        data.resolve(path)


# --- splitting and ordering ------------------------------------------------------------------------------------------


def test_split_is_a_seeded_partition_of_the_rows(tmp_path):
    train, held = data.split(100, 20, seed=3)
    assert (len(train), len(held)) == (80, 20) and sorted([*train, *held]) == list(range(100))
    assert all(np.array_equal(a, b) for a, b in zip((train, held), data.split(100, 20, seed=3), strict=True))
    assert not np.array_equal(held, data.split(100, 20, seed=4)[1])
    assert np.array_equal(held[:10], data.split(100, 10, seed=3)[1])
    with pytest.raises(InputError, match="100 images held out of 100"):
        data.split(100, 100, seed=3)


@pytest.mark.parametrize(("count", "batch_size"), [(10, 4), (10, 5), (3, 8), (1, 3), (7, 7)])
def test_order_takes_every_row_once_per_epoch_and_fills_every_batch(count, batch_size):
    batches = [data.order(count, batch_size, step, seed=1) for step in range(2 * count)]
    assert all(len(batch) == batch_size for batch in batches)
    epochs = np.concatenate(batches).reshape(-1, count)
    assert len(epochs) == 2 * batch_size
    assert (np.sort(epochs, axis=1) == np.arange(count)).all()
    assert count < 7 or not np.array_equal(epochs[0], epochs[1])


def test_order_of_a_step_does_not_depend_on_history():
    forwards = [data.order(10, 4, step, seed=1) for step in range(20)]
    data._epoch.cache_clear()
    backwards = [data.order(10, 4, step, seed=1) for step in reversed(range(20))][::-1]
    assert np.array_equal(forwards, backwards)
    forwards[0][:] = -1
    assert (data.order(10, 4, 0, seed=1) >= 0).all()
    assert not np.array_equal(data.order(10, 4, 0, seed=2), backwards[0])


def test_a_pattern_names_some_files_of_a_folder(tmp_path):
    for name in ("train-a", "train-b", "test"):
        write_parquet(tmp_path / f"{name}.parquet", [b"no image" if name == "test" else png(noise(0))] * 2)
    assert data.check(str(tmp_path / "train-*.parquet"), 3, SIZE, resize=False) == 4
    assert data.identity(str(tmp_path / "train-*.parquet")) != data.identity(str(tmp_path / "train-a.parquet"))
    with pytest.raises(InputError, match="data.path: no such file or folder: .*valid-"):
        data.check(str(tmp_path / "valid-*.parquet"), 3, SIZE, resize=False)
