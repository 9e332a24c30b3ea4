"""Planning sees, before anything is computed, that the labels of the images are classes of the model."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from diffusers import DDPMScheduler
from PIL import Image

from orchestrator.config import load_job
from orchestrator.planning import prepare
from workers import families
from workers.conditioning import EMBEDDER, ClassEmbedder
from workers.contracts import InputError

CLASSES, COUNT, SIDE = 4, 24, 16


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A class-conditional pipeline in pixels."""
    folder = tmp_path_factory.mktemp("model")
    families.family("unet2d_condition").tiny().save_pretrained(folder / "unet")
    DDPMScheduler().save_pretrained(folder / "scheduler")
    ClassEmbedder(CLASSES + 1, 24, CLASSES).save_pretrained(folder / EMBEDDER)
    return folder


def png(seed: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def parquet(folder: Path, **columns) -> Path:
    pq.write_table(pa.table({"image": pa.array([png(i) for i in range(COUNT)], pa.binary()), **columns}), folder / "a.parquet")
    return folder / "a.parquet"


def folders(folder: Path, classes: int) -> Path:
    for i in range(COUNT):
        (folder / "in" / f"n{i % classes}").mkdir(parents=True, exist_ok=True)
        (folder / "in" / f"n{i % classes}" / f"{i:02d}.png").write_bytes(png(i))
    return folder / "in"


def plan(model: Path, images: Path, folder: Path):
    return prepare(
        load_job(
            "quickstart",
            [
                f"model.path={model}",
                f"data.path={images}",
                f"storage.path={folder / 'runs'}",
                f"registry.path={folder / 'registry'}",
                "data.holdout=4",
                "elastic.width_multiple=1",
                *("similarity.images=16", "similarity.batch_size=4"),
                *("evaluate.images=4", "evaluate.samples=4", "evaluate.shards=1"),
            ],
        )
    )


def test_images_in_a_folder_per_class_or_with_labels_are_accepted(model, tmp_path):
    assert plan(model, folders(tmp_path, CLASSES), tmp_path).images == COUNT
    assert plan(model, parquet(tmp_path, label=[i % CLASSES for i in range(COUNT)]), tmp_path).images == COUNT


def refused(model: Path, images: Path, folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        plan(model, images, folder)
    assert "\n" not in str(caught.value) and not (folder / "runs").exists()
    return str(caught.value)


def test_a_label_beyond_the_classes_is_refused_with_image_label_and_classes(model, tmp_path):
    images = parquet(tmp_path, label=[0] * 20 + [CLASSES] * 4)
    assert refused(model, images, tmp_path) == (
        f"data.path: {images}: image 20 has label {CLASSES}, but the model has the classes 0 to {CLASSES - 1}"
    )
    assert f"image 20 has label {CLASSES}, but the model has" in refused(model, folders(tmp_path, CLASSES + 1), tmp_path)


def test_a_null_label_is_refused_with_its_image(model, tmp_path):
    images = parquet(tmp_path, label=pa.array([0, None] * (COUNT // 2)))
    assert "image 1 has label -1" in refused(model, images, tmp_path)


def test_images_without_labels_are_refused_with_the_remedy(model, tmp_path):
    for images in (parquet(tmp_path), parquet(tmp_path, label=["cat"] * COUNT), folders(tmp_path, 1)):
        assert refused(model, images, tmp_path).startswith(
            f"data.path: {images} has no labels, but the model is told a class: give Parquet"
        )
