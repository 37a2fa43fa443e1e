"""The rounding problem every solver takes, and the rounding it returns.

Equation 20 of the AdaRound paper (arXiv 2004.10568) is a quadratic unconstrained binary problem per output row; here
it is written in grid coordinates (`q = w / scale + zero_point`) and with as many levels as the grid has:

    minimise (q - t) H (q - t)^T   over integers   lower <= q <= upper,   for every row, all rows sharing H.

Where the scale varies along a row (groups of columns with a scale each), `q - t` is taken times that scale, `step`.
Nothing here knows of layers, hosts or data: tensor mathematics only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from adaround_plugin.errors import InvalidOptionError, NonFiniteError
from adaround_plugin.hessian import Hessian

__all__ = ["Rounding", "RoundingProblem", "Solver"]


@dataclass(frozen=True)
class RoundingProblem:
    """Minimise `(q - target) hessian (q - target)^T` per row over integers in a box.

    Attributes:
        target: `(G, R, D)` float64, the real point to imitate, in grid coordinates.
        hessian: the quadratic form, `D` columns in each of `G` groups.
        lower, upper: `(G, R, D)` int64 bounds.
        nearest: `(G, R, D)` int64, round-to-nearest of the weight itself; no solver may return a worse row.
        step: `(G, R, D)` float64, the size of a grid step, where it varies along the rows; None where it does not.
    """

    target: Tensor
    hessian: Hessian
    lower: Tensor
    upper: Tensor
    nearest: Tensor
    step: Tensor | None = None

    def __post_init__(self) -> None:
        groups, _, columns = self.target.shape
        if self.hessian.matrix.shape[:2] != (groups, columns):
            raise InvalidOptionError(
                "hessian",
                f"{tuple(self.hessian.matrix.shape)} does not fit a target of shape {tuple(self.target.shape)}",
                f"Pass shape {(groups, columns, columns)}.",
            )
        if not torch.isfinite(self.target).all():
            raise NonFiniteError("target", "holds NaN or infinity", "Check the weights and the calibration data.")

    def loss(self, q: Tensor) -> Tensor:
        """`(q - t) H (q - t)^T` for each row, `q - t` times `step` if there is one: `(G, R)` float64."""
        error = q - self.target
        return self.hessian.quadratic(error if self.step is None else error * self.step)

    def clamp(self, q: Tensor) -> Tensor:
        """Clip to the box."""
        return torch.minimum(torch.maximum(q, self.lower.to(q.dtype)), self.upper.to(q.dtype))

    def blocks(self, hessian: Hessian, size: int) -> RoundingProblem:
        """The problems of runs of `size` columns, the coupling between them left out; the step must not vary in a run.

        Args:
            hessian: `self.hessian.blocks(size)`, which many problems may share.
            size: number of columns in a run; a smaller last one is filled up with columns that are already exact.
        """
        groups, rows, columns = self.target.shape

        def split(values: Tensor) -> Tensor:
            runs = F.pad(values, (0, -columns % size)).reshape(groups, rows, -1, size)
            return runs.transpose(1, 2).reshape(-1, rows, size)

        return RoundingProblem(split(self.target), hessian, split(self.lower), split(self.upper), split(self.nearest))

    @staticmethod
    def stack(problems: Sequence[RoundingProblem]) -> RoundingProblem:
        """The rows of problems that share one hessian, as one problem."""
        first = problems[0]
        return replace(
            first,
            target=torch.cat([problem.target for problem in problems], 1),
            lower=torch.cat([problem.lower for problem in problems], 1),
            upper=torch.cat([problem.upper for problem in problems], 1),
            nearest=torch.cat([problem.nearest for problem in problems], 1),
            step=None if first.step is None else torch.cat([p.step for p in problems if p.step is not None], 1),
        )

    def best_of(self, *candidates: Tensor) -> Rounding:
        """Keep, row by row, the candidate with the smallest loss; the first wins ties, and nearest comes first."""
        best, loss = self.nearest, self.loss(self.nearest)
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
    functions of a weight and its grid, in `adaround_plugin.schemes`.
    """

    def solve(self, problem: RoundingProblem) -> Rounding:
        """Solve `problem`."""
        ...
