"""Rows that a network chooses by what it computes: experts that tokens go to, tokens pruned, the best of many boxes.

A quantized network may choose others, in another order, or another number of them: what it computes of them has no
counterpart in the float network, until it is written back to the places that the rows came from.
"""

from __future__ import annotations

from torch import fx

from adaround_plugin.graph.arguments import argument
from adaround_plugin.graph.clamps import is_clamp
from adaround_plugin.graph.compat import operator_name
from adaround_plugin.graph.streams import Stream, unpacks

__all__ = ["chooses", "chosen_rows", "computed", "stores"]

# take entries of the first argument by an index, or a mask, in another
_TAKES = {"index", "index_select", "gather", "take", "take_along_dim", "masked_select", "getitem"}
# put entries in an order that depends on them, or find those that are not zero
_SORTS = {"topk", "sort", "msort", "argsort", "kthvalue", "unique", "unique2", "unique_consecutive"} | {
    *("nonzero", "argwhere", "nms"),
}
# write rows to places of the first argument
_WRITES = {
    *("index_add", "index_copy", "index_put", "index_reduce", "scatter", "scatter_add", "scatter_reduce"),
    "masked_scatter",
}

# read how many entries there are
_SIZES = {"size", "sym_size", "shape", "numel", "sym_numel", "dim", "ndim", "len"}


def stores(node: fx.Node) -> bool:
    """Whether a node only stores a value in integers, or unpacks one."""
    quantizes = node.op == "call_function" and operator_name(node)[0].startswith("quantize_per_")
    return quantizes or unpacks(node) or is_clamp(node)


def _name(node: fx.Node) -> str:
    if node.op == "call_method":
        return str(node.target).strip("_")
    if node.target is getattr:
        return str(node.args[1])
    # torch ends names of operators in place with an underscore, and begins names of variants with one
    return operator_name(node)[0].split(".")[0].strip("_") if node.op == "call_function" else ""


def computed(stream: Stream, stored: bool = False) -> set[fx.Node]:
    """The nodes that depend on an input's entries by way of a weight or another tensor of the network.

    What depends on sizes alone, such as positions up to the length of a sequence, is the same in both networks.

    Args:
        stream: whose nodes.
        stored: count what is stored in integers, too, which only the quantized one of two networks does.
    """
    found: set[fx.Node] = set()
    # what depends on the entries of inputs; and parts of the network's own tensors that sizes decide on
    entries, own = set(stream.placeholders), set[fx.Node]()
    for node in stream.nodes:
        if not stream.varies(node) or _name(node) in _SIZES:
            continue
        sources = node.all_input_nodes
        of_network = any(not stream.varies(source) or source in own for source in sources)
        if node.op == "call_module":
            of_network |= any(True for _ in stream.fetch_attr(str(node.target)).parameters())
        if node not in entries and entries.isdisjoint(sources):
            if of_network:
                own.add(node)
            continue
        entries.add(node)
        if (stored if stores(node) else of_network) or not found.isdisjoint(sources):
            found.add(node)
    return found


def chooses(node: fx.Node, computed: set[fx.Node]) -> bool:
    """Whether a node's rows depend on what was computed: on an index, or on values that it sorts."""
    name, sources = _name(node), node.all_input_nodes
    if name in _SORTS:
        return not computed.isdisjoint(sources)
    if name not in _TAKES or not sources:
        return False
    taken = node.args[0] if node.args else node.kwargs.get("input")
    return any(source in computed for source in sources if source is not taken)


def _along(node: fx.Node) -> int | None:
    """The axis along which a node takes or sorts, if it says so."""
    name = _name(node)
    place = {"gather": 1, "index_select": 1, "take_along_dim": 2, "topk": 2, "kthvalue": 2, "sort": 1, "argsort": 1}
    if name not in place:
        return None
    axis = argument(node, place[name], "dim", None if name == "take_along_dim" else -1)
    return axis if isinstance(axis, int) else None


def _keeps_samples(node: fx.Node, computed: set[fx.Node]) -> bool:
    """Whether what a node gives for a sample, an entry of the leading axis, is of that sample."""
    name = _name(node)
    if name in ("index", "getitem"):
        index = node.args[1]
        leading = index[0] if isinstance(index, list | tuple) else index
        # all of the axis, or entries that are not computed, such as those of `arange`
        return isinstance(index, list | tuple) and not (isinstance(leading, fx.Node) and leading in computed)
    axis = _along(node)
    return axis is not None and axis != 0


def chosen_rows(stream: Stream, *, of_samples: bool = False) -> set[fx.Node]:
    """The nodes whose rows were chosen by what the network computed, and have not been put back.

    Args:
        stream: whose nodes.
        of_samples: leave out where rows of each sample are chosen apart from those of others, and choices by inputs
            alone, however these are stored: the same of the float and of the quantized graph.
    """
    known = computed(stream, stored=not of_samples)
    found: set[fx.Node] = set()
    for node in stream.nodes:
        sources = node.all_input_nodes
        if _name(node) in _WRITES:
            sources = sources[:1]
        chosen_here = chooses(node, known) and not (of_samples and _keeps_samples(node, known))
        if chosen_here or not found.isdisjoint(sources):
            found.add(node)
    return found
