"""What AdaRound's weight observers do: one that chooses a grid from the weights, and its frozen form.

They are mixins that know no host; a class in each host's `observers` gives them that host's base class. Their tensors
follow the model to another device, and are no part of its state dict.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from adaround_plugin.errors import InvalidModelError, InvalidOptionError
from adaround_plugin.graph.compat import MoveListener
from adaround_plugin.rounding.grid import Grid, GridSpec
from adaround_plugin.rounding.ranges import min_max_grid, min_mse_grid

__all__ = ["AdaRoundWeightMixin", "FrozenMixin"]

_GRID_OF = {"mse": min_mse_grid, "minmax": min_max_grid}
_PER_CHANNEL = (torch.per_channel_symmetric, torch.per_channel_affine)
_SYMMETRIC = (torch.per_tensor_symmetric, torch.per_channel_symmetric)


class AdaRoundWeightMixin(nn.Module):
    """Chooses scale and zero point of a weight by its range or by minimum squared error."""

    quant_min: int
    quant_max: int
    qscheme: torch.qscheme
    dtype: torch.dtype
    ch_axis: int
    group_size: int | None = None
    _weight: Tensor | None

    def _configure(self, ch_axis: int, scale: str, scale_dtype: torch.dtype = torch.float32) -> None:
        if scale not in _GRID_OF:
            raise InvalidOptionError("scale", f"{scale!r} is not known", f"Pass one of {sorted(_GRID_OF)}.")
        if self.qscheme not in (*_PER_CHANNEL, torch.per_tensor_symmetric, torch.per_tensor_affine):
            raise InvalidOptionError(
                "qscheme", f"{self.qscheme} has no integer zero point", "Pass a per-tensor or per-channel scheme."
            )
        self.ch_axis = ch_axis
        self.scale_method = scale
        self.scale_dtype = scale_dtype
        self.register_buffer("_weight", None, persistent=False)

    @property
    def spec(self) -> GridSpec:
        """The grid this observer asks for, without its scale."""
        ch_axis = self.ch_axis if self.qscheme in _PER_CHANNEL else None
        return GridSpec(
            self.quant_min,
            self.quant_max,
            ch_axis,
            self.qscheme in _SYMMETRIC,
            self.dtype,
            group_size=self.group_size,
            scale_dtype=self.scale_dtype,
        )

    def grid(self, weight: Tensor) -> Grid:
        """The grid chosen from `weight` alone."""
        return _GRID_OF[self.scale_method](weight, self.spec)

    def forward(self, x: Tensor) -> Tensor:
        """Remember the weight and pass it on; the grid is chosen when it is asked for."""
        self._weight = x.detach()
        return x

    def chosen(self) -> Grid:
        """The grid chosen from the weight seen last."""
        if self._weight is None:
            raise InvalidModelError(type(self).__name__, "has seen no weight", "Run it on a weight first.")
        return self.grid(self._weight)

    def calculate_qparams(self, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """`(scale, zero_point)` of the weight seen last: `(channels,)`, or `(1,)` per tensor."""
        grid = self.chosen()
        return grid.scale.reshape(-1), grid.zero_point.reshape(-1)


class FrozenMixin(MoveListener):
    """Holds a grid that was decided elsewhere; observing changes nothing."""

    ch_axis: int

    def _freeze(self, grid: Grid) -> None:
        self._grid = grid
        self.ch_axis = 0 if grid.ch_axis is None else grid.ch_axis
        # the buffers of the base class too: a host may ask for one device
        self.to(grid.scale.device)

    def forward(self, x: Tensor) -> Tensor:
        """Pass `x` on, and follow it to its device."""
        self.to(x.device)
        return x

    def moved(self, move: Callable[[Tensor], Tensor]) -> None:
        """Move the grid to where tensors go, but let no `.half()` or `.double()` make another grid of it."""
        device = move(self._grid.zero_point.new_empty(0)).device
        scale, zero_point = self._grid.scale.to(device), self._grid.zero_point.to(device)
        self._grid = replace(self._grid, scale=scale, zero_point=zero_point)

    def chosen(self) -> Grid:
        """The frozen grid."""
        return self._grid

    def calculate_qparams(self, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The frozen `(scale, zero_point)`: `(channels,)`, or `(1,)` per tensor."""
        return self._grid.scale.reshape(-1), self._grid.zero_point.reshape(-1)
