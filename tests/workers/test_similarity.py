"""One contract for every measure, and the statistics that are made of its embeddings."""

import copy
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from workers import families, similarity
from workers.contracts import InputError
from workers.diffusion import NoiseSchedule
from workers.similarity import SimilarityProblem, gradient
from workers.similarity.gradient import CountSketch

TIMESTEPS = [5, 100, 500, 995]
every_measure = pytest.mark.parametrize("name", similarity.names())


@pytest.fixture(scope="module")
def problem(emoji) -> SimilarityProblem:
    torch.manual_seed(0)
    minibatches = [(torch.randn(2, 3, 16, 16).clamp(-1, 1), {}) for _ in range(2)]
    schedule = NoiseSchedule(families.load_scheduler_config(emoji))
    return SimilarityProblem(schedule, minibatches, families.family("unet2d").tiny(), buckets=512, seed=1)


@pytest.fixture(scope="module")
def embeddings(problem) -> dict[str, np.ndarray]:
    """Every measure's embeddings of the whole grid."""
    return {name: similarity.measure(name).embed(problem, TIMESTEPS) for name in similarity.names()}


# --- the contract of a measure --------------------------------------------------------------------------------------


@every_measure
def test_embeddings_are_deterministic_and_change_with_the_timestep(name, problem, embeddings):
    found = embeddings[name]
    assert np.array_equal(similarity.measure(name).embed(problem, TIMESTEPS), found)
    assert found.shape[1] == len(TIMESTEPS)
    assert np.isfinite(found).all()
    assert all(not np.array_equal(found[:, i], found[:, j]) for i in range(len(TIMESTEPS)) for j in range(i))


@every_measure
def test_embeddings_do_not_depend_on_how_the_grid_was_split(name, problem, embeddings):
    embed = similarity.measure(name).embed
    for chunks in ([TIMESTEPS[:3], TIMESTEPS[3:]], [[t] for t in TIMESTEPS]):
        assert np.array_equal(np.concatenate([embed(problem, chunk) for chunk in chunks], axis=1), embeddings[name])


@every_measure
def test_the_matrix_is_symmetric_with_a_unit_diagonal(name, embeddings):
    gram = similarity.gram_of(embeddings[name])
    values = np.asarray(similarity.similarity_of(gram, name, TIMESTEPS, 1000, images=4).values)
    assert np.array_equal(values, values.T)
    assert np.array_equal(values.diagonal(), np.ones(len(TIMESTEPS)))
    assert np.abs(values).max() <= 1
    assert values.min() < 0.999


@every_measure
def test_a_measure_leaves_the_model_as_it_was(name, problem):
    before = copy.deepcopy(problem.model.state_dict())
    similarity.measure(name).embed(problem, TIMESTEPS[:1])
    assert all(torch.equal(tensor, before[key]) for key, tensor in problem.model.state_dict().items())
    assert all(p.grad is None for p in problem.model.parameters())


@every_measure
def test_a_measure_that_needs_no_model_gets_none(name, problem):
    module = similarity.measure(name)
    bare = dataclasses.replace(problem, model=None, minibatches=[])
    if module.NEEDS_MODEL:
        with pytest.raises(AssertionError):
            module.embed(bare, TIMESTEPS)
    else:
        assert np.array_equal(module.embed(bare, TIMESTEPS), module.embed(problem, TIMESTEPS))


def test_an_unknown_measure_is_refused():
    with pytest.raises(InputError, match="'aura' is unknown: known are gradient"):
        similarity.measure("aura")


# --- log-SNR --------------------------------------------------------------------------------------------------------


def test_log_snr_similarity_falls_with_distance_to_zero_at_the_ends(problem):
    grid = [0, 250, 500, 999]
    angles = problem.schedule.log_snr(grid)
    expected = np.cos((angles[:, None] - angles[None, :]) / (angles[0] - angles[-1]) * np.pi / 2)
    embeddings = similarity.measure("snr").embed(problem, grid)[0]
    assert np.allclose(embeddings @ embeddings.T, expected, atol=1e-12)
    assert expected[0, -1] == pytest.approx(0, abs=1e-12)
    assert expected[0, 1] > expected[0, 2] > expected[0, 3]


def test_log_snr_similarity_is_finite_when_the_last_timestep_is_pure_noise(emoji):
    schedule = NoiseSchedule({**families.load_scheduler_config(emoji), "rescale_betas_zero_snr": True})
    embeddings = similarity.measure("snr").embed(SimilarityProblem(schedule, [], None, 0, 0), [0, 500, 999])
    assert np.isfinite(embeddings).all()


# --- gradients ------------------------------------------------------------------------------------------------------


