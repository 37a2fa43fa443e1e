"""What `adaround` wrote into a prepared model, read back: integers, grids and biases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from adaround_plugin.graph.arguments import argument
from adaround_plugin.hosts.base import Host, WeightedNode
from adaround_plugin.hosts.biases import bias_at
from adaround_plugin.hosts.open import open_host
from adaround_plugin.rounding.grid import Grid

__all__ = ["LearnedLayer", "learned_layers", "learned_weights"]


@dataclass(frozen=True)
class LearnedLayer:
    """What `adaround` wrote for one weight.

    Attributes:
        integers: int64, of the weight's shape.
        grid: their scale, zero point and range.
        modules: the learned bias `(out,)` of each module that uses the weight, by its name: tied layers have each
            their own. None where there is none. Empty where the host leaves no way to change them.
    """

    integers: Tensor
    grid: Grid
    modules: Mapping[str, Tensor | None]


def learned_layers(prepared: nn.Module) -> dict[str, LearnedLayer]:
    """Every weight that `adaround` wrote, by layer name; tied names have the same object."""
    host = open_host(prepared)
    layers = {
        node: LearnedLayer(node.grid.nearest(node.weight), node.grid, _modules(host, node)) for node in host.nodes
    }
    return {name: layers[node] for node in host.nodes for name in node.names}


def learned_weights(prepared: nn.Module) -> dict[str, tuple[Tensor, Grid]]:
    """Integers (int64, of the weight's shape) and grid of every weight that `adaround` wrote, by layer name."""
    return {name: (layer.integers, layer.grid) for name, layer in learned_layers(prepared).items()}


def _modules(host: Host, node: WeightedNode) -> dict[str, Tensor | None]:
    """The modules that use a weight, and their biases: the one that is called, and the one that the bias belongs to."""
    if node.bias == "fixed":
        return {}
    found: dict[str, Tensor | None] = {}
    for site in node.sites:
        call = site.float_node
        bias = found[host.caller(call)] = bias_at(host, call)
        source = None if call.op == "call_module" else argument(call, 2, "bias")
        if source is not None:
            found.setdefault(str(source.target).rpartition(".")[0], bias)
    return found
