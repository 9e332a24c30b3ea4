"""The third Ray seam, spoken over HTTP: submit, follow, list and stop jobs from outside the cluster; and what Ray Train says of its runs.

Tokens are Ray's business: its client reads them (RAY_AUTH_MODE, RAY_AUTH_TOKEN_PATH), and nothing here sees, prints or keeps one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import requests

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from ray.dashboard.modules.dashboard_sdk import SubmissionClient
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from workers.contracts import InputError, RunFailed

for chatty in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk", "ray._private.runtime_env.packaging"):
    logging.getLogger(chatty).setLevel(logging.ERROR)

STOP_WAIT_S = 30
"""What a stopped driver gets to write its last lines; Ray's own default is 3 s."""
RETRY_EVERY_S = 2.0
RETRIES = 30
"""A follower waits a minute for a dashboard that went away, e.g. with its port-forward."""


@dataclass(frozen=True)
class Job:
    """One submitted job, as the cluster tells of it."""

    id: str
    status: str
    """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
    exit_code: int | None
    started: float | None
    ended: float | None
    run_folder: str | None
    entrypoint: str
    message: str
    """Ray's own; of a driver that failed, its log says more."""

    @classmethod
    def of(cls, details: JobDetails) -> Job:
        status = JobStatus(details.status)
        code = {JobStatus.SUCCEEDED: 0, JobStatus.STOPPED: 130}.get(status, details.driver_exit_code)
        if status == JobStatus.FAILED and (code is None or code < 0):  # it never started, or a signal ended it
            code = 1
        started, ended = (None if t is None else t / 1000 for t in (details.start_time, details.end_time))
        metadata = details.metadata or {}
        return cls(
            str(details.submission_id),
            status.value,
            code,
            started,
            ended,
            metadata.get("run_folder"),
            details.entrypoint,
            "" if status == JobStatus.FAILED and details.driver_exit_code is not None else details.message or "",
        )

    @property
    def over(self) -> bool:
        return JobStatus(self.status).is_terminal()


