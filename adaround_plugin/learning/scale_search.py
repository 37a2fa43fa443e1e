"""Choosing the scale (and zero point) of a grid by the layer's output.

Below 4 bits the scale decides more than the rounding does, so `search_grid` chooses it under the layer's own hessian:
the candidate whose rounding by GPTQ has the smallest output error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from adaround_plugin.rounding.grid import Grid
from adaround_plugin.rounding.hessian import Hessian
from adaround_plugin.rounding.problem import RoundingProblem
from adaround_plugin.rounding.ranges import SMALLEST_SCALE
from adaround_plugin.solvers.gptq import feed_errors_back

__all__ = ["refit_group_scale", "refit_scale", "search_grid"]

# candidates are rounded together, as many as make this many coordinates
_ELEMENTS = 2**23


def _candidates(grid: Grid, steps: int) -> Iterator[Grid]:
    """Grids around `grid`: 0.6 to 1.2 times its scale, and for affine schemes of few bits its zero point +-1."""
    shifts = [0] if grid.symmetric or grid.bits > 4 else [0, -1, 1]
    for shift in shifts:
        zero_point = (grid.zero_point + shift).clamp(grid.quant_min, grid.quant_max)
        for i in range(steps):
            yield grid.at(grid.scale * (0.6 + 0.6 * i / (steps - 1)), zero_point)


def search_grid(grid: Grid, channel: Tensor, problem_at: Callable[[Grid], RoundingProblem], steps: int = 13) -> Grid:
    """Choose scale and zero point, channel by channel, by the output error of GPTQ's one pass.

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
        _, losses = feed_errors_back(RoundingProblem.stack([problem_at(candidate) for candidate in chunk]))
        for candidate, loss in zip(chunk, losses.chunk(len(chunk), dim=1), strict=True):
            loss = loss * candidate.scale.reshape(-1)[channel].square()
            error = torch.zeros_like(best_error).index_add_(0, channel.reshape(-1), loss.reshape(-1))
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best = grid.choose(better, candidate, best)
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
    usable = (denominator > 0) & (scale > SMALLEST_SCALE) & torch.isfinite(scale)
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
