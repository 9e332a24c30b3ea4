"""The files that start a cluster are what Ray's and KubeRay's schemas accept, run the pinned versions, and name commands that exist."""

from __future__ import annotations

import copy
import json
import re
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from click.testing import CliRunner

from orchestrator.cli import main
from orchestrator.config import load_job
from workers.session import PLAN_GAUGES, UNIT_GAUGES

ROOT = Path(__file__).parents[1]
CLOUD, OWN, RAYJOB = ROOT / "cluster.yaml", ROOT / "cluster-onprem.yaml", ROOT / "jobs" / "kuberay" / "rayjob.yaml"
PINNED = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
SCHEMA = json.loads((ROOT / "tests" / "kuberay_rayjob.schema.json").read_text())


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """What Ray makes of a cluster file. Raises: as Ray does. It offers no public dry run."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    found = prepare_config(copy.deepcopy(config))
    validate_config(found)
    return found


@pytest.mark.parametrize("path", [CLOUD, OWN], ids=lambda path: path.stem)
def test_a_cluster_file_passes_rays_schema(path):
    found = prepared(read(path))
    heads = [name for name in found["available_node_types"] if name == found["head_node_type"]]
    assert len(heads) == 1
    assert found["max_workers"] >= 2


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda c: c.update(idle_timeout_minute=5), "idle_timeout_minute"),
        (lambda c: c.update(head_node_type="haed"), "head_node_type"),
        (lambda c: c["available_node_types"]["gpu_worker"].update(resources={"GPU": "one"}), "one"),
        (lambda c: c["available_node_types"]["gpu_worker"].update(min_workers=99), "min_workers"),
    ],
    ids=["misspelt key", "no such head", "resources in words", "more than the most"],
)
def test_a_mistake_in_a_cluster_file_would_be_found(change: Callable[[Any], None], told: str):
    config = read(CLOUD)
    change(config)
    with pytest.raises(Exception, match=told):
        prepared(config)


def test_the_keys_of_an_instance_are_those_of_the_cloud():
    """Ray's schema does not look inside."""
    known = {"InstanceType", "ImageId", "InstanceMarketOptions"}
    for kind in read(CLOUD)["available_node_types"].values():
        assert set(kind["node_config"]) <= known
        assert re.fullmatch(r"[a-z0-9]+\.[0-9]*x?large", kind["node_config"]["InstanceType"])


