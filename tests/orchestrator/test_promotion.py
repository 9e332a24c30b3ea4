"""What may be required of a version before an alias names it."""

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from orchestrator.cli import main
from orchestrator.promotion import numbers, promote
from orchestrator.registry import Registry
from tests import mixtures
from workers.contracts import InputError, RunFailed, VerificationError


@pytest.fixture
def publish(tmp_path):
    registry = Registry(tmp_path / "registry")

    def publish(run: str, **numbers):
        folder = mixtures.folder(tmp_path / run, own=run.encode())
        return registry.publish("quickstart", mixtures.manifest(run, **numbers), folder)

    publish.registry = registry
    return publish


def test_every_number_of_the_row_and_the_plan_may_be_named_and_nothing_else():
    manifest = mixtures.manifest(kid=None, images_per_s=float("inf"), is_ema=True, note="text", frechet=3)
    assert numbers(manifest) == {
        "denoising_loss": 0.1,
        "paired_mse": 0.01,
        "paired_psnr_db": 20.0,
        "ms_per_step": 3.0,
        "frechet": 3.0,
        "cost_ratio": 0.5,
        "macs_ratio": 0.5,
    }


@pytest.mark.parametrize(
    ("requirement", "holds"),
    [
        ("paired_mse<=0.01", True),
        ("paired_mse<0.01", False),
        ("paired_mse>=0.01", True),
        ("paired_mse>0.01", False),
        (" macs_ratio <= .5 ", True),
        ("fd<=1e1", True),
        ("fd<=-1", False),
        ("fd_dense_delta<=2", True),
        ("fd_dense_delta<2", False),
        ("cost_ratio_dense_delta<=-0.5", True),
        ("ms_per_step_dense_delta<-3", False),
    ],
)
def test_a_requirement_holds_or_the_alias_stays(publish, requirement, holds):
    version = publish("run-a", frechet=7.0)
    if holds:
        assert promote(publish.registry, version, "champion", required=[requirement]).required == (requirement.strip(),)
    else:
        with pytest.raises(RunFailed, match="quickstart:1 is not promoted to champion: .* required is "):
            promote(publish.registry, version, "champion", required=["macs_ratio<=1", requirement])
        assert publish.registry.aliases_of("quickstart") == {}


def test_a_delta_is_the_difference_from_the_version_that_the_alias_names_now(publish):
    for i, distance in enumerate([7.0, 6.0, 6.5]):
        publish(f"run-{i}", frechet=distance)
    registry = publish.registry
    one, two, three = registry.versions()
    promote(registry, one, "champion")
    promote(registry, two, "staging")
    promote(registry, three, "champion", required=["fd_delta<=-0.5"])
    with pytest.raises(RunFailed, match="fd_delta is 0.5, required is fd_delta<0.5"):
        promote(registry, three, "staging", required=["fd_delta<0.5"])


def test_the_promotions_of_the_readme_run_as_printed_after_the_quickstart(publish):
    publish("run-80", paired_mse=0.08), publish("run-60", paired_mse=0.11)  # near what it measures, without frechet
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    commands = re.findall("^diffpruning (registry (?:promote|rollback) .*)$", readme, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        done = CliRunner().invoke(main, [*shlex.split(command), "--registry", str(publish.registry.root)], catch_exceptions=False)
        assert done.exit_code == 0, (command, done.output)
    assert publish.registry.resolve("quickstart@champion").number == 1


def test_what_is_required_is_required_of_the_version_that_the_alias_names_already(publish):
    version = publish("run-a", frechet=7.0)
    promote(publish.registry, version, "champion")
    assert promote(publish.registry, version, "champion", required=["fd<=7", "fd_delta<=0"]) is None
    with pytest.raises(RunFailed, match="quickstart:1 is champion already, but fd is 7, required is fd<=6"):
        promote(publish.registry, version, "champion", required=["fd<=6"])
    with pytest.raises(InputError, match="is not of the form"):
        promote(publish.registry, version, "champion", required=["nonsense"])
    (version.path / "config.json").chmod(0o644)
    (version.path / "config.json").write_text("damaged")
    with pytest.raises(VerificationError, match="config.json: sha256 is"):
        promote(publish.registry, version, "champion")
    assert publish.registry.aliases_of("quickstart") == {1: ["champion"]}


@pytest.mark.parametrize(
    ("requirement", "told"),
    [
        ("fid<=3", "fid was not measured for this version: known are cost_ratio, denoising_loss, frechet, macs_ratio, ms_per_step, note"),
        ("kid<=3", "kid was not measured for this version"),
        ("fd_delta<=3", "quickstart@champion names nothing yet, so there is nothing to compare with"),
        ("fd", "is not of the form name<=number, e.g. 'fd_delta<=0.3'; the signs are <=, >=, <, >"),
        ("fd==3", "is not of the form"),
        ("fd<=three", "is not of the form"),
        ("fd<=nan", "is not of the form"),
        ("", "is not of the form"),
        ("speed_dense_delta<=3", "speed was not measured for this version"),
        ("note_dense_delta<=3", "note was not measured for the dense model: both have cost_ratio, denoising_loss, frechet"),
    ],
)
def test_what_cannot_be_compared_is_refused_with_what_can(publish, requirement, told):
    version = publish("run-a", frechet=7.0, note=1.0)
    with pytest.raises(InputError) as caught:
        promote(publish.registry, version, "champion", required=[requirement])
    assert told in str(caught.value) and "\n" not in str(caught.value)
    assert publish.registry.aliases_of("quickstart") == {}


def test_distances_of_two_protocols_are_not_compared_but_other_numbers_are(publish):
    one, two = publish("run-a", frechet=7.0), publish("run-b", frechet=6.0, protocol_seed=1)
    promote(publish.registry, one, "champion")
    with pytest.raises(
        InputError, match="frechet was measured under protocol .* here and under .* for the version that .* names: measure both"
    ):
        promote(publish.registry, two, "champion", required=["fd_delta<=0"])
    assert promote(publish.registry, two, "champion", required=["paired_mse_delta<=0"]).version == 2


@pytest.mark.parametrize("alias", ["latest", "", "Best", "a/b", "..", "a\n", "-x", "a" * 65])
def test_names_that_no_alias_can_have_are_refused(publish, alias):
    with pytest.raises(InputError, match="alias .* is not 1 to 64|latest always names the newest version"):
        promote(publish.registry, publish("run-a"), alias)
