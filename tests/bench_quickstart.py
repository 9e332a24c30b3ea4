"""Prints the quickstart's figures: time, peak memory of all its processes, overlap of its trainers, time of a second run.

    .venv/bin/python tests/bench_quickstart.py FOLDER [KEY=VALUE ...]

Runs and registry go to FOLDER, which must be new. Resident memory counts shared pages once per process (RSS) or once altogether (PSS).
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil


def run(command: list[str]) -> tuple[float, float, float]:
    """Seconds, and the peaks of summed RSS and PSS in GiB, of a command and all its descendants."""
    started, peak_rss, peak_pss = time.monotonic(), 0, 0
    process = subprocess.Popen(command)
    root = psutil.Process(process.pid)
    while process.poll() is None:
        rss = pss = 0
        try:
            members = [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            break
        for member in members:
            try:
                memory = member.memory_full_info()
            except psutil.Error:
                continue
            rss, pss = rss + memory.rss, pss + memory.pss
        peak_rss, peak_pss = max(peak_rss, rss), max(peak_pss, pss)
        time.sleep(2)
    if process.wait():
        sys.exit(f"the run failed with exit code {process.returncode}")
    return time.monotonic() - started, peak_rss / 2**30, peak_pss / 2**30


def overlap(record: Path) -> str:
    """How long two or more of a stage's trainers worked at the same time, from their recorded starts and ends."""
    experts = json.loads(record.read_text())["result"]["experts"]
    spans = [(e["started"], e["ended"]) for e in (experts if isinstance(experts, list) else experts.values())]
    moments = sorted([(start, 1) for start, _ in spans] + [(end, -1) for _, end in spans])
    running, since, together, most = 0, 0.0, 0.0, 0
    for at, change in moments:
        if running >= 2:
            together += at - since
        running, since = running + change, at
        most = max(most, running)
    whole = max(end for _, end in spans) - min(start for start, _ in spans)
    return f"{len(spans)} trainers, at most {most} at once, two or more for {together:.0f} of {whole:.0f} s"


def main() -> None:
    folder, *settings = sys.argv[1:]
    Path(folder).mkdir(parents=True)
    sets = [f"storage.path={folder}/runs", f"registry.path={folder}/registry", *settings]
    command = [sys.executable, "-m", "orchestrator", "run", "quickstart", *(word for value in sets for word in ("--set", value))]
    seconds, rss, pss = run(command)
    again, _, _ = run(command)
    run_folder = Path(folder) / "runs" / "quickstart"
    records = {path.parent.name.rpartition("-")[0]: path for path in run_folder.glob("*/done.json")}
    for stage, path in sorted(records.items(), key=lambda item: json.loads(item[1].read_text())["started"]):
        print(f"{stage:<12}{json.loads(path.read_text())['seconds']:>8.1f} s")
    print(f"first run   {seconds:>8.1f} s, peak RSS {rss:.2f} GiB, peak PSS {pss:.2f} GiB")
    print(f"second run  {again:>8.1f} s")
    for stage in ("specialize", "finetune"):
        print(f"{stage:<12}{overlap(records[stage])}")


if __name__ == "__main__":
    main()
