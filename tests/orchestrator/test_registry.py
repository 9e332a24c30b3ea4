"""What a registry promises: numbered versions that never change, and a check that says which file did."""

import dataclasses
import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import stat
import subprocess
import threading
from pathlib import Path

import pytest

from orchestrator.registry import Registry
from orchestrator.registry_files import sha256, sha256_file
from workers.contracts import (
    ArchitectureSpec,
    Budget,
    Cost,
    InputError,
    MixtureManifest,
    MixturePlan,
    Partition,
    Provenance,
    VerificationError,
)

WEIGHTS = "diffusion_pytorch_model.safetensors"
FILES = {"config.json": b"{}\n", WEIGHTS: bytes(range(256)) * 40, "scheduler/scheduler_config.json": b'{"steps": 20}\n'}


def make_manifest(fingerprint: str = "run-a", ratio: float = 0.5) -> MixtureManifest:
    """Of a run that searched with a seed of its own."""
    cost = Cost(macs=100, params=10)
    plan = MixturePlan(
        budget=Budget("macs", ratio, "ddim", 20),
        agent="era",
        seed=ord(fingerprint[-1]),
        partition=Partition.from_boundaries([400], 1000),
        experts=(ArchitectureSpec({"mid": 4}), ArchitectureSpec({"mid": 8})),
        shares=(0.4, 0.6),
        expert_costs=(cost, cost),
        dense_cost=Cost(macs=200, params=20, latency_ms=1.5),
        loss=0.1,
    )
    provenance = Provenance("quickstart", fingerprint, "emoji", "aa", "emoji-images", "bb", 0, {"torch": "2"})
    return MixtureManifest("quickstart", "unet2d", plan, {"macs-0.50": {"fid": 3.25}}, {"router": {"agent": "era"}}, provenance, {})


