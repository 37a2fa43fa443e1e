"""The continuous relaxation of "up or down": equations 22 to 24 of the AdaRound paper.

A weight whose grid coordinate lies between the integers `lower` and `upper` is written `lower + h(V) (upper - lower)`
with a share `0 <= h(V) <= 1` (22). Gradient descent moves `V`, and a regularizer pushes `h` to 0 or 1 meanwhile (24).
The other ways that the paper compares are in `adaround_plugin.paper.variants`.

Tensor mathematics only: no layer, no data, no optimizer.
"""

from __future__ import annotations

from math import cos, pi
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from adaround_plugin.errors import InvalidOptionError

__all__ = [
    "GAMMA",
    "ZETA",
    "RectifiedSigmoid",
    "SoftRounding",
    "annealed_beta",
    "bracket",
    "inverse_rectified_sigmoid",
    "rectified_sigmoid",
    "regularizer",
]

# stretch of the rectified sigmoid (Louizos et al. 2018; the paper's values below equation 23)
ZETA, GAMMA = 1.1, -0.1
# shares start no closer to their ends than this
_INSIDE = 1e-4


def rectified_sigmoid(v: Tensor) -> Tensor:
    """`h(V)` of equation 23, in `[0, 1]`; its gradient vanishes only where it is cut off."""
    return torch.clamp(torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA, 0.0, 1.0)


def inverse_rectified_sigmoid(share: Tensor) -> Tensor:
    """`V` with `h(V) = share`, for shares in `[0, 1]`: where the paper starts, `share` being `W/s - floor(W/s)`."""
    return torch.logit((share - GAMMA) / (ZETA - GAMMA))


def regularizer(share: Tensor, beta: float) -> Tensor:
    """`1 - |2 h - 1|^beta`, the summand of equation 24: 0 at both ends, 1 in the middle, flatter for larger beta."""
    return 1 - (2 * share - 1).abs().pow(beta)


def annealed_beta(progress: float, warm_up: float, beta: tuple[float, float]) -> float | None:
    """The exponent at a share `progress` of the iterations; None during warm-up, when the regularizer is off.

    Falls from `beta[0]` to `beta[1]` along half a cosine. The paper says only that it is annealed; the cosine is that
    of its authors' implementation (AIMET).
    """
    if progress < warm_up:
        return None
    start, end = beta
    return end + 0.5 * (start - end) * (1 + cos(pi * (progress - warm_up) / max(1e-12, 1 - warm_up)))


def bracket(integers: Tensor, slope: Tensor, lowest: Tensor, highest: Tensor) -> tuple[Tensor, Tensor]:
    """The two levels, `integers` and a neighbour, between which a weight may move from a rounding that was found.

    Args:
        integers: int64, the rounding found.
        slope: derivative of the loss by the coordinate: the neighbour is on the side to which the loss falls.
        lowest, highest: int64 bounds, the ends of the grid.

    Returns:
        Lower and upper level; equal where the side's end is reached.
    """
    down = (slope > 0).long()
    lower, upper = integers - down, integers + 1 - down
    return torch.maximum(lower, lowest), torch.minimum(upper, highest)


class SoftRounding(Protocol):
    """Coordinates of one weight on their way to integers.

    A class of these is made from `lower` and `upper`, int64 bounds of one shape; `start`, real coordinates, of which
    those outside the bounds begin at the nearer one; `warm_up`, the share of the iterations without the regularizer;
    and `beta`, its first and last exponent.

    Attributes:
        spans_grid: whether the bounds may be any; else they are at most 1 apart.
        parameter: what the optimizer moves, a leaf that requires a gradient.
    """

    spans_grid: ClassVar[bool]
    parameter: Tensor

    def __init__(
        self, lower: Tensor, upper: Tensor, start: Tensor, warm_up: float, beta: tuple[float, float]
    ) -> None: ...

    def coordinates(self, progress: float) -> Tensor:
        """The weight's grid coordinates at a share `progress` of the iterations, differentiable."""

    def penalty(self, progress: float) -> Tensor | None:
        """Mean of the regularizer over the weights; None where there is none."""

    def integers(self) -> Tensor:
        """The coordinates as they would be rounded now, int64."""

    def settled(self, progress: float) -> bool:
        """Whether every coordinate is an integer that no gradient moves any more."""


class RectifiedSigmoid:
    """Two levels for each weight, and the share `h(V)` of equation 23 between them.

    Raises:
        InvalidOptionError: the bounds leave more than two levels.
    """

    spans_grid: ClassVar[bool] = False

    def __init__(self, lower: Tensor, upper: Tensor, start: Tensor, warm_up: float, beta: tuple[float, float]) -> None:
        if (upper - lower).max() > 1 or (upper < lower).any():
            raise InvalidOptionError("lower, upper", "leave more than two levels", "Pass bounds at most 1 apart.")
        self.lower, self.span = lower.float(), (upper - lower).float()
        self.warm_up, self.beta = warm_up, beta
        share = (start.float() - self.lower) / self.span.clamp_min(1.0)
        # a share that starts at an end must still have a gradient
        self.parameter = self._inverse(share.clamp(_INSIDE, 1 - _INSIDE)).requires_grad_()

    def _inverse(self, share: Tensor) -> Tensor:
        return inverse_rectified_sigmoid(share)

    def _share(self, progress: float) -> Tensor:
        return rectified_sigmoid(self.parameter)

    def coordinates(self, progress: float) -> Tensor:
        return self.lower + self._share(progress) * self.span

    def penalty(self, progress: float) -> Tensor | None:
        beta = annealed_beta(progress, self.warm_up, self.beta)
        return None if beta is None else regularizer(self._share(progress), beta).mean()

    def integers(self) -> Tensor:
        # a share of one half is reached at V = 0
        return (self.lower + (self.parameter.detach() >= 0) * self.span).long()

    def settled(self, progress: float) -> bool:
        share = self._share(progress).detach()
        return bool((torch.minimum(share, 1 - share) * self.span <= 0).all())
