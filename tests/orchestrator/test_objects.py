"""Runs on an object store, against a real S3 server, and Google's library against one that speaks its API: the bits of a run in a folder,
wherever it goes on; one driver; clean refusals."""

import functools
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import Result

from orchestrator import cli_driver, lease
from orchestrator.cluster import InlineCluster
from orchestrator.lease import Lease
from orchestrator.store import RunStore
from tests.buckets import Bucket, diffpruning, new_bucket, published, write_job
from tests.orchestrator import test_run_latent
from tests.s3 import ENVIRONMENT
from workers import checkpoint, files, objects_gcs, tasks_route
from workers.contracts import InputError, RunFailed
from workers.mirror import Mirror, works
from workers.nodes import this_node
from workers.objects import ObjectStore
from workers.session import Session

ROOT = Path(__file__).parents[2]
AWS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION")
GOOGLE = ("STORAGE_EMULATOR_HOST", "GOOGLE_APPLICATION_CREDENTIALS")
STAGES = ["analyze", "partition", "specialize", "route", "finetune", "publish"]


@pytest.fixture(scope="module", autouse=True)
def credentials(tmp_path_factory):
    """Those of the server, for this module's fixtures too; nothing of ours goes to the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        for name in (*AWS, *GOOGLE):
            patch.delenv(name, raising=False)
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory, emoji, emoji_images) -> Path:
    """A job and its images."""
    return write_job(tmp_path_factory.mktemp("objects"), emoji, emoji_images)


@pytest.fixture
def bucket(request, folder, tmp_path) -> Bucket:
    """Of S3, or of the kind that a test asks for."""
    return new_bucket(request.getfixturevalue(getattr(request, "param", "s3_server")), folder, tmp_path)


both = pytest.mark.parametrize("bucket", ["s3_server", "gcs_server"], indirect=True, ids=["s3", "gs"])


def refusal(result: Result, code: int = 2) -> str:
    assert (result.exit_code, result.stdout) == (code, ""), result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    return result.stderr.removeprefix("error: ").rstrip("\n")


@pytest.fixture(scope="module")
def local(folder) -> Path:
    """The registry of the job run in a local folder."""
    sets = ("--set", f"storage.path={folder}/runs", "--set", f"registry.path={folder}/registry")
    done = diffpruning("run", folder / "job.yaml", "--inline", *sets)
    assert done.exit_code == 0, done.output
    return folder / "registry"


@pytest.fixture(scope="module")
def done(s3_server, folder, tmp_path_factory) -> Bucket:
    """The finished job on an object store."""
    bucket = new_bucket(s3_server, folder, tmp_path_factory.mktemp("done"))
    result = bucket.command("run", "--inline", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["run_folder"] == bucket.run
    assert found["report"] == bucket.run.replace("small?", "small/report.html?")
    return bucket


# --- a whole run ------------------------------------------------------------------------------------------------------


def test_a_run_on_an_object_store_publishes_the_bits_of_a_run_in_a_folder(done, local):
    assert published(done.home / "registry") == published(local)


def test_the_store_holds_what_a_folder_would(done, local, folder):
    def names(found) -> set[str]:
        """Without the digests, some of which stand for a clock or a path."""
        return {re.sub(r"-[0-9a-f]{8,10}(?=[./ ])", "-*", name) for name in found if "tfevents" not in name and not name.startswith(".")}

    run = folder / "runs" / "small"
    assert names(done.held()) == names(path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file())
    assert not [name for name in done.held() if ".tmp" in name]


def test_done_is_written_after_all_that_it_tells_of_and_a_checkpoint_s_description_after_its_tensors(done):
    puts = [path.partition("/small/")[2] for method, path in done.server.requests if method == "PUT" and path.startswith(bucket_of(done))]
    for stage in STAGES:
        [record] = [name for name in puts if name.startswith(f"{stage}-") and name.endswith("/done.json")]
        inside = record.rpartition("/")[0]
        assert not [name for name in puts[puts.index(record) + 1 :] if name.startswith((inside, f"train/{stage}-"))]
    # large files go in parts, and the lease is renewed between them
    steps = [name for name, _ in itertools.groupby(name for name in puts if "/step_" in name)]
    assert [name.rpartition("/")[2] for name in steps] == ["state.safetensors", "checkpoint.json"] * (len(steps) // 2)


def bucket_of(bucket: Bucket) -> str:
    return "/" + bucket.uri.removeprefix("s3://").partition("?")[0] + "/"


def test_the_same_command_skips_what_is_done_on_this_machine_and_on_another(done):
    for machine in ("one", "other"):
        again = done.command("run", "--inline", "--json", machine=machine)
        lines = [line.split() for line in again.stderr.splitlines()]
        assert [words[:3] for words in lines if words[0] in STAGES] == [[stage, "already", "done"] for stage in STAGES]
        assert json.loads(again.stdout)["published"]["macs-0.50"]["reference"] == "small:1"
    assert not list(done.scratch("other").rglob("state.safetensors")), "tensors that nobody reads"


def test_a_machine_that_has_nothing_reads_it(done, tmp_path):
    before = done.held()
    writes = len([method for method, _ in done.server.requests if method != "GET" and method != "HEAD"])
    status = json.loads(diffpruning("status", done.run, "--json").stdout)
    assert [stage["stage"] for stage in status["done"]] == STAGES
    assert (status["run_folder"], status["end"]["exit_code"]) == (done.run, 0)
    assert status == json.loads(done.command("status", "--json", machine="new").stdout) | {
        "seconds_since_update": status["seconds_since_update"]
    }
    results = json.loads(diffpruning("results", done.run, "--json").stdout)
    assert {row["label"] for row in results["rows"]} == {"dense", "macs-0.50", "macs-0.50 cut only"}
    assert results["runs"][0]["run_folder"] == done.run
    plan = json.loads(done.command("plan", "--json", machine="new").stdout)
    assert {stage["state"] for stage in plan["stages"]} == {"done"}
    assert done.held() == before
    assert len([method for method, _ in done.server.requests if method != "GET" and method != "HEAD"]) == writes


def test_reports_evaluations_and_sweeps_go_to_the_store(done):
    report = done.command("report", machine="reporter")
    assert report.stdout.strip() == done.run.replace("small?", "small/report.html?")
    assert done.command("evaluate", "--inline", machine="evaluator").exit_code == 0
    assert "evaluation/table.json" in done.held()
    swept = done.command("sweep run", "--inline", "--budgets", "0.6", "--agents", "greedy", "--json", machine="sweeper")
    assert swept.exit_code == 0, swept.output
    shown = json.loads(diffpruning("sweep", "show", done.run, "--json").stdout)
    assert shown == json.loads(swept.stdout)
    name = f"sweep-{shown['id']}/trials.parquet"
    assert name in done.held() and shown["table"] == done.run.replace("small?", f"small/{name}?")


# --- continued --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@both
def test_a_run_killed_in_specialize_goes_on_on_another_machine_with_the_same_bits(bucket, local, monkeypatch):
    command = [sys.executable, "-m", "orchestrator", "run", str(bucket.folder / "job.yaml"), "--inline", *bucket.options()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    driver = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not any(name.endswith("step_0000002/checkpoint.json") for name in bucket.held()):
        assert driver.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    left = bucket.held()
    assert not [name for name in left if name.startswith("specialize-") and name.endswith("done.json")]

    told = refusal(bucket.command("run", "--inline", machine="other"))
    assert told.startswith(f"another diffpruning is running in {bucket.run} (host ") and f"process {driver.pid}" in told
    assert bucket.held() == left

    monkeypatch.setattr(lease, "EXPIRES_S", 0.5)
    monkeypatch.setattr(lease, "BEAT_S", 0.1)
    time.sleep(1)
    again = bucket.command("run", "--inline", machine="other")
    assert again.exit_code == 0, again.output
    assert published(bucket.home / "registry") == published(local)
    abouts = [bucket.read(name) for name in bucket.held() if name.startswith("train/specialize") and name.endswith("4/checkpoint.json")]
    assert len(abouts) == 2
    assert max(start for about in abouts for start, _ in about["attempts"]) >= 2, "nothing was continued"


def test_a_driver_killed_on_this_machine_is_followed_at_once(bucket):
    store = RunStore(bucket.scratch(), bucket.run)
    store.refresh()
    store.claim({"name": "small"})
    code = "import os, sys\nfrom pathlib import Path\nfrom orchestrator.store import RunStore\n"
    code += "with RunStore(Path(sys.argv[1]), sys.argv[2]).lock():\n    os.kill(os.getpid(), 9)"
    killed = subprocess.run([sys.executable, "-c", code, str(store.folder), bucket.run], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    with store.lock():
        pass


class FreshNodes(InlineCluster):
    """Every task runs on a machine that has nothing of the run, and whose disk is gone after it."""

    mirror: Mirror

    def _elsewhere(self, task):
        def run(session, item):
            here = Path(self.mirror.folder)
            away = here.with_name("driver")
            here.rename(away)
            here.mkdir()
            tasks_route._calibration.cache_clear()
            try:
                self.mirror.fetch((session.folder, item))
                return task(session, item)
            finally:
                shutil.rmtree(here)
                away.rename(here)
                self.mirror.pull(works)

        run.__name__ = task.__name__
        return run

    def scatter(self, task, items):
        return super().scatter(self._elsewhere(task), items)

    def fit_all(self, task, jobs, storage, on_done):
        return super().fit_all(self._elsewhere(task), jobs, storage, on_done)

    def search(self, task, axes, items, storage, stop_early=False):
        return super().search(self._elsewhere(task), axes, items, storage, stop_early)


def on_fresh_nodes(monkeypatch) -> None:
    made = cli_driver._cluster

    def elsewhere(job, view, on_progress, inline, store):
        cluster = FreshNodes(made(job, view, on_progress, inline, store).need, on_progress)
        cluster.mirror = store.mirror
        return cluster

    monkeypatch.setattr(cli_driver, "_cluster", elsewhere)


@pytest.mark.slow
def test_workers_that_share_nothing_but_the_store_make_the_same_bits(bucket, local, monkeypatch):
    on_fresh_nodes(monkeypatch)
    done = bucket.command("run", "--inline")
    assert done.exit_code == 0, done.output
    assert published(bucket.home / "registry") == published(local)


@pytest.mark.slow
def test_latents_go_through_the_store_too(s3_server, tmp_path, monkeypatch):
    ckpt, config = test_run_latent.checkpoint(tmp_path, "imagenet")
    assert diffpruning("convert-ldm", ckpt, "--config", config, "--out", tmp_path / "model").exit_code == 0
    test_run_latent.images(tmp_path / "images.parquet", labels=True)
    (tmp_path / "job.yaml").write_text(test_run_latent.JOB.format(kind="imagenet", folder=tmp_path))
    assert diffpruning("run", tmp_path / "job.yaml", "--inline").exit_code == 0
    bucket = new_bucket(s3_server, tmp_path, tmp_path / "home")
    bucket.name = "imagenet"
    on_fresh_nodes(monkeypatch)
    assert bucket.command("encode", "--inline").exit_code == 0
    encoded = {name: size for name, size in bucket.held().items() if "/latents-" in name}
    assert {name.rpartition("/")[2] for name in encoded} == {"index.json", "shard-00000.arrow"}
    done = bucket.command("run", "--inline", machine="other")
    assert done.exit_code == 0, done.output
    assert "encoded" not in done.stderr
    assert published(bucket.home / "registry", "imagenet") == published(tmp_path / "registry", "imagenet")


def test_redo_sets_aside_in_the_store(done, local):
    before = done.held()
    again = done.command("run", "--inline", "--redo", "finetune", "--until", "finetune", machine="redoer")
    assert again.exit_code == 0, again.output
    after = done.held()
    aside = {name.replace(".aside1", "") for name in after if ".aside1/" in name}
    assert aside >= {name for name in before if name.startswith(("finetune-", "train/finetune-", "publish-"))}
    assert {name for name in before if name not in after and not name.startswith(".lock/")} <= aside
    assert done.command("run", "--inline", machine="redoer").exit_code == 0
    assert published(done.home / "registry") == published(local)


def test_redo_sets_trials_aside_in_the_store_file_by_file_and_they_are_searched_anew(done):
    before = {name for name in done.held() if name.startswith("search/") and ".aside" not in name}
    assert before
    again = done.command("run", "--inline", "--redo", "route", "--until", "route", machine="searcher")
    assert again.exit_code == 0, again.output
    after = {name for name in done.held() if name.startswith("search/")}
    assert after >= before | {f"{name}.aside1" for name in before}


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(bucket, tmp_path) -> ObjectStore:
    """What a trainer leaves that saved after steps 1, 2 and 3."""
    mirror = Mirror(str(tmp_path / "trainer"), bucket.run)
    with files.followed_by(mirror):
        for step in (1, 2, 3):
            write = functools.partial(checkpoint.write, tensors={"x": torch.full((4,), float(step))}, about={"step": step})
            checkpoint.save_step(tmp_path / "trainer" / "train" / "unit", step, write)
    return mirror.store


def resumed(store: ObjectStore, folder: Path) -> tuple[float, list[str]]:
    """The tensor that another machine goes on from, and what it says of what it passed over."""
    (folder / "train" / "unit" / "step_0000009").mkdir(parents=True)  # of another life of this machine
    session = Session(str(folder / "train" / "unit"))
    with files.followed_by(Mirror(str(folder), store.uri(""))), session.resume() as found:
        assert found is not None and found.parent == folder / "train" / "unit"
        return float(checkpoint.read(found)[0]["x"][0]), session.broken


@both
def test_the_newest_two_checkpoints_are_kept_and_only_the_tensors_that_are_read_are_fetched(trained, tmp_path):
    steps = {f"train/unit/step_000000{step}/{name}" for step in (2, 3) for name in ("checkpoint.json", "state.safetensors")}
    assert set(trained.listing("train")) == steps
    assert resumed(trained, tmp_path / "other") == (3.0, [])
    assert [path.parent.name for path in (tmp_path / "other").rglob("state.safetensors")] == ["step_0000003"]


@both
def test_a_checkpoint_whose_description_was_not_sent_is_none(trained, tmp_path):
    trained.delete("train/unit/step_0000003/checkpoint.json")
    assert resumed(trained, tmp_path / "other") == (2.0, [])
    assert resumed(trained, tmp_path / "trainer")[0] == 2.0, "the machine that was killed while it sent it"


@both
def test_a_damaged_checkpoint_is_passed_over_and_named(trained, tmp_path):
    trained.put("train/unit/step_0000003/state.safetensors", b"cut off")
    step, [told] = resumed(trained, tmp_path / "other")
    assert step == 2.0 and "step_0000003 cannot be read" in told


# --- one driver -------------------------------------------------------------------------------------------------------


@pytest.fixture
def store(bucket) -> ObjectStore:
    return ObjectStore.of(bucket.run, "run")


@both
def test_of_two_drivers_one_gets_the_run_and_the_next_when_it_is_given_back(store):
    first, second = Lease(store, "one"), Lease(store, "two")
    first.take()
    with pytest.raises(
        InputError, match=r"another diffpruning is running in (s3|gs)://.*last heard of \d+ s ago\).*its lock ends in \d+ s"
    ):
        second.take()
    first.give_back()
    second.take()
    with pytest.raises(InputError, match="another diffpruning"):
        first.take()
    second.give_back()
    assert len(store.names(".lock")) == 1


def test_a_driver_that_slept_finds_its_run_taken_and_finishes_nothing_more(store, tmp_path, monkeypatch):
    lost = []
    monkeypatch.setattr(lease, "BEAT_S", 3600)
    monkeypatch.setattr(lease, "EXPIRES_S", 0.5)
    sleeper, other = Lease(store, "one", lambda: lost.append("sleeper")), Lease(store, "two")
    sleeper.take()
    time.sleep(2)
    other.take()
    mirror = Mirror(str(tmp_path), store.uri(""))
    (tmp_path / "done.json").write_text("late")
    with files.followed_by(sleeper), files.followed_by(mirror), pytest.raises(RunFailed, match="taken over by another diffpruning"):
        files.finished(tmp_path / "done.json")
    assert "done.json" not in store.listing()
    sleeper.give_back()
    with pytest.raises(RunFailed, match="taken over"):
        sleeper.require_held()


@both
def test_a_living_driver_that_loses_its_run_is_interrupted(store, monkeypatch):
    lost = []
    monkeypatch.setattr(lease, "BEAT_S", 0.05)
    held = Lease(store, "one", lambda: lost.append(True))
    held.take()
    store.put(".lock/00000002", b"{}")
    deadline = time.monotonic() + 20
    while not lost and time.monotonic() < deadline:
        time.sleep(0.05)
    assert lost


@both
def test_what_the_store_has_not_is_not_finished(bucket):
    store = RunStore(bucket.scratch(), bucket.run)
    store.refresh()
    store.claim({"name": "small"})
    with store.lock():
        (store.folder / "kept").mkdir()
        with files.replacing(store.folder / "kept" / "a.json") as path:
            path.write_text("there")
    (store.folder / "kept" / "b.json").write_text("killed before it was sent")
    (store.folder / "kept" / "a.json").write_text("other")
    with store.lock():
        assert not (store.folder / "kept" / "b.json").exists()
        assert (store.folder / "kept" / "a.json").read_text() == "there"


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("ftp://bucket/runs", "storage.path 'ftp://bucket/runs': is not a local path, s3://bucket/prefix or gs://bucket/prefix"),
        ("gs://bucket/runs?region=here", "storage.path 'gs://bucket/runs?region=here': unknown option 'region': known are endpoint"),
        ("gs://KEY:hush@bucket/runs", "storage.path gs://...: a URI must not hold credentials: name their file in GOOGLE_APPLICATION_CRED"),
        ("s3://KEY:hush@bucket/runs", "storage.path s3://...: a URI must not hold credentials: put them into AWS_ACCESS_KEY_ID and"),
        ("s3://bucket/runs?secret_key=hush", "storage.path s3://...: a URI must not hold credentials"),
        ("s3://bucket/runs?color=red", "storage.path 's3://bucket/runs?color=red': unknown option 'color': known are endpoint_override"),
        ("s3://bucket/../runs", "storage.path 's3://bucket/../runs': is not s3://bucket/prefix with a bucket's name and plain folders"),
        ("s3://", "storage.path 's3://': is not s3://bucket/prefix"),
    ],
)
@pytest.mark.parametrize("command", ["run", "plan", "status", "report"])
def test_a_storage_that_is_none_is_refused_in_one_line(command, path, told, folder):
    result = refusal(diffpruning(command, folder / "job.yaml", "--set", f"storage.path={path}"))
    assert result.startswith(told) and "hush" not in result


def test_a_scratch_folder_is_for_object_stores(folder):
    told = refusal(diffpruning("plan", folder / "job.yaml", "--set", "storage.path=runs", "--set", "storage.scratch=x"))
    assert told == "storage.scratch is x, but storage.path runs is a folder, which needs none: leave it out"


NO_BUCKET = re.compile("NoSuchBucket|The specified bucket does not exist")


@both
def test_a_bucket_that_is_not_there_is_refused_before_anything_is_written(bucket, tmp_path):
    elsewhere = Bucket(bucket.server, bucket.uri.replace("://bucket-", "://nobody-"), bucket.folder, tmp_path)
    told = refusal(elsewhere.command("run", "--inline"))
    assert re.match("storage.path: (s3|gs)://nobody-", told) and NO_BUCKET.search(told)
    assert not (tmp_path / "registry").exists()


@pytest.mark.parametrize(("kind", "option"), [("s3", "&region=here"), ("gs", "")])
def test_a_store_that_does_not_answer_is_refused(folder, tmp_path, monkeypatch, kind, option):
    monkeypatch.setattr(objects_gcs, "PATIENCE_S", 1)
    uri = f"{kind}://bucket/runs?endpoint_override=127.0.0.1:9&scheme=http{option}"
    sets = ("--set", f"storage.path={uri}", "--set", f"storage.scratch={tmp_path}")
    told = refusal(diffpruning("plan", folder / "job.yaml", *sets))
    assert told.startswith(f"storage.path: {kind}://bucket/runs/small?") and "see that the bucket" in told


@both
def test_a_node_that_cannot_use_the_store_says_why(bucket, tmp_path, monkeypatch):
    assert this_node("", Mirror(str(tmp_path), bucket.run)).sees
    found = this_node("", Mirror(str(tmp_path), bucket.run.replace("://bucket-", "://nobody-")))
    assert not found.sees and NO_BUCKET.search(found.why)
    for library in ("boto3", "google.cloud.storage"):
        monkeypatch.setitem(sys.modules, library, None)
    found = this_node("", Mirror(str(tmp_path), bucket.run))
    assert not found.sees and found.why in (
        "writing to s3:// needs boto3: pip install 'diffpruning[s3]'",
        "gs:// needs google-cloud-storage: pip install 'diffpruning[gcs]'",
    )


@both
@pytest.mark.parametrize("kind", ["ignores conditions", "foreign"])
def test_a_store_that_cannot_be_locked_and_a_prefix_of_somebody_else_are_refused(bucket, kind):
    if kind == "foreign":
        bucket.server.put(bucket.run, "thesis.txt", b"mine")
        told = refusal(bucket.command("run", "--inline"))
        assert told == f"storage.path: {bucket.run} is not empty and holds no run: choose another storage.path or name"
        assert bucket.held() == {"thesis.txt": 4}
        return
    bucket.server.ignores_conditions = True
    try:
        assert re.search("the store ignores (If-None-Match|ifGenerationMatch)", refusal(bucket.command("run", "--inline")))
    finally:
        bucket.server.ignores_conditions = False
    assert set(bucket.held()) == {".conditional"}


def test_the_run_of_another_job_is_refused(done, folder, tmp_path):
    other = tmp_path / "other.yaml"
    shutil.copytree(folder / "images", tmp_path / "images")
    (tmp_path / "images" / "00.png").unlink()
    other.write_text((folder / "job.yaml").read_text().replace(str(folder), str(tmp_path)))
    before = done.held()
    told = refusal(diffpruning("run", other, *done.options("thief"), "--inline"))
    assert told.startswith(f"{done.run} holds the run of another job (data.path ")
    assert done.held() == before


@pytest.mark.parametrize("uri", ["s3://bucket", "s3://bucket/runs/UPPER", "s3://bucket/", "gs:///small", "http://bucket/small"])
def test_a_uri_that_names_no_run_is_refused(uri):
    assert uri.partition("/small")[0] in refusal(diffpruning("status", uri)).replace("'", "")
