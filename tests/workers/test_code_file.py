"""The file that travels: whole, cut from the sources as they stand, and the same every time."""

from __future__ import annotations

import ast
import builtins
import re
from pathlib import Path

import pytest

from workers.code_file import REPLACED, Place, code_file, needed

ROOT = Path(__file__).parents[2]
CLASSES = [
    ("workers.mixture", "MixtureDenoiser"),
    ("workers.conditioning", "ClassEmbedder"),
    ("workers.ldm_pipeline", "ClassConditionalLDMPipeline"),
]


@pytest.fixture(params=CLASSES, ids=lambda found: found[1])
def place(request) -> Place:
    return Place(*request.param)


def test_it_imports_nothing_of_this_package_and_the_same_sources_give_the_same_text(place):
    text = code_file(place.module, place.name, "1.2.3")
    assert text == code_file(place.module, place.name, "1.2.3") and "diffpruning 1.2.3" in text
    imported = {
        name.partition(".")[0]
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert imported and not imported & {"workers", "orchestrator", "jobs"}


def test_every_name_that_it_uses_is_defined_in_it(place):
    nodes = list(ast.walk(ast.parse(code_file(place.module, place.name, "0"))))
    imports = [node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))]
    bound = {alias.asname or alias.name.partition(".")[0] for node in imports for alias in node.names}
    bound |= {n.name for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.ExceptHandler)) and n.name}
    bound |= {n.arg for n in nodes if isinstance(n, ast.arg)}
    bound |= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    used = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    assert used and not used - bound - set(dir(builtins)) - {"__file__"}


def definitions(text: str) -> dict[str, str]:
    """Functions and classes at the top level, without the names of modules of ours."""
    found = {n.name: ast.unparse(n) for n in ast.parse(text).body if isinstance(n, (ast.ClassDef, ast.FunctionDef))}
    return {name: re.sub(r"\b(families|unet2d|first_stage|pretrained)\.", "", body) for name, body in found.items()}


def test_its_functions_and_classes_are_those_of_the_sources(place):
    found = definitions(code_file(place.module, place.name, "0"))
    renamed = {"unet2d_model_class", "unet2d_sites", "unet2d_condition_model_class"}  # both families have these
    compared = 0
    for p in needed(place):
        path = ROOT.joinpath(*p.module.split("."))
        sources = definitions((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())
        if p not in REPLACED and p.name in sources and p.name in found:
            assert found[p.name] == sources[p.name]
            compared += 1
    assert compared == len(set(found) - renamed - {p.name for p in REPLACED})


def test_a_definition_comes_after_those_that_it_uses(place):
    order = needed(place)
    assert order[-1] == place and len(order) == len(set(order))
    names = [p.name for p in order]
    if place.name == "MixtureDenoiser":
        assert names.index("Record") < names.index("ElasticSite") < names.index("Branch") < names.index("extract")
        assert {"apply", "fold_context", "merge_one_head", "fuse_qkv", "transpose_upsample", "Residency"} <= set(names)
        assert not {"ElasticDenoiser", "gated", "importance_order", "_decode"} & set(names), "what training needs stays at home"
