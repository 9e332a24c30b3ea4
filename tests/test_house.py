"""The house rules, read from the source: who may import what, what a file looks like, what starts without torch."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.config import load_job
from workers import names_in

ROOT = Path(__file__).parents[1]
PACKAGES = ("orchestrator", "workers", "jobs")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TEXTS = (".py", ".yaml", ".yml", ".toml", ".md", ".txt", ".html", ".json", ".cfg", ".sh", "")
RAY_SEAMS = {"orchestrator/ray_cluster.py", "orchestrator/ray_jobs.py", "workers/session.py"}
"""Inside a cluster as its driver, outside of it over HTTP (a submitter needs no cluster of its own, nor torch), and as its worker."""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(source: str, package: str) -> Iterator[str]:
    """Dotted names of every import statement, those inside functions included; relative ones made absolute."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def importers(*packages: str) -> set[str]:
    """The files that import one of the packages or anything inside it."""
    found = set()
    for path in SOURCES:
        names = imports(path.read_text(), name_of(path.parent).replace("/", "."))
        found |= {name_of(path) for name in names if name.split(".")[0] in packages}
    return found


def test_the_import_reader_sees_every_form_of_import():
    source = "import a.b as c\ndef f():\n    from d import e\n    from . import near\nif f:\n    from ..up import g"
    assert sorted(imports(source, "workers.families")) == ["a.b", "d.e", "workers.families.near", "workers.up.g"]


def test_there_is_source_to_check():
    assert {f"{package}/__init__.py" for package in PACKAGES} <= {name_of(path) for path in SOURCES}


def test_workers_import_neither_the_orchestrator_nor_jobs():
    assert not {name for name in importers("orchestrator", "jobs") if name.startswith("workers/")}


def test_nobody_imports_jobs():
    assert not importers("jobs")


def test_ray_is_imported_in_exactly_three_files():
    assert importers("ray") == RAY_SEAMS


def test_the_orchestrator_imports_no_tensor_library():
    assert not {name for name in importers("torch", "diffusers", "accelerate", "safetensors") if name.startswith("orchestrator/")}


def test_jobs_hold_no_code_but_a_package_marker():
    assert [name_of(path) for path in SOURCES if name_of(path).startswith("jobs/")] == ["jobs/__init__.py"]
    [marker] = ast.parse((ROOT / "jobs" / "__init__.py").read_text()).body
    assert isinstance(marker, ast.Expr)
    assert isinstance(marker.value, ast.Constant)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_file_opens_by_saying_what_it_answers_and_holds_one_idea(path):
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), "no docstring"
    assert len(text.splitlines()) <= 500, "two ideas: split it"
    assert path.name not in ("utils.py", "base.py", "helpers.py", "common.py")
    assert path.parent.name != "core"


@pytest.mark.parametrize(
    "code",
    [
        "import workers.contracts",
        "import orchestrator.cli",
        "import orchestrator.config",
        "import orchestrator.config; orchestrator.config.load_job('quickstart')",
        "import sys, runpy; sys.argv = ['diffpruning', '--help']\n"
        "try: runpy.run_module('orchestrator', run_name='__main__')\nexcept SystemExit as end: assert not end.code",
        "import sys, runpy; sys.argv = ['diffpruning', 'schema']\n"
        "try: runpy.run_module('orchestrator', run_name='__main__')\nexcept SystemExit as end: assert not end.code",
    ],
    ids=["contracts", "cli", "config", "load_job", "help", "schema"],
)
def test_it_starts_without_torch_ray_and_diffusers(code):
    heavy = "import json, sys; print('\\n' + json.dumps([m for m in ('torch', 'ray', 'diffusers', 'numpy') if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{heavy}"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == []


@pytest.mark.parametrize("folder", ["families", "similarity", "routers", "extractors"])
def test_the_names_of_an_extension_folder_are_its_files(folder):
    files = {path.stem for path in (ROOT / "workers" / folder).glob("*.py")} - {"__init__"}
    assert files
    assert set(names_in(folder)) == files


def test_a_job_accepts_every_name_of_an_extension_folder():
    for name in names_in("families"):
        assert load_job("quickstart", [f"model.family={name}"]).model.family == name
    for name in names_in("similarity"):
        assert load_job("quickstart", [f"similarity.measure={name}"]).similarity.measure == name
    for name in names_in("extractors"):
        assert load_job("quickstart", [f"evaluate.extractor={name}"]).evaluate.extractor == name
    assert load_job("quickstart", [f"router.agents={names_in('routers')}"]).router.agents == names_in("routers")


@pytest.mark.parametrize("path", sorted([*(ROOT / "jobs").glob("*.yaml"), *(ROOT / "jobs").glob("cifar10/*.yaml")]), ids=name_of)
def test_every_bundled_job_loads_and_opens_with_the_commands_that_use_it(path):
    assert load_job(str(path)).name
    comment = path.read_text().partition("\nname:")[0]
    assert comment.startswith("#")
    assert f"diffpruning run {path.relative_to(ROOT)}" in comment


def texts() -> Iterator[Path]:
    """Text files of the repository; what tools and runs leave behind is not followed, nor is a work tree's pointer to its clone."""
    for folder, below, files in os.walk(ROOT):
        below[:] = [name for name in below if not name.startswith(".") or name == ".ci"]
        below[:] = [name for name in below if not name.endswith((".egg-info", "__pycache__"))]
        if folder == str(ROOT):
            below[:] = [name for name in below if name not in ("runs", "registry", "build", "dist")]
        yield from (
            Path(folder, name) for name in files if Path(name).suffix in TEXTS and name != ".git"
        )  # a work tree's points to its clone


def test_no_text_file_names_a_place_on_the_machine_where_it_was_written():
    places = re.compile("|".join(rf"(?<![\w.<}}])/{place}/\w" for place in ("home", "root", "work", "Users")))
    read = {name_of(path): path.read_text(errors="replace") for path in texts()}
    assert {"pyproject.toml", "Makefile", "jobs/quickstart.yaml", "orchestrator/cli.py"} <= set(read)
    found = [f"{name}: {match.group()}" for name, text in read.items() for match in places.finditer(text)]
    assert not found


def test_every_job_file_is_part_of_the_package():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["jobs"]
    packaged = {path for pattern in patterns for path in (ROOT / "jobs").glob(pattern)}
    jobs = {path for path in (ROOT / "jobs").rglob("*.yaml") if path.parent.name != "kuberay"}
    assert not jobs - packaged
