"""Fault tests run when they are asked for (`-m faults`), share one undisturbed result, and end with a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """They take half an hour on two cores: other selections leave them out."""
    if "faults" in config.option.markexpr or any("faults" in argument for argument in config.args):
        return
    left_out = [item for item in items if item.get_closest_marker("faults")]
    items[:] = [item for item in items if not item.get_closest_marker("faults")]
    config.hook.pytest_deselected(items=left_out)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    from tests.faults import harness

    if harness.TABLE:
        terminalreporter.section("faults")
        for line in harness.table():
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def job_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.faults import harness

    return harness.write_job(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="session")
def calm(job_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The job when nothing happens, without Ray: the bits do not depend on who runs it."""
    from tests.faults import harness

    job = harness.Job(job_file, tmp_path_factory.mktemp("calm") / "calm")
    job.finish("--inline")
    job.assert_clean()
    return job


@pytest.fixture(scope="session")
def reference(calm: Any) -> dict[str, Any]:
    return calm.published()
