"""Reading `LinearOp`s from modules and from functional calls in an FX graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from adaround_plugin.graph.compat import Convolution, unfused
from adaround_plugin.rounding.linear_op import LinearOp

__all__ = ["function_op", "is_linear", "is_transposed", "is_weighted_function", "laid_out", "module_op"]

_aten = torch.ops.aten
_LINEAR = {F.linear, _aten.linear.default}
# spatial dimensions of each function and of each of its overloads in an exported program
_CONVOLUTIONS: dict[Any, int] = {
    torch.conv1d: 1,
    torch.conv2d: 2,
    torch.conv3d: 3,
    _aten.conv1d.default: 1,
    _aten.conv2d.default: 2,
    _aten.conv3d.default: 3,
    _aten.conv1d.padding: 1,
    _aten.conv2d.padding: 2,
    _aten.conv3d.padding: 3,
}
_TRANSPOSED: dict[Any, int] = {
    torch.conv_transpose1d: 1,
    torch.conv_transpose2d: 2,
    torch.conv_transpose3d: 3,
    _aten.conv_transpose1d.default: 1,
    _aten.conv_transpose2d.input: 2,
    _aten.conv_transpose3d.input: 3,
}
_FUNCTIONS = {*_LINEAR, *_CONVOLUTIONS, *_TRANSPOSED}


def is_weighted_function(node: fx.Node) -> bool:
    """Whether `node` calls a functional linear layer or convolution."""
    return node.op == "call_function" and node.target in _FUNCTIONS


def is_linear(operator: Any) -> bool:
    """Whether a function or a module, fused with others or not, is a linear layer."""
    return isinstance(unfused(operator), nn.Linear) or (callable(operator) and operator in _LINEAR)


def laid_out(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a linear layer, its input laid out so that torch makes one product of it.

    Of a batch of matrices that do not lie one after the other it makes a product each, unless the weight needs a
    derivative. Several times as slow, where these are many and short, as those of a transposed batch of tokens are. The
    sums are not the same to the last bit, so that streams, which are to be the host's own networks, do without.
    """

    def together(x: Any) -> Any:
        return x.contiguous() if isinstance(x, Tensor) and x.dim() > 2 else x

    if args:
        return (together(args[0]), *args[1:]), kwargs
    return args, {name: together(value) if name == "input" else value for name, value in kwargs.items()}


def is_transposed(node: fx.Node) -> bool:
    """Whether `node` calls a functional transposed convolution."""
    return node.op == "call_function" and node.target in _TRANSPOSED


def module_op(module: nn.Module) -> LinearOp | None:
    """The operator of a linear or convolutional module, or None if it is neither."""
    if isinstance(module, nn.Linear):
        return LinearOp("linear")
    if not isinstance(module, Convolution):
        return None
    padding = _both_sides(module.padding, module.kernel_size, module.dilation)
    if module.transposed:
        return LinearOp(
            "conv_transpose", module.stride, padding, module.dilation, module.output_padding, groups=module.groups
        )
    return LinearOp(
        "conv", module.stride, padding, module.dilation, padding_mode=module.padding_mode, groups=module.groups
    )


def function_op(node: fx.Node, weight_shape: torch.Size) -> LinearOp | None:
    """The operator of a functional call, or None if an argument other than input, weight, bias is computed."""
    if node.target in _LINEAR:
        return LinearOp("linear")
    transposed = is_transposed(node)
    spatial = (_TRANSPOSED if transposed else _CONVOLUTIONS)[node.target]
    order = ("output_padding", "groups", "dilation") if transposed else ("dilation", "groups")
    names = ("stride", "padding", *order)
    settings: dict[str, Any] = {"stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1}
    settings.update(zip(names, node.args[3:], strict=False))
    settings.update({name: node.kwargs[name] for name in names if name in node.kwargs})
    if any(isinstance(leaf, fx.Node) for value in settings.values() for leaf in _leaves(value)):
        return None
    stride, dilation = _tuple(settings["stride"], spatial), _tuple(settings["dilation"], spatial)
    padding = settings["padding"] if isinstance(settings["padding"], str) else _tuple(settings["padding"], spatial)
    sides = _both_sides(padding, tuple(weight_shape[2:]), dilation)
    if transposed:
        extra = _tuple(settings["output_padding"], spatial)
        return LinearOp("conv_transpose", stride, sides, dilation, extra, groups=settings["groups"])
    return LinearOp("conv", stride, sides, dilation, groups=settings["groups"])


def _leaves(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else (value,)


def _tuple(value: Any, length: int) -> tuple[int, ...]:
    values = tuple(_leaves(value))
    return values * length if len(values) == 1 else values


def _both_sides(
    padding: str | tuple[int, ...], kernel: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    """Padding before and after each dimension; `"same"` puts the odd one after, as torch does."""
    if padding == "valid":
        return ((0, 0),) * len(kernel)
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((int(side), int(side)) for side in padding)
