"""What a host must tell about a weighted node: the contract between graphs and learning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, fx

from adaround_plugin.grid import Grid
from adaround_plugin.layer import LayerRounding
from adaround_plugin.weighted_op import WeightedOp

__all__ = ["CallSite", "Skipped", "WeightedNode"]


@dataclass(frozen=True)
class CallSite:
    """One place where the weight is used: the same node in the float and in the quantized graph."""

    float_node: fx.Node
    quantized_node: fx.Node


@dataclass(frozen=True)
class WeightedNode:
    """A weight that a host quantizes, with every call site that uses it.

    Attributes:
        name: qualified name of the module or parameter; `names` has those of all that are tied to it.
        kind: name of the operator's type, for the report.
        op: what the operator does to its weight.
        weight: the float weight.
        grid: the grid that the host's observer chose.
        sites: call sites in graph order.
        bias: whether there is one for a correction to go into: `"present"`, `"addable"`, or `"fixed"` where the host
            leaves no way to change or add one.
        keeps_scale: the observer is not ours: its scale is the user's choice.
        set_quantized: put a rounding into the quantized graph, for all sites at once.
    """

    name: str
    names: tuple[str, ...]
    kind: str
    op: WeightedOp
    weight: Tensor
    grid: Grid
    sites: tuple[CallSite, ...]
    bias: Literal["present", "addable", "fixed"]
    keeps_scale: bool
    set_quantized: Callable[[LayerRounding], None]


@dataclass(frozen=True)
class Skipped:
    """A weighted node that is not learned, and why."""

    name: str
    kind: str
    reason: str