def make_source(folder: Path, files: dict[str, bytes] = FILES) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def tree(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def rewrite(path: Path, content: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(content)


def rewrite_consistently(version, **changes) -> None:
    """Edit the manifest and its line of SHA256SUMS, as someone who knows the format would."""
    page = json.loads((version.path / "manifest.json").read_bytes())
    rewrite(version.path / "manifest.json", json.dumps({**page, **changes}).encode())
    hashes = {**changes.get("files", page["files"]), "manifest.json": sha256_file(version.path / "manifest.json")}
    rewrite(version.path / "SHA256SUMS", "".join(f"{digest}  {name}\n" for name, digest in hashes.items()).encode())


@pytest.fixture
def source(tmp_path):
    return make_source(tmp_path / "source")


@pytest.fixture
def registry(tmp_path):
    return Registry(tmp_path / "registry")


@pytest.fixture
def version(registry, source):
    return registry.publish("quickstart", make_manifest(), source)


def refusal(registry, version) -> str:
    with pytest.raises(VerificationError) as caught:
        registry.verify(version)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- publishing -----------------------------------------------------------------------------------------------------


def test_versions_are_numbered_from_one_and_hold_exactly_the_published_bytes(registry, source):
    first = registry.publish("quickstart", make_manifest("run-a"), source)
    second = registry.publish("quickstart", make_manifest("run-b"), source)
    assert [first.reference, second.reference] == ["quickstart:1", "quickstart:2"]
    assert first.path == registry.root / "quickstart" / "1"
    for version in (first, second):
        assert {name: (version.path / name).read_bytes() for name in FILES} == FILES
        assert tree(version.path) == sorted([*FILES, "scheduler", "manifest.json", "SHA256SUMS"])
        assert registry.verify(version) == 3
    assert tree(registry.root / "quickstart")[0] == "1", "the temporary folder is gone"


def test_the_manifest_comes_back_with_the_hash_of_every_file(version):
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}
    assert version.manifest() == dataclasses.replace(make_manifest(), files=hashes)


def test_publishing_the_same_mixture_again_returns_the_version_there_is(registry, source, version):
    registry.publish("quickstart", make_manifest("run-b"), source)
    before = tree(registry.root)
    assert registry.publish("quickstart", make_manifest(), source) == version
    assert tree(registry.root) == before


def test_another_budget_or_other_bytes_make_another_version(registry, source, version):
    assert registry.publish("quickstart", make_manifest(ratio=0.3), source).number == 2
    (source / WEIGHTS).write_bytes(b"other")
    assert registry.publish("quickstart", make_manifest(), source).number == 3


def test_a_damaged_version_does_not_stand_in_for_a_good_one(registry, source, version):
    rewrite(version.path / WEIGHTS, b"damaged")
    again = registry.publish("quickstart", make_manifest(), source)
    assert again.number == 2 and registry.verify(again) == 3


def test_published_files_are_read_only(version):
    modes = {stat.S_IMODE(path.stat().st_mode) for path in version.path.rglob("*") if path.is_file()}
    assert modes == {0o444}


def test_links_in_the_source_are_published_as_files(registry, source, tmp_path):
    (tmp_path / "blob").write_bytes(b"weights")
    (source / "linked.bin").symlink_to(tmp_path / "blob")
    version = registry.publish("quickstart", make_manifest(), source)
    assert not (version.path / "linked.bin").is_symlink() and (version.path / "linked.bin").read_bytes() == b"weights"
    assert registry.verify(version) == 4


def test_the_same_plan_and_files_of_another_run_are_no_new_version_and_keep_their_results(registry, source, version):
    first = make_manifest()
    searched = dataclasses.replace(first.plan, search_seconds=9.0)
    other = dataclasses.replace(
        first, plan=searched, metrics={"macs-0.50": {"fid": 1.0}}, provenance=dataclasses.replace(first.provenance, fingerprint="run-x")
    )
    assert registry.publish("quickstart", other, source) == version
    assert version.manifest().metrics == first.metrics
    assert (
        registry.publish("quickstart", dataclasses.replace(other, plan=dataclasses.replace(searched, agent="greedy")), source).number == 2
    )
    (source / "first_stage.bin").write_bytes(b"one more file that is published with it")
    assert registry.publish("quickstart", other, source).number == 3


def test_a_removed_versions_number_is_not_used_again_while_its_empty_folder_stays(registry, source, version):
    (registry.root / "quickstart" / "7").mkdir()
    assert [found.number for found in registry.versions("quickstart")] == [1]
    assert registry.publish("quickstart", make_manifest("run-b"), source).number == 8


def _publish_from_process(barrier, root: Path, source: Path, fingerprint: str) -> None:
    barrier.wait()
    Registry(root).publish("quickstart", make_manifest(fingerprint), source)


def test_eight_processes_publishing_at_once_make_eight_whole_versions(registry, source):
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(8)
    fingerprints = [f"run-{i}" for i in range(8)]
    arguments = [(barrier, registry.root, source, fingerprint) for fingerprint in fingerprints]
    processes = [context.Process(target=_publish_from_process, args=each) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    versions = registry.versions("quickstart")
    assert [process.exitcode for process in processes] == [0] * 8
    assert [version.number for version in versions] == list(range(1, 9))
    assert [registry.verify(version) for version in versions] == [3] * 8
    assert sorted(version.manifest().provenance.fingerprint for version in versions) == fingerprints
    assert sorted(os.listdir(registry.root / "quickstart")) == [str(number) for number in range(1, 9)]


def test_eight_threads_publishing_the_same_mixture_at_once_make_one_version(registry, source):
    barrier, published = threading.Barrier(8), []

    def publish() -> None:
        barrier.wait()
        published.append(registry.publish("quickstart", make_manifest(), source))

    threads = [threading.Thread(target=publish) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [version.reference for version in published] == ["quickstart:1"] * 8
    assert os.listdir(registry.root / "quickstart") == ["1"]


@pytest.mark.parametrize(("other", "expected"), [("run-b", 2), ("run-a", 1)])
def test_a_number_taken_at_the_last_moment_is_left_alone(registry, source, monkeypatch, other, expected):
    rename = os.rename

    def late_rename(old, new):
        monkeypatch.setattr(os, "rename", rename)
        registry.publish("quickstart", make_manifest(other), source)
        rename(old, new)

    monkeypatch.setattr(os, "rename", late_rename)
    assert registry.publish("quickstart", make_manifest("run-a"), source).number == expected
    assert registry.versions()[0].manifest().provenance.fingerprint == other
    assert sorted(os.listdir(registry.root / "quickstart")) == [str(number) for number in range(1, expected + 1)]


def test_a_failed_rename_leaves_no_version_and_no_temporary_folder(registry, source, version, monkeypatch):
    def full_disk(old, new):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "rename", full_disk)
    before = tree(registry.root)
    with pytest.raises(OSError, match="No space left"):
        registry.publish("quickstart", make_manifest("run-b"), source)
    assert tree(registry.root) == before


def test_a_source_file_that_vanishes_leaves_no_version_and_no_temporary_folder(registry, source, monkeypatch):
    copyfile = shutil.copyfile

    def copy_then_lose_the_rest(old, new):
        copyfile(old, new)
        (source / "scheduler/scheduler_config.json").unlink(missing_ok=True)

    monkeypatch.setattr(shutil, "copyfile", copy_then_lose_the_rest)
    with pytest.raises(FileNotFoundError):
        registry.publish("quickstart", make_manifest(), source)
    assert registry.versions() == [] and os.listdir(registry.root / "quickstart") == []


@pytest.mark.parametrize("name", ["", "Quick", "-a", ".hidden", "a/b", "../a", "a:1", "a\n", "a" * 65])
def test_illegal_names_are_refused_before_anything_is_written(registry, source, name):
    with pytest.raises(InputError, match="mixture name"):
        registry.publish(name, make_manifest(), source)
    assert not registry.root.exists()


@pytest.mark.parametrize("name", ["manifest.json", "SHA256SUMS", "back\\slash", "new\nline"])
def test_files_that_a_version_cannot_hold_are_refused_before_anything_is_written(registry, source, name):
    (source / name).write_bytes(b"")
    with pytest.raises(InputError, match="the file name"):
        registry.publish("quickstart", make_manifest(), source)
    assert not registry.root.exists()


def test_an_empty_or_missing_source_is_refused(registry, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "missing"):
        with pytest.raises(InputError, match="nothing to publish as quickstart"):
            registry.publish("quickstart", make_manifest(), folder)


# --- finding --------------------------------------------------------------------------------------------------------


def test_versions_are_sorted_by_name_then_number_and_skip_what_is_not_one(registry, source):
    for i in range(10):
        registry.publish("b", make_manifest(f"run-{i}"), source)
    registry.publish("a", make_manifest(), source)
    for foreign in ("b/.publishing-1-aa", "b/notes", "b/11", "b/007", "Foreign/1", ".cache/1", "c"):
        (registry.root / foreign).mkdir(parents=True)
    (registry.root / "b/.publishing-1-aa/manifest.json").write_text("{}")
    (registry.root / "README").write_text("")
    assert [version.reference for version in registry.versions()] == ["a:1", *(f"b:{i}" for i in range(1, 11))]
    assert [version.number for version in registry.versions("a")] == [1]
    assert registry.versions("c") == registry.versions("unknown") == []


def test_a_reference_means_the_latest_version_or_the_one_it_numbers(registry, source):
    first, second = (registry.publish("quickstart", make_manifest(run), source) for run in ("run-a", "run-b"))
    assert registry.resolve("quickstart") == registry.resolve("quickstart@latest") == registry.resolve("quickstart:2") == second
    assert registry.resolve("quickstart:1") == first


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("church", "has no mixture church: it has cifar10, quickstart"),
        ("church:1", "has no mixture church: it has cifar10, quickstart"),
        ("quickstart:3", "quickstart has no version '3': it has 1, 2"),
        ("quickstart:01", "quickstart has no version '01': it has 1, 2"),
        ("quickstart:", "quickstart has no version '': it has 1, 2"),
        ("quickstart@best", "quickstart has no alias 'best': the only alias is latest"),
        ("quickstart:1@latest", "mixture name 'quickstart:1' is not"),
        ("../quickstart:1", "mixture name '../quickstart' is not"),
    ],
)
def test_an_unknown_reference_is_refused_with_what_there_is(registry, source, reference, said):
    for name, run in (("quickstart", "run-a"), ("quickstart", "run-b"), ("cifar10", "run-a")):
        registry.publish(name, make_manifest(run), source)
    with pytest.raises(InputError) as caught:
        registry.resolve(reference)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_an_empty_or_missing_registry_says_so_and_reading_creates_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "missing"):
        registry = Registry(tmp_path / folder)
        assert registry.versions() == registry.versions("quickstart") == []
        with pytest.raises(InputError, match="empty or missing: publish a mixture first"):
            registry.resolve("quickstart")
    assert tree(tmp_path) == ["empty"]


