"""Scale and zero point of an activation at few bits: the smallest squared error over a histogram of its values."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["min_mse_qparams"]

# the scale that clips nothing is shrunk in steps of 5 percent, down to 1/140; then the best is varied by 0.5 percent
_COARSE = 0.95 ** torch.arange(97, dtype=torch.float64)
_FINE = 1 + 0.005 * torch.arange(-9, 10, dtype=torch.float64)


def min_mse_qparams(histogram: Tensor, low: float, high: float, quant_min: int, quant_max: int) -> tuple[float, int]:
    """`(scale, zero_point)` of the affine grid with the smallest squared error, clipping included.

    Candidate scales are tried with every zero point that their range leaves sensible. The error of each is exact for
    a histogram whose counts sit in the middle of their bins. Zero is always a level, as the hosts want it.

    Args:
        histogram: (bins,), counts of the values in equal bins between `low` and `high`.
        low, high: least and greatest value. Where both are 0, the scale is 0 too.
        quant_min, quant_max: the integer range.
    """
    low_end, high_end = min(low, 0.0), max(high, 0.0)
    if low_end == high_end:
        return 0.0, quant_min
    steps, bins = quant_max - quant_min, len(histogram)
    middles = low + (high - low) / bins * (torch.arange(bins, dtype=torch.float64) + 0.5)
    moments = torch.stack([histogram.double().cpu() * middles**power for power in range(3)])
    sums = F.pad(moments.cumsum(1), (1, 0))
    level = torch.arange(steps + 1, dtype=torch.float64)

    def best(scales: Iterable[float]) -> tuple[float, float, int]:
        found = []
        for scale in scales:
            # no more levels on a side of zero than its values reach
            ends = max(0, steps + int(-high_end // scale)), min(steps, int(-(low_end // scale)))
            first = min(ends)
            zero_point = torch.arange(first, max(ends) + 1, dtype=torch.float64)
            error, index = _squared_error(middles, sums, scale * (level - zero_point[:, None])).min(0)
            found.append((float(error), scale, first + int(index)))
        return min(found)

    _, coarse, _ = best(((high_end - low_end) / steps * _COARSE).tolist())
    _, scale, zero_point = best((coarse * _FINE).tolist())
    return scale, quant_min + zero_point


def _squared_error(middles: Tensor, sums: Tensor, values: Tensor) -> Tensor:
    """Error of rounding to the nearest of rising `values` (grids, levels): (grids,).

    Values nearest to the level v add `sum (x - v)^2 = S_2 - 2 v S_1 + v^2 S_0` with `S_j = sum x^j`; `sums`
    (3, bins + 1) has the running sums of `x^j`.
    """
    edges = torch.searchsorted(middles, (values[:, :-1] + values[:, 1:]) / 2)
    ends = F.pad(F.pad(edges, (1, 0)), (0, 1), value=len(middles))
    s_0, s_1, s_2 = sums[:, ends].diff(dim=-1)
    errors: Tensor = (s_2 - 2 * values * s_1 + values.square() * s_0).sum(1)
    return errors
