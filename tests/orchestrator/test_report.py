"""The report says what the run measured, also where the run looks bad, and is one page that needs nothing else."""

from __future__ import annotations

import html
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator import evidence, figures, remarks, report, words
from orchestrator.config import JobConfig
from orchestrator.pipeline import Pipeline
from orchestrator.planning import Prepared
from orchestrator.stages import STAGES
from orchestrator.store import RunStore
from workers.contracts import (
    ArchitectureSpec,
    Budget,
    Cost,
    ElasticSite,
    ExpertCheckpoint,
    InputError,
    Interval,
    MixturePlan,
    Partition,
    SamplerRef,
    SearchSpace,
    SimilarityMatrix,
    SiteReason,
)
from workers.cost import CostTable

SITES = (
    ElasticSite("up_blocks.0.resnets.0", (0, 2, 4), "group"),
    ElasticSite("mid_block.attentions.0", (0, 1, 2), "head"),
    ElasticSite("down_blocks.0.attentions.0", (0, 1, 2), "head"),
    ElasticSite("down_blocks.0.resnets.0", (0, 2, 4), "group"),
)
DENSE = Cost(macs=1_000_000_000, params=4_000_000, attention_macs=100_000_000, latency_ms=40.0)
T = 1000


def plan(budget: Budget, agent: str, partition: Partition, loss: float, choice: int) -> MixturePlan:
    """Every site of every expert at its choice number ``choice``; expert k costs a little more than k - 1."""
    spec = ArchitectureSpec({site.name: site.choices[choice] for site in SITES})
    shares = tuple(interval.length / T for interval in partition.intervals)
    ratio = budget.ratio if agent != "uniform" else 0.98 * budget.ratio
    timed = budget.metric == "latency"
    macs, ms = int(ratio * DENSE.macs * (1.1 if timed else 1)), 40 * ratio if timed else None
    costs = tuple(Cost(macs, 1_500_000 + 10_000 * k, macs // 20, ms) for k in range(len(partition)))
    dense = DENSE if timed else replace(DENSE, latency_ms=None)
    return MixturePlan(budget, agent, 0, partition, (spec,) * len(partition), shares, costs, dense, loss, 12.5)


def metrics(loss: float, mse: float | None, time: float) -> dict[str, Any]:
    by_timestep = {"timesteps": [100, 500, 900], "denoising_loss_by_timestep": [2 * loss, loss / 2, loss / 2]}
    paired = {"paired_mse": mse or 0.0, "paired_psnr_db": 6.02 - 10 * np.log10(mse) if mse else None, "paired_ssim": 0.9 if mse else 1.0}
    drawn = {"sampler": SamplerRef("ddim", 20, 0.0).to_json(), "calls": 20, "relative_time": time / 40}
    return {"denoising_loss": loss, "ms_per_step": time, **drawn, **by_timestep, **paired}


def finished_run(
    folder: Path,
    *,
    budgets: tuple[float, ...] = (0.65, 0.5),
    metrics_of: tuple[str, ...] = ("macs", "macs"),
    slower: float = 1.0,
    boundaries: tuple[int, ...] = (300,),
    losses: tuple[float, float, float] = (2.0, 1.5, 1.2),
    errors: tuple[float, float] = (0.1, 0.2),
    reliability: float = 0.9,
    frequency: float = 0.95,
    samples: int = 3,
    size: int = 8,
    changes: dict[str, Any] | None = None,
    skip: str = "",
) -> Prepared:
    """A run folder as the six stages leave it. ``losses``: of uniform, greedy and era; ``errors``: of the mixture and uniform.

    ``metrics_of``: of every budget. ``slower``: how much more time than its ratio of dense a measured mixture takes.
    """
    job = JobConfig.model_validate(
        {
            "name": "tiny",
            "storage": {"path": str(folder)},
            "model": {"path": "some/model"},
            "data": {"path": "some/images"},
            "budgets": [{"ratio": ratio, "metric": metric} for ratio, metric in zip(budgets, metrics_of, strict=False)],
        }
    ).model_copy(update=changes or {})
    store = RunStore(folder / "run")
    pipeline = Pipeline(
        STAGES, job.model_dump(mode="json"), {"model": "ab" * 32, "data.path": "cd" * 32, "first_stage": "", "timing": ""}, store
    )
    space = SearchSpace(SITES)
    prepared = Prepared(job, store, pipeline, CostTable(space, DENSE, {}, {}, {}), 1000, 10**9, 10**12)

    partition, grid = Partition.from_boundaries(boundaries, T), tuple(range(50, T, 100))
    similarity = 1 - np.abs(np.subtract.outer(grid, grid)) / T
    matrix = SimilarityMatrix("gradient", T, grid, tuple(map(tuple, similarity.tolist())), (reliability,) * len(grid), 64)
    cut = {
        "partition": partition.to_json(),
        "cost": 0.5,
        "curve": {"1": 1.0, "2": 0.5},
        "boundary_frequency": [frequency] * len(boundaries),
        "baselines": {"uniform in t": {"partition": partition.to_json(), "cost": 0.7}},
    }

    def expert(name: str, interval: Interval, started: float) -> ExpertCheckpoint:
        path = folder / "run" / "train" / name / "step_0000004"
        path.mkdir(parents=True, exist_ok=True)
        (path / "checkpoint.json").write_text(json.dumps({"history": [[1, 0.5], [2, 0.4], [3, 0.3], [4, 0.25]]}))
        return ExpertCheckpoint(interval, f"train/{name}/step_0000004", 4, 0.25, started, started + 60, 50.0)

    rng = np.random.default_rng(0)
    arrays = {"dense": rng.uniform(-1, 1, (samples, 3, size, size)).astype(np.float32)}
    measured = {"dense": metrics(0.02, None, 40.0)}
    trials, chosen, tuned, published = [], {}, {}, {}
    for number, (ratio, metric) in enumerate(zip(budgets, metrics_of, strict=False), 1):
        budget = Budget(metric, ratio, "ddim", 20)
        found = [
            plan(budget, agent, partition, loss, i)
            for i, (agent, loss) in enumerate(zip(("uniform", "greedy", "era"), losses, strict=True))
        ]
        best = min(found, key=lambda p: p.loss)
        trials += found
        chosen[budget.name] = best
        kinds = {"": errors[0], " cut only": 0.8} | ({" uniform": errors[1]} if best is not found[0] else {})
        for kind, error in kinds.items():
            noisy = arrays["dense"] + error * rng.standard_normal(arrays["dense"].shape)
            arrays[budget.name + kind] = noisy.astype(np.float32)
            mse = float(np.square(arrays[budget.name + kind] - arrays["dense"]).mean())
            measured[budget.name + kind] = metrics(0.021 + error / 10, mse, 40 * ratio * slower + error)
            for interval in partition.intervals if kind != " cut only" else ():
                name = f"{budget.name}{kind} {interval.name}"
                tuned[name] = expert(name, interval, 2000.0).to_json()
        published[budget.name] = {"reference": f"tiny:{number}", "path": str(folder / "registry" / "tiny" / str(number))}
    results = {
        "analyze": {"similarity": matrix.to_json()},
        "partition": cut,
        "specialize": {"experts": [expert(i.name, i, 1000.0 + 20 * k).to_json() for k, i in enumerate(partition.intervals)]},
        "route": {
            "chosen": {name: p.to_json() for name, p in chosen.items()},
            "trials": [p.to_json() for p in trials],
            "influence": [0.8, 1.2],
            "seconds": {"sensitivities": 1.0, "influence": 2.0, "trials": 12.0},
        },
        "finetune": {"experts": tuned},
        "publish": {"metrics": measured, "rows": {label: f"evaluation/{label}.json" for label in measured}, "published": published},
    }
    for stage, result in results.items():
        fingerprint = pipeline.fingerprints[stage]
        store.stage_folder(stage, fingerprint).mkdir(parents=True)
        if stage != skip:
            store.finish(stage, fingerprint, result, 1000.0, 30.0)
    (store.folder / "evaluation").mkdir()
    for label, drawn in arrays.items():
        np.savez(store.folder / "evaluation" / f"{label}.npz", samples=drawn)
    return prepared


def said(prepared: Prepared, level: str) -> str:
    return " ".join(remark.text for remark in remarks.remarks(evidence.gather(prepared)) if remark.level == level)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Prepared, str]:
    prepared = finished_run(tmp_path_factory.mktemp("report"))
    return prepared, report.build(prepared).read_text()


# --- the page -------------------------------------------------------------------------------------------------------


def test_page_lies_in_the_run_folder_with_every_figure_beside_it(built: tuple[Prepared, str]) -> None:
    folder = built[0].store.folder
    assert (folder / "report.html").is_file()
    names = {"samples", "similarity", "architecture", "cost", "training", "timeline", "pareto", "timesteps"}
    assert {path.stem for path in (folder / "figures").iterdir()} == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (folder / "figures").iterdir())
    assert not list(folder.glob("**/*.tmp"))


