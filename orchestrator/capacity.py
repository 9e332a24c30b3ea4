"""Can this job's workers ever run on this machine? Asked before anything is started or written."""

from __future__ import annotations

import os
from typing import Any

from orchestrator.cli_options import device_here
from workers.contracts import InputError

HERE = "a Ray on this machine (RAY_ADDRESS is not set)"


def check_here(job: Any, gpus: bool = True) -> None:
    """Refuse at once what no Ray on this machine can hold; what a cluster holds, only the cluster knows. ``gpus``: those too, for which
    torch is imported. Raises: InputError."""
    from orchestrator.cluster import Need, cpus_here

    asked = job.resources
    if os.environ.get("RAY_ADDRESS"):
        return
    machine: dict[str, float] = {"CPU": cpus_here(asked.local_cpus)}
    Need("cpu", asked.cpus_per_worker, 0, asked.workers_per_expert, asked.custom).check([machine], HERE)
    if gpus and asked.device != "cpu" and device_here(asked.device, "resources.device") == "cuda":
        from workers.session import local_gpus

        machine["GPU"] = local_gpus()
        Need("cuda", asked.cpus_per_worker, asked.gpus_per_worker, asked.workers_per_expert, asked.custom).check([machine], HERE)


def warning_here(job: Any) -> list[str]:
    """Why a run on this machine would be refused, as a line; nothing if it would not be."""
    try:
        check_here(job)
    except InputError as error:
        return [f"a run here would be refused: {error}; on a cluster (RAY_ADDRESS, or `diffpruning submit`) its nodes count instead"]
    return []
