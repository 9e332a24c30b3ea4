"""Who publishes, promotes or removes is killed at every write, and fifty are at it at once: nobody sees half a version; none is lost."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orchestrator import aliases
from orchestrator.registry import Registry
from orchestrator.registry_clean import clean
from tests import mixtures

ROOT = Path(__file__).parents[2]

# --- killed at every write ------------------------------------------------------------------------------------------

KILLED_AT_EVERY_WRITE = """
import os, shutil, signal, sys
from pathlib import Path
from orchestrator.promotion import promote
from orchestrator.registry import Registry
from orchestrator.registry_files import REMOVED, SUMS
from orchestrator.registry_clean import clean, removable, remove
from tests import mixtures

root, source, what = sys.argv[1:]
WRITES = {"os.rename", "os.link", "os.mkdir", "os.chmod", "os.remove", "os.rmdir", "os.utime", "shutil.copyfile", "shutil.rmtree"}

def child(number, registry):
    count = 0

    def kill(event, arguments):
        nonlocal count
        if event in WRITES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(kill)
    if what == "publish":
        registry.publish("quickstart", mixtures.manifest("run-b"), Path(source))
    elif what.startswith("rm"):
        remove(registry, registry.resolve("quickstart:1"))
    elif what.startswith("gc"):
        clean(registry, keep_last=1, grace_hours=0)
    else:
        promote(registry, registry.resolve("quickstart:1"), "champion")
    os._exit(0)

for number in range(1, 1000):
    registry = Registry(shutil.copytree(root, f"{root}-{number}"))
    if not (process := os.fork()):
        child(number, registry)
    status = os.waitpid(process, 0)[1]
    found = registry.aliases_of("quickstart") if what == "promote" else registry.versions()
    assert [registry.verify(version) for version in registry.versions()] == [4] * len(registry.versions())
    gone = not any(version.number == 1 for version in registry.versions())
    if what.endswith("then rm") and (registry.half_removed() or not gone):
        remove(registry, removable(registry, "quickstart:1"))
        assert not registry.half_removed() and REMOVED in registry.files.names("quickstart/1")
    left = len(clean(registry, grace_hours=0).debris)
    assert not registry.half_removed() and (not gone or registry.files.names("quickstart/1") == sorted([REMOVED, SUMS]))
    hidden = [path for path in registry.root.rglob(".*") if path.name not in (".blobs", ".aliases")]
    hashes = {digest for version in registry.versions() for digest in version.manifest().files.values()}
    assert not hidden and set(registry.files.names(".blobs")) <= hashes, (hidden, registry.files.names(".blobs"))
    print(number, status, len(found), left, flush=True)
    if status == 0:
        break
