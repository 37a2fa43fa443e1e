"""Weight observers for a `QConfig`: one that chooses a grid from the weights, and its frozen form.

What they do is in two mixins that know no host; one class per host family gives them that family's base class. Their
tensors follow the model to another device, and are no part of its state dict.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.ao.quantization.observer import UniformQuantizationObserverBase

from adaround_plugin.errors import InvalidModelError, InvalidOptionError
from adaround_plugin.rounding.grid import Grid, GridSpec, integer_range
from adaround_plugin.learning.scale_search import min_max_grid, min_mse_grid

__all__ = ["AdaRoundObserver", "AdaRoundWeightMixin", "FrozenMixin", "FrozenObserver"]

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


class FrozenMixin(nn.Module):
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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the grid where `fn` moves tensors, but let no `.half()` or `.double()` make another grid of it."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = fn(self._grid.zero_point.new_empty(0)).device
        scale, zero_point = self._grid.scale.to(device), self._grid.zero_point.to(device)
        self._grid = replace(self._grid, scale=scale, zero_point=zero_point)
        return self

    def chosen(self) -> Grid:
        """The frozen grid."""
        return self._grid

    def calculate_qparams(self, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The frozen `(scale, zero_point)`: `(channels,)`, or `(1,)` per tensor."""
        return self._grid.scale.reshape(-1), self._grid.zero_point.reshape(-1)


class AdaRoundObserver(AdaRoundWeightMixin, UniformQuantizationObserverBase):
    """Weight observer of `torch.ao.quantization` for 2 to 8 bits; use it in a `QConfig` through `with_args`.

    It marks a weight for `adaround`, which then also chooses the scale under the layer's own data. Without that pass
    it is a round-to-nearest observer. Note that `convert_fx` does not clip the weights of *modules* to
    `[quant_min, quant_max]` (torch 2.13 uses the range of the storage dtype), so for a plain nearest model that
    really has `bits` bits call `adaround(prepared, batches, solver="nearest")`.

    Args:
        bits: 2 to 8; sets the range to `[-2^(bits-1), 2^(bits-1) - 1]`. `quant_min` and `quant_max` override it.
        qscheme: `torch.per_channel_symmetric` (default), `per_channel_affine`, `per_tensor_symmetric` or
            `per_tensor_affine`.
        ch_axis: the weight's channel axis: 0, or 1 for transposed convolutions.
        scale: `"mse"`, minimum squared error of the weights (the paper's choice), or `"minmax"`, clipping nothing.
        dtype: storage dtype, `torch.qint8`.

    Raises:
        InvalidOptionError: an argument is out of range.
    """

    def __init__(
        self,
        bits: int = 4,
        qscheme: torch.qscheme = torch.per_channel_symmetric,
        ch_axis: int = 0,
        scale: Literal["mse", "minmax"] = "mse",
        dtype: torch.dtype = torch.qint8,
        quant_min: int | None = None,
        quant_max: int | None = None,
        **kwargs: Any,
    ) -> None:
        low, high = integer_range(bits)
        low, high = low if quant_min is None else quant_min, high if quant_max is None else quant_max
        if not -128 <= low <= 0 < high <= 127:
            raise InvalidOptionError(
                "quant_min, quant_max", f"[{low}, {high}] is not inside [-128, 127] around 0", "Pass a narrower range."
            )
        if dtype != torch.qint8:
            raise InvalidOptionError("dtype", f"{dtype} does not hold signed weights in FX", "Pass torch.qint8.")
        super().__init__(dtype=dtype, qscheme=qscheme, quant_min=low, quant_max=high, **kwargs)
        self._configure(ch_axis, scale)


class FrozenObserver(FrozenMixin, UniformQuantizationObserverBase):
    """The observer that `adaround` leaves behind: reports the learned scale and zero point, whatever it sees."""

    def __init__(self, grid: Grid, **kwargs: Any) -> None:
        super().__init__(
            dtype=grid.dtype, qscheme=grid.qscheme, quant_min=grid.quant_min, quant_max=grid.quant_max, **kwargs
        )
        self._freeze(grid)
