"""Groups of one row each, as a depthwise convolution has them, that make up for each other's errors.

The rows of a group share their inputs, and `solvers.coupled` lets them make up for each other. A depthwise convolution
has no such rows: each of its groups has one output, of inputs of its own. But the network's output sees all of them.
With `e_c` the error of the row of group `c`, `x_c` its columns, `H_cd = E[x_c x_d^T]` and `S` the second moment of the
derivatives of the network's output by the layer's outputs, the error of the network's output is to second order

    sum_{c, d} S_cd e_c H_cd e_d^T,

as far as inputs and derivatives do not depend on each other, as for the rows of a group (Martens and Grosse 2015, arXiv
1503.05671). That is the problem of one row with the columns of all groups, whose hessian has the blocks `S_cd H_cd`:
positive semidefinite, as a Hadamard product of such matrices is (Schur 1911).

What the columns of different groups have in common is known from few samples, and less well than the moment of one
group: its many entries are taken on trust in proportion to how far two halves of the samples agree about them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from adaround_plugin.rounding.hessian import Hessian, ridge
from adaround_plugin.rounding.moments import Moments
from adaround_plugin.rounding.problem import RoundingProblem
from adaround_plugin.rounding.shrinkage import three_digits

__all__ = [
    "MOST_ROWS",
    "JoinedMoments",
    "joined_problem",
    "put_together",
    "shape_of_coupled",
    "shape_of_sets",
    "take_apart",
]

# rows that can make up for each other: with more, as in the heads of language models, their moment and its factors take
# gigabytes
MOST_ROWS = 8192
# columns of a set of groups, at most: products and factors of their hessian take this squared and cubed
_MOST_COLUMNS = 1024


def shape_of_sets(groups: int, rows: int, columns: int) -> tuple[int, int, int] | None:
    """Sets, rows and columns of a set, all of one size, that a layer's groups of one row are put into.

    None where groups have several rows, or no set would have two of them.
    """
    if rows != 1:
        return None
    sizes = (size for size in range(min(groups, _MOST_COLUMNS // columns), 1, -1) if groups % size == 0)
    return next(((groups // size, size, size * columns) for size in sizes), None)


def shape_of_coupled(groups: int, rows: int, columns: int) -> tuple[int, int, int]:
    """Groups, rows and columns of what makes up for each other: the sets of `shape_of_sets`, else the layer's own."""
    return shape_of_sets(groups, rows, columns) or (groups, rows, columns)