def test_reading_a_registry_changes_nothing_in_it(registry, version):
    def look():
        return [(path, path.stat().st_mtime_ns) for path in sorted(registry.root.rglob("*"))]

    before = look()
    again = Registry(registry.root)
    assert again.verify(again.resolve("quickstart")) == 3 and len(again.versions()) == 1
    assert look() == before


def test_a_path_and_its_file_uri_are_the_same_registry(tmp_path, source, monkeypatch):
    folder = tmp_path / "with space"
    version = Registry(folder).publish("quickstart", make_manifest(), source)
    monkeypatch.chdir(tmp_path)
    for uri in (str(folder), folder.as_uri(), "with space"):
        assert Registry(uri).versions() == [version]


@pytest.mark.parametrize("uri", ["ftp://bucket/mixtures", Path("hdfs://bucket"), "file://host/folder", "", "a\nb"])
def test_a_registry_elsewhere_is_refused(uri):
    with pytest.raises(InputError, match="is not a local path, file:///absolute/path, s3://bucket/prefix or gs://bucket/prefix"):
        Registry(uri)


# --- verifying ------------------------------------------------------------------------------------------------------


def test_a_changed_file_is_named_with_both_hashes(registry, version):
    rewrite(version.path / WEIGHTS, b"changed")
    found, published = (hashlib.sha256(content).hexdigest()[:12] for content in (b"changed", FILES[WEIGHTS]))
    said = f"quickstart:1: {WEIGHTS}: sha256 is {found}..., the manifest says {published}...: the file was changed after publishing"
    assert refusal(registry, version) == said


