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
from adaround_plugin.options import check_choice, check_integer
from adaround_plugin.rounding.grid import Grid, GridSpec
from adaround_plugin.rounding.ranges import min_max_grid, min_mse_grid

__all__ = [
    "PER_CHANNEL",
    "SYMMETRIC",
    "AdaRoundWeightMixin",
    "FrozenMixin",
    "check_weight_grid",
    "check_weight_range",
]

_GRID_OF = {"mse": min_mse_grid, "minmax": min_max_grid}
PER_CHANNEL = (torch.per_channel_symmetric, torch.per_channel_affine)
SYMMETRIC = (torch.per_tensor_symmetric, torch.per_channel_symmetric)
_SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# of a convolution in three dimensions
_LAST_AXIS = 4


def check_weight_grid(ch_axis: int, scale: str, scale_dtype: torch.dtype) -> None:
    """Raise `InvalidOptionError` unless a weight can have a grid with such scales."""
    check_integer("ch_axis", ch_axis, least=0, most=_LAST_AXIS)
    check_choice("scale", scale, sorted(_GRID_OF))
    check_choice("scale_dtype", scale_dtype, _SCALE_DTYPES)


def check_weight_range(quant_min: int, quant_max: int) -> None:
    """Raise `InvalidOptionError` unless these are the ends of a range of int8 with 0 and more in it."""
    for end in (quant_min, quant_max):
        check_integer("quant_min, quant_max", end)
    if not -128 <= quant_min <= 0 < quant_max <= 127:
        raise InvalidOptionError(
            "quant_min, quant_max",
            f"[{quant_min}, {quant_max}] is not inside [-128, 127] around 0",
            "Pass a narrower range.",
        )


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
        check_weight_grid(ch_axis, scale, scale_dtype)
        if self.qscheme not in (*PER_CHANNEL, torch.per_tensor_symmetric, torch.per_tensor_affine):
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
        ch_axis = self.ch_axis if self.qscheme in PER_CHANNEL else None
        return GridSpec(
            self.quant_min,
            self.quant_max,
            ch_axis,
            self.qscheme in SYMMETRIC,
            self.dtype,
            group_size=self.group_size,
            scale_dtype=self.scale_dtype,
        )

    def grid(self, weight: Tensor) -> Grid:
        """The grid chosen from `weight` alone."""
        return _GRID_OF[self.scale_method](weight, self.spec)

    def forward(self, x: Tensor) -> Tensor:
        """Remember the weight and pass it on; the grid is chosen when it is asked for."""
        if self.spec.ch_axis is not None and self.ch_axis >= x.dim():
            raise InvalidOptionError(
                "ch_axis",
                f"a weight of shape {tuple(x.shape)} has no axis {self.ch_axis}",
                "Pass 0, or 1 if transposed.",
            )
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
    """Holds a grid that was decided elsewhere; observing changes nothing.

    Args:
        grid: what it reports.
        **kwargs: of the host's base class.
    """

    ch_axis: int

    def __init__(self, grid: Grid, **kwargs: Any) -> None:
        # whatever torch's default device is
        with torch.device("cpu"):
            super().__init__(
                dtype=grid.dtype, qscheme=grid.qscheme, quant_min=grid.quant_min, quant_max=grid.quant_max, **kwargs
            )
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