"""


def killed_at_every_write(tmp_path: Path, what: str) -> list[list[int]]:
    """Rows (write that was not done, exit status, versions or aliases seen, what gc freed) until it is killed no more."""
    source = mixtures.folder(tmp_path / "source", own=b"b", shared=b"other")
    registry = Registry(tmp_path / "registry")
    registry.publish("quickstart", mixtures.manifest("run-a"), mixtures.folder(tmp_path / "first"))
    if what not in ("publish", "promote"):
        registry.publish("quickstart", mixtures.manifest("run-b"), source)
    command = [sys.executable, "-c", KILLED_AT_EVERY_WRITE, tmp_path / "registry", source, what]
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    return [[int(word) for word in line.split()] for line in done.stdout.splitlines()]


def test_a_publisher_killed_at_any_write_leaves_no_visible_version_and_gc_cleans_up(tmp_path):
    rows = killed_at_every_write(tmp_path, "publish")
    unseen = [row for row in rows if row[2] == 1]
    assert len(unseen) > 20 and {status for _, status, _, _ in unseen} == {signal.SIGKILL}
    assert sum(left > 0 for _, _, _, left in unseen) > 20, "there was something to clean up"
    # after the rename nothing is left to write but the removal of a temporary name that is gone, so the version is there, and whole
    assert {seen for _, _, seen, _ in rows[len(unseen) :]} == {2} and rows[-1][1] == 0


def test_a_promotion_killed_at_any_write_moves_the_alias_or_does_not(tmp_path):
    rows = killed_at_every_write(tmp_path, "promote")
    assert len(rows) > 3
    assert [seen for _, _, seen, _ in rows] == sorted(seen for _, _, seen, _ in rows) and {rows[0][2], rows[-1][2]} == {0, 1}


@pytest.mark.parametrize("what", ["rm", "rm, then rm", "gc", "gc, then rm"])
def test_a_removal_killed_at_any_write_hides_the_version_or_does_not_and_what_comes_next_finishes_it(tmp_path, what):
    rows = killed_at_every_write(tmp_path, what)
    seen = [seen for _, _, seen, _ in rows]
    assert len(rows) > 10 and seen == sorted(seen, reverse=True) and {seen[0], seen[-1]} == {1, 2}
    assert sum(row[2] == 1 and row[1] == signal.SIGKILL for row in rows) > 5, "it was killed while the files went"


PUBLISH = """
import sys
from pathlib import Path
from orchestrator.registry import Registry
from tests import mixtures
Registry(sys.argv[1]).publish("quickstart", mixtures.manifest("run-b"), Path(sys.argv[2]))
"""


@pytest.mark.slow
def test_a_publisher_to_a_bucket_killed_at_any_request_leaves_no_visible_version(tmp_path, server):
    source, outcomes = mixtures.folder(tmp_path / "source", own=b"b", shared=b"other"), []
    for moment in range(1, 100):
        server.on_write, uri = None, server.new_registry()
        registry = Registry(uri)
        registry.publish("quickstart", mixtures.manifest("run-a"), mixtures.folder(tmp_path / "first"))
        command = [sys.executable, "-c", PUBLISH, uri, str(source)]
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
        moments = itertools.count(1)

        def kill(when: str, process=process, moments=moments, moment=moment) -> bool:
            if is_now := next(moments) == moment:
                process.send_signal(signal.SIGKILL)
                process.wait()
            return is_now  # before it is carried out, the request goes with its sender; else it would depend on how fast it was sent

        server.on_write = kill
        status = process.wait()
        server.on_write = None
        versions = registry.versions()
        assert [registry.verify(version) for version in versions] == [4] * len(versions)
        outcomes.append((status, len(versions)))
        clean(registry, grace_hours=0)
        needed = {digest for version in versions for digest in version.sums().values()}
        assert {path.removeprefix(".blobs/") for path in server.keys(uri) if path.startswith(".blobs/")} == needed
        assert [registry.verify(version) for version in versions] == [4] * len(versions)
        if status == 0:
            break
    print(f"\nkilled at {len(outcomes) - 1} moments; a version was seen after {sum(seen == 2 for _, seen in outcomes[:-1])} of them")
    assert len(outcomes) > 8
    assert outcomes == [(-signal.SIGKILL, 1)] * (len(outcomes) - 2) + [(-signal.SIGKILL, 2), (0, 2)]  # the last write is the version


# --- many at once ---------------------------------------------------------------------------------------------------

WORKER = """
import json, sys, time
from pathlib import Path
from orchestrator import aliases
from orchestrator.promotion import promote
from orchestrator.registry import Registry
from tests import mixtures

uri, source, number, go = sys.argv[1:]
registry = Registry(uri)
print("ready", flush=True)
while not Path(go).exists():
    time.sleep(0.01)
own = mixtures.folder(Path(source) / number, own=number.encode())
version = registry.publish("quickstart", mixtures.manifest(f"run-{number}"), own)
promoted, conflicts = [], 0
for _ in range(3):
    try:
        if event := promote(registry, version, "champion"):
            promoted.append(event.number)
    except aliases.Conflict as error:
        assert "conflict: quickstart@champion was expected to name" in str(error), error
        conflicts += 1
print(json.dumps({"version": version.number, "promoted": promoted, "conflicts": conflicts}))
"""

READER = """
import json, random, sys, time
from pathlib import Path
from orchestrator.registry import Registry
from workers.contracts import InputError

uri, stop = sys.argv[1:]
registry, reads = Registry(uri), 0
while not Path(stop).exists():
    versions = registry.versions()
    for version in random.sample(versions, min(3, len(versions))):
        assert registry.verify(version) == 4
        reads += 1
    assert [version.number for version in versions] == list(range(1, len(versions) + 1)), versions
    try:
        assert registry.verify(registry.resolve("quickstart@champion")) == 4
        reads += 1
    except InputError as error:
        assert type(error) is InputError and "has no" in str(error), error
    time.sleep(0.02)
