"""Which nodes of a graph share memory, and what a write to one of them makes of the others."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import Tensor, fx, nn

from adaround_plugin.graph.arguments import input_of
from adaround_plugin.graph.compat import operator_name, returns_view, tree_flatten, tree_map

__all__ = ["Aliases", "strided_copy"]

# functions and methods, ATen operators too, whose result may be a view: of another shape, of a part, or the same
_RESHAPES = {"view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "ravel", "squeeze", "unsqueeze"}
_AXES = {
    *("transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "t", "adjoint"),
    *("expand", "expand_as", "broadcast_to", "unfold", "as_strided"),
}
_PARTS = {
    *("narrow", "select", "diagonal", "unbind", "getitem", "real", "imag", "view_as_real", "view_as_complex"),
    *("split", "split_with_sizes", "chunk", "tensor_split", "hsplit", "vsplit", "dsplit"),
}
_SAME = {
    *("contiguous", "detach", "to", "type_as", "type", "cpu", "cuda", "positive", "getattr"),
    *("float", "double", "half", "bfloat16", "bool", "int", "long", "atleast_1d", "atleast_2d", "atleast_3d"),
    *("dropout", "dropout1d", "dropout2d", "dropout3d"),
    *("alpha_dropout", "feature_dropout", "feature_alpha_dropout"),
}
_VIEWS = _RESHAPES | _AXES | _PARTS | _SAME

# how a view is taken of another value: a method's name, a function or a module, and its arguments but the first
_Step = tuple[Any, tuple[Any, ...], dict[str, Any]]


class Aliases:
    """The names that memory has in a graph whose nodes come by in order, and their values after writes.

    A view has a parent, what it was taken of. A write to a view is a write to its parents, and makes other views of
    them stale: a stale one is taken again when it is read. An operator that may return a view is asked when it runs.

    Args:
        module: the graph, into which nodes are inserted.

    Attributes:
        inserted: for each of these, the view that it takes again or writes through, and the last node that wrote.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self._module = module
        # the node whose value a later node has, after writes
        self._name: dict[fx.Node, fx.Node] = {}
        self._parent: dict[fx.Node, fx.Node] = {}
        self._attributes: dict[str, fx.Node] = {}
        # by name of the memory as a whole: how many writes there were, and the last; by node: how many came before it
        self._writes: dict[fx.Node, int] = defaultdict(int)
        self._last: dict[fx.Node, fx.Node] = {}
        self._made: dict[fx.Node, int] = defaultdict(int)
        self._newest: dict[fx.Node, fx.Node] = {}
        self.inserted: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}

    def add(self, node: fx.Node) -> None:
        """Take in the next node, which writes to nothing and reads the newest values."""
        if node.op == "get_attr":
            self._name[node] = self._attributes.setdefault(str(node.target), node)
        elif isinstance(source := input_of(node), fx.Node) and _is_view(self._module, node):
            self._parent[node] = self._named(source)
            self._made[node] = self._writes[self._whole(node)]

    def has_others(self, node: fx.Node) -> bool:
        """Whether a node is a view, or has views."""
        name = self._named(node)
        return name in self._parent or name in self._parent.values()

    def now(self, node: fx.Node, before: fx.Node) -> fx.Node:
        """The node that has the value of `node` when `before` runs; inserted there if need be."""
        name = self._named(node)
        writes = self._writes[self._whole(name)]
        if self._made[node] == writes:
            return node
        newest = self._newest.get(name, name)
        if self._made[newest] == writes:
            return newest
        parent = self.now(self._parent[name], before)
        with self._module.graph.inserting_before(before):
            again = self._insert(_view_again, newest, parent, name)
        self._set(name, again)
        return again

    def write(self, target: fx.Node, node: fx.Node) -> None:
        """Let the next node, which worked on a copy of `target`, be its new value; `target` is the newest there was."""
        name = self._named(target)
        whole = self._whole(name)
        self._writes[whole] += 1
        self._last[whole] = node
        self._set(name, node)
        while name in self._parent:
            parent = self._parent[name]
            with self._module.graph.inserting_after(node):
                node = self._insert(_write_through, self._newest.get(parent, parent), node, name)
            self._set(parent, node)
            name = parent

    def erase_unread(self) -> None:
        """Take out inserted nodes whose values nothing reads."""
        for node in reversed(list(self.inserted)):
            if not node.users:
                self._module.graph.erase_node(node)
                del self.inserted[node]

    def _named(self, node: fx.Node) -> fx.Node:
        return self._name.get(node, node)

    def _whole(self, name: fx.Node) -> fx.Node:
        """The memory as a whole."""
        while name in self._parent:
            name = self._parent[name]
        return name

    def _set(self, name: fx.Node, node: fx.Node) -> None:
        """Let `node` be the newest value of `name`."""
        self._name[node], self._newest[name] = name, node
        self._made[node] = self._writes[self._whole(name)]

    def _insert(self, function: Any, one: fx.Node, other: fx.Node, name: fx.Node) -> fx.Node:
        target: Any = name.target
        if name.op == "call_module":
            target = self._module.get_submodule(str(name.target))
        kwargs = name.kwargs if name.args else {key: value for key, value in name.kwargs.items() if key != "input"}
        step = (target, name.args[1:], kwargs)
        inserted = self._module.graph.call_function(function, (one, other, step))
        self.inserted[inserted] = name, self._last[self._whole(name)]
        return inserted


def strided_copy(x: Tensor) -> Tensor:
    """A copy with the same strides, so that kernels compute the same from it to the last bit."""
    if 0 in x.stride():
        # an expanded tensor, to which nothing is written
        return x.clone()
    return x.new_empty_strided(x.shape, x.stride()).copy_(x)


def _is_view(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node's value may be a view of its first argument's."""
    if node.op == "call_module":
        return isinstance(module.get_submodule(str(node.target)), nn.Flatten | nn.Unflatten)
    if node.op == "call_method":
        return node.target in _VIEWS
    if node.op != "call_function":
        return False
    name, is_operator = operator_name(node)
    return name in _VIEWS or (is_operator and returns_view(node))


def _take(x: Any, step: _Step) -> Any:
    """What may be a view of `x`."""
    target, args, kwargs = step
    return getattr(x, target)(*args, **kwargs) if isinstance(target, str) else target(x, *args, **kwargs)


def _view_again(old: Any, written: Any, step: _Step) -> Any:
    """The view of a value that was written to; the old one where it is no view but a copy."""
    view = _take(written, step)
    return view if any(_owner(part, written) is not None for part in _tensors(view)) else old


def _write_through(value: Any, written: Any, step: _Step) -> Any:
    """A value whose view was written to, on a copy; what was written to may be a copy itself."""
    whole = tree_map(lambda leaf: strided_copy(leaf) if isinstance(leaf, Tensor) else leaf, value)
    for part, new in zip(_tensors(_take(whole, step)), _tensors(written), strict=True):
        owner = _owner(part, whole)
        if owner is None:
            continue
        if owner.dtype == part.dtype:
            # a view by itself: autograd lets no one write to one of several that an operator returned
            part = owner.as_strided(part.shape, part.stride(), part.storage_offset())
        part.copy_(new)
    return whole


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)]


def _owner(part: Tensor, whole: Any) -> Tensor | None:
    """The tensor in `whole` that `part` is, or is a view of."""
    start = part.untyped_storage().data_ptr()
    return next((one for one in _tensors(whole) if one.untyped_storage().data_ptr() == start), None)
