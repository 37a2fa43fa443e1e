"""What a sweep works on, whatever its kernel: coordinates of a problem's rows, and how they pull on each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from adaround_plugin.rounding.problem import RoundingProblem

__all__ = ["Coordinates", "Coupling"]


@dataclass(frozen=True)
class Coordinates:
    """The rows of a problem laid out for sweeping: `(G, D, R)` float32, one contiguous vector for each coordinate.

    Attributes:
        error: `(q - target) step` at the present point `q`, updated in place.
        target, lower, upper, step: as in `RoundingProblem`.
        is_plain: whether every step is 1, so that a kernel may leave it out.
    """

    error: Tensor
    target: Tensor
    lower: Tensor
    upper: Tensor
    step: Tensor
    is_plain: bool

    @classmethod
    def of(cls, problem: RoundingProblem, lay: Callable[[Tensor], Tensor]) -> Coordinates:
        """The coordinates of a problem, their present point the target.

        Args:
            problem: whose tensors are `(G, R, D)`.
            lay: brings the columns into the order in which they are visited, as `(G, D, R)`.
        """
        target, lower, upper, step = (
            lay(values).float().contiguous() for values in (problem.target, problem.lower, problem.upper, problem.step)
        )
        return cls(torch.zeros_like(target), target, lower, upper, step, bool((problem.step == 1).all()))

    def map(self, fn: Callable[[Tensor], Tensor]) -> Coordinates:
        """What `fn` makes of every tensor."""
        return Coordinates(
            error=fn(self.error),
            target=fn(self.target),
            lower=fn(self.lower),
            upper=fn(self.upper),
            step=fn(self.step),
            is_plain=self.is_plain,
        )

    def rounded(self) -> Tensor:
        """The present point rounded to integers inside the bounds: `(G, D, R)` float32."""
        return torch.clamp((self.error / self.step + self.target).round_(), self.lower, self.upper)


@dataclass(frozen=True)
class Coupling:
    """How coordinates pull on one another.

    Attributes:
        matrix: `(G, D, D)` float32, zero diagonal.
        curvature: `(G, D)` float32 of a triangular factor: `matrix` is then zero above the diagonal, and a sweep gives
            the loss `sum_j curvature_j ((q_j - c_j) step_j)^2`. None for a full matrix.
    """

    matrix: Tensor
    curvature: Tensor | None = None

    def block(self, part: slice) -> Coupling:
        """The coupling inside a block of coordinates."""
        return Coupling(self.matrix[:, part, part], None if self.curvature is None else self.curvature[:, part])
