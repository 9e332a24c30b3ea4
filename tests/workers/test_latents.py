"""The latent cache: what it holds is what the first stage makes of each image, whoever encoded it, however often they were interrupted."""

import dataclasses
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from workers import data, first_stage, latents
from workers.contracts import ImageTask, InputError
from workers.diffusion import pixels

SIDE, LATENT = 16, 8


def png(seed: int, side: int = SIDE) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def write_images(folder: Path, count: int = 10, bad: tuple[int, ...] = ()) -> Path:
    folder.mkdir(parents=True)
    for i in range(count):
        (folder / f"{i:03d}.png").write_bytes(b"bad" if i in bad else png(i))
    return folder


def write_parquet(file: Path, payloads: list, group: int, **columns) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": pa.array(payloads, pa.binary()), **columns}), file, row_group_size=group)
    return file


@pytest.fixture
def stages(tmp_path) -> dict[str, Path]:
    """A first stage of either kind, in its folder."""
    for kind in ("kl", "vq"):
        first_stage.tiny(kind).save_pretrained(tmp_path / kind)
    return {kind: tmp_path / kind for kind in ("kl", "vq")}


def tasks_of(folder: Path, where: Path, images: Path, size: int = 10**6, **how) -> list[latents.EncodeTask]:
    """One task per ``size`` items."""
    how = {"resize": False, "dtype": "float16", "on_error": "refuse", "batch_size": 4} | how
    key = latents.key_of(where, LATENT, how["resize"], how["dtype"], data.identity(str(images)))
    count = data.check(str(images), 3, SIDE, how["resize"])
    ranges = [(start, min(start + size, count)) for start in range(0, count, size)]
    outs = [str(folder / latents.shard_name(i)) for i in range(len(ranges))]
    return [
        latents.EncodeTask(str(images), str(where), key, how["on_error"], how["batch_size"], *items, out)
        for items, out in zip(ranges, outs, strict=True)
    ]


def encode(folder: Path, where: Path, images: Path, **how) -> latents.LatentCache:
    tasks = tasks_of(folder, where, images, **how)
    latents.encode_shards(tasks, "cpu")
    return latents.write_index(folder, tasks[0].key, [(task.start, task.stop) for task in tasks])


def direct(where: Path, images: Path, **how) -> np.ndarray:
    """uint8 [n, C, H, W] from the image cache, encoded one at a time: latents and those of the mirror images, float32 [2, n, c, h, w]."""
    task = ImageTask(str(images), 3, SIDE, how.get("resize", False), how.get("on_error", "refuse"), str(where / "images.arrow"))
    stage, clean = first_stage.load(where), pixels(data.build_cache(task).load(range(data.ImageCache.open(task.out).count)), "cpu")
    return np.stack([[stage.encode(x[None])[0].numpy() for x in side] for side in (clean, clean.flip(-1))])


def both(cache: latents.LatentCache) -> np.ndarray:
    rows = np.arange(cache.count)
    return np.stack([cache.load(rows), cache.load(rows, np.ones(cache.count, bool))])


