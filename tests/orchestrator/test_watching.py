"""Watching a run: how it ended, what Ray Train says, `status --watch`, curves that survive a resume, and Ray's refusals as one line."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from orchestrator import status
from orchestrator.cli import main
from orchestrator.place import Place
from orchestrator.progress import ProgressView, ending
from orchestrator.store import read_json, write_json
from orchestrator.tensorboard import EventFiles
from workers.contracts import BudgetUnreachable, InputError, Progress, RunFailed

TRAINER = {
    "name": "specialize-t0000-0500-1a2b3c4d",
    "status": "RUNNING",
    "detail": "",
    "attempts": 2,
    "workers": [{"world_rank": 0, "node_ip": "10.0.0.5", "pid": 77, "gpu_ids": [1], "log_file_path": "/logs/worker.log"}],
}


@pytest.fixture
def run(tmp_path) -> Path:
    write_json(tmp_path / "run.json", {"schema": 1, "name": "small"})
    return tmp_path


def view(run: Path) -> ProgressView:
    return ProgressView(Console(file=io.StringIO()), run / "progress.json")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (None, (0, "ok", "")),
        (RunFailed("2 of 3 runs\nfailed"), (1, "failed", "2 of 3 runs failed")),
        (ZeroDivisionError("division by zero"), (1, "failed", "division by zero")),
        (InputError("no"), (2, "refused", "no")),
        (BudgetUnreachable("too small"), (3, "budget unreachable", "too small")),
        (KeyboardInterrupt(), (130, "interrupted", "")),
    ],
)
def test_how_a_run_ends_is_kept_in_its_folder_with_the_exit_code_of_the_command(error, told, run):
    with contextlib.suppress(BaseException) if error else contextlib.nullcontext(), view(run) as shown:
        shown.on_stage("analyze", "running", 0.0)
        assert read_json(run / "progress.json")["end"] is None
        if error is not None:
            raise error
    kept = read_json(run / "progress.json")
    assert tuple(kept["end"].values()) == told
    assert ending(error) == kept["end"]
    assert (kept["stage"], kept["driver"]["pid"], kept["driver"]["job"]) == (None, os.getpid(), None)


def test_a_submitted_driver_says_which_job_it_is(run, monkeypatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": {}, "metadata": {"job_submission_id": "small-3"}}))
    with view(run):
        pass
    assert read_json(run / "progress.json")["driver"]["job"] == "small-3"
    assert CliRunner().invoke(main, ["status", str(run)]).stdout.splitlines()[0] == f"run small, {run}, job small-3"


def test_status_shows_what_ray_train_says_of_trainers_that_are_not_finished(run):
    with view(run) as shown:
        shown.on_stage("specialize", "running", 0.0)
        shown.trainers([TRAINER, {**TRAINER, "name": "specialize-t0500-1000-1a2b3c4d", "status": "FINISHED"}])
        shown.update(Progress("specialize", "t0000-0500", 3, 10))
        told = CliRunner().invoke(main, ["status", str(run)]).stdout
        shown._write(force=True)
        told = CliRunner().invoke(main, ["status", str(run)]).stdout
        found = json.loads(CliRunner().invoke(main, ["status", str(run), "--json"]).stdout)
    line = "    trainer specialize-t0000-0500-1a2b3c4d  running, attempt 2, on 10.0.0.5 pid 77 GPU 1, log /logs/worker.log"
    assert line in told.splitlines()
    assert "t0500-1000" not in told
    assert [trainer["status"] for trainer in found["trainers"]] == ["RUNNING", "FINISHED"]


def test_a_watcher_tells_every_change_and_leaves_with_the_exit_code_of_the_run(run):
    def work() -> None:
        try:
            with view(run) as shown:
                shown.on_stage("analyze", "running", 0.0)
                time.sleep(2.2)
                raise RunFailed("a worker was lost")
        except RunFailed:
            pass

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(0.3)
    watched = CliRunner().invoke(main, ["status", str(run), "--watch", "--json"])
    thread.join()
    assert watched.exit_code == 1
    documents = [json.loads(line) for line in watched.stdout.splitlines()]
    assert [document["running"] for document in documents] == ["analyze", None]
    assert documents[-1]["end"]["message"] == "a worker was lost"
    ended = CliRunner().invoke(main, ["status", str(run), "--watch"])
    assert ended.stdout == f"run small, {run}\n  failed      exit code 1: a worker was lost\n"


def word(**said) -> dict:
    """A progress.json."""
    return {"stage": None, "units": [], "at": time.time(), "fingerprints": {}, "trainers": [], "driver": None, "end": None} | said


@pytest.mark.parametrize(
    "left", [None, word(at=1e9 + 0.5), word(at=1e9 + 0.5, stage="analyze"), {"stage": None, "units": [], "at": 1e9 + 0.5}]
)
def test_a_watcher_of_a_run_that_was_killed_waits_and_then_says_since_when_there_was_no_word(left, run, monkeypatch):
    if left is not None:
        write_json(run / "progress.json", left)
    monkeypatch.setattr(status, "LOST_S", 1.0)
    watched = CliRunner().invoke(main, ["status", str(run), "--watch"])
    assert watched.exit_code == 1
    since = "it was begun" if left is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(1e9 + 0.5))
    told = f"error: no word since {since} from {run}: was it killed? The same run command continues it"
    assert watched.stderr.splitlines() == [told]
    assert ("stopped?" in watched.stdout) == (left is not None)


def test_a_watcher_of_a_job_that_was_submitted_again_does_not_leave_with_how_it_ended_before(run):
    write_json(run / "progress.json", word(end=ending(RunFailed("a worker was lost")), driver={"host": "a", "pid": 1, "job": "small-1"}))
    status.submitted(Place(run), "small-2")
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(status.watch(str(run), (), lambda found: None)))
    thread.start()
    time.sleep(0.3)
    with view(run):
        time.sleep(1.5)
    thread.join(30)
    assert codes == [0]
    status.submitted(Place(run.parent / "not seen from here"), "small-3")
    assert not (run.parent / "not seen from here").exists()


def test_a_run_that_goes_on_forgets_at_once_how_it_ended_before(run):
    write_json(run / "progress.json", word(end=ending(RunFailed("a worker was lost"))))
    with view(run):
        assert read_json(run / "progress.json")["end"] is None


@pytest.mark.parametrize(
    ("file", "text"),
    [
        *(("progress.json", text) for text in ("[]", "7", "{}", "[" * 100_000, "1" * 5000, "\xff", json.dumps(word(units=[{"stage": 1}])))),
        *(("progress.json", json.dumps(word(**odd))) for odd in ({"at": "now"}, {"end": {}}, {"fingerprints": [1]}, {"trainers": [7]})),
        ("run.json", "{}"),
        ("analyze-12345678/done.json", '{"stage": "analyze"}'),
    ],
)
def test_a_file_of_odd_content_is_named(file, text, run):
    (run / file).parent.mkdir(exist_ok=True)
    (run / file).write_text(text, encoding="latin-1")
    for words in ((), ("--watch",), ("--json",)):
        done = CliRunner().invoke(main, ["status", str(run), *words])
        assert (done.exit_code, len(done.stderr.splitlines())) == (2, 1), done.output
        assert done.stderr.startswith(f"error: {run / file} is damaged (")


def test_a_folder_that_is_no_run_is_told_as_one(tmp_path):
    done = CliRunner().invoke(main, ["status", str(tmp_path)])
    told = f"error: {tmp_path} is a folder, but no run folder (it has no run.json): give a job file or a run folder\n"
    assert (done.exit_code, done.stderr) == (2, told)


def events(folder: Path) -> list[Event]:
    """Every event of every file of the folder, in the order of writing; each record's checksums are checked."""
    found = []
    for file in sorted(folder.glob("events.out.tfevents.*"), key=lambda path: int(path.suffix[1:])):
        data = file.read_bytes()
        while data:
            length, end = int.from_bytes(data[:8], "little"), 12 + int.from_bytes(data[:8], "little")
            assert int.from_bytes(data[8:12], "little") == masked_crc32c(data[:8])
            assert int.from_bytes(data[end : end + 4], "little") == masked_crc32c(data[12:end])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[end + 4 :]
    return found


