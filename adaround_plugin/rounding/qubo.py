"""The rounding problem as the AdaRound paper writes it: a quadratic unconstrained binary problem (QUBO) per row.

With two levels per coordinate, `q = low + b` and `b` 0 or 1, the loss of a row (equations 13 to 20 of
arXiv 2004.10568, its square completed) is a quadratic form in the bits:

    (q - t) H (q - t)^T  =  b Q b^T + l b^T + c.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from adaround_plugin.errors import InvalidOptionError
from adaround_plugin.rounding.grid import Grid
from adaround_plugin.rounding.hessian import Hessian
from adaround_plugin.rounding.problem import RoundingProblem
from adaround_plugin.rounding.schemes import up_or_down

__all__ = ["Qubo", "two_levels", "up_or_down_problem"]


def two_levels(problem: RoundingProblem) -> tuple[Tensor, Tensor]:
    """The two neighbouring levels of each coordinate that are closest to its target: `(low, high)`, int64.

    Both lie in the box. They are the target's floor and the next integer where the box has both, else the two levels at
    the box's end; a coordinate with a single level has `low == high`. A box of two levels is left as it is.
    """
    low = problem.target.floor()
    # a target far outside the box has no int64: clip before converting
    low = problem.clamp(low).long().minimum((problem.upper - 1).maximum(problem.lower))
    return low, (low + 1).minimum(problem.upper)


def up_or_down_problem(
    grid: Grid,
    weight: Tensor,
    rows: Callable[[Tensor], Tensor],
    hessian: Hessian,
    target: Tensor,
) -> RoundingProblem:
    """The rounding problem of a weight in the paper's search space, in the units of the hessian.

    Args:
        grid, weight: what is rounded.
        rows: lays anything of the weight's shape out as `(G, R, D)`.
        hessian: `D` columns in each of `G` groups, in weight units.
        target: `(G, R, D)` float64, the row to imitate, in weight units.
    """
    lower, upper = up_or_down(grid, weight)
    scale = rows(grid.expand(grid.scale, weight.shape)).double()
    target = target / scale + rows(grid.expand(grid.zero_point, weight.shape))
    return RoundingProblem(target, hessian, rows(lower), rows(upper), rows(grid.nearest(weight)), scale)


@dataclass(frozen=True)
class Qubo:
    """Minimise `b Q b^T + l b^T + c` per row over bits `b`; its energy is the loss of the rounding problem.

    Attributes:
        hessian: the quadratic form that the rows share, `D` columns in each of `G` groups.
        width: `(G, R, D)` float64, what switching a bit on adds to a coordinate, in the hessian's units; 0 where the
            coordinate has a single level and its bit changes nothing.
        linear: `(G, R, D)` float64, `l`.
        constant: `(G, R)` float64, `c`, the energy with every bit off.
        low: `(G, R, D)` int64, the level of a bit that is off.
        free: `(G, R, D)` bool, whether the coordinate has a second level.
    """

    hessian: Hessian
    width: Tensor
    linear: Tensor
    constant: Tensor
    low: Tensor
    free: Tensor

    @classmethod
    def of(cls, problem: RoundingProblem) -> Qubo:
        """The binary form of a problem whose box has one or two levels per coordinate.

        Raises:
            InvalidOptionError: the box has more levels.
        """
        if bool((problem.upper - problem.lower > 1).any()):
            raise InvalidOptionError(
                "problem", "has more than two levels in a coordinate", "Restrict its box, for example to two_levels()."
            )
        free = problem.upper > problem.lower
        width = free.to(problem.target.dtype) * problem.step
        offset = (problem.lower - problem.target) * problem.step
        # (o + b w) H (o + b w)^T = b (w H w) b^T + 2 (o H w) b^T + o H o^T
        linear = 2 * problem.hessian.times(offset) * width
        return cls(problem.hessian, width, linear, problem.loss(problem.lower), problem.lower, free)

    @property
    def matrix(self) -> Tensor:
        """`Q_jk = width_j H_jk width_k`, `(G, R, D, D)` float64, made when asked for: a hessian for each row."""
        return self.width.unsqueeze(3) * self.hessian.matrix.unsqueeze(1) * self.width.unsqueeze(2)

    def energy(self, bits: Tensor) -> Tensor:
        """`b Q b^T + l b^T + c` for `(..., G, R, D)` bits (bool, or 0 and 1): `(..., G, R)` float64."""
        on = bits.to(self.linear.dtype)
        return self.hessian.quadratic(on * self.width) + (on * self.linear).sum(-1) + self.constant

    def integers(self, bits: Tensor) -> Tensor:
        """The levels that `(..., G, R, D)` bits stand for, int64."""
        return self.low + bits.long() * self.free
