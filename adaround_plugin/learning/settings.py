"""Settings as text: for a report, and to tell one run from another."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from types import BuiltinFunctionType, FunctionType
from typing import Any

from torch import Tensor

from adaround_plugin.digests import digest
from adaround_plugin.errors import InvalidOptionError

__all__ = ["state_of", "written_out"]

# how Python writes a class, and an object without a text of its own; the group is the name of the class
_NAMELESS = re.compile(r"<(?:class ')?(?:[\w<>]+\.)*(\w+)(?:'| object at 0x\w+)>")


def written_out(settings: Mapping[str, object]) -> dict[str, str]:
    """Settings as Python writes them, without addresses; what Python cannot write is the name of its type."""
    return {name: _NAMELESS.sub(r"\1", _text(value)) for name, value in settings.items()}


def _text(value: object) -> str:
    try:
        return repr(value)
    except Exception:
        # an object of the user's, somewhere inside
        if not is_dataclass(value):
            return type(value).__name__
        parts = (f"{one.name}={_text(getattr(value, one.name))}" for one in fields(value) if one.repr)
        return f"{type(value).__name__}({', '.join(parts)})"


def state_of(argument: str, value: object) -> str:
    """A digest of all that an object consists of, its type among it, but not of its code.

    Args:
        argument: what the object is passed as, for the error.
        value: anything that pickle could take apart; nothing is pickled.

    Raises:
        InvalidOptionError: it holds what is of this process alone, such as an open file.
    """
    try:
        return digest(_described(value, ()))
    except Exception as error:
        raise InvalidOptionError(
            argument,
            f"this {type(value).__name__} cannot be told from another one ({error})",
            "Let it hold numbers, texts, tensors and the like. Without checkpoint=, in one process, any will do.",
        ) from error


def _described(value: Any, path: tuple[int, ...]) -> str:
    """What an object consists of; `path` has the identities of the objects that it is a part of."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return repr(value)
    if isinstance(value, Tensor):
        return f"tensor {digest(value)}"
    if isinstance(value, type | BuiltinFunctionType):
        return _name(value)
    if id(value) in path:
        return f"part {path.index(id(value))}"
    parts: list[Any]
    if isinstance(value, FunctionType):
        name, parts = _name(value), [value.__defaults__, value.__kwdefaults__]
        parts += [cell.cell_contents for cell in value.__closure__ or ()]
    elif isinstance(value, list | tuple):
        name, parts = _name(type(value)), list(value)
    elif isinstance(value, dict):
        name, parts = "dict", list(value.items())
    elif isinstance(value, set | frozenset):
        return f"set {sorted(_described(one, path) for one in value)}"
    else:
        # how pickle makes it again: by its name, or by a function, its arguments, a state and items
        made = value.__reduce_ex__(4)
        whole = [made] if isinstance(made, str) else made
        name, parts = _name(type(value)), [list(one) if isinstance(one, Iterator) else one for one in whole]
    inner = (*path, id(value))
    return f"{name}({', '.join(_described(one, inner) for one in parts)})"


def _name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"
