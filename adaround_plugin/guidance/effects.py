"""What small changes of a layer's weight do to the network's output, exactly to second order.

A change `E` of a weight changes the output of a sample by `sum_p J_p E x_p`, the sum running over the output positions
`p` of the layer. With random signs `v`, the square of `<v, that>` is the squared error on the mean (Hutchinson 1990),
and `<v, sum_p J_p E x_p> = <E, sum_p (J_p^T v) x_p^T>`: the change times the gradient of the projection by the weight,
sample by sample. Unlike `tr(G E H E^T)`, with the second moments `G` of the derivatives and `H` of the inputs, it knows
how errors at different positions of one sample add up.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, fx

from adaround_plugin.graph.streams import Stream, Values
from adaround_plugin.guidance.orders import SampleOrders
from adaround_plugin.hosts.base import WeightedNode
from adaround_plugin.regions.calibration import Sampling
from adaround_plugin.regions.derivatives import differentiate
from adaround_plugin.regions.pieces import piece, piece_size
from adaround_plugin.rounding.linear_op import Patches
from adaround_plugin.rounding.result import LayerRounding

__all__ = ["effects"]

# samples of a layer are taken together as long as their columns and gradients have no more numbers than this
_NUMBERS = 2**24
# projections of samples, of all of them together, at least
_LEAST_DRAWS = 256


def effects(
    stream: Stream,
    nodes: Sequence[WeightedNode],
    roundings: Mapping[str, Sequence[LayerRounding]],
    arguments: Sequence[list[Any]],
    sampling: Sampling,
    variances: Sequence[float],
    *,
    is_fixed: bool,
    told: Callable[[int], None] = lambda _: None,
) -> dict[str, Tensor]:
    """The error of the network's output that roundings of one layer alone are expected to make, in the network's unit.

    Args:
        stream: the float stream, nothing of it run.
        nodes: the layers.
        roundings: of each, by its name.
        arguments: of each batch, as the host's graphs take them.
        sampling: of the batches.
        variances: of the network's ends, as `OutputError` has them.
        is_fixed: whether the graph takes batches of one size alone.
        told: called with the number of samples that are done.

    Returns:
        By name of the layer the loss of each rounding, float64; a layer is left out if no output has a derivative by
        it. The signs leave noise, a share of about `sqrt(2 / n)` of a loss, with `n` samples, but at least
        `_LEAST_DRAWS`: of fewer samples several projections are taken.

    Raises:
        InvalidOptionError: an operator has no derivative.
    """
    largest = sampling.largest
    size, orders = sampling.size[largest], SampleOrders({})
    if not is_fixed:
        orders = SampleOrders.of(stream, nodes, arguments[largest], size)
        size = piece_size(stream, stream.bind(arguments[largest]), size)
    pieces, numbers = sampling.in_pieces(size)
    rounds = -(-_LEAST_DRAWS // sampling.total)
    total: dict[str, Tensor] = {}
    for batch, of_batch in enumerate(numbers):
        values = stream.bind(arguments[batch])
        for number, again in product(of_batch, range(rounds)):
            begin, count = pieces.first[number] - sampling.first[batch], pieces.size[number]
            part = piece(values, sampling.size[batch], begin, count)
            # signs are those of a sample's number
            first = pieces.first[number] + again * sampling.total
            squares_of = _squares(
                stream, nodes, roundings, part, range(first, first + count), variances, pieces.mask_of(number), orders
            )
            for name, squares in squares_of.items():
                total[name] = total.get(name, torch.zeros_like(squares)) + squares
        told(sampling.first[batch] + sampling.size[batch])
    return {name: squares / sampling.total / rounds for name, squares in total.items()}


def _squares(
    stream: Stream,
    nodes: Sequence[WeightedNode],
    roundings: Mapping[str, Sequence[LayerRounding]],
    values: Values,
    samples: Sequence[int],
    variances: Sequence[float],
    mask: Tensor | None,
    orders: SampleOrders,
) -> dict[str, Tensor]:
    """By layer the squared changes of one projection, `(roundings,)`, summed over the samples of a piece."""
    # by layer, at each of its call sites the change of the projection: (roundings, samples or 1)
    found: dict[str, list[Tensor]] = defaultdict(list)

    def watch(site: fx.Node, node: WeightedNode, x: Tensor) -> Callable[[Tensor], None]:
        patches = node.op.patches(x.float(), node.weight.shape)
        order = orders.columns(site, patches, len(samples))

        def take(gradient: Tensor) -> None:
            found[node.name].append(_changes(node, roundings[node.name], patches, gradient, order))

        return take

    differentiate(stream, nodes, values, samples, watch, variances, mask)
    return {name: _together(parts).square().sum(1) for name, parts in found.items()}


def _together(parts: Sequence[Tensor]) -> Tensor:
    """The changes of all call sites, sample by sample where all are known so."""
    if len({part.shape[1] for part in parts}) > 1:
        parts = [part.sum(1, keepdim=True) for part in parts]
    return torch.stack(list(parts)).sum(0)


def _changes(
    node: WeightedNode, roundings: Sequence[LayerRounding], patches: Patches, gradient: Tensor, order: Tensor
) -> Tensor:
    """`<v, sum_p J_p (w^ x_p + b - w x_p)>` at one call site for each rounding: `(roundings, samples)` float64.

    Args:
        node: the layer.
        roundings: of it.
        patches: of its input.
        gradient: by its output.
        order: `(samples, columns)`, the numbers of the columns that each sample has, which are summed.
    """
    shape, rows = node.weight.shape, node.op.rows
    changes = torch.stack([rows(one.weight - node.weight).flatten() for one in roundings])
    offsets = torch.stack([_correction(node, one) for one in roundings])
    of_sample = order.shape[1] * patches.row_length * patches.groups + node.weight.numel()
    together = max(1, _NUMBERS // max(1, of_sample))
    found = []
    for of_samples in torch.split(order.to(gradient.device), together):
        numbers = of_samples.flatten()
        index, position = numbers // patches.positions, numbers % patches.positions
        x = patches.columns(index, position)
        by_output = node.op.outputs_at(gradient, shape, index, position)
        x, by_output = (one.reshape(len(one), *of_samples.shape, one.shape[2]) for one in (x, by_output))
        by_weight = (by_output.transpose(2, 3) @ x).transpose(0, 1).flatten(1)
        by_bias = by_output.sum(2).transpose(0, 1).flatten(1)
        found.append(changes @ by_weight.T + offsets @ by_bias.T)
    return torch.cat(found, 1).double()


def _correction(node: WeightedNode, rounding: LayerRounding) -> Tensor:
    """What is added to the outputs of a layer, in the order of its rows: `(groups * rows,)`."""
    if rounding.bias_correction is not None:
        return rounding.bias_correction.flatten()
    groups, count, _ = node.op.rows(node.weight).shape
    return node.weight.new_zeros(groups * count)
