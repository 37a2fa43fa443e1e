"""Whose the columns of a layer's input are: how samples lie along its axes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx

from adaround_plugin.graph.arguments import input_of
from adaround_plugin.graph.ends import ends_of
from adaround_plugin.graph.streams import Stream, Values
from adaround_plugin.hosts.base import WeightedNode
from adaround_plugin.regions.pieces import are_close, piece, takes_one
from adaround_plugin.rounding.linear_op import Patches

__all__ = ["SampleOrders"]

# one sample after the other along the leading axis, taking turns along it, or along the axis behind it
Order = Literal["whole", "turns", "behind"]


class SampleOrders:
    """For each call site, where the samples of a batch are among the columns of its input.

    As a rule one comes after the other along the leading axis. In the layers of `nn.MultiheadAttention`, as programs
    have them, that axis is the tokens', or that of tokens and samples, which take turns.

    Args:
        found: by call site the order; None where samples cannot be told apart. A site that is not known has them one
            after the other.
    """

    def __init__(self, found: Mapping[fx.Node, Order | None]) -> None:
        self._found = found

    @classmethod
    def of(cls, stream: Stream, nodes: Sequence[WeightedNode], arguments: Sequence[Any], length: int) -> SampleOrders:
        """Found by what a layer is given of the first sample of a batch alone, and of the whole batch.

        Args:
            stream: the float stream, nothing of it run.
            nodes: the layers.
            arguments: of the batch.
            length: its number of samples.
        """
        whole = stream.bind(arguments)
        if length == 1 or not takes_one(stream, whole, length):
            return cls({})
        sites = {site.float_node: node for node in nodes for site in node.sites}
        alone: dict[fx.Node, Tensor] = {}
        found: dict[fx.Node, Order | None] = {}

        def keep(site: fx.Node, x: Tensor) -> None:
            alone[site] = x

        def compare(site: fx.Node, x: Tensor) -> None:
            found[site] = _order(x, alone[site], length)

        for values, take in ((piece(whole, length, 0, 1), keep), (whole, compare)):
            given = [values[node] for node in stream.placeholders]
            stream.outputs(given, ends_of(stream), _visitor(stream, sites, take))
        return cls(found)

    def columns(self, site: fx.Node, patches: Patches, samples: int) -> Tensor:
        """`(samples, n)` int64, the numbers of each sample's columns; `(1, n)` where they cannot be told apart.

        Args:
            site: where a layer is called.
            patches: of its input there.
            samples: number of samples in the batch.
        """
        numbers = torch.arange(patches.samples * patches.positions, device="cpu")
        order = self._found.get(site, "whole")
        divided = patches.positions if order == "behind" else patches.samples
        if order is None or divided % samples:
            return numbers.unsqueeze(0)
        before = {"whole": 1, "turns": patches.samples // samples, "behind": patches.samples}[order]
        return numbers.reshape(before, samples, -1).transpose(0, 1).flatten(1)


def _visitor(
    stream: Stream, sites: Mapping[fx.Node, WeightedNode], take: Callable[[fx.Node, Tensor], None]
) -> Callable[[fx.Node, Values], None]:
    """What takes the inputs of call sites, `(leading, channels, *positions)`."""

    def visit(site: fx.Node, values: Values) -> None:
        if site in sites:
            node, x = sites[site], stream.value(input_of(site), values)
            take(site, node.op.patches(x.float(), node.weight.shape).x)

    return visit


def _order(whole: Tensor, alone: Tensor, length: int) -> Order | None:
    """How samples lie along an input, by the first sample's own."""
    if len(whole) == len(alone) * length:
        if are_close(whole[: len(alone)], alone):
            return "whole"
        if are_close(whole[::length], alone):
            return "turns"
        return None
    is_behind = whole.dim() == alone.dim() == 3 and whole.shape[2] == alone.shape[2] * length
    return "behind" if is_behind and are_close(whole[:, :, : alone.shape[2]], alone) else None
