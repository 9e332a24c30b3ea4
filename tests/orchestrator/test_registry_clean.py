"""What gc and rm leave: whatever a rollback returns to, and nothing of what was removed, however a removal ended."""

import json
import re
import threading
import time
from pathlib import Path
from urllib.parse import unquote

import pytest

from orchestrator import aliases
from orchestrator.aliases import Conflict
from orchestrator.promotion import promote, rollback
from orchestrator.registry import Registry
from orchestrator.registry_clean import clean, remove
from orchestrator.registry_files import REMOVED, SUMS
from orchestrator.registry_objects import ObjectFiles
from tests.orchestrator.test_registry_kinds import Shelf, both, refusal, shelf

__all__ = ["shelf"]


@both
def test_gc_keeps_what_each_alias_goes_back_to(shelf):
    versions = [shelf.publish(f"run-{i}") for i in range(6)]
    for number in (1, 2, 3):
        promote(shelf.registry, versions[number], "champion")
    promote(shelf.registry, versions[4], "staging")
    assert clean(shelf.registry, keep_aliased=True, grace_hours=0).versions == ["quickstart:1", "quickstart:2"]
    assert "quickstart:4 -> quickstart:3" in shelf.command("rollback", "quickstart").stdout
    assert "quickstart:5 -> nothing" in shelf.command("rollback", "quickstart@staging").stdout
    assert shelf.registry.verify(shelf.registry.resolve("quickstart@champion")) == 4


@both
def test_rm_leaves_what_an_alias_goes_back_to(shelf):
    versions = [shelf.publish(f"run-{i}") for i in range(3)]
    for version in versions:
        promote(shelf.registry, version, "champion")
    before = shelf.state()
    told = "quickstart:2 is what a rollback of quickstart@champion returns to: promote another version, then remove it"
    assert refusal(shelf.command("rm", "quickstart:2"), 2) == told and shelf.state() == before
    assert shelf.command("rm", "quickstart:1").exit_code == 0
    assert "quickstart:3 -> quickstart:2" in shelf.command("rollback", "quickstart").stdout


@both
def test_a_removal_gives_way_to_a_rollback_at_the_same_time(shelf, monkeypatch):
    versions = [shelf.publish(f"run-{i}") for i in range(3)]
    for version in versions:
        promote(shelf.registry, version, "champion")
    put = type(shelf.registry.files).put

    def meanwhile(files, path, content):
        monkeypatch.setattr(type(files), "put", put)
        rollback(shelf.registry, "quickstart", "champion")  # after the removal looked for aliases
        return put(files, path, content)

    monkeypatch.setattr(type(shelf.registry.files), "put", meanwhile)
    with pytest.raises(Conflict, match="quickstart:1 is what a rollback of quickstart@champion returns to: it is not removed"):
        remove(shelf.registry, versions[0])
    assert rollback(shelf.registry, "quickstart", "champion").version == 1


@both
def test_an_alias_whose_former_versions_were_all_removed_does_not_go_back(shelf):
    versions = [shelf.publish(f"run-{i}") for i in range(3)]
    for version in versions:
        promote(shelf.registry, version, "champion")
    for version in versions[:2]:
        shelf.registry.files.put(f"{version.folder}/{REMOVED}", b"{}")  # as earlier releases did
    assert refusal(shelf.command("rollback", "quickstart"), 2) == (
        "quickstart@champion cannot go back: quickstart:2, which it named before quickstart:3, was removed: promote another version"
    )
    assert shelf.registry.resolve("quickstart@champion").number == 3


@both
def test_a_rollback_gives_way_to_a_removal_that_looked_before(shelf, monkeypatch):
    one, two = shelf.publish("run-a"), shelf.publish("run-b")
    promote(shelf.registry, one, "champion"), promote(shelf.registry, two, "champion")
    append = aliases.append

    def meanwhile(*arguments):
        monkeypatch.setattr(aliases, "append", append)
        shelf.registry.files.put(f"{one.folder}/{REMOVED}", b"{}")
        return append(*arguments)

    monkeypatch.setattr(aliases, "append", meanwhile)
    with pytest.raises(Conflict, match="quickstart:1 was removed meanwhile: quickstart@champion names what it did before"):
        rollback(shelf.registry, "quickstart", "champion")
    assert shelf.registry.resolve("quickstart@champion") == two


