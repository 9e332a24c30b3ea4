"""A process whose work stands still ends, says so, and leaves where it stood; one that works is left alone."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from workers.watchdog import EXIT_CODE

ROOT = Path(__file__).parents[2]
WORK = """
import sys, time
from pathlib import Path
from workers.watchdog import Watchdog

def stuck_reading():
    time.sleep(60)

with Watchdog(0.6, Path(sys.argv[1]), "specialize t0000-0400", lambda text: print(text, flush=True)) as watchdog:
    for _ in range(10):
        time.sleep(0.2)
        watchdog.beat()
    print("worked", flush=True)
    if sys.argv[2] == "hangs":
        stuck_reading()
print("ended")
time.sleep(1.5)
"""


def run(file: Path, how: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", WORK, str(file), how], cwd=ROOT, capture_output=True, text=True, timeout=50, check=False)


def test_what_hangs_is_ended_with_its_name_and_where_it_stood(tmp_path):
    started = time.monotonic()
    done = run(tmp_path / "hang.txt", "hangs")
    assert done.returncode == EXIT_CODE
    assert time.monotonic() - started < 30
    told = f"specialize t0000-0400: no step for 0.6 s (resources.hang_timeout_s), ended; where it stood: {tmp_path / 'hang.txt'}"
    assert done.stdout.splitlines() == ["worked", told]
    left = (tmp_path / "hang.txt").read_text()
    assert left.splitlines()[0] == told
    assert "in stuck_reading" in left


def test_who_works_or_has_ended_is_left_alone(tmp_path):
    done = run(tmp_path / "hang.txt", "ends")
    assert (done.returncode, done.stdout.split()) == (0, ["worked", "ended"])
    assert not (tmp_path / "hang.txt").exists()