# --- what is stored --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["kl", "vq"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_cache_is_what_the_first_stage_makes_of_each_image_and_of_its_mirror_image(tmp_path, stages, kind, dtype):
    images = write_images(tmp_path / "in")
    cache = encode(tmp_path / "out", stages[kind], images, dtype=dtype)
    channels = 8 if kind == "kl" else 3
    assert (cache.count, cache.shape, cache.skipped, cache.labels) == (10, (channels // 2 if kind == "kl" else 3, 8, 8), (), None)
    found, expected = both(cache), direct(stages[kind], images)
    assert found.shape == (2, 10, channels, 8, 8) and found.dtype == dtype
    assert np.allclose(found, expected, atol=1e-5 if dtype == "float32" else 2e-3)
    assert not np.allclose(found[1], found[0][..., ::-1], atol=1e-2)  # a mirrored latent is not the latent of the mirror image


def test_bundled_images_are_cropped_and_resized_as_for_the_image_cache(tmp_path, stages, emoji_images):
    records = pq.read_table(emoji_images).slice(0, 20)["image"].to_pylist()
    images = write_parquet(tmp_path / "in" / "a.parquet", [record["bytes"] for record in records], group=6).parent
    cache = encode(tmp_path / "out", stages["vq"], images, resize=True, dtype="float32", size=7)
    assert np.allclose(both(cache), direct(stages["vq"], images, resize=True), atol=1e-5)
    assert (cache.key.resolution, cache.key.crop, cache.key.resize) == (SIDE, "centre", "lanczos")


def test_plain_pyarrow_reads_a_shard(tmp_path, stages):
    cache = encode(tmp_path / "out", stages["kl"], write_images(tmp_path / "in"))
    with pa.ipc.open_file(tmp_path / "out" / "shard-00000.arrow") as reader:
        table = reader.read_all()
    assert table.schema.field("latent").type == table.schema.field("flipped").type == pa.binary(8 * 8 * 8 * 2)
    assert table["row"].to_pylist() == list(range(10)) and table.schema.names == ["latent", "flipped", "row"]
    values = np.frombuffer(table["flipped"][3].as_py(), np.float16).reshape(8, 8, 8)
    assert np.array_equal(values, cache.load([3], np.array([True]))[0])
    about = json.loads(table.schema.metadata[b"diffpruning.latents"])
    assert about["key"] == cache.key.to_json() and about["key"]["data"] == data.identity(str(tmp_path / "in"))


def test_any_rows_can_be_asked_for_in_any_order_each_side_by_itself(tmp_path, stages):
    cache = encode(tmp_path / "out", stages["vq"], write_images(tmp_path / "in"), size=3)
    sides = both(cache)
    rows, flip = [9, 0, 3, 2, 2, 9], np.array([True, False, True, True, False, False])
    assert np.array_equal(cache.load(rows, flip), sides[flip.astype(int), rows])
    assert cache.load([]).shape == (0, 3, 8, 8)
    for row in (-1, 10):
        with pytest.raises(IndexError, match=r"\[0, 10\)"):
            cache.load([0, row])


def test_labels_are_kept_and_null_is_minus_one(tmp_path, stages):
    write_parquet(tmp_path / "in" / "a.parquet", [png(i) for i in range(3)], 2, label=pa.array([4, None, 9], pa.int32()))
    write_parquet(tmp_path / "in" / "b.parquet", [png(i) for i in range(2)], 2)
    cache = encode(tmp_path / "out", stages["vq"], tmp_path / "in", size=2)
    assert cache.labels.dtype == np.int64 and cache.labels.tolist() == [4, -1, 9, -1, -1]
    assert pa.ipc.open_file(tmp_path / "out" / "shard-00000.arrow").read_all()["label"].to_pylist() == [4, None]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux only")
def test_the_cache_is_read_in_place_and_not_copied(tmp_path, stages):
    cache = encode(tmp_path / "out", stages["vq"], write_images(tmp_path / "in"), size=5)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path / "out") in line]
    mapped = [(Path(line[5]).name, *(int(end, 16) for end in line[0].split("-"))) for line in maps]
    assert {name for name, _, _ in mapped} == {"shard-00000.arrow", "shard-00001.arrow"}
    for side in cache._sides:
        for block in side:
            assert any(start <= block.ctypes.data and block.ctypes.data + block.nbytes <= stop for _, start, stop in mapped)
            assert not block.flags.writeable


# --- who encodes, and how often --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_one_shard_equals_four_and_the_batch_size_changes_nothing(tmp_path, stages, kind):
    images = write_images(tmp_path / "in")
    one = both(encode(tmp_path / "1", stages[kind], images, dtype="float32"))
    four = both(encode(tmp_path / "4", stages[kind], images, dtype="float32", size=3))
    alone = both(encode(tmp_path / "b", stages[kind], images, dtype="float32", batch_size=1))
    assert len(list((tmp_path / "4").glob("shard-*"))) == 4
    assert np.allclose(one, four, atol=1e-5) and np.allclose(one, alone, atol=1e-5)


