"""cluster.yaml is what Ray's own schema accepts."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import yaml

CONFIG = yaml.safe_load((Path(__file__).parent.parent / "cluster.yaml").read_text())


def validate(config: dict) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config  # Ray offers no public dry run

    validate_config(prepare_config(copy.deepcopy(config)))


def test_cluster_yaml_passes_rays_schema():
    validate(CONFIG)


def test_a_misspelt_key_would_be_found():
    with pytest.raises(Exception, match="idle_timeout_minute"):
        validate({**CONFIG, "idle_timeout_minute": 5})


def test_the_head_only_drives():
    assert CONFIG["available_node_types"][CONFIG["head_node_type"]]["resources"] == {"CPU": 0}


def test_the_image_has_the_pinned_ray():
    pinned = next(line for line in (Path(__file__).parent.parent / "constraints.txt").read_text().splitlines() if line.startswith("ray=="))
    assert pinned.removeprefix("ray==") in CONFIG["docker"]["image"]
