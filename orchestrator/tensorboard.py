"""TensorBoard event files: one run per expert, RUN/tensorboard/<stage>/<unit>, with loss and images per second over steps."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Any

from workers.contracts import Progress

FLUSH_S = 10


class EventFiles:
    """Written by the driver from what workers report. Nothing is written before there is something to write.

    A unit that resumes goes on in a new file, which tells TensorBoard to forget the steps that are made again. tensorboardX's own
    SummaryWriter would write from a thread and once more when the process ends, each with a traceback when the disk is full.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._writers: dict[tuple[str, str], Any] = {}
        self._last: dict[tuple[str, str], int] = {}
        self._opened = 0
        self._flushed = time.monotonic()

    def update(self, event: Progress) -> None:
        """``event``: any; those without a loss say nothing that a curve could show."""
        key = (event.stage, event.unit)
        if event.loss is None or self._last.get(key) == event.step:
            return
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        with contextlib.suppress(OSError):  # a full disk is told by whoever needs it
            if key not in self._writers or event.step < self._last[key]:
                self._open(key, event.first_step)
            self._last[key] = event.step
            for name, value in (("loss", event.loss), ("images_per_s", event.images_per_s)):
                if value is not None:
                    self._writers[key].write_event(Event(wall_time=time.time(), step=event.step, summary=scalar(name, value)))
            if time.monotonic() - self._flushed > FLUSH_S:
                self._flushed = time.monotonic()
                for writer in self._writers.values():
                    writer.flush()

    def _open(self, key: tuple[str, str], first_step: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        if key in self._writers:
            self._writers.pop(key).close()
        stage, unit = key
        folder = self._folder / stage / unit.replace(" ", "_")
        folder.mkdir(parents=True, exist_ok=True)
        self._opened += 1  # files are named by the second, which two may share
        self._writers[key] = EventsWriter(str(folder / "events"), f".{os.getpid()}.{self._opened}")
        self._writers[key].write_event(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def close(self) -> None:
        for writer in self._writers.values():
            with contextlib.suppress(OSError):
                writer.close()
