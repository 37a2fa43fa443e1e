"""Finding the weighted nodes of a prepared graph, and what the host's conversion makes of each.

Calls are grouped by the parameter they use, so that tied weights are one node. What a call is, and how a rounding gets
into the converted graph, is the business of each host.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx, nn

from adaround_plugin.errors import InvalidModelError
from adaround_plugin.graph.arguments import argument, attribute
from adaround_plugin.graph.calls import Call, CallSite, function_call
from adaround_plugin.graph.operators import function_op
from adaround_plugin.graph.transforms import has_origin, origin
from adaround_plugin.hosts.base import Skipped, WeightedNode
from adaround_plugin.hosts.grids import observed_grid
from adaround_plugin.hosts.weight_observers import AdaRoundWeightMixin
from adaround_plugin.rounding.grid import Grid, same_grid
from adaround_plugin.rounding.linear_op import LinearOp
from adaround_plugin.rounding.result import LayerRounding

__all__ = ["UNUSED", "Bias", "Finder", "Setter", "Use", "parameter_node"]

# why a call that is not in the converted graph is not learned
UNUSED = "its result is not used: the host's convert drops it"

Bias = Literal["present", "addable", "fixed"]
Setter = Callable[[nn.Module, LayerRounding], None]


@dataclass(frozen=True)
class Use:
    """One call of a weighted operator whose weight is a parameter that the host quantizes.

    Attributes:
        name: of the module or parameter, as reports have it.
        kind: name of the operator's type.
        op: what the operator does to its weight.
        weight: the parameter itself; what it is tied to has the same.
        observer: chose the scale.
        site: where the call is in both graphs.
    """

    name: str
    kind: str
    op: LinearOp
    weight: Tensor
    observer: Any
    site: CallSite


class Finder(ABC):
    """Looks once through a prepared graph.

    Args:
        graph: the prepared graph, written out, with its observers.
        converted: the host's conversion of it, written out; nodes keep their origin's name.
    """

    # what to do about a model without a quantized weight
    remedy: ClassVar[str]

    def __init__(self, graph: fx.GraphModule, converted: fx.GraphModule) -> None:
        self.graph, self.converted = graph, converted
        self.counterpart = {origin(node): node for node in converted.graph.nodes if has_origin(node)}
        self.skipped: list[Skipped] = []

    @abstractmethod
    def is_observer(self, module: nn.Module) -> bool:
        """Whether `module` is an observer or fake-quantizer of the host's."""

    @abstractmethod
    def look_at(self, node: fx.Node) -> Iterator[Use | Skipped]:
        """The use of a weight that a node of the prepared graph is, or why it cannot be learned; mostly nothing."""

    @abstractmethod
    def describe(self, node: fx.Node, parameter: str | None) -> tuple[str, str]:
        """Name and kind of a functional call, given the name of its weight; None where that is computed."""

    @abstractmethod
    def why_float(self, parameter: str, observer: nn.Module | None, counterpart: fx.Node | None) -> str | None:
        """Why the weight of a functional call is not quantized; None where it is.

        Args:
            parameter: its name.
            observer: the one that the call reads it through, if any.
            counterpart: the call in the converted graph, if it is there.
        """

    @abstractmethod
    def qparams(self, use: Use) -> tuple[Any, Any]:
        """Scale and zero point of a weight in the converted graph: tensors or numbers."""

    @abstractmethod
    def settable(self, uses: Sequence[Use]) -> tuple[Bias, Setter]:
        """Whether this weight's bias can be corrected, and what puts a rounding into a stream's modules."""

    def is_known(self, entry: Skipped) -> bool:
        """Whether `skipped` already says this."""
        return entry in self.skipped

    def find(self) -> tuple[list[WeightedNode], list[Skipped]]:
        """The weighted nodes that can be learned, and those that cannot.

        Raises:
            InvalidModelError: none can.
        """
        groups: dict[int, list[Use]] = {}
        for node in self.graph.graph.nodes:
            for found in self.look_at(node):
                if isinstance(found, Use):
                    groups.setdefault(id(found.weight), []).append(found)
                elif not self.is_known(found):
                    self.skipped.append(found)
        nodes = [node for uses in groups.values() if (node := self._weighted_node(uses)) is not None]
        if not nodes:
            reasons = "; ".join(f"{one.name}: {one.reason}" for one in self.skipped)
            reasons = reasons or "it has no convolution or linear layer"
            raise InvalidModelError("prepared", f"no weighted node is quantized ({reasons})", self.remedy)
        return nodes, self.skipped

    def functional(self, node: fx.Node) -> Use | Skipped:
        """What a functional call `(input, weight, bias, ...)` is."""
        source, observers = parameter_node(self.graph, argument(node, 1, "weight"), self.is_observer)
        parameter = None if source is None else str(source.target)
        name, kind = self.describe(node, parameter)
        if parameter is None:
            return Skipped(name, kind, "its weight is computed, not a parameter")
        counterpart = self.counterpart.get(origin(node))
        observer = self.graph.get_submodule(str(observers[0].target)) if observers else None
        reason = self.why_float(parameter, observer, counterpart)
        if reason is not None:
            return Skipped(name, kind, reason)
        assert counterpart is not None
        weight = attribute(self.graph, parameter)
        op = function_op(node, weight.shape)
        if op is None:
            return Skipped(name, kind, "its stride, padding, dilation or groups are computed")
        return Use(name, kind, op, weight, observer, CallSite(node, counterpart, self._call(node)))

    def _call(self, node: fx.Node) -> Call | None:
        """The functional operator with another weight; None where its bias is computed."""
        bias = argument(node, 2, "bias")
        if bias is None:
            return function_call(node, None)
        source, _ = parameter_node(self.graph, bias, self.is_observer)
        return None if source is None else function_call(node, attribute(self.graph, str(source.target)))

    def _weighted_node(self, uses: Sequence[Use]) -> WeightedNode | None:
        """The weighted node of one parameter, if all of its uses agree; several names where it is tied."""
        first = uses[0]
        kinds: dict[str, str] = {}
        for use in uses:
            kinds.setdefault(use.name, use.kind)
        grid = self._grid(first)
        for other in uses[1:]:
            if other.op != first.op or not same_grid(self._grid(other), grid):
                reason = f"its weight is tied to {first.name!r}, which has another operator or another grid"
                if len(kinds) == 1:
                    reason = "its calls have different operators or grids"
                self.skipped += [Skipped(name, kind, reason) for name, kind in kinds.items()]
                return None
        bias, set_quantized = self.settable(uses)
        return WeightedNode(
            name=first.name,
            names=tuple(kinds),
            kind=first.kind,
            op=first.op,
            weight=first.weight.detach(),
            grid=grid,
            sites=tuple(use.site for use in uses),
            bias=bias,
            keeps_scale=not isinstance(first.observer, AdaRoundWeightMixin),
            set_quantized=set_quantized,
        )

    def _grid(self, use: Use) -> Grid:
        """The grid of a use, whose scale was searched by the host's conversion, and is not searched again."""
        scale, zero_point = (torch.as_tensor(value, device=use.weight.device) for value in self.qparams(use))
        return observed_grid(use.name, use.observer, scale, zero_point, use.op)


def parameter_node(
    graph: fx.GraphModule, node: Any, is_observer: Callable[[nn.Module], bool]
) -> tuple[fx.Node | None, list[fx.Node]]:
    """The `get_attr` node behind observers, and the observers' nodes; None where the value is computed."""
    observers: list[fx.Node] = []
    while isinstance(node, fx.Node) and node.op == "call_module":
        if not is_observer(graph.get_submodule(str(node.target))):
            return None, observers
        observers.append(node)
        node = node.args[0]
    return (node if isinstance(node, fx.Node) and node.op == "get_attr" else None), observers
