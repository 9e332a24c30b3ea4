"""Latency tables: exact where time is additive, whole sub-networks predicted, and never used for another device."""

import dataclasses
import functools
import itertools
import json
import random

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from workers import families, latency, rewrites
from workers.contracts import REWRITES, ArchitectureSpec, ElasticSettings, ElasticSite, InputError, Progress, SearchSpace, Timing
from workers.elastic import extract, search_space
from workers.latency import Observation, covering_networks, fit, random_networks
from workers.latency_table import LatencyIdentity, LatencyTable, LatencyValidation, find, table_path
from workers.regional import RegionCompiler

SETTINGS = ElasticSettings(width_multiple=8, depth=True, importance="magnitude")
HERE = Timing(2, "float32", False)


class FlopClock:
    """Time is what was multiplied since: a millisecond per floating-point operation. Additive, and known exactly."""

    def __init__(self, counter: FlopCounterMode) -> None:
        self.counter = counter

    def mark(self) -> int:
        return self.counter.get_total_flops()

    def wait(self) -> None:
        pass

    def span_ms(self, start: int, stop: int) -> float:
        return float(stop - start)


def config_of(name: str) -> dict:
    model = families.family(name).tiny()
    return {**model.config, "_class_name": type(model).__name__}


@functools.cache
def measured(name: str) -> tuple[LatencyTable, list[Progress]]:
    """The table of a tiny denoiser by that clock, and the progress that was told."""
    events: list[Progress] = []
    with FlopCounterMode(display=False) as counter:
        clock = FlopClock(counter)
        table = latency.measure(
            config_of(name), SETTINGS, "cpu", HERE, visits=1, validation_networks=4, clock=clock, on_progress=events.append
        )
    return table, events


def space_of(name: str) -> SearchSpace:
    return search_space(latency.meta_model(config_of(name), SETTINGS)[1])


