"""Choosing the scale (and zero point) of a grid by the layer's output.

Below 4 bits the scale decides more than the rounding does, so `search_grid` chooses it under the layer's own hessian:
the candidate whose rounding by GPTQ has the smallest output error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from adaround_plugin.learning.division import is_divided, own_part
from adaround_plugin.processes import ALONE, Processes
from adaround_plugin.rounding.grid import Grid
from adaround_plugin.rounding.hessian import Hessian
from adaround_plugin.rounding.ranges import SMALLEST_SCALE
from adaround_plugin.rounding.schemes import floor_coordinates
from adaround_plugin.solvers.coordinates import Coordinates
from adaround_plugin.solvers.gptq import feed_errors_back

__all__ = ["SearchedRows", "refit_group_scale", "refit_scale", "search_grid"]

# candidates are rounded together, as many as make this many coordinates
_ELEMENTS = 2**23
# errors that differ by less, relative, are alike: integers that move along with a zero point leave what the order of
# sums does
_ALIKE = 1e-5


@dataclass(frozen=True)
class SearchedRows:
    """What a search needs of a layer: rows that have one scale each.

    Attributes:
        target: `(G, R, D)` float64, in weight units.
        hessian: the quadratic form, `D` columns in each of `G` groups.
        channel: `(G, R)` int64, the channel of the grid that each row belongs to.
        weight: `(G, R, D)`, where its floor and ceil alone may be taken; else None, and all integers may be.
        processes: that have the other rows.
    """

    target: Tensor
    hessian: Hessian
    channel: Tensor
    weight: Tensor | None = None
    processes: Processes = ALONE

    def in_runs(self, size: int) -> SearchedRows:
        """The runs of `size` columns as groups of their own, without coupling between them, each with its own scales.

        A smaller last run is filled up with columns that are exact.
        """
        shape = self.target.shape

        def split(values: Tensor) -> Tensor:
            runs = F.pad(values, (0, -shape[2] % size)).reshape(*shape[:2], -1, size)
            return runs.transpose(1, 2).reshape(-1, shape[1], size)

        count = -(-shape[2] // size)
        channel = torch.arange(shape[1] * count, device=self.target.device).reshape(shape[1], count).T
        weight = None if self.weight is None else split(self.weight)
        return SearchedRows(split(self.target), self.hessian.blocks(size), channel, weight)

    def divided(self, processes: Processes) -> SearchedRows:
        """Those of these rows, which all processes have, that this process works on; all where they are few."""
        if not is_divided(processes, self.target.shape):
            return self
        groups, rows = own_part(processes, *self.target.shape[:2])
        weight = None if self.weight is None else self.weight[groups, rows]
        return SearchedRows(
            self.target[groups, rows], self.hessian.of(groups), self.channel[groups, rows], weight, processes
        )

    @cached_property
    def _laid(self) -> Coordinates:
        """The rows as they are visited, in weight units."""
        weight = self.target if self.weight is None else self.weight
        one = self.target.new_ones(()).expand(self.target.shape)
        return Coordinates.of(self.target, weight, weight, one, self.hessian.order)

    def errors(self, grids: Sequence[Grid]) -> Tensor:
        """`(K, channels)`: for each grid the output error of GPTQ's one pass, by channel."""
        groups, rows, columns = self.target.shape
        if not self.target.numel():
            return self.target.new_zeros(len(grids), grids[0].scale.numel())
        laid, low, high = self._laid, grids[0].quant_min, grids[0].quant_max
        scale, zero_point = (
            torch.stack([values.reshape(-1)[self.channel] for values in of_grids], 1).unsqueeze(1)
            for of_grids in ([grid.scale for grid in grids], [grid.zero_point for grid in grids])
        )  # (G, 1, K, R)

        def at(values: Tensor) -> Tensor:
            return (values.unsqueeze(2) / scale + zero_point).reshape(groups, columns, -1)

        target = at(laid.target)
        lower, upper = (target.new_tensor(end).expand(target.shape) for end in (low, high))
        if self.weight is not None:
            shifts = zero_point.expand(-1, columns, -1, -1).reshape(target.shape)
            below = floor_coordinates(at(laid.lower.double()), shifts).float()
            lower, upper = below.clamp(low, high), (below + 1).clamp(low, high)
        one = target.new_ones(()).expand(target.shape)
        start = Coordinates(torch.zeros_like(target), target, lower, upper, one, is_plain=True)
        loss = feed_errors_back(self.hessian, start)
        loss = loss.double().reshape(groups, len(grids), rows) * scale.squeeze(1).square()
        found = loss.new_zeros(len(grids), grids[0].scale.numel())
        return found.index_add_(1, self.channel.reshape(-1), loss.transpose(0, 1).reshape(len(grids), -1))


