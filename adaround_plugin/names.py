"""Choosing layers by name: one rule for every option that takes names."""

from __future__ import annotations

import re
from collections.abc import Iterable

from adaround_plugin.errors import InvalidOptionError

__all__ = ["compiled", "depth", "matching", "select"]


def compiled(pattern: str, argument: str) -> re.Pattern[str]:
    """`pattern` as a regular expression; `InvalidOptionError` naming `argument` if it is none."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise InvalidOptionError(
            argument, f"{pattern!r} is not a regular expression ({error})", "For any characters write '.*', not '*'."
        ) from None


def matching(pattern: str, names: Iterable[str], argument: str) -> list[str]:
    """The names that `pattern` selects: itself, those below it (`"layer1"` has `"layer1.conv"`), or a full match.

    Args:
        pattern: a qualified name or a regular expression.
        names: to choose from.
        argument: what the caller calls the pattern, for errors.

    Raises:
        InvalidOptionError: `pattern` is no regular expression.
    """
    names = list(names)
    found = [name for name in names if name == pattern or name.startswith(pattern + ".")]
    # a name that exists is meant as a name, though its dots would match other characters
    return found or [name for name in names if compiled(pattern, argument).fullmatch(name)]


def depth(name: str) -> int:
    """How deep a module lies. A name selects what is below it, too: where the last counts, the deepest has to be it."""
    return name.count(".")


def select(pattern: str, names: Iterable[str], argument: str) -> list[str]:
    """As `matching`, where there has to be a name.

    Raises:
        InvalidOptionError: `pattern` is no regular expression, or selects nothing.
    """
    names = list(names)
    found = matching(pattern, names, argument)
    if not found:
        raise InvalidOptionError(argument, f"{pattern!r} matches none of {names}", "Check the name.")
    return found
