"""The PT2E host: a model from torchao's `prepare_pt2e`, its two graphs, and writing back into it.

The quantized graph is the host's own `convert_pt2e` of a copy of the prepared model, so it equals the converted
program bit for bit. Only the weights and biases of the nodes that are learned come from attributes of our own, which
hold what the host's quantize and dequantize operators make of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, fx, nn
from torchao.quantization.pt2e import DerivedObserverOrFakeQuantize

from adaround_plugin.errors import InvalidModelError
from adaround_plugin.graph.arguments import argument, attribute, owner_of, replace_module, set_argument
from adaround_plugin.graph.compat import (
    export_inputs,
    flatten_inputs,
    guards_of,
    is_guards,
    is_observed,
    is_observer,
    operator_name,
    unflatten_inputs,
)
from adaround_plugin.graph.transforms import functionalize, inline, origin, strip
from adaround_plugin.hosts.activation_quantizers import activation_quantizers, write_scales
from adaround_plugin.hosts.base import WeightedNode
from adaround_plugin.hosts.checks import check_untrained, check_values
from adaround_plugin.hosts.observed_activations import observed_activations, seen_ranges
from adaround_plugin.hosts.pt2e.conversion import converted
from adaround_plugin.hosts.pt2e.copies import deep_copy
from adaround_plugin.hosts.pt2e.nodes import PT2EFinder, innermost_module, is_torchao_observer, parameter_node
from adaround_plugin.hosts.pt2e.observers import frozen_observer
from adaround_plugin.rounding.grid import Grid
from adaround_plugin.rounding.result import LayerRounding

__all__ = ["PAIR", "PreparedPT2E"]

# where a prepared program's meta names two inputs next to each other: the float stream takes the first, the quantized
# one the second, as what comes before the program made of either
PAIR = "adaround_pair"

# position of the argument by which an operator behaves as in training: a flag, or a probability of dropping
_TRAINING = {"dropout": 2, "feature_dropout": 2, "alpha_dropout": 2, "batch_norm": 5, "scaled_dot_product_attention": 4}
_RUNNING_MEAN = 3  # position of this argument of batch_norm


class PreparedPT2E:
    """A calibrated model from `prepare_pt2e`.

    Args:
        prepared: the model; it is read only.

    Attributes are those of `Host`.

    Raises:
        InvalidModelError: not prepared, exported in train mode, not calibrated, with observers of torch.ao, not in
            float32, or without a weighted node.
        NonFiniteError: a weight holds NaN or infinity.
    """

    toolkit: ClassVar[str] = "PT2E"

    def __init__(self, prepared: fx.GraphModule) -> None:
        _check(prepared)
        self.prepared = prepared
        names, self._positional = export_inputs(prepared)
        self.signature = inspect.Signature(
            [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
        )
        self.inputs = [str(node.target) for node in prepared.graph.nodes if node.op == "placeholder"]
        self.batch_size = _batch_size(prepared)
        graph = _without_guards(inline(prepared, lambda module: False))
        program = _without_guards(inline(converted(self.copy()), lambda module: False, shared=True))
        self.nodes, self.skipped = PT2EFinder(graph, program).find()
        self.quantized_graph = functionalize(strip(program, is_torchao_observer))
        self.quantizers = activation_quantizers(graph, self.quantized_graph, _sources_of_derived(graph))
        ranges = seen_ranges(graph, self.quantized_graph, is_torchao_observer)
        self.float_graph = functionalize(_without_observers(graph))
        self.observed = observed_activations(self.float_graph, ranges, self.caller)
        if PAIR in prepared.meta:
            _exchange(self.quantized_graph.graph, *prepared.meta[PAIR])

    def flatten(self, arguments: inspect.BoundArguments) -> list[Any]:
        """Arguments as leaves, checked against the shapes that the program was exported for."""
        named = list(arguments.arguments.items())
        values = tuple(value for _, value in named[: self._positional])
        leaves = flatten_inputs(self.prepared, values, dict(named[self._positional :]))
        placeholders = [node for node in self.prepared.graph.nodes if node.op == "placeholder"]
        for node, leaf in zip(placeholders, leaves, strict=True):
            _check_leaf(node, leaf)
        guards = guards_of(self.prepared)
        if guards is not None:
            try:
                guards(*leaves)
            except AssertionError as error:
                raise ValueError(f"{error}; export with dynamic_shapes for batches of several sizes") from None
        return leaves

    def call(self, model: nn.Module, arguments: list[Any]) -> Any:
        """Call a model of the same inputs on leaves."""
        args, kwargs = unflatten_inputs(self.prepared, arguments)
        return model(*args, **kwargs)

    def copy(self) -> fx.GraphModule:
        """A deep copy of the prepared model."""
        return self.copied(self.prepared)

    @staticmethod
    def copied(prepared: fx.GraphModule) -> fx.GraphModule:
        """A deep copy as torchao's passes expect it, with deep copies of its own that are so, too."""
        return deep_copy(prepared)

    @staticmethod
    def freeze(model: fx.GraphModule, observer: str, grid: Grid) -> None:
        """Put a frozen observer in the place of one, also where another observer derives its scale from it."""
        old, new = model.get_submodule(observer), frozen_observer(grid)
        replace_module(model, old, new)
        for module in model.modules():
            if isinstance(module, DerivedObserverOrFakeQuantize):
                module.obs_or_fqs = [new if one is old else one for one in module.obs_or_fqs]

    def is_type(self, node: WeightedNode, kind: type[nn.Module]) -> bool:
        """Whether a node stands in the code of a module of this type."""
        names = _names_of(kind)
        return any(innermost_module(site.float_node)[1] in names for site in node.sites)

    def caller(self, call: fx.Node) -> str:
        """The module in whose code the operator stands."""
        return innermost_module(call)[0]

    def write(self, model: fx.GraphModule, roundings: Mapping[str, LayerRounding], scales: Mapping[str, float]) -> None:
        """Write roundings (by name of the weighted node) and scales of activations (by name of the observer) into
        `model`, a copy of this prepared model."""
        by_name = {node.name: node for node in model.graph.nodes}
        for node in self.nodes:
            if node.name in roundings:
                calls = [by_name[origin(site.float_node)] for site in node.sites]
                _write(model, calls, roundings[node.name])
        write_scales(model, scales)
        model.recompile()


