"""One driver per run on an object store, which has no locks: a numbered object that the driver renews for as long as it lives.

    <run>/.lock/00000007     JSON: who holds the run, whether it was given back; when it was last written is its heartbeat

The highest number holds. It is written only if it is not there (`ObjectStore.create`), so of two who want it one gets it. A holder that was
not renewed for EXPIRES_S is dead, and the next number takes its place; one that slept so long finds the higher number and stops before it
writes anything more, and so do its workers, who look before every checkpoint (`workers.mirror`). Time is the store's clock. What cannot be
excluded: a request of a holder that is given up, or of its workers, already on its way, arrives late.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from workers.contracts import InputError, RunFailed
from workers.mirror import LEASES
from workers.objects import ObjectStore

BEAT_S = 10.0
EXPIRES_S = 60.0


class Lease:
    """``machine``: a word that only processes with the same run folder on their disk share, of which one at a time asks for a lease.

    A `files.Follower`: nothing is finished or removed by a driver that has lost the run.
    """

    def __init__(self, store: ObjectStore, machine: str, on_lost: Callable[[], None] | None = None):
        self.store, self.lost = store, ""
        self.about = {"machine": machine, "host": socket.gethostname(), "pid": os.getpid(), "token": secrets.token_hex(8)}
        self._on_lost = on_lost or (lambda: os.kill(os.getpid(), signal.SIGINT))
        self._heart = threading.Thread(target=self._beat, daemon=True, name="lease")
        self._over, self._renewed, self.number = threading.Event(), time.time(), 0

    def take(self) -> None:
        """Raises: InputError if another driver holds the run."""
        newest = max(self._numbers(), default=0)
        if newest:
            self._require_free(newest)
        self.number = newest + 1
        if not self.store.create(self._name(self.number), self._content(False)):
            self._require_free(self.number)
            raise InputError(f"another diffpruning has just begun and ended in {self.store.uri('')}: run the same command again")
        self._renewed = time.time()
        for number in self._numbers():
            if number < self.number:
                self.store.delete(self._name(number))
        self._heart.start()

    def give_back(self) -> None:
        self._over.set()
        if self._heart.is_alive():  # what it is writing now would stand over what is written here
            self._heart.join(EXPIRES_S)
        if not self.lost:
            self.store.put(self._name(self.number), self._content(True))

    def _require_free(self, number: int) -> None:
        try:
            holder = json.loads(b"".join(self.store.chunks(self._name(number))))
            written = self.store.find(self._name(number))
        except FileNotFoundError:  # given back and tidied away by the next
            holder, written = {}, None
        except ValueError:
            raise InputError(f"{self.store.uri(self._name(number))} is damaged: delete it if no diffpruning runs there") from None
        if written is None or holder.get("released") or holder.get("machine") == self.about["machine"]:
            return
        silent = max(0.0, self.store.now() - written.written)
        if silent < EXPIRES_S:
            raise InputError(
                f"another diffpruning is running in {self.store.uri('')} (host {holder.get('host')}, process {holder.get('pid')}, "
                f"last heard of {silent:.0f} s ago): wait for it, or watch it with `diffpruning status`; if it was killed, "
                f"its lock ends in {EXPIRES_S - silent:.0f} s"
            )

    def _beat(self) -> None:
        while not self._over.wait(BEAT_S):
            try:
                self._renew()
            except (RunFailed, OSError) as error:
                if time.time() - self._renewed > EXPIRES_S:
                    self.lost = f"the lock of {self.store.uri('')} could not be renewed for {EXPIRES_S:.0f} s: {error}"
            if self.lost:
                self._on_lost()
                return

    def _renew(self) -> None:
        if max(self._numbers(), default=0) > self.number:
            self.lost = (
                f"{self.store.uri('')} was taken over by another diffpruning, since this one was not heard of for {EXPIRES_S:.0f} s: "
                "its work goes on there"
            )
            return
        self.store.put(self._name(self.number), self._content(False))
        self._renewed = time.time()

    def require_held(self) -> None:
        """Raises: RunFailed once the run is another's."""
        if not self.lost and time.time() - self._renewed > EXPIRES_S:  # this machine slept
            self._renew()
        if self.lost:
            raise RunFailed(self.lost)

    def finished(self, path: Path, last: str) -> None:
        self.require_held()

    def removed(self, path: Path, first: str) -> None:
        self.require_held()

    def needed(self, path: Path) -> None: ...

    def refresh(self, folder: Path, pattern: str) -> None: ...

    def _numbers(self) -> list[int]:
        return [int(name) for name in self.store.names(LEASES) if name.isdecimal()]

    def _name(self, number: int) -> str:
        return f"{LEASES}/{number:08d}"

    def _content(self, released: bool) -> bytes:
        about: dict[str, Any] = {**self.about, "released": released}
        return json.dumps(about).encode()
