"""The rounding problem every solver takes, and the rounding it returns.

Equation 20 of the AdaRound paper (arXiv 2004.10568) is a quadratic unconstrained binary problem per output row; here
it is written in grid coordinates (`q = w / scale + zero_point`) and with as many levels as the grid has:

    minimise (q - t) H (q - t)^T   over integers   lower <= q <= upper,   for every row, all rows sharing H.

`q - t` is taken times the size of a grid step, `step`: 1 where one scale serves a row, and the scale itself where it
varies along the row (groups of columns with a scale each). Nothing here knows of layers, hosts or data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from adaround_plugin.errors import InvalidOptionError, NonFiniteError
from adaround_plugin.rounding.hessian import Hessian

__all__ = ["Rounding", "RoundingProblem", "Solver", "solved"]


@dataclass(frozen=True)
class RoundingProblem:
    """Minimise `(q - target) hessian (q - target)^T` per row over integers in a box.

    Attributes:
        target: `(G, R, D)` float64, the real point to imitate, in grid coordinates.
        hessian: the quadratic form, `D` columns in each of `G` groups.
        lower, upper: `(G, R, D)` int64 bounds.
        nearest: `(G, R, D)` int64, round-to-nearest of the weight itself; no solver may return a worse row.
        step: `(G, R, D)` float64, the size of a grid step in the units of the hessian; whatever broadcasts to that
            shape is accepted.
    """

    target: Tensor
    hessian: Hessian
    lower: Tensor
    upper: Tensor
    nearest: Tensor
    step: Tensor = field(default_factory=lambda: torch.ones((), dtype=torch.float64, device="cpu"))

    def __post_init__(self) -> None:
        object.__setattr__(self, "step", self.step.to(self.target.device).expand(self.target.shape))
        groups, _, columns = self.target.shape
        if self.hessian.shape[:2] != (groups, columns):
            raise InvalidOptionError(
                "hessian",
                f"{tuple(self.hessian.shape)} does not fit a target of shape {tuple(self.target.shape)}",
                f"Pass shape {(groups, columns, columns)}.",
            )
        if not torch.isfinite(self.target.sum()):
            raise NonFiniteError("target", "holds NaN or infinity", "Check the weights and the calibration data.")

    def loss(self, q: Tensor) -> Tensor:
        """`e H e^T` with `e = (q - t) step` for each row: `(G, R)` float64."""
        return self.hessian.quadratic((q - self.target) * self.step)

    @cached_property
    def _nearest_loss(self) -> Tensor:
        return self.loss(self.nearest)

    def map(self, fn: Callable[[Tensor], Tensor], hessian: Hessian) -> RoundingProblem:
        """The problem with `fn` applied to every tensor of one entry for each weight, and with this hessian."""
        return RoundingProblem(
            target=fn(self.target),
            hessian=hessian,
            lower=fn(self.lower),
            upper=fn(self.upper),
            nearest=fn(self.nearest),
            step=fn(self.step),
        )

    def clamp(self, q: Tensor) -> Tensor:
        """Clip to the box."""
        return torch.minimum(torch.maximum(q, self.lower.to(q.dtype)), self.upper.to(q.dtype))

    def part(self, groups: slice, rows: slice) -> RoundingProblem:
        """The problem of some rows of some groups."""
        return self.map(lambda values: values[groups, rows], self.hessian.of(groups))

    def best_of(self, *candidates: Tensor) -> Rounding:
        """Keep, row by row, the candidate with the smallest loss; the first wins ties, and nearest comes first."""
        best, loss = self.nearest, self._nearest_loss
        for candidate in candidates:
            candidate_loss = self.loss(candidate)
            better = candidate_loss < loss
            best = torch.where(better.unsqueeze(-1), candidate, best)
            loss = torch.where(better, candidate_loss, loss)
        return Rounding(best, loss)


@dataclass(frozen=True)
class Rounding:
    """A solver's answer: `(G, R, D)` int64 integers and their `(G, R)` float64 loss."""

    integers: Tensor
    loss: Tensor


class Solver(Protocol):
    """A way to solve a rounding problem. The answer depends on the problem alone, and no row is above nearest's.

    Floor, ceil and a plain stochastic draw can be above nearest's, and are to be measured as they are: they are
    functions of a weight and its grid, in `adaround_plugin.rounding.schemes`.
    """

    def solve(self, problem: RoundingProblem) -> Rounding:
        """Solve `problem`."""
        ...


def solved(solver: Solver, problem: RoundingProblem) -> Tensor:
    """The integers of a solver's answer, which is not believed but checked: `(G, R, D)` int64.

    Raises:
        InvalidOptionError: they are no answer to the problem; the solver is named.
    """
    found = getattr(solver.solve(problem), "integers", None)
    shape, device = tuple(problem.target.shape), problem.target.device
    if not isinstance(found, Tensor):
        wrong = f"returned {type(found).__name__} in place of integers"
    elif found.dtype != torch.int64 or found.shape != shape or found.device != device:
        wrong = (
            f"returned {found.dtype} of shape {tuple(found.shape)} on {found.device}, "
            f"not torch.int64 of shape {shape} on {device}"
        )
    elif bool(((found < problem.lower) | (found > problem.upper)).any()):
        wrong = "returned integers below problem.lower or above problem.upper"
    else:
        return found
    raise InvalidOptionError(
        f"solver {type(solver).__name__}", wrong, "Let solve return a Rounding, as problem.best_of(...) does."
    )
