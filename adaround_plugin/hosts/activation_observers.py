"""What AdaRound's activation observers do: the host's histogram, with a range chosen for fewer than 256 levels.

It is a mixin that knows no host; a class in each host's `observers` gives it that host's histogram observer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adaround_plugin.errors import InvalidOptionError
from adaround_plugin.options import check_integer
from adaround_plugin.rounding.ranges import min_mse_qparams

__all__ = ["AdaRoundActivationMixin", "grid_ends"]


class AdaRoundActivationMixin:
    """Chooses scale and zero point of a histogram observer's integer range by minimum squared error.

    The hosts' own `HistogramObserver` chooses its range for the 256 integers of its dtype, whatever `quant_max` is.
    The mixin also marks observers for which `adaround` makes FX stay inside the range (`hosts.fx.clamps`).
    """

    quant_min: int
    quant_max: int
    qscheme: torch.qscheme
    histogram: Tensor
    min_val: Tensor
    max_val: Tensor
    eps: Tensor
    # in place of what has the least squared error
    learned_scale: float | None = None
    learned_zero_point: int | None = None
    # the histogram and the range that were searched last, and the scale and zero point that were found
    _searched: tuple[Tensor, tuple[float, float, int, int], tuple[float, int]] | None = None

    @staticmethod
    def _check(quant_min: int, quant_max: int, qscheme: torch.qscheme) -> None:
        if qscheme != torch.per_tensor_affine:
            raise InvalidOptionError(
                "qscheme", f"{qscheme} wastes levels of activations", "Pass torch.per_tensor_affine."
            )
        for end in (quant_min, quant_max):
            check_integer("quant_min, quant_max", end)
        if quant_min != 0 or not 0 < quant_max <= 255:
            raise InvalidOptionError(
                "quant_min, quant_max", f"[{quant_min}, {quant_max}] does not fit", "Pass 0 and at most 255."
            )

    def keep(self, scale: float) -> None:
        """Report this scale from now on, with the zero point of now, whatever is observed later."""
        self.learned_zero_point = int(self.calculate_qparams()[1])
        self.learned_scale = scale

    def restore(self, scale: float, zero_point: int) -> None:
        """Report these from now on, whatever was or is observed."""
        self.learned_scale, self.learned_zero_point = scale, zero_point
        low, high = grid_ends(scale, zero_point, self.quant_min, self.quant_max)
        self.min_val, self.max_val = torch.full_like(self.min_val, low), torch.full_like(self.max_val, high)

    def calculate_qparams(self, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """`(scale, zero_point)` of the values seen, or those that were learned, each `(1,)`."""
        low, high = float(self.min_val), float(self.max_val)
        if low > high:
            # nothing was seen: the host's warning and its default
            return super().calculate_qparams(**kwargs)  # type: ignore[misc, no-any-return]
        if self.learned_scale is not None and self.learned_zero_point is not None:
            scale, zero_point = self.learned_scale, self.learned_zero_point
        else:
            scale, zero_point = self._search(low, high)
        device = self.min_val.device
        scales = torch.tensor([scale], dtype=torch.float32, device=device).clamp_min(float(self.eps))
        return scales, torch.tensor([zero_point], device=device)

    def _search(self, low: float, high: float) -> tuple[float, int]:
        """Scale and zero point with the least squared error; searched again only where other values were seen."""
        histogram, range_ = self.histogram.cpu(), (low, high, self.quant_min, self.quant_max)
        if self._searched is None or self._searched[1] != range_ or not torch.equal(self._searched[0], histogram):
            # a copy, which observing does not change; copies of the observer know what was found
            self._searched = histogram.clone(), range_, min_mse_qparams(histogram, *range_)
        return self._searched[2]

    def bounds(self) -> tuple[float, float]:
        """The least and the greatest value on the grid."""
        scale, zero_point = self.calculate_qparams()
        return grid_ends(float(scale), int(zero_point), self.quant_min, self.quant_max)


def grid_ends(scale: float, zero_point: int, quant_min: int, quant_max: int) -> tuple[float, float]:
    """The least and the greatest value of an affine grid, as float32 has them."""
    ends = torch.tensor([quant_min - zero_point, quant_max - zero_point], device="cpu")
    low, high = (ends * torch.tensor(scale, dtype=torch.float32, device="cpu")).tolist()
    return low, high
