"""Finding the weighted nodes of a prepared FX graph, and what the host's reference conversion makes of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, fx, nn

from adaround_plugin.errors import InvalidModelError
from adaround_plugin.graph.calls import Call, function_call, module_call
from adaround_plugin.graph.compat import is_observer, is_quantized, unfused
from adaround_plugin.hosts.grids import observed_grid, same_grid
from adaround_plugin.hosts.base import CallSite, Skipped, WeightedNode
from adaround_plugin.graph.operators import function_op, is_weighted_function, module_op
from adaround_plugin.graph.transforms import origin
from adaround_plugin.rounding.grid import Grid
from adaround_plugin.learning.layer import LayerRounding
from adaround_plugin.rounding.linear_op import LinearOp

__all__ = ["Finder", "attribute", "owner"]


def attribute(model: nn.Module, name: str) -> Any:
    """The submodule or parameter of a qualified name."""
    path, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(path), leaf)


def owner(model: nn.Module, name: str) -> tuple[Any, Tensor]:
    """`(weighted module, its weight)` for a module's name; `(None, parameter)` for a functional weight's name."""
    found = attribute(model, name)
    if isinstance(found, nn.Module):
        module = unfused(found)
        return module, module.weight
    return None, found


class Finder:
    """Looks once through a prepared graph.

    Args:
        graph: the prepared graph, written out flat.
        reference: its reference conversion, written out flat; nodes keep their origin's name.
    """

    def __init__(self, graph: fx.GraphModule, reference: fx.GraphModule) -> None:
        self.graph, self.reference = graph, reference
        self.counterpart = {origin(node): node for node in reference.graph.nodes if "adaround_origin" in node.meta}
        self.skipped: list[Skipped] = []
        # weights tied to one another are one node: name -> sites, grouped by the parameter itself
        self.sites: dict[int, dict[str, list[CallSite]]] = {}
        self.ops: dict[str, tuple[LinearOp, str]] = {}

    def find(self) -> tuple[list[WeightedNode], list[Skipped]]:
        """The weighted nodes that can be learned, and those that cannot."""
        seen: set[str] = set()
        for node in self.graph.graph.nodes:
            found = self._module(node) if node.op == "call_module" else self._function(node)
            if found is None:
                continue
            name, kind, weight, result = found
            if isinstance(result, str):
                if name not in seen:
                    self.skipped.append(Skipped(name, kind, result))
                seen.add(name)
                continue
            self.ops[name] = (result, kind)
            site = CallSite(node, self.counterpart[origin(node)], self._call(node))
            self.sites.setdefault(id(weight), {}).setdefault(name, []).append(site)
        nodes = [node for group in self.sites.values() for node in self._tied(group)]
        if not nodes:
            reasons = (
                "; ".join(f"{s.name}: {s.reason}" for s in self.skipped) or "it has no convolution or linear layer"
            )
            raise InvalidModelError(
                "prepared",
                f"no weighted node is quantized ({reasons})",
                "Check the qconfig mapping and backend_config.",
            )
        return nodes, self.skipped

    def _module(self, node: fx.Node) -> tuple[str, str, Tensor | None, LinearOp | str] | None:
        name = str(node.target)
        outer = self.graph.get_submodule(name)
        if is_observer(outer):
            return None
        module = unfused(outer)
        kind = type(outer).__name__
        op = module_op(module)
        if op is None:
            return self._unsupported(name, kind, outer)
        counterpart = self.counterpart.get(origin(node))
        if counterpart is None or not is_quantized(unfused(self.reference.get_submodule(str(counterpart.target)))):
            return name, kind, None, "left in float by the host (qconfig None, or a dtype the backend does not take)"
        if op.kind == "conv_transpose" and (len(node.args) > 1 or "output_size" in node.kwargs):
            raise InvalidModelError(
                f"layer {name!r}",
                "is called with output_size, which torch's reference conversion cannot run",
                "Set output_padding in the module instead.",
            )
        return name, kind, module.weight, op

    def _unsupported(self, name: str, kind: str, module: nn.Module) -> tuple[str, str, None, str] | None:
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            return name, kind, None, "an embedding's output is the weight row itself: nearest is already optimal"
        if isinstance(module, nn.RNNBase | nn.RNNCellBase):
            return name, kind, None, "recurrent layers are not supported: the host's own rounding is kept"
        if any(module_op(child) is not None for child in module.modules()):
            return name, kind, None, "inside a module that the host does not trace"
        return None

    def _function(self, node: fx.Node) -> tuple[str, str, Tensor | None, LinearOp | str] | None:
        if not is_weighted_function(node):
            return None
        kind = f"functional {getattr(node.target, '__name__', node.target)}"
        argument = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
        source = argument
        while isinstance(source, fx.Node) and source.op == "call_module" and self._is_observer_node(source):
            source = source.args[0]
        if not isinstance(source, fx.Node) or source.op != "get_attr":
            return origin(node), kind, None, "its weight is computed, not a parameter"
        name = str(source.target)
        quantized = self._weight_of(self.counterpart.get(origin(node)))
        if quantized is None or source is argument:
            return name, kind, None, "left in float by the host (qconfig None, or a dtype the backend does not take)"
        if any(user.op != "call_module" for n in self._reads(name) for user in n.users):
            return name, kind, None, "its parameter is also used without quantization"
        weight = attribute(self.graph, name)
        op = function_op(node, weight.shape)
        return name, kind, weight, op or "its stride, padding, dilation or groups are computed"

    def _call(self, node: fx.Node) -> Call | None:
        """The operator with another weight; None where the bias is computed."""
        if node.op == "call_module":
            return module_call(self.graph.get_submodule(str(node.target)))
        bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
        if not isinstance(bias, fx.Node):
            return function_call(node, None)
        return function_call(node, attribute(self.graph, str(bias.target))) if bias.op == "get_attr" else None

    def _reads(self, name: str) -> list[fx.Node]:
        """The nodes that read a parameter."""
        return [node for node in self.graph.graph.nodes if node.op == "get_attr" and node.target == name]

    def _is_observer_node(self, node: fx.Node) -> bool:
        return is_observer(self.graph.get_submodule(str(node.target)))

    def _weight_of(self, node: fx.Node | None) -> fx.Node | None:
        """The quantize node that feeds the weight of a functional call in the reference graph."""
        if node is None:
            return None
        weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
        if isinstance(weight, fx.Node) and weight.op == "call_method" and weight.target == "dequantize":
            source = weight.args[0]
            return source if isinstance(source, fx.Node) and source.op == "call_function" else None
        return None

    def _tied(self, group: dict[str, list[CallSite]]) -> list[WeightedNode]:
        """The weighted node of one parameter; several names when it is tied across modules."""
        names = tuple(group)
        grids = {name: self._grid(name, group[name][0]) for name in names}
        first = names[0]
        op, kind = self.ops[first]
        for other in names[1:]:
            same = self.ops[other][0] == op and same_grid(grids[first][0], grids[other][0])
            if not same:
                reason = f"its weight is tied to {first!r}, which has another operator or another grid"
                self.skipped += [Skipped(name, self.ops[name][1], reason) for name in names]
                return []
        position = {node: i for i, node in enumerate(self.graph.graph.nodes)}
        found = [site for sites in group.values() for site in sites]
        sites = tuple(sorted(found, key=lambda site: position[site.float_node]))
        weight = self._weight(first)
        grid, keeps_scale = grids[first]
        return [
            WeightedNode(
                first,
                names,
                kind,
                op,
                weight.detach(),
                grid,
                sites,
                self._bias(names),
                keeps_scale,
                self._setter(group),
            )
        ]

    def _weight(self, name: str) -> Tensor:
        return owner(self.graph, name)[1]

    def _bias(self, names: tuple[str, ...]) -> Literal["present", "addable", "fixed"]:
        """Modules can be given a bias; functional calls have it as an argument that may be anything."""
        modules = [owner(self.graph, name)[0] for name in names]
        if any(module is None for module in modules):
            return "fixed"
        return "addable" if any(module.bias is None for module in modules) else "present"

    def _grid(self, name: str, site: CallSite) -> tuple[Grid, bool]:
        """The grid that the host's observer asks for, and whether its scale is the user's choice."""
        weight = self._weight(name).detach()
        module, _ = owner(self.graph, name)
        if module is not None:
            observer = self.graph.get_submodule(str(site.float_node.target)).qconfig.weight()  # type: ignore[operator,union-attr]
            observer = observer.to(weight.device)
            observer(weight)
        else:
            observed = site.float_node.args[1] if len(site.float_node.args) > 1 else site.float_node.kwargs["weight"]
            assert isinstance(observed, fx.Node)
            observer = self.graph.get_submodule(str(observed.target))
        return observed_grid(name, observer, weight, self.ops[name][0])

    def _setter(self, group: dict[str, list[CallSite]]) -> Callable[[LayerRounding], None]:
        """Puts a rounding into the reference graph."""
        reference, original = self.reference, {}
        for name in group:
            module, _ = owner(reference, name)
            original[name] = None if module is None or module.bias is None else module.bias.detach().clone()

        def set_quantized(rounding: LayerRounding) -> None:
            grid = rounding.grid
            weight = grid.dequantize(rounding.integers)
            for name, sites in group.items():
                module, parameter = owner(reference, name)
                parameter.data = weight
                if module is not None:
                    module.weight_scale, module.weight_zero_point = grid.scale, grid.zero_point
                    corrected = rounding.corrected(original[name])
                    module.bias = None if corrected is None else nn.Parameter(corrected, requires_grad=False)
                    continue
                for site in sites:
                    quantize = self._weight_of(site.quantized_node)
                    assert quantize is not None
                    for argument, value in zip(quantize.args[1:3], (grid.scale, grid.zero_point), strict=True):
                        assert isinstance(argument, fx.Node)
                        setattr(reference, str(argument.target), value)

        return set_quantized
