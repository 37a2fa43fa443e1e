"""Groups of one row each, as a depthwise convolution has them, that make up for each other's errors.

The rows of a group share their inputs, and `solvers.coupled` lets them make up for each other. A depthwise convolution
has no such rows: each of its groups has one output, of inputs of its own. But the network's output sees all of them.
With `e_c` the error of the row of group `c`, `x_c` its columns, `H_cd = E[x_c x_d^T]` and `S` the second moment of the
derivatives of the network's output by the layer's outputs, the error of the network's output is to second order

    sum_{c, d} S_cd e_c H_cd e_d^T,

as far as inputs and derivatives do not depend on each other, as for the rows of a group (Martens and Grosse 2015, arXiv
1503.05671). That is the problem of one row with the columns of all groups, whose hessian has the blocks `S_cd H_cd`:
positive semidefinite, as a Hadamard product of such matrices is (Schur 1911).
"""

from __future__ import annotations

from torch import Tensor

from adaround_plugin.rounding.hessian import Hessian, ridge
from adaround_plugin.rounding.moments import Moments
from adaround_plugin.rounding.problem import RoundingProblem

__all__ = ["joined_problem", "put_together", "shape_of_sets", "take_apart"]

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


def put_together(values: Tensor, sets: int) -> Tensor:
    """Values `(G, n, D)` of groups, those of a set one after the other: `(sets, n, D G / sets)`."""
    groups, count, width = values.shape
    return values.reshape(sets, groups // sets, count, width).transpose(1, 2).reshape(sets, count, -1)


def take_apart(values: Tensor, groups: int) -> Tensor:
    """The inverse of `put_together`: `(G, n, D)`."""
    sets, count, _ = values.shape
    return values.reshape(sets, count, groups // sets, -1).transpose(1, 2).reshape(groups, count, -1)


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
    second, cross, _ = (moments.hessian, moments.cross, moments.power) if correct_bias else moments.uncentred()
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