def test_page_needs_nothing_else(built: tuple[Prepared, str]) -> None:
    page = built[1]
    sources = re.findall(r'(?:src|href)\s*=\s*"([^"]*)', page)
    assert len(sources) == 8
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?://|<script|<link|url\(|@import", page)


def test_page_holds_the_numbers_of_the_run(built: tuple[Prepared, str]) -> None:
    prepared, page = built
    e = evidence.gather(prepared)
    text = html.unescape(re.sub(r"<[^>]+>", " ", page))
    for m in e.measured[1:]:
        assert f"{m.metrics['paired_psnr_db']:.2f}" in text
        assert f"{m.metrics['paired_ssim']:.3f}" in text
    assert f"MSE {words.sig(e.mixture(e.smallest).mse)}" in remarks.verdict(e)
    assert remarks.verdict(e) in text
    assert remarks.verdict(e).startswith("Two mixtures of 2 experts at 65% and 50% of the dense model's MACs.")
    assert "2 of 2 specialize trainers ran at the same time for 40 s." in text
    assert "MixtureDenoiser.from_pretrained(" in text
    assert "diffpruning registry verify tiny:1" in text
    assert "all that was measured for it: 15 s of workers' time, 3.0% of training's (500 s, elastic experts and fine-tuning)" in " ".join(
        text.split()
    )