def search_grid(grid: Grid, rows: SearchedRows, steps: int = 13, *, refine: bool = True) -> Grid:
    """Choose scale and zero point, channel by channel, by the output error of GPTQ's one pass.

    `steps` scales from 0.6 to 1.2 times the grid's are in question. Every other one is tried first, with the zero point
    and, for affine schemes of few bits, one more and one less; then the others, with the best zero point.

    Args:
        grid: the grid to search around.
        rows: of the layer.
        steps: number of scales, at least 3 and odd.
        refine: try the others too.
    """
    shifts = [0] if grid.symmetric or grid.bits > 4 else [0, -1, 1]
    zero_points = [(grid.zero_point + shift).clamp(grid.quant_min, grid.quant_max) for shift in shifts]
    scales = [grid.scale * (0.6 + 0.6 * i / (steps - 1)) for i in range(steps)]
    best, best_error = _best(grid, rows, [grid.at(scale, zero) for zero in zero_points for scale in scales[::2]])
    if not refine:
        return best
    finer, error = _best(grid, rows, [grid.at(scale, best.zero_point) for scale in scales[1::2]])
    return grid.choose(error * (1 + _ALIKE) < best_error, finer, best)


def _best(grid: Grid, rows: SearchedRows, candidates: Sequence[Grid]) -> tuple[Grid, Tensor]:
    """Of some grids the best for each channel, of those that are alike the first, and its error."""
    together = max(1, _ELEMENTS // max(1, rows.target.numel()))
    parts = [candidates[start : start + together] for start in range(0, len(candidates), together)]
    of_all = torch.cat([rows.errors(part) for part in parts])
    rows.processes.add("the search of scales", of_all)
    index = (of_all <= of_all.amin(0) * (1 + _ALIKE)).int().argmax(0)
    errors = of_all.gather(0, index.unsqueeze(0)).squeeze(0)
    scale, zero_point = (
        torch.stack([values.reshape(-1) for values in of_grids]).gather(0, index.unsqueeze(0)).squeeze(0)
        for of_grids in ([one.scale for one in candidates], [one.zero_point for one in candidates])
    )
    return grid.at(grid.per_channel(scale), grid.per_channel(zero_point)), errors


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
    pulled = hessian.roughly_times(v)
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
    count, full = -(-columns // size), hessian.matrix[0]
    matrix = v.new_zeros(rows, count, count)
    for g in range(count):
        run = slice(g * size, min(columns, (g + 1) * size))
        coupled = F.pad((v[:, run] @ full[run]) * v, (0, -columns % size))
        matrix[:, g] = coupled.reshape(rows, count, size).sum(2)
    pull = F.pad((target[0] @ full) * v, (0, -columns % size)).reshape(rows, count, size).sum(2)
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    # groups whose integers are all the zero point have no say; a little ridge keeps the rest definite
    silent = diagonal == 0
    diagonal.add_(torch.where(silent, 1.0, 1e-9 * diagonal.amax(1, keepdim=True)))
    old = grid.scale.reshape(rows, count)
    scale = torch.where(silent, old, torch.linalg.solve(matrix, pull).float())
    near = ((scale > 0.5 * old) & (scale < 1.5 * old)).all(1, keepdim=True)
    return grid.at(torch.where(near, scale, old).reshape(-1), grid.zero_point)