def _exchange(graph: fx.Graph, first: str, second: str) -> None:
    """Let two inputs, one behind the other, take the values of each other."""
    by_name = {str(node.target): node for node in graph.nodes if node.op == "placeholder"}
    by_name[first].prepend(by_name[second])


def _names_of(kind: type[nn.Module]) -> set[str]:
    """Qualified names of a type and of all that are derived from it: a program knows its modules' types by name."""
    derived = [_names_of(one) for one in kind.__subclasses__()]
    return {f"{kind.__module__}.{kind.__qualname__}"}.union(*derived)


def _sources_of_derived(model: nn.Module) -> set[nn.Module]:
    """Observers from whose scales others derive theirs, such as those of quantized biases."""
    derived = [module for module in model.modules() if isinstance(module, DerivedObserverOrFakeQuantize)]
    return {source for module in derived for source in module.obs_or_fqs}


def _batch_size(prepared: fx.GraphModule) -> int | None:
    """The number of samples that a program was exported for; None where its batches may have any size."""
    examples = [node.meta.get("val") for node in prepared.graph.nodes if node.op == "placeholder"]
    first = next((example for example in examples if isinstance(example, Tensor) and example.dim()), None)
    return first.shape[0] if first is not None and isinstance(first.shape[0], int) else None


def _check(prepared: fx.GraphModule) -> None:
    """What must hold before work starts."""
    if not is_observed(prepared):
        raise InvalidModelError(
            "prepared", "is an exported program without observers", "Call prepare_pt2e on it and calibrate first."
        )
    if any(operator_name(node)[0].startswith("dequantize") for node in prepared.graph.nodes):
        raise InvalidModelError(
            "prepared", "is already converted", "Call adaround after prepare_pt2e and calibration, before convert_pt2e."
        )
    check_untrained(prepared)
    foreign = [name for name, module in prepared.named_modules() if is_observer(module)]
    if foreign:
        raise InvalidModelError(
            f"observer {foreign[0]!r}",
            "is one of torch.ao.quantization, which torchao leaves in float",
            "Use observers of torchao; AdaRound's are in adaround_plugin.hosts.pt2e.",
        )
    for node in prepared.graph.nodes:
        if _trains(node):
            raise InvalidModelError(f"node {node.name!r}", "is in train mode", "Call .eval() before torch.export.")
    check_values(prepared, is_torchao_observer)


def _trains(node: fx.Node) -> bool:
    """Whether a node behaves as in training. A batch norm without running statistics has no other mode."""
    name = operator_name(node)[0] if node.op == "call_function" else ""
    position = _TRAINING.get(name)
    if position is None or not any(node.args[position : position + 1]):
        return False
    return name != "batch_norm" or node.args[_RUNNING_MEAN] is not None