def test_same_run_gives_the_same_bytes(built: tuple[Prepared, str]) -> None:
    prepared, page = built
    assert report.build(prepared).read_text() == page


def test_hostile_names_and_paths_stay_text(tmp_path: Path) -> None:
    evil = "\"><script>alert(1)</script><img src=http://evil.example onerror='x'> $\\frac{"
    base = finished_run(tmp_path / "a").job
    changes = {"name": evil, "model": base.model.model_copy(update={"path": evil}), "data": base.data.model_copy(update={"path": evil})}
    page = report.build(finished_run(tmp_path / "b", budgets=(0.5,), changes=changes)).read_text()
    assert "<script" not in page
    assert "<img src=http" not in page
    assert html.escape(evil, quote=False).split("'")[0].replace('"', "&#34;") in page


@pytest.mark.parametrize("stage", ["publish", "route"])
def test_unfinished_run_is_refused_with_the_missing_stage(tmp_path: Path, stage: str) -> None:
    prepared = finished_run(tmp_path, skip=stage)
    with pytest.raises(InputError, match=f"stage {stage} is not done"):
        report.build(prepared)
    assert not (prepared.store.folder / "report.html").exists()


def test_one_budget_one_expert_one_large_grey_sample_still_make_a_page(tmp_path: Path) -> None:
    prepared = finished_run(tmp_path, budgets=(1.0,), boundaries=(), samples=1, size=300, errors=(0.0, 0.0))
    e = evidence.gather(prepared)
    e = replace(e, measured=tuple(replace(m, samples=m.samples[:, :1]) for m in e.measured), specialized=())
    assert set(report.draw(e)) == {"samples", "similarity", "architecture", "cost", "training", "timeline", "pareto", "timesteps"}
    assert remarks.verdict(e).startswith("A mixture of 1 expert at 100%")


# --- honesty --------------------------------------------------------------------------------------------------------


def test_says_so_when_era_wins(tmp_path: Path) -> None:
    assert "At 50%, era found the best plan: search loss 1.2, against greedy 1.5 (+25.0%)" in said(finished_run(tmp_path), "good")


def test_says_so_when_era_loses_to_greedy_and_to_uniform(tmp_path: Path) -> None:
    lost = said(finished_run(tmp_path / "both", losses=(2.0, 1.5, 2.2)), "warning")
    assert "At 50%, era did not beat greedy and uniform here: search loss 2.2" in lost
    assert "The plan of greedy is used." in lost


def test_a_tie_is_no_victory_of_era(tmp_path: Path) -> None:
    assert "era did not beat uniform here" in said(finished_run(tmp_path, losses=(1.2, 1.5, 1.2)), "warning")


def test_says_so_when_uniform_itself_was_chosen(tmp_path: Path) -> None:
    assert "is the uniform allocation itself" in said(finished_run(tmp_path, losses=(1.0, 1.5, 1.2)), "warning")


@pytest.mark.parametrize(
    ("errors", "level", "text"),
    [
        ((0.1, 0.2), "good", "the mixture beats the uniform allocation"),
        ((0.2, 0.1), "warning", "the mixture does not beat the uniform allocation"),
    ],
)
def test_mixture_is_compared_with_the_uniform_allocation(tmp_path: Path, errors: tuple[float, float], level: str, text: str) -> None:
    assert text in said(finished_run(tmp_path, errors=errors), level)


