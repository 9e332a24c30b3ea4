"""The table of results: each row measured once under one protocol, whatever is killed, shared out or asked for again."""

from __future__ import annotations

import json
import re
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
from orchestrator.results import collect, commit, load
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


def cells(text: str, label: str) -> dict[str, str]:
    """The row of a printed table, by the titles of its columns."""
    head, *lines = (re.split("  +", line) for line in text.splitlines())
    [row] = [line for line in lines if line[0] == label and len(line) == len(head)]
    return dict(zip(head, row, strict=True))


def changed(found: dict[str, Any], label: str, **more: Any) -> dict[str, Any]:
    return {**found, "rows": {**found["rows"], label: {**found["rows"][label], **more}}}


def test_speeds_of_other_batches_than_denses_are_left_out(first):
    assert {label: row["drawn"] for label, row in first["rows"].items()} == dict.fromkeys(LABELS, {"batch": 2, "compiled": False})
    assert cells(cli_evaluate.text(first), "dense ddim:2")["images/s"] != "-"
    text = cli_evaluate.text(changed(first, "dense ddim:2", drawn={"batch": 64, "compiled": False}), more=True)
    odd = cells(text, "dense ddim:2")
    assert (odd["images/s"], odd["ms/image"], odd["time"]) == ("-", "-", "50.0%")
    assert cells(text, "dense dpmpp:3")["images/s"] != "-"
    assert "images/s of dense ddim:2 are left out, as they were drawn in other batches than dense's" in text.splitlines()


def test_more_columns_are_shown_when_they_are_asked_for_and_there(first):
    measured = changed(first, "dense ddim:2", paired_lpips=0.125, peak_memory_mib=1234.5)
    plain, whole = cells(cli_evaluate.text(measured), "dense ddim:2"), cli_evaluate.text(measured, more=True)
    assert not {"LPIPS to dense", "ms/image", "peak MiB"} & set(plain)
    head = re.split("  +", whole.splitlines()[0])
    assert head[-3:] == ["LPIPS to dense", "ms/image", "peak MiB"]
    assert whole.splitlines()[2].split()[-3:] == ["0.125", f"{first['rows']['dense ddim:2']['ms_per_image']:#.3g}".rstrip("."), "1,234"]
    assert "peak MiB" not in cli_evaluate.text(first, more=True), "nothing stands there"


def test_a_mixture_says_who_found_it_and_what_its_training_took(first):
    mixture = {**first["rows"]["dense"], "agent": "era", "trained_images": 512000, "trainer_seconds": 1234.4}
    text = cli_evaluate.text({**first, "rows": {**first["rows"], "macs-0.60": mixture}})
    row = cells(text, "macs-0.60")
    assert (row["agent"], row["trained on"], row["trainer s"]) == ("era", "512,000", "1,234")
    assert "agent" not in cli_evaluate.text(first).splitlines()[0].split(), "dense has none"


def test_the_noise_that_a_sampler_adds_is_told(home):
    noisy = table(home, "sampler.eta=0.5", f"storage.path={home}/noisy", more=("--only", "dense ddim:2"))
    assert cells(cli_evaluate.text(noisy), "dense")["sampler"] == "ddim:4 eta 0.5"
    assert cells(cli_evaluate.text(noisy), "dense ddim:2")["sampler"] == "ddim:2 eta 0.5"


def test_scaled_noise_has_rows_of_its_own_beside_the_plain_ones(home, first):
    """The job's scale is that of its own sampler; rows of evaluate.dense say theirs."""
    dense = "evaluate.dense=['ddim:4', 'ddim:4:1.01', 'ddim:2']"
    table(home, f"storage.path={home}/both")
    scaled = table(home, "sampler.epsilon_scale=1.01", dense, f"storage.path={home}/both")
    assert list(scaled["rows"]) == ["dense", "dense ddim:4", "dense ddim:2"], "the job's own is no other"
    assert [cells(cli_evaluate.text(scaled), label)["sampler"] for label in scaled["rows"]] == ["ddim:4:1.01", "ddim:4", "ddim:2"]
    says = "sampler: its steps, and by what the predicted noise was divided"
    assert says in cli_evaluate.text(scaled).splitlines() and says not in cli_evaluate.text(first)
    for label, plain in (("dense ddim:4", "dense"), ("dense ddim:2", "dense ddim:2")):
        assert scaled["rows"][label]["frechet"] == first["rows"][plain]["frechet"], label
    assert scaled["rows"]["dense"]["frechet"] != first["rows"]["dense"]["frechet"]
    anew = table(home, "sampler.epsilon_scale=1.01", dense, f"storage.path={home}/scaled")
    for label, row in anew["rows"].items():
        assert row["paired_mse"] == scaled["rows"][label]["paired_mse"], f"{label} against another dense"
    assert anew["rows"]["dense ddim:4"]["paired_mse"] > 0
    fewer = table(home, "sampler.epsilon_scale=1.02", "evaluate.dense=[]", f"storage.path={home}/both")
    assert list(fewer["rows"]) == ["dense"]
    [run] = (home / "both").glob("small*")
    held = {row["sampler"]: row["paired_mse"] for row in collect([load(run)])["rows"]}
    assert held["ddim:4:1.02"] == 0 and held["ddim:2"] is None, "the one that was measured is against another dense"


