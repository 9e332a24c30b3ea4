"""What every command that computes shares: the run folder is claimed and locked, progress is shown, the cluster starts on its first use."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from orchestrator.cli_options import device_here
from workers.contracts import InputError


@contextlib.contextmanager
def driver(prepared: Any, inline: bool) -> Iterator[tuple[Any, Callable[[], Any]]]:
    """Within the context the run folder is ours, and gives the progress view and what starts the cluster on its first use."""
    from rich.console import Console

    from orchestrator import planning
    from orchestrator.progress import ProgressView
    from orchestrator.tensorboard import EventFiles

    _require_lasting({"storage.path": prepared.store.folder, "registry.path": Path(prepared.job.registry.path)})
    signal.signal(signal.SIGTERM, _as_interrupt)
    new = not (prepared.store.folder / "run.json").exists()
    if new:  # nothing is done, so there is work; a refusal leaves nothing behind
        _check_capacity(prepared.job, inline)
    prepared.store.claim(planning.owner(prepared.job, prepared.pipeline.identity))
    clusters: list[Any] = []
    view = ProgressView(Console(file=sys.stderr), prepared.store.folder / "progress.json", prepared.pipeline.fingerprints)
    curves = EventFiles(prepared.store.folder / "tensorboard")

    def on_progress(event: Any) -> None:
        view.update(event)
        curves.update(event)

    # of a cluster's job, and of a run on an object store, `status` tells others how it ended: that stays
    watched = "RAY_ADDRESS" in os.environ or prepared.store.mirror is not None
    refusing = prepared.store.refusing() if new and not watched else contextlib.nullcontext()
    with prepared.store.lock(), refusing, view, contextlib.closing(curves):

        def cluster() -> Any:
            if not clusters:
                clusters.append(_cluster(prepared.job, view, on_progress, inline, prepared.store))
                prepared.job.timing().check(clusters[-1].need.device)  # what auto has become
            return clusters[-1]

        try:
            yield view, cluster
        finally:
            for used in clusters:
                with contextlib.suppress(Exception):
                    used.close()


def _require_lasting(folders: dict[str, Path]) -> None:
    """Raises: InputError for a folder inside the copy of the code that Ray makes for a job, and deletes after it."""
    for key, folder in folders.items():
        if any(part.startswith("_ray_pkg_") for part in folder.parts):
            raise InputError(
                f"{key}: {folder} is inside this job's copy of the code, which Ray deletes: give an absolute path on storage that every "
                f"node sees, --set {key}=/mnt/shared/{folder.name if key == 'registry.path' else 'runs'}"
            )


def _as_interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _check_capacity(job: Any, inline: bool) -> None:
    """Raises: InputError if the job's workers can never run where they are to run."""
    from orchestrator.capacity import check_here

    if inline:
        device_here(job.resources.device, "resources.device")
    elif address := os.environ.get("RAY_ADDRESS"):
        from orchestrator.ray_cluster import ask

        ask(job, address)
    else:
        check_here(job)


def _cluster(job: Any, view: Any, on_progress: Callable[[Any], None], inline: bool, store: Any) -> Any:
    need = job.resources
    if inline:
        from orchestrator.cluster import InlineCluster, Need

        device = device_here(need.device, "resources.device")
        return InlineCluster(Need(device, need.cpus_per_worker, need.gpus_per_worker if device == "cuda" else 0), on_progress)
    from orchestrator.capacity import check_here

    check_here(job)
    from orchestrator.ray_cluster import RayCluster

    return RayCluster(
        device=need.device,
        cpus=need.cpus_per_worker,
        gpus=need.gpus_per_worker,
        workers_per_expert=need.workers_per_expert,
        custom=need.custom,
        local_cpus=need.local_cpus,
        autoscale_to=need.autoscale_to,
        timeout_s=need.timeout_s,
        hang_timeout_s=need.hang_timeout_s,
        max_failures=need.max_failures,
        on_progress=on_progress,
        on_trainers=view.trainers,
        folder=store.folder,
        mirror=store.workers_mirror,
    )
