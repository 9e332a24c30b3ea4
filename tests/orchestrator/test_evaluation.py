"""The table of results: each row measured once under one protocol, whatever is killed, shared out or asked for again."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image

from orchestrator import cli_evaluate, evaluation
from orchestrator.cli import main
from orchestrator.config import load_job
from orchestrator.results import commit
from workers import evaluate, families, tasks_evaluate
from workers.contracts import InputError, Protocol
from workers.latency import device_name
from workers.protocol import common_protocol

JOB = """
name: small
storage: {path: FOLDER/runs}
registry: {path: FOLDER/registry}
model: {path: FOLDER/model}
data: {path: FOLDER/images, holdout: 6}
budgets: [{ratio: 0.9}]
sampler: {steps: 4}
evaluate:
  {images: 3, samples: 3, timesteps: 2, batch_size: 2, dense: ["ddim:2", "dpmpp:3", "ddim:4"], frechet_samples: 6,
   extractor: torchscript, extractor_weights: pooled.pt, reference: ./statistics.npz:both}
latency: {batch: 2}
export: {rewrites: []}
resources: {device: cpu}
"""
ROOT = Path(__file__).parents[2]
LABELS = ["dense", "dense ddim:2", "dense dpmpp:3"]


class Pooled(torch.nn.Module):
    """Twelve features: means of quarters of every channel."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job beside its tiny model, images, extractor and statistics."""
    folder = tmp_path_factory.mktemp("evaluation")
    torch.manual_seed(0)
    DDPMPipeline(families.family("unet2d").tiny(), DDPMScheduler()).save_pretrained(folder / "model")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(16):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / "images" / f"{i:02d}.png")
    torch.jit.script(Pooled()).save(folder / "pooled.pt")
    features = rng.standard_normal((40, 12))
    np.savez(folder / "statistics.npz", both_mean=features.mean(0), both_cov=np.cov(features, rowvar=False), both_n=40)
    (folder / "job.yaml").write_text(JOB.replace("FOLDER", str(folder)))
    return folder


def command(home: Path, *more: object) -> Result:
    arguments = ["evaluate", home / "job.yaml", "--inline", "--json", *more]
    return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


