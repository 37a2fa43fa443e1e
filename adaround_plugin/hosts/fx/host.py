"""The FX host: a model from `prepare_fx`, its weighted nodes, its two graphs, and writing back into it.

The quantized graph is the host's own reference conversion of a copy of the prepared model, so it equals
`convert_to_reference_fx` bit for bit and shows, node by node, what the host really quantizes.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.ao.quantization import QConfig
from torch.ao.quantization.backend_config import BackendConfig
from torch.ao.quantization.observer import PlaceholderObserver
from torch.ao.quantization.quantize_fx import convert_to_reference_fx

from adaround_plugin.errors import InvalidModelError
from adaround_plugin.graph.arguments import argument, attribute, owner_of, replace_module
from adaround_plugin.graph.clamps import is_clamp
from adaround_plugin.graph.compat import (
    convert_to_decomposed_fx,
    forget_models,
    is_observed,
    is_observer,
    unfused,
    unordered_signature,
)
from adaround_plugin.graph.operators import is_weighted_function
from adaround_plugin.graph.paths import quantizes
from adaround_plugin.graph.reparametrized import deep_copy, make_plain
from adaround_plugin.graph.transforms import functionalize, inline, strip
from adaround_plugin.hosts.activation_quantizers import activation_quantizers, write_scales
from adaround_plugin.hosts.base import WeightedNode
from adaround_plugin.hosts.checks import check_prepared_fx
from adaround_plugin.hosts.fx.clamps import insert_clamps, remove_clamps
from adaround_plugin.hosts.fx.nodes import FXFinder, weighted_module
from adaround_plugin.hosts.fx.observers import FrozenObserver
from adaround_plugin.hosts.fx.qconfig import get_weight_only_backend_config
from adaround_plugin.hosts.observed_activations import observed_activations, seen_ranges
from adaround_plugin.rounding.grid import Grid
from adaround_plugin.rounding.result import LayerRounding

__all__ = ["PreparedFX", "placeholder_signature"]


class PreparedFX:
    """A calibrated model from `prepare_fx`.

    Args:
        prepared: the model; it is read only.
        backend_config: what `prepare_fx` was given. None takes the default, or the weight-only configuration if
            no activation of the model is observed.

    Attributes are those of `Host`.

    Raises:
        InvalidModelError: not prepared, in train mode, not calibrated, not in float32, or without a weighted node.
        NonFiniteError: a weight holds NaN or infinity.
    """

    toolkit: ClassVar[str] = "FX"
    batch_size: int | None = None

    def __init__(self, prepared: nn.Module, backend_config: BackendConfig | None = None) -> None:
        check_prepared_fx(prepared)
        assert isinstance(prepared, fx.GraphModule)
        self.prepared = prepared
        self.signature = placeholder_signature(prepared)
        self.inputs = list(self.signature.parameters)
        graph = inline(prepared, is_observed)
        _drop_variadic_inputs(graph)
        remove_clamps(graph)
        if backend_config is None and not _observes_activations(graph):
            backend_config = get_weight_only_backend_config()
        self.backend_config = backend_config
        reference = _reference(prepared, backend_config, convert_to_reference_fx)
        inlined = {
            id(reference.get_submodule(path))
            for path, module in prepared.named_modules()
            if path and is_observed(module)
        }
        flat_reference = inline(reference, lambda module: id(module) in inlined, shared=True)
        _drop_variadic_inputs(flat_reference)
        self.nodes, self.skipped = FXFinder(graph, flat_reference).find()
        # while every value that is quantized still has its origin
        self.quantizers = activation_quantizers(graph, flat_reference)
        ranges = seen_ranges(graph, flat_reference, is_observer)
        self.quantized_graph = functionalize(strip(flat_reference, is_observer))
        self.float_graph = functionalize(strip(graph, is_observer))
        self.observed = observed_activations(self.float_graph, ranges, self.caller)
        self._float_inputs = _float_inputs(self.quantized_graph, self.nodes)

    def flatten(self, arguments: inspect.BoundArguments) -> list[Any]:
        """Arguments in the order of the graph's placeholders."""
        for name, value in arguments.arguments.items():
            if name in self._float_inputs and isinstance(value, Tensor) and not value.is_floating_point():
                raise ValueError(f"input {name!r} is {value.dtype}, but the model quantizes it from float32")
        return list(arguments.arguments.values())

    def call(self, model: nn.Module, arguments: list[Any]) -> Any:
        """Call a model of the same inputs on values of the graph's placeholders, by name."""
        return model(**dict(zip(self.signature.parameters, arguments, strict=True)))

    def copy(self) -> fx.GraphModule:
        """A deep copy of the prepared model."""
        return self.copied(self.prepared)

    @staticmethod
    def copied(prepared: fx.GraphModule) -> fx.GraphModule:
        """A deep copy of a prepared model, calibrated or not."""
        return deep_copy(prepared)

    @staticmethod
    def freeze(model: fx.GraphModule, observer: str, grid: Grid) -> None:
        """Put a frozen observer in the place of one, under each of its names."""
        replace_module(model, model.get_submodule(observer), FrozenObserver(grid))

    def decomposed(self) -> fx.GraphModule:
        """The host's reference conversion with the operators of PT2E in place of quantized tensors."""
        converted = _reference(self.prepared, self.backend_config, convert_to_decomposed_fx)
        _widen_ranges(converted)
        return converted

    def is_type(self, node: WeightedNode, kind: type[nn.Module]) -> bool:
        """Whether a node's module, the weighted module fused into it, or that whose code calls a function, is of a
        type."""
        found = attribute(self.prepared, node.name)
        if isinstance(found, kind) or isinstance(unfused(found), kind):
            return True
        stacks = [site.float_node.meta.get("nn_module_stack") for site in node.sites]
        return any(issubclass(list(stack.values())[-1][1], kind) for stack in stacks if stack)

    def caller(self, call: fx.Node) -> str:
        """The module that is called; a function stands in none that the graph names."""
        return str(call.target) if call.op == "call_module" else ""

    def write(self, model: fx.GraphModule, roundings: Mapping[str, LayerRounding], scales: Mapping[str, float]) -> None:
        """Write roundings (by name of the weighted node) and scales of activations (by name of the observer) into
        `model`, a copy of this prepared model."""
        # a module may have several names
        written: set[object] = set()
        for node in self.nodes:
            if node.name not in roundings:
                continue
            # a new parameter: the old one may be shared with a model, or tied to a layer, that must not change
            weight = nn.Parameter(roundings[node.name].weight)
            for name in node.names:
                key = weighted_module(model, name) or name
                if key not in written:
                    _write(model, name, weight, roundings[node.name])
                written.add(key)
        write_scales(model, scales)
        insert_clamps(model)


