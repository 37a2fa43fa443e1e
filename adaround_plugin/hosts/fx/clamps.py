"""Clamps that keep activations of an FX model inside an integer range narrower than the storage dtype's.

`convert_fx` and `convert_to_reference_fx` clip to the dtype (torch 2.13): on data that goes beyond what was observed, a
4-bit observer would let all 256 integers of quint8 through. A clamp before it, at the values of the range's two ends,
makes the host's own conversion hold the range. Only AdaRound's activation observer is given one: what the host's own
observers do, `reduce_range` included, is the host's business.
"""

from __future__ import annotations

import torch
from torch import fx, nn

from adaround_plugin.graph.clamps import is_clamp, mark_clamp
from adaround_plugin.graph.compat import is_observed, share_attributes
from adaround_plugin.hosts.activation_observers import AdaRoundActivationMixin

__all__ = ["insert_clamps", "remove_clamps"]


def insert_clamps(prepared: fx.GraphModule) -> None:
    """Put a clamp before every narrow activation observer, in place, in place of those put there earlier.

    Standalone submodules are graphs of their own and get theirs.
    """
    for graph in _graphs(prepared):
        removed = remove_clamps(graph)
        sources: dict[fx.Node, fx.Node] = {}
        for node in list(graph.graph.nodes):
            observer = graph.get_submodule(node.target) if node.op == "call_module" else None
            if not isinstance(observer, AdaRoundActivationMixin) or observer.quant_max - observer.quant_min == 255:
                continue
            source = node.args[0]
            with graph.graph.inserting_before(node):
                clamp = graph.graph.call_function(torch.clamp, (source, *observer.bounds()))
            mark_clamp(clamp)
            node.replace_input_with(source, clamp)
            sources[clamp] = source
        if removed or sources:
            share_attributes(graph, sources)
            graph.recompile()


def remove_clamps(graph: fx.GraphModule) -> bool:
    """Take such clamps out of one graph, in place; whether there were any."""
    found = [node for node in graph.graph.nodes if is_clamp(node)]
    for node in found:
        node.replace_all_uses_with(node.args[0])
        graph.graph.erase_node(node)
    return bool(found)


def _graphs(prepared: nn.Module) -> list[fx.GraphModule]:
    """The prepared graph and the standalone ones inside it."""
    return [module for module in prepared.modules() if isinstance(module, fx.GraphModule) and is_observed(module)]
