"""Manifests, checksums, events and names written in bad faith: the registry's commands refuse in one line, and touch nothing."""

import contextlib
import hashlib
import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.cli import main
from orchestrator.promotion import promote
from orchestrator.registry import Registry
from tests import mixtures
from workers.contracts import InputError

NASTY = [
    "../../outside",
    "/etc/passwd",
    "..",
    ".",
    "a/../../b",
    "a\\b",
    "a\x00b",
    "\x1b[2J",
    "a\nb",
    "x" * 300,
    "config.json/x",
    "-o",
    "\ud800",
]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from([*NASTY, 10**400, -1, 0, 1e308, float("nan"), float("inf")]),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3))
)
COMMANDS = (
    ("list",),
    ("show", "quickstart:1"),
    ("show", "quickstart:1", "--json"),
    ("verify", "quickstart:1"),
    ("diff", "quickstart:1", "quickstart:2"),
    ("diff", "quickstart:2", "quickstart:1", "--json"),
    ("lineage", "quickstart:1"),
    ("pull", "quickstart:1", "--out", "copy"),
    ("promote", "quickstart:1", "--require", "paired_mse_delta<=0"),
    ("history", "quickstart"),
    ("gc", "--keep-aliased", "--dry-run"),
)
each_count = pytest.mark.parametrize("count", [30, pytest.param(1000, marks=pytest.mark.slow)])


