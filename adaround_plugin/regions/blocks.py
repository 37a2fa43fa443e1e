"""Exits: behind a layer and its activation function, and behind a block of layers found by dominance.

A *cut* is a node through which every path from the weights before it to the output goes: it dominates what follows.
Between two cuts lies a region with one entry and one exit. A residual block is one, since the node before it and the
sum behind it are cuts, and nothing inside is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import fx, nn
from torch.fx.node import map_arg

from adaround_plugin.errors import InvalidOptionError
from adaround_plugin.graph.aliases import strided_copy
from adaround_plugin.graph.compat import operator_name
from adaround_plugin.graph.selection import chosen_rows
from adaround_plugin.graph.streams import Stream
from adaround_plugin.graph.transforms import has_origin, origin
from adaround_plugin.hosts.base import Host, Streams, WeightedNode
from adaround_plugin.names import select
from adaround_plugin.regions.forward import Exit

__all__ = ["Block", "find_blocks", "layer_exits", "named_blocks", "output_exits"]

# layers that follow one another without branches make blocks of this many
_CHAIN = 3
# a block with more layers than this is not learned jointly
_MOST = 24

_ACTIVATIONS = {
    "relu",
    "relu_",
    "relu6",
    "hardtanh",
    "hardtanh_",
    "clamp",
    "clamp_",
    "leaky_relu",
    "leaky_relu_",
    "prelu",
    "elu",
    "selu",
    "celu",
    "gelu",
    "silu",
    "silu_",
    "mish",
    "sigmoid",
    "sigmoid_",
    "hardsigmoid",
    "tanh",
    "tanh_",
    "hardswish",
    "hardswish_",
    "softplus",
    "logsigmoid",
}
_ACTIVATION_MODULES = (
    nn.ReLU,
    nn.ReLU6,
    nn.Hardtanh,
    nn.LeakyReLU,
    nn.PReLU,
    nn.ELU,
    nn.SELU,
    nn.CELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Sigmoid,
    nn.Hardsigmoid,
    nn.Tanh,
    nn.Hardswish,
    nn.Softplus,
    nn.LogSigmoid,
)


@dataclass(frozen=True)
class Block:
    """Weighted nodes that are learned together.

    Attributes:
        name: for the report.
        nodes: in graph order.
        exits: where their output is compared; empty if the nodes are learned one by one.
        note: why they are, where that is not what was asked for.
    """

    name: str
    nodes: tuple[WeightedNode, ...]
    exits: tuple[Exit, ...] = ()
    note: str = ""


def output_exits(streams: Streams) -> list[Exit]:
    """The values that the network returns, each once, without constants and rows that it chooses."""
    returned: list[list[fx.Node]] = []
    for stream in streams:
        nodes: list[fx.Node] = []
        map_arg(stream.output_node.args, nodes.append)
        returned.append(nodes)
    pairs, chosen = dict.fromkeys(zip(*returned, strict=True)), chosen_rows(streams[1])
    return [
        Exit(exact, quantized) for exact, quantized in pairs if streams[0].varies(exact) and quantized not in chosen
    ]


class _Graphs:
    """A host's two graphs, and what leads where in the float graph."""

    def __init__(self, host: Host) -> None:
        self.module = host.float_graph
        self.nodes = list(host.float_graph.graph.nodes)
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self.counterpart = {origin(node): node for node in host.quantized_graph.graph.nodes if has_origin(node)}
        self.sites = {site.float_node: node for node in host.nodes for site in node.sites}
        self.chosen = chosen_rows(Stream(host.quantized_graph, host.quantized_graph.graph))
        # the nodes that depend on a weight
        self.behind: set[fx.Node] = set()
        for node in self.nodes:
            if node in self.sites or not self.behind.isdisjoint(node.all_input_nodes):
                self.behind.add(node)

    def exit_at(self, node: fx.Node, inner: bool = False) -> Exit | None:
        """The exit at a node; None where the quantized graph has no such node, or chooses rows of its own there."""
        counterpart = self.counterpart.get(origin(node))
        return None if counterpart is None or counterpart in self.chosen else Exit(node, counterpart, inner)

    def activation(self, node: fx.Node) -> fx.Node | None:
        """The activation function that alone uses a node's value, if one does."""
        users = list(node.users)
        while len(users) == 1 and users[0].target is strided_copy:
            users = list(users[0].users)
        if len(users) != 1 or users[0].op == "output":
            return None
        return users[0] if self._is_activation(users[0]) else None

    def _is_activation(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return isinstance(self.module.get_submodule(str(node.target)), _ACTIVATION_MODULES)
        name = str(node.target) if node.op == "call_method" else operator_name(node)[0]
        return node.op in ("call_function", "call_method") and name in _ACTIVATIONS

    def cuts(self) -> list[fx.Node]:
        """Nodes that every path from a weighted node before them to the output passes, in order."""
        behind = self.behind
        leading: set[fx.Node] = set()
        for node in reversed(self.nodes):
            if node.op == "output" or not leading.isdisjoint(node.users):
                leading.add(node)
        found = []
        alive: set[fx.Node] = set()
        last_use = {
            node: max((self.position[user] for user in node.users if user in leading), default=-1) for node in behind
        }
        for i, node in enumerate(self.nodes[:-1]):
            if node in behind and node in leading:
                alive.add(node)
            alive = {one for one in alive if last_use[one] > i}
            if alive == {node}:
                found.append(node)
        return found


def layer_exits(host: Host, nodes: Iterable[WeightedNode], activation: bool) -> dict[str, tuple[Exit, ...]]:
    """For each weight the exits of its layer: behind the activation functions of its call sites, or before them."""
    graphs = _Graphs(host)
    exits = {}
    for node in nodes:
        found = []
        for site in node.sites:
            if site.quantized_node in graphs.chosen:
                continue
            after = graphs.activation(site.float_node) if activation else None
            end = None if after is None else graphs.exit_at(after)
            fused = site.call is not None and site.call.is_fused
            found.append(end or Exit(site.float_node, site.quantized_node, inner=fused and not activation))
        exits[node.name] = tuple(found)
    return exits


def find_blocks(host: Host) -> list[Block]:
    """Blocks that hold every weighted node once, in order.

    Between two neighbouring cuts with several weighted nodes lies a block; those with one are joined in threes. What
    is behind the last cut, such as the heads of a detector, is one block that ends at all outputs.
    """
    graphs = _Graphs(host)
    blocks: list[Block] = []
    chain: list[tuple[list[WeightedNode], Exit]] = []

    def close() -> None:
        while chain:
            taken = chain[:_CHAIN]
            del chain[:_CHAIN]
            blocks.append(_block([node for nodes, _ in taken for node in nodes], (taken[-1][1],)))

    for nodes, exits in _segments(graphs, host.nodes):
        if len(nodes) == 1 and len(exits) == 1:
            chain.append((nodes, exits[0]))
            continue
        close()
        blocks.append(_block(nodes, exits))
    close()
    return blocks


def _block(nodes: Sequence[WeightedNode], exits: tuple[Exit, ...]) -> Block:
    name = nodes[0].name if len(nodes) == 1 else f"{nodes[0].name} ... {nodes[-1].name}"
    if not exits:
        return Block(
            name, tuple(nodes), (), "the quantized graph has no counterpart of its end, or chooses other rows there"
        )
    if len(nodes) > _MOST:
        note = f"{len(nodes)} layers with no single node between them, decided one by one: pass smaller blocks"
        return Block(name, tuple(nodes), (), note)
    return Block(name, tuple(nodes), exits)


def _segments(graphs: _Graphs, nodes: Sequence[WeightedNode]) -> list[tuple[list[WeightedNode], tuple[Exit, ...]]]:
    """The weighted nodes between neighbouring cuts, with the exit behind them; those behind the last cut at the end."""
    last = {node.name: max(graphs.position[site.float_node] for site in node.sites) for node in nodes}
    left = sorted(nodes, key=lambda node: last[node.name])
    cuts = graphs.cuts()
    found: list[tuple[list[WeightedNode], tuple[Exit, ...]]] = []
    for i, cut in enumerate(cuts):
        inside = [node for node in left if last[node.name] <= graphs.position[cut]]
        end = graphs.exit_at(_after_activation(graphs, cuts, i))
        if not inside or end is None:
            continue
        found.append((inside, (end,)))
        left = left[len(inside) :]
    if left:
        ends = [node for node in graphs.nodes[-1].all_input_nodes if node not in cuts]
        exits = [graphs.exit_at(node) for node in ends]
        found.append((left, tuple(end for end in exits if end is not None) if all(exits) else ()))
    return found


def _after_activation(graphs: _Graphs, cuts: list[fx.Node], i: int) -> fx.Node:
    """The cut itself, or the activation function behind it."""
    after = graphs.activation(cuts[i])
    return cuts[i] if after is None or after not in cuts else after


def named_blocks(host: Host, names: Sequence[str]) -> list[Block]:
    """Blocks that the user names, and between them the other weighted nodes, to be learned one by one.

    Args:
        names: of modules (a parent's name covers its children), or regular expressions on layers' names.

    Raises:
        InvalidOptionError: a name matches nothing, two share a layer, or no node ends what is named before another
            weighted node follows.
    """
    graphs = _Graphs(host)
    node_of = {name: node for node in host.nodes for name in node.names}
    taken: dict[str, str] = {}
    blocks: list[Block] = []
    for pattern in names:
        chosen = {node_of[name].name for name in select(pattern, node_of, "BlockWise.blocks")}
        if both := [name for name in chosen if name in taken]:
            raise InvalidOptionError(
                "BlockWise.blocks", f"{pattern!r} and {taken[both[0]]!r} share {both}", "Name each layer once."
            )
        taken.update(dict.fromkeys(chosen, pattern))
        nodes = [node for node in host.nodes if node.name in chosen]
        blocks.append(Block(pattern, tuple(nodes), (_end(graphs, host.nodes, nodes, pattern),)))
    blocks += [Block(node.name, (node,)) for node in host.nodes if node.name not in taken]
    order = {node.name: i for i, node in enumerate(host.nodes)}
    return sorted(blocks, key=lambda block: order[block.nodes[0].name])


def _end(graphs: _Graphs, every: Sequence[WeightedNode], nodes: Sequence[WeightedNode], pattern: str) -> Exit:
    """The first cut behind a named block's nodes, with the activation function that follows it."""
    own = {site.float_node for node in nodes for site in node.sites}
    first, last = min(map(graphs.position.__getitem__, own)), max(map(graphs.position.__getitem__, own))
    cuts = graphs.cuts()
    for i, cut in enumerate(cuts):
        if graphs.position[cut] < last:
            continue
        strangers = [
            node.name
            for node in every
            for site in node.sites
            if first <= graphs.position[site.float_node] <= graphs.position[cut] and site.float_node not in own
        ]
        end = graphs.exit_at(_after_activation(graphs, cuts, i))
        if strangers:
            raise InvalidOptionError(
                "BlockWise.blocks",
                f"no single node ends {pattern!r} before {strangers}",
                "Name a module whose only output ends it, with all of its layers.",
            )
        if end is not None:
            return end
    raise InvalidOptionError("BlockWise.blocks", f"no single node ends {pattern!r}", "Name a module with one output.")