def test_only_predicted_noise_can_be_scaled(home, tmp_path):
    pipeline = DDPMPipeline.from_pretrained(home / "model")
    DDPMPipeline(pipeline.unet, DDPMScheduler(prediction_type="v_prediction")).save_pretrained(tmp_path / "model")
    for change in ("sampler.epsilon_scale=1.01", "evaluate.dense=['ddim:2:1.01']", "evaluate.mixtures=['ddim:2:1.01']"):
        done = command(home, "--set", f"model.path={tmp_path}/model", "--set", f"storage.path={tmp_path}/runs", "--set", change)
        assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
        assert "is 1.01, but the model predicts v_prediction, not noise: set it to 1" in done.stderr
        assert not (tmp_path / "runs").exists()


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
            assert row[key] == first["rows"][label][key], "the same images are drawn together"
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
    table(home, more=("--only", "dense"))
    assert json.loads(kept.read_text())["rows"] == whole["rows"], "what was measured under these settings holds again"


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
    assert "Frechet (FD) and kernel distance (KID) of the torchscript features of 6 images, 8 bits, to those of 16 reference images;" in (
        cli_evaluate.text(found)
    )


def test_a_kernel_distance_is_measured_beside_a_frechet_distance_from_stored_statistics(home, first):
    images = table(home, f"evaluate.kid_reference={home}/images", more=("--only", "dense"))
    row = images["rows"]["dense"]
    assert row["frechet"] == first["rows"]["dense"]["frechet"]
    assert row["kid"] is not None
    known = {key: value for key, value in images["protocol"].items() if not key.startswith("kid_")}
    assert {**known, "id": first["protocol"]["id"]} == first["protocol"], "nothing else differs"
    assert images["protocol"]["id"] != first["protocol"]["id"]
    assert images["protocol"]["kid_images"] == 16
    digest = images["protocol"]["kid_digest"][:8]
    assert f"to those of 40 reference images (KID: 16, digest {digest});" in cli_evaluate.text(images)
    plain = table(home, f"evaluate.reference={home}/images", "evaluate.dense=[]")
    assert plain["rows"]["dense"]["kid"] == row["kid"], "from the same images"


def test_stored_features_count_where_a_kernel_distance_is_made_of_them(home):
    rng = np.random.default_rng(1)
    features = rng.standard_normal((40, 12)).astype(np.float32)
    stored = {"mean": features.mean(0), "cov": np.cov(features, rowvar=False), "n": 40}
    protocols = {}
    for name, more in (("none", {}), ("some", {"features": features}), ("others", {"features": features[:30]})):
        np.savez(home / "own.npz", **stored, **more)  # at one path
        found = table(home, f"evaluate.reference={home}/own.npz", more=("--only", "dense"))
        protocols[name] = found["protocol"]
        assert (found["rows"]["dense"]["kid"] is None) == (name == "none")
    assert len({protocol["id"] for protocol in protocols.values()}) == 3
    assert len({protocol["reference_digest"] for protocol in protocols.values()}) == 1
    assert [protocol.get("kid_images") for protocol in protocols.values()] == [None, 40, 30]
    np.savez(home / "only_kid.npz", test_mean=features.mean(0) + 1, test_cov=stored["cov"], test_n=9, test_features=features)
    apart = table(home, f"evaluate.kid_reference={home}/only_kid.npz:test", more=("--only", "dense"))
    assert apart["protocol"]["kid_digest"] == protocols["some"]["kid_digest"]


