"""One table over several runs: every number is one that a run measured, dense stands there once, and nothing incomparable is mixed."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest
from click.testing import CliRunner, Result

from orchestrator import figures_quality, results
from orchestrator.cli import main
from orchestrator.store import RunStore, write_json
from workers.contracts import Partition, Protocol, SamplerRef, Timing

MODEL = ["models/one", "a" * 64]


def diffpruning(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


GPU, CPU = "NVIDIA H200", "Some CPU, threads: 2"


def row(
    ms: float, frechet: float | None, sampler: str = "ddim:50", gmacs: float = 6.0, seed: int = 0, batch: int = 8, device: str | None = GPU
) -> dict[str, Any]:
    """Metrics of one denoiser, dense beside it taking 10 ms a step and the sampler calling it once per step."""
    scheduler, _, steps = sampler.partition(":")
    distances = {} if frechet is None else {"frechet": frechet, "kid": frechet / 1000}
    return {
        "gmacs_per_step": gmacs,
        "ms_per_step": ms,
        "dense_ms_per_step": 10.0,
        "calls": int(steps),
        "paired_mse": (frechet or 5.0) / 100,
        "sampler": SamplerRef(scheduler, int(steps), 0.0).to_json(),
        "protocol": Protocol((3, 32, 32), seed, 1.0, "float32", images=100 if frechet else 0).told(),
        "timing": Timing(batch, "float32", False).to_json(),
        "device": device,
        "samples": 16,
        "commit": "c" * 40,
        **distances,
    }


def dense(sampler: str = "ddim:50", frechet: float | None = 4.0, **more: Any) -> dict[str, Any]:
    return {**row(10.0, frechet, sampler, 6.0, **more), "paired_mse": 0.0}


def run_folder(
    folder: Path,
    metrics: dict[str, dict[str, Any]],
    experts: int = 3,
    model: list[str] = MODEL,
    job: dict[str, Any] | None = None,
    seed: int = 0,
    agent: str = "era",
) -> Path:
    """A run that published ``metrics``; ``job``: settings beside name and seed; ``agent``: who found its plans."""
    store = RunStore(folder)
    store.claim({"name": folder.name, "model.path": model, "data.path": ["images", "b" * 64]})
    cuts = Partition.from_boundaries([1000 * k // experts for k in range(1, experts)], 1000)
    fingerprints = {"partition": "1" * 64, "route": "5" * 64, "finetune": "2" * 64, "publish": "3" * 64}
    made = {
        "partition": {"partition": cuts.to_json()},
        "route": {"chosen": {"macs-0.50": {"agent": agent}}},
        "publish": {"metrics": metrics, "mixtures": "2" * 64},
    }
    for stage, result in made.items():
        store.stage_folder(stage, fingerprints[stage]).mkdir()
        store.finish(stage, fingerprints[stage], result, 0.0, 1.0)
    write_json(folder / "progress.json", {"fingerprints": fingerprints})
    config = {"name": folder.name, "seed": seed, "model": {}, "evaluate": {}, "data": {"path": "images"}, **(job or {})}
    results.record(folder, "jobs/small.yaml", [f"name={folder.name}"], config)
    return folder


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    """Three experts and one expert, with dense measured apart: 4.0 and 4.1."""
    learned = {"dense": dense(), "dense ddim:20": row(10.0, 9.0, "ddim:20"), "macs-0.50": row(6.0, 5.0, gmacs=3.0)}
    single = {"dense": dense(frechet=4.1), "macs-0.50": row(5.5, 6.0, gmacs=3.0), "macs-0.50 cut only": row(5.0, 80.0, gmacs=3.0)}
    return [run_folder(tmp_path / "k3", learned), run_folder(tmp_path / "k1", single, experts=1)]


def collected(*folders: Path, group: bool = False) -> dict[str, Any]:
    return results.collect([results.load(folder) for folder in folders], group)


# --- the table --------------------------------------------------------------------------------------------------------


def test_rows_are_sorted_by_time_and_dense_stands_there_once(two):
    found = collected(*two)
    keys = ("run", "label", "experts", "sampler", "macs_per_step", "relative_time", "frechet")
    assert [tuple(r[key] for key in keys) for r in found["rows"]] == [
        ("", "dense", [], "ddim:20", 1.0, 0.4, 9.0),
        ("k1", "macs-0.50 cut only", [1], "ddim:50", 0.5, 0.5, 80.0),
        ("k1", "macs-0.50", [1], "ddim:50", 0.5, 0.55, 6.0),
        ("k3", "macs-0.50", [3], "ddim:50", 0.5, 0.6, 5.0),
        ("", "dense", [], "ddim:50", 1.0, 1.0, 4.0),
    ]
    assert [r["macs"] for r in found["rows"]] == [0.4, 0.5, 0.5, 0.5, 1.0]
    assert [r["frechet"] for r in collected(*reversed(two))["rows"]][-1] == 4.1, "dense is that of the first run"


def test_a_further_sampler_of_a_mixture_and_of_a_version_is_a_row_of_the_same_denoiser(tmp_path):
    rows = {"dense": dense(), "macs-0.50": row(6.0, 5.0), "macs-0.50 ddim:20:1.01": row(5.0, 7.0, "ddim:20")}
    version = {"church:2": row(6.0, 5.0), "church:2 ddim:20": row(6.0, 8.0, "ddim:20")}
    found = collected(run_folder(tmp_path / "k3", {**rows, **version}))
    assert [(r["label"], r["sampler"], r["experts"], r["agents"], r["relative_time"]) for r in found["rows"]] == [
        ("macs-0.50", "ddim:20", [3], ["era"], 0.2),
        ("church:2", "ddim:20", [], [], pytest.approx(0.24)),
        ("macs-0.50", "ddim:50", [3], ["era"], 0.6),
        ("church:2", "ddim:50", [], [], 0.6),
        ("dense", "ddim:50", [], [], 1.0),
    ]
    assert figures_quality.pareto_of_runs(found).startswith(b"\x89PNG")


def test_times_of_another_device_are_left_out_and_its_quality_is_not(two, tmp_path):
    there = {"dense": dense(device=CPU, batch=2), "macs-0.50": row(8.0, 5.5, gmacs=3.0, device=CPU, batch=2)}
    older = {"dense": dense(device=None), "macs-0.50": row(8.0, 5.7, gmacs=3.0, device=None)}
    found = collected(two[0], run_folder(tmp_path / "there", there), run_folder(tmp_path / "older", older))
    assert found["device"] == GPU
    assert [(r["run"], r["relative_time"], r["ms_per_step"], r["frechet"], r["devices"]) for r in found["rows"]] == [
        ("", 0.4, 10.0, 9.0, [GPU]),
        ("k3", 0.6, 6.0, 5.0, [GPU]),
        ("", 1.0, 10.0, 4.0, [GPU]),
        ("there", None, None, 5.5, [CPU]),
        ("older", None, None, 5.7, [None]),
    ]
    text = results.text(found)
    assert f"times: on {GPU}, a batch of 8 in float32, not compiled; those of there ({CPU}) and older (not named) are left out" in text
    assert "| there | macs-0.50 | 3 | era | ddim:50 | 50% |  |  | 5.50 |" in results.markdown(found)
    assert figures_quality.pareto_of_runs(found).startswith(b"\x89PNG")


def test_the_mean_over_seeds_of_two_devices_has_no_time(tmp_path):
    folders = [
        run_folder(tmp_path / f"s{s}", {"dense": dense(seed=s, device=name), "macs-0.50": row(6.0, 5.0, seed=s, device=name)}, seed=s)
        for s, name in enumerate((GPU, CPU))
    ]
    for one in collected(*folders, group=True)["rows"]:
        assert (one["n"], one["relative_time"], one["std"]["relative_time"], one["devices"]) == (2, None, None, [GPU, CPU])
        assert one["frechet"] is not None


def test_errors_over_another_number_of_samples_are_left_out(two, tmp_path):
    few = {label: {**metrics, "samples": 4} for label, metrics in {"dense": dense(), "macs-0.50": row(7.0, 5.5)}.items()}
    found = collected(two[0], run_folder(tmp_path / "few", few))
    assert {r["run"]: r["paired_mse"] for r in found["rows"] if r["run"]} == {"k3": 0.05, "few": None}


def test_runs_say_on_how_many_images_their_experts_were_trained(tmp_path):
    job = {"specialize": {"steps": 500, "batch_size": 256}, "finetune": {"steps": 1000, "batch_size": 128}}
    rows = {"dense": dense(), "macs-0.50": row(6.0, 5.0), "macs-0.50 cut only": row(5.0, 80.0), "other:1": row(4.0, 9.0)}
    found = collected(run_folder(tmp_path / "k2", rows, experts=2, job=job))
    assert {r["label"]: r["trained_images"] for r in found["rows"]} == {
        "dense": None,
        "macs-0.50": 2 * (500 * 256 + 1000 * 128),
        "macs-0.50 cut only": 0,
        "other:1": None,
    }
    assert "| 512,000 |" in results.markdown(found)


def test_the_markdown_says_under_what_it_holds_and_how_its_runs_are_made(two):
    lines = results.markdown(collected(*two)).splitlines()
    assert lines[0] == "| run |  | K | agent | sampler | MACs/step | time | ms/step | FD | KID | MSE to dense |"
    assert lines[1] == "| :-- | :-- | --: | :-- | :-- | --: | --: | --: | --: | --: | --: |"
    assert lines[5] == "| k3 | macs-0.50 | 3 | era | ddim:50 | 50% | 60% | 6.00 | 5.00 | 0.00500 | 0.0500 |"
    assert lines[6].startswith("|  | dense |  |  | ddim:50 | 100% | 100% | 10.0 | 4.00 |")
    assert f"- k1: `diffpruning run jobs/small.yaml --set name=k1`, measured at commit {'c' * 40}" in lines
    assert any(line.startswith("protocol ") for line in lines)
    cells = results.text(collected(two[0])).splitlines()
    assert cells[0].split() == ["K", "agent", "sampler", "MACs/step", "time", "ms/step", "FD", "KID", "MSE", "to", "dense"], (
        "one run needs no name"
    )


def test_another_sampler_is_compared_by_all_steps_but_not_by_an_error_paired_with_another_dense(two, tmp_path):
    short = {"dense": dense("ddim:20", 9.5), "macs-0.50": row(6.0, 11.0, "ddim:20", gmacs=3.0)}
    found = collected(*two, run_folder(tmp_path / "short", short))
    [mixture] = [r for r in found["rows"] if r["run"] == "short"]
    assert (mixture["relative_time"], mixture["macs"], mixture["macs_per_step"]) == (pytest.approx(0.24), pytest.approx(0.2), 0.5)
    assert mixture["paired_mse"] is None
    assert [r["frechet"] for r in found["rows"] if r["label"] == "dense"] == [9.0, 4.0], "its dense is a row of the first run"
    assert "left out for what was paired with another" in results.text(found)


def test_evaluate_adds_rows_of_the_same_mixtures_and_protocol_and_replaces_none(two):
    folder = two[0]
    rows = {"dense": dense(frechet=7.0), "dense ddim:10": row(10.0, 20.0, "ddim:10"), "other:1": row(3.0, 9.0)}

    def labels(mixtures: str) -> list[str]:
        write_json(folder / results.TABLE, {"mixtures": mixtures, "rows": rows})
        assert results.load(folder).dense["frechet"] == 4.0
        return list(results.load(folder).rows)

    (folder / "evaluation").mkdir()
    mine = ["dense", "dense ddim:20", "macs-0.50"]
    assert labels("2" * 64) == [*mine, "dense ddim:10", "other:1"]
    assert labels("4" * 64) == [*mine, "dense ddim:10", "other:1"], "a version never changes"
    assert [r["experts"] for r in collected(folder)["rows"] if r["label"] == "other:1"] == [[]]
    rows |= {"dense": dense(frechet=None), "dense ddim:10": row(10.0, None, "ddim:10")}
    assert labels("2" * 64) == [*mine, "other:1"]
    (folder / "publish-33333333" / "done.json").unlink()
    rows |= {"macs-0.50": row(6.0, None)}
    write_json(folder / results.TABLE, {"mixtures": "2" * 64, "rows": rows})
    assert list(results.load(folder).rows) == ["dense", "dense ddim:10", "macs-0.50"]
    write_json(folder / results.TABLE, {"rows": rows})
    assert list(results.load(folder).rows) == ["dense", "dense ddim:10"], "whose mixtures these are is not said"


def test_what_was_published_holds_where_only_the_evaluation_has_changed_since(two):
    """`evaluate` with one more row of dense is another publish stage, which was never run."""
    folder, rows = two[0], {"dense": dense(), "dense ddim:10": row(10.0, 20.0, "ddim:10")}
    before = list(results.load(folder).rows)

    def moved(**fingerprints: str) -> results.Run:
        old = {"partition": "1" * 64, "route": "5" * 64, "finetune": "2" * 64, "publish": "9" * 64}
        write_json(folder / "progress.json", {"fingerprints": {**old, **fingerprints}})
        return results.load(folder)

    assert list(moved().rows) == before, "evaluate was killed"
    (folder / "evaluation").mkdir()
    write_json(folder / results.TABLE, {"mixtures": "2" * 64, "rows": rows})
    assert sorted(moved().rows) == sorted([*before, "dense ddim:10"])
    assert moved().left_out == []
    assert "macs-0.50" in [r["label"] for r in collected(folder)["rows"]]
    assert list(moved(finetune="8" * 64).rows) == ["dense", "dense ddim:10"], "other mixtures"


def test_rows_of_another_protocol_or_number_of_samples_are_named_and_left_out(two):
    folder = two[0]
    fingerprints = {"partition": "1" * 64, "finetune": "2" * 64, "publish": "9" * 64}
    write_json(folder / "progress.json", {"fingerprints": fingerprints})
    (folder / "evaluation").mkdir()
    for other in (dense(frechet=None), {**dense(), "samples": 4}, dense(batch=64)):
        write_json(folder / results.TABLE, {"mixtures": "2" * 64, "rows": {"dense": other}})
        assert (list(results.load(folder).rows), results.load(folder).left_out) == (["dense"], ["dense ddim:20", "macs-0.50"])
        told = "left out of k3, as measured under another protocol, timing or number of samples than dense: dense ddim:20 and macs-0.50"
        assert told in results.text(collected(folder)).splitlines()


def test_every_row_says_who_found_its_plan(two, tmp_path):
    named = run_folder(tmp_path / "named", {"dense": dense(), "macs-0.50": {**row(6.0, 5.0), "agent": "greedy"}})
    labels = {"macs-0.50 uniform": row(5.0, 9.0), "macs-0.50 cut only": row(5.0, 80.0), "other:1": {**row(4.0, 9.0), "agent": "knapsack"}}
    found = collected(run_folder(tmp_path / "a", {"dense": dense(), "macs-0.50": row(6.0, 5.0), **labels}), named)
    assert {(r["run"], r["label"]): r["agents"] for r in found["rows"]} == {
        ("", "dense"): [],
        ("a", "macs-0.50"): ["era"],
        ("a", "macs-0.50 uniform"): ["uniform"],
        ("a", "macs-0.50 cut only"): ["uniform"],
        ("a", "other:1"): ["knapsack"],
        ("named", "macs-0.50"): ["greedy"],
    }
    seeds = [
        run_folder(tmp_path / f"s{s}", {"dense": dense(seed=s), "macs-0.50": row(6.0, 5.0, seed=s)}, seed=s, agent=agent)
        for s, agent in enumerate(("greedy", "era"))
    ]
    assert "| era, greedy |" in results.markdown(collected(*seeds, group=True))


def test_more_columns_stand_there_when_they_are_asked_for(tmp_path):
    def measured(batch: int, **more: Any) -> dict[str, Any]:
        drawn = {"drawn": {"batch": batch, "compiled": False}, "ms_per_image": 12.5, "peak_memory_mib": 1234.0, "trainer_seconds": 99.6}
        return {**row(6.0, 5.0), **drawn, "trained_images": 640, **more}

    rows = {"dense": {**dense(), "drawn": {"batch": 8, "compiled": False}}, "macs-0.50": measured(8), "macs-0.40": measured(64)}
    found = collected(run_folder(tmp_path / "wide", {**rows, "macs-0.50 uniform": measured(8, paired_lpips=0.25)}))
    assert {r["label"]: (r["ms_per_image"], r["peak_memory_mib"], r["paired_lpips"]) for r in found["rows"] if r["label"] != "dense"} == {
        "macs-0.50": (12.5, 1234.0, None),
        "macs-0.40": (None, 1234.0, None),
        "macs-0.50 uniform": (12.5, 1234.0, 0.25),
    }, "the time of an image in another batch is left out"
    head, *_ = results.markdown(found, more=True).splitlines()
    assert head.endswith("| MSE to dense | trained on | LPIPS to dense | ms/image | peak MiB | trainer s |")
    assert "| 0.250 | 12.5 | 1,234 | 100 |" in results.markdown(found, more=True)
    assert "ms/image" not in results.markdown(found)
    done = diffpruning("results", tmp_path / "wide", "--all-columns")
    assert done.stdout == results.text(found, more=True) + "\n"
    assert "trainer s: of all their trainers together." in done.stdout


def test_numbers_that_were_not_measured_or_are_none_stay_empty(tmp_path):
    broken = {"dense": dense(frechet=None), "macs-0.50": {**row(6.0, None), "paired_mse": float("nan")}}
    found = collected(run_folder(tmp_path / "broken", broken))
    assert found["rows"][0]["paired_mse"] is None
    assert json.dumps(found, allow_nan=False)
    assert results.markdown(found).startswith("|  | K | agent | sampler | MACs/step | time | ms/step | MSE to dense |\n")


# --- seeds --------------------------------------------------------------------------------------------------------------


def seeds(folder: Path, count: int = 3, **more: Any) -> list[Path]:
    distances = [5.0, 6.0, 8.0]
    return [
        run_folder(
            folder / f"s{s}",
            {"dense": dense(frechet=4.0 + s, seed=s), "macs-0.50": row(6.0, distances[s], gmacs=3.0, seed=s)},
            experts=2 + s % 2,
            seed=s,
            **more,
        )
        for s in range(count)
    ]


def test_runs_that_differ_in_seed_alone_become_mean_and_spread(tmp_path):
    found = collected(*seeds(tmp_path), group=True)
    mixture, whole = found["rows"]
    assert (mixture["n"], mixture["runs"], mixture["experts"]) == (3, ["s0", "s1", "s2"], [2, 3])
    assert (mixture["frechet"], mixture["std"]["frechet"]) == (pytest.approx(19 / 3), pytest.approx(stdev([5.0, 6.0, 8.0])))
    assert (whole["label"], whole["n"], whole["frechet"], whole["std"]["frechet"]) == ("dense", 3, 5.0, 1.0)
    assert "| 2, 3 | era | ddim:50 | 3 | 50% \N{PLUS-MINUS SIGN} 0% | 60% " in results.markdown(found)
    assert "6.33 \N{PLUS-MINUS SIGN} 1.53" in results.text(found)
    assert "also seeds 1 and 2" in results.text(found)


def test_runs_that_differ_in_more_stay_apart(tmp_path):
    one, other = seeds(tmp_path / "a"), seeds(tmp_path / "b", 1, job={"finetune": {"steps": 9}})
    found = collected(*one, *other, group=True)
    assert sorted((r["label"], r["n"]) for r in found["rows"]) == [("dense", 3), ("macs-0.50", 1), ("macs-0.50", 3)]
    assert {r["run"] for r in found["rows"]} == {"", str(one[0]), str(other[0])}, "runs of one name are told apart by folder"


# --- the command --------------------------------------------------------------------------------------------------------


def test_the_command_writes_the_table_and_the_figure(two, tmp_path):
    out, figure = tmp_path / "results.md", tmp_path / "pareto.png"
    done = diffpruning("results", *two, "--out", out, "--figure", figure, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["out"], found["figure"]) == (str(out), str(figure))
    assert {key: value for key, value in found.items() if key not in ("out", "figure")} == collected(*two)
    assert out.read_text() == results.markdown(collected(*two))
    assert figure.read_bytes() == figures_quality.pareto_of_runs(collected(*two))
    assert diffpruning("results", *two).stdout == results.text(collected(*two)) + "\n"


def test_the_figure_shows_spread_over_seeds(tmp_path):
    found = collected(*seeds(tmp_path), group=True)
    exact = {**found, "rows": [{**r, "std": {}} for r in found["rows"]]}
    assert figures_quality.pareto_of_runs(found) != figures_quality.pareto_of_runs(exact)


def test_the_commit_is_that_of_a_checkout_alone(tmp_path):
    assert results.commit(tmp_path) is None
    (tmp_path / ".git").mkdir()
    assert results.commit(tmp_path) is None, "no checkout, or git cannot read it"


def test_what_cannot_stand_in_one_table_is_one_line_and_nothing_is_written(two, tmp_path):
    def other(name: str, metrics: dict[str, Any], **more: Any) -> Path:
        return run_folder(tmp_path / name, metrics, **more)

    nothing = other("nothing", {})
    old = other("old", {"dense": {**dense(), "protocol": None}})
    silent = other("silent", {"dense": dense(seed=1), "macs-0.50": row(6.0, 5.0, seed=1)}, seed=1)
    (silent / "job.json").unlink()
    cases: list[tuple[list[Any], str]] = [
        ([other("model", {"dense": dense()}, model=["models/two", "c" * 64])], "k3 and model cannot stand in one table: their models are"),
        ([other("plain", {"dense": dense(frechet=None)})], "which differ in images 100 and 0: measure both under one"),
        ([other("slow", {"dense": dense(batch=64)})], "k3 and slow cannot stand in one table: their times hold for batch 8 and 64"),
        ([other("seed", {"dense": dense(seed=5)})], "k3 and seed differ in the seed of their noise, 0 and 5: --group"),
        ([silent, "--group"], "silent does not record its job: the same `diffpruning run` again"),
        ([two[0]], "k3 is given twice"),
        ([other("same", {"dense": dense(), "macs-0.50": row(6.0, 5.0)}), "--group"], "same are one job with one seed, 0: give one"),
        ([nothing], "nothing is measured in"),
        ([old], "row 'dense' has no protocol"),
        ([tmp_path / "absent.yaml"], "no such job file"),
        (["--figure", tmp_path], "is a folder; give the name of a file"),
        (["--figure", tmp_path / "no" / "a.png"], "--figure: no such folder"),
    ]
    for more, told in cases:
        done = diffpruning("results", two[0], *more, "--out", tmp_path / "table.md")
        assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.output
        assert told in done.stderr
    assert not list(tmp_path.glob("*.md"))
    assert not list(tmp_path.glob("*.png"))


def test_a_run_under_the_default_storage_path_is_known_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_folder(tmp_path / "runs" / "mine", {"dense": dense()})
    assert diffpruning("results", "mine").stdout == diffpruning("results", "runs/mine").stdout != ""
    assert "no such job file: other" in diffpruning("results", "other").stderr


def test_a_job_is_recorded_once_and_again_when_it_changes(tmp_path):
    results.record(tmp_path, "job.yaml", [], {"seed": 0})
    before = (tmp_path / "job.json").stat().st_mtime_ns
    results.record(tmp_path, "elsewhere/job.yaml", ["seed=0"], {"seed": 0})
    assert (tmp_path / "job.json").stat().st_mtime_ns == before
    results.record(tmp_path, "job.yaml", ["seed=1"], {"seed": 1})
    assert json.loads((tmp_path / "job.json").read_text())["set"] == ["seed=1"]