def table(home: Path, *changes: str, more: tuple[str, ...] = ()) -> dict[str, Any]:
    done = command(home, *(word for change in changes for word in ("--set", change)), *more)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def scores(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What does not depend on the clock."""
    times = {"ms_per_step", "ms_per_image", "images_per_s", "relative_time"}
    return {label: {key: value for key, value in row.items() if key not in times} for label, row in found["rows"].items()}


@pytest.fixture(scope="module")
def first(home: Path) -> dict[str, Any]:
    return table(home)


# --- the table ------------------------------------------------------------------------------------------------------


def test_before_there_are_mixtures_the_rows_are_those_of_the_dense_model(home, first):
    rows = first["rows"]
    assert list(rows) == LABELS, "the job's own sampler is no second row"
    assert [row["sampler"] for row in rows.values()] == [
        {"schema": 1, "scheduler": name, "steps": steps, "eta": 0.0} for name, steps in (("ddim", 4), ("ddim", 2), ("dpmpp", 3))
    ]
    assert [row["relative_time"] for row in rows.values()] == [1, 0.5, 0.75]
    assert rows["dense"]["paired_mse"] == 0 < rows["dense ddim:2"]["paired_mse"]
    assert all(row["frechet"] > 0 and row["kid"] is None for row in rows.values())
    assert json.loads((home / "runs" / "small" / "evaluation" / "table.json").read_text()) == first
    assert {row["device"] for row in rows.values()} == {device_name("cpu")}
    assert {(row["samples"], row["drawn_at_once"], row["commit"]) for row in rows.values()} == {(3, 1, commit(ROOT))}


def test_the_table_names_the_device_and_leaves_out_times_of_another(first):
    assert f"times: on {device_name('cpu')}, a batch of 2 in float32, not compiled\n" in cli_evaluate.text(first)
    moved = {**first, "rows": {**first["rows"], "dense ddim:2": {**first["rows"]["dense ddim:2"], "device": "Other", "drawn_at_once": 3}}}
    lines = cli_evaluate.text(moved).splitlines()
    [odd] = [line for line in lines if line.startswith("dense ddim:2")]
    assert odd.split()[4:6] == ["-", "-"]
    assert odd.endswith("-")
    assert any(line.endswith("; those of dense ddim:2 are left out, as they are of another device") for line in lines)
    assert "images/s: of one worker, while up to 3 drew at once" in lines


def test_the_protocol_says_under_what_it_was_measured(first):
    protocol = first["protocol"]
    assert {label: row["protocol"] for label, row in first["rows"].items()} == dict.fromkeys(LABELS, protocol)
    assert (protocol["extractor"], protocol["images"], protocol["reference_images"]) == ("torchscript", 6, 40)
    assert (protocol["image_shape"], protocol["dtype"], protocol["weights"], protocol["levels"]) == ([3, 16, 16], "float32", "ema", 256)
    assert protocol["id"] == Protocol.from_json({key: value for key, value in protocol.items() if key != "id"}).id


def test_the_same_command_again_measures_nothing(home, first, monkeypatch):
    for task in ("evaluate_shard", "summarise", "reference_statistics"):
        monkeypatch.setattr(tasks_evaluate, task, lambda *_: pytest.fail("measured again"))
    assert table(home) == first
    assert table(home, "evaluate.shards=3", "evaluate.batch_size=5") == first
    moved = home / "elsewhere.pt"
    moved.write_bytes((home / "pooled.pt").read_bytes())
    assert table(home, f"evaluate.extractor_weights={moved}") == first


def test_a_killed_evaluation_goes_on_with_the_rows_that_are_missing(home, first, monkeypatch):
    measured, whole = [], tasks_evaluate.evaluate_shard

    def spy(session, item):
        measured.append((item.denoiser.label, len(item.rows)))
        return whole(session, item)

    monkeypatch.setattr(tasks_evaluate, "evaluate_shard", spy)
    monkeypatch.setattr(evaluate, "cost_per_step", lambda *_, **__: pytest.fail("dense was timed again"))
    [row] = (home / "runs" / "small" / "evaluation").glob("dense-ddim-2-*.json")
    row.unlink()
    assert scores(table(home)) == scores(first)
    assert measured == [("dense ddim:2", 0)]


def test_four_shards_equal_one(home, first):
    found = table(home, f"storage.path={home}/shards", "evaluate.shards=3")
    for label, row in scores(found).items():
        for key in ("frechet", "paired_mse", "denoising_loss"):
            assert row[key] == pytest.approx(first["rows"][label][key], rel=1e-6)
        assert row["frechet"] == first["rows"][label]["frechet"], "the same images are drawn together"
    assert found["protocol"] == first["protocol"]


def test_another_protocol_is_another_id_and_nothing_of_the_old_one_is_lost(home, first):
    before = {path.name for path in (home / "runs" / "small" / "evaluation").iterdir()}
    other = table(home, "evaluate.frechet_samples=4", more=("--only", "dense ddim:2"))
    assert list(other["rows"]) == ["dense", "dense ddim:2"]
    assert other["protocol"]["id"] != first["protocol"]["id"]
    assert before < {path.name for path in (home / "runs" / "small" / "evaluation").iterdir()}
    with pytest.raises(InputError, match=r"dense and dense ddim:2 cannot stand in one table: .* which differ in images 6 and 4: measure"):
        common_protocol({"dense": first["rows"]["dense"], "dense ddim:2": other["rows"]["dense ddim:2"]})


def test_asking_for_some_rows_forgets_no_others_that_hold_beside_them(home, first):
    kept = home / "runs" / "small" / "evaluation" / "table.json"
    whole = table(home)
    some = table(home, more=("--only", "dense ddim:2"))
    assert list(some["rows"]) == ["dense", "dense ddim:2"]
    assert json.loads(kept.read_text())["rows"] == whole["rows"]
    table(home, "evaluate.samples=2", more=("--only", "dense"))
    assert list(json.loads(kept.read_text())["rows"]) == ["dense"], "the others were paired over three samples"


def test_without_distances_the_table_is_that_of_paired_errors(home, first):
    plain = table(home, "evaluate.frechet_samples=0", more=("--only", "dense"))
    assert "frechet" not in plain["rows"]["dense"]
    assert plain["rows"]["dense"]["denoising_loss"] == first["rows"]["dense"]["denoising_loss"]
    assert plain["protocol"]["extractor"] == ""


def test_images_as_reference_are_seen_once_and_give_a_kernel_distance(home, monkeypatch):
    changes = (f"evaluate.reference={home}/images", "evaluate.samples=2", "evaluate.dense=[]")
    found = table(home, *changes)
    row = found["rows"]["dense"]
    assert found["protocol"]["reference_images"] == 16
    assert row["frechet"] > 0
    assert row["kid"] is not None
    monkeypatch.setattr(tasks_evaluate, "reference_statistics", lambda *_: pytest.fail("seen again"))
    default = table(home, "evaluate.reference=null", *changes[1:])
    assert default["rows"]["dense"]["frechet"] == row["frechet"], "the default reference is all images of data.path"


def test_the_printed_table_has_a_row_each_and_ends_with_the_protocol(first):
    text = cli_evaluate.text(first)
    assert [line.split("  ")[0] for line in text.splitlines()[1:4]] == LABELS
    assert "50.0%" in text.splitlines()[2]
    assert text.splitlines()[-1].startswith(
        f"protocol {first['protocol']['id']}: Frechet (FD) and kernel distance (KID) of the torchscript"
    )


def test_whole_batches_are_shared_out_in_order():
    seeds = list(range(23))
    for shards in range(1, 9):
        found = evaluation._whole_batches(seeds, 5, shards)
        assert len(found) == shards
        assert [seed for part in found for seed in part] == seeds
        starts = np.cumsum([0, *map(len, found)])
        assert all(a % 5 == 0 or a == 23 for a, _ in pairwise(starts))


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("evaluate.extractor=null", "evaluate.frechet_samples is 6, but nothing says whose features to compare: set evaluate.extractor"),
        ("evaluate.extractor=magic", "evaluate.extractor 'magic' is unknown: known are inception, resnet56, torchscript and package"),
        ("evaluate.extractor_weights=null", "evaluate.extractor is torchscript: give the file with its weights"),
        ("evaluate.extractor_weights=no.pt", "evaluate.extractor_weights: no such file: "),
        ("evaluate.frechet_samples=1", "evaluate.frechet_samples is 1: a covariance needs two or more"),
        ("evaluate.reference=no/images", "evaluate.reference: no such file or folder: no/images"),
        ("evaluate.reference=no.npz", "evaluate.reference: no such file: "),
        ("evaluate.dense=[ddim]", "evaluate.dense: 'ddim' is not SCHEDULER:STEPS, e.g. ddim:25; schedulers are ddpm, ddim"),
        ("evaluate.dense=[magic:3]", "evaluate.dense: 'magic:3' is not SCHEDULER:STEPS"),
        ("evaluate.dense=['ddim:0']", "evaluate.dense: 'ddim:0' is not SCHEDULER:STEPS"),
        ("evaluate.dense=['ddim:2','ddim:2']", "evaluate.dense ['ddim:2', 'ddim:2'] names one twice"),
        ("evaluate.dense=['ddim:2000']", "2000 is more than the model's 1000 training timesteps"),
        ("evaluate.lpips=no.pt", "evaluate.lpips: no.pt cannot be imported"),
        ("evaluate.dtype=int8", "evaluate.dtype is 'int8'"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_one_line_and_nothing_is_written(home, change, told):
    done = command(home, "--set", f"storage.path={home}/refused", "--set", change)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert told in done.stderr
    assert not (home / "refused").exists()


def test_statistics_of_another_extractor_are_refused(home):
    np.savez(home / "other.npz", mean=np.zeros(64), cov=np.eye(64), n=10)
    done = command(home, "--set", f"evaluate.reference={home}/other.npz")
    assert done.exit_code == 2
    assert "other.npz is of 64 features, but evaluate.extractor torchscript has 12: give the statistics of this extractor" in done.stderr


def test_a_row_that_is_none_and_a_version_that_is_not_there_are_refused(home):
    done = command(home, "--only", "macs-0.50")
    assert done.exit_code == 2
    assert "--only 'macs-0.50' is no row of this job: known are dense, dense ddim:2, dense dpmpp:3" in done.stderr
    assert command(home, "--version", "small:1").exit_code == 2


def test_paths_of_the_evaluate_section_are_relative_to_the_job_file(home):
    settings = load_job(str(home / "job.yaml")).evaluate
    assert settings.extractor_weights == str(home / "pooled.pt")
    assert settings.reference == str(home / "statistics.npz:both")


def test_files_count_by_what_they_hold_in_the_fingerprint_of_publish(home, tmp_path):
    from orchestrator.planning import prepare

    job = str(home / "job.yaml")
    (tmp_path / "copy.pt").write_bytes((home / "pooled.pt").read_bytes())
    one = prepare(load_job(job)).pipeline.fingerprints
    assert prepare(load_job(job, [f"evaluate.extractor_weights={tmp_path}/copy.pt"])).pipeline.fingerprints == one
    np.savez(tmp_path / "s.npz", mean=np.zeros(12), cov=np.eye(12), n=40)
    other = prepare(load_job(job, [f"evaluate.reference={tmp_path}/s.npz"])).pipeline.fingerprints
    assert {stage for stage in one if one[stage] != other[stage]} == {"publish"}