def test_an_interrupted_encode_resumes_shard_by_shard_and_ends_in_the_same_bytes(tmp_path, stages):
    images = write_images(tmp_path / "in")
    encode(tmp_path / "whole", stages["kl"], images, size=3)
    tasks = tasks_of(tmp_path / "broken", stages["kl"], images, size=3)

    def interrupt(items: int) -> None:
        if items > 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        latents.encode_shards(tasks, "cpu", interrupt)
    assert os.listdir(tmp_path / "broken") == ["shard-00000.arrow"]
    made = (tmp_path / "broken" / "shard-00000.arrow").stat().st_mtime_ns
    progress: list[int] = []
    latents.encode_shards(tasks, "cpu", progress.append)
    assert progress == [3, 6, 6, 9, 9, 10, 10]
    assert (tmp_path / "broken" / "shard-00000.arrow").stat().st_mtime_ns == made
    latents.write_index(tmp_path / "broken", tasks[0].key, [(task.start, task.stop) for task in tasks])
    names = sorted(os.listdir(tmp_path / "whole"))
    assert names == sorted(os.listdir(tmp_path / "broken")) == ["index.json", *(latents.shard_name(i) for i in range(4))]
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()


def test_a_killed_writer_leaves_no_shard_and_its_shard_is_made_again(tmp_path, stages, monkeypatch):
    tasks = tasks_of(tmp_path / "out", stages["vq"], write_images(tmp_path / "in"))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        latents.encode_shards(tasks[:1], "cpu")
    monkeypatch.undo()
    assert os.listdir(tmp_path / "out") == []
    latents.encode_shards(tasks[:1], "cpu")
    assert os.listdir(tmp_path / "out") == ["shard-00000.arrow"]


def test_shards_depend_on_the_items_and_the_size_of_a_latent_alone(tmp_path, stages, monkeypatch):
    key = latents.key_of(stages["kl"], 64, False, "float16", "data")
    assert key.row_bytes == 8 * 64 * 64 * 2
    ranges = latents.shard_ranges(5000, key)
    assert ranges == [(0, 2048), (2048, 4096), (4096, 5000)]
    assert latents.shard_ranges(5000, dataclasses.replace(key, shape=(4, 8, 8))) == [(0, 4096), (4096, 5000)]
    assert latents.shard_ranges(2, dataclasses.replace(key, shape=(4, 4096, 4096))) == [(0, 1), (1, 2)]
    assert latents.shard_ranges(0, key) == []


def test_latents_of_a_folder_per_class_have_its_labels(tmp_path, stages):
    for i, name in enumerate("bacab"):
        (tmp_path / "in" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name / f"{i}.png").write_bytes(b"bad" if i == 3 else png(i))
    cache = encode(tmp_path / "out", stages["vq"], tmp_path / "in", size=2, on_error="skip")
    assert cache.labels.tolist() == [0, 1, 1, 2] and cache.rows.tolist() == [0, 2, 3, 4]
    assert cache.skipped == ("a/3.png",)


