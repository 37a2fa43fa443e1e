"""From values that a stream knows to some nodes behind them: what has to run, and how with a gradient."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from adaround_plugin.graph.calls import CallSite
from adaround_plugin.graph.compat import operator_name
from adaround_plugin.graph.streams import Stream, Values, unpacks

__all__ = ["Path", "as_quantized", "fake_quantized", "quantizes", "run_node"]


class Path:
    """What has to run to get from known values to some nodes.

    Args:
        stream: whose graph it is.
        goals: the nodes to get to.
        known: the nodes whose values are known.
        sites: weighted nodes that will run on weights given from outside, so that only their inputs are needed.

    Attributes:
        entries: nodes whose values are known, and unpacked quantized values of such.
        order: nodes to run, in order.
        dead: by node, the nodes whose values nothing needs once it has run.
    """

    def __init__(
        self, stream: Stream, goals: Iterable[fx.Node], known: Iterable[fx.Node], sites: Mapping[fx.Node, CallSite]
    ) -> None:
        needed, known = set(goals), set(known)
        self.entries: list[fx.Node] = []
        self.order: list[fx.Node] = []
        self.dead: dict[fx.Node, set[fx.Node]] = {}
        for node in reversed(stream.nodes):
            if node not in needed:
                continue
            if node in known or (unpacks(node) and known.issuperset(node.all_input_nodes[:1])):
                self.entries.append(node)
                continue
            self.order.append(node)
            site = sites.get(node)
            sources = set(node.all_input_nodes)
            if site is not None and site.call is not None:
                sources.clear()
                map_arg(site.call.arguments(node), sources.add)
            self.dead[node] = sources - needed
            needed |= sources
        self.order.reverse()


def run_node(stream: Stream, node: fx.Node, values: Values) -> Any:
    """The value of one node by the stream's own operator."""
    args, kwargs = map_arg((stream.arguments(node), node.kwargs), values.__getitem__)
    return stream.apply(node, args, kwargs)


def quantizes(node: fx.Node) -> bool:
    """Whether a node quantizes an activation with one scale."""
    return node.op == "call_function" and operator_name(node)[0].startswith("quantize_per_tensor")


def fake_quantized(stream: Stream, node: fx.Node, values: Values) -> Tensor:
    """What a host's quantize node and its dequantize make of a value, with a gradient inside the range.

    The range is that of the node's dtype in FX, and given in PT2E.
    """
    arguments: Any = map_arg(stream.arguments(node), values.__getitem__)
    x, *settings = arguments
    if len(settings) == 3:
        scale, zero_point, dtype = settings
        info = torch.iinfo(torch.uint8 if dtype == torch.quint8 else torch.int8)
        made = torch.fake_quantize_per_tensor_affine(x, float(scale), int(zero_point), info.min, info.max)
        return as_quantized(made, x, float(scale), int(zero_point), dtype)
    if len(settings) < 4:
        # the scale comes with each batch
        target: Any = node.target
        exact: Tensor = target(x, *settings).dequantize()
        return x + (exact - x).detach()  # type: ignore[no-any-return]
    scale, zero_point, low, high = settings[:4]
    return torch.fake_quantize_per_tensor_affine(x, float(scale), int(zero_point), int(low), int(high))


def as_quantized(made: Tensor, x: Tensor, scale: float, zero_point: int, dtype: torch.dtype) -> Tensor:
    """What FX's kernel makes of `x`, with the gradient of `made`, a fake quantization of it.

    Values in the middle between two integers go to the even integer, which the kernel looks for behind the zero point
    and fake quantization before it. They are no exception: what is on a grid may be quantized on one of twice the step.
    """
    exact = torch.quantize_per_tensor(x.detach(), scale, zero_point, dtype).dequantize()
    found: Tensor = _Valued.apply(made, exact)  # type: ignore[no-untyped-call]
    return found


class _Valued(torch.autograd.Function):
    """The gradient of one tensor and the value of another."""

    @staticmethod
    def forward(_: Any, made: Tensor, exact: Tensor) -> Tensor:
        return exact.view_as(exact)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
