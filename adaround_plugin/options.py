"""Checks of what a user sets: one for each kind of value, with one form of error."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from torch import distributed

from adaround_plugin.errors import InvalidOptionError

__all__ = [
    "check_alone",
    "check_bool",
    "check_choice",
    "check_integer",
    "check_mapping",
    "check_number",
    "check_seed",
    "check_solver",
    "named",
]

# what torch's generators take, with room for seeds that are counted up from one
_MOST_SEED = 2**62


def named(owner: object, name: str) -> tuple[str, Any]:
    """What errors call an attribute of an object, and its value."""
    return f"{type(owner).__name__}.{name}", getattr(owner, name)


def check_alone() -> None:
    """Raise `InvalidOptionError` where several processes would each find something else, from their own shards."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    if (processes := distributed.get_world_size()) > 1:
        raise InvalidOptionError(
            "torch.distributed",
            f"joins {processes} processes, of which each would find something else in its own data",
            "Do this in a process of its own, without a process group, save the result, and load it in the others.",
        )


def check_integer(argument: str, value: Any, least: int | None = None, most: int | None = None) -> None:
    """Raise `InvalidOptionError` unless `value` is an integer from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidOptionError(argument, f"{value!r} is not an integer", "Pass an integer.")
    if least is not None and value < least:
        raise InvalidOptionError(argument, f"{value!r} is too small", f"Pass at least {least}.")
    if most is not None and value > most:
        raise InvalidOptionError(argument, f"{value!r} is too large", f"Pass at most {most}.")


def check_seed(argument: str, value: Any) -> None:
    """Raise `InvalidOptionError` unless `value` is an integer that a generator takes."""
    check_integer(argument, value, least=-_MOST_SEED, most=_MOST_SEED)


def check_number(
    argument: str,
    value: Any,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
) -> None:
    """Raise `InvalidOptionError` unless `value` is a finite number in the range."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and math.isfinite(value) and above < value < below and least <= value <= most:
        return
    limits = [("at least", least), ("above", above), ("at most", most), ("below", below)]
    wanted = " and ".join(f"{word} {limit:g}" for word, limit in limits if math.isfinite(limit))
    raise InvalidOptionError(argument, f"{value!r} is not accepted", f"Pass a number{wanted and f' {wanted}'}.")


def check_bool(argument: str, value: Any) -> None:
    """Raise `InvalidOptionError` unless `value` is a bool."""
    if not isinstance(value, bool):
        raise InvalidOptionError(argument, f"{value!r} is not known", "Pass True or False.")


def check_mapping(argument: str, value: Any) -> None:
    """Raise `InvalidOptionError` unless `value` is a mapping by names."""
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise InvalidOptionError(argument, f"{value!r} is no mapping by names", "Pass a dict whose keys are strings.")


def check_choice(argument: str, value: Any, choices: Collection[Any]) -> None:
    """Raise `InvalidOptionError` unless `value` is one of `choices`, of the same type."""
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise InvalidOptionError(argument, f"{value!r} is not known", f"Pass one of {list(choices)}.")


def check_solver(argument: str, value: Any) -> None:
    """Raise `InvalidOptionError` unless `value` is an object with a method `solve`."""
    if isinstance(value, type) or not callable(getattr(value, "solve", None)):
        raise InvalidOptionError(argument, f"{value!r} has no solve method", "Pass a solver such as Annealing().")
