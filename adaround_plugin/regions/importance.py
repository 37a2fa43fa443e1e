"""How much what a layer or a region computes matters to the network's output.

BRECQ (Li et al. 2021, arXiv 2102.05426, equation 10) weighs errors by the diagonal of the Fisher information, for a
loss with labels. Without labels the network's own output is kept: its squared error has the Hessian `2 J^T J`, and
`E (J^T v)^2` over random signs `v` is the diagonal of `J^T J` (Hutchinson 1990).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from adaround_plugin.errors import taking_derivatives
from adaround_plugin.graph.paths import Path, run_node
from adaround_plugin.graph.streams import Stream, Values, tensors
from adaround_plugin.hosts.base import WeightedNode
from adaround_plugin.regions.calibration import Sampling

__all__ = ["column_importance", "importance"]

# random projections of the network's output: some for each entry of a region's exits, fewer for columns, of which there
# are many
_PROJECTIONS, _COLUMN_PROJECTIONS = 8, 2


def importance(
    stream: Stream, nodes: Sequence[fx.Node], at: Sequence[Tensor], values: Values, seed: int
) -> list[Tensor | None]:
    """Mean squared derivative of random projections of the network's output by every entry of some nodes' values.

    Args:
        stream: the float stream.
        nodes: where.
        at: their values for one batch.
        values: what the stream keeps of the batch.
        seed: of the projections.

    Returns:
        For each node a tensor of the shape of its value: what reaches the output by no other of the nodes counts; None
        where no output has a derivative by it, or one that is no number.

    Raises:
        InvalidOptionError: an operator has no derivative.
    """
    path = Path(stream, _ends(stream), {*values, *nodes}, {})
    total: list[Tensor | None] = [None] * len(nodes)
    with torch.enable_grad(), _differentiating():
        leaves = [value.detach().requires_grad_() for value in at]
        found: dict[fx.Node, Any] = {node: stream.value(node, values) for node in path.entries if node not in nodes}
        found.update(zip(nodes, leaves, strict=True))
        for node in path.order:
            found[node] = run_node(stream, node, found)
        for value in _projections(stream, found, _PROJECTIONS, seed):
            gradients = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
            squares = [None if gradient is None else gradient.square() / _PROJECTIONS for gradient in gradients]
            total = [square if one is None else one + square for one, square in zip(total, squares, strict=True)]
    return [one if one is not None and bool(torch.isfinite(one).all()) else None for one in total]


def column_importance(
    stream: Stream, nodes: Sequence[WeightedNode], sampling: Sampling, batch: int, values: Values
) -> dict[fx.Node, Tensor]:
    """Squared derivative of random projections of the network's output by what weighted operators give, by column.

    Args:
        stream: the float stream, nothing of it run.
        nodes: the weighted operators.
        sampling: which columns are asked for.
        batch: number of the batch.
        values: of the graph's inputs in it.

    Returns:
        By call site, its node in the float graph, `(G, n)`: for the columns of `sampling.columns`, summed over the rows
        of each group. A site is left out if its operator cannot be run from outside, or if no output has a derivative
        by what it gives.

    Raises:
        InvalidOptionError: an operator has no derivative.
        InvalidBatchError: an input does not fit its layer.
    """
    sites = {site.float_node: (site.call, node) for node in nodes for site in node.sites if site.call is not None}
    path = Path(stream, _ends(stream), values, {})
    found: dict[fx.Node, Any] = {node: stream.value(node, values) for node in path.entries}
    total: dict[fx.Node, Tensor] = {}
    with torch.enable_grad(), _differentiating():
        # added to every operator's output, so that each has a derivative, and no weight needs one
        zero = torch.zeros((), requires_grad=True)
        for node in path.order:
            if node not in sites:
                found[node] = run_node(stream, node, found)
                continue
            call, weighted = sites[node]
            args, kwargs = map_arg(call.arguments(node), found.__getitem__)
            x = args[0] if args else kwargs["input"]
            weighted.check_input(x, batch)
            patches = weighted.op.patches(x, weighted.weight.shape)
            columns = sampling.columns(batch, patches, len(weighted.sites))
            tap = _tap(node, weighted, columns, zero, total)
            found[node] = call.tapped(args, kwargs, weighted.weight, tap)
        for value in _projections(stream, found, _COLUMN_PROJECTIONS, batch):
            torch.autograd.grad(value, zero, retain_graph=True, allow_unused=True)
    return total


def _differentiating() -> AbstractContextManager[None]:
    remedy = "Pass method='default', or LayerWise(column_weighting='none') and BlockWise(weighs_outputs=False)."
    return taking_derivatives("column_weighting, weighs_outputs", remedy)


def _tap(
    site: fx.Node, weighted: WeightedNode, columns: tuple[Tensor, Tensor], zero: Tensor, total: dict[fx.Node, Tensor]
) -> Callable[[Tensor], Tensor]:
    """What adds the squared derivative by an output to `total`, each time there is one."""

    def add(gradient: Tensor) -> None:
        square = weighted.op.outputs_at(gradient, weighted.weight.shape, *columns).square().sum(-1)
        total[site] = total[site] + square if site in total else square

    def tap(output: Tensor) -> Tensor:
        output = output + zero.to(output.device)
        output.register_hook(add)  # type: ignore[no-untyped-call]
        return output

    return tap


def _ends(stream: Stream) -> list[fx.Node]:
    """The nodes that the network returns."""
    ends: list[fx.Node] = []
    map_arg(stream.output_node.args[0], ends.append)
    return ends


def _projections(stream: Stream, found: Values, count: int, seed: int) -> Iterator[Tensor]:
    """Random projections of those outputs that have a derivative; none if none has."""
    generator = torch.Generator().manual_seed(seed)
    outputs = [
        output for output in tensors(map_arg(stream.output_node.args[0], found.__getitem__)) if output.requires_grad
    ]
    for _ in range(count if outputs else 0):
        signs = [torch.randint(2, output.shape, generator=generator).to(output) * 2 - 1 for output in outputs]
        sums = [(output * sign).sum() for output, sign in zip(outputs, signs, strict=True)]
        yield torch.stack([one.to(sums[0].device) for one in sums]).sum()
