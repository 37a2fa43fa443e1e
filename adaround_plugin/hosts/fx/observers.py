"""Observers for a `QConfig`: of weights and of activations that choose a grid, and the frozen one."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch.ao.quantization.observer import HistogramObserver, UniformQuantizationObserverBase

from adaround_plugin.errors import InvalidOptionError
from adaround_plugin.hosts.activation_observers import AdaRoundActivationMixin
from adaround_plugin.hosts.weight_observers import AdaRoundWeightMixin, FrozenMixin, check_weight_range
from adaround_plugin.rounding.grid import check_bits, integer_range

__all__ = ["AdaRoundActivationObserver", "AdaRoundObserver", "FrozenObserver"]


class AdaRoundActivationObserver(AdaRoundActivationMixin, HistogramObserver):
    """Activation observer of `torch.ao.quantization` for 2 to 8 bits; use it in a `QConfig` through `with_args`.

    `convert_fx` and `convert_to_reference_fx` clip activations to the range of the storage dtype, not to that of the
    observer. `adaround` therefore puts a clamp before each observer of this class, and the converted model holds only
    integers that have `bits` bits.

    Args:
        bits: 2 to 8; sets the range to `[0, 2^bits - 1]`. `quant_min` and `quant_max` override it.
        dtype: storage dtype, `torch.quint8`.
        qscheme: `torch.per_tensor_affine`.
        **kwargs: as for `torch.ao.quantization.HistogramObserver`.

    Raises:
        InvalidOptionError: an argument is out of range.
    """

    def __init__(
        self,
        bits: int = 4,
        dtype: torch.dtype = torch.quint8,
        qscheme: torch.qscheme = torch.per_tensor_affine,
        quant_min: int | None = None,
        quant_max: int | None = None,
        **kwargs: Any,
    ) -> None:
        high = 2 ** check_bits(bits) - 1
        if dtype != torch.quint8:
            raise InvalidOptionError("dtype", f"{dtype} does not hold activations in FX", "Pass torch.quint8.")
        low, high = 0 if quant_min is None else quant_min, high if quant_max is None else quant_max
        self._check(low, high, qscheme)
        super().__init__(dtype=dtype, qscheme=qscheme, quant_min=low, quant_max=high, **kwargs)


class AdaRoundObserver(AdaRoundWeightMixin, UniformQuantizationObserverBase):
    """Weight observer of `torch.ao.quantization` for 2 to 8 bits; use it in a `QConfig` through `with_args`.

    It marks a weight for `adaround`, which then also chooses the scale under the layer's own data. Without that pass
    it is a round-to-nearest observer. Note that `convert_fx` does not clip the weights of *modules* to
    `[quant_min, quant_max]` (torch 2.13 uses the range of the storage dtype), so for a plain nearest model that
    really has `bits` bits call `adaround(prepared, data, "nearest")`.

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
        check_weight_range(low, high)
        if dtype != torch.qint8:
            raise InvalidOptionError("dtype", f"{dtype} does not hold signed weights in FX", "Pass torch.qint8.")
        super().__init__(dtype=dtype, qscheme=qscheme, quant_min=low, quant_max=high, **kwargs)
        self._configure(ch_axis, scale)


class FrozenObserver(FrozenMixin, UniformQuantizationObserverBase):
    """The observer that `adaround` leaves behind: reports the learned scale and zero point, whatever it sees."""
