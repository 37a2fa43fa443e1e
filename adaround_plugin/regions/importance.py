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
from torch import Tensor, fx
from torch.fx.node import map_arg

from adaround_plugin.errors import taking_derivatives
from adaround_plugin.graph.compat import tree_map
from adaround_plugin.graph.ends import ends_of
from adaround_plugin.graph.paths import Path, run_node
from adaround_plugin.graph.streams import Stream, Values, tensors
from adaround_plugin.hosts.base import WeightedNode
from adaround_plugin.regions.calibration import Sampling

__all__ = ["Sensitivity", "importance", "sensitivities", "tempered"]

# random projections of the network's output: some for each entry of a region's exits, one for columns, of which there
# are many (two bring no more than the noise)
_PROJECTIONS, _COLUMN_PROJECTIONS = 8, 1
# samples that count, at least this share of all, by their weights
_EFFECTIVE_SHARE = 0.5


def importance(
    stream: Stream, nodes: Sequence[fx.Node], at: Sequence[Tensor], values: Values, samples: Sequence[int]
) -> list[Tensor | None]:
    """Mean squared derivative of random projections of the network's output by every entry of some nodes' values.

    Args:
        stream: the float stream.
        nodes: where.
        at: their values for one batch.
        values: what the stream keeps of the batch.
        samples: the numbers of the batch's samples.

    Returns:
        For each node a tensor of the shape of its value: what reaches the output by no other of the nodes counts; None
        where no output has a derivative by it, or one that is no number.

    Raises:
        InvalidOptionError: an operator has no derivative.
    """
    path = Path(stream, ends_of(stream), {*values, *nodes}, {})
    total: list[Tensor | None] = [None] * len(nodes)
    with torch.enable_grad():
        leaves = [value.detach().requires_grad_() for value in at]
        found: dict[fx.Node, Any] = {node: stream.value(node, values) for node in path.entries if node not in nodes}
        found.update(zip(nodes, leaves, strict=True))
        for node in path.order:
            found[node] = _run(stream, node, found)
        for value in _projections(stream, found, _PROJECTIONS, samples):
            with _differentiating():
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
    path = Path(stream, ends_of(stream), values, {})
    found: dict[fx.Node, Any] = {node: stream.value(node, values) for node in path.entries}
    total: dict[fx.Node, Sensitivity] = {}
    # layers of one geometry have their columns in common
    known: dict[tuple[int, tuple[int | str, ...]], tuple[Tensor, Tensor, Tensor]] = {}
    with torch.enable_grad():
        # added to every operator's output, so that each has a derivative, and no weight needs one
        zero = torch.zeros((), requires_grad=True, device="cpu")
        for node in path.order:
            if node not in sites:
                found[node] = _run(stream, node, found)
                continue
            call, weighted = sites[node]
            args, kwargs = map_arg(call.arguments(node), found.__getitem__)
            x = args[0] if args else kwargs["input"]
            weighted.check_input(x, batch)
            patches = weighted.op.patches(x, weighted.weight.shape)
            key = len(weighted.sites), patches.geometry
            if key not in known:
                index, position = sampling.columns(batch, patches, len(weighted.sites))
                known[key] = index, position, sampling.samples(batch, patches.samples, index.device)[index]
            tap = _tap(node, weighted, known[key], zero, total, outputs)
            found[node] = call.tapped(args, kwargs, weighted.weight, tap)
        for value in _projections(stream, found, _COLUMN_PROJECTIONS, sampling.numbers(batch)):
            with _differentiating():
                torch.autograd.grad(value, zero, retain_graph=_COLUMN_PROJECTIONS > 1, allow_unused=True)
    return total


def tempered(totals: Tensor) -> Tensor:
    """`(S,)` factors for the weights of samples whose totals are `(S,)`: `total^(p - 1)`, times what keeps their sum.

    A mean weighed by `w` is as uncertain as one of `(sum w)^2 / sum w^2` samples that count alike. `p` is the largest
    up to 1 for which these are a share of `_EFFECTIVE_SHARE` of all.
    """
    known = totals > 0
    # less than a millionth of the largest is no more than that
    relative = torch.where(known, (totals / totals.max()).clamp_min(1e-6), 1.0).double()

    def suffices(p: float) -> bool:
        weight = torch.where(known, relative**p, 0.0)
        return bool(weight.sum().square() >= _EFFECTIVE_SHARE * known.sum() * weight.square().sum())

    if suffices(1.0):
        return torch.ones_like(totals)
    low, high = 0.0, 1.0
    for _ in range(20):
        p = (low + high) / 2
        low, high = (p, high) if suffices(p) else (low, p)
    factor = torch.where(known, relative ** (low - 1), 0.0)
    return (factor * (totals.sum() / (factor * totals).sum())).to(totals)


