"""What a host must tell about a prepared model: the contract between graphs and learning.

Nothing changes a host: `write` takes a copy of the prepared model. Quantized streams have modules of their own
(`open_streams`), and float streams share `float_graph`, whose modules are not the caller's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor, fx, nn

from adaround_plugin.errors import InvalidBatchError
from adaround_plugin.graph.calls import CallSite
from adaround_plugin.graph.compat import take_over
from adaround_plugin.graph.streams import Stream
from adaround_plugin.graph.transforms import separate
from adaround_plugin.rounding.grid import Grid
from adaround_plugin.rounding.linear_op import LinearOp
from adaround_plugin.rounding.result import LayerRounding

__all__ = [
    "ActivationQuantizer",
    "Host",
    "ObservedActivation",
    "Skipped",
    "Streams",
    "WeightedNode",
    "handed_over",
    "open_streams",
]

# the float and the quantized stream
Streams = tuple[Stream, Stream]


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
        set_quantized: put a rounding into the modules of a quantized stream, for all sites at once.
        stored: what is stored of a rounding: another bias, where biases are integers.
        float_bias: why the bias stays in float though integers were asked for; else empty.
    """

    name: str
    names: tuple[str, ...]
    kind: str
    op: LinearOp
    weight: Tensor
    grid: Grid
    sites: tuple[CallSite, ...]
    bias: Literal["present", "addable", "fixed"]
    keeps_scale: bool
    set_quantized: Callable[[nn.Module, LayerRounding], None]
    stored: Callable[[LayerRounding], LayerRounding] = field(default=lambda rounding: rounding)
    float_bias: str = ""

    @property
    def nearest(self) -> LayerRounding:
        """Round-to-nearest on the observer's grid, as it is stored."""
        return self.stored(LayerRounding(self.grid, self.grid.nearest(self.weight)))

    def check_input(self, x: Tensor, batch: int) -> None:
        """Raise `InvalidBatchError` if an input of the float operator does not fit the weight."""
        if not x.is_floating_point():
            raise InvalidBatchError(
                f"layer {self.name!r}",
                f"its input in batch {batch} is {x.dtype}, its weight {self.weight.dtype}",
                "Pass float32 batches.",
            )
        if not self.op.accepts(x, self.weight.shape):
            raise InvalidBatchError(
                f"layer {self.name!r}",
                f"its input of shape {tuple(x.shape)} in batch {batch} does not fit its weight "
                f"{tuple(self.weight.shape)}",
                "Check the shape of the batches.",
            )


@dataclass(frozen=True)
class ActivationQuantizer:
    """Activations that are quantized with one scale, which an observer of ours chose.

    Attributes:
        names: qualified names of the observers in the prepared model.
        nodes: the quantize nodes of the quantized graph.
        clamps: nodes before them that keep their range.
        scale, zero_point: as observed.
        quant_min, quant_max: the integer range.
        set_scale: let a quantized stream run with another scale.
    """

    names: tuple[str, ...]
    nodes: tuple[fx.Node, ...]
    clamps: tuple[fx.Node, ...]
    scale: float
    zero_point: int
    quant_min: int
    quant_max: int
    set_scale: Callable[[Stream, float], None]


@dataclass(frozen=True)
class ObservedActivation:
    """An activation that is quantized in a range that an observer chose by what it saw.

    Attributes:
        name: of the module, or of the node and the module that it stands in.
        node: of the float graph.
        low, high: the least and the greatest value that the observer saw.
    """

    name: str
    node: fx.Node
    low: float
    high: float


@dataclass(frozen=True)
class Skipped:
    """A weighted node that is not learned, and why."""

    name: str
    kind: str
    reason: str


class Host(Protocol):
    """A calibrated model of one toolkit.

    Attributes:
        toolkit: its name.
        prepared: the model; it is read only.
        signature: the model's inputs.
        inputs: names of the placeholders of its graphs, in order.
        float_graph: its graph without observers, the modules separate from those of `prepared`.
        quantized_graph: the host's own conversion of it. Streams run its nodes on modules of their own.
        nodes: the weighted nodes that the host quantizes and that can be learned, in graph order.
        skipped: the weighted nodes that are not, with reasons.
        quantizers: of activations, whose scales are ours to choose.
        observed: activations that are quantized, with the ranges that their observers saw.
        batch_size: the number of samples that the graphs are made for; None for any.
    """

    toolkit: ClassVar[str]
    prepared: fx.GraphModule
    signature: inspect.Signature
    inputs: list[str]
    float_graph: fx.GraphModule
    quantized_graph: fx.GraphModule
    nodes: list[WeightedNode]
    skipped: list[Skipped]
    quantizers: list[ActivationQuantizer]
    observed: list[ObservedActivation]
    batch_size: int | None

    def __init__(self, prepared: Any) -> None:
        """Open a calibrated model."""

    def flatten(self, arguments: inspect.BoundArguments) -> list[Any]:
        """Arguments as values of the graph's placeholders; raises `ValueError` where they do not fit."""

    def call(self, model: nn.Module, arguments: list[Any]) -> Any:
        """Call a model of the same inputs on values of the graph's placeholders."""

    def copy(self) -> fx.GraphModule:
        """A deep copy of `prepared` that the host converts like `prepared` itself."""

    @staticmethod
    def copied(prepared: fx.GraphModule) -> fx.GraphModule:
        """The same of a prepared model that may not be calibrated."""

    @staticmethod
    def freeze(model: fx.GraphModule, observer: str, grid: Grid) -> None:
        """Put an observer that always reports a grid in the place of one of a copy, by its qualified name."""

    def is_type(self, node: WeightedNode, kind: type[nn.Module]) -> bool:
        """Whether a weighted node is, or belongs to, a module of this type."""

    def caller(self, call: fx.Node) -> str:
        """Qualified name of the module that a call in the float graph is, or stands in; empty where that is unknown."""

    def write(self, model: fx.GraphModule, roundings: Mapping[str, LayerRounding], scales: Mapping[str, float]) -> None:
        """Write roundings, by name of the weighted node, and scales of activations, by name of the observer, into a
        copy of `prepared`."""


def open_streams(host: Host) -> Streams:
    """The float and the quantized stream of a host from their inputs on.

    The quantized stream has the weights of the host's conversion until `WeightedNode.set_quantized` gives it others.
    """
    exact, quantized = host.float_graph, host.quantized_graph
    return Stream(exact, exact.graph), Stream(separate(quantized), quantized.graph)


def handed_over(host: Host, written: fx.GraphModule, inplace: bool, entry: str) -> fx.GraphModule:
    """What a caller gets: the copy that was written, or the prepared model itself, which becomes it as a whole.

    Args:
        host: of the prepared model.
        written: the copy.
        inplace: whether the prepared model is asked for.
        entry: of the copy's `meta`, which was written, too.
    """
    if not inplace:
        return written
    take_over(host.prepared, written, entry)
    return host.prepared
