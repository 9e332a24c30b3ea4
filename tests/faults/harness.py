"""What fault tests share: a tiny whole job, drivers in process groups of their own, clusters of several nodes, and the table at the end.

Every process that belongs to a test carries the test's mark in its environment, so that orphans are found without knowing their names.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image

from workers import families

ROOT = Path(__file__).parents[2]
MARK = "DIFFPRUNING_FAULT_TEST"
EVERY = {"specialize": 10, "finetune": 10}
"""Steps between checkpoints."""
FAIR = {"RAY_worker_niceness": "0"}
"""Ray's workers yield to everything else on the machine, which on a busy one is for ever."""
PATIENCE_S = 900.0
"""Ray on two busy cores may take minutes to start a trainer."""

JOB = f"""
name: small
model: {{path: FOLDER/model}}
data: {{path: FOLDER/images, holdout: 8}}
similarity: {{measure: gradient, timesteps: 12, images: 48, batch_size: 2, bootstrap: 5}}
partition: {{experts: [400]}}
specialize: {{steps: 80, batch_size: 4, random_networks: 1, importance_images: 4, checkpoint_every: {EVERY["specialize"]}, ema_decay: 0.9}}
router: {{agents: [uniform, random_search], images: 8, trials: 60}}
budgets: [{{ratio: 0.6}}]
sampler: {{steps: 8}}
finetune: {{steps: 80, batch_size: 4, checkpoint_every: {EVERY["finetune"]}, compare: []}}
evaluate: {{images: 8, samples: 16, timesteps: 4, batch_size: 2}}
export: {{rewrites: []}}
resources: {{device: cpu, local_cpus: 2, max_failures: 3}}
"""


def write_job(folder: Path) -> Path:
    """The job's file, beside its random model and images."""
    torch.manual_seed(0)
    DDPMPipeline(families.family("unet2d").tiny(), DDPMScheduler()).save_pretrained(folder / "model")  # type: ignore[attr-defined]
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(200):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / "images" / f"{i:03d}.png")
    (folder / "job.yaml").write_text(JOB.replace("FOLDER", str(folder)))
    return folder / "job.yaml"


# --- the table --------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One fault. ``lost``: training steps made again, None where there are none; ``identical``: the published version's bits."""

    fault: str
    moment: str
    lost: int | None
    recovered_s: float
    identical: bool | None = None


TABLE: list[Row] = []


def table() -> list[str]:
    lines = [f"{'fault':<44}{'moment':<42}{'steps lost':>11}{'seconds to recover':>20}{'identical':>11}"]
    for row in TABLE:
        lost = "-" if row.lost is None else str(row.lost)
        same = {True: "yes", False: "NO", None: "-"}[row.identical]
        lines.append(f"{row.fault:<44}{row.moment:<42}{lost:>11}{row.recovered_s:>20.1f}{same:>11}")
    return lines


# --- one command ------------------------------------------------------------------------------------------------------


