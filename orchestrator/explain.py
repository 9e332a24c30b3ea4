"""What is wrong with a job file: pydantic's mistakes as one line, each with its key, the value, and what would be right."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 200
_SHORT.maxlist = _SHORT.maxdict = 20


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """One line for all mistakes found in what was to become ``model``."""
    lines: dict[str, str] = {}
    for mistake in error.errors():
        place = [_word(part) for part in mistake["loc"] if not _is_union_tag(part)]
        key = ".".join(place)
        if mistake["type"] == "extra_forbidden":
            known = _keys_at(model, place[:-1])
            near = difflib.get_close_matches(place[-1], known, n=1)
            lines.setdefault(key, f"unknown key {key}" + (f": did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"))
        elif mistake["type"] == "missing":
            lines.setdefault(key, f"missing key {key}")
        else:
            text = mistake["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
            text = "must be a mapping of keys to values" if mistake["type"] in ("model_type", "dict_type") else text
            lines[key] = f"{key} is {_SHORT.repr(mistake['input'])}: {text}" if key not in lines else f"{lines[key]}, or {text}"
    return "; ".join(lines.values())


def _word(part: int | str) -> str:
    """A part of a key as it is written, in one line; of an odd one, its beginning."""
    text = str(part)
    return text if text.isprintable() and len(text) <= 100 else _SHORT.repr(text)


def _is_union_tag(part: int | str) -> bool:
    return isinstance(part, str) and (part in ("constrained-int", "int") or part.startswith(("literal[", "list[")))


def _keys_at(model: type[BaseModel], place: Sequence[str]) -> list[str]:
    """The keys of the section at ``place``; a number is an item of a list of sections."""
    for part in place:
        if part.isdecimal():
            continue
        if part not in model.model_fields:
            return []
        kind: Any = model.model_fields[part].annotation
        model = next((k for k in (kind, *get_args(kind)) if isinstance(k, type) and issubclass(k, BaseModel)), model)
    return list(model.model_fields)
