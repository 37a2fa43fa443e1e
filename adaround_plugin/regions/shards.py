"""Some samples of the batches of all processes, put together for each of them alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from adaround_plugin.graph.compat import tree_flatten, tree_unflatten
from adaround_plugin.processes import Processes
from adaround_plugin.regions.batches import sizes_of
from adaround_plugin.regions.spread import evenly_chosen, put_together, spread, whole

__all__ = ["spread_over"]

_AT = "samples to try recipes on"


def spread_over(
    processes: Processes, arguments: Sequence[list[Any]], wanted: int, size: int, offset: float = 0.5
) -> Sequence[list[Any]]:
    """What `spread` gives for the batches of all processes one after the other; every process gets all of it.

    Args:
        processes: each with other batches.
        arguments: of each batch of this one.
        wanted, size, offset: as of `spread`.
    """
    if processes.size == 1:
        return spread(arguments, wanted, size, offset)
    lengths = processes.gathered(_AT, sizes_of(arguments))
    counts = [sum(of_one) for of_one in lengths]
    if sum(counts) <= wanted:
        return _everyones(processes, arguments, arguments[0])
    chosen = evenly_chosen(sum(counts), wanted, size, offset)
    begin = sum(counts[: processes.rank])
    mine = sorted(number - begin for number in chosen if begin <= number < begin + counts[processes.rank])
    part = put_together(arguments, mine, len(mine)) if mine else []
    if processes.agree(_AT, part is not None):
        place = {number: index for index, number in enumerate(sorted(chosen))}
        found = put_together(
            _everyones(processes, part or [], arguments[0]), [place[number] for number in chosen], size
        )
        if found is not None:
            return found
    taken = whole([length for of_one in lengths for length in of_one], wanted, offset)
    before = sum(len(of_one) for of_one in lengths[: processes.rank])
    own = [arguments[batch - before] for batch in taken if before <= batch < before + len(arguments)]
    return _everyones(processes, own, arguments[0])


def _everyones(processes: Processes, batches: Sequence[list[Any]], like: list[Any]) -> list[list[Any]]:
    """The batches of all processes, by rank, with every tensor on the device of its counterpart in `like`."""
    known, structure = tree_flatten(like)
    places = [value.device if isinstance(value, Tensor) else None for value in known]
    # copies: of a view all of the memory behind it would be sent
    sent = [
        [value.to("cpu", copy=True) if isinstance(value, Tensor) else value for value in tree_flatten(of_batch)[0]]
        for of_batch in batches
    ]

    def brought(values: list[Any]) -> list[Any]:
        moved = [value if place is None else value.to(place) for value, place in zip(values, places, strict=True)]
        found: list[Any] = tree_unflatten(moved, structure)
        return found

    return [brought(of_batch) for of_one in processes.gathered(_AT, sent) for of_batch in of_one]
