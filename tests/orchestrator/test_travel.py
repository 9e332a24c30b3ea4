"""What of a job travels to a cluster: code and bundled files, one job file that needs no other; everything else is refused by its name."""

from __future__ import annotations

import http.server
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from orchestrator import travel
from orchestrator.cli import main
from orchestrator.config import load_job
from orchestrator.job_file import BUNDLED
from workers.contracts import InputError

SHARED = ["storage.path=/mnt/shared/runs", "registry.path=/mnt/shared/registry"]


@pytest.fixture
def parcel(tmp_path) -> Path:
    (tmp_path / "parcel").mkdir()
    return tmp_path / "parcel"


def test_a_bundled_job_travels_with_the_files_that_it_names_and_nothing_else(parcel):
    packed = travel.pack("quickstart", SHARED, parcel)
    names = {path.relative_to(parcel).as_posix() for path in parcel.rglob("*") if path.is_file()}
    beside = {name for name in names if not name.startswith(("orchestrator/", "workers/"))}
    model = {f"jobs/quickstart/ddpm-emoji32/{p.relative_to(BUNDLED / 'quickstart/ddpm-emoji32').as_posix()}"
             for p in (BUNDLED / "quickstart/ddpm-emoji32").rglob("*") if p.is_file()}  # fmt: skip
    assert beside == {"job.yaml", "jobs/quickstart/noto-emoji-32.parquet", *model}
    sources = {
        p.relative_to(BUNDLED.parent).as_posix()
        for package in ("orchestrator", "workers")
        for p in (BUNDLED.parent / package).rglob("*.py")
    }
    assert sources <= names
    assert "orchestrator/report.html" in names
    assert not any("__pycache__" in name for name in names)
    assert (packed.files, packed.run_folder) == (len(names), "/mnt/shared/runs/quickstart")
    assert packed.bytes == sum((parcel / name).stat().st_size for name in names) < 20e6


