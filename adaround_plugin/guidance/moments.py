"""Second moments of the layers' inputs in the float network, from forward passes over the data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from adaround_plugin.errors import NonFiniteError
from adaround_plugin.graph.arguments import input_of
from adaround_plugin.graph.ends import ends_of
from adaround_plugin.graph.streams import Stream, Values, tensors
from adaround_plugin.hosts.base import Host, WeightedNode
from adaround_plugin.learning.column_weights import ColumnWeights
from adaround_plugin.learning.output_error import OutputTally
from adaround_plugin.regions.calibration import Sampling
from adaround_plugin.rounding.moments import Moments
from adaround_plugin.rounding.shrinkage import SampleSpread

__all__ = ["InputMoments", "weights_of_columns"]

# moments of as many layers are gathered in one forward pass as fit in this many bytes
_MOMENT_BYTES = 2 * 2**30


def weights_of_columns(
    host: Host, stream: Stream, nodes: Sequence[WeightedNode], arguments: Sequence[list[Any]], sampling: Sampling
) -> ColumnWeights:
    """What the columns of layers count, and how their outputs do together, from a forward and a backward pass.

    Args:
        host: of the network.
        stream: the float stream, nothing of it run.
        nodes: the layers.
        arguments: of each batch, as the host's graphs take them.
        sampling: which columns are used.

    Raises:
        InvalidOptionError: an operator has no derivative.
    """
    return ColumnWeights.of(
        stream,
        nodes,
        sampling,
        lambda batch: stream.bind(arguments[batch]),
        is_fixed=host.batch_size is not None,
        weighed=[node.name for node in nodes],
        with_outputs=True,
    )


class InputMoments:
    """Runs batches through the float network, layer after layer in groups whose moments fit in memory.

    Args:
        stream: the float stream, nothing of it run.
        arguments: of each batch, as the host's graphs take them.
        sampling: which columns are used.
        weights: what columns count.

    Attributes:
        variances: of the network's ends over all samples; known once the first layer is.
    """

    def __init__(
        self, stream: Stream, arguments: Sequence[list[Any]], sampling: Sampling, weights: ColumnWeights
    ) -> None:
        self._stream, self._arguments, self._sampling, self._weights = stream, arguments, sampling, weights
        self.variances: Sequence[float] = ()

    def of(self, nodes: Sequence[WeightedNode]) -> Iterator[tuple[WeightedNode, Moments, float]]:
        """The layers with the moments of their inputs, in order; each may be changed and forgotten by the caller.

        With each comes the damping that its samples ask for (`SampleSpread.damping`).

        The moments are of `x^ = x`: what they know of deviations is one row of zeros, which stands for all.

        Raises:
            InvalidBatchError: an input does not fit its layer.
            NonFiniteError: an input of a layer holds NaN or infinity.
        """
        for group in _groups(nodes):
            found = self._gather(group)
            for node in group:
                moments, spread = found.pop(node.name)
                moments.finish()
                if not bool(torch.isfinite(moments.mean).all()):
                    raise NonFiniteError(
                        f"layer {node.name!r}", "its input holds NaN or infinity", "Check the model and the data."
                    )
                yield node, moments, spread.damping(moments)

    def _gather(self, nodes: Sequence[WeightedNode]) -> dict[str, tuple[Moments, SampleSpread]]:
        """One forward pass."""
        found = {node.name: self._empty(node) for node in nodes}
        sites = {site.float_node: node for node in nodes for site in node.sites}
        stream, tally = self._stream, OutputTally(self._sampling)
        for batch, arguments in enumerate(self._arguments):
            ends = tensors(stream.outputs(arguments, ends_of(stream), self._visitor(batch, sites, found)))
            tally.add(batch, ends, ends)
        self.variances = tally.finish().variances
        return found

    def _empty(self, node: WeightedNode) -> tuple[Moments, SampleSpread]:
        groups, _, columns = shape = _shape(node)
        device = node.weight.device
        return Moments(*shape, device), SampleSpread(groups, columns, self._sampling.own, device)

    def _visitor(
        self, batch: int, sites: dict[fx.Node, WeightedNode], into: dict[str, tuple[Moments, SampleSpread]]
    ) -> Callable[[fx.Node, Values], None]:
        def visit(site: fx.Node, values: Values) -> None:
            if site not in sites:
                return
            node, x = sites[site], self._stream.value(input_of(site), values)
            node.check_input(x, batch)
            patches = node.op.patches(x.float(), node.weight.shape)
            index, position = self._sampling.columns(batch, patches, len(node.sites))
            columns = patches.columns(index, position)
            order = torch.arange(len(index), device=index.device)
            weight = self._weights.weight(node, site, batch, columns, order, len(index))
            moments, spread = into[node.name]
            spread.add(columns, self._sampling.own_numbers(batch, patches.samples, index.device)[index], weight)
            moments.add(columns, _no_deviation(columns), weight)

        return visit


def _shape(node: WeightedNode) -> tuple[int, int, int]:
    """Of a layer's moments: groups, one row for all, and columns."""
    groups, _, columns = node.op.rows(node.weight).shape
    return groups, 1, columns


def _no_deviation(columns: Tensor) -> Tensor:
    return columns.new_zeros(*columns.shape[:2], 1)


def _groups(nodes: Sequence[WeightedNode]) -> Iterator[list[WeightedNode]]:
    """Runs of layers whose moments fit in memory together, one layer at least."""
    group: list[WeightedNode] = []
    used = 0
    for node in nodes:
        size = Moments.bytes(*_shape(node))
        if group and used + size > _MOMENT_BYTES:
            yield group
            group, used = [], 0
        group.append(node)
        used += size
    if group:
        yield group
