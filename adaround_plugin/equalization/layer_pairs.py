"""Pairs of layers whose channels can be scaled against each other, found in the FX graph of a float model."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import fx, nn

from adaround_plugin.equalization.homogeneous import Channels, cap_of, is_elementwise, passed
from adaround_plugin.equalization.scaled_layers import ScaledLayer
from adaround_plugin.graph.arguments import attribute, input_of
from adaround_plugin.graph.compat import operator_name
from adaround_plugin.graph.operators import is_weighted_function, module_op

__all__ = ["Cap", "LayerPair", "PairFinder"]

_CONVOLUTIONS = {nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d}
_LAYERS = {nn.Linear, *_CONVOLUTIONS}
_NORMS = {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d}
# they read a value's shape, not its entries
_SHAPE_METHODS = {"size", "dim", "ndimension", "numel"}
_SHAPE_ATTRIBUTES = {"shape", "ndim", "dtype", "device"}


@dataclass(frozen=True)
class Cap:
    """A module between two layers that clips to `[0, limit]`.

    Attributes:
        name: its qualified name.
        limit: 6 for ReLU6.
        repeat: how many entries of the channels' axis belong to one channel.
        positions: how many axes come after that of the channels.
    """

    name: str
    limit: float
    repeat: int
    positions: int


@dataclass(frozen=True)
class LayerPair:
    """Two layers, and what is between them.

    Attributes:
        first, second: the layers.
        between: module and node names of the operations between them, batch norm left out.
        axis: that of the channels in what the second layer reads, from the end.
        repeat: how many inputs of the second layer belong to one output channel of the first.
        caps: those of the operations that clip.
        is_elementwise: whether the operations work on each element alone and, below a cap, keep what is positive.
    """

    first: ScaledLayer
    second: ScaledLayer
    between: tuple[str, ...]
    axis: int
    repeat: int
    caps: tuple[Cap, ...]
    is_elementwise: bool


class _UnpairedError(Exception):
    """Why a layer is not the first of a pair."""


class PairFinder:
    """Finds the pairs in the graph of a model.

    Args:
        model: in eval mode.
        graph: its trace.
        shapes: of every node whose value is a tensor.
        caps: whether modules like ReLU6 may be between two layers.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph, shapes: dict[fx.Node, torch.Size], caps: bool) -> None:
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._nodes, self._shapes, self._caps = list(graph.nodes), shapes, caps
        self._calls = Counter(id(module) for node in self._nodes if (module := self._module(node)) is not None)
        # a parameter that has two owners, or that the graph reads by itself, serves more than one layer
        self._owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
        for node in self._nodes:
            if node.op == "get_attr":
                self._owners[id(attribute(model, str(node.target)))] += 1

    def find(self) -> tuple[list[LayerPair], list[tuple[str, str, str]]]:
        """The pairs in the order of the graph, and `(name, kind, reason)` of each layer that is not first in one."""
        pairs, skipped, seen = [], [], set()
        for node in self._nodes:
            module = self._module(node)
            kind = type(module).__name__ if module is not None else operator_name(node)[0]
            if is_weighted_function(node):
                skipped.append((node.name, kind, "a functional call: only modules are equalized"))
            if not _is_layer(module) or module in seen:
                continue
            seen.add(module)
            try:
                pairs.append(self._pair(node))
            except _UnpairedError as reason:
                skipped.append((str(node.target), kind, str(reason)))
        return pairs, skipped

    def _pair(self, node: fx.Node) -> LayerPair:
        """The pair whose first layer `node` calls."""
        first = self._layer(node)
        value = node if first.norm is None else next(iter(node.users))
        channels = Channels(self._axis(node, node))
        between: list[str] = []
        caps: list[Cap] = []
        elementwise = True
        while not _is_layer(module := self._module(user := self._user(value))):
            if (limit := cap_of(module)) is not None:
                caps.append(self._cap(user, limit, channels))
            else:
                channels = self._passed(user, value, channels)
                elementwise = elementwise and is_elementwise(user, module)
            between.append(_name(user))
            value = user
        second = self._layer(user)
        if self._axis(user, value) != channels.axis:
            raise _UnpairedError(f"{_name(user)!r} takes its channels from another axis")
        axis = channels.axis - len(self._shapes[value])
        return LayerPair(first, second, tuple(between), axis, channels.repeat, tuple(caps), elementwise)

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self._modules[str(node.target)] if node.op == "call_module" else None

    def _axis(self, layer: fx.Node, value: fx.Node) -> int:
        """The axis of the channels in the input or output of a layer."""
        module = self._module(layer)
        positions = len(module.kernel_size) if type(module) in _CONVOLUTIONS else 0  # type: ignore[union-attr, arg-type]
        return len(self._shapes[value]) - positions - 1

    def _layer(self, node: fx.Node) -> ScaledLayer:
        """The layer that `node` calls, with its batch norm."""
        module, name = self._module(node), str(node.target)
        assert module is not None
        if type(module) not in _LAYERS:
            raise _UnpairedError(f"the type of {name!r} is derived from a layer's and may do more")
        if self._calls[id(module)] > 1:
            raise _UnpairedError(f"{name!r} is called {self._calls[id(module)]} times")
        parameters = dict(module.named_parameters(recurse=False))
        if not {"weight"} <= parameters.keys() <= {"weight", "bias"}:
            raise _UnpairedError(f"the weight of {name!r} is computed, not a parameter")
        if not self._owns(module):
            raise _UnpairedError(f"{name!r} shares a parameter")
        return ScaledLayer(name, module, self._norm(node))

    def _norm(self, node: fx.Node) -> nn.Module | None:
        """The batch norm that a layer's output goes to, if it can be folded into the layer."""
        users = list(node.users)
        norm = self._module(users[0]) if len(users) == 1 else None
        if norm is None or type(norm) not in _NORMS or self._axis(node, node) != 1:
            return None
        is_own = self._calls[id(norm)] == 1 and self._owns(norm)
        return norm if is_own and norm.running_var is not None else None

    def _owns(self, module: nn.Module) -> bool:
        return all(self._owners[id(parameter)] == 1 for parameter in module.parameters(recurse=False))

    def _user(self, value: fx.Node) -> fx.Node:
        """The only operation that reads a value, as its first argument."""
        users = [user for user in value.users if not _reads_shape(user)]
        if len(users) != 1:
            raise _UnpairedError(f"{len(users)} operations use {_name(value)!r}")
        (user,) = users
        if user.op == "output":
            raise _UnpairedError(f"{_name(value)!r} is an output of the model")
        arguments = [*user.args, *user.kwargs.values()]
        if input_of(user) is not value or sum(argument is value for argument in arguments) != 1:
            raise _UnpairedError(f"{_name(user)!r} does not pass the scale of a channel on")
        return user

    def _passed(self, user: fx.Node, value: fx.Node, channels: Channels) -> Channels:
        """Where the channels are after `user`."""
        module = self._module(user)
        after = self._shapes.get(user)
        moved = None if after is None else passed(user, module, self._shapes[value], after, channels)
        if moved is None:
            kind = "" if module is None else f" ({type(module).__name__})"
            raise _UnpairedError(f"{_name(user)!r}{kind} does not pass the scale of a channel on")
        return moved

    def _cap(self, user: fx.Node, limit: float, channels: Channels) -> Cap:
        """The cap of a module that clips."""
        module = self._module(user)
        if not self._caps:
            raise _UnpairedError(f"{_name(user)!r} ({type(module).__name__}) is kept")
        if self._calls[id(module)] > 1:
            raise _UnpairedError(f"{_name(user)!r} ({type(module).__name__}) serves several layers")
        return Cap(str(user.target), limit, channels.repeat, len(self._shapes[user]) - channels.axis - 1)


def _is_layer(module: nn.Module | None) -> bool:
    return module is not None and module_op(module) is not None


def _name(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name


def _reads_shape(node: fx.Node) -> bool:
    """Whether an operation reads nothing of a tensor but its shape and type."""
    if node.op == "call_method":
        return node.target in _SHAPE_METHODS
    return node.op == "call_function" and node.target is getattr and node.args[1] in _SHAPE_ATTRIBUTES
