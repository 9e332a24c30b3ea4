"""What ends a process whose work has stopped: a dead file server, a collective that waits for nobody, a lock. Standard library only."""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

EXIT_CODE = 75


class Watchdog:
    """Watches from a thread; ends the process when ``beat`` was not called for ``timeout_s``, and leaves in ``file`` where every thread
    stood. What also stops this thread (a lock that Python itself waits for, a stopped process) is for others to see."""

    def __init__(self, timeout_s: float, file: Path, what: str, tell: Callable[[str], None] = lambda text: None):
        """``what``: whose process it is, for the message; ``tell`` gets the message before the process ends."""
        self.timeout_s, self.file, self.what, self.tell = timeout_s, file, what, tell
        self._over = threading.Event()
        self._last = time.monotonic()

    def beat(self) -> None:
        self._last = time.monotonic()

    def __enter__(self) -> Watchdog:
        self.beat()
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def _watch(self) -> None:
        period = min(1.0, self.timeout_s / 4)
        woke = time.monotonic()
        while not self._over.wait(period):
            before, woke = woke, time.monotonic()
            if woke - before > 5 * period + 1:
                self.beat()  # the whole machine slept: nothing was slow
            elif woke - self._last > self.timeout_s:
                self._end()

    def _end(self) -> None:
        told = f"{self.what}: no step for {self.timeout_s:g} s (resources.hang_timeout_s), ended; where it stood: {self.file}"
        try:
            with self.file.open("w") as file:
                file.write(told + "\n")
                file.flush()
                faulthandler.dump_traceback(file)
            self.tell(told)
        finally:
            os._exit(EXIT_CODE)
