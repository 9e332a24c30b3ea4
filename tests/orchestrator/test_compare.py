"""analyze and compare: what a run's first two stages found, and whether two models agree on it, without claiming what cannot be known."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from orchestrator import compare
from orchestrator.cli import main
from orchestrator.store import RunStore, write_json
from workers.contracts import Partition
from workers.partition import grid
from workers.similarity import gram_of, similarity_of


def diffpruning(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


def run_folder(
    folder: Path,
    model: Path,
    boundaries: list[int],
    noise: float = 0.1,
    measure: str = "gradient",
    seed: int = 0,
    clear: bool = True,
    rule: str = "",
) -> Path:
    """A run that is analyzed and cut: timesteps are alike within each interval (unless ``clear`` is false: then no two are alike), up to
    the noise of its images."""
    timesteps, partition, rng = grid(1000, 20), Partition.from_boundaries(boundaries, 1000), np.random.default_rng(0)
    clean = rng.standard_normal((20, 40))[[partition.index_of(t) if clear else i for i, t in enumerate(timesteps)]] / 40**0.5
    rng = np.random.default_rng(seed)
    gram = gram_of((clean[None] + noise / 40**0.5 * rng.standard_normal((16, 20, 40))).astype(np.float32))
    matrix = similarity_of(gram, measure, timesteps, 1000, 64)
    store = RunStore(folder)
    store.claim({"name": folder.name, "model.path": [str(model), "digest"]})
    results = {
        "analyze": {"similarity": matrix.to_json()},
        "partition": {"partition": partition.to_json(), "min_length": 1, "rule": rule or None},
    }
    fingerprints = {stage: f"{i}234567890" for i, stage in enumerate(results)}
    for stage, result in results.items():
        store.stage_folder(stage, fingerprints[stage]).mkdir()
        store.finish(stage, fingerprints[stage], result, 0.0, 1.0)
    np.save(store.stage_folder("analyze", fingerprints["analyze"]) / "gram.npy", gram)
    write_json(folder / "progress.json", {"fingerprints": fingerprints})
    return folder


# --- compare ----------------------------------------------------------------------------------------------------------


def test_same_clusters_agree_and_the_page_stands_alone(tmp_path, emoji):
    one, two = (run_folder(tmp_path / name, emoji, [200, 700], seed=i) for i, name in enumerate(("one", "two")))
    done = diffpruning("compare", one, two, "--out", tmp_path / "page.html", "--json")
    found = json.loads(done.stdout)
    assert found["verdict"].startswith("The clusters agree: adjusted Rand index 1.00")
    assert [run["boundaries"] for run in found["runs"]] == [[200, 700]] * 2
    page = (tmp_path / "page.html").read_text()
    assert found["verdict"] in page
    assert not re.search(r"https?://|<script|<link|url\(|@import", page)
    assert page.count("data:image/png;base64,") == 1


@pytest.mark.parametrize(
    ("second", "told"),
    [
        ({"boundaries": [450, 900]}, "The clusters do not agree more than random cuts may"),
        ({"boundaries": [200, 700], "noise": 60}, r"Cannot say whether the clusters agree: two halves .* of two \("),
        (
            {"boundaries": [200, 700], "noise": 1.0, "clear": False},
            r"Cannot say whether the clusters agree: adjusted Rand index 1\.00, 0\.\d\d to 0\.\d\d when images are resampled, and one",
        ),
    ],
)
def test_the_sentence_claims_no_more_than_the_images_show(tmp_path, emoji, second, told):
    one, two = run_folder(tmp_path / "one", emoji, [200, 700]), run_folder(tmp_path / "two", emoji, **second)
    found = compare.compare(compare.load(one), compare.load(two), 50)
    assert re.match(told, found["verdict"]), (found["verdict"], found["runs"])


def test_uniform_clusters_and_those_that_do_not_return_are_said_to_be_so(tmp_path, emoji):
    one, two = (compare.load(run_folder(tmp_path / name, emoji, [350, 650])) for name in ("one", "two"))
    found = compare.compare(one, two, 20)
    close = {**found, "adjusted_rand_with_uniform": 1.0}
    assert "agree, but no more than uniform cuts agree with them (1.00)" in compare.verdict(found["runs"], close)
    unsure = [found["runs"][0], {**found["runs"][1], "self_agreement": 0.5}]
    assert re.match("Cannot say .*: when images are resampled, .* do not agree with themselves in two", compare.verdict(unsure, found))


def test_cuts_that_were_not_learned_are_compared_as_they_are_and_said_to_be_so(tmp_path, emoji):
    one = run_folder(tmp_path / "one", emoji, [200, 700])
    given = run_folder(tmp_path / "given", emoji, [200, 700], noise=30, rule="given")
    found = compare.compare(compare.load(one), compare.load(given), 20)
    assert found["adjusted_rand"] == {"value": 1, "low": 1, "high": 1}, "other images do not move given cuts"
    assert found["runs"][1]["self_agreement"] == 1
    assert [run["rule"] for run in found["runs"]] == ["learned", "given"]
    reliable = [{**run, "reliability": 1.0} for run in found["runs"]]
    assert "since those of given (given) were not learned from images" in compare.verdict(reliable, found)
    assert "given           given cuts at t" in compare.text(found)
    page = tmp_path / "page.html"
    compare.write_page(found, page)
    assert "<td>given</td>" in page.read_text()


@pytest.mark.parametrize(
    ("asked", "rule"),
    [({"experts": [5]}, "given"), ({"experts": 2, "method": "uniform in t"}, "uniform in t"), ({"experts": "auto"}, "learned")],
)
def test_older_runs_are_cut_as_their_job_says(tmp_path, emoji, asked, rule):
    folder = run_folder(tmp_path / "old", emoji, [500])
    write_json(folder / "job.json", {"config": {"partition": asked}})
    assert compare.load(folder).rule == rule


def test_the_text_names_cuts_by_timestep_and_noise(tmp_path, emoji):
    one, two = run_folder(tmp_path / "one", emoji, [200, 700]), run_folder(tmp_path / "two", emoji, [450])
    done = diffpruning("compare", one, two, "--out", tmp_path / "page.html")
    assert re.search(r"one +learned cuts at t \(log-SNR\) 200 \(\+0\.\d\), 700 \(-[45]\.\d\); 64 images, reliability 1\.00", done.stdout)
    assert done.stdout.endswith(f"page  {tmp_path / 'page.html'}\n")


def test_what_cannot_be_compared_is_one_line_and_no_page(tmp_path, emoji):
    one = run_folder(tmp_path / "one", emoji, [200, 700])
    lost = run_folder(tmp_path / "lost", tmp_path / "gone", [200, 700])
    half = run_folder(tmp_path / "half", emoji, [200, 700])
    shutil.rmtree(half / "partition-12345678")
    (tmp_path / "empty").mkdir()
    for other, told in (
        (run_folder(tmp_path / "other", emoji, [500], measure="snr"), "different kinds, gradient and snr"),
        (lost, "the noise levels are those of its model, which cannot be read (model.path: no such folder"),
        (half, "stage partition is not done: run `diffpruning analyze`"),
        (tmp_path / "empty", "is a folder, but no run folder"),
        (tmp_path / "nothing.yaml", "no such job file"),
    ):
        done = diffpruning("compare", one, other, "--out", tmp_path / "page.html")
        assert (done.exit_code, done.stderr.count("\n"), done.stdout) == (2, 1, "")
        assert told in done.stderr
    for out, told in ((tmp_path, "is a folder"), (tmp_path / "no" / "page.html", "no such folder")):
        assert told in diffpruning("compare", one, one, "--out", out).stderr
    assert not list(tmp_path.glob("*.html"))


# --- analyze ----------------------------------------------------------------------------------------------------------

SETTINGS = ("similarity.measure=snr", "similarity.timesteps=16", "partition.experts=3", "resources.device=cpu")


def test_analyze_stops_before_training_and_run_finds_it_done(tmp_path):
    sets = [word for setting in (*SETTINGS, f"storage.path={tmp_path}") for word in ("--set", setting)]
    done = diffpruning("analyze", "quickstart", *sets, "--inline", "--json")
    found = json.loads(done.stdout)
    assert len(found["boundaries"]) == len(found["boundary_frequency"]) == 2
    assert found["reliability"]["median"] == 1
    assert Path(found["figure"]).read_bytes().startswith(b"\x89PNG")
    assert {path.name.partition("-")[0] for path in (tmp_path / "quickstart").glob("*-????????")} == {"analyze", "partition"}
    text = diffpruning("analyze", "quickstart", *sets, "--inline")
    assert "partition  already done" in text.stderr
    assert f"cut at t = {found['boundaries'][0]}" in text.stdout
    given = diffpruning("analyze", "quickstart", *sets, "--set", "partition.experts=[300, 600]", "--inline")
    assert "cut at t = 300    is given; a learned one came there in" in given.stdout
    assert "raise similarity.images" not in given.stderr, "more images would not move them"
    again = diffpruning("run", "quickstart", *sets, "--inline", "--until", "partition", "--json")
    assert again.stderr.count("already done") == 2
    both = diffpruning("compare", tmp_path / "quickstart", tmp_path / "quickstart", "--out", tmp_path / "page.html")
    assert both.stdout.startswith("The clusters agree")


def test_only_and_until_exclude_each_other(tmp_path):
    done = diffpruning("run", "quickstart", "--set", f"storage.path={tmp_path}", "--only", "analyze", "--until", "route")
    assert (done.exit_code, done.stderr) == (2, "error: --only analyze and --until route exclude each other: give one\n")
    assert not list(tmp_path.iterdir())
