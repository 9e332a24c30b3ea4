"""What the report says of cost is what was measured or predicted, in which unit, and under which circumstances."""

from __future__ import annotations

import html
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from orchestrator import evidence, figures, figures_quality, remarks, report, words
from tests.orchestrator.test_report import SITES, finished_run, said
from workers.contracts import Budget, InputError, SamplerRef
from workers.latency_table import LatencyIdentity, LatencyTable, LatencyValidation

MIXED = {"budgets": (0.65, 0.5), "metrics_of": ("macs", "latency")}


def text_of(page: Path) -> str:
    """The page without tags and pictures, every run of spaces as one."""
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page.read_text())).split())


def table(ms: float) -> LatencyTable:
    """Every sub-network takes ``ms``."""
    identity = LatencyIdentity("Fast GPU", "float16", 8, 32, True, "digest", "2.11", "0.35", "13.0")
    sites = {site.name: {str(choice): ms / len(SITES) for choice in site.choices} for site in SITES}
    return LatencyTable(identity, 0.0, sites, 40.0, LatencyValidation(30, 0.012, 0.034))


# --- time -------------------------------------------------------------------------------------------------------------


def test_a_latency_budget_is_a_part_of_dense_time_everywhere(tmp_path: Path) -> None:
    text = text_of(report.build(finished_run(tmp_path, budgets=(0.5,), metrics_of=("latency",))))
    assert "A mixture of 2 experts at 50% of the dense model's time. At 50% time, samples differ" in text
    assert "Use tiny:1 (50% of dense time)" in text
    assert "of dense MACs" not in text


def test_budgets_of_both_metrics_and_the_same_ratio_are_told_apart(tmp_path: Path) -> None:
    e = evidence.gather(finished_run(tmp_path, budgets=(0.5, 0.5), metrics_of=("macs", "latency")))
    assert remarks.verdict(e).startswith("Two mixtures of 2 experts at 50% of the dense model's MACs and 50% of its time.")
    assert list(report.key_rows(e, report.cost_columns(e))) == ["", "50% of dense MACs", "50% of dense time"]
    assert {"50% mixture", "50% time mixture"} <= set(evidence.curves(e)[0])
    assert set(report.draw(e)) == {"samples", "similarity", "architecture", "cost", "training", "timeline", "pareto", "timesteps"}


def test_predicted_time_stands_beside_the_measured_one(tmp_path: Path) -> None:
    e = evidence.gather(finished_run(tmp_path, **MIXED))
    columns = {(column.title, column.unit): column for column in report.cost_columns(e)}
    predicted = columns["predicted", "ms / step"]
    assert [predicted.text(row) for row, m in enumerate(e.measured) if m.name in ("dense", "65% mixture", "50% time mixture")] == [
        "40.0",
        "",
        "20.0",
    ]
    plain = report.cost_columns(evidence.gather(finished_run(tmp_path / "macs")))
    assert "predicted" not in [column.title for column in plain]


@pytest.mark.parametrize(
    ("slower", "told"), [(1.05, ""), (1.3, "30% above the 50.0% that the latency table predicts"), (0.8, "20% below the 50.0%")]
)
def test_a_prediction_that_is_more_than_a_tenth_off_is_told(tmp_path: Path, slower: float, told: str) -> None:
    found = said(finished_run(tmp_path, **MIXED, slower=slower, errors=(0.0, 0.2)), "warning")
    assert told in found
    assert ("latency table predicts" in found) == bool(told)


def test_a_time_beyond_its_budget_is_told(tmp_path: Path) -> None:
    assert "60% of the dense model's time on this device (predicted: 50%), with 55% of its MACs: more than the budget of 50%" in said(
        finished_run(tmp_path, **MIXED, slower=1.2, errors=(0.0, 0.2)), "note"
    )


def test_the_table_that_was_used_is_found_among_others_and_described(tmp_path: Path) -> None:
    prepared = finished_run(tmp_path, **MIXED)
    cache = prepared.store.folder / "cache"
    table(33.0).save(cache / "latency-0.json")
    (cache / "latency-1.json").write_text("{ damaged")
    table(20.0).save(cache / "latency-2.json")
    text = text_of(report.build(prepared))
    assert (
        "latency-2.json: Fast GPU, float16, batch 8, with compiled blocks; prediction error 1.2% (median), 3.4% (95th percentile)" in text
    )
    assert "for a batch of 8 in float16 on Fast GPU" in text
    (cache / "latency-2.json").unlink()
    assert "latency table:" not in (gone := text_of(report.build(prepared)))
    assert "Fast GPU" not in gone


