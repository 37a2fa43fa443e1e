"""Finding the weighted nodes of a prepared PT2E graph, and what the host's conversion makes of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, fx, nn
from torchao.quantization.pt2e import AffineQuantizedObserverBase, FakeQuantizeBase, ObserverBase

from adaround_plugin.errors import InvalidModelError
from adaround_plugin.graph.calls import Call, function_call
from adaround_plugin.graph.compat import operator_name
from adaround_plugin.hosts.grids import observed_grid, same_grid
from adaround_plugin.hosts.base import CallSite, Skipped, WeightedNode
from adaround_plugin.graph.operators import function_op, is_weighted_function
from adaround_plugin.graph.transforms import origin
from adaround_plugin.learning.layer import LayerRounding
from adaround_plugin.rounding.linear_op import LinearOp

__all__ = ["Finder", "Use", "argument", "innermost_module", "is_torchao_observer", "parameter_node", "set_argument"]

_EMBEDDINGS = {"embedding", "embedding_bag"}
_RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"}
_PRODUCTS = {"mm", "addmm", "matmul", "bmm", "baddbmm", "addbmm", "einsum", "convolution"}


def is_torchao_observer(module: nn.Module) -> bool:
    """Whether `module` is an observer or fake-quantizer of torchao."""
    return isinstance(module, ObserverBase | FakeQuantizeBase | AffineQuantizedObserverBase)


def argument(node: fx.Node, index: int, name: str) -> Any:
    """An argument of an operator, by position or keyword; None where it is left out."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name)


def set_argument(node: fx.Node, index: int, name: str, value: fx.Node) -> None:
    """Give an argument, by position where those before it are."""
    if len(node.args) > index:
        node.update_arg(index, value)
    elif len(node.args) == index:
        node.args = (*node.args, value)
    else:
        node.update_kwarg(name, value)


def innermost_module(node: fx.Node) -> tuple[str, str]:
    """`(qualified name, qualified type)` of the module whose code made this node."""
    stack = node.meta.get("nn_module_stack") or {"": ("", "")}
    path, kind = list(stack.values())[-1]
    return path, kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"


def parameter_node(graph: fx.GraphModule, node: Any) -> tuple[fx.Node | None, list[fx.Node]]:
    """The `get_attr` node behind observers, and the observers' nodes; None where the value is computed."""
    observers: list[fx.Node] = []
    while isinstance(node, fx.Node) and node.op == "call_module":
        if not is_torchao_observer(graph.get_submodule(str(node.target))):
            return None, observers
        observers.append(node)
        node = node.args[0]
    return (node if isinstance(node, fx.Node) and node.op == "get_attr" else None), observers


@dataclass(frozen=True)
class Use:
    """One call of a weighted operator with a quantized parameter."""

    name: str
    kind: str
    op: LinearOp
    weight: Tensor
    observer: nn.Module
    site: CallSite


