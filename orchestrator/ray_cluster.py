"""The Ray seam on the driver's side: scatter as tasks, one TorchTrainer per expert, Tune for the search. Ray owns the processes."""

from __future__ import annotations

import concurrent.futures as futures
import contextlib
import io
import itertools
import json
import logging
import os
import secrets
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

# Read by Ray at import. One poll of a trainer's controller costs its reports up to this long; the default is 2 s.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_DASHBOARD_STARTUP_TIMEOUT_S", "300")  # a busy laptop takes more than the default of 60

import ray
from ray import train, tune
from ray._raylet import Config  # type: ignore[attr-defined]  # compiled
from ray.train.torch import TorchConfig, TorchTrainer
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.address import refusal, require_reachable
from orchestrator.cluster import Need, Task, TrialLog, cpus_here, raise_failures, task_name
from orchestrator.ray_jobs import TrainState
from orchestrator.scheduling import Call
from workers import session
from workers.contracts import ExpertCheckpoint, InputError, Progress, RunFailed
from workers.files import remove
from workers.mirror import Mirror, works
from workers.nodes import this_node
from workers.trials import SearchTrial

ATTEMPTS = 2
"""Tries of one trainer: FailureConfig covers its workers, not the death of its controller."""
TRAINERS_EVERY_S = 5.0
STATE_TRACKING = "RAY_TRAIN_ENABLE_STATE_TRACKING"
NODES_TIMEOUT_S = 120.0
QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}

_TOKEN = secrets.token_hex(32)
"""Of the Ray that this process starts; one for all of them, for Ray's core reads it once."""


