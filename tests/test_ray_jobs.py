"""Jobs on a cluster that asks for a token: real head, real dashboard. The code travels, the data does not, the terminal may be closed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[1]
JOB = """
name: small
model: {path: MODEL}
data: {path: DATA, holdout: 16}
similarity: {measure: snr, timesteps: 8}
partition: {experts: 2}
specialize: {steps: 24, batch_size: 4, random_networks: 0, importance_images: 4, checkpoint_every: 5, ema_decay: 0.9}
router: {images: 8, era_steps: 2, era_batch: 2, trials: 4}
budgets: [{metric: macs, ratio: 0.6}]
sampler: {scheduler: ddim, steps: 8}
finetune: {steps: 4, batch_size: 4, checkpoint_every: 2, compare: []}
evaluate: {images: 8, samples: 4, timesteps: 2}
resources: {device: cpu}
"""


@dataclass
class Head:
    """A cluster of one node, as a user would start it, with its own home, temp folder and token."""

    address: str
    gcs: str
    metrics: str
    token: str
    environment: dict[str, str]

    def stranger(self) -> dict[str, str]:
        """Somebody without the token, at another home."""
        home = Path(self.environment["HOME"]).parent / "stranger"
        home.mkdir(exist_ok=True)
        return {**{k: v for k, v in self.environment.items() if k != "RAY_AUTH_MODE"}, "HOME": str(home)}


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for found in sockets:
            found.bind(("127.0.0.1", 0))
        return [found.getsockname()[1] for found in sockets]


def end(process: subprocess.Popen) -> None:
    """The process and all that it started, by their ids."""
    family = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(30)
    _, alive = psutil.wait_procs(family, timeout=20)
    for left in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            left.kill()


def ray_command(*words: str) -> list[str]:
    return [sys.executable, "-m", "ray.scripts.scripts", *words]


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> Iterator[Head]:
    with contextlib.ExitStack() as stack:  # a short path: Ray's sockets live in its temp folder
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dp-", dir="/tmp", ignore_cleanup_errors=True)))
        (folder / "home").mkdir()
        kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k not in ("OMP_NUM_THREADS", "PYTHONPATH")}
        path = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"
        environment = {**kept, "HOME": str(folder / "home"), "PATH": path, "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
        made = subprocess.run(ray_command("get-auth-token", "--generate"), env=environment, capture_output=True, text=True, check=True)
        token = made.stdout.strip()
        names = ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port", "metrics-export-port")
        ports = dict(zip(names, free_ports(len(names)), strict=True))
        words = [f"--{name}={port}" for name, port in ports.items()] + ["--min-worker-port=0", "--max-worker-port=0"]
        words += [f"--temp-dir={folder / 'ray'}", "--dashboard-host=127.0.0.1", "--num-cpus=2", "--object-store-memory=200000000"]
        log = stack.enter_context((folder / "head.log").open("w"))
        process = subprocess.Popen(
            ray_command("start", "--head", "--block", *words), env=environment, stdout=log, stderr=log, start_new_session=True
        )
        stack.callback(end, process)
        address = f"http://127.0.0.1:{ports['dashboard-port']}"
        deadline = time.monotonic() + 200
        while get(f"{address}/api/version", token) is None:
            assert process.poll() is None, (folder / "head.log").read_text()
            assert time.monotonic() < deadline, "no dashboard within 200 s"
            time.sleep(0.3)
        found = Head(address, "", f"http://127.0.0.1:{ports['metrics-export-port']}/metrics", token, environment)
        [node] = wait_for(lambda: alive(found), 200, "the head's own node has not come")
        yield replace(found, gcs=f"{node['node_ip']}:{ports['port']}")


def get(url: str, token: str = "") -> str | None:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"}), timeout=10) as answer:
            return answer.read().decode()
    except OSError:
        return None


@pytest.fixture(scope="module")
def user(head, emoji, emoji_images, tmp_path_factory) -> Path:
    """A user's folder, which is not the repository, with a job file; beside it the storage that the cluster sees."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "shared").mkdir()
    (folder / "base.yaml").write_text(JOB.replace("MODEL", str(emoji)).replace("DATA", str(emoji_images)))
    (folder / "mine.yaml").write_text("extends: base.yaml\nname: mine\n")
    return folder


def sets(user: Path, storage: str = "runs") -> list[str]:
    found = {"storage.path": user / "shared" / storage, "registry.path": user / "shared" / "registry"}
    return [word for key, value in found.items() for word in ("--set", f"{key}={value}")]


def command(*words: str) -> list[str]:
    return [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); from orchestrator.cli import main; main()", *words]


def diffpruning(
    head: Head, user: Path, *words: str, environment: dict[str, str] | None = None, timeout: float = 500
) -> subprocess.CompletedProcess[str]:
    """The command, run from the user's folder."""
    env = {**(environment or head.environment), "RAY_API_SERVER_ADDRESS": head.address}
    return subprocess.run(command(*words), cwd=user, env=env, capture_output=True, text=True, timeout=timeout, check=False)