class Driver:
    """One `diffpruning` process that leads its own process group, and what it and its run folder tell."""

    def __init__(self, words: list[str], run: Path, log: Path, mark: str, address: str | None):
        self.run, self.log = run, log
        environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", MARK)}
        environment |= {MARK: mark, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled", "PYTHONUNBUFFERED": "1"}
        environment |= FAIR | ({"RAY_ADDRESS": address} if address else {})
        self._words, self._environment = words, environment
        self._spawn()

    def _spawn(self) -> None:
        self.started = time.time()
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "orchestrator", *self._words],
                stdout=subprocess.DEVNULL,
                stderr=file,
                env=self._environment,
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job would ignore it
            )

    def ended(self) -> bool:
        """Ray gives a local node half a minute to start; where the machine is too busy for that, the same command is given again."""
        if self.process.poll() is None:
            return False
        if "error: no Ray could be started on this machine" not in self.said or time.time() - self.started > PATIENCE_S:
            return True
        self._spawn()
        return False

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def progress(self) -> dict[str, Any]:
        try:
            return json.loads((self.run / "progress.json").read_text())
        except (OSError, json.JSONDecodeError):
            return {}

    def units(self, stage: str) -> dict[str, dict[str, Any]]:
        """The units of a stage that this process tells of, if it is at work."""
        found = self.progress()
        fresh = found.get("stage") == stage and found.get("at", 0) > self.started
        return {unit["unit"]: unit for unit in found["units"]} if fresh else {}

    def until(self, holds: Callable[[], Any], what: str, patience_s: float = PATIENCE_S) -> Any:
        """What ``holds`` returns, once that is true; the process must not end before."""
        deadline = time.monotonic() + patience_s
        while not (found := holds()):
            assert not self.ended(), f"it ended before {what}: {self.said[-3000:]}"
            assert time.monotonic() < deadline, f"no {what} within {patience_s:.0f} s: {self.said[-3000:]}"
            time.sleep(0.1)
        return found

    def until_work(self, stage: str, part: float = 0.0, named: str = "") -> list[dict[str, Any]]:
        """The units of the stage that are under way, once one of them is beyond ``part`` of its steps."""

        def found() -> list[dict[str, Any]]:
            units = [unit for unit in self.units(stage).values() if unit["step"] < unit["steps"] and named in unit["unit"]]
            return units if any(unit["step"] >= part * unit["steps"] for unit in units) else []

        return self.until(found, f"unit at work in {stage}")

    def until_again_at(self, stage: str, units: list[dict[str, Any]]) -> None:
        """All these trainers are as far as they were, in another attempt; tasks have ended; or the stage is over."""
        anew: set[str] = set()

        def there() -> bool:
            now = self.units(stage)
            for unit in units:
                found = now.get(unit["unit"], unit)
                if found["first_step"] != unit["first_step"] or found["seconds"] < unit["seconds"]:
                    anew.add(unit["unit"])
            if stage in EVERY:
                again = all(unit["unit"] in anew and now.get(unit["unit"], {}).get("step", 0) >= unit["step"] for unit in units)
            else:
                again = all(now.get(unit["unit"], {}).get("step", -1) == unit["steps"] for unit in units)
            return again or f"\n{stage:<11}finished" in self.said

        self.until(there, f"recovery of {stage}")

    def workers(self, pattern: str, roots: list[int] | None = None) -> list[psutil.Process]:
        """Ray's processes below this one (or below ``roots``) whose title matches, oldest first."""
        found = []
        for root in roots or [self.process.pid]:
            with contextlib.suppress(psutil.NoSuchProcess):
                for process in psutil.Process(root).children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess, IndexError):
                        if re.match(pattern, process.cmdline()[0]):
                            found.append(process)
        return sorted(found, key=lambda process: process.create_time())

    def kill(self, number: int = signal.SIGKILL) -> int:
        """Only this process, not its group; returns its exit code."""
        self.process.send_signal(number)
        return self.process.wait(timeout=120)

    def wait(self) -> int:
        deadline = time.monotonic() + 2 * PATIENCE_S
        while not self.ended():
            assert time.monotonic() < deadline, self.said[-3000:]
            time.sleep(0.1)
        return self.process.returncode


@dataclass
class Job:
    """A job under its own storage and registry; the same command again and again."""

    file: Path
    folder: Path
    address: str | None = None
    settings: tuple[str, ...] = ()
    logs: Path | None = None
    """Where the drivers' lines go; default: beside the folder."""
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    drivers: list[Driver] = field(default_factory=list)

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "small"

    def start(self, *more: str) -> Driver:
        sets = [f"storage.path={self.folder / 'runs'}", f"registry.path={self.folder / 'registry'}", *self.settings]
        words = ["run", str(self.file), *(word for pair in sets for word in ("--set", pair)), *more]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.drivers.append(
            Driver(
                words, self.run, (self.logs or self.folder.parent) / f"{self.folder.name}-{len(self.drivers)}.log", self.mark, self.address
            )
        )
        return self.drivers[-1]

    def finish(self, *more: str) -> Driver:
        driver = self.start(*more)
        assert driver.wait() == 0, driver.said[-4000:]
        return driver

    def newest_step(self, stage: str, unit: str) -> int:
        """The newest checkpoint of a unit's trainer; 0 without one."""
        interval = unit.split()[-1]
        found = self.run.glob(f"train/{stage}-*{interval}-????????/step_*/checkpoint.json")
        return max((int(path.parent.name.removeprefix("step_")) for path in found), default=0)

    def trainer_of(self, stage: str, unit: str) -> Path:
        [folder] = self.run.glob(f"train/{stage}-*{unit.split()[-1]}-????????")
        return folder

    def lost(self, stage: str, units: list[dict[str, Any]]) -> int | None:
        """How many steps the trainers of these units make again if they die now; None for work that has no steps to lose."""
        if stage not in EVERY:
            return None
        return max(max(0, unit["step"] - self.newest_step(stage, unit["unit"])) for unit in units)

    def attempts(self, stage: str, unit: str) -> list[tuple[int, float]]:
        """From which step, and when, each attempt began that came to a checkpoint."""
        newest = self.trainer_of(stage, unit) / f"step_{self.newest_step(stage, unit):07d}" / "checkpoint.json"
        return json.loads(newest.read_text())["attempts"]

    # --- what must hold at the end ---

    def published(self) -> dict[str, Any]:
        """Everything that is published and does not measure time: the bits of all files, and the manifest."""
        versions = sorted(path.name for path in (self.folder / "registry" / "small").iterdir() if path.name.isdecimal())
        assert versions == ["1"], f"versions {versions}"
        folder = self.folder / "registry" / "small" / "1"
        files = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
        del files["SHA256SUMS"]
        return {**files, "manifest.json": _timeless(json.loads(files["manifest.json"]))}

    def assert_clean(self) -> None:
        """No orphan within a minute, no half-written file."""
        deadline = time.monotonic() + 60
        while left := marked(self.mark):
            assert time.monotonic() < deadline, f"still running: {left}"
            time.sleep(0.5)
        files = [path for place in ("runs", "registry") for path in (self.folder / place).rglob("*")]
        known = (".lock", ".validate_storage_marker", ".blobs")
        assert not [path for path in files if ".tmp" in path.name or (path.name.startswith(".") and path.name not in known)]
        assert not list(self.run.glob("train/*/*.txt"))
        assert not [*self.run.glob("*/search/tune"), *self.run.glob("search/tune")]
        assert not list(self.run.rglob("*.pkl"))


