"""The rows of a layer divided among processes: each solves some of them, and all get all of the answer."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from adaround_plugin.processes import Processes
from adaround_plugin.rounding.problem import RoundingProblem

__all__ = ["own_part", "solve_divided"]

_ALL = slice(None)


def own_part(processes: Processes, groups: int, rows: int) -> tuple[slice, slice]:
    """The groups and the rows of them that this process works on: some of what there is more of."""
    return (processes.part(groups), _ALL) if groups > rows else (_ALL, processes.part(rows))


def solve_divided(
    processes: Processes,
    problem: RoundingProblem,
    solve: Callable[[RoundingProblem, Tensor | None], Tensor],
    present: Tensor | None = None,
) -> Tensor:
    """The integers of a problem of which each process solves some rows: `(G, R, D)` int64, the same in all of them.

    Args:
        processes: that have the same problem.
        problem: of independent rows.
        solve: from some of its rows, and what these are at present, to their integers.
        present: `(G, R, D)` integers to start from, where there are any.
    """
    if processes.size == 1:
        return solve(problem, present)
    groups, rows = own_part(processes, *problem.target.shape[:2])
    found = problem.lower[groups, rows]
    if found.numel():
        found = solve(problem.part(groups, rows), None if present is None else present[groups, rows])
    # half as much to send
    return processes.joined("the rounding of a layer", found.int(), 1 if groups == _ALL else 0).long()