class RayCluster:
    """A local Ray that this process starts and ends, or the cluster that RAY_ADDRESS names."""

    def __init__(
        self,
        *,
        device: str,
        cpus: float,
        gpus: float,
        workers_per_expert: int,
        custom: Mapping[str, float],
        local_cpus: int | None,
        autoscale_to: int | None,
        timeout_s: float,
        hang_timeout_s: float,
        max_failures: int,
        on_progress: Callable[[Progress], None],
        on_trainers: Callable[[list[dict[str, Any]]], None],
        folder: Path,
        mirror: Mirror | None = None,
    ):
        """``folder``: the run's; ``mirror``: what it is, of a run on an object store.

        Raises: InputError if no node could ever hold one worker, or one does not see the storage."""
        self._log = (folder / "ray.log").open("a")
        self._marker: Path | None = None
        self._mirror = mirror
        # after an interrupt threads still wait in Ray: were it shut down, its core would end this process with 1; it ends with us
        self._left = False
        self.max_failures, self.autoscale_to, self.hang_timeout_s = max_failures, autoscale_to or 0, hang_timeout_s
        self.calls: list[Call] = []
        os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(timeout_s)
        # a worker whose Python stands still cannot end itself
        os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(hang_timeout_s)
        for handler in logging.getLogger("ray").handlers:  # they hold the stderr of their beginning
            if isinstance(handler, logging.StreamHandler):
                handler.setStream(_Log(self._log, sys.stderr))
        self._own = not ray.is_initialized()
        on_term = signal.getsignal(signal.SIGTERM)
        try:
            with self._quiet():
                self._connect(local_cpus)
        finally:
            signal.signal(signal.SIGTERM, on_term)  # Ray's core puts its own in place, which aborts
        try:
            self.need = _need(device, cpus, gpus, workers_per_expert, custom, self.autoscale_to)
            self._mark(folder)
            self._watch(on_progress, on_trainers, folder.name)
        except BaseException:
            self._disconnect()
            raise

    def _connect(self, local_cpus: int | None) -> None:
        if not self._own:
            return
        if address := os.environ.get("RAY_ADDRESS"):
            os.environ.setdefault(STATE_TRACKING, "1")  # one actor of 0.4 GB for the whole cluster; too much for a laptop
            self._dashboard = _join(address)
            return
        # its ports are open to the whole network, and who may speak to one may run code; known to this process and what it starts alone
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": _TOKEN}
        Config.initialize("")  # Ray has read the mode when it was imported; this is how it changes it itself
        # The dashboard is needed even when nobody looks: the trainers' clean-up asks its State API.
        try:
            self._dashboard = ray.init(
                address="local",
                num_cpus=cpus_here(local_cpus),
                include_dashboard=True,
                dashboard_host="127.0.0.1",
                object_store_memory=256 * 2**20,
                **QUIET,
            ).dashboard_url
        except Exception as error:  # Ray has no type of its own for it
            if "missing packages" in str(error):
                raise InputError("this Ray has no dashboard, which trainers need: pip install 'ray[default]'") from error
            raise RunFailed(
                f"no Ray could be started on this machine: {' '.join(str(error).split())[:200]} "
                "Is it very busy? The same command again tries anew, and RAY_ADDRESS names a cluster to use instead"
            ) from error

    def _mark(self, folder: Path) -> None:
        """On a cluster: every node must see the run folder, by a file just made there, and run the code of this process.

        The file stays while we work, for nodes that come later. Raises: InputError that names the nodes."""
        for left in folder.glob(".storage-marker-*"):  # the folder is locked: whoever made it is gone
            left.unlink(missing_ok=True)
        if not os.environ.get("RAY_ADDRESS"):
            return
        if self._mirror is not None:
            _check_nodes(folder / "run.json", self._mirror)
            return
        self._marker = folder / f".storage-marker-{uuid.uuid4().hex}"
        self._marker.touch()
        _check_nodes(self._marker)

    @property
    def _seen(self) -> str:
        """What a worker must see before it works; nothing on this machine's own Ray."""
        return str(self._marker or "")

    def _gather(self) -> None:
        """Bring here what workers have left on an object store; everything that they leave is here otherwise."""
        if self._mirror is not None:
            self._mirror.pull(works)

    def _watch(self, on_progress: Callable[[Progress], None], on_trainers: Callable[[list[dict[str, Any]]], None], run: str) -> None:
        actor = ray.remote(num_cpus=0)(session.ProgressMailbox)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)  # other nodes may be lost
        self._mailbox = actor.options(
            name=session.PROGRESS_ACTOR, get_if_exists=True, lifetime=None, enable_task_events=False, scheduling_strategy=here
        ).remote(run)
        self._stop = threading.Event()
        tracked = os.environ.get(STATE_TRACKING) == "1"
        state = TrainState(self._dashboard if tracked else None, ray.get_runtime_context().get_job_id())

        def watch_trainers() -> None:
            while not self._stop.wait(TRAINERS_EVERY_S):
                if (found := state.read()) is not None:
                    on_trainers(found)

        threading.Thread(target=watch_trainers, daemon=True).start()

        def poll() -> None:
            while not self._stop.wait(0.5):
                with contextlib.suppress(ray.exceptions.RayError):
                    for event in ray.get(self._mailbox.drain.remote(), timeout=10):
                        on_progress(Progress.from_json(event))

        self._poller = threading.Thread(target=poll, daemon=True)
        self._poller.start()

    @contextlib.contextmanager
    def _quiet(self) -> Iterator[None]:
        """Ray's own lines go to the run's log: stdout stays ours."""
        out, err = sys.stdout, sys.stderr
        with contextlib.redirect_stdout(_Log(self._log, out)), contextlib.redirect_stderr(_Log(self._log, err)):
            yield

    def slots(self) -> int:
        """How many workers fit on the nodes that are there, or on those that an autoscaler brings once it sees workers wait."""
        return max(self.autoscale_to, sum(self.need.fits(node["Resources"]) for node in ray.nodes() if node["Alive"]))

    def scatter(self, task: Task, items: Sequence[Any]) -> list[Any]:
        started, slots = time.time(), self.slots()
        remote = ray.remote(
            num_cpus=self.need.cpus, num_gpus=self.need.gpus, resources=dict(self.need.custom), max_retries=self.max_failures
        )(session.run_task)
        named = remote.options(name=task_name(task))
        running = [named.remote(task, self.need.device, item, self._seen, self._mirror) for item in items]
        try:
            made = ray.get(running)
        except ray.exceptions.RayError as error:
            for reference in running:
                ray.cancel(reference)
            if isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, Exception):
                # the worker's own exception: Ray's double of it says a whole traceback where the user needs one line, and no errno
                raise error.cause from None
            raise RunFailed(f"a worker was lost: {' '.join(str(error).split())[:300]}; the same command again continues") from error
        self._gather()
        self.calls.append(Call.of(task_name(task), slots, time.time() - started, [seconds for _, seconds in made]))
        return [result for result, _ in made]

    def fit_all(
        self, task: Task, jobs: Mapping[str, Any], storage: Path, on_done: Callable[[str, ExpertCheckpoint], None]
    ) -> dict[str, ExpertCheckpoint]:
        done: dict[str, ExpertCheckpoint] = {}
        failed: dict[str, BaseException] = {}
        started, parallel = time.time(), max(1, self.slots() // self.need.workers_per_expert)
        pool = futures.ThreadPoolExecutor(parallel, thread_name_prefix="fit")
        try:
            with self._quiet():
                running = {pool.submit(self._fit, task, name, item, storage): name for name, item in jobs.items()}
                for future in futures.as_completed(running):
                    name = running[future]
                    try:
                        done[name] = future.result()
                        on_done(name, done[name])
                        for trace in (storage / name).glob("*.txt"):  # of attempts that failed
                            remove(trace)
                    except Exception as error:  # the others still run; all failures are told together
                        self._gather()
                        failed[name] = _cause(error, storage / name)
        except KeyboardInterrupt:
            self._left = True
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        work = [done[name].ended - done[name].started for name in jobs if name in done]
        self.calls.append(Call.of(task_name(task), parallel, time.time() - started, work, each=True))
        raise_failures(failed, len(jobs), storage)
        self._gather()
        return {name: done[name] for name in jobs}

    def _fit(self, task: Task, name: str, item: Any, storage: Path) -> ExpertCheckpoint:
        """One TorchTrainer. Ray starts its workers again when one is lost; they go on from the checkpoints of the same name."""
        need = self.need
        config = {"task": task, "item": item, "device": need.device, "folder": str(storage / name)}
        config |= {"hang_timeout_s": self.hang_timeout_s, "marker": self._seen, "mirror": self._mirror}
        for attempt in range(ATTEMPTS):
            trainer = TorchTrainer(
                session.run_train_worker,
                train_loop_config=config,
                torch_config=TorchConfig(backend="nccl" if need.device == "cuda" else "gloo"),
                scaling_config=train.ScalingConfig(
                    num_workers=need.workers_per_expert, use_gpu=need.device == "cuda", resources_per_worker=need.resources()
                ),
                run_config=train.RunConfig(
                    name=name,
                    storage_path=str(storage),
                    # a group that cannot start would be tried for ever
                    failure_config=train.FailureConfig(max_failures=self.max_failures, controller_failure_limit=self.max_failures),
                    logging_config=train.LoggingConfig(log_level="ERROR"),
                ),
            )
            try:
                found = trainer.fit().return_value
                if "failed" in found:
                    raise session.raised(found["failed"])
                return ExpertCheckpoint.from_json(found["expert"])
            except ray.exceptions.RayActorError:
                if attempt + 1 == ATTEMPTS or not ray.is_initialized():
                    raise
        raise AssertionError("unreachable")

    def search(
        self, task: Task, axes: Mapping[str, Sequence[Any]], items: Mapping[str, Any], storage: Path, stop_early: bool = False
    ) -> dict[str, SearchTrial]:
        log, started, slots = TrialLog(storage), time.time(), max(1, self.slots())
        found = log.read(items)
        points = {"/".join(map(str, values)): dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())}
        missing = {key: points[key] for key in items if key not in found}
        if missing:
            with self._quiet():
                errors = self._tune(task, missing, items, log, slots, stop_early)
            if errors:
                raise RunFailed(
                    f"{len(errors)} of {len(items)} search trials failed: {' '.join(str(errors[0]).split())[-400:]}; "
                    "the same command again runs them"
                )
            found = log.read(items)
        self.calls.append(Call.of(task_name(task), slots, time.time() - started, [found[key].seconds for key in missing]))
        for plan in (trial.plan for trial in found.values()):  # those of trials that ended before a restart too
            if plan is not None:
                self._mailbox.planned.remote(plan.to_json())
        return {key: found[key] for key in items}

    def _tune(
        self, task: Task, missing: Mapping[str, dict[str, Any]], items: Mapping[str, Any], log: TrialLog, slots: int, stop_early: bool
    ) -> list[Exception]:
        """Run trials, each of which is written to the log when it ends; returns the errors of those that failed.

        Tune's own records are on this machine alone and not kept: they hold pickles, which have no place on a storage that others can write
        to, and a kill while one is written leaves a search that cannot be restored.
        """
        trainable = tune.with_resources(
            tune.with_parameters(
                session.run_trial,
                task=task,
                items={key: items[key] for key in missing},
                device=self.need.device,
                marker=self._seen,
                mirror=self._mirror,
            ),
            self.need.resources(),
        )
        with tempfile.TemporaryDirectory(prefix="diffpruning-tune-", ignore_cleanup_errors=True) as folder:
            grid = tune.Tuner(
                trainable,
                param_space={"trial": tune.grid_search(list(missing))},
                tune_config=tune.TuneConfig(
                    reuse_actors=True, max_concurrent_trials=slots, scheduler=_HalvingPerProblem(missing) if stop_early else None
                ),
                run_config=tune.RunConfig(
                    name="search",
                    storage_path=folder,
                    verbose=0,
                    failure_config=tune.FailureConfig(max_failures=self.max_failures),
                    callbacks=[_Recorder(log)],
                ),
            ).fit()
        return list(grid.errors)

    def close(self) -> None:
        self._stop.set()
        self._poller.join(timeout=2)
        self._disconnect()

    def _disconnect(self) -> None:
        if self._marker is not None:
            self._marker.unlink(missing_ok=True)
        if self._own and not self._left:
            with self._quiet():
                ray.shutdown()
        self._log.close()


