"""Which code must travel with a mixture: one readable file, cut from the real sources definition by definition.

diffusers take one file per component from a folder (`trust_remote_code=True`), and it may import only what is installed. So the definitions
that a class needs are followed from name to name through the modules of `workers`, and written, as they stand, one after another. Two
are replaced, because they find their way at run time: the choice of a family (all of them are listed), and JSON, which loading never uses.
"""

from __future__ import annotations

import ast
import functools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workers import names_in

ROOT = Path(__file__).parent
HEADER = '''"""{what}

Cut from the sources of diffpruning {version}, definition by definition: the same for every {name} of that version.
Nothing is downloaded. Where diffpruning is installed, `import {module}` takes its place.
"""

from __future__ import annotations

{imports}
'''
FOOTER = """
# diffusers write the name of a class's module into model_index.json, and look for a file of that name when they load it
with open(__file__) as _file:
    {name}.code = _file.read()
{name}.__module__ = "{module}"
"""


@dataclass(frozen=True)
class Place:
    """A definition at the top level of a module; the module itself, if ``name`` is empty."""

    module: str
    name: str = ""


FAMILIES = Place(f"{ROOT.name}.families", "of_class")
FAMILY_PARTS = ("CLASS_NAMES", "model_class", "sites")
RECORD = Place(f"{ROOT.name}.records", "Record")
REPLACED = {
    FAMILIES: "def of_class(config: dict[str, Any]) -> Any:\n"
    '    """The family that builds the class of a denoiser\'s config."""\n'
    '    return next(family for family in FAMILIES if config["_class_name"] in family.CLASS_NAMES)\n',
    RECORD: 'class Record:\n    """A frozen dataclass, which diffpruning writes as JSON."""\n',
}
REPLACED_IMPORTS = ("from types import SimpleNamespace", "from typing import Any")


@dataclass(frozen=True)
class Source:
    """One module: its text, its definitions (of a constant: and the string under it), and where its other names come from."""

    lines: tuple[bytes, ...]
    definitions: dict[str, tuple[ast.stmt, ...]]
    ours: dict[str, Place]
    theirs: dict[str, str]
    """Names of other packages -> the statement that imports them."""


def _path(module: str) -> Path | None:
    """The file of a module of the package; None if there is none."""
    path = ROOT.parent.joinpath(*module.split("."))
    return next((file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()), None)


@functools.cache
def _read(module: str) -> Source:
    path = _path(module)
    assert path is not None, module
    text = path.read_bytes()
    body = ast.parse(text).body
    definitions: dict[str, tuple[ast.stmt, ...]] = {}
    ours: dict[str, Place] = {}
    theirs: dict[str, str] = {}
    for node, below in zip(body, [*body[1:], None], strict=True):
        for statement in node.body if isinstance(node, ast.If) else [node]:  # `if TYPE_CHECKING`
            if isinstance(statement, ast.Import):
                theirs |= {alias.asname or alias.name.partition(".")[0]: f"import {_text(alias)}" for alias in statement.names}
            elif isinstance(statement, ast.ImportFrom):
                for alias in statement.names:
                    whole = f"{statement.module}.{alias.name}"
                    if str(statement.module).partition(".")[0] != ROOT.name:
                        theirs[alias.asname or alias.name] = f"from {statement.module} import {_text(alias)}"
                    else:
                        ours[alias.asname or alias.name] = Place(whole) if _path(whole) else Place(str(statement.module), alias.name)
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            definitions[node.name] = (node,)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            said = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            definitions[ast.unparse(target)] = (node, below) if below is not None and said else (node,)
    return Source(tuple(text.splitlines(keepends=True)), definitions, ours, theirs)


def _text(alias: ast.alias) -> str:
    return f"{alias.name} as {alias.asname}" if alias.asname not in (None, alias.name) else alias.name


def _find(module: str, name: str) -> Place | None:
    """Where the ``name`` that a module uses is defined, after following those who only pass it on; None for other packages' names."""
    source = _read(module)
    if name in source.definitions:
        return Place(module, name)
    further = source.ours.get(name)
    return _find(further.module, further.name) if further is not None and further.name else further