def test_an_id_does_not_depend_on_distances_that_are_not_measured():
    """As they were before there were others."""
    far = {"extractor": "resnet56", "extractor_digest": "a" * 64, "input_size": 32, "resize": "none", "images": 10000}
    far |= {"reference_digest": "b" * 64, "reference_images": 10000}
    assert Protocol((3, 16, 16), 0, 1.0, "float32").id == "637855962cfb"
    assert Protocol((3, 32, 32), 3, 1.5, "bfloat16", **far).id == "45e7356e6b64"
    assert not [key for key in Protocol((3, 32, 32), 3, 1.5, "bfloat16", **far).told() if key.startswith(("kid", "lpips"))]


def test_a_perceptual_distance_is_that_of_the_weights_wherever_they_lie(home):
    from orchestrator.planning import prepare

    class Scaled(torch.nn.Module):
        def __init__(self, scale: float):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(scale))

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return self.scale * (a - b).abs().mean((1, 2, 3))

    def publish() -> str:
        return prepare(load_job(str(home / "job.yaml"), [f"evaluate.lpips={home}/lpips.pt"])).pipeline.fingerprints["publish"]

    changes, found, fingerprints = (f"evaluate.lpips={home}/lpips.pt", "evaluate.frechet_samples=0"), {}, {}
    for scale in (1.0, 2.0):
        torch.jit.script(Scaled(scale)).save(home / "lpips.pt")  # at one path
        found[scale], fingerprints[scale] = table(home, *changes, more=("--only", "dense ddim:2")), publish()
    one, two = (found[scale]["rows"]["dense ddim:2"]["paired_lpips"] for scale in found)
    assert 0 < one == pytest.approx(two / 2)
    assert found[1.0]["protocol"]["id"] != found[2.0]["protocol"]["id"]
    assert fingerprints[1.0] != fingerprints[2.0]
    (home / "lpips.pt").rename(home / "moved.pt")
    files = set((home / "runs" / "small" / "evaluation").iterdir())
    moved = table(home, f"evaluate.lpips={home}/moved.pt", changes[1], more=("--only", "dense ddim:2"))
    assert moved == found[2.0]
    assert set((home / "runs" / "small" / "evaluation").iterdir()) == files, "measured once"


def test_the_printed_table_has_a_row_each_and_ends_with_the_protocol(first):
    text = cli_evaluate.text(first)
    assert [line.split("  ")[0] for line in text.splitlines()[1:4]] == LABELS
    assert "50.0%" in text.splitlines()[2]
    told = f"protocol {first['protocol']['id']}: Frechet distance (FD) of the torchscript features of 6 images, 8 bits, to those of 40 "
    assert text.splitlines()[-1].startswith(told)
    assert "KID" not in text, "statistics without features give none"


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
        ("evaluate.kid_reference=no/images", "evaluate.kid_reference: no such file or folder: no/images"),
        ("evaluate.kid_reference=no.npz", "evaluate.kid_reference: no such file: "),
        (
            "evaluate.dense=[ddim]",
            "evaluate.dense: 'ddim' is not SCHEDULER:STEPS or SCHEDULER:STEPS:EPSILON_SCALE, e.g. ddim:25 or ddim:25:1.002; schedulers "
            "are ddpm, ddim",
        ),
        ("evaluate.mixtures=[ddim]", "evaluate.mixtures: 'ddim' is not SCHEDULER:STEPS"),
        ("evaluate.mixtures=['ddim:2','ddim:2:1']", "evaluate.mixtures names ddim:2 twice"),
        ("evaluate.dense=['ddim:2_0']", "evaluate.dense: 'ddim:2_0' is not SCHEDULER:STEPS"),
        ("evaluate.dense=['ddim:2:1:1']", "evaluate.dense: 'ddim:2:1:1' is not SCHEDULER:STEPS"),
        ("evaluate.dense=['ddim:2:nan']", "evaluate.dense: 'ddim:2:nan' is not SCHEDULER:STEPS"),
        ("evaluate.dense=['ddim:2:2']", "evaluate.dense: 'ddim:2:2' scales noise by 2: it must be from 0.9 to 1.1"),
        ("evaluate.dense=['ddim:2:1.02','ddim:2:1.020']", "evaluate.dense names ddim:2:1.02 twice"),
        ("evaluate.dense=['ddim:2','ddim:2:1']", "evaluate.dense names ddim:2 twice"),
        ("sampler.epsilon_scale=2", "sampler.epsilon_scale is 2: must be less than or equal to 1.1"),
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


def test_statistics_without_features_give_no_kernel_distance(home):
    done = command(home, "--set", f"evaluate.kid_reference={home}/statistics.npz:both")
    assert done.exit_code == 2
    assert "evaluate.kid_reference: " in done.stderr
    assert "statistics.npz:both holds no features, of which a kernel distance is made: give images, or statistics with" in done.stderr


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
