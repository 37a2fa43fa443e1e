"""Rows that depend on each other: the loss `tr(S E H E^T)`, in which outputs count by what the network makes of them.

With `E` the errors of a layer's rows, `H` the second moment of its inputs and `S` that of the derivatives of the
network's output by the layer's outputs, this is the error of the network's output to second order, as far as inputs and
derivatives do not depend on each other (the Kronecker approximation of Martens and Grosse 2015, arXiv 1503.05671; for
rounding Tseng et al. 2025, arXiv 2505.22988). Given all other rows, a row poses the problem that it poses alone, with
its target moved by `-sum_{k != i} (S_ik / S_ii) e_k`. So blocks of rows are solved again, one after another, by any
solver of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adaround_plugin.rounding.problem import RoundingProblem

__all__ = ["coupled_loss", "solve_coupled"]

_ALL = slice(None)
# rows solved apart are asked for where the first pass leaves more than this share of the start's loss
_CLEARLY_BETTER = 0.9


@dataclass
class _Point:
    """Integers of coupled rows.

    Attributes:
        q: `(G, R, D)` int64.
        error: `(G, R, D)`, in the hessian's units.
        pulled: `(G, R, D)`, the error times the hessian.
        loss: `(G,)`, of the rows together.
    """

    q: Tensor
    error: Tensor
    pulled: Tensor
    loss: Tensor

    def or_better(self, other: _Point) -> _Point:
        """Of each group the one with the smaller loss, this one where they are alike."""
        better = other.loss < self.loss
        in_rows = better[:, None, None]
        return _Point(
            torch.where(in_rows, other.q, self.q),
            torch.where(in_rows, other.error, self.error),
            torch.where(in_rows, other.pulled, self.pulled),
            torch.where(better, other.loss, self.loss),
        )


def coupled_loss(problem: RoundingProblem, sides: Tensor, q: Tensor) -> Tensor:
    """`tr(S E H E^T)` of each group, `(G,)` float64, with `E = (q - target) step`.

    Args:
        problem: of the rows.
        sides: `(G, R, R)`, `S`, symmetric and positive definite.
        q: `(G, R, D)` integers.
    """
    error = (q - problem.target) * problem.step
    return (sides.double() @ problem.hessian.times(error) * error).sum((1, 2))


def solve_coupled(
    problem: RoundingProblem,
    sides: Tensor,
    start: Tensor,
    solve: Callable[[RoundingProblem, Tensor | None], Tensor],
    apart: Callable[[], Tensor] | None = None,
    *,
    blocks: int = 8,
    passes: int = 2,
) -> Tensor:
    """Lower the coupled loss of integers, block after block of rows.

    The first pass feeds errors back as GPTQ does: targets move by the errors of the blocks before, as is best if those
    to come could take any value. Where that is worse than the start, the start is taken. In the passes after it
    targets move by the errors of all other rows, and a block is kept where the loss falls. Blocks take every
    `blocks`-th row; the coupling inside a block does not enter its targets.

    Args:
        problem: of the rows.
        sides: `(G, R, R)`, as in `coupled_loss`.
        start: `(G, R, D)` int64 integers that are known already.
        solve: from the problem of a block to its integers; in passes after the first it is given the present ones.
        apart: solves all rows apart, better than `start` does. It takes its time, and is asked where the first pass is
            not clearly better than the start, as where a group has few columns to many rows; None if there is none.
        blocks: number of blocks.
        passes: how often all of them are solved, at least once.

    Returns:
        `(G, R, D)` int64; the loss of no group is above that of `start`.
    """
    hessian, sides = problem.hessian, sides.float()
    parts = [slice(first, None, blocks) for first in range(min(blocks, start.shape[1]))]

    def solved(part: slice, shift: Tensor, present: Tensor | None = None) -> Tensor:
        """Integers of a block of rows, whose targets move by `shift`, in the hessian's units."""
        step = problem.step[:, part]
        moved = RoundingProblem(
            target=problem.target[:, part] + shift.double() / step,
            hessian=hessian,
            lower=problem.lower[:, part],
            upper=problem.upper[:, part],
            nearest=problem.nearest[:, part],
            step=step,
        )
        return solve(moved, present)

    def errors(q: Tensor, part: slice = _ALL) -> Tensor:
        return ((q - problem.target[:, part]) * problem.step[:, part]).float()

    def point(q: Tensor) -> _Point:
        error = errors(q)
        pulled = hessian.roughly_times(error)
        return _Point(q, error, pulled, ((sides @ error) * pulled).sum((1, 2)))

    feedback = _feedback(sides, parts)
    found, error = start.clone(), torch.zeros(start.shape, dtype=torch.float32, device=start.device)
    for part in parts:
        found[:, part] = solved(part, -feedback[:, part] @ error)
        error[:, part] = errors(found[:, part], part)
    best, known = point(found), point(start)
    if apart is not None and bool((best.loss > _CLEARLY_BETTER * known.loss).any()):
        known = known.or_better(point(apart()))
    best = known.or_better(best)
    found, error, pulled = best.q, best.error, best.pulled
    share = sides / sides.diagonal(dim1=1, dim2=2).unsqueeze(2)
    share.diagonal(dim1=1, dim2=2).zero_()
    for _ in range(passes - 1):
        for part in parts:
            integers = solved(part, -share[:, part] @ error, found[:, part])
            change = errors(integers, part) - error[:, part]
            change_pulled = hessian.roughly_times(change)
            slope = 2 * (sides[:, part] @ pulled) + sides[:, part, part] @ change_pulled
            better = ((slope * change).sum((1, 2)) < 0)[:, None, None]
            found[:, part] = torch.where(better, integers, found[:, part])
            error[:, part] += torch.where(better, change, 0.0)
            pulled[:, part] += torch.where(better, change_pulled, 0.0)
    return found


def _feedback(sides: Tensor, parts: Sequence[slice]) -> Tensor:
    """`(G, R, R)`: how the errors of rows of blocks before move the target of a row, those to come being free.

    With `P S P^T = L L^T`, `P` putting the rows in reverse order of the blocks, row `i` is moved by `L_ki / L_ii` times
    the error of each row `k` before it.
    """
    rows = torch.arange(sides.shape[1], device=sides.device)
    order = torch.cat([rows[part] for part in parts])
    back = order.flip(0)
    lower = torch.linalg.cholesky(sides[:, back][:, :, back].double())
    moved = (lower / lower.diagonal(dim1=1, dim2=2).unsqueeze(1)).transpose(1, 2).flip(1, 2)
    found = torch.zeros_like(sides)
    found[:, order.unsqueeze(1), order] = moved.to(sides)
    block = torch.cat(
        [torch.full((len(rows[part]),), number, device=sides.device) for number, part in enumerate(parts)]
    )
    of_row = torch.zeros_like(block).index_copy_(0, order, block)
    return found * (of_row.unsqueeze(0) < of_row.unsqueeze(1))
