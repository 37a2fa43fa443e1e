"""Activations that are quantized, with what their observers saw: what is learned from should lie in the same range."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn

from adaround_plugin.graph.transforms import has_origin, origin
from adaround_plugin.hosts.activation_quantizers import quantize_nodes
from adaround_plugin.hosts.base import ObservedActivation

__all__ = ["Ranges", "observed_activations", "seen_ranges"]

# by origin of a node, the least and the greatest value that its observer saw
Ranges = dict[str, tuple[float, float]]


def seen_ranges(
    prepared: fx.GraphModule, quantized: fx.GraphModule, is_observer: Callable[[nn.Module], bool]
) -> Ranges:
    """What observers saw of the values that are quantized with one scale.

    Observers that keep no least and greatest value, such as those of fixed scales, tell nothing.

    Args:
        prepared: the prepared graph, written out, with its observers.
        quantized: the host's conversion of it, written out.
        is_observer: whether a module is an observer or fake-quantizer of the host's.
    """
    quantizing = quantize_nodes(quantized)
    found: Ranges = {}
    for node in prepared.graph.nodes:
        module = prepared.get_submodule(str(node.target)) if node.op == "call_module" else None
        if module is None or not is_observer(module) or origin(node.args[0]) not in quantizing:
            continue
        # a fake-quantizer has its observer inside
        observer = getattr(module, "activation_post_process", module)
        low, high = (_number(getattr(observer, name, None)) for name in ("min_val", "max_val"))
        if low is not None and high is not None and low <= high:
            found.setdefault(origin(node.args[0]), (low, high))
    return found


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, Tensor) and value.numel() == 1 else None


def observed_activations(
    exact: fx.GraphModule, ranges: Ranges, caller: Callable[[fx.Node], str]
) -> list[ObservedActivation]:
    """The nodes of the float graph that have these ranges.

    Args:
        exact: the float graph, made of the prepared one.
        ranges: as `seen_ranges` has found them.
        caller: as of `Host`.
    """
    return [
        ObservedActivation(_name(node, caller(node)), node, *ranges[origin(node)])
        for node in exact.graph.nodes
        if has_origin(node) and origin(node) in ranges
    ]


def _name(node: fx.Node, module: str) -> str:
    if node.op == "call_module" or not module:
        return module or origin(node)
    return f"{origin(node)} in {module}"
