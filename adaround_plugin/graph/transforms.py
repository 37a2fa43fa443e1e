"""Rewrites of our own copies of a graph that make it easy to walk. Their modules are copies too, tensors in common."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_arg

from adaround_plugin.errors import InvalidModelError
from adaround_plugin.graph.aliases import Aliases, strided_copy
from adaround_plugin.graph.arguments import input_of, owner_of
from adaround_plugin.graph.compat import Dropout, operator_name, take_outs
from adaround_plugin.graph.reparametrized import is_reparametrized, make_plain

__all__ = ["erase_unused", "functionalize", "has_origin", "inline", "origin", "separate", "strip", "written_by"]

_INPLACE_OPERATORS = {
    operator.iadd,
    operator.isub,
    operator.imul,
    operator.itruediv,
    operator.ifloordiv,
    operator.imod,
    operator.ipow,
    operator.iand,
    operator.ior,
    operator.ixor,
}
# in-place operations that leave the values and change the shape
_RESHAPES_INPLACE = {
    *("squeeze_", "unsqueeze_", "t_", "transpose_", "swapaxes_", "swapdims_"),
    *("resize_", "resize_as_", "as_strided_", "set_"),
}

# meta entry of a node that came from another graph
_ORIGIN = "adaround_origin"
# of a node whose value was written to in place: the origin of the node that wrote last
_WRITTEN_BY = "adaround_written_by"


def origin(node: fx.Node) -> str:
    """The node's name in the graph it came from, with the path of that graph in front."""
    return str(node.meta[_ORIGIN])


def has_origin(node: fx.Node) -> bool:
    """Whether a node came from another graph."""
    return _ORIGIN in node.meta


def written_by(node: fx.Node) -> str | None:
    """The origin of the in-place operation that gave a node its value, itself perhaps; None for other values."""
    return node.meta.get(_WRITTEN_BY)


def separate(module: fx.GraphModule) -> nn.Module:
    """A deep copy of a graph's modules that shares their tensors: attributes set on one do not show in the other.

    The graph runs on either. What a module computes at each call, such as a normalized weight, is a parameter in the
    copy.
    """
    root = nn.Module().train(module.training)
    names = {
        str(node.target).partition(".")[0] for node in module.graph.nodes if node.op in ("call_module", "get_attr")
    }
    for name in sorted(names):
        setattr(root, name, getattr(module, name))
    attributes = [value for one in root.modules() for value in vars(one).values() if isinstance(value, torch.Tensor)]
    # to take pruning out writes to its tensors
    own = {part for one in root.modules() if is_reparametrized(one) for part in one.modules()}
    shared = [one for one in root.modules() if one not in own]
    parameters = [tensor for one in shared for tensor in (*one.parameters(False), *one.buffers(False))]
    result = copy.deepcopy(root, {id(tensor): tensor for tensor in (*attributes, *parameters)})
    for one in list(result.modules()):
        make_plain(one)
    return result


def inline(module: fx.GraphModule, is_inlined: Callable[[nn.Module], bool], *, shared: bool = False) -> fx.GraphModule:
    """A copy of the graph in which calls of submodules that are graphs of their own are written out.

    Nodes remember where they came from (`origin`). The modules are `separate` from those of `module`, or the same ones
    where they may be `shared` because nothing else uses them.
    """
    graph = fx.Graph()
    outputs = _copy_into(graph, module, "", is_inlined, None)
    graph.output(outputs)
    return fx.GraphModule(module if shared else separate(module), graph)


def _copy_into(
    graph: fx.Graph,
    module: fx.GraphModule,
    prefix: str,
    is_inlined: Callable[[nn.Module], bool],
    arguments: list[Any] | None,
) -> Any:
    """Copy the nodes of `module` to the end of `graph`; returns what its output node returns."""
    copied: dict[fx.Node, Any] = {}
    given = iter(arguments or [])
    for node in module.graph.nodes:
        if node.op == "output":
            return map_arg(node.args[0], copied.__getitem__)
        if node.op == "placeholder" and arguments is not None:
            copied[node] = next(given, node.args[0] if node.args else None)
            continue
        inner = module.get_submodule(node.target) if node.op == "call_module" else None
        if inner is not None and is_inlined(inner):
            assert isinstance(inner, fx.GraphModule)
            passed = _bind(inner, map_arg(node.args, copied.__getitem__), node.kwargs, copied)
            copied[node] = _copy_into(graph, inner, f"{prefix}{node.target}.", is_inlined, passed)
            continue
        new = graph.node_copy(node, copied.__getitem__)
        if node.op in ("call_module", "get_attr"):
            new.target = prefix + str(node.target)
        new.meta[_ORIGIN] = prefix + node.name
        copied[node] = new
    return None