class Finder:
    """Looks once through a prepared graph.

    Args:
        graph: the prepared graph.
        converted: the host's own conversion of a copy of it, which `find` prepares for taking roundings.
    """

    def __init__(self, graph: fx.GraphModule, converted: fx.GraphModule) -> None:
        self.graph, self.converted = graph, converted
        self.counterpart = {origin(node): node for node in converted.graph.nodes if "adaround_origin" in node.meta}
        self.skipped: list[Skipped] = []

    def find(self) -> tuple[list[WeightedNode], list[Skipped], dict[str, list[Use]]]:
        """The weighted nodes that can be learned, those that cannot, and the calls that use each of the first."""
        groups: dict[int, list[Use]] = {}
        for node in self.graph.graph.nodes:
            if node.op == "get_attr":
                self._look_inside(node)
            if node.op != "call_function":
                continue
            found = self._use(node) if is_weighted_function(node) else self._unsupported(node)
            if isinstance(found, Use):
                groups.setdefault(id(found.weight), []).append(found)
            elif found is not None and found not in self.skipped:
                self.skipped.append(found)
        uses: dict[str, list[Use]] = {}
        nodes = [node for group in groups.values() for node in self._weighted(group, uses)]
        if not nodes:
            reasons = (
                "; ".join(f"{s.name}: {s.reason}" for s in self.skipped) or "it has no convolution or linear layer"
            )
            raise InvalidModelError(
                "prepared", f"no weighted node is quantized ({reasons})", "Check the quantizer's configuration."
            )
        return nodes, self.skipped, uses

    def _use(self, node: fx.Node) -> Use | Skipped:
        """What is known of one call of a weighted operator."""
        kind = f"aten.{operator_name(node)[0]}"
        source, observers = parameter_node(self.graph, argument(node, 1, "weight"))
        if source is None:
            return Skipped(origin(node), kind, "its weight is computed, not a parameter")
        target = str(source.target)
        name = target.removesuffix(".weight")
        path, module = innermost_module(node)
        kind = module.rpartition(".")[2] if path == name else kind
        counterpart = self.counterpart.get(origin(node))
        if counterpart is None:
            return Skipped(name, kind, "its result is not used: the host's convert drops it")
        if not observers or not _is_unpacked(argument(counterpart, 1, "weight")):
            return Skipped(name, kind, "left in float by the quantizer")
        observer = self.graph.get_submodule(str(observers[0].target))
        if not isinstance(observer, ObserverBase | FakeQuantizeBase) or not hasattr(observer, "qscheme"):
            return Skipped(name, kind, f"its observer {type(observer).__name__} has no per-tensor or per-channel scale")
        weight = _attribute(self.graph, target)
        op = function_op(node, weight.shape)
        if op is None:
            return Skipped(name, kind, "its stride, padding, dilation or groups are computed")
        return Use(name, kind, op, weight, observer, CallSite(node, counterpart, self._call(node)))

    def _call(self, node: fx.Node) -> Call | None:
        """The operator with another weight; None where the bias is computed."""
        bias, _ = parameter_node(self.graph, argument(node, 2, "bias"))
        if bias is None and argument(node, 2, "bias") is not None:
            return None
        return function_call(node, None if bias is None else _attribute(self.graph, str(bias.target)))

    def _unsupported(self, node: fx.Node) -> Skipped | None:
        """Operators with parameters that the pass does not learn."""
        kind, is_operator = operator_name(node)
        leaves = [leaf for value in node.args for leaf in (value if isinstance(value, list | tuple) else (value,))]
        parameters = [name for name in map(self._parameter, leaves) if name is not None]
        if not is_operator or not parameters:
            return None
        if kind in _EMBEDDINGS:
            reason = "an embedding's output is the weight row itself: nearest is already optimal"
        elif kind in _RECURRENT:
            reason = "recurrent layers are not supported: the host's own rounding is kept"
        elif kind in _PRODUCTS:
            reason = "a product with a parameter that is no aten.linear or aten.conv: left as the quantizer has it"
        else:
            return None
        return Skipped(parameters[0].removesuffix(".weight"), f"aten.{kind}", reason)

    def _parameter(self, node: Any) -> str | None:
        """Name of the matrix a node stands for: a parameter, possibly observed, transposed or viewed."""
        while isinstance(node, fx.Node) and node.op in ("call_module", "call_function") and node.args:
            if node.op == "call_function" and operator_name(node)[0] not in ("t", "transpose", "permute", "view"):
                return None
            node = node.args[0]
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return None
        value = _attribute(self.graph, str(node.target))
        return str(node.target) if isinstance(value, nn.Parameter) and value.dim() > 1 else None

    def _look_inside(self, node: fx.Node) -> None:
        """Note the weighted operators in the body of a higher-order operator, which quantizers do not enter."""
        body = _attribute(self.graph, str(node.target))
        if isinstance(body, fx.GraphModule):
            inside = [inner for inner in body.graph.nodes if is_weighted_function(inner)]
            reason = "inside the body of a higher-order operator"
            self.skipped += [
                Skipped(f"{node.target}.{inner.name}", f"aten.{operator_name(inner)[0]}", reason) for inner in inside
            ]

    def _weighted(self, group: list[Use], uses: dict[str, list[Use]]) -> Iterator[WeightedNode]:
        """The weighted node of one parameter, if all of its calls agree."""
        first = group[0]
        names = tuple(dict.fromkeys(use.name for use in group))
        weight = first.weight.detach()
        grid, keeps_scale = observed_grid(first.name, first.observer, weight, first.op)
        for other in group[1:]:
            if other.op != first.op or not same_grid(
                observed_grid(other.name, other.observer, weight, other.op)[0], grid
            ):
                reason = f"its weight is tied to {first.name!r}, which has another operator or another grid"
                self.skipped += [Skipped(name, first.kind, reason) for name in names]
                return
        uses[first.name] = group
        sites = tuple(use.site for use in group)
        bias, set_quantized = self._take_over(len(uses), sites)
        yield WeightedNode(
            first.name, names, first.kind, first.op, weight, grid, sites, bias, keeps_scale, set_quantized
        )

    def _take_over(
        self, number: int, sites: tuple[CallSite, ...]
    ) -> tuple[Literal["present", "addable", "fixed"], Callable[[LayerRounding], None]]:
        """Feed a weight's calls in the converted graph from attributes of our own; returns how to set these."""
        module = self.converted
        calls = [site.quantized_node for site in sites]
        sources = [argument(call, 2, "bias") for call in calls]
        fixed = any(not (source is None or source.op == "get_attr") for source in sources)
        weight_name = f"_adaround_weight_{number}"
        module.register_buffer(weight_name, None)
        originals: dict[str, Tensor | None] = {}
        for call, source in zip(calls, sources, strict=True):
            with module.graph.inserting_before(call):
                set_argument(call, 1, "weight", module.graph.get_attr(weight_name))
                if fixed:
                    continue
                bias_name = f"{weight_name}_bias_{0 if source is None else source.name}"
                if bias_name not in originals:
                    originals[bias_name] = None if source is None else _attribute(module, str(source.target)).detach()
                    module.register_buffer(bias_name, originals[bias_name])
                set_argument(call, 2, "bias", module.graph.get_attr(bias_name))

        def set_quantized(rounding: LayerRounding) -> None:
            setattr(module, weight_name, rounding.grid.dequantize(rounding.integers))
            for name, original in originals.items():
                correction = rounding.bias_correction
                corrected = (
                    original if correction is None else correction if original is None else original + correction
                )
                setattr(module, name, corrected)

        if fixed:
            return "fixed", set_quantized
        return "addable" if any(source is None for source in sources) else "present", set_quantized


def _is_unpacked(node: Any) -> bool:
    """Whether a value was quantized per tensor, per channel or per group."""
    kinds = ("dequantize_per_tensor", "dequantize_per_channel", "dequantize_affine")
    return isinstance(node, fx.Node) and operator_name(node)[0] in kinds


def _attribute(model: nn.Module, name: str) -> Any:
    path, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(path), leaf)
