"""What looks at images for a distance: every extractor keeps one contract, and what it sees depends on nothing but pixels and weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from workers import data, extension, extractors, frechet
from workers.contracts import ExtractorRef, ImageTask, InputError
from workers.extractors.resnet56 import BasicBlock, ResNet56
from workers.rows import ReferenceTask
from workers.session import Session
from workers.tasks_evaluate import reference_statistics

ASSETS = Path(__file__).parents[2] / "../shared/assets"
MODULE = """
import torch
class Means(torch.nn.Module):
    input_size = 8
    def forward(self, images): return images.mean((2, 3))
def means(weights): return Means()
class Broken(torch.nn.Module):
    def forward(self, images): return images.mean((2, 3)) / 0
def broken(weights): return Broken()
class Flat(torch.nn.Module):
    def forward(self, images): return images.mean((1, 2, 3))
def flat(weights): return Flat()
def nothing(weights): return weights
"""


@pytest.fixture
def own(tmp_path, monkeypatch) -> Path:
    """A user's module of extractors."""
    (tmp_path / "own_extractors.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def resnet(tmp_path_factory) -> tuple[ResNet56, Path]:
    """A random ResNet-56 whose norms do something, and its weights as they are published."""
    torch.manual_seed(0)
    network = ResNet56().eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.1, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    path = tmp_path_factory.mktemp("resnet") / "weights.th"
    tensors = {f"module.{key}": value for key, value in network.state_dict().items()}
    torch.save({"state_dict": {**tensors, "module.linear.weight": torch.zeros(10, 64)}, "best_prec1": 94.4}, path)
    save_file(tensors, path.with_suffix(".safetensors"))
    return network, path


def images(count: int, channels: int = 3, size: int = 32) -> torch.Tensor:
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("name", extractors.names())
def test_every_extractor_declares_its_size_and_resize_and_wants_weights(name):
    module = extension("extractors", name, "evaluate.extractor")
    assert module.RESIZE
    assert module.INPUT_SIZE is None or module.INPUT_SIZE > 0
    with pytest.raises(InputError, match=f"evaluate.extractor is {name}: give the file with its weights as evaluate.extractor_weights"):
        extractors.load(ExtractorRef(name))


def test_resnet56_reads_both_kinds_of_files_and_has_the_published_size(resnet):
    network, path = resnet
    assert sum(p.numel() for p in network.parameters()) + 650 == 853_018
    expected = network(extractors.rounded(images(3)))
    for file in (path, path.with_suffix(".safetensors")):
        torch.testing.assert_close(extractors.load(ExtractorRef("resnet56", str(file)))(images(3)), expected)


def test_resnet56_normalises_and_shortens_as_published(resnet):
    block = BasicBlock(16, 32).eval().requires_grad_(False)
    torch.nn.init.zeros_(block.bn2.weight)
    x = torch.rand(1, 16, 8, 8)
    out = block(x)
    torch.testing.assert_close(out[:, 8:24], x[:, :, ::2, ::2])
    assert float(out[:, :8].abs().max() + out[:, 24:].abs().max()) == 0
    network, seen = resnet[0], []
    handle = network.conv1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    network(torch.ones(1, 3, 32, 32))
    handle.remove()
    np.testing.assert_allclose(seen[0][0, :, 0, 0], [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225], rtol=1e-6)


def test_images_are_rounded_to_what_a_file_would_hold(tmp_path):
    x = images(1)[0]
    Image.fromarray(((x.permute(1, 2, 0).numpy() + 1) * 127.5).round().astype(np.uint8)).save(tmp_path / "x.png")
    again = np.asarray(Image.open(tmp_path / "x.png")).transpose(2, 0, 1) / 127.5 - 1
    np.testing.assert_allclose(extractors.rounded(x), again, atol=1e-6)


def test_images_are_resized_in_the_way_of_pillow_and_grey_ones_repeated(own):
    means = extractors.load(ExtractorRef("own_extractors:means"))
    assert (means.input_size, means.resize) == (8, "bicubic, antialias")
    seen = []
    means.network.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = extractors.rounded(images(2, channels=1, size=20))
    assert means(x).shape == (2, 3)
    pillow = np.asarray(Image.fromarray(x[0, 0].numpy()).resize((8, 8), Image.Resampling.BICUBIC)).clip(-1, 1)
    for channel in range(3):
        np.testing.assert_allclose(seen[0][0, channel], pillow, atol=1e-5)


def test_the_digest_follows_the_weights_and_the_adapter(resnet, own, tmp_path):
    path = resnet[1]
    digest = extractors.load(ExtractorRef("resnet56", str(path))).digest
    copy = tmp_path / "elsewhere.th"
    copy.write_bytes(path.read_bytes())
    assert extractors.load(ExtractorRef("resnet56", str(copy))).digest == digest
    assert extractors.load(ExtractorRef("resnet56", str(path.with_suffix(".safetensors")))).digest != digest
    assert extractors.load(ExtractorRef("own_extractors:means")).digest != extractors.load(ExtractorRef("own_extractors:flat")).digest


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("own_extractors:broken", "the features hold NaN or infinity"),
        ("own_extractors:flat", r"2 images must give features \[2, d\], not \(2,\)"),
        ("own_extractors:nothing", "gave a NoneType, not a torch.nn.Module"),
        ("own_extractors:missing", "evaluate.extractor: own_extractors:missing cannot be imported"),
        ("no.such:module", "evaluate.extractor: no.such:module cannot be imported"),
    ],
)
def test_an_extractor_that_is_none_is_refused(own, name, told):
    with pytest.raises(InputError, match=told):
        extractors.load(ExtractorRef(name)).features(3, 8)


