"""What crosses a process or the disk comes back equal, and nothing else is accepted."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from workers import contracts
from workers.contracts import ArchitectureSpec, Cost, ElasticSite, InputError, Interval, Partition, Record, SearchSpace, SimilarityMatrix
from workers.records import differing

ROOT = Path(__file__).parents[2]
PARTITION = Partition.from_boundaries([300, 700], 1000)
SPEC = ArchitectureSpec({"mid_block.attentions.0": 0, "down_blocks.0.resnets.0": 3})
SITE = ElasticSite("down_blocks.0.resnets.0", (0, 2, 4), "group")
COST = Cost(10, 20, 3, 0.5)
BUDGET = contracts.Budget("macs", 0.5, "ddim", 20)
REASON = contracts.SiteReason("mid", 4, 8, 0.25, 0.04)
PLAN = contracts.MixturePlan(
    BUDGET, "era", 7, PARTITION, (SPEC,) * 3, (0.25, 0.5, 0.25), (COST,) * 3, Cost(40, 50), 1.25, 3.0, 0.5, 0.1, ((REASON,),) * 3
)
EXPERT = contracts.ExpertCheckpoint(Interval(0, 300), "somewhere/step_0000010", 10, 0.5, 1.0, 2.0)
ELASTIC = contracts.ElasticSettings(8, True, "taylor")
TRAIN = contracts.TrainSettings(10, 4, 1e-4, 2, 0.0, 0.99, 1.0, "no", 5, 0.2, 1.0, 1.0, 0.1)
ROUTE = contracts.RouteSettings(32, 100, 8, 1e-3, 2.0, 0.4)
PROVENANCE = contracts.Provenance("quickstart", "f" * 8, "model", "a" * 8, "images", "b" * 8, 0, {"torch": "2"})

EXAMPLES: list[Record] = [
    Interval(0, 300),
    PARTITION,
    SimilarityMatrix("gradient", 1000, (250, 750), ((1.0, 0.5), (0.5, 1.0)), (0.9, 0.8), 64),
    SITE,
    SPEC,
    SearchSpace((SITE,)),
    COST,
    BUDGET,
    PLAN,
    EXPERT,
    contracts.ImageTask("images", 3, 32, True, "skip", "cache"),
    contracts.SimilarityTask("gradient", "model", "cache", (0, 1), (5, 15), 2, 64, 0, "cpu", "out.npy"),
    ELASTIC,
    TRAIN,
    contracts.ExpertTask("finetune", "model", "cache", (0, 1), Interval(0, 300), ELASTIC, TRAIN, 2, 16, 0, True, 0.1, "source", SPEC),
    contracts.Timing(64, "bfloat16", False, ("fuse_qkv",), True, True),
    contracts.LatencyTask("model", ELASTIC, contracts.Timing(64, "bfloat16", True), "cache"),
    ROUTE,
    contracts.RouteTask("model", "cache", (0, 1), PARTITION, ELASTIC, (EXPERT,) * 3, BUDGET, "era", 0, ROUTE, "cpu", 5, ("table.json",)),
    contracts.DenoiserRef("small", PLAN, (EXPERT,) * 3),
    contracts.EvaluateTask(
        contracts.DenoiserRef("dense"),
        *("model", "cache", (0,), (1, 2), PARTITION, contracts.SamplerRef("ddim", 5, 0.0, 1.002), 2, (100, 500), 0, "cpu", "out.npz"),
        contracts.Timing(2, "float32", False),
    ),
    REASON,
    PROVENANCE,
    contracts.MixtureManifest("emoji", "unet2d", PLAN, {"fid": 3.5, "rows": [1, None]}, {"job": {}}, PROVENANCE, {"config.json": "c" * 64}),
    contracts.Progress("specialize", "t0000-0300", 5, 10, 0.5, None, 3.0, 0, "resumed"),
]
every_record = pytest.mark.parametrize("record", EXAMPLES, ids=lambda record: type(record).__name__)


def as_read(record: Record) -> dict:
    return json.loads(json.dumps(record.to_json()))


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_record_type_has_an_example_here():
    ours = {kind for kind in Record.__subclasses__() if kind.__module__ in ("workers.contracts", "workers.timesteps")}
    assert {type(record) for record in EXAMPLES} == ours | {contracts.Timing}


@every_record
def test_a_record_comes_back_equal_from_json(record):
    assert type(record).from_json(as_read(record)) == record


def test_records_tell_every_field_that_differs():
    one, other = Interval(0, 10), Interval(0, 20)
    assert one.differences(one) == []
    assert one.differences(other) == ["stop is 10, wanted 20"]
    assert differing({"a": "0" * 64, "b": 1}, {"a": "1" * 64, "c": (2,)}) == [
        ("a", "0" * 12, "1" * 12),
        ("b", "1", "None"),
        ("c", "None", "(2,)"),
    ]


@every_record
def test_an_unknown_key_is_refused_by_name(record):
    with pytest.raises(InputError, match="unknown key colour"):
        type(record).from_json({**as_read(record), "colour": 1})


@every_record
def test_a_missing_key_is_refused_by_name(record):
    for f in dataclasses.fields(record):
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            with pytest.raises(InputError, match=f"missing key {f.name}"):
                type(record).from_json({key: value for key, value in as_read(record).items() if key != f.name})


@every_record
def test_a_value_of_the_wrong_kind_is_refused_by_key(record):
    for f in dataclasses.fields(record):
        with pytest.raises(InputError, match=rf"{type(record).__name__}\.{f.name}"):
            type(record).from_json({**as_read(record), f.name: [{"odd": 1}]})


@every_record
def test_another_schema_is_refused(record):
    with pytest.raises(InputError, match=f"{type(record).__name__}: schema 2 is not 1"):
        type(record).from_json({**as_read(record), "schema": 2})


@pytest.mark.parametrize("value", [None, [], "text", 3])
def test_json_that_is_no_object_is_refused(value):
    with pytest.raises(InputError, match="Cost: .* is not an object"):
        Cost.from_json(value)


def test_an_error_deep_inside_names_its_place():
    data = as_read(PLAN)
    data["partition"]["intervals"][1]["stop"] = "late"
    with pytest.raises(InputError, match=r"MixturePlan\.partition\.intervals\[1\]\.stop: 'late' is not of type int"):
        contracts.MixturePlan.from_json(data)


def test_a_bool_is_not_a_number_and_a_whole_number_is_a_float():
    with pytest.raises(InputError, match="macs: True"):
        Cost.from_json({"macs": True, "params": 1})
    latency = Cost.from_json({"macs": 1, "params": 1, "latency_ms": 2}).latency_ms
    assert isinstance(latency, float)
    assert latency == 2.0


def test_records_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        COST.macs = 1


# --- illegal states -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "stop"), [(5, 5), (6, 5), (-1, 5)])
def test_an_interval_is_neither_empty_nor_negative(start, stop):
    with pytest.raises(InputError, match=rf"\[{start}, {stop}\)"):
        Interval(start, stop)


@pytest.mark.parametrize(
    "intervals",
    [(), (Interval(1, 5),), (Interval(0, 5), Interval(6, 9)), (Interval(0, 5), Interval(4, 9)), (Interval(5, 9), Interval(0, 5))],
)
def test_a_partition_starts_at_zero_and_its_intervals_touch(intervals):
    with pytest.raises(InputError):
        Partition(intervals)


@pytest.mark.parametrize("boundaries", [[0], [1000], [700, 300], [300, 300], [-5]])
def test_boundaries_that_leave_an_empty_interval_are_refused(boundaries):
    with pytest.raises(InputError):
        Partition.from_boundaries(boundaries, 1000)


@pytest.mark.parametrize("timesteps", [(-1, 5), (5, 5), (6, 5), (5, 10)])
def test_grid_timesteps_ascend_within_the_schedule(timesteps):
    with pytest.raises(InputError, match="must ascend"):
        SimilarityMatrix("snr", 10, timesteps, ((1.0, 0.0), (0.0, 1.0)), (1.0, 1.0))


def test_a_similarity_matrix_is_square():
    with pytest.raises(InputError, match="2 x 2"):
        SimilarityMatrix("snr", 10, (1, 2), ((1.0, 0.0), (0.0,)), (1.0, 1.0))


@pytest.mark.parametrize("choices", [(), (2, 1), (1, 1), (-1, 2), (0,)])
def test_a_site_has_ascending_choices_and_something_to_keep(choices):
    with pytest.raises(InputError, match="site mid"):
        ElasticSite("mid", choices, "group")


@pytest.mark.parametrize("ratio", [0, -0.5, 1.01, float("nan"), float("inf")])
def test_a_budget_is_a_part_of_dense(ratio):
    with pytest.raises(InputError, match="ratio"):
        dataclasses.replace(BUDGET, ratio=ratio)


def test_an_unknown_metric_is_refused():
    with pytest.raises(InputError, match="'joules'"):
        dataclasses.replace(BUDGET, metric="joules")


@pytest.mark.parametrize("key", ["experts", "shares", "expert_costs"])
def test_a_plan_has_one_of_everything_per_interval(key):
    with pytest.raises(InputError, match="3 intervals"):
        dataclasses.replace(PLAN, **{key: getattr(PLAN, key)[:2]})


@pytest.mark.parametrize(
    ("choices", "text"), [({}, SITE.name), ({SITE.name: 2, "attic": 1}, "attic"), ({SITE.name: 3}, r"3 is not one of \(0, 2, 4\)")]
)
def test_a_search_space_refuses_a_foreign_architecture(choices, text):
    with pytest.raises(InputError, match=text):
        SearchSpace((SITE,)).check(ArchitectureSpec(choices))


def test_a_search_space_knows_its_ends():
    space = SearchSpace((SITE, ElasticSite("mid", (1, 5), "head")))
    assert space.smallest == ArchitectureSpec({SITE.name: 0, "mid": 1})
    assert space.narrowest == ArchitectureSpec({SITE.name: 2, "mid": 1})
    assert space.dense == ArchitectureSpec({SITE.name: 4, "mid": 5})
    space.check(space.smallest)


def test_a_plan_costs_the_weighted_sum_of_its_experts():
    costs = (Cost(10, 1), Cost(20, 1), Cost(40, 1))
    plan = dataclasses.replace(PLAN, expert_costs=costs)
    assert plan.macs == 0.25 * 10 + 0.5 * 20 + 0.25 * 40
    assert plan.cost_ratio == plan.macs / 40


# --- timesteps ------------------------------------------------------------------------------------------------------


def test_a_boundary_belongs_to_the_noisier_expert():
    assert [PARTITION.index_of(t) for t in (0, 299, 299.9, 300, 300.0, 699.99, 700, 999)] == [0, 0, 0, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("boundaries", [(), (300,), (300, 700)])
def test_an_array_of_timesteps_gets_an_integer_array_of_its_shape(boundaries):
    timesteps = np.array([[0, 299.5, 300], [699, 700, 999]])
    index = contracts.interval_index(timesteps, boundaries)
    assert index.shape == timesteps.shape
    assert index.dtype.kind == "i"
    assert np.array_equal(index, np.searchsorted(boundaries, timesteps, side="right"))


# --- identity -------------------------------------------------------------------------------------------------------


def test_an_architecture_is_the_same_whatever_the_order_of_its_sites():
    turned = ArchitectureSpec(dict(reversed(SPEC.choices.items())))
    assert turned == SPEC
    assert hash(turned) == hash(SPEC)
    assert turned.digest == SPEC.digest
    assert SPEC.replace("mid_block.attentions.0", 1).digest != SPEC.digest


def test_digests_and_seeds_are_the_same_in_every_process():
    code = f"from workers.contracts import *; print(ArchitectureSpec({SPEC.choices!r}).digest, derive_seed('a', 1, 0.5))"
    found = {run_python(code, PYTHONHASHSEED=seed).strip() for seed in ("1", "2")}
    assert found == {f"{SPEC.digest} {contracts.derive_seed('a', 1, 0.5)}"}


def test_a_seed_depends_on_every_part_and_its_place():
    parts = [("a", 1), ("a", 2), ("b", 1), (1, "a"), ("a", 1, 0), ("a1",), ("a", "1")]
    seeds = {contracts.derive_seed(*p) for p in parts}
    assert len(seeds) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_contracts_load_neither_torch_nor_ray_nor_numpy():
    code = "import sys, workers.contracts; print([m for m in ('torch', 'ray', 'numpy', 'diffusers', 'pydantic') if m in sys.modules])"
    assert run_python(code).strip() == "[]"
