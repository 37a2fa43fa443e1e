"""The integer ranges that a converted program declares for its weights.

A backend takes the range of a weight's dequantize operator for the type that the weight is to be stored in. XNNPACK,
for instance, takes [-8, 7] for packed 4-bit integers, which it has for linear layers only.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import fx

from adaround_plugin.errors import InvalidModelError
from adaround_plugin.graph.arguments import argument
from adaround_plugin.graph.compat import operator_name
from adaround_plugin.graph.operators import is_linear, is_weighted_function
from adaround_plugin.options import check_choice

__all__ = ["quantized_weights", "widen_weight_ranges"]

# the position of quant_min among the arguments of each operator; quant_max follows
_RANGE_AT = {"dequantize_per_tensor": 3, "dequantize_per_channel": 4, "dequantize_affine": 5}
# the ranges that stand for the types in which backends store weights
_STORED = {4: (-8, 7), 8: (-127, 127)}


def widen_weight_ranges(converted: fx.GraphModule, linear_bits: Literal[4, 8] = 8) -> fx.GraphModule:
    """A converted program whose weights declare ranges that backends have types for.

    Weights of 2 to 7 bits then run wherever those of 8 bits do. No integer and no scale changes, so the program
    computes the same. A range is only ever made wider.

    Args:
        converted: what `convert_pt2e` returned; it is not changed.
        linear_bits: how linear layers are to be stored, 8, or 4 for backends with packed 4-bit integers: weights of 2
            and 3 bits then declare 4, those of 5 to 7 bits 8. Convolutions always declare 8.

    Returns:
        A copy of `converted`.

    Raises:
        InvalidOptionError: `linear_bits` is neither 4 nor 8.
        InvalidModelError: the program has no quantized weight of a linear layer or convolution, or quantizes its
            weights when it runs.
    """
    check_choice("linear_bits", linear_bits, tuple(_STORED))
    quantized_weights(converted)
    result = copy.deepcopy(converted)
    for node, call in quantized_weights(result).items():
        _widen(node, linear_bits if is_linear(call.target) else 8)
    result.recompile()
    return result


def quantized_weights(converted: fx.GraphModule) -> dict[fx.Node, fx.Node]:
    """The nodes of a converted program that dequantize weights, and for each a layer that multiplies by it.

    Raises:
        InvalidModelError: there is none, or one dequantizes what is quantized when the program runs.
    """
    if not isinstance(converted, fx.GraphModule):
        raise InvalidModelError("converted", f"is {type(converted).__name__}", "Pass what convert_pt2e returned.")
    calls = [node for node in converted.graph.nodes if is_weighted_function(node)]
    found = {argument(call, 1, "weight"): call for call in calls}
    unpacked = {node: call for node, call in found.items() if isinstance(node, fx.Node) and _is_unpacked(node)}
    if not unpacked:
        raise InvalidModelError(
            "converted",
            "has no quantized weight of a linear layer or convolution",
            "Pass what convert_pt2e returned.",
        )
    for node in unpacked:
        source = node.args[0]
        if not isinstance(source, fx.Node) or source.op != "get_attr":
            raise InvalidModelError(
                f"node {node.name!r}",
                "dequantizes a weight that is quantized when the program runs",
                "Convert with convert_pt2e(prepared, fold_quantize=True).",
            )
    return unpacked


def _is_unpacked(node: fx.Node) -> bool:
    """Whether a node dequantizes an 8-bit integer."""
    return operator_name(node)[0] in _RANGE_AT and torch.int8 in (*node.args, *node.kwargs.values())


def _widen(node: fx.Node, bits: int) -> None:
    """Let a dequantize operator of a weight declare the range of so many bits; of more where that is too narrow."""
    first = _RANGE_AT[operator_name(node)[0]]
    arguments: list[Any] = list(node.args)
    least, most = arguments[first : first + 2]
    fits = (ends for stored, ends in _STORED.items() if stored >= bits and ends[0] <= least and most <= ends[1])
    # all of 8 bits has one integer more than backends' own range
    low, high = next(fits, (least, most))
    arguments[first : first + 2] = low, high
    node.args = tuple(arguments)
