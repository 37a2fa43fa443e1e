"""What columns of a layer's input count, and how its outputs do together: by derivatives of the network's output."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial

import torch
from torch import Tensor, fx

from adaround_plugin.graph.streams import Stream, Values
from adaround_plugin.hosts.base import WeightedNode
from adaround_plugin.regions.calibration import Sampling
from adaround_plugin.regions.importance import OutputMoment, Probe, Sensitivity, sensitivities, tempered
from adaround_plugin.regions.pieces import piece, piece_size
from adaround_plugin.rounding.moments import joined

__all__ = ["ColumnWeights"]

# what every column weighs beside its importance, relative to the mean of that: derivatives are local
_EVEN_WEIGHT = 0.3


class ColumnWeights:
    """Nothing is known of any column until `of` takes a forward and a backward pass.

    Attributes:
        importance: by call site, for each batch the importance of its columns, relative to the mean of the layer's.
        probes: by call site, for each batch what tells its columns from others.
        outputs: by name of the weighted node, `(G, R, R)`: the second moment of the derivatives of the network's output
            by the layer's, where there are any, and several outputs to a group; else of groups put together.
    """

    def __init__(self) -> None:
        self.importance: dict[fx.Node, list[Tensor]] = {}
        self.outputs: dict[str, Tensor] = {}
        self.probes: dict[fx.Node, list[Probe]] = {}
        # layers some of whose columns are not weighed, because those of the pieces of a batch are others
        self._unweighed: set[str] = set()

    @classmethod
    def of(
        cls,
        stream: Stream,
        nodes: Sequence[WeightedNode],
        sampling: Sampling,
        values_of: Callable[[int], Values],
        *,
        is_fixed: bool,
        weighed: Collection[str],
        with_outputs: bool,
    ) -> ColumnWeights:
        """Differentiate the float network.

        Args:
            stream: the float stream.
            nodes: the weighted operators.
            sampling: of the batches, and of those of other processes.
            values_of: what the stream knows of the inputs of a batch, by its number.
            is_fixed: whether the graph takes batches of one size alone.
            weighed: names of the nodes whose columns are weighed.
            with_outputs: whether `outputs` are wanted.

        Raises:
            InvalidOptionError: an operator has no derivative.
            InvalidBatchError: an input does not fit its layer.
        """
        made = cls()
        outputs: dict[fx.Node, OutputMoment] | None = {} if with_outputs else None
        found = _differentiated(stream, nodes, sampling, values_of, outputs, is_fixed)
        processes = sampling.processes
        sites_of = {node.name: [site.float_node for site in node.sites] for node in nodes}
        reached = [
            name for name, sites in sites_of.items() if all(site in of_batch for of_batch in found for site in sites)
        ]
        everywhere = set(reached).intersection(*processes.gathered("the importance of columns", reached))
        for node in (node for node in nodes if node.name in everywhere):
            sites = sites_of[node.name]
            if node.name in weighed:
                of_node = [{site: one.pop(site) for site in sites} for one in found]
                made.probes |= {site: [one[site].probe for one in of_node] for site in sites}
                made.importance |= _relative(of_node, sampling)
            if outputs is not None and sites[0] in outputs:
                moment = outputs.pop(sites[0])
                for site in sites[1:]:
                    moment.merge(outputs.pop(site))
                sides = moment.pooled(partial(processes.add, f"the outputs of {node.name!r}"))
                if sides is not None:
                    made.outputs[node.name] = sides
        return made

    def weight(
        self, node: WeightedNode, site: fx.Node, batch: int, columns: Tensor, order: Tensor, count: int
    ) -> Tensor | None:
        """What columns count, `(G, n)`; None where that is not known.

        Args:
            node: the layer.
            site: its call site in the float graph.
            batch: number of the batch.
            columns: `(G, n, D)`, of the float stream.
            order: `(n,)`, their numbers among all columns that are asked for of the batch.
            count: how many these are.
        """
        if site not in self.importance:
            return None
        importance = self.importance[site][batch]
        if not self.probes[site][batch].is_of(columns, order, count):
            # a batch that was taken in pieces had other columns in them: what a column counts on the mean
            self._unweighed.add(node.name)
            importance = torch.ones_like(importance[:, :1]).expand(-1, count)
        return importance[:, order] + _EVEN_WEIGHT

    def forget(self, node: WeightedNode) -> str | None:
        """Free what was kept for a layer; why its columns were not weighed by their importance, if they were not."""
        self.outputs.pop(node.name, None)
        found = [self.importance.pop(site.float_node, None) for site in node.sites]
        if any(one is None for one in found):
            return "the network's output has no finite derivative by this layer's output"
        return "the leading axis of its input is not that of the samples" if node.name in self._unweighed else None


def _differentiated(
    stream: Stream,
    nodes: Sequence[WeightedNode],
    sampling: Sampling,
    values_of: Callable[[int], Values],
    outputs: dict[fx.Node, OutputMoment] | None,
    is_fixed: bool,
) -> list[dict[fx.Node, Sensitivity]]:
    """By batch the sensitivities at the sites that were reached; of large batches piece by piece."""
    largest = sampling.largest
    size = sampling.size[largest]
    if not is_fixed:
        size = piece_size(stream, values_of(largest), size)
    pieces, numbers_of = sampling.in_pieces(size)
    found = []
    for batch, numbers in enumerate(numbers_of):
        values = values_of(batch)
        parts = []
        for number in numbers:
            begin = pieces.first[number] - sampling.first[batch]
            inputs = piece(values, sampling.size[batch], begin, pieces.size[number])
            parts.append(sensitivities(stream, nodes, pieces, number, inputs, outputs))
        found.append(_joined(parts))
    return found


def _joined(parts: list[dict[fx.Node, Sensitivity]]) -> dict[fx.Node, Sensitivity]:
    """What was found for the pieces of a batch, at the sites that were reached in all of them."""
    return {
        site: Sensitivity(
            joined([part[site].columns for part in parts]),
            torch.cat([part[site].samples for part in parts]),
            Probe.joined([part[site].probe for part in parts]),
        )
        for site in parts[0]
        if all(site in part for part in parts)
    }


def _relative(found: list[dict[fx.Node, Sensitivity]], sampling: Sampling) -> dict[fx.Node, list[Tensor]]:
    """The importance of a layer's columns relative to the mean of their group; nothing where it is no number.

    Where few samples carry nearly all of it, their totals are made more alike (`tempered`).

    Args:
        found: by batch, at all call sites of the layer.
        sampling: of the pass.
    """
    add, at = sampling.processes.add, "the importance of a layer's columns"
    every = [one.columns for of_batch in found for one in of_batch.values()]
    mean = torch.stack([one.sum(1) for one in every]).sum(0)
    count = mean.new_tensor(sum(one.shape[1] for one in every), dtype=torch.float64)
    add(at, mean, count)
    mean = mean / max(1, int(count))
    if not torch.isfinite(mean).all():
        return {}
    mean = mean.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)
    # of all groups together
    totals = mean.new_zeros(sampling.total)
    own = totals[sampling.first[0] :]
    for one in (one for of_batch in found for one in of_batch.values()):
        own.index_add_(0, one.samples, (one.columns / mean).mean(0))
    add(at, totals)
    factor = tempered(totals)[sampling.first[0] :]
    return {
        site: [of_batch[site].columns / mean * factor[of_batch[site].samples] for of_batch in found]
        for site in found[0]
    }
