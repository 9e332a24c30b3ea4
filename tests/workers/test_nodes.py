"""May this node work for this run: it sees a file that was just made, and runs the same code."""

import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from workers import nodes
from workers.contracts import RunFailed


def test_a_node_sees_a_file_that_another_makes_a_moment_later(tmp_path):
    threading.Timer(0.5, (tmp_path / "marker").touch).start()
    assert nodes.this_node(str(tmp_path / "marker")).sees


def test_a_node_that_came_late_and_does_not_see_the_run_folder_refuses_to_work(tmp_path, monkeypatch):
    monkeypatch.setattr(nodes, "PATIENCE_S", 0.1)
    assert not nodes.this_node(str(tmp_path / "marker")).sees
    with pytest.raises(RunFailed, match=f"does not see the run folder {tmp_path}: mount"):
        nodes.require_storage(str(tmp_path / "marker"))
    nodes.require_storage("")


def test_the_digest_of_the_code_is_that_of_its_sources_wherever_they_lie(tmp_path):
    def digest() -> str:
        code = "from workers.nodes import code_digest; print(code_digest())"
        return subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, env={}).stdout.strip()

    shutil.copytree(Path(nodes.__file__).parent, tmp_path / "workers", ignore=shutil.ignore_patterns("__pycache__"))
    assert digest() == nodes.code_digest()
    changed = tmp_path / "workers" / "routers" / "uniform.py"
    changed.write_text(changed.read_text() + "\n")
    assert digest() != nodes.code_digest()