# --- a range of a data set -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [1, 3, 100])
def test_any_range_of_a_data_set_is_the_same_range_of_all_of_it(tmp_path, group):
    write_parquet(tmp_path / "in" / "a.parquet", [png(i) for i in range(7)], group, label=list(range(7)))
    write_parquet(tmp_path / "in" / "b.parquet", [], group, label=pa.array([], pa.int64()))
    write_parquet(tmp_path / "in" / "c.parquet", [png(i) for i in range(7, 12)], group)
    task = ImageTask(str(tmp_path / "in"), 3, SIDE, False, "refuse", str(tmp_path / "images.arrow"))
    everything, reader = data.build_cache(task).load(range(12)), data.ImageReader(task.path)
    assert (reader.count, reader.has_labels, reader.identity()) == (12, True, data.identity(task.path))
    for start, stop in [(0, 12), (0, 0), (0, 3), (2, 5), (5, 9), (6, 7), (7, 12), (11, 12), (12, 12)]:
        read = list(reader.read(task, start, stop, ahead=2))
        assert [image.row for image in read] == list(range(start, stop))
        assert [image.label for image in read] == [row if row < 7 else None for row in range(start, stop)]
        assert all(np.array_equal(image.pixels, everything[image.row]) for image in read)
        assert [image.name for image in read if image.row in (6, 8)] == [
            name for row, name in ((6, "a.parquet row 6"), (8, "c.parquet row 1")) if start <= row < stop
        ]


