"""The fault tests' own driver fits the code it drives; runs without Ray, with every selection."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from orchestrator.ray_cluster import RayCluster
from tests.faults import work


@pytest.mark.parametrize("asked", [{}, {"slots": 2, "custom": {"slot": 1}, "autoscale_to": 2, "hang_timeout_s": 20}])
def test_what_work_asks_of_a_cluster_is_what_a_cluster_takes(asked, tmp_path, monkeypatch):
    takes, given = inspect.signature(RayCluster), []

    def note(**arguments: Any) -> None:
        given.append(takes.bind(**arguments).arguments)

    monkeypatch.setattr(work, "RayCluster", note)
    work.cluster_of(asked, tmp_path)
    assert given[0]["folder"] == tmp_path
