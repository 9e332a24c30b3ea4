"""Real Ray: trainers that run at the same time and queue, resume by name, kill -9 of the driver, Tune trials, refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

pytestmark = pytest.mark.ray

JOB = """
name: small
model: {path: MODEL}
data: {path: DATA, holdout: 16}
similarity: {measure: snr, timesteps: 8}
partition: {experts: 3}
specialize: {steps: 24, batch_size: 4, random_networks: 0, importance_images: 4, checkpoint_every: 5, ema_decay: 0.9}
router: {images: 8, era_steps: 2, era_batch: 2, trials: 4, influence_samples: 4, agents: [uniform, greedy, era]}
budgets: [{metric: macs, ratio: 0.6}]
sampler: {scheduler: ddim, steps: 8}
finetune: {steps: 4, batch_size: 4, checkpoint_every: 2, compare: []}
evaluate: {images: 8, samples: 4, timesteps: 2}
latency: {batch: 2}
resources: {device: cpu, local_cpus: 2}
"""


@pytest.fixture(scope="module")
def folder(emoji, emoji_images, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ray")
    (folder / "job.yaml").write_text(JOB.replace("MODEL", str(emoji)).replace("DATA", str(emoji_images)))
    return folder


def command(folder: Path, storage: str, *arguments: str) -> list[str]:
    paths = [f"storage.path={folder / storage}", f"registry.path={folder / storage}-registry"]
    sets = [word for path in paths for word in ("--set", path)]
    return [sys.executable, "-m", "orchestrator", "run", str(folder / "job.yaml"), *sets, *arguments]


def environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "OMP_NUM_THREADS")}


def diffpruning(folder: Path, storage: str, *arguments: str, timeout: float = 400) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(folder, storage, *arguments), capture_output=True, text=True, timeout=timeout, env=environment(), check=False
    )


@pytest.fixture(scope="module")
def finished(folder) -> tuple[Path, dict]:
    """The whole job, undisturbed."""
    done = diffpruning(folder, "calm", "--json")
    assert done.returncode == 0, done.stderr
    return folder / "calm" / "small", json.loads(done.stdout)


def experts_of(run: Path, stage: str) -> list[dict]:
    [record] = run.glob(f"{stage}-*/done.json")
    experts = json.loads(record.read_text())["result"]["experts"]
    listed = experts if isinstance(experts, list) else list(experts.values())
    return [{**expert, "path": str(run / expert["path"])} for expert in listed]


def test_trainers_run_at_the_same_time_and_the_third_waits_for_a_slot(finished):
    run, _ = finished
    spans = sorted((e["started"], e["ended"]) for e in experts_of(run, "specialize"))
    assert len(spans) == 3
    assert spans[1][0] < spans[0][1], "the first two did not overlap"
    assert spans[2][0] > min(spans[0][1], spans[1][1]), "the third did not wait, with two slots"


def test_the_job_leaves_one_verified_version_within_its_budget(finished, folder):
    _, found = finished
    version = found["published"]["macs-0.60"]
    assert version["reference"] == "small:1"
    manifest = json.loads((Path(version["path"]) / "manifest.json").read_text())
    plan = manifest["plan"]
    spent = sum(share * cost["macs"] for share, cost in zip(plan["shares"], plan["expert_costs"], strict=True))
    assert spent <= 0.6 * plan["dense_cost"]["macs"]


def test_every_agent_had_a_tune_trial(finished):
    run, _ = finished
    [record] = run.glob("route-*/done.json")
    trials = json.loads(record.read_text())["result"]["trials"]
    assert {trial["agent"] for trial in trials} == {"uniform", "greedy", "era"}


def snapshot(folder: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and p.name not in ("progress.json", ".lock")}


def test_the_same_command_again_is_quick_and_changes_nothing(finished, folder):
    run, first = finished
    before = snapshot(run)
    started = time.monotonic()
    again = diffpruning(folder, "calm", "--json")
    assert json.loads(again.stdout) == first
    assert again.stderr.count("already done") == 6
    assert snapshot(run) == before
    assert time.monotonic() - started < 60  # a hang, not a speed, is what this catches


def test_killing_the_driver_in_specialize_loses_nothing_but_the_last_steps(finished, folder):
    calm, _ = finished
    run = folder / "killed" / "small"
    process = subprocess.Popen(
        command(folder, "killed"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment(), start_new_session=True
    )
    deadline = time.monotonic() + 200
    while not list(run.glob("train/specialize-*/step_*")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "no checkpoint within 200 s"
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not list(run.glob("specialize-*/done.json"))

    again = diffpruning(folder, "killed", "--only", "specialize")
    assert again.returncode == 0, again.stderr
    assert "resumed" in again.stderr
    for one, two in zip(experts_of(calm, "specialize"), experts_of(run, "specialize"), strict=True):
        a, b = load_file(f"{one['path']}/state.safetensors"), load_file(f"{two['path']}/state.safetensors")
        assert all((a[name] == b[name]).all() for name in a), f"{one['interval']} differs after the kill"


def test_a_killed_sweep_goes_on_without_the_trials_that_ended_and_a_process_reads_the_experts_once(finished, folder):
    run, _ = finished
    words = command(folder, "calm", "--json", "--agents", "random_search", "--seeds", "0,1,2", "--set", "router.trials=20")
    words.insert(words.index("run"), "sweep")
    process = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment(), start_new_session=True
    )

    def ended() -> int:
        return len(list(run.glob("sweep-*/search/[!.]*.json")))

    deadline = time.monotonic() + 200
    while ended() < 2:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "no trial ended within 200 s"
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = ended()
    assert not list(run.glob("sweep-*/done.json"))

    again = subprocess.run(words, capture_output=True, text=True, timeout=400, env=environment(), check=False)
    assert again.returncode == 0, again.stderr
    trials = json.loads(again.stdout)["trials"]
    assert {(trial["agent"], trial["seed"]) for trial in trials} == {(agent, n) for agent in ("uniform", "random_search") for n in range(3)}
    begun = {line.split("  ")[1] for line in again.stderr.splitlines() if line.startswith("  sweep macs")}
    assert len(begun) <= len(trials) - before, "a trial that had ended ran again"
    assert {trial["loads"] for trial in trials} == {1}, "experts were read more than once by a process"
    assert len({trial["worker"] for trial in trials}) <= 4, "two processes in each of two Rays"


def test_a_job_that_can_never_fit_is_refused_before_anything_runs(folder):
    done = diffpruning(folder, "toobig", "--set", "resources.cpus_per_worker=64")
    assert done.returncode == 2
    assert "never fit a Ray on this machine" in done.stderr
    assert done.stderr.count("error:") == 1
    assert not list((folder / "toobig" / "small").glob("*/done.json"))


def test_a_ray_without_its_dashboard_is_refused_with_what_to_install(folder):
    _, _, module, *words = command(folder, "minimal")
    code = "import sys, runpy; sys.modules['aiohttp_cors'] = None; runpy.run_module(sys.argv.pop(1), run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code, module, *words], capture_output=True, text=True, timeout=200, env=environment(), check=False
    )
    assert done.returncode == 2
    assert done.stderr == "error: this Ray has no dashboard, which trainers need: pip install 'ray[default]'\n"
    assert not (folder / "minimal" / "small").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_with_130_and_a_line_and_no_process(folder, heard, number):
    storage = f"interrupted-{number}"
    process = subprocess.Popen(
        command(folder, storage), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment(), start_new_session=True
    )
    run = folder / storage / "small"
    deadline = time.monotonic() + 200
    while not list(run.glob("train/specialize-*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command continues" in err
    assert "Traceback" not in err
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive, f"still running: {alive}"


def test_other_budgets_search_together_what_is_new_and_nothing_else(finished, folder):
    """The last test of this file: from here on the run folder holds stages under two settings."""
    run, _ = finished
    kept = {path: at for path, at in snapshot(run).items() if path.parts[len(run.parts)] in ("train", "search")}
    done = diffpruning(folder, "calm", "--until", "route", "--set", "budgets=[{ratio: 0.6}, {ratio: 0.7}, {ratio: 0.8}]")
    assert done.returncode == 0, done.stderr
    assert "3 of the 9 plans were there from earlier searches" in done.stderr
    assert kept.items() <= snapshot(run).items()
    assert len(list(run.glob("search/front *.json"))) == 1
