"""Scale and zero point of an activation at few bits: the smallest squared error over a histogram of its values."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["min_mse_qparams"]

# candidate scales, as shares of the one that clips nothing: down to 1/152 in steps of one percent
_SHARES = 0.99 ** torch.arange(501, dtype=torch.float64)


def min_mse_qparams(histogram: Tensor, low: float, high: float, quant_min: int, quant_max: int) -> tuple[float, int]:
    """`(scale, zero_point)` of the affine grid with the smallest squared error, clipping included.

    Every candidate scale is tried with every zero point. The error of each is exact for a histogram whose counts sit
    in the middle of their bins. Zero is always a level, as the hosts want it; values on one side of it get all levels.

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
    scales = (high_end - low_end) / steps * _SHARES
    errors = _squared_errors(histogram.double().cpu(), middles, scales, steps)
    first, last = (0, 0) if low >= 0 else (steps, steps) if high <= 0 else (0, steps)
    scale, zero_point = divmod(int(errors[:, first : last + 1].argmin()), last - first + 1)
    return float(scales[scale]), quant_min + first + zero_point


def _squared_errors(histogram: Tensor, middles: Tensor, scales: Tensor, steps: int) -> Tensor:
    """Errors of the grids `(q - z) s` with `0 <= q <= steps`, for every scale and zero point: (scales, steps + 1).

    Values in the cell around `v = j s` add `sum (x - v)^2 = S_2 - 2 v S_1 + v^2 S_0` with `S_k = sum x^k`, whatever the
    zero point is; it decides only where the cells end and clipping begins.
    """
    powers = torch.stack([histogram * middles**power for power in range(3)])
    sums = F.pad(powers.cumsum(1), (1, 0))
    cells = torch.arange(-steps, steps + 1)
    lattice = scales[:, None] * cells
    edges = torch.searchsorted(middles, scales[:, None] * (torch.arange(-steps, steps + 2) - 0.5))

    def error(start: Tensor, stop: Tensor, value: Tensor) -> Tensor:
        s_0, s_1, s_2 = sums[:, stop] - sums[:, start]
        total: Tensor = s_2 - 2 * value * s_1 + value.square() * s_0
        return total

    inside = F.pad(error(edges[:, :-1], edges[:, 1:], lattice).cumsum(1), (1, 0))
    # where the cells of the lowest and of the highest level stand, for each zero point
    lowest = torch.arange(steps, -1, -1)
    highest = lowest + steps
    start, stop = edges[:, lowest + 1], edges[:, highest]
    below = error(torch.zeros_like(start), start, lattice[:, lowest])
    above = error(stop, torch.full_like(stop, len(middles)), lattice[:, highest])
    return below + inside[:, highest] - inside[:, lowest + 1] + above
