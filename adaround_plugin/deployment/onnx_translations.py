"""What torch's ONNX exporter writes in float or without its range: scales of groups, and activations of few bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from adaround_plugin.errors import InvalidModelError, MissingDependencyError

try:
    # for the operators that they register
    import torchao.quantization.pt2e
    import torchao.quantization.quant_primitives  # noqa: F401
    from onnx.helper import make_tensor, tensor_dtype_to_np_dtype
    from onnxscript import FLOAT, INT8, opset21
    from onnxscript.onnx_opset import opset18
except ImportError as error:
    raise MissingDependencyError.of("onnx", "onnx,pt2e", error) from error

__all__ = ["get_onnx_translations"]


def get_onnx_translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The `custom_translation_table` with which `torch.onnx.export` keeps weights with groups and ranges of few bits.

    Without it, the exporter computes weights with groups and writes them in float, and activations of fewer bits than
    their type (as those of 4 bits, or of 7 with torchao's `reduce_range=True`) end where the type does: QuantizeLinear
    knows no narrower range. With it, a `Clip` of the integers follows. Pass `opset_version=21` or more:
    DequantizeLinear has `block_size` from there on.
    """
    return {
        torch.ops.torchao.dequantize_affine.default: _dequantize_affine,
        torch.ops.quantized_decomposed.quantize_per_tensor.default: _quantize_per_tensor,
    }


def _quantize_per_tensor(x: Any, scale: float, zero_point: int, quant_min: int, quant_max: int, dtype: int) -> Any:
    """`quantized_decomposed::quantize_per_tensor`; `dtype` is ONNX's."""

    def constant(value: int) -> Any:
        return opset18.Constant(value=make_tensor("", dtype, (), [value]))

    quantized = opset18.QuantizeLinear(x, opset18.Constant(value_float=scale), constant(zero_point))
    limits = np.iinfo(tensor_dtype_to_np_dtype(dtype))
    if quant_min <= limits.min and quant_max >= limits.max:
        return quantized
    # clips integers, not floats, behind which no kernel would quantize what it computes
    return opset18.Clip(quantized, constant(quant_min), constant(quant_max))


def _dequantize_affine(
    x: Any,
    block_size: Sequence[int],
    scale: Any,
    zero_point: Any,
    input_dtype: int,
    quant_min: int | None = None,
    quant_max: int | None = None,
    output_dtype: int = FLOAT.dtype,
) -> Any:
    """`torchao::dequantize_affine` of integers whose scales run along one axis."""
    axes = [axis for axis, size in enumerate(block_size) if size > 1] or [len(block_size) - 1]
    if len(axes) > 1:
        raise InvalidModelError(
            f"value {x.name!r}",
            f"has scales for blocks of {tuple(block_size)}, and DequantizeLinear has blocks along one axis",
            "Choose one scale per channel or per group of a row.",
        )
    (axis,) = axes
    zero_point = opset21.Cast(zero_point, to=INT8.dtype)
    return opset21.DequantizeLinear(x, scale, zero_point, axis=axis, block_size=block_size[axis])
