"""The host's own float operator at a call site, run with another weight: no operator is implemented again.

Modules get hooks and, during a call, other parameters. They are those of the host's float graph, separate from the
caller's (`transforms.separate`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.func import functional_call

from adaround_plugin.graph.arguments import input_of
from adaround_plugin.graph.compat import unfused
from adaround_plugin.graph.operators import is_linear, laid_out

__all__ = ["Call", "CallSite", "Tap", "function_call", "module_call"]

Operator = Callable[[tuple[Any, ...], dict[str, Any], Tensor, Tensor | None], Any]
Tap = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Call:
    """A weighted operator as a function of its weight, differentiable.

    Attributes:
        whole: from positional and keyword arguments (of which a function needs its input alone), the weight and a
            correction of the bias `(out,)` or None, to the node's value: with the activation function that is fused.
        inner: the same without a fused activation function.
        tapped: from the arguments, the weight and a function to the node's value, with the function applied to what the
            weighted operator gives, before the activation function that is fused.
        is_fused: whether there is one.
        arguments: the arguments of a node that have to be evaluated, out of those it has.
    """

    whole: Operator
    inner: Operator
    tapped: Callable[[tuple[Any, ...], dict[str, Any], Tensor, Tap], Any]
    is_fused: bool
    arguments: Callable[[fx.Node], tuple[tuple[Any, ...], dict[str, Any]]]


@dataclass(frozen=True)
class CallSite:
    """One place where a weight is used: the same node in the float and in the quantized graph.

    `call` runs the host's own float operator there with another weight; None where its bias is computed.
    """

    float_node: fx.Node
    quantized_node: fx.Node
    call: Call | None


def module_call(outer: nn.Module) -> Call:
    """The call of a module, or of the weighted module with what is fused to it."""
    module, linear = unfused(outer), is_linear(outer)

    def operator(called: nn.Module, prefix: str) -> Operator:
        def run(args: tuple[Any, ...], kwargs: dict[str, Any], weight: Tensor, correction: Tensor | None) -> Any:
            values = {f"{prefix}weight": weight}
            if correction is not None:
                values[f"{prefix}bias"] = _corrected(module.bias, correction)
            if linear:
                args, kwargs = laid_out(args, kwargs)
            return functional_call(called, values, args, kwargs)

        return run

    whole = operator(outer, "" if module is outer else "0.")

    def inner(args: tuple[Any, ...], kwargs: dict[str, Any], weight: Tensor, correction: Tensor | None) -> Any:
        # what is fused may take a second argument, such as the other summand
        return operator(module, "")(args[:1], kwargs, weight, correction)

    def tapped(args: tuple[Any, ...], kwargs: dict[str, Any], weight: Tensor, tap: Tap) -> Any:
        handle = module.register_forward_hook(lambda _, inputs, output: tap(output))
        try:
            return whole(args, kwargs, weight, None)
        finally:
            handle.remove()

    return Call(whole, inner, tapped, module is not outer, lambda node: (node.args, node.kwargs))


def function_call(node: fx.Node, bias: Tensor | None) -> Call:
    """The call of a functional operator `(input, weight, bias, ...)`.

    Args:
        node: the call in the float graph, its arguments from the fourth on constants.
        bias: the value of its bias.
    """
    rest = node.args[3:]
    named = {name: value for name, value in node.kwargs.items() if name not in ("input", "weight", "bias")}
    target: Any = node.target
    linear = is_linear(target)

    def run(args: tuple[Any, ...], kwargs: dict[str, Any], weight: Tensor, correction: Tensor | None) -> Any:
        moved = bias if correction is None else _corrected(bias, correction)
        (x,), _ = laid_out(args[:1], {}) if linear else (args[:1], {})
        return target(x, weight, moved, *rest, **named)

    def arguments(call: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (input_of(call),), {}

    def tapped(args: tuple[Any, ...], kwargs: dict[str, Any], weight: Tensor, tap: Tap) -> Any:
        return tap(run(args, kwargs, weight, None))

    return Call(run, run, tapped, False, arguments)


def _corrected(bias: Tensor | None, correction: Tensor) -> Tensor:
    return correction if bias is None else bias.detach() + correction