def half_removed(shelf) -> Path:
    """Of two versions the first, whose removal was killed after its mark."""
    version, _ = shelf.publish("run-a"), shelf.publish("run-b")
    shelf.registry.files.put(f"{version.folder}/{REMOVED}", b"{}")
    return version.path


@pytest.mark.parametrize("shelf", ["local"], indirect=True)
@pytest.mark.parametrize("how", ["rm", "gc"])
def test_a_removal_that_was_killed_is_finished_by_rm_and_by_gc(shelf, how):
    folder = half_removed(shelf)
    if how == "rm":
        assert shelf.command("rm", "quickstart:1").stdout == "quickstart:1 removed\n"
        assert "quickstart:1 was removed: it has 2" in refusal(shelf.command("rm", "quickstart:1"), 2)
    left = 2 if how == "gc" else 0  # the folder, and the file that no other version has
    assert clean(shelf.registry).too_young == left
    told = json.loads(shelf.command("gc", "--dry-run", "--grace-hours", "0", "--json").stdout)
    done = json.loads(shelf.command("gc", "--grace-hours", "0", "--json").stdout)
    assert told == {**done, "dry_run": True} and len(done["debris"]) == left
    assert sorted(path.name for path in folder.iterdir()) == sorted([SUMS, REMOVED])
    assert set(shelf.registry.files.names(".blobs")) == set(shelf.registry.resolve("quickstart:2").manifest().files.values())
    assert clean(shelf.registry, grace_hours=0).debris == []


@pytest.mark.parametrize("shelf", ["local"], indirect=True)
def test_what_an_alias_came_to_name_while_its_removal_began_is_not_stripped(shelf):
    folder = half_removed(shelf)
    aliases.append(shelf.registry.files, "quickstart", "champion", None, "promote", 1)
    before = sorted(folder.rglob("*"))
    assert clean(shelf.registry, grace_hours=0).debris == []
    assert re.match("quickstart:1 is named by quickstart@champion", refusal(shelf.command("rm", "quickstart:1"), 2))
    assert sorted(folder.rglob("*")) == before


@both
def test_gc_of_a_name_or_a_registry_that_is_not_there_is_refused(shelf, tmp_path):
    shelf.publish("run-a")
    before = shelf.state()
    assert "has no mixture pixels: it has quickstart" in refusal(shelf.command("gc", "pixels"), 2)
    assert "'.blobs' is not 1 to 64 of" in refusal(shelf.command("gc", ".blobs"), 2)
    assert refusal(shelf.command("gc", "--grace-hours", "nan"), 2) == "--grace-hours nan: is no number of hours"
    assert shelf.state() == before
    shelf.uri = shelf.uri.replace("mixtures", "nowhere") if shelf.server else str(tmp_path / "nowhere")
    assert "it is empty or missing" in refusal(shelf.command("gc"), 2)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("shelf", ["local"], indirect=True)
def test_gc_of_a_name_leaves_what_killed_publishers_of_others_left(shelf):
    shelf.publish("run-a"), shelf.publish("run-a", name="other")
    left = [shelf.registry.root / name / ".publishing-1-aa" for name in ("quickstart", "other")]
    for folder in left:
        folder.mkdir()
    orphan = shelf.registry.root / ".blobs" / ("0" * 64)
    orphan.write_bytes(b"of nobody")
    half = shelf.registry.resolve("other:1")
    shelf.registry.files.put(f"{half.folder}/{REMOVED}", b"{}")
    assert shelf.command("gc", "quickstart", "--grace-hours", "0").exit_code == 0
    assert [folder.exists() for folder in (*left, orphan)] == [False, True, False] and (half.path / "config.json").exists()
    shelf.command("gc", "other", "--grace-hours", "0")
    assert not left[1].exists() and not (half.path / "config.json").exists()


# --- a publisher and a gc at the same time --------------------------------------------------------------------------