def test_a_difference_within_its_standard_error_is_not_clear(tmp_path: Path) -> None:
    e = evidence.gather(finished_run(tmp_path, budgets=(0.5,)))
    offsets = {"mixture": (0.1, 0.3, 0.1), "uniform": (0.3, 0.1, 0.11)}  # from dense, sample by sample
    shifted = {kind: e.dense.samples + np.array(by, np.float32)[:, None, None, None] for kind, by in offsets.items()}
    e = replace(e, measured=tuple(replace(m, samples=shifted.get(m.kind, m.samples)) for m in e.measured))
    [remark] = [remark for remark in remarks.remarks(e) if "uniform allocation" in remark.text]
    assert remark.level == "note"
    assert "not clearly" in remark.text


def test_says_that_more_images_are_needed_when_reliability_or_a_cut_is_low(tmp_path: Path) -> None:
    assert "More images needed" not in said(finished_run(tmp_path / "sure"), "warning")
    assert "median reliability 0.30" in said(finished_run(tmp_path / "noise", reliability=0.3), "warning")
    unsure = said(finished_run(tmp_path / "cut", frequency=0.4), "warning")
    assert "the cut at t = 300 (40%) came back in too few bootstrap resamples" in unsure


def test_says_so_when_samples_are_far_from_dense(tmp_path: Path) -> None:
    assert "samples are far from dense's" in said(finished_run(tmp_path, errors=(0.7, 0.8)), "warning")


def test_curves_that_cannot_be_read_are_skipped_and_named(tmp_path: Path) -> None:
    prepared = finished_run(tmp_path)
    experts = evidence.gather(prepared).specialized
    (prepared.store.folder / experts[0].path / "checkpoint.json").unlink()
    (prepared.store.folder / experts[1].path / "checkpoint.json").write_text("{ damaged")
    found, missing = evidence.curves(evidence.gather(prepared))
    assert missing == ["specialize t 0\N{EN DASH}300", "specialize t 300\N{EN DASH}1000"]
    assert set(found) == {"65% mixture", "65% uniform", "50% mixture", "50% uniform"}


def test_curves_are_found_in_a_run_folder_that_moved(tmp_path: Path) -> None:
    prepared = finished_run(tmp_path / "old")
    expert = evidence.gather(prepared).specialized[0]
    moved = prepared.store.folder.rename(tmp_path / "new")
    assert evidence.history(expert, moved) == [(1, 0.5), (2, 0.4), (3, 0.3), (4, 0.25)]


# --- small parts ----------------------------------------------------------------------------------------------------


def test_only_the_best_of_a_budget_is_marked(tmp_path: Path) -> None:
    e = evidence.gather(finished_run(tmp_path))
    columns = report.quality_columns(e)
    mse = [column.title for column in columns].index("MSE")
    groups = report.key_rows(e, columns)
    assert [cells[mse][1] for _, cells in groups["50% of dense MACs"]] == [True, False, False]
    assert not any(best for _, cells in groups[""] for _, best in cells)
    costs = report.key_rows(e, report.cost_columns(e))
    assert not any(cells[0][1] for _, cells in costs["50% of dense MACs"])  # a smaller cost at a given budget is no merit


def test_experts_tell_their_steps_costs_and_reasons(tmp_path: Path) -> None:
    budget, partition = Budget("macs", 0.5, "ddim", 20), Partition.from_boundaries((50,), T)
    kept = SiteReason("down_blocks.0.resnets.0", 4, 4, 0.25, 0.041)
    gone = SiteReason("down_blocks.0.downsamplers.0", 0, 4, 0.001, 0.1)
    found = replace(plan(budget, "era", partition, 1.0, 1), reasons=((kept, gone), (gone,)))
    few, many = report.expert_rows(found, (0.5, 2.0))
    assert (few.name, few.steps, few.share, few.cost) == ("t 0\N{EN DASH}50", 1, 0.05, 0.5)
    assert (many.steps, many.share, many.params) == (19, 0.95, 1_510_000)
    assert few.reasons == [
        "d0.r0 kept whole: without it, loss +0.250 for 4.1% of the dense cost",
        "d0.s dropped: loss +0.001, saves 10.0% of the dense cost",
    ]
    assert many.reasons == few.reasons[1:]
    assert [row.reasons for row in report.expert_rows(replace(found, reasons=()), (1.0, 1.0))] == [[], []]


@pytest.mark.parametrize(("boundary", "marks"), [(50, 2), (100, 0)])
def test_an_expert_of_fewer_than_two_steps_is_marked_in_the_page(tmp_path: Path, boundary: int, marks: int) -> None:
    page = report.build(finished_run(tmp_path, boundaries=(boundary,))).read_text()
    assert page.count("1 of 20 &#9888;") == marks  # once per budget
    assert page.count("(an expert serves fewer than 2 steps)") == marks


