"""The Ray of a local run: its ports are open to the network, and only the process that started it may speak to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow]

OWNER = """
import json, os, sys
from pathlib import Path
from tests.faults.work import cluster_of
import ray
from orchestrator.ray_jobs import Jobs, TrainState
cluster = cluster_of({"slots": 1}, Path(sys.argv[1]))
dashboard = cluster._dashboard
found = {"gcs": ray.get_runtime_context().gcs_address, "dashboard": dashboard, "token": os.environ["RAY_AUTH_TOKEN"]}
found["sum"] = cluster.scatter(sum, [])
found["trainers"] = TrainState(dashboard, ray.get_runtime_context().get_job_id()).read()
found["jobs"] = len(Jobs(f"http://{dashboard}").all())
found["session"] = ray._private.worker.global_worker.node.get_session_dir_path()
print("\\nfound " + json.dumps(found), flush=True)
sys.stdin.readline()
cluster.close()
"""
STRANGER = """
import sys, ray
ray.init(address=sys.argv[1], logging_level="CRITICAL")
print("sum", ray.get(ray.remote(lambda numbers: sum(numbers)).remote([40, 2])))
"""


@dataclass
class Local:
    found: dict
    folder: Path
    environment: dict[str, str]

    def run(self, code: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code, *words],
            capture_output=True,
            text=True,
            env=self.environment | environment,
            timeout=200,
            check=False,
        )


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Iterator[Local]:
    folder = tmp_path_factory.mktemp("local")
    (folder / "home").mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {"HOME": str(folder / "home"), "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    told = next((line for line in process.stdout if line.startswith("found ")), None)
    assert told is not None, process.stderr.read()[-3000:]
    yield Local(json.loads(told.removeprefix("found ")), folder, environment)
    process.communicate("\n", timeout=100)
    assert process.returncode == 0


def test_our_own_code_speaks_to_it(local):
    assert local.found["jobs"] == 0
    assert local.found["trainers"] == []


@pytest.mark.parametrize("has", [{}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}])
def test_another_process_without_the_token_runs_nothing(local, has):
    refused = local.run(STRANGER, local.found["gcs"], **has)
    assert refused.returncode != 0
    assert "ConnectionError" in refused.stderr or "AuthenticationError" in refused.stderr, refused.stderr
    assert "sum 42" not in refused.stdout


def test_who_has_the_token_does(local):
    """So that the refusals are the token's."""
    done = local.run(STRANGER, local.found["gcs"], RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=local.found["token"])
    assert "sum 42" in done.stdout, done.stderr


@pytest.mark.parametrize("path", ["/api/jobs/", "/api/train/v2/runs/v1"])
def test_the_dashboard_wants_the_token(local, path):
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"http://{local.found['dashboard']}{path}", timeout=20)
    assert refused.value.code == 401


def test_the_token_is_in_no_file_and_no_command_line(local):
    token = local.found["token"].encode()
    assert not (local.folder / "home" / ".ray").exists()
    for folder in (local.folder, Path(local.found["session"])):
        for file in folder.rglob("*"):
            assert not file.is_file() or file.is_symlink() or token not in file.read_bytes(), file
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            assert token not in line.read_bytes()
        except OSError:  # it has ended
            continue
