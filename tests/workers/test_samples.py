"""What training reads: the same call for pixels and latents, in the denoiser's scale, whoever shares the batch."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from workers import data, first_stage, latents, samples
from workers.contracts import ImageTask, InputError
from workers.diffusion import generator, pixels

COUNT, SIDE = 6, 16


def png(seed: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def images(tmp_path) -> Path:
    payloads, labels = pa.array([png(i) for i in range(COUNT)], pa.binary()), pa.array([3, 1, None, 4, 1, 5])
    pq.write_table(pa.table({"image": payloads, "label": labels}), tmp_path / "in.parquet")
    return tmp_path / "in.parquet"


def opened(kind: str, images: Path, dtype: str = "float32") -> samples.Samples:
    """Pixels, or the latents of a random first stage in two shards."""
    folder = images.parent
    if kind == "pixels":
        data.build_cache(ImageTask(str(images), 3, SIDE, False, "refuse", str(folder / "images.arrow")))
        return samples.open_samples(folder / "images.arrow")
    model = first_stage.tiny(kind)
    model.register_to_config(scaling_factor=0.25)
    model.save_pretrained(folder / kind)
    key = latents.key_of(folder / kind, 8, False, dtype, data.identity(str(images)))
    ranges = [(0, 4), (4, COUNT)]
    out = folder / f"latents-{kind}-{dtype}"
    tasks = [
        latents.EncodeTask(str(images), str(folder / kind), key, "refuse", 4, *items, str(out / latents.shard_name(i)))
        for i, items in enumerate(ranges)
    ]
    latents.encode_shards(tasks, "cpu")
    latents.write_index(out, key, ranges)
    return samples.open_samples(out)


def pictures(images: Path) -> torch.Tensor:
    return pixels(np.stack([np.asarray(Image.open(io.BytesIO(png(i)))).transpose(2, 0, 1) for i in range(COUNT)]), "cpu")


@pytest.mark.parametrize("kind", ["pixels", "vq", "kl"])
def test_all_kinds_answer_the_same_questions(images, kind):
    found = opened(kind, images)
    assert found.count == COUNT and found.shape == {"pixels": (3, 16, 16), "vq": (3, 8, 8), "kl": (4, 8, 8)}[kind]
    assert found.identity == data.identity(str(images))
    assert found.labels.tolist() == [3, 1, -1, 4, 1, 5]
    labels = found.labels_of([5, 0, 2])
    assert labels.dtype == torch.int64 and labels.tolist() == [5, 3, -1]
    clean = found.clean((4, 0, 4), "cpu", torch.tensor([True, False, False]), generator("cpu", 1))
    assert clean.shape == (3, *found.shape) and clean.dtype == torch.float32 and clean.is_contiguous()
    assert found.clean([], "cpu").shape == (0, *found.shape)
    with pytest.raises(IndexError):
        found.clean([COUNT], "cpu")


def test_pixels_are_those_of_the_image_cache_and_are_mirrored_where_asked(images):
    found, expected = opened("pixels", images), pictures(images)
    rows, flip = [5, 1, 1], torch.tensor([False, True, False])
    assert torch.equal(found.clean(rows, "cpu"), expected[rows])
    assert torch.equal(found.clean(rows, "cpu", flip), torch.stack([expected[5], expected[1].flip(-1), expected[1]]))


def test_vq_latents_are_the_scaled_encoding_of_the_picture_or_of_its_mirror_image(images):
    found, x = opened("vq", images), pictures(images)
    stage = first_stage.load(images.parent / "vq")
    rows, flip = [5, 1, 4], torch.tensor([False, True, True])
    expected = 0.25 * stage.encode(torch.stack([x[5], x[1].flip(-1), x[4].flip(-1)]))
    assert torch.allclose(found.clean(rows, "cpu", flip, generator("cpu", 1)), expected, atol=1e-5)
    assert torch.allclose(stage.decode(found.clean(rows, "cpu", flip)), stage.decode(expected), atol=1e-4)


def test_kl_latents_are_drawn_anew_about_their_mean_and_without_a_generator_are_the_mean(images):
    found, x = opened("kl", images), pictures(images)
    mean, log_variance = first_stage.load(images.parent / "kl").encode(x).chunk(2, 1)
    rows = list(range(COUNT))
    assert torch.allclose(found.clean(rows, "cpu"), 0.25 * mean, atol=1e-5)
    draws = torch.stack([found.clean(rows, "cpu", gen=generator("cpu", epoch)) for epoch in range(400)])
    assert not torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], found.clean(rows, "cpu", gen=generator("cpu", 0)))
    deviation = 0.25 * (log_variance / 2).exp()
    standard = (draws - 0.25 * mean) / deviation
    assert abs(float(standard.mean())) < 0.01 and float(standard.std()) == pytest.approx(1, abs=0.01)
    assert (standard.mean(0).abs() < 6 / 400**0.5).all() and (standard.std(0) - 1).abs().max() < 0.25
    noise = torch.randn(COUNT, 4, 8, 8, generator=generator("cpu", 7))
    assert torch.allclose(found.clean(rows, "cpu", gen=generator("cpu", 7)), 0.25 * mean + deviation * noise, atol=1e-5)


@pytest.mark.parametrize("kind", ["pixels", "vq", "kl"])
def test_ranks_that_share_a_batch_read_the_rows_of_the_whole(images, kind):
    found = opened(kind, images)
    rows, flip = [3, 5, 0, 2, 1], torch.tensor([True, False, True, False, True])
    whole = found.clean(rows, "cpu", flip, generator("cpu", 1))
    for rank in range(2):
        mine = slice(rank, None, 2)
        assert torch.equal(found.clean(rows, "cpu", flip, generator("cpu", 1), mine), whole[mine])


@pytest.mark.parametrize("kind", ["vq", "kl"])
def test_half_precision_latents_are_read_as_float32(images, kind):
    exact, half = (opened(kind, images, dtype).clean(range(COUNT), "cpu") for dtype in ("float32", "float16"))
    assert half.dtype == torch.float32 and 0 < (exact - half).abs().max() < 1e-3


def test_images_without_labels_are_said_to_have_none(images):
    found = opened("pixels", images)
    found.labels = None
    with pytest.raises(InputError, match="the images have no labels, which a class-conditional model needs"):
        found.labels_of([0])


def test_what_is_no_cache_is_named(tmp_path):
    with pytest.raises(InputError, match="nothing.arrow is not a complete image cache"):
        samples.open_samples(tmp_path / "nothing.arrow")
    with pytest.raises(InputError, match="holds no index.json"):
        samples.open_samples(tmp_path)


def test_a_log_variance_out_of_range_is_clipped_as_in_diffusers(images):
    found = opened("kl", images)
    load = found.cache.load
    found.cache.load = lambda rows, flip=None: np.concatenate([load(rows)[:, :4], np.full_like(load(rows)[:, 4:], 90)], 1)
    drawn = found.clean([0], "cpu", gen=generator("cpu", 1))
    noise = torch.randn(1, 4, 8, 8, generator=generator("cpu", 1))
    assert torch.allclose(drawn, 0.25 * np.exp(10.0) * noise, rtol=1e-3, atol=1)