def test_a_deleted_file_is_named(registry, version):
    (version.path / "config.json").unlink()
    assert refusal(registry, version) == "quickstart:1: config.json: is missing"


@pytest.mark.parametrize("name", ["extra.bin", "scheduler/.hidden", "scheduler/manifest.json"])
def test_an_added_file_is_named(registry, version, name):
    (version.path / name).write_bytes(b"")
    assert refusal(registry, version) == f"quickstart:1: {name}: is not in the manifest: it was added after publishing"


def test_an_edited_manifest_is_named_although_it_can_be_read(registry, version):
    page = version.path / "manifest.json"
    edited = page.read_bytes().replace(b"3.25", b"1.25")
    recorded = sha256_file(page)
    rewrite(page, edited)
    assert version.manifest().metrics == {"macs-0.50": {"fid": 1.25}}
    found = hashlib.sha256(edited).hexdigest()
    said = f"sha256 is {found[:12]}..., SHA256SUMS says {recorded[:12]}...: the file was changed after publishing"
    assert refusal(registry, version) == f"quickstart:1: manifest.json: {said}"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b'{"name": "x"}', b"\xff", b"[" * 100_000])
def test_a_manifest_that_cannot_be_parsed_is_refused(registry, version, content):
    rewrite(version.path / "manifest.json", content)
    assert refusal(registry, version).startswith("quickstart:1: manifest.json: cannot be read: ")


def test_a_version_without_its_manifest_stays_listed_and_is_refused(registry, version):
    (version.path / "manifest.json").unlink()
    assert registry.resolve("quickstart@latest") == version
    assert refusal(registry, version).startswith("quickstart:1: manifest.json: cannot be read: ")


def test_missing_or_edited_checksums_are_named(registry, version):
    sums = version.path / "SHA256SUMS"
    lines = sums.read_text().splitlines(keepends=True)
    rewrite(sums, "".join(line for line in lines if "config.json" not in line).encode())
    assert refusal(registry, version).startswith("quickstart:1: SHA256SUMS: does not list the files and hashes of the manifest")
    rewrite(sums, "".join(line for line in lines if "manifest.json" not in line).encode())
    assert "manifest.json: sha256 is" in refusal(registry, version)
    sums.unlink()
    assert "SHA256SUMS" in refusal(registry, version)


@pytest.mark.parametrize(
    "path", ["../../outside", "scheduler/../config.json", "./config.json", "scheduler//a", "", ".", "..", "a\nb", "ABSOLUTE"]
)
def test_manifest_paths_that_leave_the_version_are_refused_unread(registry, version, tmp_path, monkeypatch, path):
    outside = tmp_path / "registry" / "outside"
    outside.write_bytes(b"secret")
    path = str(outside) if path == "ABSOLUTE" else path
    files = {**version.manifest().files, path: hashlib.sha256(b"secret").hexdigest()}
    rewrite_consistently(version, files=files)
    read = []
    monkeypatch.setattr("orchestrator.registry.sha256", lambda files, opened: read.append(opened) or sha256(files, opened))
    assert f"{path!r}: is not a plain relative path inside the version" in refusal(registry, version)
    assert sorted(read) == sorted(f"quickstart/1/{name}" for name in [*FILES, "manifest.json"])


def test_links_are_refused_even_if_they_lead_to_the_right_bytes(registry, version, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(version.path, copy)
    (version.path / WEIGHTS).unlink()
    (version.path / WEIGHTS).symlink_to(copy / WEIGHTS)
    assert refusal(registry, version) == f"quickstart:1: {WEIGHTS}: is not a regular file"
    shutil.rmtree(version.path / "scheduler")
    (version.path / "scheduler").symlink_to(copy / "scheduler")
    assert "scheduler/scheduler_config.json: is missing" in refusal(registry, version)


def test_many_problems_are_three_and_a_count_on_one_line(registry, version):
    for name in FILES:
        (version.path / name).unlink()
    for i in range(4):
        (version.path / f"extra{i}\n").write_bytes(b"")
    said = refusal(registry, version)
    assert said == "quickstart:1: " + "; ".join(f"{name}: is missing" for name in sorted(FILES)) + "; and 4 more"


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs coreutils")
def test_sha256sum_checks_a_version_without_this_project(registry, version):
    check = ["sha256sum", "--strict", "-c", "SHA256SUMS"]
    done = subprocess.run(check, cwd=version.path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == sorted(f"{name}: OK" for name in [*FILES, "manifest.json"])
    rewrite(version.path / WEIGHTS, b"changed")
    assert subprocess.run(check, cwd=version.path, capture_output=True).returncode == 1