def placeholder_signature(model: fx.GraphModule) -> inspect.Signature:
    """The inputs of a graph whose placeholders are its arguments."""
    parameters = [
        inspect.Parameter(
            str(node.target),
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=node.args[0] if node.args else inspect.Parameter.empty,
        )
        for node in model.graph.nodes
        if node.op == "placeholder" and not str(node.target).startswith("*")
    ]
    # keyword-only arguments without a default may follow others with one
    return unordered_signature(parameters)


def _drop_variadic_inputs(graph: fx.GraphModule) -> None:
    """Take out, in place, the inputs `*args` and `**kwargs`, of which a batch never has any.

    Raises:
        InvalidModelError: the model reads them.
    """
    for node in list(graph.graph.nodes):
        if node.op == "placeholder" and str(node.target).startswith("*"):
            if node.users:
                raise InvalidModelError(f"input {node.target!r}", "is read by the model", "Name its inputs in forward.")
            graph.graph.erase_node(node)


def _observes_activations(graph: fx.GraphModule) -> bool:
    """Whether any activation (not a parameter, nor a weight computed of some) passes an observer that quantizes."""
    return any(
        node.op == "call_module"
        and is_observer(observer := graph.get_submodule(node.target))
        and node.all_input_nodes[0].op != "get_attr"
        and not all(is_weighted_function(user) and argument(user, 1, "weight") is node for user in node.users)
        and not (isinstance(observer, PlaceholderObserver) and observer.dtype == torch.float)
        for node in graph.graph.nodes
    )