def test_the_circumstances_of_the_measured_time_are_those_of_the_jobs_latency_section(tmp_path: Path) -> None:
    job = finished_run(tmp_path / "a").job
    latency = job.latency.model_copy(update={"batch": 3, "dtype": "bfloat16", "compile": True})
    text = text_of(report.build(finished_run(tmp_path / "b", changes={"latency": latency})))
    assert "Time is measured for a batch of 3 in bfloat16, with compiled blocks" in text


# --- MACs and memory --------------------------------------------------------------------------------------------------


def test_macs_are_told_with_and_without_attention_products(tmp_path: Path) -> None:
    prepared = finished_run(tmp_path, budgets=(0.5,))
    e = evidence.gather(prepared)
    columns = {column.unit: [column.text(row) for row in range(2)] for column in report.cost_columns(e) if column.title == "GMACs"}
    assert columns == {"per step": ["1.000", "0.500"], "no attention*": ["0.900", "0.475"]}
    assert "1.00 GMACs (0.900 without attention products)" in text_of(report.build(prepared))
    assert words.gmacs(101.2e9, 96.02e9) == "101.20 GMACs (96.02 without attention products)"
    assert words.gmacs(2e9, 2e9) == "2.00 GMACs"


def test_memory_and_the_counts_of_the_exported_models_are_shown_where_they_were_measured(tmp_path: Path) -> None:
    e = evidence.gather(finished_run(tmp_path, budgets=(0.5,)))
    assert not {"memory", "exported"} & {word for column in report.cost_columns(e) for word in (column.title, column.unit)}
    measured = [
        replace(m, metrics={**m.metrics, "peak_memory_mib": 100.0 + i, "gmacs_per_step": 0.4, "parameters": 7e6})
        for i, m in enumerate(e.measured)
    ]
    columns = {(c.title, c.unit): c for c in report.cost_columns(replace(e, measured=tuple(measured)))}
    assert columns["memory", "peak, MiB"].text(1) == "101"
    assert columns["GMACs", "exported"].text(1) == "0.400"
    assert columns["parameters", "exported, M"].text(1) == "7.00"


def test_what_a_mixtures_training_took_is_shown_where_it_is_known(tmp_path: Path) -> None:
    prepared = finished_run(tmp_path, budgets=(0.5,))
    assert "trained" not in {column.title for column in report.cost_columns(evidence.gather(prepared))}
    assert "Trained counts" not in text_of(report.build(prepared))
    [done] = prepared.store.folder.glob("publish-*/done.json")
    record = json.loads(done.read_text())
    for label, images in (("macs-0.50", 512000), ("macs-0.50 cut only", 0)):
        record["result"]["metrics"][label] |= {"trained_images": images, "trainer_seconds": images / 1000}
    done.write_text(json.dumps(record))
    e = evidence.gather(prepared)
    columns = {c.unit: [c.text(i) for i in range(len(e.measured))] for c in report.cost_columns(e) if c.title == "trained"}
    assert dict(zip((m.name for m in e.measured), zip(*columns.values(), strict=True), strict=True)) == {
        "dense": ("", ""),
        "50% mixture": ("512,000", "512"),
        "50% uniform": ("", ""),
        "50% cut only": ("0", "0"),
    }
    assert "Trained counts all experts of a row, the elastic ones included" in text_of(report.build(prepared))


# --- the dense model with fewer steps, and distances --------------------------------------------------------------------


def with_fewer_steps(folder: Path, distances: dict[str, float]) -> evidence.Evidence:
    """A run whose dense model was measured at 5 of 20 steps too; ``distances``: of every row, by its name."""
    e = evidence.gather(finished_run(folder, budgets=(0.5,)))
    fewer = replace(e.dense, sampler="ddim:5", metrics={**e.dense.metrics, "calls": 5, "relative_time": 0.25, "paired_mse": 0.001})
    rows = [e.dense, fewer, *e.measured[1:]]
    return replace(e, measured=tuple(replace(m, metrics={**m.metrics, "frechet": distances.get(m.name), "kid": None}) for m in rows))


def test_dense_with_fewer_steps_stands_under_dense_and_repeats_none_of_its_losses(tmp_path: Path) -> None:
    e = with_fewer_steps(tmp_path, {})
    rows = report.key_rows(e, report.quality_columns(e))
    assert [name for name, _ in rows[""]] == ["dense", "dense ddim:5"]
    told = dict(zip([column.title for column in report.quality_columns(e)], [text for text, _ in rows[""][1][1]], strict=True))
    assert told["loss"] == ""
    assert float(told["MSE"]) == 0.001
    times = next(column for column in report.cost_columns(e) if column.unit == "all steps")
    assert [times.text(row) for row in range(3)] == ["100%", "25%", "50%"]
    assert not any(best for _, cells in rows[""] for _, best in cells), "best of its budget, and dense has none"