def _bind(inner: fx.GraphModule, args: Any, kwargs: dict[str, Any], copied: dict[fx.Node, Any]) -> list[Any]:
    """Arguments of a call of a graph, in the order of its placeholders."""
    named = {name: map_arg(value, copied.__getitem__) for name, value in kwargs.items()}
    bound = list(args)
    for placeholder in [n for n in inner.graph.nodes if n.op == "placeholder"][len(bound) :]:
        default = placeholder.args[0] if placeholder.args else None
        bound.append(named.get(str(placeholder.target), default))
    return bound


def strip(module: fx.GraphModule, is_stripped: Callable[[nn.Module], bool]) -> fx.GraphModule:
    """Take out, in place, every call of a submodule that passes its input on: what is named, identities, dropout."""
    for node in list(module.graph.nodes):
        if node.op != "call_module":
            continue
        submodule = module.get_submodule(node.target)
        if isinstance(submodule, nn.Identity | Dropout) or is_stripped(submodule):
            node.replace_all_uses_with(input_of(node))
            module.graph.erase_node(node)
    return module


def erase_unused(module: fx.GraphModule, node: fx.Node) -> None:
    """Take out, in place, a node without users, what it alone needs, and attributes that no node reads any more."""
    erased: set[fx.Node] = set()
    pending = [node]
    while pending:
        one = pending.pop()
        if one.users or one.op == "placeholder" or one in erased:
            continue
        erased.add(one)
        pending += one.all_input_nodes
        module.graph.erase_node(one)
        if one.op != "get_attr":
            continue
        if not any(other.op == "get_attr" and other.target == one.target for other in module.graph.nodes):
            delattr(*owner_of(module, str(one.target)))


def functionalize(module: fx.GraphModule) -> fx.GraphModule:
    """Make in-place operations work on a copy, in place in the graph.

    Later users of the overwritten value, and of views of it, read the operation's result instead, so that nodes may run
    in any order that respects their arguments, and kept activations (and the caller's batches) are never overwritten.

    Raises:
        InvalidModelError: the shape of a value that has views is changed in place.
    """
    for node in list(module.graph.nodes):
        if outs := take_outs(node):
            _write_afterwards(module, node, outs)
    aliases = Aliases(module)
    for node in list(module.graph.nodes):
        for source in node.all_input_nodes:
            newest = aliases.now(source, before=node)
            if newest is not source:
                node.replace_input_with(source, newest)
        target = input_of(node)
        if not _is_inplace(module, node) or not isinstance(target, fx.Node):
            aliases.add(node)
            continue
        method = node.target if node.op == "call_method" else operator_name(node)[0]
        if method in _RESHAPES_INPLACE and aliases.has_others(target):
            raise InvalidModelError(
                f"node {origin(node)!r}",
                f"changes the shape of {origin(target)!r}, which has views",
                "Write that operation out of place.",
            )
        if node.op == "call_function" and node.target is operator.setitem:
            node.target = _setitem
        else:
            with module.graph.inserting_before(node):
                copy = module.graph.call_function(strided_copy, (target,))
            copy.meta[_ORIGIN] = f"{origin(node)}:copy"
            node.replace_input_with(target, copy)
        node.meta[_WRITTEN_BY] = origin(node)
        aliases.write(target, node)
    aliases.erase_unread()
    for inserted, (view, write) in aliases.inserted.items():
        inserted.meta[_WRITTEN_BY] = origin(write)
        inserted.meta[_ORIGIN] = f"{origin(view)}:{origin(write)}"
    return module


def _write_afterwards(module: fx.GraphModule, node: fx.Node, outs: list[fx.Node]) -> None:
    """Let nodes of their own, in place in the graph, write into `outs` what a node returns."""
    name = origin(node)
    results, names = [node], [name]
    if len(outs) > 1:
        with module.graph.inserting_after(node):
            results = [module.graph.call_function(operator.getitem, (node, i)) for i in range(len(outs))]
        names = [f"{name}:out {i}" for i in range(len(outs))]
    for out, result, own in zip(outs, results, names, strict=True):
        with module.graph.inserting_after(result):
            written = module.graph.call_function(_write_, (out, result))
        result.replace_all_uses_with(written, delete_user_cb=partial(operator.is_not, written))
        written.meta[_ORIGIN], result.meta[_ORIGIN] = own, f"{own}:result"


def _write_(target: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Overwrite a tensor as `out=` does, which makes another of one that has another shape."""
    return target.copy_(value) if target.shape == value.shape else value.to(target.dtype)


def _setitem(x: torch.Tensor, index: Any, value: Any) -> torch.Tensor:
    """`x[index] = value` on a copy."""
    x = strided_copy(x)
    x[index] = value
    return x


def _is_inplace(module: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        submodule = module.get_submodule(str(node.target))
        return bool(getattr(submodule, "inplace", False))
    if node.op == "call_method":
        return (str(node.target).endswith("_") and not str(node.target).startswith("__")) or node.target == "__iadd__"
    if node.op == "call_function":
        name, _ = operator_name(node)
        return (
            node.target in _INPLACE_OPERATORS
            or node.target is operator.setitem
            or node.kwargs.get("inplace", False) is True
            or (name.endswith("_") and not name.endswith("__"))
        )
    return False
