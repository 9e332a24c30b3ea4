"""Planning an encode: what is there is not made again, whatever the cluster; what does not fit is refused before work starts."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from orchestrator import encode
from workers import data, first_stage, latents
from workers.contracts import InputError

COUNT, SIDE, LATENT = 10, 16, 8


def picture(seed: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def model(tmp_path) -> Path:
    """A pipeline folder with a tiny VQ first stage and a denoiser's config, which nobody reads."""
    folder = tmp_path / "model"
    first_stage.tiny("vq").save_pretrained(folder / "vqvae")
    (folder / "unet").mkdir()
    (folder / "unet" / "config.json").write_text("{}")
    (folder / "model_index.json").write_text(json.dumps({"vqvae": ["diffusers", "VQModel"]}))
    return folder


@pytest.fixture
def images(tmp_path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(COUNT):
        (folder / f"{i:03d}.png").write_bytes(picture(i))
    return folder


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(latents, "SHARD_ITEMS", 3)


def planned(cache: Path, model: Path, images: Path, **how) -> encode.EncodePlan:
    settings = {"sample_size": LATENT, "resize": False, "on_error": "refuse", "batch_size": 4} | how
    return encode.plan(cache, model=model, data_path=str(images), identity=data.identity(str(images)), **settings)


def made(cache: Path, model: Path, images: Path, slots: int = 1, **how) -> dict:
    found = planned(cache, model, images, **how)
    for batch in encode.batches(found.tasks, slots):
        latents.encode_shards(batch, "cpu")
    return encode.finish(found)


def files(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_a_plan_covers_every_item_once_writes_nothing_and_tells_its_size(tmp_path, model, images):
    found = planned(tmp_path / "cache", model, images)
    assert [(task.start, task.stop) for task in found.tasks] == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert (found.count, found.items, found.finished) == (10, 10, False)
    assert found.bytes == 10 * 2 * 3 * 8 * 8 * 2
    assert not (tmp_path / "cache").exists()
    assert found.folder == tmp_path / "cache" / f"latents-{found.key.digest}"


@pytest.mark.parametrize("slots", [1, 2, 100])
def test_the_size_of_the_cluster_changes_no_byte(tmp_path, model, images, slots):
    one, other = made(tmp_path / "1", model, images), made(tmp_path / "2", model, images, slots)
    assert files(one["path"]) == files(other["path"])
    assert (one["count"], one["skipped"]) == (10, [])


def test_batches_share_out_neighbouring_tasks_evenly():
    tasks = list(range(10))
    for slots in (1, 2, 3, 5, 50):
        parts = encode.batches(tasks, slots)
        assert [task for part in parts for task in part] == tasks
        assert len(parts) == min(10, 2 * slots) and max(map(len, parts)) - min(map(len, parts)) <= 1
    assert encode.batches([], 4) == []


def test_an_interrupted_encode_goes_on_with_the_missing_shards(tmp_path, model, images):
    whole = made(tmp_path / "whole", model, images)
    first = planned(tmp_path / "cache", model, images)
    latents.encode_shards(first.tasks[:1], "cpu")
    with pytest.raises(InputError, match="shard-00001.arrow is not a complete shard"):
        encode.finish(first)
    (first.folder / ".shard-00001.123.tmp.arrow").write_bytes(b"a killed writer's")
    second = planned(tmp_path / "cache", model, images)
    assert [(task.start, task.stop) for task in second.tasks] == [(3, 6), (6, 9), (9, 10)]
    result = made(tmp_path / "cache", model, images)
    assert files(result["path"]) == files(whole["path"])


def test_a_finished_cache_is_not_made_again_and_its_images_are_not_counted(tmp_path, model, images, monkeypatch):
    before = made(tmp_path, model, images)
    monkeypatch.setattr(data, "check", None)
    found = planned(tmp_path, model, images)
    assert (found.tasks, found.count, found.finished, found.bytes) == ((), 10, True, 0)
    assert encode.finish(found) == before


def test_changing_the_denoiser_keeps_the_cache_and_changing_the_first_stage_does_not(tmp_path, model, images):
    made(tmp_path, model, images)
    (model / "unet" / "config.json").write_text('{"changed": true}')
    assert planned(tmp_path, model, images, batch_size=1).finished
    moved = shutil.copytree(model, tmp_path / "elsewhere")
    assert planned(tmp_path, moved, images).finished
    first_stage.tiny("vq", seed=1).save_pretrained(moved / "vqvae")
    assert not planned(tmp_path, moved, images).finished
    for how in ({"dtype": "float32"}, {"math": "tf32"}, {"resize": True}):
        assert not planned(tmp_path, model, images, **how).finished


def test_a_damaged_shard_of_a_finished_cache_is_made_again_alone(tmp_path, model, images):
    before = made(tmp_path / "cache", model, images)
    kept = files(before["path"])
    shard = Path(before["path"]) / "shard-00002.arrow"
    shard.unlink()
    shard.write_bytes(kept[shard.name][:-50])
    assert [task.out for task in planned(tmp_path / "cache", model, images).tasks] == [str(shard)]
    assert made(tmp_path / "cache", model, images) == before and files(before["path"]) == kept


def test_a_cache_put_in_the_place_of_another_is_refused_with_what_differs(tmp_path, model, images):
    other = made(tmp_path / "other", model, images, dtype="float32")
    wanted = planned(tmp_path / "cache", model, images)
    shutil.copytree(other["path"], wanted.folder)
    with pytest.raises(InputError, match="holds other latents: dtype is float32, wanted float16: remove it"):
        planned(tmp_path / "cache", model, images)


def test_unreadable_images_are_skipped_and_named_or_refused_also_by_a_finished_cache(tmp_path, model, images):
    (images / "004.png").write_bytes(b"bad")
    with pytest.raises(InputError, match="004.png cannot be read"):
        made(tmp_path, model, images)
    assert [task.start for task in planned(tmp_path, model, images, on_error="skip").tasks] == [3, 6, 9]  # what was made is kept
    result = made(tmp_path, model, images, on_error="skip")
    assert (result["count"], result["skipped"]) == (9, ["004.png"])
    assert planned(tmp_path, model, images, on_error="skip").count == 10
    with pytest.raises(InputError, match="004.png cannot be read: repair or remove it, or set data.on_error: skip"):
        planned(tmp_path, model, images)


def test_a_scale_that_is_not_the_denoisers_is_remarked_upon(tmp_path, model, images):
    usual = made(tmp_path / "1", model, images)
    stored = model / "vqvae" / "config.json"
    stored.write_text(json.dumps({**json.loads(stored.read_text()), "scaling_factor": 0.01}))
    small = made(tmp_path / "2", model, images)
    assert small["spread"] == pytest.approx(usual["spread"] / 100)
    assert "standard deviation" in small["note"] and "scaling_factor (0.01)" in small["note"]
    assert 0.3 < usual["spread"] < 3 and usual["note"] == ""


def test_bad_input_is_one_line_before_any_work(tmp_path, model, images, emoji):
    with pytest.raises(InputError, match="is a pipeline in pixels: it has no vqvae or vae to encode with"):
        planned(tmp_path, emoji, images)
    with pytest.raises(InputError, match="images are 16x16, the model wants 32x32: set data.resize"):
        planned(tmp_path, model, images, sample_size=16)
    with pytest.raises(InputError, match="latents of dtype 'int8' are unknown"):
        planned(tmp_path, model, images, dtype="int8")
    (model / "vqvae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(InputError, match="holds no .safetensors weights"):
        planned(tmp_path, model, images)