def _without_observers(module: fx.GraphModule) -> fx.GraphModule:
    """Take observers out of a graph, in place, and out of the bodies of its higher-order operators."""
    for node in module.graph.nodes:
        body = attribute(module, str(node.target)) if node.op == "get_attr" else None
        if isinstance(body, fx.GraphModule):
            _without_observers(body).recompile()
    return strip(module, is_torchao_observer)


def _check_leaf(node: fx.Node, leaf: Any) -> None:
    """Raise `ValueError` unless an input is of the kind that the program was exported for."""
    example = node.meta.get("val")
    if not isinstance(example, Tensor):
        return
    if not isinstance(leaf, Tensor):
        raise ValueError(f"input {node.name!r} is {type(leaf).__name__}, but the program was exported for a tensor")
    if leaf.dim() != example.dim() or leaf.is_floating_point() != example.is_floating_point():
        raise ValueError(
            f"input {node.name!r} is {leaf.dtype} of shape {tuple(leaf.shape)}, "
            f"but the program was exported for {example.dtype} of shape {tuple(example.shape)}"
        )


def _without_guards(module: fx.GraphModule) -> fx.GraphModule:
    """Take out, in place, the check of the inputs' shapes, which is made once for each batch when it is bound."""
    for node in module.graph.nodes:
        if is_guards(node):
            module.graph.erase_node(node)
    return module


def _write(model: fx.GraphModule, calls: list[fx.Node], rounding: LayerRounding) -> None:
    """Write integers, grid and bias into a prepared model, so that its own convert quantizes back to exactly these."""
    for call in calls:
        source, observers = parameter_node(model, argument(call, 1, "weight"))
        assert source is not None
        for observer in observers:
            PreparedPT2E.freeze(model, str(observer.target), rounding.grid)
        # new parameters throughout: the old ones share memory with the model that was exported
        _put(model, source, rounding.weight, users=[observers[-1]], position=0, keyword="x")
    if rounding.bias_correction is None:
        return
    present: dict[fx.Node, list[fx.Node]] = {}
    absent = []
    for call in calls:
        bias = argument(call, 2, "bias")
        if bias is None:
            absent.append(call)
        else:
            present.setdefault(bias, []).append(call)
    for bias, users in present.items():
        corrected = rounding.corrected(attribute(model, str(bias.target)).detach())
        assert corrected is not None
        _put(model, bias, corrected, users=users, position=2, keyword="bias")
    added = rounding.corrected(None) if absent else None
    if added is not None:
        source, _ = parameter_node(model, argument(absent[0], 1, "weight"))
        assert source is not None
        _add(model, "bias", added, like=source, users=absent, position=2, keyword="bias")


def _put(
    model: fx.GraphModule, source: fx.Node, value: Tensor, *, users: list[fx.Node], position: int, keyword: str
) -> None:
    """Give `users` a new value of the parameter that `source` reads; other readers of it keep the old one.

    Args:
        model: is changed.
        source: reads the parameter.
        value: of the new parameter.
        users: nodes of which it is an argument.
        position, keyword: of that argument.
    """
    target = str(source.target)
    readers = [
        user for node in model.graph.nodes if node.op == "get_attr" and node.target == target for user in node.users
    ]
    if set(readers) <= set(users):
        setattr(*owner_of(model, target), nn.Parameter(value, requires_grad=False))
        return
    _, leaf = owner_of(model, target)
    _add(model, leaf, value, like=source, users=users, position=position, keyword=keyword)


def _add(
    model: fx.GraphModule,
    leaf: str,
    value: Tensor,
    *,
    like: fx.Node,
    users: list[fx.Node],
    position: int,
    keyword: str,
) -> None:
    """Add a parameter called `leaf`, or much like it, beside the one that `like` reads, and let `users` read it."""
    module, beside = owner_of(model, str(like.target))
    while hasattr(module, leaf):
        leaf += "_adaround"
    setattr(module, leaf, nn.Parameter(value, requires_grad=False))
    with model.graph.inserting_before(like):
        added = model.graph.get_attr(str(like.target).removesuffix(beside) + leaf)
    example = like.meta.get("val")
    if isinstance(example, Tensor):
        added.meta["val"] = example.detach().new_empty(value.shape)
    for user in users:
        set_argument(user, position, keyword, added)
