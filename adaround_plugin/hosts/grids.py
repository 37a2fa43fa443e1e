"""The grid that a host's weight observer asks for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adaround_plugin.errors import InvalidModelError
from adaround_plugin.hosts.weight_observers import AdaRoundWeightMixin, FrozenMixin
from adaround_plugin.rounding.grid import Grid
from adaround_plugin.rounding.linear_op import LinearOp

__all__ = ["observed_grid", "same_grid"]

_PER_CHANNEL = (torch.per_channel_symmetric, torch.per_channel_affine)
_SYMMETRIC = (torch.per_channel_symmetric, torch.per_tensor_symmetric)


def observed_grid(name: str, observer: Any, weight: Tensor, op: LinearOp) -> tuple[Grid, bool]:
    """The grid of an observer that has seen `weight`, and whether its scale is the user's choice (not ours to search).

    Raises:
        InvalidModelError: an `AdaRoundObserver` runs along the input channels of a transposed convolution.
    """
    if isinstance(observer, FrozenMixin):
        return observer.chosen(), True
    ch_axis = observer.ch_axis if observer.qscheme in _PER_CHANNEL else None
    if isinstance(observer, AdaRoundWeightMixin):
        if ch_axis is not None and ch_axis != op.output_axis and op.kind == "conv_transpose":
            raise InvalidModelError(
                f"layer {name!r}",
                f"its AdaRoundObserver runs along axis {ch_axis}, the input channels of a transposed convolution",
                f"Use ch_axis={op.output_axis} or a per-tensor scheme "
                "(get_adaround_qconfig_mapping does, given model= beside layer_bits).",
            )
        return observer.grid(weight), False
    scale, zero_point = observer.calculate_qparams()
    shape = () if ch_axis is None else (-1,)
    grid = Grid(
        quant_min=int(observer.quant_min),
        quant_max=int(observer.quant_max),
        ch_axis=ch_axis,
        symmetric=observer.qscheme in _SYMMETRIC,
        dtype=observer.dtype,
        scale=scale.float().reshape(shape),
        zero_point=zero_point.long().reshape(shape),
    )
    return grid, True


def same_grid(one: Grid, other: Grid) -> bool:
    """Whether two grids have the same points."""
    return (
        (one.quant_min, one.quant_max, one.ch_axis, one.dtype)
        == (other.quant_min, other.quant_max, other.ch_axis, other.dtype)
        and torch.equal(one.scale, other.scale)
        and torch.equal(one.zero_point, other.zero_point)
    )