def _join(address: str) -> str | None:
    """Connect to the cluster that RAY_ADDRESS names; its dashboard. Raises: InputError if it does not answer, or does not take us."""
    require_reachable(address)
    try:
        return ray.init(**QUIET).dashboard_url
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        raise InputError(f"RAY_ADDRESS {address}: {refusal(str(error))}") from error


def _need(device: str, cpus: float, gpus: float, workers: int, custom: Any, autoscale_to: int) -> Need:
    """What a worker needs of the Ray that this process is connected to. Raises: InputError if one expert's workers never fit there."""
    if device == "auto" and autoscale_to:
        raise InputError("resources.device is auto, but nodes of resources.autoscale_to are still to come: set it to cuda or cpu")
    if device == "auto":
        device = "cuda" if ray.cluster_resources().get("GPU", 0) >= 1 else "cpu"
    need = Need(device, cpus, gpus if device == "cuda" else 0, workers, custom)
    if autoscale_to < workers:
        need.check([node["Resources"] for node in ray.nodes() if node["Alive"]], "this cluster")
    return need


def ask(job: Any, address: str) -> None:
    """Ask the cluster that RAY_ADDRESS names, and leave it again. Raises: InputError if it does not let us in, or nothing fits."""
    if ray.is_initialized():
        return
    asked, said = job.resources, io.StringIO()  # there is no run folder yet that could take Ray's own lines
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            _join(address)
            workers = (asked.cpus_per_worker, asked.gpus_per_worker, asked.workers_per_expert, asked.custom)
            job.timing().check(_need(asked.device, *workers, asked.autoscale_to or 0).device)
        finally:
            ray.shutdown()


