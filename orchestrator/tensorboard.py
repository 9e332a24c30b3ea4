"""TensorBoard event files: one run per expert, RUN/tensorboard/<stage>/<unit>, with loss and images per second over steps."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from workers.contracts import Progress

FLUSH_S = 10


class EventFiles:
    """Written by the driver from what workers report. Nothing is written before there is something to write.

    A unit that resumes goes on in a new file, which tells TensorBoard to forget the steps that are made again.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._writers: dict[tuple[str, str], Any] = {}
        self._last: dict[tuple[str, str], int] = {}
        self._opened = 0

    def update(self, event: Progress) -> None:
        """``event``: any; those without a loss say nothing that a curve could show."""
        key = (event.stage, event.unit)
        if event.loss is None or self._last.get(key) == event.step:
            return
        with contextlib.suppress(OSError):  # a full disk is told by whoever needs it
            if key not in self._writers or event.step < self._last[key]:
                self._open(key, event.first_step)
            self._last[key] = event.step
            self._writers[key].add_scalar("loss", event.loss, event.step)
            if event.images_per_s is not None:
                self._writers[key].add_scalar("images_per_s", event.images_per_s, event.step)

    def _open(self, key: tuple[str, str], first_step: int) -> None:
        from tensorboardX import SummaryWriter

        if key in self._writers:
            self._writers.pop(key).close()
        stage, unit = key
        self._opened += 1  # files are named by the second, which two may share
        self._writers[key] = SummaryWriter(
            str(self._folder / stage / unit.replace(" ", "_")),
            purge_step=first_step,
            flush_secs=FLUSH_S,
            filename_suffix=f".{os.getpid()}.{self._opened}",
        )

    def close(self) -> None:
        for writer in self._writers.values():
            with contextlib.suppress(OSError):
                writer.close()
