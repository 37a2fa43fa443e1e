"""Where a network's answer is still a continuous value: before it is joined, made probabilities of or decided on, and
before rows are chosen by it."""

from __future__ import annotations

from torch import fx, nn
from torch.fx.node import map_arg

from adaround_plugin.graph.compat import operator_name
from adaround_plugin.graph.selection import chooses, chosen_rows, computed, stores
from adaround_plugin.graph.streams import Stream

__all__ = ["ends_of"]

# operators that turn scores into probabilities
_PROBABILITIES = {"softmax", "log_softmax", "sigmoid", "logsigmoid", "log_sigmoid"}
# that decide, so that their results have no error to speak of
_DECISIONS = {
    *("argmax", "argmin", "argsort", "sign", "round", "floor", "ceil", "gt", "ge", "lt", "le", "eq", "ne"),
    *("bool", "byte", "int", "long"),
}
# that rearrange entries, or store them otherwise
_REARRANGES = {
    *("view", "unsafe_view", "reshape", "flatten", "unflatten", "transpose", "permute", "movedim", "squeeze"),
    *("unsqueeze", "contiguous", "clone", "detach", "alias", "to", "float", "dropout", "t"),
}
# that join values
_JOINS = {"cat", "concat", "concatenate", "stack"}
_PROBABILITY_MODULES = (nn.Softmax, nn.LogSoftmax, nn.Sigmoid, nn.LogSigmoid)
_REARRANGING_MODULES = (nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout)


def ends_of(stream: Stream) -> list[fx.Node]:
    """The nodes of what a network returns; of scores where it returns joined values, probabilities or decisions.

    Of rows that the network chooses, and of what it makes of them, the ends are where it chooses from, and by what.

    The float and the quantized graph of a host have the same ends, in the same order.
    """
    return stream.once(_find_ends)


def _find_ends(stream: Stream) -> list[fx.Node]:
    ends: list[fx.Node] = []
    map_arg(stream.output_node.args[0], ends.append)
    known, lost = computed(stream), chosen_rows(stream, of_samples=True)
    # by what is stored there: a quantized graph may unpack one value several times
    found: dict[fx.Node, fx.Node] = {}
    seen: set[fx.Node] = set()
    while ends:
        node = ends.pop(0)
        if node in seen:
            continue
        seen.add(node)
        behind = _sources(stream, node) if node in lost else _before(stream, node, known)
        if behind is None:
            found.setdefault(_stored(stream, node), node)
        else:
            ends[:0] = behind
    return list(found.values())


def _before(stream: Stream, node: fx.Node, known: set[fx.Node]) -> list[fx.Node] | None:
    """What is joined, made probabilities of, decided on or chosen from at a node; None where nothing is.

    What only rearranges it, or stores it in integers, may come between.
    """
    end = node
    while stream.varies(end) and _rearranges(stream, end):
        end = end.all_input_nodes[0]
    if not stream.varies(end):
        return None
    if _is_one(stream, end, _PROBABILITIES | _DECISIONS, _PROBABILITY_MODULES):
        return [end.all_input_nodes[0]]
    if _is_one(stream, end, _JOINS, ()) or chooses(end, known):
        return _sources(stream, end)
    return None


def _sources(stream: Stream, node: fx.Node) -> list[fx.Node]:
    """The inputs of a node that are no constants."""
    return [source for source in node.all_input_nodes if stream.varies(source)]


def _stored(stream: Stream, node: fx.Node) -> fx.Node:
    """What a node stores in integers or unpacks, or the node itself."""
    while stream.varies(node) and stores(node):
        node = node.all_input_nodes[0]
    return node


def _rearranges(stream: Stream, node: fx.Node) -> bool:
    return stores(node) or _is_one(stream, node, _REARRANGES, _REARRANGING_MODULES)


def _is_one(stream: Stream, node: fx.Node, names: set[str], modules: tuple[type[nn.Module], ...]) -> bool:
    if not node.all_input_nodes:
        return False
    if node.op == "call_module":
        return isinstance(stream.fetch_attr(str(node.target)), modules)
    if node.op == "call_function":
        # torch begins names of variants with an underscore
        return operator_name(node)[0].split(".")[0].lstrip("_") in names
    return node.op == "call_method" and node.target in names
