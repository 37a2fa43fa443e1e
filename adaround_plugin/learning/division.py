"""The rows of a layer divided among processes: each solves some of them, and all get all of the answer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from adaround_plugin.processes import Processes
from adaround_plugin.rounding.problem import RoundingProblem

__all__ = ["is_divided", "own_part", "solve_divided"]

_ALL = slice(None)
# weights that take less time to solve than processes take to tell each other what came of them
_FEW = 2**14


def is_divided(processes: Processes, shape: torch.Size) -> bool:
    """Whether the rows of a problem of shape `(G, R, D)` are divided; else every process solves all of them."""
    return processes.size > 1 and shape.numel() > _FEW


def own_part(processes: Processes, groups: int, rows: int) -> tuple[slice, slice]:
    """The groups and the rows of them that this process works on: some of what there is more of."""
    return (processes.part(groups), _ALL) if groups > rows else (_ALL, processes.part(rows))


def solve_divided(
    processes: Processes,
    problem: RoundingProblem,
    solve: Callable[[RoundingProblem, Tensor | None], Tensor],
    present: Tensor | None = None,
) -> Tensor:
    """The integers of a problem: `(G, R, D)` int64. Where it is worth it, each process solves some of the rows.

    Args:
        processes: that have the same problem.
        problem: of independent rows.
        solve: from some of its rows, and what these are at present, to their integers.
        present: `(G, R, D)` integers to start from, where there are any.
    """
    if not is_divided(processes, problem.target.shape):
        return solve(problem, present)
    groups, rows = own_part(processes, *problem.target.shape[:2])
    found = problem.lower[groups, rows]
    if found.numel():
        found = solve(problem.part(groups, rows), None if present is None else present[groups, rows])
    # half as much to send
    return processes.joined("the rounding of a layer", found.int(), 1 if groups == _ALL else 0).long()