def progress(user: Path, name: str, storage: str = "runs") -> dict:
    file = user / "shared" / storage / name / "progress.json"
    return json.loads(file.read_text()) if file.exists() else {}


def wait_for(what: Callable[[], Any], seconds: float, why: str) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, why
        time.sleep(0.3)
    return found


def test_a_job_travels_to_a_cluster_with_a_token_and_its_token_stays_where_it_was(head, user):
    refused = diffpruning(head, user, "submit", "mine.yaml", *sets(user), environment=head.stranger())
    assert refused.returncode == 2
    assert "asks for a token: export RAY_AUTH_MODE=token" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert list((user / "shared").iterdir()) == []

    done = diffpruning(head, user, "submit", "mine.yaml", *sets(user), "--until", "partition")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^partition +finished", done.stdout, re.MULTILINE)
    assert done.stderr.startswith(f"submitted mine-1 to {head.address}: ")
    told = progress(user, "mine")
    assert told["end"] == {"exit_code": 0, "kind": "ok", "message": ""}
    assert told["driver"]["job"] == "mine-1"
    run = user / "shared" / "runs" / "mine"
    assert not list(run.glob(".storage-marker-*"))

    listed = diffpruning(head, user, "jobs", "list", "--json")
    [job] = json.loads(listed.stdout)
    assert (job["id"], job["status"], job["exit_code"], job["run_folder"]) == ("mine-1", "SUCCEEDED", 0, str(run))
    kept = [path for path in (user / "shared").rglob("*") if path.is_file() and head.token.encode() in path.read_bytes()]
    assert not kept
    assert head.token not in done.stdout + done.stderr + listed.stdout + (get(f"{head.address}/api/jobs/", head.token) or head.token)


