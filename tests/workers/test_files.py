"""What is renamed into its place was on the disk before, and its name is after: seen in the order of the calls."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from orchestrator.place import Place
from orchestrator.store import RunStore
from workers import checkpoint
from workers.files import replacing


@pytest.fixture
def calls(monkeypatch) -> list[tuple[str, str]]:
    """("sync", path) and ("rename", new path), in order."""
    seen: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def note_sync(descriptor: int) -> None:
        fsync(descriptor)
        seen.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))

    def note_rename(source, target) -> None:
        replace(source, target)
        seen.append(("rename", str(target)))

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_rename)
    return seen


def test_a_file_is_on_the_disk_before_it_has_its_name_and_its_name_after(calls, tmp_path):
    with replacing(tmp_path / "a.json") as path:
        path.write_text("1")
    assert calls == [("sync", str(path)), ("rename", str(tmp_path / "a.json")), ("sync", str(tmp_path))]


def test_what_may_be_lost_is_only_renamed(calls, tmp_path):
    with replacing(tmp_path / "a.json", durable=False) as path:
        path.write_text("1")
    assert calls == [("rename", str(tmp_path / "a.json"))]


def test_a_checkpoints_tensors_and_description_are_on_the_disk_before_it_has_its_name(calls, tmp_path):
    root = tmp_path / "train" / "unit"
    folder = checkpoint.save_step(root, 10, lambda folder: checkpoint.write(folder, {"a": torch.ones(3)}, {"step": 10}))
    at = calls.index(("rename", str(folder)))
    before = [Path(path).name for what, path in calls[:at] if what == "sync"]
    assert before[:2] == ["train", "state.safetensors"]
    assert before[2].startswith(".checkpoint.") and before[3].startswith(".step_0000010.")
    assert calls[at + 1 :] == [("sync", str(root))]


def test_a_stages_record_is_written_when_all_that_it_vouches_for_is_on_the_disk(calls, tmp_path):
    store = RunStore.of(Place(tmp_path))
    folder = store.stage_folder("specialize", "f" * 64)
    (folder / "below").mkdir(parents=True)
    (folder / "below" / "tensors").write_bytes(b"1")
    store.finish("specialize", "f" * 64, {}, 0.0, 0.0)
    at = calls.index(("rename", str(folder / "done.json")))
    wanted = (folder / "below" / "tensors", folder / "below", folder, tmp_path)
    assert {path for what, path in calls[:at] if what == "sync"} >= set(map(str, wanted))
    assert calls[-1] == ("sync", str(folder))
