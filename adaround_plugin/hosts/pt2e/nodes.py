"""What a weighted node is in a prepared PT2E graph, and in the host's conversion: a call of an ATen operator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, fx, nn
from torchao.quantization.pt2e import AffineQuantizedObserverBase, FakeQuantizeBase, ObserverBase

from adaround_plugin.graph.arguments import argument, attribute, set_argument
from adaround_plugin.graph.compat import operator_name
from adaround_plugin.graph.operators import is_weighted_function
from adaround_plugin.graph.streams import Stream
from adaround_plugin.graph.transforms import erase_unused, origin
from adaround_plugin.hosts import finder
from adaround_plugin.hosts.base import Skipped
from adaround_plugin.hosts.finder import UNUSED, Bias, Finder, Setter, Use
from adaround_plugin.rounding.result import LayerRounding

__all__ = ["LEFT_IN_FLOAT", "PT2EFinder", "described", "innermost_module", "is_torchao_observer", "parameter_node"]

LEFT_IN_FLOAT = "left in float by the quantizer"

_EMBEDDINGS = {"embedding", "embedding_bag"}
_RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"}
_PRODUCTS = {"mm", "addmm", "matmul", "bmm", "baddbmm", "addbmm", "einsum", "convolution"}


def is_torchao_observer(module: nn.Module) -> bool:
    """Whether `module` is an observer or fake-quantizer of torchao."""
    return isinstance(module, ObserverBase | FakeQuantizeBase | AffineQuantizedObserverBase)


def innermost_module(node: fx.Node) -> tuple[str, str]:
    """`(qualified name, qualified type)` of the module whose code made this node."""
    stack = node.meta.get("nn_module_stack") or {"": ("", "")}
    path, kind = list(stack.values())[-1]
    return path, kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"


def described(node: fx.Node, name: str) -> str:
    """What a layer of this name is that makes a call: the type of the module, or else the operator."""
    path, module = innermost_module(node)
    return module.rpartition(".")[2] if path == name else f"aten.{operator_name(node)[0]}"


def parameter_node(graph: fx.GraphModule, node: Any) -> tuple[fx.Node | None, list[fx.Node]]:
    """The `get_attr` node behind observers of torchao, and their nodes; None where the value is computed."""
    return finder.parameter_node(graph, node, is_torchao_observer)


class PT2EFinder(Finder):
    """Looks once through a graph of `prepare_pt2e` and its conversion, which it prepares for taking roundings."""

    remedy = "Check the quantizer's configuration."

    def __init__(self, graph: fx.GraphModule, converted: fx.GraphModule) -> None:
        super().__init__(graph, converted)
        self._stream = Stream(converted, converted.graph)
        self._taken = 0

    def is_observer(self, module: nn.Module) -> bool:
        return is_torchao_observer(module)

    def look_at(self, node: fx.Node) -> Iterator[Use | Skipped]:
        if node.op == "get_attr":
            yield from self._inside(node)
        elif is_weighted_function(node):
            yield self.functional(node)
        elif node.op == "call_function":
            yield from self._unsupported(node)

    def describe(self, node: fx.Node, parameter: str | None) -> tuple[str, str]:
        if parameter is None:
            return origin(node), f"aten.{operator_name(node)[0]}"
        name = parameter.removesuffix(".weight")
        return name, described(node, name)

    def why_float(self, parameter: str, observer: nn.Module | None, counterpart: fx.Node | None) -> str | None:
        if counterpart is None:
            return UNUSED
        if observer is None or not _is_unpacked(argument(counterpart, 1, "weight")):
            return LEFT_IN_FLOAT
        if not isinstance(observer, ObserverBase | FakeQuantizeBase) or not hasattr(observer, "qscheme"):
            return f"its observer {type(observer).__name__} has no per-tensor or per-channel scale"
        return None

    def _inside(self, node: fx.Node) -> Iterator[Skipped]:
        """The weighted operators in the body of a higher-order operator, which quantizers do not enter."""
        body = attribute(self.graph, str(node.target))
        for inner in body.graph.nodes if isinstance(body, fx.GraphModule) else ():
            if is_weighted_function(inner):
                kind = f"aten.{operator_name(inner)[0]}"
                yield Skipped(f"{node.target}.{inner.name}", kind, "inside the body of a higher-order operator")

    def _unsupported(self, node: fx.Node) -> Iterator[Skipped]:
        """An operator with a parameter that the pass does not learn."""
        kind, is_operator = operator_name(node)
        leaves = [leaf for value in node.args for leaf in (value if isinstance(value, list | tuple) else (value,))]
        parameters = [name for name in map(self._matrix, leaves) if name is not None]
        if not is_operator or not parameters:
            return
        if kind in _EMBEDDINGS:
            reason = "an embedding's output is the weight row itself: nearest is already optimal"
        elif kind in _RECURRENT:
            reason = "recurrent layers are not supported: the host's own rounding is kept"
        elif kind in _PRODUCTS:
            reason = "a product with a parameter, but not aten.linear or aten.conv: not learned"
        else:
            return
        yield Skipped(parameters[0].removesuffix(".weight"), f"aten.{kind}", reason)

    def _matrix(self, node: Any) -> str | None:
        """Name of the matrix a node stands for: a parameter, possibly observed, transposed or viewed."""
        while isinstance(node, fx.Node) and node.op in ("call_module", "call_function") and node.args:
            if node.op == "call_function" and operator_name(node)[0] not in ("t", "transpose", "permute", "view"):
                return None
            node = node.args[0]
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return None
        value = attribute(self.graph, str(node.target))
        return str(node.target) if isinstance(value, nn.Parameter) and value.dim() > 1 else None

    def qparams(self, use: Use) -> tuple[Any, Any]:
        unpacked = argument(use.site.quantized_node, 1, "weight")
        # the shape of the groups stands before the scale
        first = 2 if operator_name(unpacked)[0] == "dequantize_affine" else 1
        scale, zero_point = self._stream.value(unpacked.args[first : first + 2], {})
        return scale, zero_point

    def settable(self, uses: Sequence[Use]) -> tuple[Bias, Setter]:
        """Feed a weight's calls in the converted graph from attributes of our own.

        They start with what the host's quantize and dequantize operators make of the weight, and with its biases.
        """
        self._taken += 1
        module, weight_name = self.converted, f"_adaround_weight_{self._taken}"
        calls = [use.site.quantized_node for use in uses]
        sources = [argument(call, 2, "bias") for call in calls]
        is_fixed = any(source is not None and source.op != "get_attr" for source in sources)
        weights = list(dict.fromkeys(argument(call, 1, "weight") for call in calls))
        module.register_buffer(weight_name, self._stream.value(weights[0], {}).detach())
        biases: dict[str, Tensor | None] = {}
        for call, source in zip(calls, sources, strict=True):
            with module.graph.inserting_before(call):
                set_argument(call, 1, "weight", module.graph.get_attr(weight_name))
                if is_fixed:
                    continue
                bias_name = f"{weight_name}_bias_{0 if source is None else source.name}"
                if bias_name not in biases:
                    biases[bias_name] = None if source is None else attribute(module, str(source.target)).detach()
                    module.register_buffer(bias_name, biases[bias_name])
                set_argument(call, 2, "bias", module.graph.get_attr(bias_name))
        for weight in weights:
            erase_unused(module, weight)

        def set_quantized(root: nn.Module, rounding: LayerRounding) -> None:
            setattr(root, weight_name, rounding.weight)
            for name, bias in biases.items():
                setattr(root, name, rounding.corrected(bias))

        if is_fixed:
            return "fixed", set_quantized
        return "addable" if any(source is None for source in sources) else "present", set_quantized


def _is_unpacked(node: Any) -> bool:
    """Whether a value was quantized per tensor, per channel or per group."""
    kinds = ("dequantize_per_tensor", "dequantize_per_channel", "dequantize_affine")
    return isinstance(node, fx.Node) and operator_name(node)[0] in kinds
