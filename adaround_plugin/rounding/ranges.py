"""Grids chosen from values alone: by the range of a weight, or by the squared error of a weight or of activations.

The AdaRound paper fixes the scale by the minimum squared error of the weights before rounding is learned (its
section 5).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from adaround_plugin.rounding.grid import Grid, GridSpec

__all__ = ["SMALLEST_SCALE", "min_max_grid", "min_mse_grid", "min_mse_qparams"]

# well above subnormal scales, which no host reproduces exactly
SMALLEST_SCALE = torch.finfo(torch.float32).tiny * 2**24
# weights are rounded to candidate grids in parts of about so many numbers, which a cache holds
_PART = 2**18
# entries of a channel whose squares are added in float32; sums of these are added in float64
_RUN = 4096
# candidate scales of activations, as shares of the one that clips nothing: down to 1/152 in steps of one percent
_SHARES = 0.99 ** torch.arange(501, dtype=torch.float64, device="cpu")


def _grid(spec: GridSpec, low: Tensor, high: Tensor) -> Grid:
    """The grid that covers `[low, high]` without clipping, for each entry of both; all-zero channels get scale 1."""
    low, high = low.clamp_max(0.0), high.clamp_min(0.0)
    if spec.symmetric:
        sides = [high / spec.quant_max] if spec.quant_max > 0 else []
        sides += [low / spec.quant_min] if spec.quant_min < 0 else []
        scale = torch.stack(sides).amax(0)
        zero_point = torch.zeros_like(scale)
    else:
        scale = (high - low) / (spec.quant_max - spec.quant_min)
        zero_point = spec.quant_min - (low / scale.clamp_min(SMALLEST_SCALE)).round()
        zero_point = zero_point.clamp(spec.quant_min, spec.quant_max)
    scale = torch.where(scale > SMALLEST_SCALE, scale, torch.ones_like(scale))
    return spec.at(scale, zero_point)


def min_max_grid(weight: Tensor, spec: GridSpec) -> Grid:
    """The smallest scale that clips nothing."""
    low, high = torch.aminmax(spec.channels(weight.detach().float()), dim=1)
    return _grid(spec, spec.per_channel(low), spec.per_channel(high))


def min_mse_grid(weight: Tensor, spec: GridSpec, steps: int = 60) -> Grid:
    """The scale with the smallest squared rounding error of the weights.

    Each channel tries `steps` shrinkages of its range, then a finer fan around the best.
    """
    channels = spec.channels(weight.detach().float())
    low, high = torch.aminmax(channels, dim=1)
    ratio, step = torch.ones_like(low), 0.9 / steps
    # of equal errors the first counts: the wider range, and what the first fan has found
    for fan in ([-step * i for i in range(steps)], [step * i / 8 for i in (0, *range(-7, 0), *range(1, 8))]):
        ratios = ratio + torch.tensor(fan, device=ratio.device)[:, None]
        errors = _rounding_errors(channels, _grid(spec, low * ratios, high * ratios))
        ratio = ratios.gather(0, errors.argmin(0, keepdim=True))[0]
    return _grid(spec, spec.per_channel(low * ratio), spec.per_channel(high * ratio))


def _rounding_errors(channels: Tensor, grids: Grid) -> Tensor:
    """Squared errors of rounding each channel to the nearest points of several grids: `(grids, channels)`, float64.

    Args:
        channels: (channels, elements).
        grids: scales and zero points are `(grids, channels)`.
    """
    count = len(grids.scale)
    scale, zero_point = grids.scale[..., None], grids.zero_point[..., None].float()
    errors = torch.zeros(grids.scale.shape, dtype=torch.float64, device=channels.device)
    # the same memory for all parts
    buffers = channels.new_empty(2, min(count * channels.numel(), max(_PART, count * _RUN)))
    for run in torch.split(channels, _RUN, 1):
        rows = max(1, _PART // (count * run.shape[1]))
        for first in range(0, len(run), rows):
            part = slice(first, first + rows)
            x = run[part]
            # in units of the scale: x, and its distance to the nearest integer of the range
            coordinates, distance = (buffer[: count * x.numel()].view(count, *x.shape) for buffer in buffers)
            torch.div(x, scale[:, part], out=coordinates)
            if not grids.symmetric:
                coordinates += zero_point[:, part]
            torch.round(coordinates, out=distance).clamp_(grids.quant_min, grids.quant_max).sub_(coordinates)
            errors[:, part] += distance.square_().sum(2)
    return errors * grids.scale.double().square()


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
    middles = low + (high - low) / bins * (torch.arange(bins, dtype=torch.float64, device="cpu") + 0.5)
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
    levels = torch.arange(-steps, steps + 2, device=scales.device)
    lattice = scales[:, None] * levels[:-1]
    edges = torch.searchsorted(middles, scales[:, None] * (levels - 0.5))
    # sums of the values left of each edge: (scales, 2 steps + 2)
    left = [total[edges] for total in sums]

    def errors(start: list[Tensor], stop: list[Tensor], value: Tensor) -> Tensor:
        s_0, s_1, s_2 = (high - low for low, high in zip(start, stop, strict=True))
        return s_2 - 2 * value * s_1 + value.square() * s_0

    cells = errors([one[:, :-1] for one in left], [one[:, 1:] for one in left], lattice)
    inside = F.pad(cells.cumsum(1), (1, 0))
    # for each zero point z the lowest level is cell `steps - z`, and the highest `2 steps - z`: columns run backwards
    start, stop = ([one[:, first : first + steps + 1] for one in left] for first in (1, steps))
    below = errors([torch.zeros_like(one) for one in start], start, lattice[:, : steps + 1])
    above = errors(stop, [total[-1] for total in sums], lattice[:, steps:])
    return (below + inside[:, steps : 2 * steps + 1] - inside[:, 1 : steps + 2] + above).flip(1)
