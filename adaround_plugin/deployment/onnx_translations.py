"""Weights with scales of groups, which torchao writes with an operator of its own, as ONNX's DequantizeLinear."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from adaround_plugin.errors import InvalidModelError, MissingDependencyError

try:
    # registers the operator
    import torchao.quantization.quant_primitives  # noqa: F401
    from onnxscript import FLOAT, INT8, opset21
except ImportError as error:
    raise MissingDependencyError.of("onnx", "onnx,pt2e", error) from error

__all__ = ["get_onnx_translations"]


def get_onnx_translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The `custom_translation_table` with which `torch.onnx.export` keeps the integers of weights with groups.

    Without it, the exporter computes those weights and writes them in float. Pass `opset_version=21` or more:
    DequantizeLinear has `block_size` from there on.
    """
    return {torch.ops.torchao.dequantize_affine.default: _dequantize_affine}


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