def flops(name: str, spec: ArchitectureSpec) -> int:
    """Of the extracted sub-network, counted by itself."""
    model = families.family(name).tiny()
    small = extract(model, families.family(name).sites(model, SETTINGS), spec)
    args, kwargs = families.example_inputs(config_of(name), HERE.batch, "cpu", torch.float32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        small(*args, **kwargs)
    return counter.get_total_flops()


# --- measuring --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", families.names())
def test_where_time_is_additive_the_prediction_is_exact(name):
    (table, _), space = measured(name), space_of(name)
    for spec in [space.dense, space.smallest, space.narrowest, *random_networks(space, 3, seed=99)]:
        assert table.predict(spec.choices) == pytest.approx(flops(name, spec), rel=1e-9)
    assert table.dense_ms == flops(name, space.dense)
    assert table.validation.networks == 4
    assert table.validation.p95_error < 1e-9


@pytest.mark.parametrize("name", families.names())
def test_every_choice_of_every_site_is_measured(name):
    table, _ = measured(name)
    assert table.by_choice.keys() == {site.name for site in space_of(name).sites}
    for site in space_of(name).sites:
        assert tuple(table.by_choice[site.name]) == site.choices


def test_compiled_blocks_are_measured_under_their_own_identity(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(latency, "RegionCompiler", functools.partial(RegionCompiler, "eager"))
    thin = dataclasses.replace(SETTINGS, most_widths=1)
    table = latency.measure(config_of("unet2d"), thin, "cpu", dataclasses.replace(HERE, compiled=True), visits=1, validation_networks=1)
    assert table.identity.compiled
    assert table.dense_ms > 0
    assert {len(row) for row in table.sites.values()} == {2}


class FakeGraphs:
    """Graphs without a GPU: a replay does the work again, without the hooks of the capture."""

    def capture(self, run):
        for _ in range(3):
            run()

        def replay():
            for module in run.func.modules():
                assert not module._forward_hooks
                assert not module._forward_pre_hooks
            run()

        return replay


@pytest.mark.parametrize("name", families.names())
def test_replayed_graphs_give_the_table_that_the_plain_networks_give(name, monkeypatch):
    monkeypatch.setattr(latency, "Graphs", FakeGraphs)
    with FlopCounterMode(display=False) as counter:
        graphed = dataclasses.replace(HERE, cuda_graphs=True)
        table = latency.measure(config_of(name), SETTINGS, "cpu", graphed, visits=2, validation_networks=2, clock=FlopClock(counter))
    plain, _ = measured(name)
    assert table.identity == dataclasses.replace(plain.identity, cuda_graphs=True)
    assert table.rest_ms == pytest.approx(plain.rest_ms, rel=1e-6)
    for site, row in table.sites.items():
        assert row == pytest.approx(plain.sites[site], rel=1e-6)


@pytest.mark.parametrize("name", families.names())
def test_what_marks_a_capture_makes_no_compiled_block_compile_again(name):
    torch._dynamo.reset()
    compiled, inputs = [], families.example_inputs(config_of(name), 1, "cpu", torch.float32)
    compiler = RegionCompiler(lambda graph, _: compiled.append(graph) or graph)
    model, branches = latency.meta_model(config_of(name), SETTINGS)
    model = compiler.compile(rewrites.apply(latency.Weights("cpu", torch.float32, 0).fill(model), REWRITES))
    with torch.no_grad():
        marked = latency._passes(model, inputs, branches, latency.CpuClock(), FakeGraphs()).parts()
    assert len(compiled) == len(compiler.compiled) > 0
    assert all(last >= first for first, last in marked.values())


def test_the_moments_of_a_replay_are_those_of_the_capture_and_not_of_its_warm_up():
    model, branches = latency.meta_model(config_of("unet2d"), SETTINGS)
    inputs = families.example_inputs(config_of("unet2d"), 1, "meta", torch.float32)
    clock = latency.CpuClock()
    clock.mark = itertools.count().__next__
    marks = latency._passes(model, inputs, branches, clock, FakeGraphs()).parts()
    assert marks.keys() == {branch.site.name for branch in branches}
    assert sorted(moment for pair in marks.values() for moment in pair) == list(range(4 * len(branches), 6 * len(branches)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu_networks_are_timed_as_cuda_graphs(compiled):
    thin = dataclasses.replace(SETTINGS, most_widths=2)
    timings = (Timing(1, "bfloat16", compiled, REWRITES, cuda_graphs=graphs) for graphs in (True, False))
    table, plain = (latency.measure(config_of("unet2d"), thin, "cuda", timing, visits=3, validation_networks=3) for timing in timings)
    assert 0 < table.dense_ms < plain.dense_ms
    assert all(ms >= 0 for row in table.sites.values() for ms in row.values())


def test_progress_counts_up_to_its_end():
    _, events = measured("unet2d")
    assert [event.step for event in events] == list(range(1, events[-1].steps + 1))


def test_sub_networks_share_random_weights_of_the_wanted_precision():
    weights = latency.Weights("cpu", torch.bfloat16, 0)
    large, small = weights.take("conv.weight", (4, 6), torch.float32), weights.take("conv.weight", (4, 2), torch.float32)
    assert large.dtype == torch.bfloat16
    assert small.data_ptr() == large.data_ptr()
    assert large.isfinite().all()
    assert large.count_nonzero() > 12
    assert weights.take("norm.weight", (4,), torch.float32).data_ptr() != large.data_ptr()


# --- which networks ---------------------------------------------------------------------------------------------------


def space(*sizes: int) -> SearchSpace:
    return SearchSpace(tuple(ElasticSite(f"s{i}", tuple(range(1, size + 1)), "group") for i, size in enumerate(sizes)))


@pytest.mark.parametrize("sizes", [(1,), (3,), (2, 3, 2, 5), (9, 4, 1, 7), (29, 5, 5, 17), (2, 3, 5, 7, 11, 13)])
def test_every_choice_is_covered_twice_and_dense_comes_first(sizes):
    networks = covering_networks(space(*sizes), seed=0)
    assert networks == covering_networks(space(*sizes), seed=0)
    assert networks[0] == space(*sizes).dense
    assert len(networks) == len(set(networks)) <= max(2 * max(sizes), latency.FEWEST_NETWORKS + max(sizes)) + 1
    for site in space(*sizes).sites:
        for choice in site.choices:
            seen = sum(spec[site.name] == choice for spec in networks)
            assert seen >= (2 if len(sizes) > 1 else 1)


# --- fitting ----------------------------------------------------------------------------------------------------------


def synthetic(factor: float, rest: float, visits: int = 3) -> tuple[list[Observation], dict[str, dict[int, float]]]:
    """Networks over a known table, whose whole takes ``rest`` and ``factor`` times its parts."""
    rng, sites = random.Random(0), space(4, 3, 6)
    table = {s.name: {c: rng.uniform(0.1, 2) for c in s.choices} for s in sites.sites}
    found = []
    for spec in covering_networks(sites, 1):
        parts = {name: row[spec[name]] for name, row in table.items()}
        total = rest + factor * sum(parts.values())
        found.append(Observation(spec, [total] * visits, {name: [ms] * visits for name, ms in parts.items()}))
    return found, table


@pytest.mark.parametrize(("factor", "rest"), [(1.0, 3.0), (1.3, 0.5), (0.8, 7.0)])
def test_what_blocks_cost_outside_of_themselves_is_charged_to_them(factor, rest):
    found, table = synthetic(factor, rest)
    fitted_rest, sites = fit(found)
    assert fitted_rest == pytest.approx(rest)
    for name, row in table.items():
        assert {int(choice): ms for choice, ms in sites[name].items()} == pytest.approx({c: factor * ms for c, ms in row.items()})


def test_a_visit_that_was_disturbed_changes_nothing():
    clean, _ = synthetic(1.1, 2.0)
    disturbed, _ = synthetic(1.1, 2.0)
    for seen in disturbed:
        seen.total_ms[1] *= 50
        for times in seen.site_ms.values():
            times[1] *= 50
    assert fit(disturbed) == fit(clean)


def test_a_network_with_nothing_to_choose_is_predicted():
    rest, sites = fit([Observation(ArchitectureSpec({"a": 2}), [5.0], {"a": [3.0]})])
    assert rest + sites["a"]["2"] == pytest.approx(5.0)


@pytest.mark.parametrize(("factor", "rest"), [(1.3, -0.9), (0.5, -0.2), (-0.2, 8.0)])
def test_neither_the_rest_nor_a_choice_takes_less_than_no_time(factor, rest):
    found, table = synthetic(factor, rest)
    fitted_rest, sites = fit(found)
    assert (fitted_rest == 0) == (rest < 0)
    fitted = {sites[name][str(choice)] / ms for name, row in table.items() for choice, ms in row.items()}
    assert max(fitted) == pytest.approx(min(fitted))
    assert (max(fitted) == 0) == (factor < 0)

    def squares(rest, factor):
        parts = [sum(table[name][choice] for name, choice in seen.spec.choices.items()) for seen in found]
        return sum(((rest + factor * part) / seen.ms - 1) ** 2 for seen, part in zip(found, parts, strict=True))

    best = squares(fitted_rest, max(fitted))
    for change in (1e-3, -1e-3):
        assert squares(max(0.0, fitted_rest + change), max(fitted)) >= best
        assert squares(fitted_rest, max(0.0, max(fitted) + change)) >= best


# --- the table --------------------------------------------------------------------------------------------------------

IDENTITY = LatencyIdentity("GPU A", "bfloat16", 64, 32, True, "digest", "2.13", "0.42", "12.8")
TABLE = LatencyTable(IDENTITY, 1.5, {"a": {"0": 0.25, "4": 1.0}, "b": {"2": 3.0, "8": 2.0}}, 4.5, LatencyValidation(30, 0.01, 0.03))


def test_a_table_survives_the_disk(tmp_path):
    path = tmp_path / "new" / "table.json"
    TABLE.save(path)
    assert LatencyTable.load(path, IDENTITY) == LatencyTable.load(path) == TABLE
    assert LatencyTable.from_json(json.loads(json.dumps(TABLE.to_json()))) == TABLE
    assert [file.name for file in path.parent.iterdir()] == ["table.json"]


def test_prediction_adds_the_rest_and_the_choices():
    assert TABLE.predict({"a": 0, "b": 8}) == 1.5 + 0.25 + 2.0
    assert TABLE.by_choice == {"a": {0: 0.25, 4: 1.0}, "b": {2: 3.0, 8: 2.0}}
    assert TABLE.fastest == {"a": 0, "b": 8}


@pytest.mark.parametrize(
    ("choices", "told"),
    [
        ({"a": 0}, "site b is in only one of the table and the architecture"),
        ({"a": 0, "b": 2, "c": 1}, "site c is in only one of"),
        ({"a": 3, "b": 2}, "site a was measured for 0, 4, not for 3"),
    ],
)
def test_what_was_not_measured_is_not_predicted(choices, told):
    with pytest.raises(InputError, match=told):
        TABLE.predict(choices)


OTHERS = {
    "device": "GPU B",
    "dtype": "float32",
    "batch": 1,
    "sample_size": 64,
    "compiled": False,
    "architecture": "another",
    "torch": "2.12",
    "diffusers": "0.41",
    "cuda": None,
    "rewrites": ("fuse_qkv",),
    "cuda_graphs": True,
    "fused_kernels": True,
}


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(LatencyIdentity)])
def test_a_table_of_another_device_or_setting_is_refused_by_the_field_that_differs(tmp_path, name):
    wanted = dataclasses.replace(IDENTITY, **{name: OTHERS[name]})
    TABLE.save(tmp_path / "table.json")
    with pytest.raises(InputError, match="measured elsewhere") as refused:
        LatencyTable.load(tmp_path / "table.json", wanted)
    assert f"{name} is {getattr(IDENTITY, name)}, wanted {OTHERS[name]}" in str(refused.value)
    assert sum(f"{other} is" in str(refused.value) for other in OTHERS) == 1
    assert find(tmp_path, wanted) is None
    assert wanted.digest != IDENTITY.digest


def test_every_field_that_differs_is_named(tmp_path):
    TABLE.save(tmp_path / "table.json")
    with pytest.raises(InputError) as refused:
        LatencyTable.load(tmp_path / "table.json", dataclasses.replace(IDENTITY, **OTHERS))
    assert all(f"{name} is" in str(refused.value) for name in OTHERS)


def test_find_reads_only_its_own_table(tmp_path):
    assert find(tmp_path / "none", IDENTITY) is None
    TABLE.save(table_path(tmp_path, IDENTITY))
    assert find(tmp_path, IDENTITY) == TABLE
    other = dataclasses.replace(IDENTITY, device="GPU B")
    table_path(tmp_path, IDENTITY).rename(table_path(tmp_path, other))
    with pytest.raises(InputError, match="device is GPU A, wanted GPU B"):
        find(tmp_path, other)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "is damaged"),
        ("[]", "is not an object"),
        ("{}", "missing key"),
        (json.dumps({**TABLE.to_json(), "schema": 99}), "schema 99"),
        (json.dumps({**TABLE.to_json(), "rest_ms": float("nan")}), "not a finite number"),
        (json.dumps({**TABLE.to_json(), "rest_ms": -0.5}), "a time of -0.5 ms"),
        (json.dumps({**TABLE.to_json(), "sites": {"a": {"0": -1.0}}}), "a time of -1.0 ms"),
    ],
)
def test_a_damaged_table_is_refused_in_one_line(tmp_path, text, told):
    (tmp_path / "table.json").write_text(text)
    with pytest.raises(InputError, match=told) as refused:
        LatencyTable.load(tmp_path / "table.json")
    assert "table.json" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_table_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        LatencyTable.load(tmp_path / "gone.json")


