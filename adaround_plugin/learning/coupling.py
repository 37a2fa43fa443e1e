"""Rows of a layer that make up for each other: those of each group, or the only ones of several groups."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from adaround_plugin.learning.division import solve_divided
from adaround_plugin.processes import Processes
from adaround_plugin.rounding.across import JoinedMoments, joined_problem, put_together, take_apart
from adaround_plugin.rounding.problem import RoundingProblem, Solver, solved
from adaround_plugin.solvers import Annealing
from adaround_plugin.solvers.coupled import solve_coupled

__all__ = ["solve_across_groups", "solve_within_groups"]

# a row whose scale is below this share of the largest is left alone by the others: those of next to nothing, as pruned
# or dead channels have, can make up for no other
_NO_SCALE = 1e-4
# of integers that are known already: what these are is not forgotten
_AGAIN = Annealing(sweeps=4, hot=0.2, descent_sweeps=3)


def solve_within_groups(
    problem: RoundingProblem,
    sides: Tensor,
    scale: Tensor | None,
    integers: Tensor,
    solver: Solver,
    processes: Processes,
    apart: Callable[[], Tensor] | None,
) -> Tensor:
    """Integers of rows that make up for the others of their group, no worse together than those given.

    Args:
        problem: of the layer's rows.
        sides: `(G, R, R)`, the second moment of the derivatives of the network's output by the layer's outputs.
        scale: `(G, R)`, the size of each row's grid steps, where the problem's errors are in steps; else None.
        integers: `(G, R, D)`, known already.
        solver: of rows that do not know of each other.
        processes: that have the same problem.
        apart: finds better integers of rows apart; None if these are.
    """

    def solve(block: RoundingProblem, present: Tensor | None) -> Tensor:
        if not isinstance(solver, Annealing):
            return solved(solver, block)
        return solver.anneal(block) if present is None else _AGAIN.anneal(block, present)

    def solve_block(block: RoundingProblem, present: Tensor | None) -> Tensor:
        return solve_divided(processes, block, solve, present)

    if scale is not None:
        relative = scale / scale.amax(1, keepdim=True)
        sides, relative = _among_live(sides, relative), relative.clamp_min(_NO_SCALE)
        sides = sides * relative.unsqueeze(1) * relative.unsqueeze(2)
    return solve_coupled(problem, sides, integers, solve_block, apart)


def solve_across_groups(
    problem: RoundingProblem,
    moments: JoinedMoments,
    sides: Tensor,
    scale: Tensor,
    solver: Solver,
    processes: Processes,
    *,
    damping: float,
    propagate_error: bool,
    correct_bias: bool,
) -> Tensor:
    """Integers of the only rows of groups that make up for each other, no worse together than the problem's `nearest`.

    Args:
        problem: of the groups, `(G, 1, D)`, whose target is the weight itself.
        moments: of the groups of each set together, finished.
        sides: `(S, G / S, G / S)`, the second moment of the derivatives of the network's output by their outputs.
        scale: `(G, 1, D)` float64, the size of grid steps.
        solver: of rows.
        processes: that have the same problem.
        damping, propagate_error, correct_bias: as of the recipe.

    Returns:
        `(G, 1, D)` int64.
    """
    largest = put_together(scale.amax(2, keepdim=True), len(sides)).squeeze(1)
    sides = _among_live(sides, largest / largest.amax(1, keepdim=True))
    agreement = moments.agreement(sides, scale, correct_bias=correct_bias)
    joined = joined_problem(
        problem,
        moments.whole,
        torch.lerp(torch.diag_embed(sides.diagonal(dim1=1, dim2=2)), sides, agreement),
        scale,
        damping=damping,
        propagate_error=propagate_error,
        correct_bias=correct_bias,
    )

    def solve(rows: RoundingProblem, present: Tensor | None) -> Tensor:
        found = solved(solver, rows)
        if present is None or not isinstance(solver, Annealing):
            return found
        return rows.best_of(found, _AGAIN.anneal(rows, present)).integers

    return take_apart(solve_divided(processes, joined, solve, joined.nearest), len(scale))


def _among_live(sides: Tensor, scale: Tensor) -> Tensor:
    """`(G, R, R)` without what couples rows whose scale, `(G, R)` relative to the largest, is next to nothing."""
    alone = scale < _NO_SCALE
    coupled = ~(alone.unsqueeze(1) | alone.unsqueeze(2))
    coupled.diagonal(dim1=1, dim2=2).fill_(True)
    return torch.where(coupled, sides, 0.0)
