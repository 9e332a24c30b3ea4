"""What a worker fetches before its task and sends after it: what the task reads, and nothing once its driver was given up."""

import functools
import pickle
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from orchestrator import lease
from orchestrator.lease import Lease
from orchestrator.store import RunStore
from workers import checkpoint, files
from workers.contracts import ImageTask, RunFailed
from workers.mirror import Mirror
from workers.objects import ObjectStore


@pytest.fixture
def run(server, monkeypatch) -> str:
    """The URI of a run of many folders; nobody follows this process's files yet."""
    monkeypatch.setattr(files, "_followers", [])
    uri = server.new_registry().replace("/mixtures", "/runs/small")
    store = ObjectStore.of(uri, "run")
    for name in ("cache/images.arrow", "route-1/plan.json", "train/a/step_0000001/checkpoint.json", "train/b/step_0000001/checkpoint.json"):
        store.put(name, b"bytes")
    for i in range(20):
        store.put(f"analyze-{i}/part.npy", b"bytes")
    return uri


def here(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path.name[0] != "."}


def test_a_worker_lists_and_fetches_only_the_folders_that_its_task_names(run, server, tmp_path):
    mirror, folder = Mirror(str(tmp_path / "run"), run), tmp_path / "run"
    item = ImageTask(path="/data/images", size=8, channels=3, resize=True, on_error="skip", out=f"{folder}/cache/images.arrow")
    handed = (str(folder / "train" / "a"), {"task": (item, 7)}, tuple(range(1000)), f"{folder}/analyze-3/new.npy")
    before = len(server.requests)
    mirror.attach(handed)
    assert here(folder) == {"cache/images.arrow", "train/a/step_0000001/checkpoint.json", "analyze-3/part.npy"}
    first, before = server.requests[before:], len(server.requests)
    assert len(first) <= 3 + 2 * 3, "a list for each folder; a look and a read for each file"
    with FileLock(folder / ".fetching"):  # who lacks nothing waits for nobody
        mirror.attach(handed)
    again = server.requests[before:]
    assert [method for method, _ in again] == ["GET"] * 3 and len({path for _, path in again}) == 1, "a list for each folder"


def test_a_task_that_names_nothing_of_the_run_asks_the_store_nothing(run, server, tmp_path):
    before = len(server.requests)
    Mirror(str(tmp_path / "run"), run).attach(("/data", f"{tmp_path}/run-of-another/cache", 3, None))
    assert len(server.requests) == before


def save(folder: Path, step: int) -> None:
    write = functools.partial(checkpoint.write, tensors={"x": torch.full((4,), float(step))}, about={"step": step})
    checkpoint.save_step(folder / "train" / "unit", step, write)


def test_a_worker_whose_driver_was_given_up_sends_and_removes_nothing_more(run, server, tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_S", 3600)
    store, folder = ObjectStore.of(run, "run"), tmp_path / "worker"
    driver, other = Lease(store, "one"), Lease(store, "two")
    driver.take()
    worker = pickle.loads(pickle.dumps(Mirror(str(folder), run, driver.number)))
    assert worker.lease == 1
    worker.attach(str(folder / "train" / "unit"))
    before = len(server.requests)
    save(folder, 1)
    with_lease = len(server.requests) - before
    monkeypatch.setattr(files, "_followers", [Mirror(str(folder), run)])
    before = len(server.requests)
    save(folder, 2)
    assert with_lease == len(server.requests) - before + 1, "one look for each checkpoint"

    monkeypatch.setattr(lease, "EXPIRES_S", 0.0)
    other.take()
    held = store.listing()
    monkeypatch.setattr(files, "_followers", [worker])
    told = "was taken over by another diffpruning: its work goes on there, and this worker's ends here"
    with pytest.raises(RunFailed, match=told) as caught:
        save(folder, 3)
    assert "\n" not in str(caught.value)
    with pytest.raises(RunFailed, match=told):
        files.remove(folder / "train" / "unit" / "step_0000001", first="checkpoint.json")
    with pytest.raises(RunFailed, match=told):
        worker.attach("")
    assert store.listing() == held


def test_workers_are_told_the_lease_of_the_driver_that_holds_the_run(server, tmp_path):
    store = RunStore(tmp_path / "run", server.new_registry().replace("/mixtures", "/runs/small"))
    store.refresh()
    store.claim({"name": "small"})
    for number in (1, 2):
        with store.lock():
            assert store.workers_mirror == Mirror(store.mirror.folder, store.mirror.uri, number)