@pytest.mark.slow
def test_a_whole_run_is_watched_by_gauges_by_trains_state_and_by_curves(head, user):
    from workers.session import PLAN_GAUGES, UNIT_GAUGES

    name = "watched"
    job = diffpruning(head, user, "submit", "mine.yaml", "--set", f"name={name}", *sets(user), "--detach")
    assert job.returncode == 0, job.stderr
    assert job.stdout == f"diffpruning jobs logs {name}-1 --follow\n"
    wait_for(lambda: progress(user, name), 300, "the run has not begun")
    words = command("status", str(user / "shared" / "runs" / name), "--watch", "--json")
    watcher = subprocess.Popen(words, env=head.environment, cwd=user, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    seen: set[str] = set()

    def ended() -> bool:
        seen.update(re.findall(rf'^ray_(diffpruning_\w+)\{{.*run="{name}"', get(head.metrics, head.token) or "", re.MULTILINE))
        return bool(progress(user, name).get("end"))

    wait_for(ended, 900, "the run has not ended")
    assert seen == {f"diffpruning_{gauge}" for gauge in (*UNIT_GAUGES, *PLAN_GAUGES)}
    out, err = watcher.communicate(timeout=60)
    assert watcher.returncode == 0, err
    found = [json.loads(line) for line in out.splitlines()]
    assert found[-1]["end"]["exit_code"] == 0
    trainers = {trainer["name"][:10]: trainer for told in found for trainer in told["trainers"] if trainer["workers"]}
    assert set(trainers) == {"specialize", "finetune-t"}
    assert all(Path(worker["log_file_path"]).is_file() for trainer in trainers.values() for worker in trainer["workers"])
    curves = user / "shared" / "runs" / name / "tensorboard"
    assert {path.parent.parent.name for path in curves.rglob("events.out.tfevents.*")} >= {"specialize", "finetune"}
    assert diffpruning(head, user, "jobs", "logs", f"{name}-1", "--follow").returncode == 0


@pytest.mark.slow
def test_a_closed_terminal_ends_the_following_and_not_the_job(head, user):
    words = command("submit", "mine.yaml", "--set", "name=left", "--until", "partition", *sets(user), "--address", head.address)
    follower = subprocess.Popen(
        words, env=head.environment, cwd=user, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    wait_for(lambda: '"left-1"' in (get(f"{head.address}/api/jobs/", head.token) or ""), 100, "it was not submitted")
    os.killpg(follower.pid, signal.SIGHUP)
    assert follower.wait(30) != 0
    assert not progress(user, "left").get("end")
    done = diffpruning(head, user, "jobs", "logs", "left-1", "--follow")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^partition +finished", done.stdout, re.MULTILINE)
    again = diffpruning(head, user, "submit", "mine.yaml", "--set", "name=left", "--until", "partition", *sets(user))
    assert again.returncode == 0
    assert again.stdout.count("already done") == 2
    assert again.stderr.startswith("submitted left-2 ")


@pytest.mark.slow
def test_a_stopped_job_says_that_it_was_interrupted_and_the_next_one_goes_on(head, user):
    words = ["submit", "mine.yaml", "--set", "name=stopped", *sets(user)]
    assert diffpruning(head, user, *words, "--detach").returncode == 0
    run = user / "shared" / "runs" / "stopped"
    wait_for(lambda: list(run.glob("train/specialize-*/step_*")), 300, "no checkpoint")
    stopped = diffpruning(head, user, "jobs", "stop", "stopped-1", "--json")
    assert json.loads(stopped.stdout)["status"] == "STOPPED"
    assert progress(user, "stopped")["end"] == {"exit_code": 130, "kind": "interrupted", "message": ""}
    assert not list(run.glob(".storage-marker-*"))
    shown = diffpruning(head, user, "status", str(run))
    assert "interrupted exit code 130" in shown.stdout
    assert diffpruning(head, user, "jobs", "logs", "stopped-1", "--follow").returncode == 130
    again = diffpruning(head, user, *words, "--only", "specialize")
    assert again.returncode == 0, again.stdout
    assert "resumed" in again.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("set_", "code", "kind"), [("budgets.0.ratio=0.001", 3, None), ("resources.cpus_per_worker=64", 2, "refused")], ids=["before", "after"]
)
def test_the_exit_code_of_the_run_is_that_of_submit_and_is_kept_where_the_folder_is_claimed(head, user, set_, code, kind):
    name = f"code{code}"
    done = diffpruning(head, user, "submit", "mine.yaml", "--set", f"name={name}", "--set", set_, *sets(user), "--json")
    assert done.returncode == code, done.stderr
    assert json.loads(done.stdout)["exit_code"] == code
    assert (progress(user, name).get("end") or {}).get("kind") == kind


@pytest.mark.slow
def test_plain_ray_job_submit_takes_the_repository_and_refuses_results_that_would_be_lost(head, user):
    def submit(*words: str) -> subprocess.CompletedProcess[str]:
        line = ray_command(
            "job", "submit", "--address", head.address, "--working-dir", ".", "--", "python", "-m", "orchestrator", "run", *words
        )
        return subprocess.run(line, cwd=ROOT, env=head.environment, capture_output=True, text=True, timeout=500, check=False)

    lost = submit("jobs/quickstart.yaml", "--until", "partition")
    assert lost.returncode == 1
    assert "inside this job's copy of the code, which Ray deletes" in lost.stdout
    done = submit("jobs/quickstart.yaml", "--set", "similarity.measure=snr", "--until", "partition", *sets(user, "plain"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert progress(user, "quickstart", "plain")["end"]["exit_code"] == 0


@pytest.mark.slow
def test_a_node_that_does_not_see_the_storage_is_named_before_anything_runs(head, user):
    hidden = user / "shared" / "runs"
    hidden.mkdir(exist_ok=True)
    private = ["unshare", "--mount", "--propagation", "private", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(hidden)]
    if subprocess.run([*private, "true"], capture_output=True, check=False).returncode:
        pytest.skip("hiding a folder from one process needs the right to mount")
    ports = free_ports(2)
    words = [f"--dashboard-agent-listen-port={ports[0]}", f"--metrics-export-port={ports[1]}", "--min-worker-port=0", "--max-worker-port=0"]
    start = ray_command("start", "--address", head.gcs, "--block", "--num-cpus=1", "--object-store-memory=100000000", *words)
    with (user / "node.log").open("w") as log:
        process = subprocess.Popen([*private, *start], env=head.environment, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_for(lambda: len(alive(head)) == 2, 300, "the second node has not come")
            done = diffpruning(head, user, "submit", "mine.yaml", "--set", "name=blind", *sets(user))
        finally:
            end(process)
    wait_for(lambda: len(alive(head)) == 1, 300, "the second node has not gone")
    assert done.returncode == 2, done.stdout
    assert f"storage.path: {hidden / 'blind'} is not seen by {socket.gethostname()} (" in done.stdout
    assert not list((hidden / "blind").glob("*/done.json"))


def alive(head: Head) -> list[dict]:
    answer = get(f"{head.address}/api/v0/nodes", head.token)
    return [node for node in json.loads(answer)["data"]["result"]["result"] if node["state"] == "ALIVE"] if answer else []


@pytest.mark.slow
def test_a_driver_with_another_token_or_none_is_told_so(head, user):
    (Path(head.stranger()["HOME"]) / ".ray").mkdir(exist_ok=True)
    (Path(head.stranger()["HOME"]) / ".ray" / "auth_token").write_text("0" * 64)
    wrong = {**head.stranger(), "RAY_AUTH_MODE": "token"}
    for environment, hint in ((wrong, "refuses this token"), ({**head.stranger(), "RAY_AUTH_MODE": "disabled"}, "asks for a token")):
        listed = diffpruning(head, user, "jobs", "list", environment=environment)
        assert listed.returncode == 2
        assert hint in listed.stderr
        joined = diffpruning(head, user, "run", "mine.yaml", *sets(user, "no"), environment={**environment, "RAY_ADDRESS": head.gcs})
        assert joined.returncode == 2
        assert "RAY_AUTH_MODE=token and its token" in joined.stderr
        assert "Traceback" not in joined.stderr