def test_a_mixture_under_a_further_sampler_has_its_own_costs_and_no_plans(tmp_path: Path) -> None:
    """Experts serve other parts of its steps, so what the plan says of a step does not hold; and nothing was trained for it."""
    e = evidence.gather(finished_run(tmp_path, budgets=(0.5,)))
    own = e.mixture(e.chosen[0])
    e = replace(e, measured=tuple(replace(m, metrics={**m.metrics, "gmacs_per_step": 0.5}) for m in e.measured))
    metrics = {"macs-0.50 ddim:5": {**own.metrics, "calls": 5, "gmacs_per_step": 0.4, "relative_time": 0.1, "paired_mse": 0.0001}}
    [further] = evidence._further(own, "macs-0.50", metrics, {"macs-0.50 ddim:5": own.samples})
    assert (further.name, further.experts, further.plan) == ("50% mixture ddim:5", (), own.plan)
    both = replace(e, measured=(*e.measured, further))
    assert both.macs_ratio(further) == pytest.approx(0.8 * 5 / e.dense.metrics["calls"] * own.plan.macs_ratio)
    assert not any("fewer steps" in remark.text for remark in remarks.remarks(both)), "it is no dense model"
    assert evidence.curves(both)[0] == evidence.curves(e)[0]
    columns = {(column.title, column.unit): column.text(len(e.measured)) for column in report.cost_columns(both)}
    assert columns["MACs", "of dense"] == "" != columns["time", "ms / step"]
    assert report.key_rows(both, report.cost_columns(both))["50% of dense MACs"][-1][0] == "mixture (era) ddim:5"


def test_a_mixture_that_fewer_steps_beat_is_warned_of(tmp_path: Path) -> None:
    better = with_fewer_steps(tmp_path / "a", {"dense": 1.5, "dense ddim:5": 9.0, "50% mixture": 2.0})
    assert (better.quality, better.macs_ratio(better.measured[1])) == ("frechet", 0.25)
    beats = "At 50%, the mixture beats dense with fewer steps (ddim:5): Frechet distance 2.00 in 50% of the time, against 9.00 in 25%."
    assert beats in [remark.text for remark in remarks.remarks(better) if remark.level == "good"]
    worse = with_fewer_steps(tmp_path / "b", {"dense": 1.5, "dense ddim:5": 1.9, "50% mixture": 2.0})
    is_better = (
        "At 50%, dense with fewer steps (ddim:5) is better and no slower: Frechet distance 2.00 in 50% of the time, against 1.90 in 25%."
    )
    assert is_better in [remark.text for remark in remarks.remarks(worse) if remark.level == "warning"]
    paired = with_fewer_steps(tmp_path / "c", {})
    assert any("MSE to dense" in remark.text and "fewer steps (ddim:5) is better" in remark.text for remark in remarks.remarks(paired))


def test_a_rival_whose_noise_is_scaled_otherwise_is_none(tmp_path: Path) -> None:
    e = with_fewer_steps(tmp_path, {"dense": 1.5, "dense ddim:5": 1.9, "50% mixture": 2.0})
    rival, scaled = e.measured[1], SamplerRef("ddim", 5, 0.0, 1.002)
    e = replace(e, measured=(e.measured[0], replace(rival, metrics={**rival.metrics, "sampler": scaled.to_json()}), *e.measured[2:]))
    assert not any("fewer steps" in remark.text for remark in remarks.remarks(e))


def test_dense_rows_of_the_usual_scale_are_a_line_and_others_hollow() -> None:
    point = figures_quality.Point(0.5, 0.5, 1.0, "")
    rows = [(text, point) for text in ("ddim:50", "ddim:25", "ddim:50:1.002", "dpmpp:20:1.002 eta 0.5")]
    plain, scaled = (figures_quality._dense_lines(rows, usual) for usual in ("ddim:50", "ddim:20:1.002"))
    assert [(s.name, [p.note for p in s.points]) for s in plain] == [
        ("dense, ddim (number: steps)", ["50", "25"]),
        ("dense, ddim, scaled (steps / scale)", ["50 / 1.002"]),
        ("dense, dpmpp, scaled (steps / scale)", ["20 / 1.002"]),
    ]
    assert [(s.name, [p.note for p in s.points]) for s in scaled] == [
        ("dense, ddim (number: steps)", ["50"]),
        ("dense, dpmpp (number: steps)", ["20"]),
        ("dense, ddim, scaled (steps / scale)", ["50 / 1", "25 / 1"]),
    ]


