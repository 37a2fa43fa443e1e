"""Biases as integer kernels have them: whole multiples of the scale of the input times the scale of the weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, fx

from adaround_plugin.graph.arguments import argument, attribute, input_of
from adaround_plugin.graph.compat import unfused
from adaround_plugin.graph.paths import quantizes
from adaround_plugin.graph.streams import unpacks
from adaround_plugin.hosts.activation_quantizers import scale_of
from adaround_plugin.hosts.base import Host, WeightedNode
from adaround_plugin.rounding.result import LayerRounding, same_bias

__all__ = ["bias_at", "with_integer_bias"]

_INT32 = torch.iinfo(torch.int32)


def bias_at(host: Host, call: fx.Node) -> Tensor | None:
    """The bias of a call in the float graph; None without one, and where it is computed."""
    graph = host.float_graph
    if call.op == "call_module":
        bias = unfused(graph.get_submodule(str(call.target))).bias
    else:
        source = argument(call, 2, "bias")
        is_parameter = isinstance(source, fx.Node) and source.op == "get_attr"
        bias = attribute(graph, str(source.target)) if is_parameter else None
    return None if bias is None else bias.detach()


def with_integer_bias(host: Host, node: WeightedNode) -> WeightedNode:
    """A weighted node whose bias is rounded with every rounding of its weight, or that says why it is not."""
    reason = _why_float(host, node)
    if reason is not None:
        return replace(node, float_bias=reason)
    scale = _input_scale(host, node.sites[0].quantized_node)
    assert scale is not None
    return replace(node, stored=_rounded(node, bias_at(host, node.sites[0].float_node), scale))


def _why_float(host: Host, node: WeightedNode) -> str | None:
    """Why a bias cannot be rounded; None where it can."""
    scales = {_input_scale(host, site.quantized_node) for site in node.sites}
    biases = [bias_at(host, site.float_node) for site in node.sites]
    if None in scales:
        return "the input is not quantized with one scale"
    if node.bias == "fixed":
        return "the call's bias cannot be written"
    if len(scales) > 1:
        return "the inputs of its calls have several scales"
    if any(not same_bias(bias, biases[0]) for bias in biases):
        return "its calls have several biases"
    if node.grid.group_size is not None or node.grid.ch_axis not in (None, node.op.output_axis):
        return "the weight's scale does not run along the outputs"
    return None


def _input_scale(host: Host, call: fx.Node) -> float | None:
    """The scale with which the input of a call is quantized; None where it is in float, or has several."""
    source = input_of(call)
    if not isinstance(source, fx.Node) or not unpacks(source):
        return None
    quantize = source.args[0]
    return scale_of(host.quantized_graph, quantize) if isinstance(quantize, fx.Node) and quantizes(quantize) else None


def _rounded(node: WeightedNode, bias: Tensor | None, input_scale: float) -> Callable[[LayerRounding], LayerRounding]:
    """What rounds the corrected bias to int32 multiples of the input's scale times the weight's."""

    def stored(rounding: LayerRounding) -> LayerRounding:
        corrected, grid = rounding.corrected(bias), rounding.grid
        if corrected is None:
            return rounding
        scales = node.op.rows(grid.expand(grid.scale, node.weight.shape))[..., 0]
        step = input_scale * node.op.outputs(scales).double()
        whole = (corrected.double() / step).round().clamp(_INT32.min, _INT32.max)
        start = 0.0 if bias is None else bias.double()
        return replace(rounding, bias_correction=(whole * step - start).float())

    return stored