def _float_inputs(quantized: fx.GraphModule, nodes: Sequence[WeightedNode]) -> set[str]:
    """Names of the inputs that are quantized as they come, or enter a weighted operator so."""
    sites = {site.quantized_node for node in nodes for site in node.sites}
    found = set()
    for node in quantized.graph.nodes:
        users = [further for user in node.users for further in (user.users if is_clamp(user) else [user])]
        if node.op == "placeholder" and any(quantizes(user) or user in sites for user in users):
            found.add(str(node.target))
    return found


def _reference(
    prepared: fx.GraphModule, backend_config: BackendConfig | None, convert: Callable[..., fx.GraphModule]
) -> fx.GraphModule:
    """A reference conversion of the host's, of a copy."""
    prepared = deep_copy(prepared)
    insert_clamps(prepared)
    # reference modules are born with random weights, which must not cost the caller's generator a step
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        # the host's advice on deprecated flows and unused ranges; the caller sees it at their own convert
        warnings.simplefilter("ignore")
        try:
            return convert(prepared, backend_config=backend_config)
        finally:
            forget_models()


def _widen_ranges(converted: fx.GraphModule) -> None:
    """Let activations end where their type does, in place, as they do in the other conversions (see `clamps`).

    The host writes its observers' ranges, of 7 bits for x86, into this conversion alone (torch 2.13).
    """
    operators = torch.ops.quantized_decomposed
    for graph in converted.modules():
        if not isinstance(graph, fx.GraphModule):
            continue
        for node in graph.graph.nodes:
            if node.target in (operators.quantize_per_tensor.default, operators.dequantize_per_tensor.default):
                value, scale, zero_point, _, _, dtype = node.args
                node.args = (value, scale, zero_point, torch.iinfo(dtype).min, torch.iinfo(dtype).max, dtype)
        graph.recompile()


def _write(model: fx.GraphModule, name: str, weight: nn.Parameter, rounding: LayerRounding) -> None:
    """Write weight and grid into a prepared model, so that its own convert quantizes back to exactly the integers."""
    module = weighted_module(model, name)
    if module is None:
        setattr(*owner_of(model, name), weight)
        _replace_observer(model, name, rounding.grid)
        return
    make_plain(module)
    module.weight = weight
    bias = rounding.corrected(None if module.bias is None else module.bias.detach())
    if bias is not None:
        module.bias = nn.Parameter(bias.clone())
    outer = model.get_submodule(name)
    qconfig = QConfig(activation=outer.qconfig.activation, weight=_Frozen(rounding.grid))  # type: ignore[union-attr,no-untyped-call]
    outer.qconfig = module.qconfig = qconfig  # type: ignore[assignment]


def _replace_observer(model: fx.GraphModule, name: str, grid: Grid) -> None:
    """Put a frozen observer behind every use of a functional weight."""
    # a standalone submodule is a graph of its own
    owner, leaf = owner_of(model, name)
    graph, target = (owner, leaf) if isinstance(owner, fx.GraphModule) else (model, name)
    for node in graph.graph.nodes:
        if node.op != "get_attr" or node.target != target:
            continue
        for user in node.users:
            if user.op == "call_module" and is_observer(graph.get_submodule(user.target)):
                graph.set_submodule(user.target, FrozenObserver(grid))


class _Frozen:
    """A qconfig's weight entry that always builds the same frozen observer."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid

    def __call__(self, **kwargs: Any) -> FrozenObserver:
        return FrozenObserver(self.grid, **kwargs)
