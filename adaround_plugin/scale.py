"""Choosing the scale (and zero point) of a grid: by range, by the weights' squared error, or by the layer's output.

The AdaRound paper fixes the scale by the minimum squared error of the weights before rounding is learned (its
section 5). Below 4 bits the scale decides more than the rounding does, so `search_grid` chooses it under the layer's
own hessian: the candidate whose sequential rounding has the smallest output error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from adaround_plugin.grid import Grid, GridSpec
from adaround_plugin.hessian import Hessian
from adaround_plugin.problem import RoundingProblem
from adaround_plugin.solvers.sequential import round_sequentially

__all__ = ["min_max_grid", "min_mse_grid", "refit_group_scale", "refit_scale", "search_grid"]

_EPS = torch.finfo(torch.float32).tiny * 2**24  # well above subnormal scales, which no host reproduces exactly
_ELEMENTS = 2**23  # grid candidates are rounded together, as many as make this many coordinates


def _grid(spec: GridSpec, low: Tensor, high: Tensor) -> Grid:
    """The grid that covers `[low, high]` of each channel without clipping; all-zero channels get scale 1."""
    low, high = low.clamp_max(0.0), high.clamp_min(0.0)
    if spec.symmetric:
        sides = [high / spec.quant_max] if spec.quant_max > 0 else []
        sides += [low / spec.quant_min] if spec.quant_min < 0 else []
        scale = torch.stack(sides).amax(0)
        zero_point = torch.zeros_like(scale)
    else:
        scale = (high - low) / (spec.quant_max - spec.quant_min)
        zero_point = spec.quant_min - (low / scale.clamp_min(_EPS)).round()
        zero_point = zero_point.clamp(spec.quant_min, spec.quant_max)
    scale = torch.where(scale > _EPS, scale, torch.ones_like(scale))
    return spec.at(spec.per_channel(scale), spec.per_channel(zero_point))


def min_max_grid(weight: Tensor, spec: GridSpec) -> Grid:
    """The smallest scale that clips nothing."""
    low, high = torch.aminmax(spec.channels(weight.detach().float()), dim=1)
    return _grid(spec, low, high)


def min_mse_grid(weight: Tensor, spec: GridSpec, steps: int = 60) -> Grid:
    """The scale with the smallest squared rounding error of the weights.

    Each channel tries `steps` shrinkages of its range, then a finer fan around the best.
    """
    channels = spec.channels(weight.detach().float())
    low, high = torch.aminmax(channels, dim=1)
    best, best_error, best_ratio = _grid(spec, low, high), torch.full_like(low, float("inf")), torch.ones_like(low)
    step = 0.9 / steps
    for centre, offsets in ((1.0, [-step * i for i in range(steps)]), (None, [step * i / 8 for i in range(-7, 8)])):
        around = best_ratio.clone() if centre is None else torch.full_like(low, centre)
        for offset in offsets:
            ratio = around + offset
            grid = _grid(spec, low * ratio, high * ratio)
            scale, zero_point = grid.scale.reshape(-1, 1), grid.zero_point.reshape(-1, 1)
            q = (channels / scale + zero_point).round_().clamp_(spec.quant_min, spec.quant_max)
            error = q.sub_(zero_point).mul_(scale).sub_(channels).square_().sum(1)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_ratio = torch.where(better, ratio, best_ratio)
            best = _choose(spec, better, grid, best)
    return best


def _choose(spec: GridSpec, where: Tensor, grid: Grid, other: Grid) -> Grid:
    """`grid` on the channels where `where` holds, `other` elsewhere."""
    where = spec.per_channel(where)
    return spec.at(torch.where(where, grid.scale, other.scale), torch.where(where, grid.zero_point, other.zero_point))


def _candidates(grid: Grid, steps: int) -> Iterator[Grid]:
    """Grids around `grid`: 0.6 to 1.2 times its scale, and for affine schemes of few bits its zero point +-1."""
    shifts = [0] if grid.symmetric or grid.bits > 4 else [0, -1, 1]
    for shift in shifts:
        zero_point = (grid.zero_point + shift).clamp(grid.quant_min, grid.quant_max)
        for i in range(steps):
            yield grid.at(grid.scale * (0.6 + 0.6 * i / (steps - 1)), zero_point)


def search_grid(grid: Grid, channel: Tensor, problem_at: Callable[[Grid], RoundingProblem], steps: int = 13) -> Grid:
    """Choose scale and zero point, channel by channel, by the output error of sequential rounding.

    Args:
        grid: the grid to search around.
        channel: `(G, R)` int64, the channel of `grid` that each output row belongs to.
        problem_at: the rounding problem on another grid.
        steps: number of scales to try, at least 2.
    """
    best, best_error = grid, torch.full_like(grid.scale, float("inf")).reshape(-1)
    candidates = list(_candidates(grid, steps))
    first = problem_at(grid).target
    together = max(1, _ELEMENTS // first.numel())
    for start in range(0, len(candidates), together):
        chunk = candidates[start : start + together]
        _, losses = round_sequentially(RoundingProblem.stack([problem_at(candidate) for candidate in chunk]))
        for candidate, loss in zip(chunk, losses.chunk(len(chunk), dim=1), strict=True):
            loss = loss * candidate.scale.reshape(-1)[channel].square()
            error = torch.zeros_like(best_error).index_add_(0, channel.reshape(-1), loss.reshape(-1))
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best = _choose(grid, better, candidate, best)
    return best


def refit_scale(grid: Grid, channel: Tensor, hessian: Hessian, target: Tensor, integers: Tensor) -> Grid:
    """The best scale for given integers, `s = (t H v^T) / (v H v^T)` with `v = q - zero_point`, summed per channel.

    Args:
        channel: `(G, R)` int64, the channel of each row.
        hessian: the quadratic form in weight units.
        target: `(G, R, D)` float64, in weight units.
        integers: `(G, R, D)` int64.
    """
    zero_point = grid.zero_point.reshape(-1)[channel].unsqueeze(-1)
    v = (integers - zero_point).double()
    pulled = v @ hessian.matrix
    channels = grid.scale.numel()

    def per_channel(values: Tensor) -> Tensor:
        return torch.zeros(channels, dtype=values.dtype, device=values.device).index_add_(
            0, channel.reshape(-1), values.sum(-1).reshape(-1)
        )

    numerator, denominator = per_channel(pulled * target), per_channel(pulled * v)
    scale = (numerator / denominator.clamp_min(torch.finfo(torch.float64).tiny)).float()
    usable = (denominator > 0) & (scale > _EPS) & torch.isfinite(scale)
    return grid.at(torch.where(grid.per_channel(usable), grid.per_channel(scale), grid.scale), grid.zero_point)


def refit_group_scale(grid: Grid, hessian: Hessian, target: Tensor, integers: Tensor) -> Grid:
    """The best scales for given integers of a matrix with groups, all groups of a row together.

    With `v_g = q - zero_point` on the columns of group g and 0 elsewhere, the scales of a row solve the equations
    `sum_h (v_g H v_h^T) s_h = v_g H t^T`. Where they would move a scale by more than half, the row keeps its scales.

    Args:
        hessian: the quadratic form in weight units, one group of the operator.
        target: `(1, R, D)` float64, in weight units.
        integers: `(1, R, D)` int64.
    """
    size = grid.group_size
    assert size is not None
    rows, columns = integers.shape[1:]
    v = (integers[0] - grid.expand(grid.zero_point, integers.shape[1:])).double()
    count = -(-columns // size)
    matrix = v.new_zeros(rows, count, count)
    for g in range(count):
        run = slice(g * size, min(columns, (g + 1) * size))
        coupled = F.pad((v[:, run] @ hessian.matrix[0, run]) * v, (0, -columns % size))
        matrix[:, g] = coupled.reshape(rows, count, size).sum(2)
    pull = F.pad((target[0] @ hessian.matrix[0]) * v, (0, -columns % size)).reshape(rows, count, size).sum(2)
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    # groups whose integers are all the zero point have no say; a little ridge keeps the rest definite
    silent = diagonal == 0
    diagonal.add_(torch.where(silent, 1.0, 1e-9 * diagonal.amax(1, keepdim=True)))
    old = grid.scale.reshape(rows, count)
    scale = torch.where(silent, old, torch.linalg.solve(matrix, pull).float())
    near = ((scale > 0.5 * old) & (scale < 1.5 * old)).all(1, keepdim=True)
    return grid.at(torch.where(near, scale, old).reshape(-1), grid.zero_point)