def test_curves_hold_every_reported_loss_and_a_resumed_unit_forgets_the_steps_that_it_makes_again(tmp_path):
    curves = EventFiles(tmp_path / "tensorboard")
    curves.update(Progress("analyze", "t0000-0500", 3, 10))
    assert list(tmp_path.iterdir()) == []
    for step, loss in ((5, 0.5), (10, 0.25), (10, 0.25), (15, 0.125)):
        curves.update(Progress("finetune", "macs-0.60 t0000-0500", step, 20, loss, 8.0))
    curves.update(Progress("finetune", "macs-0.60 t0000-0500", 10, 20, 0.25, None, 0.0, 10, "resumed"))
    curves.update(Progress("finetune", "macs-0.60 t0000-0500", 15, 20, 0.0625, 8.0, 1.0, 10))
    curves.close()
    written = events(tmp_path / "tensorboard" / "finetune" / "macs-0.60_t0000-0500")
    losses = [(e.step, v.simple_value) for e in written for v in e.summary.value if v.tag == "loss"]
    assert losses == [(5, 0.5), (10, 0.25), (15, 0.125), (10, 0.25), (15, 0.0625)]
    assert [e.step for e in written for v in e.summary.value if v.tag == "images_per_s"] == [5, 10, 15, 15]
    assert [e.step for e in written if e.HasField("session_log") and e.session_log.status == 1] == [0, 10]


def test_a_cluster_of_other_versions_is_told_in_one_line_with_both():
    from ray._private.utils import check_version_info

    from orchestrator.address import refusal

    with pytest.raises(RuntimeError) as refused:
        check_version_info({"ray_version": "2.9.3", "python_version": "3.8.18"}, "node 10.0.0.1")
    told = refusal(str(refused.value))
    assert told.startswith("the cluster runs Ray 2.9.3 on Python 3.8.18, this command Ray ")
    assert "use the cluster's versions, or `diffpruning submit`" in told
    assert "\n" not in told


def test_curves_that_cannot_be_written_say_nothing_not_even_at_the_end(tmp_path):
    """The disk is full for them: files of this process may not grow."""
    code = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from orchestrator.tensorboard import EventFiles\n"
        "from workers.contracts import Progress\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "curves = EventFiles(Path(sys.argv[1]))\n"
        "curves.update(Progress('finetune', 'a', 1, 9, 0.5))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1, 1))\n"
        "for step in range(2, 9): curves.update(Progress('finetune', 'a', step, 9, 0.5))\n"
        "curves.close()\n"
        "print('ended')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=120, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "ended\n", "")