def test_the_head_only_drives_and_only_workers_are_spot():
    kinds = read(CLOUD)["available_node_types"]
    assert kinds["head"]["resources"] == {"CPU": 0}
    assert "InstanceMarketOptions" not in kinds["head"]["node_config"]
    assert kinds["gpu_worker"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "--num-cpus=0" in read(OWN)["head_start_ray_commands"][-1]
    assert read(RAYJOB)["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


@pytest.mark.parametrize("path", [CLOUD, OWN], ids=lambda path: path.stem)
def test_a_cluster_asks_for_a_token_that_lies_on_the_shared_storage_and_is_readable_by_its_owner_alone(path):
    config = read(path)
    assert {"-e RAY_AUTH_MODE=token", "-e RAY_AUTH_TOKEN_PATH=/mnt/shared/ray-token"} <= set(config["docker"]["run_options"])
    [made] = config["head_setup_commands"]
    assert made.startswith("umask 077;")
    assert made.endswith("ray get-auth-token --generate > /mnt/shared/ray-token")
    assert not any("0.0.0.0" in line for line in config["head_start_ray_commands"])


def test_the_user_of_the_image_may_write_to_a_new_file_system_before_the_token_is_put_there():
    first = read(CLOUD)["initialization_commands"]
    assert [line.split()[:2] for line in first[-2:]] == [["mountpoint", "-q"], ["sudo", "chown"]]
    assert first[-1] == "sudo chown 1000 /mnt/shared"


def test_a_job_that_was_refused_starts_no_second_cluster():
    assert read(RAYJOB)["spec"]["backoffLimit"] == 0


def test_every_cluster_runs_the_pinned_ray():
    tag = f"rayproject/ray:{PINNED['ray']}-"
    assert all(read(path)["docker"]["image"].startswith(tag) for path in (CLOUD, OWN))
    assert f"FROM {tag}" in (ROOT / "jobs" / "kuberay" / "Dockerfile").read_text()
    assert read(RAYJOB)["spec"]["rayClusterSpec"]["rayVersion"] == PINNED["ray"]
    assert all(any("--constraint ~/diffpruning/constraints.txt" in line for line in read(path)["setup_commands"]) for path in (CLOUD, OWN))


def test_every_cluster_can_keep_its_runs_on_an_object_store():
    lines = [line for path in (CLOUD, OWN) for line in read(path)["setup_commands"] if "pip install" in line]
    lines += [line for line in (ROOT / "jobs" / "kuberay" / "Dockerfile").read_text().splitlines() if "pip install" in line]
    assert len(lines) == 3
    for line in lines:
        assert shlex.split(line)[-1].endswith("/diffpruning[s3,gcs]"), "an extra that is not installed is a storage.path that is refused"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for requirement in (*extras["s3"], *extras["gcs"]):
        assert requirement.partition(">=")[0] in PINNED


@pytest.mark.parametrize("path", [CLOUD, OWN, RAYJOB], ids=lambda path: path.stem)
def test_a_cluster_file_opens_with_commands_that_the_program_understands(path):
    """The job in them is one that is bundled, and every --set is a key of it."""
    if path == RAYJOB:
        line = read(path)["spec"]["entrypoint"]
    else:
        comment = re.sub(r"\n#\s*", " ", path.read_text())
        line = re.search(r"(diffpruning submit [^']*)'", comment).group(1)
    program, command, job, *words = shlex.split(line)
    assert program == "diffpruning"
    overrides = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    config = load_job(Path(job).stem, overrides)
    assert (config.storage.path, config.registry.path) == ("/mnt/shared/runs", "/mnt/shared/registry")
    told = CliRunner().invoke(main, [command, "--help"]).output
    assert all(word in told for word in words if word.startswith("--"))


def validate(manifest: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator(SCHEMA).validate(manifest)


def test_the_rayjob_passes_the_schema_that_was_written_for_it():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    validate(read(RAYJOB))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda s: s.update(entryPoint="x"), "entryPoint"),
        (lambda s: s["rayClusterSpec"].update(rayVersion=2.6), "not of type 'string'"),
        (lambda s: s["rayClusterSpec"]["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}), "not of type 'string'"),
        (lambda s: s["rayClusterSpec"]["workerGroupSpecs"][0].pop("maxReplicas"), "maxReplicas"),
        (lambda s: s["rayClusterSpec"]["authOptions"].update(mode="tokens"), "tokens"),
    ],
)
def test_a_mistake_in_the_rayjob_would_be_found(change: Callable[[Any], None], told: str):
    manifest = read(RAYJOB)
    change(manifest["spec"])
    with pytest.raises(jsonschema.ValidationError, match=told):
        validate(manifest)


def test_the_rayjob_is_consistent():
    """What the operator checks beyond its schema."""
    spec = read(RAYJOB)["spec"]["rayClusterSpec"]
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    for group in groups:
        pod = group["template"]["spec"]
        [container] = pod["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert "/mnt/shared" in {mount["mountPath"] for mount in container["volumeMounts"]}
        assert pod["restartPolicy"] == "Never", "the autoscaler, version 2, wants no other"
        assert pod["securityContext"]["fsGroup"] == 1000, "the group with which the image's user writes to the volume"
    assert len({group["template"]["spec"]["containers"][0]["image"] for group in groups}) == 1
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert tuple(map(int, spec["rayVersion"].split("."))) >= (2, 52), "authOptions needs it"


def test_the_grafana_page_shows_every_gauge_and_no_other():
    page = json.loads((ROOT / "jobs" / "grafana" / "diffpruning.json").read_text())
    expressions = [target["expr"] for panel in page["panels"] for target in panel["targets"]]
    shown = set(re.findall(r"ray_(diffpruning_\w+)", " ".join(expressions)))
    assert shown == {f"diffpruning_{name}" for name in (*UNIT_GAUGES, *PLAN_GAUGES)}
    labels = {label for expression in expressions for by in re.findall(r"by \(([^)]*)\)", expression) for label in by.split(", ")}
    assert labels <= {"run", "stage", "unit", "budget", "sampler", "agent"}
    assert len({panel["id"] for panel in page["panels"]}) == len(page["panels"])