# --- identity and reuse -----------------------------------------------------------------------------------------------


def test_the_identity_knows_the_architecture_and_its_choices_but_not_where_the_model_lies():
    def identity(config=None, settings=SETTINGS, **change):
        return latency.identity_of(config or config_of("unet2d"), settings, "cpu", dataclasses.replace(HERE, **change))

    assert identity() == identity({**config_of("unet2d"), "_name_or_path": "elsewhere", "_diffusers_version": "0.1"})
    assert identity() == identity(settings=dataclasses.replace(SETTINGS, importance="taylor"))
    changed = [
        identity(config_of("unet2d_condition")),
        identity(settings=dataclasses.replace(SETTINGS, depth=False)),
        identity(settings=dataclasses.replace(SETTINGS, unit="channel_per_group", width_multiple=4)),
        identity(dtype="bfloat16"),
        identity(batch=3),
        identity(compiled=True),
        identity(cuda_graphs=True),
        identity(fused_kernels=True),
    ]
    assert all(a != b for a, b in itertools.combinations([identity(), *changed], 2))
    assert "threads: 1" in identity().device


def test_a_table_is_measured_once_and_found_afterwards(tmp_path, monkeypatch):
    asked = []

    def measure(config, settings, device, timing, on_progress):
        asked.append(timing.batch)
        return dataclasses.replace(TABLE, identity=latency.identity_of(config, settings, device, timing))

    monkeypatch.setattr(latency, "measure", measure)
    one, two = (dataclasses.replace(HERE, batch=batch) for batch in (1, 2))
    ask = functools.partial(latency.find_or_measure, tmp_path, config_of("unet2d"), SETTINGS, "cpu")
    first = ask(one)
    assert ask(one) == first
    assert ask(two) != first
    assert asked == [1, 2]
    assert len(list(tmp_path.glob("latency-*.json"))) == 2
