"""Rounding schemes that look at the weight alone: those of table 1 of the AdaRound paper (arXiv 2004.10568).

They are no solvers. A solver answers a rounding problem and never returns a row above nearest's; a scheme returns
exactly what its name says, so that it can be measured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from adaround_plugin.options import check_choice, check_seed
from adaround_plugin.rounding.grid import Grid

__all__ = ["Scheme", "ceil", "floor", "floor_coordinates", "get_scheme", "nearest", "stochastic", "up_or_down"]

Scheme = Literal["nearest", "floor", "ceil", "stochastic"]

# float32's rounding of a product: a weight on the grid comes back this close, in proportion, to its integer
_ROUNDOFF = 2.0**-23


def nearest(grid: Grid, weight: Tensor) -> Tensor:
    """Round to nearest: int64 integers of the weight's shape, inside the range."""
    return grid.nearest(weight)


def floor(grid: Grid, weight: Tensor) -> Tensor:
    """Round down: the largest integer that is not above the weight, clipped to the range."""
    return _clip(grid, _coordinates(grid, weight).floor())


def ceil(grid: Grid, weight: Tensor) -> Tensor:
    """Round up: the smallest integer that is not below the weight, clipped to the range."""
    return _clip(grid, _coordinates(grid, weight).ceil())


def stochastic(grid: Grid, weight: Tensor, generator: torch.Generator) -> Tensor:
    """Round up with the probability of the fractional part, else down, then clip: unbiased inside the range.

    Gupta et al. 2015, arXiv 1502.02551. `generator` is one of the CPU, whatever the weight's device.
    """
    coordinates = _coordinates(grid, weight)
    low = coordinates.floor()
    drawn = torch.rand(weight.shape, generator=generator, dtype=torch.float64, device="cpu").to(weight.device)
    return _clip(grid, low + (drawn < coordinates - low))


def up_or_down(grid: Grid, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The search space of the paper (equation 22): `(floor, floor + 1)`, both clipped to the range."""
    low = _coordinates(grid, weight).floor()
    return _clip(grid, low), _clip(grid, low + 1)


def get_scheme(scheme: str, seed: int = 0) -> Callable[[Grid, Tensor], Tensor]:
    """The scheme of that name; a stochastic one goes on drawing from `seed`, from call to call.

    Raises:
        InvalidOptionError: no scheme has that name, or the seed is not an integer.
    """
    schemes = {"nearest": nearest, "floor": floor, "ceil": ceil}
    check_choice("scheme", scheme, (*schemes, "stochastic"))
    check_seed("seed", seed)
    if scheme in schemes:
        return schemes[scheme]
    generator = torch.Generator().manual_seed(seed)
    return lambda grid, weight: stochastic(grid, weight, generator)


def floor_coordinates(coordinates: Tensor, zero_point: Tensor) -> Tensor:
    """The floor of grid coordinates, where a weight on the grid is taken for its integer in spite of float32.

    Args:
        coordinates: float64, `w / scale + zero_point`.
        zero_point: that broadcasts to them.
    """
    return _whole(coordinates, zero_point).floor()


def _coordinates(grid: Grid, weight: Tensor) -> Tensor:
    """Grid coordinates, a weight that lies on the grid at its integer in spite of float32's rounding: float64."""
    return _whole(grid.coordinates(weight), grid.expand(grid.zero_point, weight.shape))


def _whole(coordinates: Tensor, zero_point: Tensor) -> Tensor:
    whole = coordinates.round()
    size = (coordinates - zero_point).abs()
    return torch.where((coordinates - whole).abs() <= _ROUNDOFF * size, whole, coordinates)


def _clip(grid: Grid, integers: Tensor) -> Tensor:
    return integers.clamp(grid.quant_min, grid.quant_max).long()
