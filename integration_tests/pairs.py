"""Few cases instead of all: every two values of two parameters meet in at least one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["pairwise"]


def pairwise(*parameters: Sequence[Any], allowed: Callable[..., bool] = lambda *values: True) -> list[tuple[Any, ...]]:
    """Combinations of one value of each parameter, in which every pair of values of two parameters occurs.

    Pairs that no allowed combination has are left out. The choice is greedy: always a combination with the most pairs
    that have not occurred yet. It depends on nothing but the arguments, so that every worker collects the same cases.

    Args:
        parameters: the values of each, in the order of the test's arguments.
        allowed: whether a combination makes sense.
    """
    # of indices, since values need not be hashable; with the pairs that have not occurred yet
    missing = {
        combination: set(itertools.combinations(enumerate(combination), 2))
        for combination in itertools.product(*(range(len(values)) for values in parameters))
        if allowed(*_values(parameters, combination))
    }
    chosen: list[tuple[int, ...]] = []
    seen: set[Any] = set()
    # no combination gains pairs with time: one walk over all for each number of pairs, the largest first, is greedy
    for gain in range(len(parameters) * (len(parameters) - 1) // 2, 0, -1):
        for combination, pairs in missing.items():
            new = pairs - seen
            if len(new) >= gain:
                chosen.append(combination)
                seen |= new
        missing = {combination: new for combination, pairs in missing.items() if (new := pairs - seen)}
    return [_values(parameters, combination) for combination in sorted(chosen)]


def _values(parameters: Sequence[Sequence[Any]], combination: Sequence[int]) -> tuple[Any, ...]:
    return tuple(values[i] for values, i in zip(parameters, combination, strict=True))
