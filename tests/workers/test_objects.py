"""What a store of either kind promises: of who creates an object, one is told that it is theirs; a file is there whole or not at all."""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from workers import objects_gcs
from workers.contracts import RunFailed
from workers.objects import Found, ObjectStore, hidden

ROOT = Path(__file__).parents[2]


@pytest.fixture
def store(server, monkeypatch) -> ObjectStore:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    return ObjectStore.of(server.new_registry(), "registry")


def content(store: ObjectStore, path: str = "a/1") -> bytes:
    return b"".join(store.chunks(path))


# --- created once -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "faults",
    [["busy"], ["busy after"], ["lost"], ["busy", "lost"], ["busy", "busy after"], ["busy"] * 7],
    ids=lambda faults: f"{len(faults)} times, {faults[-1]} last",
)
def test_an_object_is_its_makers_after_whatever_was_answered_and_no_one_else_s(store, server, faults):
    server.faults = itertools.chain(faults, itertools.repeat(""))
    assert store.create("a/1", b"mine") and content(store) == b"mine"
    server.faults = itertools.chain(faults, itertools.repeat(""))
    assert not store.create("a/1", b"theirs") and content(store) == b"mine"


def test_of_many_who_create_an_object_at_once_one_is_told_that_it_is_theirs(server):
    uri, gate, told = server.new_registry(), threading.Barrier(8), []

    def create(who: int) -> None:
        store = ObjectStore.of(uri, "registry")
        gate.wait()
        told.append((store.create("a/1", b"%d" % who), who))

    threads = [threading.Thread(target=create, args=(who,)) for who in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [(_, winner)] = [each for each in told if each[0]]
    assert len(told) == 8 and content(ObjectStore.of(uri, "registry")) == b"%d" % winner


def test_a_store_that_stays_busy_is_given_up_in_one_line(store, server, monkeypatch):
    monkeypatch.setattr(objects_gcs, "PATIENCE_S", 1)
    server.faults = itertools.repeat("busy")
    with pytest.raises(RunFailed, match="a/1.*(others are writing it all the time: run the same command again|429)") as caught:
        store.create("a/1", b"mine")
    assert "\n" not in str(caught.value)
    server.faults = itertools.repeat("")
    assert store.find("a/1") is None


def test_the_check_for_conditions_bears_busy_and_lost_answers(store, server):
    server.faults = itertools.cycle(["busy", "lost", "busy after"])
    store.require_conditions()


# --- found, listed, read, copied, deleted -----------------------------------------------------------------------------


def test_objects_are_found_listed_read_copied_and_deleted_by_their_names(store):
    before = time.time()
    for path in ("a/1", "a/b c/2", "a/ü%2F/3+?&", "ab"):
        store.put(path, path.encode())
    store.put("empty", b"")
    assert store.names("") == ["a", "ab", "empty"] and store.names("a") == ["1", "b c", "ü%2F"]
    assert set(store.listing()) == {"a/1", "a/b c/2", "a/ü%2F/3+?&", "ab", "empty"}
    assert set(store.listing("a")) == {"a/1", "a/b c/2", "a/ü%2F/3+?&"} and store.listing("b") == {} and store.names("b") == []
    for path, found in store.listing("a").items():
        assert content(store, path) == path.encode()
        assert found.size == len(path.encode()) and before - 2 < found.written < time.time() + 2
        assert store.find(path) == Found(found.size, pytest.approx(found.written, abs=1))
    assert (store.find("a"), store.find("b"), content(store, "empty")) == (None, None, b"")
    assert b"".join(store.chunks("a/b c/2", 4)) == b" c/2"[1:]
    assert b"".join(store.chunks("a/1", 3)) == b""
    store.copy("a/1", "c/1")
    assert content(store, "c/1") == b"a/1"
    store.delete("a/1"), store.delete("a/1")
    assert store.find("a/1") is None and content(store, "c/1") == b"a/1"
    with pytest.raises(FileNotFoundError, match="a/1.* is not there"):
        content(store)
    assert abs(store.now() - time.time()) < 2


def test_a_list_of_many_pages_is_whole(google, gcs):
    for i in range(250):
        gcs.put(google.uri(""), f"many/{i:03d}/x", b"")
    assert len(google.names("many")) == len(google.listing("many")) == 250


def test_an_object_that_is_made_new_is_newer_and_the_same(store, tmp_path):
    (tmp_path / "file").write_bytes(b"bytes")
    store.upload(tmp_path / "file", "a/1")
    before, deadline = store.find("a/1").written, time.monotonic() + 5
    while store.find("a/1").written == before and time.monotonic() < deadline:  # S3 tells whole seconds
        store.refresh("a/1", 5, tmp_path / "file")
    assert store.find("a/1").written > before and content(store) == b"bytes"


# --- whole or not at all ----------------------------------------------------------------------------------------------

CHUNK = 256 * 1024
"""The smallest part of an upload to Google Cloud Storage."""


@pytest.fixture
def big(tmp_path, monkeypatch) -> Path:
    """A file that goes in parts, being larger than what Google's library sends at once."""
    monkeypatch.setattr(objects_gcs, "CHUNK", 16 * CHUNK)
    (tmp_path / "big").write_bytes(os.urandom(9 << 20))
    return tmp_path / "big"


@pytest.fixture
def google(gcs, monkeypatch) -> ObjectStore:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(objects_gcs, "PATIENCE_S", 1)
    return ObjectStore.of(gcs.new_registry(), "registry")


def failing(*outcomes: bool):
    """For `Server.on_write`: which requests are lost on their way, one by one."""
    left = iter(outcomes)
    return lambda when: when == "before" and next(left)


def test_a_file_in_parts_is_whole_when_requests_were_lost_on_the_way(google, gcs, big):
    gcs.on_write = failing(True, False, False, True, True, False, True, False)
    google.upload(big, "a/1")
    assert content(google) == big.read_bytes()
    assert len(list(google.chunks("a/1"))) == 3 and b"".join(google.chunks("a/1", 5 << 20)) == big.read_bytes()[5 << 20 :]


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_a_file_of_which_not_all_parts_arrive_is_not_there_and_no_session_is_told(google, gcs, big, parts):
    gcs.on_write = failing(*[False] * parts, *[True] * 10_000)
    with pytest.raises(RunFailed) as caught:
        google.upload(big, "a/1")
    told = str(caught.value)
    assert "a/1" in told and "\n" not in told and "upload_id=" not in told.replace("upload_id=***", "")
    gcs.on_write = None
    assert google.find("a/1") is None and google.listing() == {}


def test_a_part_that_the_store_keeps_in_part_is_told_and_the_file_is_not_there(google, gcs, big):
    gcs.short = CHUNK
    with pytest.raises(RunFailed, match="a/1: .* was sent in part: .*: run the same command again"):
        google.upload(big, "a/1")
    assert google.find("a/1") is None


def test_a_sender_killed_between_two_parts_leaves_nothing(google, gcs, big):
    code = "import sys\nfrom pathlib import Path\nfrom workers import objects_gcs\nfrom workers.objects import ObjectStore\n"
    code += "objects_gcs.CHUNK = int(sys.argv[3])\nObjectStore.of(sys.argv[1], 'run').upload(Path(sys.argv[2]), 'a/1')"
    moments = itertools.count(1)

    def kill(when: str) -> bool:
        if is_now := next(moments) == 7:  # before the fourth request: begun, and two of three parts
            process.send_signal(signal.SIGKILL)
        return is_now

    gcs.on_write = kill
    process = subprocess.Popen([sys.executable, "-c", code, google.uri(""), str(big), str(16 * CHUNK)], cwd=ROOT)
    assert process.wait(60) == -signal.SIGKILL and next(moments) > 5
    gcs.on_write = None
    assert google.listing() == {}
    google.upload(big, "a/1")
    assert content(google) == big.read_bytes()


def test_a_file_that_is_replaced_while_it_is_read_is_told_and_never_mixed(google, big):
    google.upload(big, "a/1")
    chunks = google.chunks("a/1")
    next(chunks)
    google.put("a/1", b"other")
    with pytest.raises(RunFailed, match="No such object"):
        list(chunks)


# --- credentials ------------------------------------------------------------------------------------------------------


def test_a_session_s_name_is_a_credential():
    assert hidden("url: /o?uploadType=resumable&upload_id=ABC-d_e&x=1 (Caused") == "url: /o?uploadType=resumable&upload_id=***&x=1 (Caused"


@pytest.mark.parametrize("variable", [{}, {"STORAGE_EMULATOR_HOST": "127.0.0.1:9"}, {"STORAGE_EMULATOR_HOST": "http://127.0.0.1:9/"}])
def test_where_google_cloud_storage_is_and_who_asks_it(gcs, monkeypatch, variable):
    for name, value in variable.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", os.devnull)
    plain = ObjectStore.of("gs://bucket/x", "registry").kind
    assert plain.endpoint == ("http://127.0.0.1:9" if variable else None)
    named = ObjectStore.of("gs://bucket/x?endpoint_override=host:1", "registry").kind
    assert named.endpoint == "https://host:1"
    http = ObjectStore.of("gs://bucket/x?endpoint_override=host:1&scheme=http", "registry").kind
    assert http.endpoint == "http://host:1" and http._client.api_endpoint == "http://host:1"
    if not variable:  # credentials are for https alone
        with pytest.raises(RunFailed, match=r"gs://bucket/x.*: see that the bucket, endpoint_override and GOOGLE_APPLICATION_CREDENTIALS"):
            ObjectStore.of("gs://bucket/x?endpoint_override=host:1", "registry").listing()


def test_without_its_library_google_cloud_storage_says_what_to_install(gcs, monkeypatch):
    monkeypatch.setitem(sys.modules, "google.cloud.storage", None)
    store = ObjectStore.of(gcs.new_registry(), "registry")
    for use in (store.listing, lambda: store.put("a", b"")):
        with pytest.raises(RunFailed, match=r"^gs:// needs google-cloud-storage: pip install 'diffpruning\[gcs\]'$"):
            use()