def test_mixtures_under_further_samplers_are_hollow_points_that_say_budget_steps_and_scale() -> None:
    point = figures_quality.Point(0.5, 0.5, 1.0, "")
    rows = [("50%", "ddim:25", point), ("35%", "dpmpp:10:1.009", point), ("50%", "dpmpp:20:1.004", point)]
    found = figures_quality._mixtures_under_further_samplers(rows)
    assert [(s.name, [p.note for p in s.points]) for s in found] == [
        ("mixtures, ddim (steps / scale)", ["50%: 25"]),
        ("mixtures, dpmpp (steps / scale)", ["35%: 10 / 1.009", "50%: 20 / 1.004"]),
    ]
    assert {s.style["markerfacecolor"] for s in found} == {"white"}


def test_distances_are_columns_where_they_were_measured_and_decide_the_picture(tmp_path: Path) -> None:
    e = with_fewer_steps(tmp_path, {"dense": 1.5, "dense ddim:5": 9.0, "50% mixture": 2.25, "50% uniform": 3.0})
    columns = {column.title: column for column in report.quality_columns(e)}
    assert [columns["FD"].text(row) for row in range(4)] == ["1.50", "9.00", "2.25", "3.00"]
    assert "KID" not in columns
    assert "FD" not in {column.title for column in report.quality_columns(with_fewer_steps(tmp_path / "none", {}))}
    assert figures_quality.pareto(e) != figures_quality.pareto(with_fewer_steps(tmp_path / "mse", {}))


def test_rows_of_two_protocols_make_no_report(tmp_path: Path) -> None:
    prepared = finished_run(tmp_path, budgets=(0.5,))
    [done] = prepared.store.folder.glob("publish-*/done.json")
    record = json.loads(done.read_text())
    for label, protocol in (("dense", "aaa"), ("macs-0.50", "bbb")):
        record["result"]["metrics"][label]["protocol"] = {"id": protocol, "images": len(label)}
    done.write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"protocols aaa and bbb, which differ in images 5 and 9: measure both under one"):
        evidence.gather(prepared)


def test_several_budgets_make_one_sentence() -> None:
    budgets = [Budget("latency", 0.7, "ddim", 4), Budget("macs", 0.5, "ddim", 4), Budget("latency", 0.6, "ddim", 4)]
    assert words.of_the_dense_model(budgets) == "70% and 60% of the dense model's time and 50% of its MACs"


# --- pictures and code ------------------------------------------------------------------------------------------------


def test_large_samples_are_few_and_reduced_so_that_the_page_stays_small(tmp_path: Path) -> None:
    prepared = finished_run(tmp_path, samples=6, size=256)
    page = report.build(prepared)
    assert page.stat().st_size < 8e6  # noise, which no PNG makes smaller
    width, height = Image.open(prepared.store.folder / "figures" / "samples.png").size
    assert width <= 1000
    assert height < 6 * 200
    assert "The images are 256 pixels wide and shown smaller." in text_of(page)


def test_samples_are_headed_by_their_classes(tmp_path: Path) -> None:
    e = evidence.gather(finished_run(tmp_path))
    assert e.classes is None
    assert figures.samples(e.measured, (3, 1, 2)) != figures.samples(e.measured)


def test_the_classes_of_samples_are_those_that_were_drawn(tmp_path: Path) -> None:
    from workers.conditioning import Classes
    from workers.contracts import derive_seed

    model = tmp_path / "model"
    (model / "unet").mkdir(parents=True)
    config = {"_class_name": "UNet2DModel", "num_class_embeds": 7, "in_channels": 3, "out_channels": 3, "sample_size": 8}
    (model / "unet" / "config.json").write_text(json.dumps(config))
    base = finished_run(tmp_path / "a").job
    changes = {"model": base.model.model_copy(update={"path": str(model)})}
    prepared = finished_run(tmp_path / "b", changes=changes)
    expected = Classes("class_labels", 7).of_seeds([derive_seed(base.seed, "sample", i) for i in range(3)])
    assert evidence.gather(prepared).classes == tuple(expected or ())
    text = text_of(report.build(prepared))
    assert "Every column starts from the same noise and is of the same class." in text
    assert "--class-label 0" in text
    assert "DiffusionPipeline" not in text  # it would not tell the denoiser a class


def test_a_class_conditional_latent_pipeline_is_loaded_by_its_own_class(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text(json.dumps({"_class_name": "ClassConditionalLDMPipeline"}))
    base = finished_run(tmp_path / "a").job
    changes = {"model": base.model.model_copy(update={"path": str(tmp_path / "model")})}
    text = text_of(report.build(finished_run(tmp_path / "b", budgets=(0.5,), changes=changes)))
    assert "from workers.ldm_pipeline import ClassConditionalLDMPipeline from workers.mixture import MixtureDenoiser" in text
    assert "images = pipeline(class_labels=[0, 1], guidance_scale=1.0, num_inference_steps=20).images" in text
    assert "from diffusers" not in text
