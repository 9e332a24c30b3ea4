"""What a run shows while it works: one line per unit, what a stage begins with included, late lines left out."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from orchestrator import progress
from orchestrator.progress import ProgressView
from orchestrator.store import read_json
from workers.contracts import Progress


def view(file: Path | None = None) -> tuple[ProgressView, io.StringIO]:
    out = io.StringIO()
    return ProgressView(Console(file=out, width=100), file), out


def test_a_line_reads_like_a_sentence_of_its_stage() -> None:
    assert progress.line(Progress("specialize", "t0250-0500", 1200, 20000, 0.0312, 312.4, 600.0)) == (
        "specialize t0250-0500  step 1200/20000  loss 0.0312  312 img/s  eta 2h36m"
    )
    assert progress.line(Progress("encode", "images 0-5000", 320, 5000, images_per_s=0.81, seconds=400.0)) == (
        "encode images 0-5000  320/5000  0.81 img/s  eta 1h37m"
    )
    assert progress.line(Progress("profile", "batch 16", 30, 120, seconds=20.0)) == "profile batch 16  step 30/120  eta 1m00s"


def test_what_a_stage_begins_with_is_shown_until_its_own_units_report() -> None:
    shown, out = view()
    shown.on_stage("analyze", "running", 0.0)
    shown.update(Progress("encode", "images 0-10", 10, 10))
    shown.update(Progress("publish", "dense", 1, 1))
    assert [event.stage for event in shown.units.values()] == ["encode"]
    shown.update(Progress("analyze", "t0000-0500", 1, 8))
    shown.update(Progress("encode", "images 0-10", 10, 10))
    assert [event.stage for event in shown.units.values()] == ["analyze"]
    assert [line.split()[0] for line in out.getvalue().splitlines()] == ["analyze", "encode", "analyze"]


def test_nothing_is_shown_between_stages() -> None:
    shown, _ = view()
    shown.update(Progress("encode", "images 0-10", 1, 10))
    shown.on_stage("encode", "running", 0.0)
    shown.update(Progress("encode", "images 10-20", 1, 10))
    assert list(shown.units) == ["images 10-20"]


def test_units_stand_in_the_order_of_their_numbers() -> None:
    shown, out = view()
    shown.on_stage("encode", "running", 0.0)
    for start in (1200, 900, 0):
        shown.update(Progress("encode", f"images {start}-{start + 300}", 300, 300, images_per_s=4.72))
    shown.console.print(shown._table())
    table = [line for line in out.getvalue().splitlines() if "done" in line]
    assert [line.split()[2] for line in table] == ["0-300", "900-1200", "1200-1500"]
    assert table[0].split()[3:] == ["300/300", "4.7", "done"]


def test_the_file_tells_others_of_the_units_at_work(tmp_path: Path) -> None:
    shown, _ = view(tmp_path / "progress.json")
    shown.on_stage("analyze", "running", 0.0)
    shown._written = 0.0
    shown.update(Progress("encode", "images 0-10", 1, 10))
    told = read_json(tmp_path / "progress.json") or {}
    assert told["stage"] == "analyze"
    assert [unit["unit"] for unit in told["units"]] == ["images 0-10"]


def test_a_unit_s_end_is_told_once() -> None:
    shown, out = view()
    shown.on_stage("encode", "running", 0.0)
    for step in (5, 10, 10):
        shown.update(Progress("encode", "images 0-10", step, 10, images_per_s=20.0))
    shown.update(Progress("encode", "images 0-10", 0, 10))  # begun anew after a lost worker
    shown.update(Progress("encode", "images 0-10", 10, 10))
    assert [line.split()[3] for line in out.getvalue().splitlines()[1:]] == ["5/10", "10/10", "10/10"]
