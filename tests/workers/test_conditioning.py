"""Labels as a denoiser is told them: which are legal, which are forgotten in training, and where guidance leads."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

from workers import conditioning, families
from workers.conditioning import EMBEDDER, ClassEmbedder, Classes, Conditioner
from workers.contracts import InputError, derive_seed

TOLD = "encoder_hidden_states"


def write_pipeline(folder: Path, unet: torch.nn.Module, embedder: ClassEmbedder | None = None) -> Path:
    unet.save_pretrained(folder / "unet")
    DDPMScheduler().save_pretrained(folder / "scheduler")
    if embedder is not None:
        embedder.save_pretrained(folder / EMBEDDER)
    return folder


def labelled_unet(classes: int | None) -> UNet2DModel:
    blocks = {"block_out_channels": (16,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    return UNet2DModel(sample_size=8, layers_per_block=1, norm_num_groups=4, num_class_embeds=classes, **blocks)


def token_unet() -> torch.nn.Module:
    return families.family("unet2d_condition").tiny()


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_pipeline(tmp_path, token_unet(), ClassEmbedder(11, 24, 10))


# --- which classes there are ----------------------------------------------------------------------------------------


def test_an_unconditional_model_has_no_classes_and_takes_any_images(emoji):
    found = conditioning.describe(emoji)
    assert found == Classes(None) and found.of_seeds([1, 2]) is None
    found.check(None, "data")
    found.check(np.array([-1, 99]), "data")
    assert conditioning.load(emoji)(None) == {}


def test_a_model_that_is_told_labels_has_them_all_and_no_null_class(tmp_path):
    folder = write_pipeline(tmp_path, labelled_unet(10))
    assert conditioning.describe(folder) == conditioning.load(folder).classes == Classes("class_labels", 10)
    labels = torch.tensor([0, 9])
    assert conditioning.load(folder)(labels)["class_labels"] is labels


@pytest.mark.parametrize(("embedder", "classes"), [((11, 24, 10), Classes(TOLD, 10, 10)), ((11, 24), Classes(TOLD, 11))])
def test_a_model_that_is_told_tokens_has_the_classes_of_its_embedder(tmp_path, embedder, classes):
    made = ClassEmbedder(*embedder)
    folder = write_pipeline(tmp_path, token_unet(), made)
    loaded = conditioning.load(folder)
    assert conditioning.describe(folder) == loaded.classes == made.classes == classes
    labels = torch.tensor([3, 0, 10])
    told = loaded(labels)
    assert told.keys() == {TOLD} and told[TOLD].shape == (3, 1, 24)
    assert torch.equal(told[TOLD][:, 0], made.embedding.weight[labels])
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())


def test_a_model_that_is_told_text_is_refused(tmp_path):
    folder = write_pipeline(tmp_path, token_unet())
    with pytest.raises(InputError, match="holds no class_embedder: only class-conditional models are supported, not text"):
        conditioning.describe(folder)


def test_an_embedder_of_another_model_is_refused_with_both_numbers(tmp_path):
    folder = write_pipeline(tmp_path, token_unet(), ClassEmbedder(11, 32, 10))
    with pytest.raises(InputError, match="class_embedder makes tokens of 32 numbers, the denoiser wants 24"):
        conditioning.load(folder)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"null_class": 3}, "null_class is 3: it is the last of 11 classes, after a real one, or null"),
        ({"num_classes": 1, "null_class": 0}, "null_class is 0: it is the last of 1 classes, after a real one, or null"),
        ({"num_classes": "many"}, "num_classes is 'many': it is a whole number above 0"),
        ({"num_classes": None}, "num_classes is None"),
    ],
)
def test_numbers_of_an_embedder_that_mean_nothing_are_refused(folder, change, told):
    about = folder / EMBEDDER / "config.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | change))
    with pytest.raises(InputError, match=told):
        conditioning.describe(folder)


def test_an_embedder_cannot_be_built_with_another_null_class_than_the_last():
    with pytest.raises(InputError, match="null_class is 11"):
        ClassEmbedder(11, 24, 11)


@pytest.mark.parametrize("how", ["truncated", "missing", "another shape", "another key", "NaN"])
def test_damaged_weights_of_an_embedder_are_refused_in_one_line(folder, how):
    weights = folder / EMBEDDER / "diffusion_pytorch_model.safetensors"
    [(key, value)] = load_file(weights).items()
    match how:
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-10])
        case "missing":
            weights.unlink()
        case "another shape":
            save_file({key: value[:-1].clone()}, weights)
        case "another key":
            save_file({"weight": value}, weights)
        case "NaN":
            save_file({key: value.clone().fill_(float("nan"))}, weights)
    with pytest.raises(InputError, match="model.path: the weights in .*class_embedder (cannot be read|do not fit|are damaged)") as caught:
        conditioning.load(folder)
    assert "\n" not in str(caught.value)


# --- which labels are legal -----------------------------------------------------------------------------------------


def test_labels_of_all_classes_are_legal_and_the_null_class_is_none_of_them():
    classes = Classes(TOLD, 10, 10)
    classes.check(np.arange(10), "data")
    with pytest.raises(InputError, match="^data: image 2 has label 10, but the model has the classes 0 to 9$"):
        classes.check(np.array([0, 9, 10, 11]), "data")
    Classes(TOLD, 11).check(np.arange(11), "data")


def test_a_missing_label_and_missing_labels_are_refused():
    classes = Classes("class_labels", 10)
    with pytest.raises(InputError, match="data: image 1 has label -1"):
        classes.check(np.array([0, -1]), "data")
    with pytest.raises(InputError, match="^data has no labels, but the model is told a class: give .*label, or a folder per class$"):
        classes.check(None, "data")


def test_the_class_of_a_sample_depends_on_its_own_seed_alone_and_is_never_null():
    classes = Classes(TOLD, 3, 3)
    drawn = classes.of_seeds(range(300))
    assert drawn == [classes.of_seeds([seed])[0] for seed in range(300)]
    assert drawn[7] == derive_seed(7, "class") % 3
    assert min(np.bincount(drawn, minlength=3)) > 70 and len(np.bincount(drawn)) == 3


# --- forgetting -----------------------------------------------------------------------------------------------------


def forget(null: int | None, fraction: float, seed: int = 0, count: int = 10_000) -> torch.Tensor:
    labels = torch.arange(count) % 10
    return Conditioner(Classes(TOLD, 10, null), None).forget(labels, fraction, torch.Generator().manual_seed(seed))


def test_the_asked_part_of_the_labels_becomes_the_null_class_and_the_others_stay():
    found = forget(10, 0.1)
    lost = found == 10
    assert float(lost.float().mean()) == pytest.approx(0.1, abs=0.01)
    assert torch.equal(found[~lost], (torch.arange(10_000) % 10)[~lost]) and found.dtype == torch.int64
    assert torch.equal(forget(10, 0.0), torch.arange(10_000) % 10) and (forget(10, 1.0) == 10).all()


def test_forgetting_depends_on_the_generator_alone():
    assert torch.equal(forget(10, 0.5, seed=1), forget(10, 0.5, seed=1))
    assert not torch.equal(forget(10, 0.5, seed=1), forget(10, 0.5, seed=2))


def test_nothing_is_forgotten_without_a_null_class_or_without_labels():
    assert torch.equal(forget(None, 1.0), torch.arange(10_000) % 10)
    assert Conditioner(Classes(None), None).forget(None, 1.0, torch.Generator()) is None


# --- guidance -------------------------------------------------------------------------------------------------------


def told_model(x, t, **told):
    """Answers with what it was told, so that a guided answer can be computed by hand."""
    return SimpleNamespace(sample=x * t + told[TOLD][:, :, :1, None])


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_guidance_leads_from_the_null_class_to_the_class_and_beyond(folder, scale):
    conditioner = conditioning.load(folder)
    x, labels = torch.randn(2, 1, 4, 4), torch.tensor([3, 7])
    first = conditioner.embedder.embedding.weight[:, 0]
    given, without = first[labels].view(2, 1, 1, 1) + 5 * x, first[10] + 5 * x
    expected = without + scale * (given - without)
    assert torch.allclose(conditioner.guide(told_model, labels, scale)(x, 5), expected, atol=1e-5)


def test_guidance_without_a_null_class_is_refused_and_scale_one_needs_none():
    conditioner = Conditioner(Classes("class_labels", 10), None)
    labels = torch.tensor([3])
    answer = conditioner.guide(lambda x, t, class_labels: SimpleNamespace(sample=x + class_labels), labels, 1.0)
    assert answer(torch.zeros(1), 5).tolist() == [3.0]
    with pytest.raises(InputError, match="guidance_scale is 3, but the model has no null class to be guided away from: set it to 1"):
        conditioner.guide(told_model, labels, 3.0)
