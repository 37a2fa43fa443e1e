"""Plain data as JSON with the name and the version of its format, and read back: nothing but what was written so."""

from __future__ import annotations

import json
import types
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from adaround_plugin.errors import InvalidOptionError

__all__ = ["read", "written"]

_VERSION = 1

Kind = TypeVar("Kind")


def written(record: Any, name: str, indent: int | None) -> str:
    """The attributes of a dataclass as JSON, with the name of the format and its version.

    Args:
        record: of numbers, texts, lists, tuples, dicts by names, and dataclasses of these.
        name: of the format.
        indent: as of `json.dumps`.
    """
    return json.dumps({"format": name, "version": _VERSION, **asdict(record)}, indent=indent)


def read(text: str, kind: type[Kind], name: str) -> Kind:
    """The record that `written` wrote.

    Args:
        text: the JSON.
        kind: of the record.
        name: of the format.

    Raises:
        InvalidOptionError: no JSON, another format or version, or not the attributes of such a record.
    """
    try:
        data = json.loads(text)
    except (TypeError, ValueError) as error:
        raise InvalidOptionError(name, f"is not JSON ({error})", "Pass what to_json() wrote.") from None
    if not isinstance(data, dict) or data.get("format") != name:
        found = data.get("format") if isinstance(data, dict) else None
        raise InvalidOptionError(name, f"has the format {found!r}", f"Pass a file of the format {name!r}.")
    if data.get("version") != _VERSION:
        problem = f"has the version {data.get('version')!r}, which this one does not read"
        raise InvalidOptionError(name, problem, f"Read it with the version that wrote it (this one reads {_VERSION}).")
    values = {key: value for key, value in data.items() if key not in ("format", "version")}
    record: Kind = _made(values, kind, name)
    return record


def _made(value: Any, kind: Any, where: str) -> Any:
    """A value of JSON as one of a type."""
    if is_dataclass(kind) and isinstance(kind, type):
        return _dataclass(value, kind, where)
    origin, inner = get_origin(kind), get_args(kind)
    if origin is types.UnionType:
        if value is None and type(None) in inner:
            return None
        (kind,) = (one for one in inner if one is not type(None))
        return _made(value, kind, where)
    if origin in (list, tuple):
        if not isinstance(value, list):
            raise _wrong(where, value)
        of_each = inner[:1] * len(value) if origin is list or inner[-1] is Ellipsis else inner
        if len(of_each) != len(value):
            raise _wrong(where, value)
        parts = [_made(*one, f"{where}[{i}]") for i, one in enumerate(zip(value, of_each, strict=True))]
        return parts if origin is list else tuple(parts)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _wrong(where, value)
        return {key: _made(one, inner[1], f"{where}[{key!r}]") for key, one in value.items()}
    wanted = (int, float) if kind is float else kind
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):
        raise _wrong(where, value)
    return value


def _dataclass(value: Any, kind: type[Any], where: str) -> Any:
    """A dict as a dataclass that has exactly these attributes, but for those with a default."""
    hints = get_type_hints(kind)
    known = {one.name: one for one in fields(kind)}
    if not isinstance(value, Mapping) or not value.keys() <= known.keys():
        raise _wrong(where, value)
    for name, one in known.items():
        if name not in value and one.default is MISSING and one.default_factory is MISSING:
            raise InvalidOptionError(where, f"lacks {name!r}", "Pass what to_json() wrote.")
    return kind(**{name: _made(one, hints[name], f"{where}.{name}") for name, one in value.items()})


def _wrong(where: str, value: Any) -> InvalidOptionError:
    shown = repr(value)
    shown = shown if len(shown) < 60 else f"{shown[:60]}..."
    return InvalidOptionError(where, f"{shown} does not belong there", "Pass what to_json() wrote.")
