"""What a weighted node is in a prepared FX graph, and in the host's reference conversion: a module or a function."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import fx, nn

from adaround_plugin.errors import InvalidModelError
from adaround_plugin.graph.arguments import argument, attribute, owner_of
from adaround_plugin.graph.calls import CallSite, module_call
from adaround_plugin.graph.compat import is_observer, is_quantized, unfused
from adaround_plugin.graph.operators import is_weighted_function, module_op
from adaround_plugin.graph.reparametrized import is_reparametrized
from adaround_plugin.graph.transforms import origin
from adaround_plugin.hosts.base import Skipped
from adaround_plugin.hosts.finder import UNUSED, Bias, Finder, Setter, Use
from adaround_plugin.rounding.result import LayerRounding

__all__ = ["FXFinder", "weighted_module"]

_FLOAT = "left in float by the host (qconfig None, or a dtype the backend does not take)"
_PARAMETRIZED = (
    "left in float by the host while its weight has a parametrization (remove_parametrizations takes it out)"
)


def weighted_module(model: nn.Module, name: str) -> Any:
    """The weighted module of a weighted node's name; None where the name is that of a parameter."""
    found = attribute(model, name)
    return unfused(found) if isinstance(found, nn.Module) else None


class FXFinder(Finder):
    """Looks once through a graph of `prepare_fx` and its reference conversion."""

    remedy = "Check the qconfig mapping and backend_config."

    def is_observer(self, module: nn.Module) -> bool:
        return is_observer(module)

    def is_known(self, entry: Skipped) -> bool:
        # the first reason is the one that is told
        return any(entry.name == other.name for other in self.skipped)

    def look_at(self, node: fx.Node) -> Iterator[Use | Skipped]:
        if node.op == "call_module":
            outer = self.graph.get_submodule(str(node.target))
            if not is_observer(outer):
                yield from self._module(node, outer)
        elif is_weighted_function(node):
            yield self.functional(node)

    def _module(self, node: fx.Node, outer: nn.Module) -> Iterator[Use | Skipped]:
        """What a call of a module is, perhaps one with something fused to the weighted module."""
        name, kind = str(node.target), type(outer).__name__
        module = unfused(outer)
        op = module_op(module)
        if op is None:
            reason = _unsupported(outer)
            if reason is not None:
                yield Skipped(name, kind, reason)
            return
        counterpart = self.counterpart.get(origin(node))
        if counterpart is None:
            yield Skipped(name, kind, UNUSED)
            return
        converted = unfused(self.converted.get_submodule(str(counterpart.target)))
        if not is_quantized(converted):
            yield Skipped(name, kind, _PARAMETRIZED if is_reparametrized(converted) else _FLOAT)
            return
        if op.kind == "conv_transpose" and (node.args[1:] or "output_size" in node.kwargs):
            raise InvalidModelError(
                f"layer {name!r}",
                "is called with output_size, which torch's reference conversion cannot run",
                "Set output_padding in the module instead.",
            )
        if not node.args:
            raise InvalidModelError(
                f"layer {name!r}",
                "is called with its input by keyword, which torch's converted modules do not take",
                "Pass it by position.",
            )
        observer = outer.qconfig.weight().to(module.weight.device)  # type: ignore[operator,union-attr]
        yield Use(name, kind, op, module.weight, observer, CallSite(node, counterpart, module_call(outer)))

    def describe(self, node: fx.Node, parameter: str | None) -> tuple[str, str]:
        name = origin(node) if parameter is None else parameter
        return name, f"functional {getattr(node.target, '__name__', node.target)}"

    def why_float(self, parameter: str, observer: nn.Module | None, counterpart: fx.Node | None) -> str | None:
        if counterpart is None:
            return UNUSED
        if observer is None or _weight_quantizer(counterpart) is None:
            return _FLOAT
        reads = [node for node in self.graph.graph.nodes if node.op == "get_attr" and node.target == parameter]
        if any(user.op != "call_module" for read in reads for user in read.users) or self._is_float_modules(parameter):
            return "its parameter is also used without quantization"
        return None

    def _is_float_modules(self, parameter: str) -> bool:
        """Whether a parameter is that of a module which is called, and stays in float."""
        owner, _ = owner_of(self.graph, parameter)
        for node in self.graph.graph.nodes:
            if node.op != "call_module" or owner not in self.graph.get_submodule(node.target).modules():
                continue
            counterpart = self.counterpart.get(origin(node))
            if counterpart is not None:
                converted = self.converted.get_submodule(str(counterpart.target))
                if not is_quantized(unfused(converted)):
                    return True
        return False

    def qparams(self, use: Use) -> tuple[Any, Any]:
        counterpart = use.site.quantized_node
        if counterpart.op == "call_module":
            module = weighted_module(self.converted, str(counterpart.target))
            return module.weight_scale, module.weight_zero_point
        quantizer = _weight_quantizer(counterpart)
        assert quantizer is not None
        scale, zero_point = (attribute(self.converted, str(node.target)) for node in quantizer.all_input_nodes[1:])
        return scale, zero_point

    def settable(self, uses: Sequence[Use]) -> tuple[Bias, Setter]:
        names = list(dict.fromkeys(use.name for use in uses))
        modules = {name: weighted_module(self.converted, name) for name in names}
        biases = {name: module.bias for name, module in modules.items() if module is not None}
        bias: Bias = "addable" if any(one is None for one in biases.values()) else "present"
        if len(biases) < len(names):
            # a function has its bias as an argument that may be anything
            bias = "fixed"
        for use in uses:
            if modules[use.name] is not None:
                # the same values as the conversion's own copy, which nothing keeps any more
                modules[use.name].weight = use.weight
        quantizers = [_weight_quantizer(use.site.quantized_node) for use in uses if modules[use.name] is None]

        def set_quantized(root: nn.Module, rounding: LayerRounding) -> None:
            weight, grid = _constant(rounding.weight), rounding.grid
            for name in names:
                module = weighted_module(root, name)
                if module is None:
                    setattr(*owner_of(root, name), weight)
                    continue
                module.weight = weight
                module.weight_scale, module.weight_zero_point = grid.scale, grid.zero_point
                original = biases[name]
                corrected = rounding.corrected(None if original is None else original.detach())
                module.bias = None if corrected is None else _constant(corrected)
            for quantizer in quantizers:
                assert quantizer is not None
                _, scale, zero_point, *_ = quantizer.args
                for target, value in ((scale, grid.scale), (zero_point, grid.zero_point)):
                    assert isinstance(target, fx.Node)
                    setattr(*owner_of(root, str(target.target)), value)

        return bias, set_quantized


def _unsupported(module: nn.Module) -> str | None:
    """Why a module with weights, but no linear layer or convolution, is not learned."""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "an embedding's output is the weight row itself: nearest is already optimal"
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return "recurrent layers are not supported: the host's own rounding is kept"
    if any(module_op(child) is not None for child in module.modules()):
        return "inside a module that the host does not trace"
    return None


def _weight_quantizer(node: fx.Node) -> fx.Node | None:
    """The quantize node that feeds the weight of a functional call in the reference graph."""
    weight = argument(node, 1, "weight")
    if isinstance(weight, fx.Node) and weight.op == "call_method" and weight.target == "dequantize":
        source = weight.args[0]
        return source if isinstance(source, fx.Node) and source.op == "call_function" else None
    return None


def _constant(value: Any) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)
