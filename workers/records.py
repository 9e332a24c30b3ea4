"""Frozen dataclasses as JSON, both ways, the key that does not fit, and what two of them differ in. Standard library only."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from workers.errors import InputError


class Record:
    """JSON both ways for frozen dataclasses: nested records, tuples, dicts, optionals; unknown keys are errors."""

    SCHEMA: ClassVar[int] = 1

    def to_json(self) -> dict[str, Any]:
        return {"schema": self.SCHEMA, **_encode(self)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Raises: InputError on a missing or unknown key, a value of the wrong kind, or another schema version."""
        if not isinstance(data, dict):
            raise InputError(f"{cls.__name__}: {data!r} is not an object")
        found = data.get("schema", cls.SCHEMA)
        if found != cls.SCHEMA:
            raise InputError(f"{cls.__name__}: schema {found} is not {cls.SCHEMA}: use the version of diffpruning that wrote it")
        return typing.cast(Self, _decode(cls, {key: value for key, value in data.items() if key != "schema"}, cls.__name__))

    def differences(self, wanted: Self) -> list[str]:
        """One text per field that differs: which, what it is here, and what is wanted."""
        return [f"{key} is {mine}, wanted {theirs}" for key, mine, theirs in differing(vars(self), vars(wanted))]


def differing(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(key, value found, value wanted) wherever these differ, as text; hashes are cut to 12 digits."""

    def text(value: Any) -> str:
        return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)

    keys = dict.fromkeys((*found, *wanted))
    return [(key, text(found.get(key)), text(wanted.get(key))) for key in keys if found.get(key) != wanted.get(key)]


def _encode(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [_encode(item) for item in value]
    if isinstance(value, dict):
        return {key: _encode(item) for key, item in value.items()}
    return value


_hints = functools.cache(typing.get_type_hints)


def _decode(kind: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        return _decode(next(arg for arg in args if arg is not type(None)), value, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise InputError(f"{where}: {value!r} is not a list")
        return tuple(_decode(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise InputError(f"{where}: {value!r} is not an object")
        return {str(key): _decode(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise InputError(f"{where}: {value!r} is not an object")
        declared = {f.name: f for f in dataclasses.fields(kind)}
        unknown = sorted(set(value) - set(declared))
        required = {n for n, f in declared.items() if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING}
        missing = sorted(required - set(value))
        if unknown or missing:
            odd = [f"{word} key {', '.join(keys)}" for word, keys in (("unknown", unknown), ("missing", missing)) if keys]
            raise InputError(f"{where}: {'; '.join(odd)}")
        hints = _hints(kind)
        return kind(**{key: _decode(hints[key], item, f"{where}.{key}") for key, item in value.items()})
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise InputError(f"{where}: {value!r} is not of type {kind.__name__}")
    return value