def _run(stream: Stream, node: fx.Node, found: Values) -> Any:
    """The value of one node, with a derivative.

    What it raises for values without one, too, is the network's own error, and no matter of derivatives.
    """
    try:
        return run_node(stream, node, found)
    except RuntimeError:
        plain = {source: tree_map(_detached, found[source]) for source in node.all_input_nodes}
        with torch.no_grad():
            run_node(stream, node, plain)
        with _differentiating():
            raise


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _differentiating() -> AbstractContextManager[None]:
    off = "LayerWise(column_weighting='none', output_hessian=False) and BlockWise(weighs_outputs=False)"
    remedy = f"Pass method='default', which does without, or {off}."
    return taking_derivatives("column_weighting, output_hessian, weighs_outputs", remedy)


def _tap(
    site: fx.Node,
    weighted: WeightedNode,
    columns: tuple[Tensor, Tensor, Tensor],
    zero: Tensor,
    total: dict[fx.Node, Sensitivity],
    outputs: dict[fx.Node, Tensor] | None,
) -> Callable[[Tensor], Tensor]:
    """What adds the sensitivity to an output to `total`, each time there is a derivative by it.

    `columns` are their indices along the leading axis, their positions and the numbers of their samples.
    """
    index, position, samples = columns

    def add(gradient: Tensor) -> None:
        by_output = weighted.op.outputs_at(gradient, weighted.weight.shape, index, position)
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


def _projections(stream: Stream, found: Values, count: int, samples: Sequence[int]) -> Iterator[Tensor]:
    """Random projections of those ends that have a derivative; none if none has.

    Each sample has random signs of its own, whatever batch it is in. Of several ends each is taken over its standard
    deviation, so that none counts by its unit.

    Args:
        stream: whose ends they are.
        found: their values.
        count: number of projections.
        samples: the numbers of the batch's samples.
    """
    outputs = [_scores(output) for output in tensors([found[end] for end in ends_of(stream)]) if output.requires_grad]
    unit = [1.0] * len(outputs)
    if len(outputs) > 1:
        spread = [float(output.detach().std()) if output.numel() > 1 else 0.0 for output in outputs]
        unit = [1 / one if one > 0 else 1.0 for one in spread]
    for number in range(count if outputs else 0):
        sums = []
        for which, (output, one) in enumerate(zip(outputs, unit, strict=True)):
            seeds = [(sample * count + number) * len(outputs) + which for sample in samples]
            sums.append(one * (output * _signs(output, seeds)).sum())
        yield torch.stack([one.to(sums[0].device) for one in sums]).sum()


def _signs(output: Tensor, seeds: Sequence[int]) -> Tensor:
    """Random signs of the shape of an output, for its equal runs along the leading axis by a seed for each."""
    generator = torch.Generator()
    if not output.dim() or output.shape[0] % len(seeds):
        seeds = seeds[:1]
    shape = (output.shape[0] // len(seeds), *output.shape[1:]) if output.dim() else ()
    drawn = [torch.randint(2, shape, generator=generator.manual_seed(seed), device="cpu") for seed in seeds]
    return (torch.cat(drawn) if output.dim() else drawn[0]).to(output) * 2 - 1


def _scores(output: Tensor) -> Tensor:
    """The logarithm of what are shares of 1 along its last axis or the axis of channels, however they were computed."""
    values = output.detach()
    if values.dim() < 2 or values.numel() == 0 or float(values.min()) < 0:
        return output
    for axis in {1, values.dim() - 1}:
        if values.shape[axis] > 1 and bool(((values.sum(axis) - 1).abs() < 1e-3).all()):
            return output.clamp_min(1e-12).log()
    return output