class _Recorder(tune.Callback):
    """Writes down every trial that ended or was stopped."""

    def __init__(self, log: TrialLog):
        self._log = log

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._log.write(trial.last_result["trial"], SearchTrial.from_json(json.loads(trial.last_result["outcome"])))


def _check_nodes(marker: Path, mirror: Mirror | None = None) -> None:
    """Raises: InputError that names the nodes that do not see the file, or the object store, or run other code than this process."""
    remote = ray.remote(num_cpus=0, max_retries=0)(this_node)
    asked = {}
    for node in ray.nodes():
        if node["Alive"]:
            where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            name = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
            asked[remote.options(name="check node", scheduling_strategy=where).remote(str(marker), mirror)] = name
    ready, silent = ray.wait(list(asked), num_returns=len(asked), timeout=NODES_TIMEOUT_S)
    blind, other, broken = [], [], [f"{asked[ref]}: no answer for {NODES_TIMEOUT_S:g} s" for ref in silent]
    mine = this_node(str(marker), mirror)
    for ref in ready:
        try:
            found = ray.get(ref)
        except ray.exceptions.RayTaskError as error:
            broken.append(f"{asked[ref]}: {' '.join(str(error.cause or error).split())[-200:]}")
            continue
        except ray.exceptions.RayError:  # it has just gone
            continue
        blind += [asked[ref] + (f" ({found.why[:300]})" if found.why else "")] * (not found.sees)
        told = [f"{name} {found.versions.get(name, 'none')} instead of {wanted}" for name, wanted in mine.versions.items()]
        odd = [text for text, name in zip(told, mine.versions, strict=True) if found.versions.get(name) != mine.versions[name]]
        odd += ["another version of diffpruning"] * (found.code != mine.code)
        other += [f"{asked[ref]} has {', '.join(odd)}"] * bool(odd)
    if blind and mirror is not None:
        raise InputError(
            f"storage.path: {mirror.uri} cannot be used by {', '.join(blind)}: every node needs to reach it, "
            f"{mirror.store.kind.LIBRARY}, and credentials"
        )
    if blind:
        raise InputError(
            f"storage.path: {marker.parent} is not seen by {', '.join(blind)}: every node must mount the shared storage at this path"
        )
    if other or broken:
        raise InputError(
            f"the cluster's nodes are not alike: {'; '.join(other + broken)}: install the same versions (constraints.txt) on every node, "
            "or let the code travel with `diffpruning submit`"
        )


