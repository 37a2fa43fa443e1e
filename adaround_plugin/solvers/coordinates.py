"""What a sweep works on, whatever its kernel: coordinates of a problem's rows, and how they pull on each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Coordinates", "Coupling"]


@dataclass(frozen=True)
class Coordinates:
    """The rows of a problem laid out for sweeping: `(G, D, R)` float32, one vector for each coordinate.

    Attributes:
        error: `(q - target) step` at the present point `q`, updated in place; contiguous.
        target: as in `RoundingProblem`; contiguous.
        lower, upper, step: as there; they may repeat one value along an axis.
        is_plain: whether every step is 1, so that a kernel may leave it out.
    """

    error: Tensor
    target: Tensor
    lower: Tensor
    upper: Tensor
    step: Tensor
    is_plain: bool

    @classmethod
    def of(cls, target: Tensor, lower: Tensor, upper: Tensor, step: Tensor, order: Tensor | None = None) -> Coordinates:
        """The coordinates of a problem, their present point the target.

        Args:
            target, lower, upper, step: `(G, R, D)`, as in `RoundingProblem`.
            order: `(G, D)`, in which columns are visited; None for their own.
        """

        def lay(values: Tensor) -> Tensor:
            shape = values.transpose(1, 2).shape
            values = _written(values).transpose(1, 2).float()
            if order is not None and values.shape[1] > 1:
                values = values.expand(shape[0], -1, -1).gather(1, order.unsqueeze(2).expand(-1, -1, values.shape[2]))
            return values.expand(shape)

        target, step = lay(target).contiguous(), lay(step)
        is_plain = bool((_written(step) == 1).all())
        return cls(torch.zeros_like(target), target, lay(lower), lay(upper), step, is_plain)

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


def _written(values: Tensor) -> Tensor:
    """The values that are there in memory: one where one stands for all along an axis."""
    return values[tuple(slice(0, 1 if stride == 0 else None) for stride in values.stride())]
