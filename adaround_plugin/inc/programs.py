"""Weight-only quantization of an exported program: which weight belongs to which layer, there and back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from adaround_plugin.errors import InvalidOptionError
from adaround_plugin.graph.arguments import argument
from adaround_plugin.graph.operators import is_weighted_function
from adaround_plugin.hosts.learned import learned_weights
from adaround_plugin.hosts.pt2e import AdaRoundWeightOnlyQuantizer
from adaround_plugin.hosts.pt2e.nodes import innermost_module, parameter_node
from adaround_plugin.inc.packing import IntegerLinear
from adaround_plugin.inc.parts import ROOT, Parts
from adaround_plugin.names import depth
from adaround_plugin.rounding.grid import Grid

__all__ = ["integer_linears", "weight_only_quantizer"]


def weight_only_quantizer(program: fx.GraphModule, parts: Parts) -> AdaRoundWeightOnlyQuantizer:
    """The quantizer that gives each layer of a program the observer its part asks for, with scales float16 has.

    Raises:
        InvalidOptionError: layers that share a weight have different parts.
    """
    layers: dict[str, dict[str, Any] | None] = {}
    named = {name: part for (name, _), part in parts.items()}
    owners: dict[str, str] = {}
    for layer, weight, _ in _calls(program):
        if layer in named:
            options = _options(named[layer])
            if weight in layers and options != layers[weight]:
                raise InvalidOptionError(
                    f"layers {owners[weight]!r} and {layer!r}", "share a weight and have different parts", "Pass one."
                )
            layers[weight], owners[weight] = options, layer
    whole = _options(parts[ROOT]) if ROOT in parts else None
    # the last that a name lies in counts
    ordered = {".*": whole, **{name: layers[name] for name in sorted(layers, key=depth)}}
    return AdaRoundWeightOnlyQuantizer(ordered, scale_dtype=torch.float16)


def integer_linears(learned: fx.GraphModule, parts: Parts) -> dict[str, IntegerLinear]:
    """What `adaround` left in a prepared program for the linear layers that parts quantize."""
    weights = learned_weights(learned)
    chosen = {name for (name, _), part in parts.items() if part.dtype != "fp32"}
    return {
        layer: _integer_linear(*weights[weight], bias)
        for layer, weight, bias in _calls(learned)
        if layer in chosen and weight in weights
    }


def _calls(program: fx.GraphModule) -> Iterator[tuple[str, str, Tensor | None]]:
    """Each weighted call on a parameter: the layer whose code it is, the weight's layer name, and the bias."""
    for node in program.graph.nodes:
        if is_weighted_function(node):
            weight, _ = parameter_node(program, argument(node, 1, "weight"))
            bias, _ = parameter_node(program, argument(node, 2, "bias"))
            if weight is not None:
                value = None if bias is None else program.get_parameter(str(bias.target)).detach()
                yield innermost_module(node)[0], str(weight.target).removesuffix(".weight"), value


def _options(part: Any) -> dict[str, Any] | None:
    if part.dtype == "fp32":
        return None
    return {
        "weight_bits": part.bits,
        "symmetric": part.use_sym,
        "per_channel": part.w_granularity == "per_channel",
        "group_size": None if part.group_size == -1 else part.group_size,
    }


def _integer_linear(integers: Tensor, grid: Grid, bias: Tensor | None) -> IntegerLinear:
    rows = integers.shape[0]

    def by_row(values: Tensor) -> Tensor:
        return values.expand(rows, 1) if grid.ch_axis is None else values.reshape(rows, -1)

    zero_point = None if grid.symmetric else by_row(grid.zero_point)
    group_size = -1 if grid.group_size is None else grid.group_size
    return IntegerLinear(integers, by_row(grid.scale), zero_point, grid.bits, group_size, bias)
