"""What the paper compares its rectified sigmoid with (tables 3 and 5): other ways from a share to an integer.

sigmoid             h = sigmoid(V) and the regularizer
temperature         h = sigmoid(V / T), T falling towards 0: a Hopfield network (Hopfield and Tank 1985)
straight_through    V are the coordinates themselves, rounded in the forward pass, their gradient passed on
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from adaround_plugin.rounding.soft_rounding import RectifiedSigmoid

__all__ = ["Sigmoid", "StraightThrough", "Temperature"]

# an unrectified sigmoid never reaches 0 or 1: shares start, and count as settled, this far from them
_MARGIN = 1e-3
# first and last temperature, geometric between
_HOT, _COLD = 1.0, 0.02


class Sigmoid(RectifiedSigmoid):
    """A share that no gradient leaves at 0 or 1, pushed there by the regularizer."""

    def _inverse(self, share: Tensor) -> Tensor:
        return torch.logit(share.clamp(_MARGIN, 1 - _MARGIN))

    def _share(self, progress: float) -> Tensor:
        return torch.sigmoid(self.parameter)

    def settled(self, progress: float) -> bool:
        share = self._share(progress).detach()
        return bool((torch.minimum(share, 1 - share) * self.span <= _MARGIN).all())


class Temperature(Sigmoid):
    """A sigmoid that grows steeper, without a regularizer."""

    def _share(self, progress: float) -> Tensor:
        return torch.sigmoid(self.parameter / (_HOT * (_COLD / _HOT) ** progress))

    def penalty(self, progress: float) -> Tensor | None:
        return None


class StraightThrough:
    """Latent coordinates, rounded in the forward pass (Bengio et al. 2013)."""

    spans_grid: ClassVar[bool] = True

    def __init__(self, lower: Tensor, upper: Tensor, start: Tensor, warm_up: float, beta: tuple[float, float]) -> None:
        self.lower, self.upper = lower.float(), upper.float()
        self.parameter = start.float().clone().requires_grad_()

    def coordinates(self, progress: float) -> Tensor:
        inside = torch.clamp(self.parameter, self.lower, self.upper)
        return inside + (inside.round() - inside).detach()

    def penalty(self, progress: float) -> Tensor | None:
        return None

    def integers(self) -> Tensor:
        return torch.clamp(self.parameter.detach().round(), self.lower, self.upper).long()

    def settled(self, progress: float) -> bool:
        return False
