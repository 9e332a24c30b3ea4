"""Real Ray over an object store: its workers send what they make, and a killed run goes on where there is nothing but the store."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.buckets import diffpruning, new_bucket, published, write_job

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).parents[1]
PATIENCE_S = 600.0


def test_a_killed_run_goes_on_on_another_machine_and_publishes_what_a_folder_would(s3, tmp_path, emoji, emoji_images):
    folder = write_job(tmp_path, emoji, emoji_images)
    slow = ("--set", "specialize.steps=20", "--set", "specialize.checkpoint_every=2")
    bucket = new_bucket(s3, folder, tmp_path / "home")
    environment = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "OMP_NUM_THREADS")}

    def start(machine: str) -> subprocess.Popen:
        words = [sys.executable, "-m", "orchestrator", "run", str(folder / "job.yaml"), *slow, *bucket.options(machine)]
        log = (tmp_path / f"{machine}.log").open("w")
        return subprocess.Popen(words, env={**environment, "PYTHONPATH": str(ROOT)}, stdout=log, stderr=log, start_new_session=True)

    first = start("one")
    deadline = time.monotonic() + PATIENCE_S
    while not any(name.startswith("train/") and name.endswith("checkpoint.json") for name in bucket.held()):
        assert first.poll() is None and time.monotonic() < deadline, (tmp_path / "one.log").read_text()[-3000:]
        time.sleep(0.1)
    first.send_signal(signal.SIGKILL)
    first.wait()
    time.sleep(65)  # its lock must end

    second = start("other")
    assert second.wait(timeout=PATIENCE_S) == 0, (tmp_path / "other.log").read_text()[-3000:]
    abouts = [bucket.read(name) for name in bucket.held() if name.startswith("train/specialize") and name.endswith("checkpoint.json")]
    assert any(step > 0 for about in abouts for step, _ in about["attempts"]), "nothing was continued"
    here = ("--set", f"storage.path={tmp_path}/runs", "--set", f"registry.path={tmp_path}/registry")
    calm = diffpruning("run", folder / "job.yaml", "--inline", *slow, *here)
    assert calm.exit_code == 0, calm.output
    assert published(bucket.home / "registry") == published(tmp_path / "registry")