def test_a_network_that_cannot_take_the_images_is_refused(resnet):
    class Linear(torch.nn.Module):
        def forward(self, x):
            return F.linear(x.flatten(1), torch.zeros(2, 7))

    extractor = extractors.Extractor(Linear(), None, "none", "")
    with pytest.raises(InputError, match="images of 3 x 8 x 8 cannot be given to it"):
        extractor.features(3, 8)
    assert extractors.load(ExtractorRef("resnet56", str(resnet[1]))).features(1, 28) == 64


def test_images_that_are_not_finite_are_the_denoisers_fault(own):
    broken = images(2)
    broken[0] = float("nan")
    assert bool(extractors.load(ExtractorRef("own_extractors:means"))(broken)[0].isnan().all())


@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04 neither"])
@pytest.mark.parametrize("name", ["resnet56", "torchscript"])
def test_weights_that_are_none_are_refused(tmp_path, name, content):
    (tmp_path / "w.th").write_bytes(content)
    with pytest.raises(InputError, match=rf"evaluate\.extractor_weights: .*w\.th cannot be read as weights of {name}: "):
        extractors.load(ExtractorRef(name, str(tmp_path / "w.th")))
    with pytest.raises(InputError, match="no such file"):
        extractors.load(ExtractorRef(name, str(tmp_path / "missing")))


def test_weights_of_another_network_are_refused(tmp_path):
    save_file({"conv1.weight": torch.zeros(16, 3, 3, 3)}, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="cannot be read as weights of resnet56: Error.* Missing key"):
        extractors.load(ExtractorRef("resnet56", str(tmp_path / "w.safetensors")))


def test_inception_says_which_package_it_needs(tmp_path):
    (tmp_path / "w.pth").write_bytes(b"")
    try:
        import torch_fidelity  # noqa: F401
    except ImportError:
        with pytest.raises(InputError, match=r"needs the package torch-fidelity \(No module named .*\): pip install"):
            extractors.load(ExtractorRef("inception", str(tmp_path / "w.pth")))
    else:
        with pytest.raises(InputError, match="cannot be read as weights of inception"):
            extractors.load(ExtractorRef("inception", str(tmp_path / "w.pth")))


def test_reference_statistics_are_those_of_the_images(own, emoji_images, tmp_path):
    task = ReferenceTask(ImageTask(str(emoji_images), 3, 32, False, "refuse", ""), ExtractorRef("own_extractors:means"), 1000)
    found = {}
    for batch in (7, 1000):
        out = tmp_path / f"{batch}.npz"
        few = ImageTask(str(emoji_images), 3, 32, False, "refuse", str(out))
        reference_statistics(Session(), ReferenceTask(few, task.extractor, batch))
        found[batch] = frechet.read_statistics(str(out))
    cache = data.build_cache(ImageTask(str(emoji_images), 3, 32, False, "refuse", str(tmp_path / "images.arrow")))
    extractor = extractors.load(task.extractor)
    pixels = torch.from_numpy(cache.load(range(cache.count))).float() / 127.5 - 1
    features = extractor(pixels).numpy()
    assert found[7].n == cache.count
    np.testing.assert_allclose(found[7].mean, features.mean(0, dtype=np.float64), atol=1e-6)
    np.testing.assert_allclose(found[7].cov, np.cov(features.astype(float), rowvar=False), atol=1e-6)
    np.testing.assert_allclose(found[7].features, found[1000].features, atol=1e-6)


@pytest.mark.skipif(not (ASSETS / "resnet56-4bfd9763.th").exists(), reason="the published weights are not here")
def test_real_images_are_near_the_published_statistics_and_noise_is_far(tmp_path):
    extractor = extractors.load(ExtractorRef("resnet56", str(ASSETS / "resnet56-4bfd9763.th")))
    task = ImageTask(str(ASSETS / "cifar10-test-2k.parquet"), 3, 32, False, "refuse", "")
    real = [image.pixels for image in data.ImageReader(task.path).read(task, 0, 200)]
    published = frechet.read_statistics(f"{ASSETS / 'cifar10-resnet56-stats.npz'}:test")
    near, far = (frechet.Statistics.of(extractor(x).numpy()) for x in (torch.from_numpy(np.stack(real)) / 127.5 - 1, images(100)))
    assert frechet.frechet_distance(near, published) < 1.5
    assert frechet.frechet_distance(far, published) > 20
