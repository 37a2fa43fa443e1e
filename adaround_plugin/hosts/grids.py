"""The grid that a host's weight observer asks for."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from adaround_plugin.errors import InvalidModelError
from adaround_plugin.hosts.weight_observers import PER_CHANNEL, SYMMETRIC, AdaRoundWeightMixin, FrozenMixin
from adaround_plugin.rounding.grid import Grid, GridSpec
from adaround_plugin.rounding.linear_op import LinearOp

__all__ = ["observed_grid", "observed_spec"]


def observed_grid(name: str, observer: Any, scale: Tensor, zero_point: Tensor, op: LinearOp) -> Grid:
    """The grid of an observer that chose this scale and zero point, in whatever shape the host keeps them.

    Raises:
        InvalidModelError: an `AdaRoundObserver` runs along the input channels of a transposed convolution.
    """
    if isinstance(observer, FrozenMixin):
        return observer.chosen()
    if isinstance(observer, AdaRoundWeightMixin):
        spec = observer.spec
        if spec.ch_axis is not None and spec.ch_axis != op.output_axis and op.kind == "conv_transpose":
            raise InvalidModelError(
                f"layer {name!r}",
                f"its AdaRoundObserver runs along axis {spec.ch_axis}, the input channels of a transposed convolution",
                f"Use ch_axis={op.output_axis} or a per-tensor scheme "
                "(get_adaround_qconfig_mapping does, given model= beside layer_bits).",
            )
    else:
        spec = observed_spec(observer)
    return spec.at(spec.per_channel(scale.reshape(-1)), spec.per_channel(zero_point.reshape(-1)))


def observed_spec(observer: Any) -> GridSpec:
    """The grid of an observer or fake-quantizer of the host's own, before its scale is chosen."""
    return GridSpec(
        quant_min=int(observer.quant_min),
        quant_max=int(observer.quant_max),
        ch_axis=observer.ch_axis if observer.qscheme in PER_CHANNEL else None,
        symmetric=observer.qscheme in SYMMETRIC,
        dtype=observer.dtype,
    )
