"""AdaRound in torchao's PT2E flow: the weight observer, and quantizer settings that use it.

Needs torchao (`pip install adaround_plugin[pt2e]`). The pass itself is the same `adaround_plugin.adaround`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from adaround_plugin.errors import InvalidOptionError, MissingDependencyError
from adaround_plugin.grid import Grid, integer_range
from adaround_plugin.observers import AdaRoundWeightMixin, FrozenMixin

try:
    from torchao.quantization.pt2e import UniformQuantizationObserverBase
    from torchao.quantization.pt2e.quantizer import QuantizationConfig, QuantizationSpec
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import get_default_x86_inductor_quantization_config
except ModuleNotFoundError as error:
    raise MissingDependencyError(
        "adaround_plugin.pt2e", f"needs {error.name}, which is not installed", "pip install 'adaround_plugin[pt2e]'"
    ) from error

__all__ = ["AdaRoundObserver", "FrozenObserver", "get_adaround_weight_spec", "get_adaround_x86_inductor_config"]


class AdaRoundObserver(AdaRoundWeightMixin, UniformQuantizationObserverBase):
    """Weight observer of torchao's PT2E flow; `get_adaround_weight_spec` puts it into a `QuantizationSpec`.

    It marks a weight for `adaround`, which then also chooses the scale under the layer's own data. Without that pass
    it is a round-to-nearest observer.

    Args:
        dtype: storage dtype, `torch.int8`.
        quant_min, quant_max: the integer range.
        qscheme: per tensor or per channel, symmetric or affine.
        ch_axis: the weight's channel axis: 0, or 1 for transposed convolutions. torchao passes a specification's
            own `ch_axis` on to observers with "PerChannel" in their name only.
        scale: `"mse"`, minimum squared error of the weights (the paper's choice), or `"minmax"`, clipping nothing.

    Raises:
        InvalidOptionError: an argument is out of range.
    """

    def __init__(
        self,
        dtype: torch.dtype = torch.int8,
        quant_min: int = -8,
        quant_max: int = 7,
        qscheme: torch.qscheme = torch.per_channel_symmetric,
        ch_axis: int = 0,
        scale: Literal["mse", "minmax"] = "mse",
        **kwargs: Any,
    ) -> None:
        if dtype != torch.int8:
            raise InvalidOptionError("dtype", f"{dtype} does not hold signed weights", "Pass torch.int8.")
        if not -128 <= quant_min <= 0 < quant_max <= 127:
            raise InvalidOptionError(
                "quant_min, quant_max",
                f"[{quant_min}, {quant_max}] is not inside [-128, 127] around 0",
                "Pass a narrower range.",
            )
        super().__init__(dtype=dtype, qscheme=qscheme, quant_min=quant_min, quant_max=quant_max, **kwargs)
        self._configure(ch_axis, scale)


class FrozenObserver(FrozenMixin, UniformQuantizationObserverBase):
    """The observer that `adaround` leaves behind: reports the learned scale and zero point, whatever it sees."""

    def __init__(self, grid: Grid, **kwargs: Any) -> None:
        super().__init__(
            dtype=grid.dtype, qscheme=grid.qscheme, quant_min=grid.quant_min, quant_max=grid.quant_max, **kwargs
        )
        self._freeze(grid)


def get_adaround_weight_spec(
    weight_bits: int = 4,
    per_channel: bool = True,
    symmetric: bool = True,
    ch_axis: int = 0,
    scale: Literal["mse", "minmax"] = "mse",
) -> QuantizationSpec:
    """The weight specification with AdaRound's observer, for the annotations or configuration of any quantizer.

    Args:
        weight_bits: 2 to 8; integers in `[-2^(b-1), 2^(b-1) - 1]`, stored as int8.
        per_channel: one scale per channel along `ch_axis`, else one per weight.
        symmetric: zero point 0, else affine (X86InductorQuantizer takes symmetric ones only).
        ch_axis: 0, or 1 for transposed convolutions.
        scale: the observer's own choice of scale, `"mse"` or `"minmax"`.

    Raises:
        InvalidOptionError: bits out of range, or an unknown scale.
    """
    low, high = integer_range(weight_bits)
    if per_channel:
        qscheme = torch.per_channel_symmetric if symmetric else torch.per_channel_affine
    else:
        qscheme = torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine
    return QuantizationSpec(
        dtype=torch.int8,
        quant_min=low,
        quant_max=high,
        qscheme=qscheme,
        ch_axis=ch_axis if per_channel else None,
        is_dynamic=False,
        observer_or_fake_quant_ctr=AdaRoundObserver.with_args(ch_axis=ch_axis, scale=scale),
    )


def get_adaround_x86_inductor_config(
    weight_bits: int = 4,
    activation_bits: int | None = 8,
    per_channel: bool = True,
    is_dynamic: bool = False,
) -> QuantizationConfig:
    """A configuration of `X86InductorQuantizer` with AdaRound's weight observer beside its own activation observers.

    Pass it to `set_global`, `set_module_name_qconfig` and their like.

    Args:
        weight_bits: 2 to 8, symmetric.
        activation_bits: 8, or None for weight-only quantization.
        per_channel: one scale per output channel, else one per weight.
        is_dynamic: activations are quantized with the range of each batch (linear layers only).

    Raises:
        InvalidOptionError: bits out of range.
    """
    if activation_bits not in (8, None):
        raise InvalidOptionError(
            "activation_bits", f"{activation_bits!r} is not supported", "Pass 8, or None for float activations."
        )
    if is_dynamic and activation_bits is None:
        raise InvalidOptionError("is_dynamic", "there are no activations to quantize", "Pass activation_bits=8.")
    default = get_default_x86_inductor_quantization_config(is_dynamic=is_dynamic)
    activation = None if activation_bits is None else default.input_activation
    output = None if activation_bits is None else default.output_activation
    return QuantizationConfig(activation, output, get_adaround_weight_spec(weight_bits, per_channel), default.bias)