TIMES = re.compile(r"(search_seconds|.*ms_per_.*|images_per_s|relative_time|trainer_seconds|drawn_at_once|fingerprint)")


def _timeless(value: Any) -> Any:
    """Without what is measured in seconds, or tells how, and without the fingerprint, which holds the registry's place."""
    if isinstance(value, dict):
        return {name: _timeless(part) for name, part in value.items() if not TIMES.fullmatch(name)}
    return [_timeless(part) for part in value] if isinstance(value, list) else value


def marked_pids(mark: str) -> list[int]:
    """Living processes whose environment holds the mark."""
    found, wanted = [], f"{MARK}={mark}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted in (folder / "environ").read_bytes().split(b"\0") and "State:\tZ" not in (folder / "status").read_text():
                found.append(int(folder.name))
    return found


def marked(mark: str) -> list[str]:
    """Titles of living processes whose environment holds the mark."""
    found = []
    for pid in marked_pids(mark):
        with contextlib.suppress(OSError):
            found.append(Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:120])
    return found


@contextlib.contextmanager
def judged(job: Job, reference: dict[str, Any]) -> Iterator[list[Row]]:
    """Rows that are put into it belong to one job, whose version is compared with the undisturbed one at the end."""
    rows: list[Row] = []
    try:
        yield rows
        same = job.published() == reference
        for row in rows:
            row.identical = same
    finally:
        for driver in job.drivers:
            if driver.process.poll() is None:
                driver.kill()
        TABLE.extend(rows)
    assert same, "the published version differs from the undisturbed one"
    job.assert_clean()


def moment(stage: str, units: list[dict[str, Any]]) -> str:
    return (stage + " " + ", ".join(f"{unit['unit'].split()[-1]} {unit['step']}/{unit['steps']}" for unit in units))[:40]


def of_process(worker: psutil.Process, units: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The unit that a train worker works at: Ray runs it in a folder of its trainer's name. All units, if there is no telling."""
    with contextlib.suppress(psutil.Error, OSError):
        mine = [unit for unit in units if unit["unit"].split()[-1] in worker.cwd()]
        return mine or units
    return units


# --- a cluster of several nodes ---------------------------------------------------------------------------------------


class Nodes:
    """A head that only drives, and nodes with one emulated GPU each, all on this machine."""

    def __init__(self, mark: str, count: int):
        from ray.cluster_utils import Cluster

        os.environ.update(FAIR | {MARK: mark, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)})
        head = {"num_cpus": 0, "include_dashboard": True, "dashboard_host": "127.0.0.1", "object_store_memory": 100 * 2**20}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.nodes = [self.add() for _ in range(count)]

    @property
    def address(self) -> str:
        return self.cluster.address

    def add(self, **resources: float) -> Any:
        return self.cluster.add_node(num_cpus=1, resources={"slot": 1, **resources}, object_store_memory=100 * 2**20)

    @staticmethod
    def raylet(node: Any) -> int:
        [raylet] = node.all_processes["raylet"]
        return raylet.process.pid

    def lose(self, node: Any) -> None:
        """kill -9 of the raylet, as when a machine goes away; a new node takes its place."""
        os.kill(self.raylet(node), signal.SIGKILL)
        self.nodes.remove(node)
        self.nodes.append(self.add())

    def close(self) -> None:
        self.cluster.shutdown()
        os.environ.pop(MARK, None)