def test_costs_that_are_wider_than_the_page_are_two_tables() -> None:
    columns = [report.Column(title, unit, [1.0], ".1f") for title in ("MACs", "parameters", "time", "predicted") for unit in "abc"]
    assert report.fitted(columns[:10]) == [columns[:10]]
    assert report.fitted(columns) == [columns[:6], columns[6:]]


def test_training_is_drawn_for_every_agent_that_was_fine_tuned() -> None:
    interval, points = Interval(0, 10), [(1, 0.5), (2, 0.25)]
    names = ("specialize", "50% mixture", "50% time uniform", "50% greedy", "50% time evolution")
    assert figures.training({name: {interval: points} for name in names}).startswith(b"\x89PNG")
    assert [figures._budget_and_kind(name) for name in (*names[1:], "65% cut only", "50% time")] == [
        ("50%", "mixture"),
        ("50% time", "uniform"),
        ("50%", "greedy"),
        ("50% time", "evolution"),
        ("65%", "cut only"),
        ("50% time", ""),
    ]


def test_sites_are_named_briefly_and_stand_in_network_order() -> None:
    assert [figures.short_name(site.name) for site in figures.in_network_order(SITES)] == ["d0.r0", "d0.a0", "mid.a0", "u0.r0"]
    names = ("up_blocks.0.upsamplers.0", "down_blocks.0.downsamplers.0", "up_blocks.0.resnets.1", "down_blocks.0.attentions.1")
    sites = figures.in_network_order([ElasticSite(name, (0, 1), "group") for name in names])
    assert [figures.short_name(site.name) for site in sites] == ["d0.a1", "d0.s", "u0.r1", "u0.s"]


def test_most_at_once_counts_what_overlaps() -> None:
    interval = Interval(0, 10)
    trainers = [evidence.Trainer(str(i), interval, start, stop) for i, (start, stop) in enumerate([(0, 10), (2, 8), (4, 20), (20, 30)])]
    assert figures.most_at_once(trainers) == (3, 4)
    assert figures.overlap("finetune", trainers[2:]) == "The finetune trainers ran one after the other."


def test_few_steps_are_warned_of_per_expert_and_sampler_and_per_budget_where_they_differ(tmp_path):
    e = evidence.gather(finished_run(tmp_path, boundaries=(40, 80)))  # 20 steps: .8 of one for either of the first two
    one, other = e.chosen
    assert [remark.text for remark in remarks._few_steps(e)] == [
        "Fewer than two sampler steps for the expert of t 0\N{EN DASH}40 (1 of the 20 of ddim) and t 40\N{EN DASH}80 (1 of the 20 of ddim)."
    ]
    shorter = replace(other, budget=replace(other.budget, scheduler="dpmpp"), shares=(0.0, 0.1, 0.9))
    assert [remark.text for remark in remarks._few_steps(replace(e, chosen=(one, shorter)))] == [
        "Fewer than two sampler steps for the expert of t 0\N{EN DASH}40 (1 of the 20 of ddim) at 65%, "
        "t 40\N{EN DASH}80 (1 of the 20 of ddim) at 65% and t 0\N{EN DASH}40 (0 of the 20 of dpmpp) at 50%."
    ]


def test_times_of_two_devices_are_warned_of(tmp_path):
    e = evidence.gather(finished_run(tmp_path, budgets=(0.5,)))
    assert remarks._devices(e) == []
    first, *rest = (replace(m, metrics={**m.metrics, "device": "One"}) for m in e.measured)
    moved = replace(rest[0], metrics={**rest[0].metrics, "device": "Two"})
    assert remarks._devices(replace(e, measured=(first, *rest))) == []
    [remark] = remarks._devices(replace(e, measured=(first, moved, *rest[1:])))
    assert remark.text.startswith(f"Times do not compare: dense was timed on One, but {moved.name} on Two.")
    assert remark.level == "warning"


def test_cuts_that_were_not_learned_are_not_said_to_need_images(tmp_path):
    e = evidence.gather(finished_run(tmp_path, budgets=(0.5,), frequency=0.1))
    assert "Raise similarity.images" in remarks.uncertain_cuts(e)[0].text
    given = replace(e, results={**e.results, "partition": {**e.results["partition"], "rule": "uniform in t"}})
    assert remarks.uncertain_cuts(given) == [
        remarks.Remark("note", "The cuts are uniform in t, not learned: more images would not move them.")
    ]