def meeting(shelf, monkeypatch, when: str) -> tuple[object, Exception | None]:
    """A gc stands before it deletes the blob of a removed version, while the next version is published, which uses the blob again.

    ``when`` the gc deletes it: "before the claim" of the publisher, "after the claim", or "at last", when the publisher has ended.
    Returns the version, and what gc raised.
    """
    gone, server = shelf.publish("run-a"), shelf.server
    blob = f".blobs/{gone.sums()['model-00001-of-00002.safetensors']}"
    remove(shelf.registry, gone)
    now = time.time()
    monkeypatch.setattr("orchestrator.registry_objects.time.time", lambda: now + 48 * 3600)
    stands, goes, ended, raised = threading.Event(), threading.Event(), threading.Event(), []

    def arrival(method: str, path: str, body: bytes) -> None:
        if method == "DELETE" and unquote(path.partition("?")[0]).endswith(blob):
            stands.set()
            assert goes.wait(60)
        elif b"quickstart/2/SHA256SUMS" in unquote(path).encode() + body and method in ("PUT", "POST") and when == "before the claim":
            goes.set()
            assert ended.wait(60)

    def gc() -> None:
        try:
            clean(Registry(shelf.uri))
        except Exception as error:
            raised.append(error)
        ended.set()

    find = ObjectFiles.find

    def look(files, path):
        if when == "after the claim" and path == blob and files.names("quickstart/2"):
            goes.set()
            assert ended.wait(60)
        return find(files, path)

    server.on_arrival = arrival
    monkeypatch.setattr(ObjectFiles, "find", look)
    thread = threading.Thread(target=gc)
    thread.start()
    assert stands.wait(60)
    time.sleep(1.1 if shelf.uri.startswith("s3") else 0.01)  # S3 tells when something was written to the second
    version = shelf.publish("run-b")
    goes.set()
    thread.join()
    return version, raised[0] if raised else None


@pytest.mark.parametrize("when", ["before the claim", "after the claim"])
def test_a_blob_that_gc_deletes_while_a_publisher_uses_it_again_is_sent_again(tmp_path, server, monkeypatch, when):
    shelf = Shelf(tmp_path, server)
    version, raised = meeting(shelf, monkeypatch, when)
    assert version.number == 2 and shelf.registry.verify(version) == 4
    assert raised is None or (isinstance(raised, Conflict) and when == "after the claim" and shelf.uri.startswith("s3"))  # not mended yet
    assert any(method == "DELETE" for method, _ in server.requests), "gc came to it"


def test_a_blob_that_gc_deletes_when_its_publisher_has_ended_is_kept_by_the_store_or_told(tmp_path, server, monkeypatch):
    shelf = Shelf(tmp_path, server)
    version, raised = meeting(shelf, monkeypatch, "at last")
    if shelf.uri.startswith("gs"):
        assert raised is None and shelf.registry.verify(version) == 4
    else:
        assert isinstance(raised, Conflict) and "quickstart:2 was published at this moment" in str(raised)


def test_a_blob_that_was_made_new_after_gc_listed_it_is_not_deleted(tmp_path, server):
    shelf = Shelf(tmp_path, server)
    gone = shelf.publish("run-a")
    remove(shelf.registry, gone)
    files = shelf.registry.files
    listed = list(files.debris([], [], set()))
    assert len(listed) == 5
    time.sleep(1.1)
    files.put(listed[0].path, b"anew")
    assert [files.drop(each) for each in listed] == [False, True, True, True, True]
    assert shelf.blobs() == [listed[0].path]
    assert files.drop(listed[1]), "what is gone is gone"


def test_a_blob_that_gc_deletes_before_it_is_made_new_is_sent(tmp_path, server, monkeypatch):
    shelf = Shelf(tmp_path, server)
    remove(shelf.registry, shelf.publish("run-a"))
    now, refresh = time.time(), ObjectFiles.refresh
    monkeypatch.setattr("orchestrator.registry_objects.time.time", lambda: now + 48 * 3600)
    monkeypatch.setattr(ObjectFiles, "refresh", lambda files, path, *more: (files.delete(path), refresh(files, path, *more)))
    assert shelf.registry.verify(shelf.publish("run-b")) == 4