def put_together(values: Tensor, sets: int) -> Tensor:
    """Values `(G, n, D)` of groups, those of a set one after the other: `(sets, n, D G / sets)`."""
    groups, count, width = values.shape
    return values.reshape(sets, groups // sets, count, width).transpose(1, 2).reshape(sets, count, -1)


def take_apart(values: Tensor, groups: int) -> Tensor:
    """The inverse of `put_together`: `(G, n, D)`."""
    sets, count, _ = values.shape
    return values.reshape(sets, count, groups // sets, -1).transpose(1, 2).reshape(groups, count, -1)


class JoinedMoments:
    """Moments of the groups of each set together, gathered of two halves of the samples apart.

    Args:
        shape: sets, groups of a set and columns of a set (`shape_of_sets`).
        device: of the columns.
    """

    def __init__(self, shape: tuple[int, int, int], device: torch.device) -> None:
        self._shape = shape
        self._halves = Moments(*shape, device), Moments(*shape, device)

    @staticmethod
    def bytes(shape: tuple[int, int, int]) -> int:
        """Memory that they take."""
        return 2 * Moments.bytes(*shape)

    def add(self, x: Tensor, deviation: Tensor, half: Tensor, weight: Tensor | None = None) -> None:
        """Take in columns of all groups; in a set of groups each counts what it does on the mean of these.

        Args:
            x: `(G, n, D)`.
            deviation: `(G, n, 1)`.
            half: `(n,)` bool, whether a column's sample is of the second half.
            weight: `(G, n)`, non-negative; None for 1.
        """
        sets = self._shape[0]
        weight = None if weight is None else weight.reshape(sets, -1, weight.shape[1]).mean(1)
        for moments, chosen in zip(self._halves, (~half, half), strict=True):
            index = chosen.nonzero().squeeze(1)
            if not len(index):
                continue
            moments.add(
                put_together(x[:, index], sets),
                put_together(deviation[:, index], sets),
                None if weight is None else weight[:, index],
            )

    def finish(self) -> JoinedMoments:
        """Nothing is added any more."""
        for moments in self._halves:
            moments.finish()
        return self

    def pool(self, add: Callable[..., None]) -> None:
        """Be the moments of all machines (`Moments.pool`)."""
        for moments in self._halves:
            moments.pool(add)

    @cached_property
    def whole(self) -> Moments:
        """Of all samples, once they are finished."""
        first, second = self._halves
        return first.merged(second)

    def agreement(self, sides: Tensor, scale: Tensor, *, correct_bias: bool) -> float:
        """What of the hessian between groups the two halves of the samples agree about, from 0 to 1.

        With `A` and `B` the hessian's blocks between groups by either half, and `M` by all samples, it is
        `<A, B> / <M, M>`: as the errors of the halves are independent, the factor on `M` that leaves the least squared
        error, by an estimate without bias (the oracle shrinkage of Ledoit and Wolf 2004, towards groups apart). Three
        digits of it are kept, so that it does not depend on the order of sums.

        Args:
            sides, scale, correct_bias: as of `joined_problem`.
        """
        first, second, every = (moments.terms(centred=correct_bias)[0] for moments in (*self._halves, self.whole))
        count, groups, columns = self._shape
        width = columns // groups
        step = put_together(scale, count)
        between = sides.double().clone()
        between.diagonal(dim1=1, dim2=2).zero_()
        agreed, power = 0.0, 0.0
        for number in range(count):
            by = between[number].repeat_interleave(width, 0).repeat_interleave(width, 1)
            by = (by * step[number] * step[number].transpose(0, 1)).square()
            agreed += float((by * first[number] * second[number]).sum())
            power += float((by * every[number].square()).sum())
        return three_digits(min(1.0, max(0.0, agreed / power))) if power > 0 else 0.0


def joined_problem(
    problem: RoundingProblem,
    moments: Moments,
    sides: Tensor,
    scale: Tensor,
    *,
    damping: float,
    propagate_error: bool,
    correct_bias: bool,
) -> RoundingProblem:
    """The problem of the groups of each set together, as one row.

    Args:
        problem: of `G` groups of one row, whose target is the weight itself.
        moments: `(S, G / S, D G / S)`, of the groups of each set together, finished.
        sides: `(S, G / S, G / S)`, the second moment of the derivatives by their outputs, positive definite.
        scale: `(G, 1, D)` float64, the size of a grid step.
        damping: ridge on the moment of each group, relative to its mean diagonal.
        propagate_error: imitate the float output from the quantized input; else only undo the weight's own error.
        correct_bias: whether a bias absorbs the mean error.

    Returns:
        `(S, 1, D G / S)`, in grid coordinates.
    """
    second, cross, _ = moments.terms(centred=correct_bias)
    (sets, groups, _), sides = sides.shape, sides.double()
    columns = second.shape[1]
    width = columns // groups
    by_group = second.reshape(sets, groups, width, groups, width)
    hessian = (by_group * sides[:, :, None, :, None]).reshape(second.shape)
    own = second.diagonal(dim1=1, dim2=2).reshape(sets, groups, width)
    power = moments.power_of_columns.reshape(sets, groups, width).mean(2)
    added = ridge(own, damping, power) * sides.diagonal(dim1=1, dim2=2)
    hessian.diagonal(dim1=1, dim2=2).add_(added.repeat_interleave(width, 1))
    joined = Hessian(hessian)

    def together(values: Tensor) -> Tensor:
        return put_together(values.expand(scale.shape), sets)

    target = together(problem.target)
    if propagate_error:
        pulled = (sides @ cross).reshape(sets, groups, groups, -1).diagonal(dim1=1, dim2=2)
        target = target + joined.solve(pulled.transpose(1, 2).reshape(sets, 1, columns)) / together(scale)
    return RoundingProblem(
        target=target,
        hessian=joined,
        lower=together(problem.lower),
        upper=together(problem.upper),
        nearest=together(problem.nearest),
        step=together(scale),
    )
