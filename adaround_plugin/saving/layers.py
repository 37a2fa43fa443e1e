"""Learned layers as tensors and facts of a file, and what a file says about them held against a host's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from adaround_plugin.errors import InvalidModelError
from adaround_plugin.graph.transforms import origin
from adaround_plugin.hosts.base import Host, WeightedNode
from adaround_plugin.hosts.biases import bias_at
from adaround_plugin.rounding.grid import Grid
from adaround_plugin.rounding.packing import pack, unpack
from adaround_plugin.rounding.result import LayerRounding, same_bias

__all__ = ["layer_facts", "read_layer"]

_SAME = "Prepare the same network with the same configuration."


@dataclass(frozen=True)
class _SavedRounding(LayerRounding):
    """A rounding whose biases are known themselves: adding up again what was rounded once would round it twice.

    Attributes:
        biases: of each call, before and after.
    """

    biases: Sequence[tuple[Tensor | None, Tensor | None]] = field(default=())

    def corrected(self, bias: Tensor | None) -> Tensor | None:
        """What was saved for calls that have this bias; where none of them was learned, it stays."""
        return next((after for before, after in self.biases if same_bias(before, bias)), bias)


def layer_facts(host: Host, node: WeightedNode, place: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a learned layer is, as JSON can hold it, and its tensors.

    Args:
        host: of the learned model.
        node: the layer.
        place: how the names of its tensors begin.

    Raises:
        InvalidModelError: the weight does not lie on its grid.
    """
    grid = node.grid
    integers = grid.nearest(node.weight)
    if not torch.equal(grid.dequantize(integers), node.weight):
        raise InvalidModelError(
            f"layer {node.name!r}", "was changed after it was learned", "Save what adaround(...) returned."
        )
    tensors = {
        f"{place}.integers": pack(integers, grid.bits, grid.quant_min),
        f"{place}.scale": grid.scale.to(grid.scale_dtype),
    }
    if bool(grid.zero_point.any()):
        tensors[f"{place}.zero_point"] = grid.zero_point.int()
    biases = {}
    for number, site in enumerate(node.sites):
        bias = None if node.bias == "fixed" else bias_at(host, site.float_node)
        if bias is not None:
            biases[str(number)] = f"{place}.bias.{number}"
            tensors[f"{place}.bias.{number}"] = bias
    return {**_described(node), "biases": biases}, tensors


def read_layer(
    host: Host, node: WeightedNode, facts: Mapping[str, Any], place: str, tensors: Mapping[str, Tensor]
) -> LayerRounding:
    """The rounding of a layer of a freshly prepared model.

    Args:
        host: of that model.
        node: the layer.
        facts, place, tensors: as `layer_facts` gave them.

    Raises:
        InvalidModelError: the layer has another operator, shape or grid.
    """
    described = _described(node)
    for what, found in described.items():
        if found != facts[what]:
            raise InvalidModelError(f"layer {node.name!r}", f"has {what} {found}, not {facts[what]}", _SAME)
    device = node.weight.device
    grid = node.grid
    zero_point = tensors.get(f"{place}.zero_point")
    scale = tensors[f"{place}.scale"].to(device).float()
    learned = replace(
        grid,
        scale=scale,
        zero_point=torch.zeros_like(scale, dtype=torch.int64) if zero_point is None else zero_point.to(device).long(),
    )
    integers = unpack(tensors[f"{place}.integers"].to(device), grid.bits, grid.quant_min, tuple(node.weight.shape))
    biases = _biases(host, node, facts["biases"], tensors)
    changed = [(before, after) for before, after in biases if not same_bias(before, after)]
    correction = None
    if changed:
        before, after = changed[0]
        assert after is not None
        correction = after if before is None else after - before
    return _SavedRounding(learned, integers, correction, biases=biases)


def _biases(
    host: Host, node: WeightedNode, names: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> list[tuple[Tensor | None, Tensor | None]]:
    """The bias of each call, before and after."""
    found = []
    for number, site in enumerate(node.sites):
        before = None if node.bias == "fixed" else bias_at(host, site.float_node)
        name = names.get(str(number))
        found.append((before, None if name is None else tensors[name].to(node.weight.device)))
    return found


def _described(node: WeightedNode) -> dict[str, Any]:
    """What a layer has in common before and after it is learned."""
    return {
        "calls": [origin(site.float_node) for site in node.sites],
        "operator": str(node.op),
        "shape": list(node.weight.shape),
        "grid": _grid_text(node.grid),
    }


def _grid_text(grid: Grid) -> str:
    """A grid without its scale, in words."""
    scheme = "symmetric" if grid.symmetric else "affine"
    along = "per tensor" if grid.ch_axis is None else f"along axis {grid.ch_axis}"
    groups = "" if grid.group_size is None else f" in groups of {grid.group_size}"
    return f"{scheme} {grid.quant_min}..{grid.quant_max} {along}{groups}, {grid.dtype}, scales {grid.scale_dtype}"