def test_the_job_that_arrives_is_the_job_that_was_sent(parcel, tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text("extends: quickstart.yaml\nname: mine\nfinetune: {steps: 7}\n")
    overrides = [*SHARED, "budgets.0.ratio=0.4", "seed=3"]
    travel.pack(str(tmp_path / "mine.yaml"), overrides, parcel)
    sent = load_job(str(tmp_path / "mine.yaml"), overrides).model_dump(mode="json")
    shutil.move(parcel, tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "elsewhere")
    arrived = load_job("job.yaml").model_dump(mode="json")
    for section in ("model", "data"):
        inside = Path(arrived[section].pop("path")).relative_to(tmp_path / "elsewhere" / "jobs")
        assert inside == Path(sent[section].pop("path")).relative_to(BUNDLED)
    assert arrived == sent
    assert "extends" not in yaml.safe_load(Path("job.yaml").read_text())


def test_paths_of_the_cluster_are_left_as_they_are(parcel):
    there = [
        "model.path=google/ddpm-cifar10-32",
        "data.path=/mnt/shared/images",
        "evaluate.reference=/mnt/shared/stats.npz:test",
        "evaluate.extractor_weights=/mnt/shared/net.th",
        "evaluate.lpips=mine.module:distance",
    ]
    travel.pack("quickstart", [*SHARED, *there], parcel)
    arrived = yaml.safe_load((parcel / "job.yaml").read_text())
    assert [arrived["model"]["path"], arrived["data"]["path"]] == ["google/ddpm-cifar10-32", "/mnt/shared/images"]
    assert arrived["evaluate"]["reference"] == "/mnt/shared/stats.npz:test"
    assert arrived["evaluate"]["lpips"] == "mine.module:distance"
    assert not (parcel / "jobs").exists()
    stored = travel.pack("quickstart", ["storage.path=s3://bucket/runs?region=here", SHARED[1]], parcel)
    assert stored.run_folder == "s3://bucket/runs/quickstart?region=here"
    travel.pack("quickstart", [*SHARED, "data.path=hf://datasets/me/mine"], parcel)
    assert yaml.safe_load((parcel / "job.yaml").read_text())["data"]["path"] == "hf://datasets/me/mine"


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ([], "storage.path is runs: a job on a cluster needs storage that every node sees, at an absolute path: "),
        ([], "; registry.path is registry: a job on a cluster needs storage"),
        (SHARED[:1], "registry.path is registry: a job on a cluster needs storage that every node sees"),
        (["storage.path=~/runs", SHARED[1]], "storage.path is ~/runs: "),
        (
            ["storage.path=s3://bucket/runs", "storage.scratch=here", SHARED[1]],
            "storage.scratch is here: on a cluster give an absolute path",
        ),
        ([*SHARED, "data.path=images"], "data.path is images: only code and bundled files travel with a job"),
        ([*SHARED, "data.path=pictures/train-*.parquet"], "data.path is pictures/train-*.parquet: only code"),
        ([*SHARED, "model.path=./model"], "model.path is ./model: only code and bundled files travel"),
        ([*SHARED, "evaluate.reference=stats.npz:test"], "--set evaluate.reference=/mnt/shared/stats.npz"),
    ],
)
def test_a_path_that_means_nothing_on_the_cluster_is_refused_with_what_to_write(overrides, text, parcel, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("images", "model"):
        (tmp_path / name).mkdir()
    (tmp_path / "stats.npz").touch()
    with pytest.raises(InputError) as refused:
        travel.pack("quickstart", overrides, parcel)
    assert text in str(refused.value)
    assert not (parcel / "job.yaml").exists()


def test_a_path_beside_the_job_file_is_refused_as_it_was_written(parcel):
    with pytest.raises(InputError, match=r"data.path is \.\./images/lsun-church: only code .* --set data.path=/mnt/shared/lsun-church$"):
        travel.pack("lsun_church", SHARED, parcel)


def test_more_than_ray_takes_is_refused_with_the_largest_file(parcel, monkeypatch):
    monkeypatch.setattr(travel, "LIMIT_BYTES", 10**6)
    with pytest.raises(InputError, match=r"9 MB would travel .* jobs/quickstart/noto-emoji-32.parquet \(5 MB\)"):
        travel.pack("quickstart", SHARED, parcel)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["submit", "quickstart", *(w for s in SHARED for w in ("--set", s))], "which cluster? Give --address http://HOST:8265"),
        (["submit", "quickstart", "--only", "route", "--until", "route"], "exclude each other"),
        (["submit", "quickstart", "--address", "http://127.0.0.1:1"], "storage.path is runs"),
        (["jobs", "list"], "which cluster?"),
        (["jobs", "list", "--address", "127.0.0.1:8265"], "give that of the cluster's dashboard, e.g. http://HOST:8265"),
        (["jobs", "list", "--address", "http://[half"], "give that of the cluster's dashboard"),
        (["jobs", "list", "--address", "http://me:topsecret@127.0.0.1:1"], "--address holds a user name or a password"),
        (["jobs", "list", "--address", "me:topsecret@127.0.0.1"], "--address holds a user name or a password"),
        (["jobs", "stop", "mine-1", "--address", "http://127.0.0.1:1"], "nothing answers there (Connection refused)"),
    ],
)
def test_a_cluster_that_is_not_there_is_told_in_one_line(words, text, monkeypatch):
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 2, done.output
    assert text in done.stderr
    assert "topsecret" not in done.output
    assert len(done.stderr.splitlines()) == 1


def test_a_file_of_a_token_that_is_not_there_is_said_to_be_missing_and_not_refused(tmp_path, monkeypatch):
    """Whoever answers: Ray does not even ask."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as nobody:
        threading.Thread(target=nobody.serve_forever, daemon=True).start()
        done = subprocess.run(
            [sys.executable, "-m", "orchestrator", "jobs", "list", "--address", f"http://127.0.0.1:{nobody.server_port}"],
            env={k: v for k, v in os.environ.items() if k != "RAY_AUTH_TOKEN"}
            | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "none"), "PYTHONPATH": str(BUNDLED.parent)},
            capture_output=True,
            text=True,
        )
        nobody.shutdown()
    assert done.returncode == 2
    assert f"asks for a token, but RAY_AUTH_TOKEN_PATH is {tmp_path / 'none'}, and there is no such file" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_node_without_the_dependencies_says_which_and_where():
    done = subprocess.run(
        [sys.executable, "-S", "-m", "orchestrator", "run", "job.yaml"], cwd=BUNDLED.parent, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: the Python of this node, {sys.executable}, has no click: install")
    assert len(done.stderr.splitlines()) == 1