class _HalvingPerProblem(FIFOScheduler):
    """Asynchronous successive halving (ASHA) among the trials of one problem: at 20, 40 and 80% of its search a trial whose best plan is
    worse than the median of those that came as far is stopped. Never across problems: how much an agent gains over the uniform plan depends
    on the budget, so a generous one would lose all its trials to a tight one."""

    def __init__(self, points: Mapping[str, dict[str, Any]]) -> None:
        """``points``: the combination of axes behind the name of every trial."""
        super().__init__()
        self._points = points
        self._halvings: dict[tuple[Any, ...], ASHAScheduler] = {}

    def _of(self, trial: Any) -> ASHAScheduler:
        point = self._points[trial.config["trial"]]
        problem = tuple(value for axis, value in sorted(point.items()) if axis not in ("agent", "seed"))
        if problem not in self._halvings:
            self._halvings[problem] = ASHAScheduler("percent", "relative_loss", "min", max_t=100, grace_period=20, reduction_factor=2)
        return self._halvings[problem]

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self._of(trial).on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        return self._of(trial).on_trial_result(tune_controller, trial, result)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        self._of(trial).on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        self._of(trial).on_trial_remove(tune_controller, trial)


class _Log:
    """A text stream into the log file that still looks like the stream it stands for."""

    def __init__(self, log: TextIO, original: TextIO):
        self._log, self._original = log, original

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):  # a full disk, or a line after the end: no reason to stop the run
            self._log.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._log.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


def _cause(error: BaseException, folder: Path) -> BaseException:
    """What went wrong in the worker, without Ray's wrapping; a hang tells more than the death that ended it."""
    failures = getattr(error, "worker_failures", None)
    cause = next(iter(failures.values())) if failures else error
    hung = sorted(path for path in folder.glob("hang-rank*.txt") if path.stat().st_size)
    return RunFailed(hung[0].read_text(errors="replace").splitlines()[0]) if hung else cause
