"""How much what a layer or a region computes matters to the network's output.

BRECQ (Li et al. 2021, arXiv 2102.05426, equation 10) weighs errors by the diagonal of the Fisher information, for a
loss with labels. Without labels the network's own output is kept: its squared error has the Hessian `2 J^T J`, and
`E (J^T v)^2` over random signs `v` is the diagonal of `J^T J` (Hutchinson 1990).

Derivatives start before a last softmax or sigmoid, through which they would vanish wherever the network is sure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from adaround_plugin.errors import taking_derivatives
from adaround_plugin.graph.compat import JOINS, PROBABILITIES, REARRANGES, operator_name
from adaround_plugin.graph.paths import Path, run_node
from adaround_plugin.graph.streams import Stream, Values, tensors
from adaround_plugin.hosts.base import WeightedNode
from adaround_plugin.regions.calibration import Sampling

__all__ = ["Sensitivity", "importance", "sensitivities"]

# random projections of the network's output: some for each entry of a region's exits, fewer for columns, of which there
# are many
_PROJECTIONS, _COLUMN_PROJECTIONS = 8, 2
# modules that turn scores into probabilities, and that rearrange entries
_PROBABILITY_MODULES = (nn.Softmax, nn.LogSoftmax, nn.Sigmoid, nn.LogSigmoid)
_REARRANGING_MODULES = (nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout)


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


@dataclass
class Sensitivity:
    """How the network's output depends on what a weighted operator gives, in one batch.

    Attributes:
        columns: `(G, n)`, the squared derivative by each column's outputs, summed over them.
        samples: `(n,)` int64, the number of each column's sample in the batch.
    """

    columns: Tensor
    samples: Tensor


def sensitivities(
    stream: Stream,
    nodes: Sequence[WeightedNode],
    sampling: Sampling,
    batch: int,
    values: Values,
    outputs: dict[fx.Node, Tensor] | None = None,
) -> dict[fx.Node, Sensitivity]:
    """Derivatives of random projections of the network's output by what weighted operators give.

    Args:
        stream: the float stream, nothing of it run.
        nodes: the weighted operators.
        sampling: which columns are asked for.
        batch: number of the batch.
        values: of the graph's inputs in it.
        outputs: by call site `(G, R, R)`, to which the products of the derivatives by the outputs of a column are
            added, summed over columns; of every sample's share the trace is 1. None where they are not asked for.

    Returns:
        By call site, its node in the float graph, the sensitivity at the columns of `sampling.columns`, summed over
        projections. A site is left out if its operator cannot be run from outside, or if no output has a derivative by
        what it gives.

    Raises:
        InvalidOptionError: an operator has no derivative.
        InvalidBatchError: an input does not fit its layer.
    """
    sites = {site.float_node: (site.call, node) for node in nodes for site in node.sites if site.call is not None}
    path = Path(stream, _ends(stream), values, {})
    found: dict[fx.Node, Any] = {node: stream.value(node, values) for node in path.entries}
    total: dict[fx.Node, Sensitivity] = {}
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
            samples = sampling.samples(batch, patches.samples, columns[0].device)[columns[0]]
            tap = _tap(node, weighted, columns, samples, zero, total, outputs)
            found[node] = call.tapped(args, kwargs, weighted.weight, tap)
        for value in _projections(stream, found, _COLUMN_PROJECTIONS, batch):
            torch.autograd.grad(value, zero, retain_graph=True, allow_unused=True)
    return total


def _differentiating() -> AbstractContextManager[None]:
    remedy = "Pass method='default', or LayerWise(column_weighting='none') and BlockWise(weighs_outputs=False)."
    return taking_derivatives("column_weighting, weighs_outputs", remedy)


def _tap(
    site: fx.Node,
    weighted: WeightedNode,
    columns: tuple[Tensor, Tensor],
    samples: Tensor,
    zero: Tensor,
    total: dict[fx.Node, Sensitivity],
    outputs: dict[fx.Node, Tensor] | None,
) -> Callable[[Tensor], Tensor]:
    """What adds the sensitivity to an output to `total`, each time there is a derivative by it."""

    def add(gradient: Tensor) -> None:
        by_output = weighted.op.outputs_at(gradient, weighted.weight.shape, *columns)
        square = by_output.square().sum(-1)
        if site in total:
            total[site].columns += square
        else:
            total[site] = Sensitivity(square, samples)
        if outputs is not None:
            weighed = _of_one_sum(by_output, square, samples)
            if site not in outputs:
                groups, _, rows = weighed.shape
                outputs[site] = weighed.new_zeros(groups, rows, rows)
            outputs[site].baddbmm_(weighed.transpose(1, 2), weighed)

    def tap(output: Tensor) -> Tensor:
        output = output + zero.to(output.device)
        output.register_hook(add)  # type: ignore[no-untyped-call]
        return output

    return tap


def _of_one_sum(by_output: Tensor, square: Tensor, samples: Tensor) -> Tensor:
    """`(G, n, R)` derivatives, whose squares `(G, n)` make 1 in every sample then."""
    count = int(samples.max()) + 1 if len(samples) else 0
    power = square.new_zeros(len(square), count).index_add_(1, samples, square)
    return by_output * power.clamp_min(torch.finfo(power.dtype).tiny).rsqrt()[:, samples].unsqueeze(-1)


def _ends(stream: Stream) -> list[fx.Node]:
    """The nodes where derivatives start: what the network returns, before it is joined or made probabilities of."""
    ends: list[fx.Node] = []
    map_arg(stream.output_node.args[0], ends.append)
    found: dict[fx.Node, None] = {}
    while ends:
        node = ends.pop(0)
        behind = _before(stream, node)
        if behind is None:
            found[node] = None
        else:
            ends[:0] = behind
    return list(found)


def _before(stream: Stream, node: fx.Node) -> list[fx.Node] | None:
    """What is joined or made probabilities of at a node, through what rearranges it; None where nothing is."""
    end = node
    while stream.varies(end) and _is_one(stream, end, REARRANGES, _REARRANGING_MODULES):
        end = end.all_input_nodes[0]
    if not stream.varies(end):
        return None
    if _is_one(stream, end, PROBABILITIES, _PROBABILITY_MODULES):
        return [end.all_input_nodes[0]]
    if _is_one(stream, end, JOINS, ()):
        return [source for source in end.all_input_nodes if stream.varies(source)]
    return None


def _is_one(stream: Stream, node: fx.Node, names: set[str], modules: tuple[type[nn.Module], ...]) -> bool:
    if not node.all_input_nodes:
        return False
    if node.op == "call_module":
        return isinstance(stream.fetch_attr(str(node.target)), modules)
    if node.op == "call_function":
        return operator_name(node)[0].split(".")[0] in names
    return node.op == "call_method" and node.target in names


def _projections(stream: Stream, found: Values, count: int, seed: int) -> Iterator[Tensor]:
    """Random projections of those ends that have a derivative; none if none has.

    Of several ends each is taken over its standard deviation, so that none counts by its unit.
    """
    generator = torch.Generator().manual_seed(seed)
    outputs = [_scores(output) for output in tensors([found[end] for end in _ends(stream)]) if output.requires_grad]
    unit = [1.0] * len(outputs)
    if len(outputs) > 1:
        spread = [float(output.detach().std()) if output.numel() > 1 else 0.0 for output in outputs]
        unit = [1 / one if one > 0 else 1.0 for one in spread]
    for _ in range(count if outputs else 0):
        signs = [torch.randint(2, output.shape, generator=generator).to(output) * 2 - 1 for output in outputs]
        sums = [one * (output * sign).sum() for output, sign, one in zip(outputs, signs, unit, strict=True)]
        yield torch.stack([one.to(sums[0].device) for one in sums]).sum()


def _scores(output: Tensor) -> Tensor:
    """The logarithm of what are shares of 1 along its last axis or the axis of channels, however they were computed."""
    values = output.detach()
    if values.dim() < 2 or values.numel() == 0 or float(values.min()) < 0:
        return output
    for axis in {1, values.dim() - 1}:
        if values.shape[axis] > 1 and bool(((values.sum(axis) - 1).abs() < 1e-3).all()):
            return output.clamp_min(1e-12).log()
    return output
