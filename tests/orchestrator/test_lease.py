"""The lock of a run on an object store, on a store that is slow."""

from __future__ import annotations

import json
import threading
from typing import Any

from orchestrator import lease
from orchestrator.lease import Lease


class Slow:
    """Objects in memory; a heartbeat waits until it is told to go on."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.beating, self.on = threading.Event(), threading.Event()

    def names(self, folder: str) -> list[str]:
        return [name.removeprefix(f"{folder}/") for name in self.objects]

    def create(self, name: str, content: bytes) -> bool:
        return self.objects.setdefault(name, content) is content

    def put(self, name: str, content: bytes) -> None:
        if not json.loads(content)["released"]:
            self.beating.set()
            self.on.wait(10)
        self.objects[name] = content


def test_a_lease_that_was_given_back_stays_so_though_a_heartbeat_was_under_way(monkeypatch):
    monkeypatch.setattr(lease, "BEAT_S", 0.01)
    store: Any = Slow()
    held = Lease(store, "one")
    held.take()
    assert store.beating.wait(10)
    threading.Timer(0.2, store.on.set).start()
    held.give_back()
    for beating in [thread for thread in threading.enumerate() if thread.name == "lease"]:
        beating.join(10)
    [content] = store.objects.values()
    assert json.loads(content)["released"]
