"""Job files, overrides and names written in bad faith: they are refused in one line with exit code 2, and nothing is written."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from orchestrator.cli import main
from orchestrator.config import JobConfig, load_job
from orchestrator.job_file import BUNDLED
from tests.mixtures import tree
from workers.contracts import InputError

QUICKSTART = yaml.safe_load((BUNDLED / "quickstart.yaml").read_text())
NASTY = [
    "a\nb",
    "a\x85b\u2028c",
    "\x1b[2J",
    "\x00",
    "x" * 300,
    "x/" * 3000,
    "~nobody/x",
    "~",
    "..",
    "s3://[",
    "s3://",
    "gs://a/../b?x=1",
    "://",
    "{",
    "*a",
    "&a [*a]",
    "!!timestamp x",
    "!!int ''",
    "!!bool x",
    "!!float x",
    "!!python/name:os.system",
    "2026-99-99",
    "0b",
    "1:99:99",
    ".inf",
    ".nan",
    "-1",
    "1e999",
    "=",
    "<<",
    "? [a]",
    "[" * 3000,
    "{a: " * 3000,
    "9" * 5000,
    "{<<: 1}",
    "&a [&b [*a, *b, *b], *a]",
]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from([*NASTY, 10**400, -1, 0, 1e308, float("nan"), float("inf")]),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3))
)
SECTIONS = {
    name: list(kind.model_fields)
    for name, field in JobConfig.model_fields.items()
    if isinstance(kind := field.annotation, type) and hasattr(kind, "model_fields")
}
KNOWN = [*JobConfig.model_fields, *(f"{section}.{key}" for section, keys in SECTIONS.items() for key in keys)]
KEYS = st.one_of(
    st.sampled_from([*KNOWN, "budgets.0.ratio", "budgets." + "9" * 5000, "extends", "budgets.0.ratio.x", "seed.x"]),
    st.text(max_size=12),
    st.tuples(st.sampled_from(KNOWN), st.sampled_from(NASTY)).map(".".join),
    st.sampled_from(NASTY),
)
each_count = pytest.mark.parametrize("count", [60, pytest.param(1500, marks=pytest.mark.slow)])


def examples(count: int) -> settings:
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    return settings(max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=quiet)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def taken(job: str, *overrides: str) -> bool:
    """Whether the job can be read; if not, after seeing that the command refuses it in one short line, with exit code 2."""
    with contextlib.suppress(InputError):
        load_job(job, overrides)
        return True
    words = [word for override in overrides for word in ("--set", override)]
    done = CliRunner().invoke(main, ["status", *words, "--", job], catch_exceptions=False)
    refused(done.exit_code, done.stderr, (job, overrides))
    return False


def refused(code: int, stderr: str, what: Any) -> None:
    assert code == 2, (what, code, stderr)
    lines = stderr.splitlines()
    if not stderr.startswith("Usage:"):  # click's own words
        assert len(lines) == 1 and lines[0].startswith("error: "), (what, stderr)
        assert len(lines[0]) < 20_000, (what, len(lines[0]))
        assert lines[0].isprintable(), (what, stderr)


@each_count
def test_overrides_of_any_kind_are_taken_or_refused(here, count):
    seen = {True: 0, False: 0}

    @given(key=KEYS, value=st.one_of(st.sampled_from(NASTY), st.text(max_size=20), VALUES.map(str)))
    @example("seed", "7")
    @example("seed", "[" * 3000)
    @example("seed", "9" * 5000)
    @example("a\nb", "1")
    @examples(count)
    def check(key: str, value: str) -> None:
        seen[taken("quickstart", f"{key}={value}")] += 1

    check()
    assert seen[True] and seen[False]
    assert tree(here) == {}


@st.composite
def edits(draw: st.DrawFn) -> Any:
    """The quickstart with one to three values replaced, removed or added, anywhere in it."""
    page = yaml.safe_load(yaml.safe_dump(QUICKSTART))
    for _ in range(draw(st.integers(1, 3))):
        here, key = page, draw(st.sampled_from(sorted(page)))
        while isinstance(here[key], (dict, list)) and here[key] and draw(st.integers(0, 3)):
            here = here[key]
            key = draw(st.sampled_from(sorted(here, key=str))) if isinstance(here, dict) else draw(st.integers(0, len(here) - 1))
        action = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if action == "replace":
            here[key] = draw(VALUES)
        elif action == "remove" and len(page) > 1:
            del here[key]
        elif isinstance(here, dict):
            here[draw(st.one_of(st.sampled_from(NASTY), st.text(max_size=8), st.sampled_from(["extends", *KNOWN])))] = draw(VALUES)
    return page


@each_count
def test_edited_job_files_are_taken_or_refused(here, count):
    file = here / "job.yaml"
    seen = {True: 0, False: 0}

    @given(page=edits())
    @example(QUICKSTART)
    @examples(count)
    def check(page: Any) -> None:
        file.write_text(yaml.safe_dump(page, allow_unicode=False))
        seen[taken(str(file))] += 1

    check()
    assert seen[True] and seen[False]
    assert set(tree(here)) == {"job.yaml"}


@each_count
def test_job_files_of_any_bytes_are_refused(here, count):
    file = here / "job.yaml"
    lines = st.lists(st.one_of(st.sampled_from(NASTY), st.text(max_size=20), st.sampled_from(KNOWN).map("{}: ".format)), max_size=6)
    based = st.tuples(st.just("extends: quickstart\n"), lines.map("\n".join)).map("".join)

    @given(
        content=st.one_of(
            st.binary(max_size=60), lines.map("\n".join).map(lambda text: text.encode("utf-8", "surrogatepass")), based.map(str.encode)
        )
    )
    @example(b"\xff\xfe")
    @example(b"a: &a [1]\nb: &b [*a, *a]\n" + b"".join(b"c%d: &c%d [*%s, *%s]\n" % (i, i, p, p) for i, p in _bomb(60)))
    @example(b"seed: " + b"&a [" + b"*a")
    @examples(count)
    def check(content: bytes) -> None:
        file.write_bytes(content)
        taken(str(file))

    check()
    assert set(tree(here)) == {"job.yaml"}


def _bomb(depth: int) -> list[tuple[int, bytes]]:
    """A few lines whose text, written out, has 2^depth values."""
    return [(i, b"b" if i == 0 else b"c%d" % (i - 1)) for i in range(depth)]


COMMANDS = (
    ("plan",),
    ("run",),
    ("status",),
    ("status", "--watch"),
    ("report",),
    ("encode",),
    ("sweep",),
    ("profile",),
    ("evaluate",),
    ("analyze",),
    ("results",),
    ("submit", "--address", "http://127.0.0.1:1"),
    ("plan", "quickstart", "--simulate"),
    ("jobs", "logs", "--address"),
    ("run", "quickstart", "--only"),
    ("export",),
    ("sample",),
)


@each_count
def test_names_of_any_letters_are_refused(here, count):
    names = st.one_of(st.text(max_size=20), st.sampled_from(NASTY), st.sampled_from(NASTY).map("quickstart{}".format))

    @given(name=names)
    @examples(count // 10)
    def check(name: str) -> None:
        if "\x00" in name or any("\ud800" <= c <= "\udfff" for c in name) or not name.strip("./~"):
            return
        for command in COMMANDS:
            words = [*command, *(() if command[-1].startswith("--") and command[-1] != "--watch" else ("--",)), name]
            done = CliRunner().invoke(main, words, catch_exceptions=False)
            refused(done.exit_code, done.stderr, words)

    check()
    assert tree(here) == {}