def examples(count: int):
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=quiet)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Two versions, one of them the champion, and a file outside of the registry."""
    folder = tmp_path / "folder"
    registry = Registry(folder / "registry")
    for run in ("run-a", "run-b"):
        registry.publish("quickstart", mixtures.manifest(run), mixtures.folder(tmp_path / run, own=run.encode()))
    promote(registry, registry.resolve("quickstart:2"), "champion")
    (folder / "outside").write_text("secret")
    monkeypatch.chdir(folder)
    return folder


def refused_or_done(arguments) -> int:
    """The exit code, after seeing that there is no traceback and at most one line of refusal."""
    done = CliRunner().invoke(main, ["registry", *arguments], catch_exceptions=False)
    assert done.exit_code in (0, 1, 2, 4), (arguments, done.output)
    if done.exit_code == 2 and "Usage:" in done.stderr:
        return done.exit_code  # click's own words for an argument that is none
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == (done.exit_code != 0), (arguments, done.stderr)
    assert len(done.stderr.splitlines()) <= 1 + sum("  file " in line for line in done.stderr.splitlines()), (arguments, done.stderr)
    assert all(c.isprintable() or c == "\n" for c in done.output.replace("\t", " ")), (arguments, done.output)
    assert "secret" not in done.output
    return done.exit_code


def outside(folder: Path) -> dict:
    return {path: content for path, content in mixtures.tree(folder).items() if not path.startswith(("registry", "copy"))}


def write(folder: Path, page: bytes, sums: bytes | None = None) -> None:
    """Replace the manifest of the first version, with checksums that fit it, as an attacker would."""
    version = folder / "registry" / "quickstart" / "1"
    if sums is None:
        files = {}
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):
            files = {str(path): str(digest) for path, digest in json.loads(page)["files"].items()}
        lines = [f"{digest}  {path}\n" for path, digest in {**files, "manifest.json": hashlib.sha256(page).hexdigest()}.items()]
        sums = "".join(lines).encode("utf-8", "surrogatepass")
    for name, content in (("manifest.json", page), ("SHA256SUMS", sums)):
        (version / name).unlink()
        (version / name).write_bytes(content)


@st.composite
def edits(draw, page: dict):
    """The page with one to three values replaced, keys removed or added, anywhere in it."""
    page = json.loads(json.dumps(page))
    for _ in range(draw(st.integers(1, 3))):
        here, key = {"": page}, ""
        while isinstance(here[key], (dict, list)) and here[key] and (key == "" or draw(st.integers(0, 3))):
            here = here[key]
            key = draw(st.sampled_from(sorted(here))) if isinstance(here, dict) else draw(st.integers(0, len(here) - 1))
        action = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if action == "replace":
            here[key] = draw(VALUES)
        elif action == "remove" and key != "":
            del here[key]
        elif action == "add" and isinstance(here, dict):
            here[draw(st.one_of(st.sampled_from(NASTY), st.text(max_size=8)))] = draw(VALUES)
        page = here[""] if "" in here and key == "" else page
        if not isinstance(page, dict):
            break
    return page


def run_all(folder: Path) -> set[int]:
    before = outside(folder)
    codes = {refused_or_done(command) for command in COMMANDS}
    shutil.rmtree(folder / "copy", ignore_errors=True)
    assert outside(folder) == before
    with contextlib.suppress(FileNotFoundError):  # a promotion that was not refused
        shutil.rmtree(folder / "registry" / "quickstart" / ".aliases" / "champion" / "2")
    return codes


@each_count
def test_edited_manifests_meet_only_clean_refusals(here, count):
    good = json.loads((here / "registry" / "quickstart" / "1" / "manifest.json").read_bytes())
    seen = set()

    @given(page=edits(good))
    @examples(count)
    def check(page):
        write(here, json.dumps(page).encode())
        seen.update(run_all(here))

    check()
    assert {0, 4} <= seen


@each_count
def test_manifests_and_checksums_of_any_bytes_meet_only_clean_refusals(here, count):
    @given(page=st.binary(max_size=60), sums=st.binary(max_size=200))
    @examples(count // 3)
    def check(page, sums):
        write(here, page, sums)
        assert 4 in run_all(here)

    check()
    for page in (b"[" * 100_000, b"1" * 5000, b'{"a":' * 50_000, b"null", b"{}"):
        write(here, page)
        assert 4 in run_all(here)


@pytest.mark.parametrize("path", [path for path in NASTY if path != "\ud800"])
@pytest.mark.parametrize("digest", ["true", "../../outside", ""])
def test_paths_in_a_manifest_lead_nowhere(here, path, digest):
    page = json.loads((here / "registry" / "quickstart" / "1" / "manifest.json").read_bytes())
    page["files"][path] = hashlib.sha256(b"secret").hexdigest() if digest == "true" else digest
    write(here, json.dumps(page).encode())
    assert refused_or_done(("verify", "quickstart:1")) == 4
    assert refused_or_done(("pull", "quickstart:1", "--out", "copy")) == 4
    assert not (here / "copy").exists() and (here / "outside").read_text() == "secret"


@pytest.mark.parametrize("shard", ["../../../outside", "/etc/passwd", "model-00003-of-00002.safetensors", 7, None])
def test_an_index_of_shards_names_only_files_of_its_version(here, shard):
    source = mixtures.folder(here / "source", own=b"c")
    weights = {"a": "model-00001-of-00002.safetensors", "b": shard}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    Registry(here / "registry").publish("quickstart", mixtures.manifest("run-c"), source)
    assert refused_or_done(("verify", "quickstart:3")) == 4
    assert refused_or_done(("promote", "quickstart:3")) == 4


@each_count
def test_events_of_an_alias_that_are_none_meet_only_clean_refusals(here, count):
    event = here / "registry" / "quickstart" / ".aliases" / "champion" / "1" / "event.json"
    good = json.loads(event.read_bytes())

    @given(page=st.one_of(edits(good).map(lambda page: json.dumps(page).encode()), st.binary(max_size=60)))
    @examples(count)
    def check(page):
        event.unlink()
        event.write_bytes(page)
        for command in (
            ("list",),
            ("history", "quickstart"),
            ("show", "quickstart@champion"),
            ("lineage", "quickstart"),
            ("gc", "--dry-run"),
        ):
            refused_or_done(command)
        for command in (("rollback", "quickstart"), ("promote", "quickstart:1", "--expect", "none"), ("rm", "quickstart:2")):
            code = refused_or_done(command)
            if code == 0:  # it was an event after all: begin again
                shutil.rmtree(here / "registry" / "quickstart" / ".aliases")
                event.parent.mkdir(parents=True)
                event.write_bytes(page)
                (here / "registry" / "quickstart" / "2" / "REMOVED").unlink(missing_ok=True)

    check()


TEXT = st.one_of(st.text(max_size=30), st.sampled_from(NASTY[:-1]), st.from_regex(r"[a-z:@0-9./-]{1,12}", fullmatch=True))
NAMES = st.one_of(TEXT, st.tuples(TEXT, st.sampled_from(":@"), TEXT).map("".join), TEXT.map(lambda text: f"quickstart@{text}"))


@each_count
def test_names_of_any_letters_meet_only_clean_refusals(here, count):
    before = mixtures.tree(here)

    @given(name=NAMES, other=TEXT)
    @examples(count * 2)
    def check(name, other):
        for command in (
            ("list", name),
            ("show", name),
            ("verify", name, "--hashes-only"),
            ("diff", name, "quickstart"),
            ("lineage", name),
            ("history", name),
            ("rollback", f"nothing{name}"),
            ("promote", f"quickstart:7{name}", other),
            ("promote", "quickstart:1", f"Z{other}"),
            ("promote", "quickstart:1", "staging", "--require", f"{other}<=1"),
            ("promote", "quickstart:1", "staging", "--expect", other or "x"),
            ("rm", f"nothing{name}"),
            ("gc", f"nothing{name}"),
            ("pull", f"nothing{name}", "--out", "copy"),
            ("list", "--registry", f"nowhere/{other}"),
        ):
            if "\x00" not in "".join(command) and not any("\ud800" <= c <= "\udfff" for c in "".join(command)):
                refused_or_done(command)
        for uri in (f"s3://{name}", f"s3://bucket/{name}", f"gs://{name}/../x?{other}=1", f"S3:/{other}?region={name}"):
            with contextlib.suppress(InputError):
                assert Registry(uri).files.uri("a").startswith(("s3://", "gs://"))  # asks no store
        shutil.rmtree(here / "registry" / "quickstart" / ".aliases" / "staging", ignore_errors=True)

    check()
    assert mixtures.tree(here) == before