def _uses(place: Place) -> Iterator[tuple[Any, Place]]:
    """Every place in a definition that names another of ours, as written (``name`` or ``module.name``), and what it names."""
    for statement in _read(place.module).definitions[place.name]:
        for node in ast.walk(statement):
            if isinstance(node, ast.Name):
                meant = _find(place.module, node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                owner = _find(place.module, node.value.id)
                meant = _find(owner.module, node.attr) if owner is not None and not owner.name else None
            else:
                continue
            if meant is not None and meant.name:
                yield node, meant


def _parts() -> list[list[Place]]:
    """Of every family, the definitions by which it builds and cuts its models."""
    found = [[_find(f"{FAMILIES.module}.{family}", part) for part in FAMILY_PARTS] for family in names_in("families")]
    return [[part for part in parts if part is not None] for parts in found]


def needed(root: Place) -> list[Place]:
    """All definitions that ``root`` needs, each after those that it uses; ``root`` last."""
    found: dict[Place, bool] = {}

    def follow(place: Place) -> None:
        if place in found:
            return
        found[place] = False
        if place == FAMILIES:
            others = [part for parts in _parts() for part in parts]
        else:
            others = [] if place in REPLACED else [meant for _, meant in _uses(place)]
        for other in others:
            follow(other)
        del found[place]  # to its end, behind what it uses
        found[place] = True

    follow(root)
    return list(found)


def code_file(module: str, name: str, version: str) -> str:
    """The text of a file that defines class ``name`` of ``module`` and needs none of this package. It is to be called ``{module}.py``."""
    places = needed(Place(module, name))
    count = Counter(place.name for place in places)
    names = {p: p.name if count[p.name] == 1 else f"{p.module.rpartition('.')[2]}_{p.name}" for p in places}
    imports: dict[str, str] = {}
    for place in places:
        source = _read(place.module)
        statements = () if place in REPLACED else source.definitions[place.name]
        used = {node.id for statement in statements for node in ast.walk(statement) if isinstance(node, ast.Name)}
        for used_name in sorted(used & source.theirs.keys()):
            statement = source.theirs[used_name]
            assert imports.setdefault(used_name, statement) == statement, f"{used_name} means two things: {statement}, {imports[used_name]}"
    lines = _joined({*imports.values(), *(REPLACED_IMPORTS if FAMILIES in places else ())})
    what = ast.get_docstring(ast.parse((_path(module) or ROOT).read_text()))
    head = HEADER.format(what=str(what).partition("\n")[0], version=version, name=name, module=module, imports="\n".join(lines))
    body = "\n\n".join(_definition(place, names) for place in places)
    return f"{head}\n\n{body}\n{FOOTER.format(name=name, module=module)}"


def _joined(imports: Iterable[str]) -> list[str]:
    """Import statements, those from one module on one line."""
    found: dict[str, list[str]] = {}
    for statement in sorted(imports, key=lambda line: (line.startswith("from"), line)):
        before, _, name = statement.rpartition(" import ")
        found.setdefault(before or statement, []).append(name)
    return [before if before.startswith("import") else f"{before} import {', '.join(names)}" for before, names in found.items()]


def _definition(place: Place, names: dict[Place, str]) -> str:
    """The text of one definition, under the names that definitions have in the file."""
    if place == FAMILIES:
        listed = [", ".join(f"{part}={names[p]}" for part, p in zip(FAMILY_PARTS, parts, strict=True)) for parts in _parts()]
        return "FAMILIES = (\n" + "".join(f"    SimpleNamespace({parts}),\n" for parts in listed) + ")\n\n\n" + REPLACED[place]
    if place in REPLACED:
        return REPLACED[place]
    statements = _read(place.module).definitions[place.name]
    first: Any = statements[0]
    start = min([first.lineno, *(decorator.lineno for decorator in getattr(first, "decorator_list", ()))]) - 1
    lines = list(_read(place.module).lines[start : statements[-1].end_lineno])
    for node, meant in sorted(_uses(place), key=lambda use: (use[0].lineno, use[0].col_offset), reverse=True):
        wanted = names[meant].encode()
        line = lines[node.lineno - 1 - start]
        lines[node.lineno - 1 - start] = line[: node.col_offset] + wanted + line[node.end_col_offset :]
    text = b"".join(lines).decode()
    if names[place] != place.name and not isinstance(first, (ast.Assign, ast.AnnAssign)):
        text = text.replace(f" {place.name}", f" {names[place]}", 1)
    return text