class Recorder(nn.Module):
    """A denoiser that notes its inputs: enough to see which noise they hold."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, 1, 1))
        self.seen: list[Tensor] = []

    def forward(self, sample: Tensor, timestep: Tensor) -> SimpleNamespace:
        self.seen.append(sample.clone())
        return SimpleNamespace(sample=sample * self.scale)


def test_all_timesteps_of_a_minibatch_share_their_noise(problem):
    recorder = Recorder()
    similarity.measure("gradient").embed(dataclasses.replace(problem, model=recorder), TIMESTEPS)
    abar = problem.schedule.scheduler.alphas_cumprod[TIMESTEPS]
    seen = torch.stack(recorder.seen).unflatten(0, (len(TIMESTEPS), len(problem.minibatches))).transpose(0, 1)
    clean = torch.stack([clean for clean, _ in problem.minibatches])[:, None]
    weight = abar.view(1, -1, 1, 1, 1, 1)
    noise = (seen - weight.sqrt() * clean) / (1 - weight).sqrt()
    assert torch.allclose(noise[:, 1:], noise[:, 1:2].expand_as(noise[:, 1:]), atol=1e-5)
    assert torch.allclose(noise[:, 0], noise[:, 1], atol=1e-3)  # at t = 5 the noise is small, its float error is not
    assert (noise[0] - noise[1]).abs().mean() > 0.5
    assert abs(float(noise[:, 1].std()) - 1) < 0.05


def test_the_same_timestep_twice_is_embedded_equally(problem):
    found = similarity.measure("gradient").embed(problem, [5, 400, 5])
    assert np.array_equal(found[:, 0], found[:, 2])


def with_gradient(layer: nn.Linear, values: Tensor) -> nn.Linear:
    weight, bias = values.split([layer.weight.numel(), layer.bias.numel()])
    layer.weight.grad, layer.bias.grad = weight.view_as(layer.weight).clone(), bias.clone()
    return layer


def test_sketched_inner_products_are_unbiased():
    layer, gen = nn.Linear(9, 5), torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 50, generator=gen).double()
    right = right + left  # a truth that is far from zero
    found = []
    for seed in range(2000):
        sketch = CountSketch(layer, buckets=8, seed=seed)
        found.append(float(sketch_of(sketch, layer, left) @ sketch_of(sketch, layer, right)))
    standard_error = np.std(found) / len(found) ** 0.5
    truth = float(left @ right)
    assert abs(np.mean(found) - truth) < 3 * standard_error < 0.2 * truth


def sketch_of(sketch: CountSketch, layer: nn.Linear, values: Tensor) -> Tensor:
    with_gradient(layer, values.float())
    return sketch()


def test_a_sketch_is_linear_and_keeps_every_entry():
    """With whole numbers the float sums are exact."""
    layer, gen = nn.Linear(9, 5), torch.Generator().manual_seed(0)
    sketch = CountSketch(layer, buckets=8, seed=3)
    left, right = torch.randint(-9, 9, (2, 50), generator=gen).float()
    assert torch.equal(sketch_of(sketch, layer, left) + 2 * sketch_of(sketch, layer, right), sketch_of(sketch, layer, left + 2 * right))
    for entry in torch.eye(50):
        assert sketch_of(sketch, layer, entry).abs().sort().values.tolist() == [0] * 7 + [1]


def test_entries_of_one_row_never_share_a_bucket():
    layer = nn.Linear(9, 5)
    sketch = CountSketch(layer, buckets=8, seed=3)
    for row in range(6):
        buckets = {int(sketch_of(sketch, layer, entry).abs().argmax()) for entry in torch.eye(50)[8 * row : 8 * row + 8]}
        assert len(buckets) == 8


def test_an_entry_goes_to_the_bucket_of_its_column_moved_by_its_rows_shift(monkeypatch):
    """Whole numbers, so that the order of a sum does not matter; two rows are moved at a time."""
    monkeypatch.setattr(gradient, "AT_ONCE", 16)
    layer = nn.Linear(9, 5)
    sketch, values = CountSketch(layer, buckets=8, seed=3), torch.arange(50.0)
    expected = torch.zeros(8)
    for i, value in enumerate(values):
        expected[(i % 8 + int(sketch.shifts[i // 8])) % 8] += value * sketch.signs[i]
    assert torch.equal(sketch_of(sketch, layer, values), expected)


def test_a_parameter_without_gradient_counts_as_zero():
    layer = nn.Linear(9, 5)
    sketch = CountSketch(layer, buckets=8, seed=3)
    expected = sketch_of(sketch, layer, torch.cat([torch.arange(45.0), torch.zeros(5)]))
    layer.bias.grad = None
    assert torch.equal(sketch(), expected)


# --- statistics -----------------------------------------------------------------------------------------------------


def random_embeddings(batches: int, points: int = 4, size: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(batches, points, size)).astype(np.float32)


def test_similarity_is_the_cosine_of_the_mean_embeddings():
    embeddings = random_embeddings(batches=5)
    mean = embeddings.mean(0)
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    found = similarity.similarity_of(similarity.gram_of(embeddings), "gradient", range(4), 10, 0)
    assert np.allclose(found.values, mean @ mean.T, atol=1e-6)


def test_reliability_is_the_cosine_between_even_and_odd_minibatches():
    embeddings = random_embeddings(batches=5)
    even, odd = embeddings[::2].mean(0), embeddings[1::2].mean(0)
    expected = (even * odd).sum(1) / np.linalg.norm(even, axis=1) / np.linalg.norm(odd, axis=1)
    found = similarity.similarity_of(similarity.gram_of(embeddings), "gradient", range(4), 10, 0)
    assert np.allclose(found.reliability, expected, atol=1e-6)


def test_reliability_is_one_when_both_halves_are_the_same_and_zero_when_they_are_orthogonal():
    once = random_embeddings(batches=1)
    same = similarity.similarity_of(similarity.gram_of(np.repeat(once, 4, axis=0)), "gradient", range(4), 10, 0)
    assert np.allclose(same.reliability, 1, atol=1e-6)
    apart = np.concatenate([np.pad(once, ((0, 0), (0, 0), (0, 6))), np.pad(once, ((0, 0), (0, 0), (6, 0)))])
    assert np.allclose(similarity.similarity_of(similarity.gram_of(apart), "gradient", range(4), 10, 0).reliability, 0, atol=1e-6)


def test_an_embedding_of_zeros_is_like_no_other():
    embeddings = random_embeddings(batches=2)
    embeddings[:, 1] = 0
    values = np.asarray(similarity.similarity_of(similarity.gram_of(embeddings), "gradient", range(4), 10, 0).values)
    assert values[1].tolist() == [0, 1, 0, 0]


def test_the_bootstrap_of_a_single_minibatch_is_the_matrix():
    gram = similarity.gram_of(random_embeddings(batches=1))
    values = np.asarray(similarity.similarity_of(gram, "gradient", range(4), 10, 0).values)
    replicates = similarity.bootstrap(gram, replicates=3, seed=0)
    assert replicates.shape == (3, 4, 4)
    assert np.allclose(replicates, values[None], atol=1e-6)


def test_a_bootstrap_replicate_is_the_similarity_of_resampled_minibatches():
    embeddings = random_embeddings(batches=3)
    replicates = similarity.bootstrap(similarity.gram_of(embeddings), replicates=20, seed=0)
    legal = []
    for rows in np.ndindex(3, 3, 3):
        mean = embeddings[list(rows)].mean(0)
        mean /= np.linalg.norm(mean, axis=1, keepdims=True)
        legal.append(mean @ mean.T)
    nearest = np.abs(replicates[:, None] - np.stack(legal)[None]).max((2, 3))
    assert nearest.min(1).max() < 1e-5
    assert len(set(nearest.argmin(1))) > 3
    assert np.array_equal(replicates, similarity.bootstrap(similarity.gram_of(embeddings), replicates=20, seed=0))
    assert not np.array_equal(replicates, similarity.bootstrap(similarity.gram_of(embeddings), replicates=20, seed=1))


def test_a_paired_measure_compares_the_same_minibatch_only():
    embeddings = random_embeddings(batches=5)
    found = similarity.similarity_of(similarity.gram_of(embeddings), "minibatch_gradient", range(4), 10, 0)
    inner = sum(batch @ batch.T for batch in embeddings)
    norm = np.sqrt(inner.diagonal())
    assert np.allclose(found.values, inner / norm[:, None] / norm[None, :], atol=1e-6)


def test_a_paired_measure_sees_what_the_mean_hides():
    """Two timesteps whose gradients always agree, and average out to nothing: the converged model."""
    rng = np.random.default_rng(0)
    shared, other = rng.normal(size=(2, 16, 1, 64))
    signs = np.tile([1.0, -1.0], 8)[:, None, None]
    noise = 0.1 * rng.normal(size=(16, 3, 64))
    embeddings = np.concatenate([signs * shared, signs * shared, signs * other], 1) + noise
    found = similarity.similarity_of(similarity.gram_of(embeddings), "minibatch_gradient", range(3), 10, 0)
    assert found.values[0][1] > 0.9
    assert abs(found.values[0][2]) < 0.2


def test_reliability_of_a_paired_measure_is_the_agreement_of_the_two_halves_rows():
    embeddings = random_embeddings(batches=6, points=5)
    gram = similarity.gram_of(embeddings)
    halves = [
        np.asarray(similarity.similarity_of(similarity.gram_of(part), "minibatch_gradient", range(5), 10, 0).values)
        for part in (embeddings[::2], embeddings[1::2])
    ]
    found = similarity.similarity_of(gram, "minibatch_gradient", range(5), 10, 0)
    kept = np.arange(5) != 2
    assert found.reliability[2] == pytest.approx(np.corrcoef(halves[0][2, kept], halves[1][2, kept])[0, 1], abs=1e-6)
