"""The Ray seam on the worker's side: device, rank, resume, report. A task is ``task(session, item)`` and never sees Ray itself."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workers.contracts import Progress
from workers.trials import SearchTrial

PROGRESS_ACTOR = "diffpruning-progress"


@dataclass
class Session:
    """Where a task runs. This class is the session without Ray; checkpoints lie in ``folder/step_NNNNNNN``."""

    folder: str = ""
    device: str = "cpu"
    rank: int = 0
    world_size: int = 1
    on_progress: Callable[[Progress], None] = field(default=lambda event: None)

    def report(self, event: Progress) -> None:
        """Send one line of progress; never waits for anybody."""
        if self.rank == 0:
            self.on_progress(event)

    def report_search(self, trial: SearchTrial) -> None:
        """Tell how a plan search goes; whoever compares trials may end this one here."""

    def checkpoint_path(self, step: int) -> str:
        return f"{self.folder}/step_{step:07d}"

    @contextlib.contextmanager
    def resume(self) -> Iterator[Path | None]:
        """The folder of the newest readable checkpoint of this run, or None."""
        from workers import checkpoint

        yield checkpoint.latest(Path(self.folder))

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Make ``write(folder)``'s files the checkpoint of ``step``, all or nothing; rank 0 writes, and the newest two are kept."""
        from workers import checkpoint

        if self.rank == 0:
            checkpoint.save_step(Path(self.folder), step, write)

    def agree(self, value: Any) -> Any:
        """Rank 0's value, on every rank: what a GPU computes may differ in its last bit from rank to rank."""
        if self.world_size == 1:
            return value
        import torch.distributed

        values = [value]
        torch.distributed.broadcast_object_list(values, src=0)
        return values[0]


class RayTaskSession(Session):
    """Inside a Ray task: progress goes straight to the driver's progress actor."""

    def __init__(self, device: str, folder: str = "", rank: int = 0, world_size: int = 1):
        super().__init__(folder=folder, device=device, rank=rank, world_size=world_size, on_progress=_to_actor())


class RayTrialSession(RayTaskSession):
    """Inside a Tune trial: every report goes to its scheduler, which may end the trial in it."""

    def __init__(self, device: str, trial: str):
        super().__init__(device)
        self.trial = trial

    def report_search(self, trial: SearchTrial) -> None:
        from ray import tune

        # the scheduler ends a trial at 100, which is to be the report that holds the plan
        percent = 100 if trial.plan else min(99, int(100 * trial.progress))
        outcome = json.dumps(trial.to_json())
        tune.report({"trial": self.trial, "percent": percent, "relative_loss": trial.relative_loss, "outcome": outcome})


class RayTrainSession(RayTaskSession):
    """Inside a Ray Train worker: Ray keeps the checkpoints and gives back the last committed one."""

    @contextlib.contextmanager
    def resume(self) -> Iterator[Path | None]:
        import ray.train

        saved = ray.train.get_checkpoint()
        if saved is None:
            yield None
        else:
            with saved.as_directory() as folder:
                yield Path(folder)

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        import ray.train
        from ray.train import Checkpoint, CheckpointUploadMode

        saved = None
        if self.rank == 0:
            folder = tempfile.mkdtemp(prefix="diffpruning-")
            try:
                write(Path(folder))
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            saved = Checkpoint.from_directory(folder)
        ray.train.report(
            {"step": step},
            checkpoint=saved,
            checkpoint_dir_name=Path(self.checkpoint_path(step)).name,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
        )


class ProgressMailbox:
    """Named actor: workers put in, the driver takes out."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def update(self, event: dict[str, Any]) -> None:
        self.events.append(event)

    def drain(self) -> list[dict[str, Any]]:
        events, self.events = self.events, []
        return events


def _to_actor() -> Callable[[Progress], None]:
    import ray

    try:
        actor = ray.get_actor(PROGRESS_ACTOR, namespace=ray.get_runtime_context().namespace)
    except ValueError:  # nobody watches
        return lambda event: None
    return lambda event: actor.update.remote(event.to_json())


def run_train_worker(config: dict[str, Any]) -> dict[str, Any]:
    """The train function of every TorchTrainer: one expert, in the session that Ray prepared."""
    import ray.train

    context = ray.train.get_context()
    _threads()
    session = RayTrainSession(config["device"], config["folder"], context.get_world_rank(), context.get_world_size())
    return config["task"](session, config["item"]).to_json()


def run_task(task: Callable[[Session, Any], Any], device: str, item: Any) -> Any:
    """The body of every Ray task."""
    _threads()
    return task(RayTaskSession(device), item)


def _threads() -> None:
    """Use the CPUs that Ray gave this process, no more: two trainers on two cores must not start four threads each."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 1))


def run_trial(
    config: dict[str, Any], task: Callable[[Session, Any], Any], items: dict[str, Any], device: str, axes: tuple[str, ...]
) -> None:
    """The trainable of the plan search: one trial is one combination of the axes (budget, agent, seed)."""
    _threads()
    key = "/".join(str(config[axis]) for axis in axes)
    session = RayTrialSession(device, key)
    session.report_search(task(session, items[key]))


def local_device() -> str:
    """cuda if this machine has a usable one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