print(json.dumps({"reads": reads}))
"""


def crowd(uri: str, tmp_path: Path, workers: int, readers: int, timeout_s: float) -> tuple[list[dict], list[dict]]:
    go, stop = tmp_path / "go", tmp_path / "stop"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def start(code: str, *arguments: object) -> subprocess.Popen:
        command = [sys.executable, "-c", code, *map(str, arguments)]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    processes = [start(WORKER, uri, tmp_path / "sources", number, go) for number in range(workers)]
    watching = [start(READER, uri, stop) for _ in range(readers)]
    try:
        for process in processes:
            assert process.stdout.readline() == "ready\n", process.stderr.read()
        go.touch()
        deadline = time.monotonic() + timeout_s
        made = [process.communicate(timeout=deadline - time.monotonic()) for process in processes]
        stop.touch()
        read = [process.communicate(timeout=timeout_s) for process in watching]
    finally:
        for process in [*processes, *watching]:
            process.kill()
            process.wait()
    assert [process.returncode for process in [*processes, *watching]] == [0] * (workers + readers), [e for _, e in made + read if e]
    return [json.loads(out.splitlines()[-1]) for out, _ in made], [json.loads(out) for out, _ in read]


def check_crowd(uri: str, made: list[dict], read: list[dict], workers: int, kind: str) -> None:
    registry = Registry(uri)
    versions = registry.versions("quickstart")
    events = aliases.history(registry.files, "quickstart", "champion")
    promoted = sorted(number for each in made for number in each["promoted"])
    conflicts = sum(each["conflicts"] for each in made)
    print(
        f"\n{kind}: {workers} publishers and promoters: {len(versions)} versions, {workers - len(versions)} lost; "
        f"{len(promoted)} promotions, {conflicts} conflicts; {sum(each['reads'] for each in read)} versions read meanwhile, 0 torn"
    )
    assert sorted(each["version"] for each in made) == [version.number for version in versions] == list(range(1, workers + 1))
    assert [registry.verify(version) for version in versions] == [4] * workers
    assert {version.manifest().provenance.fingerprint for version in versions} == {f"run-{number}" for number in range(workers)}
    assert [event.number for event in events] == promoted == list(range(1, len(events) + 1))
    assert [event.previous for event in events] == [None, *(event.version for event in events[:-1])]
    # one who promotes again what the alias names already neither moves it nor conflicts
    assert len(promoted) >= 1 and len(promoted) + conflicts <= 3 * workers
    assert registry.resolve("quickstart@champion").number == events[-1].version
    assert sum(path.startswith(".blobs/") for path in blobs(registry)) <= 3 + workers * (1 if registry.is_local else 2)


def blobs(registry: Registry) -> list[str]:
    return [f".blobs/{name}" for name in registry.files.names(".blobs")]


def shared(kind: str, tmp_path: Path, request) -> str:
    """The URI of a registry; a bucket is busy with others now and then, or loses its answer."""
    if kind == "local":
        return str(tmp_path / "registry")
    server = request.getfixturevalue({"s3": "s3", "gs": "gcs"}[kind])
    server.faults = itertools.cycle(["", "", "busy", "", "lost", "", "busy after"])
    return server.new_registry()


@pytest.mark.parametrize("kind", ["local", pytest.param("s3", marks=pytest.mark.slow), pytest.param("gs", marks=pytest.mark.slow)])
def test_six_publish_and_promote_at_once_and_nothing_is_lost(tmp_path, kind, request):
    uri = shared(kind, tmp_path, request)
    made, read = crowd(uri, tmp_path, 6, 1, 300)
    check_crowd(uri, made, read, 6, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["local", "s3"])
def test_fifty_publish_and_promote_at_once_and_nothing_is_lost(tmp_path, kind, request):
    uri = shared(kind, tmp_path, request)
    made, read = crowd(uri, tmp_path, 50, 4, 1500)
    check_crowd(uri, made, read, 50, kind)
    assert sum(each["conflicts"] for each in made) > 0, "they met"