class Jobs:
    """The jobs of one cluster."""

    def __init__(self, address: str):
        """``address``: of the dashboard, http://HOST:8265. Raises: InputError if no Ray answers there, or it does not let us in."""
        self.address = address.rstrip("/")
        _require_dashboard(self.address)
        os.environ["RAY_API_SERVER_ADDRESS"] = self.address  # Ray would prefer RAY_ADDRESS to the address that it is given
        with self._told():
            self._client = JobSubmissionClient(self.address)

    def submit(self, name: str, entrypoint: str, folder: Path, metadata: dict[str, str]) -> str:
        """Upload ``folder`` and start ``entrypoint`` in its copy; the id is ``name`` and the first free number."""
        number = 1 + max(
            (int(job.id.rpartition("-")[2]) for job in self.all() if re.fullmatch(rf"{re.escape(name)}-\d+", job.id)), default=0
        )
        environment = {"working_dir": str(folder), "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}}
        while True:
            taken = f"{name}-{number}"
            try:
                with self._told():
                    return self._client.submit_job(
                        entrypoint=entrypoint,
                        submission_id=taken,
                        runtime_env=environment,
                        metadata={**metadata, "job_name": name, "job_submission_id": taken},
                    )
            except InputError as error:
                if "already exists" not in str(error):  # two people at once
                    raise
                number += 1

    def all(self) -> list[Job]:
        """Submitted jobs, oldest first; drivers that joined the cluster without being submitted have no id and are left out."""
        with self._told():
            found = [Job.of(details) for details in self._client.list_jobs() if details.submission_id]
        return sorted(found, key=lambda job: job.started or 0.0)

    def get(self, id: str) -> Job:
        with self._told(id):
            return Job.of(self._client.get_job_info(id))

    def logs(self, id: str) -> str:
        with self._told(id):
            return self._client.get_job_logs(id)

    def stop(self, id: str) -> Job:
        """Ask it to stop and wait until it has; a driver that is asked ends with what the next one needs."""
        job = self.get(id)
        if not job.over:
            with self._told(id):
                self._client.stop_job(id)
        deadline = time.monotonic() + STOP_WAIT_S + 15
        while not (job := self.get(id)).over:
            if time.monotonic() > deadline:
                raise RunFailed(f"job {id} was told to stop, but is {job.status} after {STOP_WAIT_S + 15} s: see `diffpruning jobs list`")
            time.sleep(0.3)
        return job

    def follow(self, id: str, write: Callable[[str], None]) -> Job:
        """Hand on what the job prints until it is over, through a lost connection too.

        Raises: RunFailed if the cluster is gone for a minute; the job may still be running.
        """
        written, failures = 0, 0

        async def tail() -> None:
            """Ray tells a log from its beginning, so what was written before is passed over."""
            nonlocal written
            seen = 0
            async for text in self._client.tail_job_logs(id):
                new, seen = text[max(0, written - seen) :], seen + len(text)
                written = max(written, seen)
                write(new)

        self.get(id)  # an unknown one is told at once
        while True:
            try:
                asyncio.run(tail())
                if (job := self.get(id)).over:
                    return job
                failures = 0
            except BrokenPipeError:  # whoever reads us has gone, not the cluster
                raise
            except (RuntimeError, aiohttp.ClientError, OSError, InputError) as error:
                failures += 1
                if failures > RETRIES:
                    raise RunFailed(
                        f"the connection to {self.address} is lost ({_line(error)}); the job may still be running: "
                        f"`diffpruning jobs logs {id} --follow`"
                    ) from None
                time.sleep(RETRY_EVERY_S)

    @contextlib.contextmanager
    def _told(self, id: str = "") -> Iterator[None]:
        """Ray's errors as one line that says what to do."""
        try:
            yield
        except AuthenticationError as error:
            raise InputError(f"{self.address} {_token_hint(str(error))}") from None
        except (requests.RequestException, ConnectionError, aiohttp.ClientError) as error:
            raise InputError(f"nothing that is a Ray dashboard answers at {self.address}: {_line(error)}") from None
        except (RuntimeError, ValueError) as error:
            if id and "does not exist" in str(error):
                raise InputError(f"no job {id} on {self.address}: `diffpruning jobs list` shows those there are") from None
            raise InputError(f"{self.address}: {_line(error)}") from None


class TrainState:
    """What Ray Train's state endpoint says of the trainers of one driver; the open-source dashboard has no page for it."""

    def __init__(self, dashboard: str | None, job_id: str):
        """``dashboard``: HOST:PORT, or None for a Ray without one."""
        self._client = SubmissionClient(f"http://{dashboard}") if dashboard else None
        self._job_id = job_id

    def read(self) -> list[dict[str, Any]] | None:
        """Newest first; None if there is nothing to be had."""
        if self._client is None:
            return None
        try:
            response = self._client._do_request("GET", "/api/train/v2/runs/v1", timeout=10)
            runs = response.json()["train_runs"] if response.status_code == 200 else []
        except (requests.RequestException, AuthenticationError, ValueError, KeyError):  # a view, not worth a crash
            return None
        return [_trainer(run) for run in runs if run["job_id"] == self._job_id]


def _trainer(run: dict[str, Any]) -> dict[str, Any]:
    last = run["attempts"][-1] if run["attempts"] else {"workers": []}
    kept = ("world_rank", "node_ip", "pid", "gpu_ids", "log_file_path")
    return {
        "name": run["name"],
        "status": run["status"],
        "detail": " ".join((run.get("status_detail") or "").split())[-300:],
        "attempts": len(run["attempts"]),
        "workers": [{key: worker[key] for key in kept} for worker in last["workers"]],
    }


def _require_dashboard(address: str) -> None:
    """Raises: InputError for what is no address, and within seconds where nobody listens; Ray itself sets no limit of time."""
    if "@" in address:  # not repeated: it would be read on the screen and in logs
        raise InputError(
            "--address holds a user name or a password: give http://HOST:8265 alone; a cluster that asks for a token takes it from the "
            "file that RAY_AUTH_TOKEN_PATH names"
        )
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        host = None
    if not host or parts.scheme not in ("http", "https"):
        raise InputError(f"--address {address}: give that of the cluster's dashboard, e.g. http://HOST:8265")
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError as error:
        raise InputError(
            f"--address is {address}, but nothing answers there ({error.strerror or error}): is the cluster up, and its dashboard's port "
            "forwarded (`ray dashboard cluster.yaml`)?"
        ) from None


def _token_hint(text: str) -> str:
    if text.startswith("Authentication required"):
        return (
            "asks for a token: export RAY_AUTH_MODE=token, with the cluster's token in ~/.ray/auth_token "
            "(on the head: `ray get-auth-token`) or in the file that RAY_AUTH_TOKEN_PATH names"
        )
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if path and not os.environ.get("RAY_AUTH_TOKEN") and not os.path.isfile(os.path.expanduser(path)):
        return f"asks for a token, but RAY_AUTH_TOKEN_PATH is {path}, and there is no such file"
    return "refuses this token: it is not the cluster's (on the head: `ray get-auth-token`)"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