def test_row_groups_outside_a_range_are_not_read(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", [png(i) for i in range(8)], 2)
    column = pq.read_metadata(file).row_group(0).column(0)
    with file.open("r+b") as stream:  # the first row group's pages
        stream.seek(column.data_page_offset if column.dictionary_page_offset is None else column.dictionary_page_offset)
        stream.write(b"\xff" * 64)
    task = ImageTask(str(file), 3, SIDE, False, "refuse", "")
    assert [image.row for image in data.ImageReader(str(file)).read(task, 2, 8)] == list(range(2, 8))
    with pytest.raises(InputError, match="a.parquet is damaged after row 0"):
        list(data.ImageReader(str(file)).read(task, 1, 8))


# --- unreadable images -----------------------------------------------------------------------------------------------


def test_skipped_images_leave_the_rows_of_the_image_cache_and_are_named(tmp_path, stages):
    images = write_images(tmp_path / "in", bad=(0, 4, 9))
    cache = encode(tmp_path / "out", stages["vq"], images, size=4, dtype="float32", on_error="skip")
    assert (cache.count, cache.skipped) == (7, ("000.png", "004.png", "009.png"))
    assert cache.rows.tolist() == [1, 2, 3, 5, 6, 7, 8]
    assert np.allclose(both(cache), direct(stages["vq"], images, on_error="skip"), atol=1e-5)
    assert json.loads((tmp_path / "out" / "index.json").read_text())["skipped"] == list(cache.skipped)


def test_an_unreadable_image_is_refused_by_name_and_its_shard_not_written(tmp_path, stages):
    images = write_images(tmp_path / "in", bad=(5,))
    tasks = tasks_of(tmp_path / "out", stages["vq"], images, size=4)
    with pytest.raises(InputError, match="005.png cannot be read .*set data.on_error: skip"):
        latents.encode_shards(tasks, "cpu")
    assert os.listdir(tmp_path / "out") == ["shard-00000.arrow"]
    skipping = tasks_of(tmp_path / "out", stages["vq"], images, size=4, on_error="skip")
    assert latents.read_shard(skipping[0]) is not None  # made under refusal: nothing of it was skipped
    latents.encode_shards(skipping, "cpu")
    assert [latents.read_shard(task) is None for task in skipping] == [False, False, False]
    assert [latents.read_shard(task) is None for task in tasks] == [False, True, False]


def test_a_shard_without_a_readable_image_is_empty_and_a_cache_without_one_is_refused(tmp_path, stages):
    images = write_images(tmp_path / "in", count=4, bad=(0, 1))
    cache = encode(tmp_path / "1", stages["vq"], images, size=2, on_error="skip")
    assert cache.count == 2 and cache.rows.tolist() == [2, 3]
    assert cache.load([0, 1]).shape == (2, 3, 8, 8)
    with pytest.raises(InputError, match="none of the 2 images can be read; the first is 000.png"):
        encode(tmp_path / "2", stages["vq"], write_images(tmp_path / "in2", count=2, bad=(0, 1)), on_error="skip")


def test_an_image_of_another_size_is_refused_unless_it_is_to_be_resized(tmp_path, stages):
    images = write_images(tmp_path / "in")
    (images / "odd.png").write_bytes(png(0, side=24))
    with pytest.raises(InputError, match="odd.png is 24x24, the model wants 16x16: set data.resize"):
        encode(tmp_path / "1", stages["vq"], images)
    assert encode(tmp_path / "2", stages["vq"], images, resize=True).count == 11


def test_a_latent_that_its_dtype_cannot_hold_is_refused_by_the_name_of_its_image(tmp_path, stages):
    tensor = "quant_conv.bias"
    model = first_stage.tiny("vq")
    model.get_parameter(tensor).data.fill_(1e6)
    model.save_pretrained(tmp_path / "large")
    images = write_images(tmp_path / "in")
    with pytest.raises(InputError, match="the latent of 000.png is not finite in float16: .* store float32"):
        encode(tmp_path / "1", tmp_path / "large", images)
    assert encode(tmp_path / "2", tmp_path / "large", images, dtype="float32").load([0]).min() > 9e5


# --- strict keys -----------------------------------------------------------------------------------------------------


def test_a_cache_of_another_key_is_refused_with_every_field_that_differs(tmp_path, stages):
    cache = encode(tmp_path / "out", stages["vq"], write_images(tmp_path / "in"))
    assert latents.LatentCache.open(tmp_path / "out", cache.key).count == 10
    changes = {
        "first_stage": "0" * 64,
        "kind": "kl",
        "shape": (4, 8, 8),
        "scaling_factor": 0.5,
        "resolution": 32,
        "crop": "centre",
        "resize": "lanczos",
        "dtype": "float32",
        "math": "tf32",
        "data": "1" * 64,
    }
    assert set(changes) == {field.name for field in dataclasses.fields(latents.LatentKey)}
    for name, value in changes.items():
        wanted = dataclasses.replace(cache.key, **{name: value})
        assert wanted.digest != cache.key.digest
        with pytest.raises(InputError, match=f"holds other latents: {name} is .*, wanted ") as caught:
            latents.LatentCache.open(tmp_path / "out", wanted)
        assert str(caught.value).count("wanted") == 1 and "\n" not in str(caught.value)
    wanted = dataclasses.replace(cache.key, resolution=32, dtype="float32")
    with pytest.raises(InputError, match="resolution is 16, wanted 32; dtype is float16, wanted float32: remove it or encode elsewhere"):
        latents.LatentCache.open(tmp_path / "out", wanted)


def test_key_and_task_survive_json_and_unknown_precisions_are_refused(tmp_path, stages):
    [task] = tasks_of(tmp_path / "out", stages["kl"], write_images(tmp_path / "in"))
    assert latents.EncodeTask.from_json(json.loads(json.dumps(task.to_json()))) == task
    assert latents.LatentKey.from_json(task.key.to_json()).digest == task.key.digest
    with pytest.raises(InputError, match="latents of dtype 'bfloat16' are unknown: known are float16, float32"):
        dataclasses.replace(task.key, dtype="bfloat16")
    with pytest.raises(InputError, match="latents computed in 'float16' are unknown: known are float32, tf32"):
        dataclasses.replace(task.key, math="float16")


def test_nothing_of_the_denoiser_is_in_the_key_and_a_moved_data_set_keeps_it(tmp_path, stages):
    images = write_images(tmp_path / "in")
    [task] = tasks_of(tmp_path / "out", stages["vq"], images)
    shutil.copytree(images, tmp_path / "moved")
    shutil.copytree(stages["vq"], tmp_path / "copied")
    [other] = tasks_of(tmp_path / "out", tmp_path / "copied", tmp_path / "moved")
    assert other.key == task.key and {field.name for field in dataclasses.fields(task.key)}.isdisjoint({"sampler", "unet", "model"})


def test_images_or_first_stage_that_change_under_way_are_refused(tmp_path, stages):
    images = write_images(tmp_path / "in")
    tasks = tasks_of(tmp_path / "out", stages["vq"], images)
    (images / "new.png").write_bytes(png(99))
    with pytest.raises(InputError, match=r"changed while their latents were made \(data is .*, wanted .*\): run the same command again"):
        latents.encode_shards(tasks, "cpu")
    (images / "new.png").unlink()
    first_stage.tiny("vq", seed=1).save_pretrained(stages["vq"])
    with pytest.raises(InputError, match="changed while .*first_stage is"):
        latents.encode_shards(tasks, "cpu")


# --- damage ----------------------------------------------------------------------------------------------------------


def test_truncated_missing_or_foreign_shard_is_named_and_made_again(tmp_path, stages):
    images = write_images(tmp_path / "in")
    tasks = tasks_of(tmp_path / "out", stages["vq"], images, size=5)
    encode(tmp_path / "out", stages["vq"], images, size=5)
    shard = tmp_path / "out" / "shard-00001.arrow"
    whole = shard.read_bytes()
    first = (tmp_path / "out" / "shard-00000.arrow").read_bytes()
    for broken in (whole[:-1], whole[:100], b"", b"text", None, first):
        shard.unlink(missing_ok=True)  # a shard in use is replaced, never written to
        if broken is not None:
            shard.write_bytes(broken)
        said = "holds items 0..5, wanted 5..10" if broken is first else "is not a complete shard of latents .*encode again"
        with pytest.raises(InputError, match=f"shard-00001.arrow {said}") as caught:
            latents.LatentCache.open(tmp_path / "out")
        assert "\n" not in str(caught.value)
        latents.encode_shards(tasks, "cpu")
        assert shard.read_bytes() == whole and latents.LatentCache.open(tmp_path / "out").count == 10


def test_an_unfinished_or_damaged_index_is_said_to_be_so(tmp_path, stages):
    tasks = tasks_of(tmp_path / "out", stages["vq"], write_images(tmp_path / "in"), size=5)
    latents.encode_shards(tasks[:1], "cpu")
    with pytest.raises(InputError, match="holds no index.json: it is no latent cache, or is not finished"):
        latents.LatentCache.open(tmp_path / "out")
    with pytest.raises(InputError, match="shard-00001.arrow is not a complete shard"):
        latents.write_index(tmp_path / "out", tasks[0].key, [(0, 5), (5, 10)])
    for damaged in ("{", "[]", "{}"):
        (tmp_path / "out" / "index.json").write_text(damaged)
        with pytest.raises(InputError, match="index.json is damaged .*: delete it and encode again"):
            latents.LatentCache.open(tmp_path / "out")
    newer = {"key": {**tasks[0].key.to_json(), "schema": 2}, "shards": []}
    (tmp_path / "out" / "index.json").write_text(json.dumps(newer))
    with pytest.raises(InputError, match="schema 2 is not 1: use the version of diffpruning that wrote it"):
        latents.LatentCache.open(tmp_path / "out")


def test_spread_is_the_deviation_of_a_drawn_latent_in_the_denoisers_scale(tmp_path, stages):
    images = write_images(tmp_path / "in")
    for kind, scale in (("vq", 1.0), ("kl", 0.5)):
        cache = encode(tmp_path / f"out-{kind}", stages[kind], images, dtype="float32")
        encoded = torch.from_numpy(cache.load(range(10)))
        if kind == "kl":
            mean, log_variance = encoded.chunk(2, 1)
            gen = torch.Generator().manual_seed(0)
            encoded = torch.cat([mean + (log_variance / 2).exp() * torch.randn(mean.shape, generator=gen) for _ in range(50)])
        assert cache.spread() == pytest.approx(scale * float(encoded.std()), rel=0.02)
        assert cache.spread(most=3) == pytest.approx(cache.spread(), rel=0.2)
