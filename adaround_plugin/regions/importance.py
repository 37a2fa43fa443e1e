"""How much what a layer or a region computes matters to the network's output.

BRECQ (Li et al. 2021, arXiv 2102.05426, equation 10) weighs errors by the diagonal of the Fisher information, for a
loss with labels. Without labels the network's own output is kept (`derivatives`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from adaround_plugin.graph.ends import ends_of
from adaround_plugin.graph.paths import Path
from adaround_plugin.graph.streams import Stream, Values
from adaround_plugin.hosts.base import WeightedNode
from adaround_plugin.regions.calibration import Sampling
from adaround_plugin.regions.derivatives import differentiate, projections, run_differentiably, taking
from adaround_plugin.rounding.across import MOST_ROWS, put_together, shape_of_coupled, shape_of_sets
from adaround_plugin.rounding.shrinkage import SampleSpread, three_digits

__all__ = ["OutputMoment", "Sensitivity", "importance", "sensitivities", "tempered"]

# random projections of the network's output for each entry of a region's exits; of columns there are so many that two
# bring no more than the noise
_PROJECTIONS = 8
# columns of a set that are looked at to know it again, about
_PROBES = 4
# ridge on the moment of derivatives, relative to its mean diagonal: at least, and for odds of 1 that it is noise
_OUTPUT_RIDGE, _RIDGE_PER_ODDS = 0.2, 10.0
# samples that count, at least this share of all, by their weights
_EFFECTIVE_SHARE = 0.5


def importance(
    stream: Stream,
    nodes: Sequence[fx.Node],
    at: Sequence[Tensor],
    values: Values,
    samples: Sequence[int],
    mask: Tensor | None = None,
) -> list[Tensor | None]:
    """Mean squared derivative of random projections of the network's output by every entry of some nodes' values.

    Args:
        stream: the float stream.
        nodes: where.
        at: their values for one batch.
        values: what the stream keeps of the batch.
        samples: the numbers of the batch's samples.
        mask: `(samples, tokens)`, which tokens of the output count, or None.

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
            found[node] = run_differentiably(stream, node, found)
        for value in projections(stream, found, _PROJECTIONS, samples, mask=mask):
            with taking():
                gradients = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
            squares = [None if gradient is None else gradient.square() / _PROJECTIONS for gradient in gradients]
            total = [square if one is None else one + square for one, square in zip(total, squares, strict=True)]
    return [one if one is not None and bool(torch.isfinite(one).all()) else None for one in total]


@dataclass(frozen=True)
class Probe:
    """Some columns of a set, by which it is known again: a batch that is taken in pieces has the columns of the whole
    only where the leading axis of a layer's input is that of the samples.

    Attributes:
        count: of the columns in the set.
        numbers: `(m,)` int64 of those that were looked at.
        power: `(m,)` float64, their sums of squares.
    """

    count: int
    numbers: Tensor
    power: Tensor

    @classmethod
    def of(cls, count: int, device: torch.device, columns: Callable[[Tensor], Tensor]) -> Probe:
        """A few evenly spread ones of so many; `columns` gives `(G, m, D)` of their numbers."""
        numbers = torch.arange(0, count, max(1, count // _PROBES), device=device)
        return cls(count, numbers, _power(columns(numbers)))

    @classmethod
    def joined(cls, parts: Sequence[Probe]) -> Probe:
        """Of the sets one after the other."""
        starts = [sum(part.count for part in parts[:number]) for number in range(len(parts) + 1)]
        numbers = torch.cat([part.numbers + start for part, start in zip(parts, starts, strict=False)])
        return cls(starts[-1], numbers, torch.cat([part.power for part in parts]))

    def is_of(self, columns: Tensor, order: Tensor, count: int) -> bool:
        """Whether `(G, n, D)` columns with the numbers `(n,)`, of so many in all, are from this set."""
        if count != self.count:
            return False
        place = order.new_full((count,), -1)
        place[order] = torch.arange(len(order), device=order.device)
        place = place[self.numbers.to(order.device)]
        found, expected = _power(columns[:, place[place >= 0]]), self.power[(place >= 0).to(self.power.device)]
        # batches of other sizes differ in the last digits
        return bool(((found - expected).abs() <= 1e-3 * expected).all())


def _power(columns: Tensor) -> Tensor:
    """`(n,)` float64, the sum of squares of `(G, n, D)` columns."""
    return columns.detach().double().square().sum((0, 2))


@dataclass
class Sensitivity:
    """How the network's output depends on what a weighted operator gives, in one batch.

    Attributes:
        columns: `(G, n)`, the squared derivative by each column's outputs, summed over them, and over the groups of one
            output that are put together.
        samples: `(n,)` int64, the number of each column's sample among this process's.
        probe: what tells these columns from others.
    """

    columns: Tensor
    samples: Tensor
    probe: Probe


class _Columns(NamedTuple):
    """Columns of a layer's input: indices along the leading axis, positions, and samples."""

    rows: Tensor
    positions: Tensor
    samples: Tensor


class OutputMoment:
    """The second moment of the derivatives of the network's output by a layer's outputs, of all samples seen.

    Args:
        groups: of the layer.
        rows: number `R` of outputs of a group.
        samples: number of samples.
        device: of the derivatives.

    Attributes:
        sum: `(G, R, R)` float32, of products of the derivatives by the outputs of a column; of every sample's share the
            trace is 1.
        spread: of the samples.
    """

    def __init__(self, groups: int, rows: int, samples: int, device: torch.device) -> None:
        self.sum = torch.zeros(groups, rows, rows, dtype=torch.float32, device=device)
        self.spread = SampleSpread(groups, rows, samples, device)

    def add(self, by_output: Tensor, sample: Tensor) -> None:
        """Take in `(G, n, R)` derivatives at columns, of samples `(n,)`."""
        self.sum.baddbmm_(by_output.transpose(1, 2), by_output)
        self.spread.add(by_output, sample)

    def merge(self, other: OutputMoment) -> None:
        """Take in another call site's."""
        self.sum += other.sum
        self.spread.merge(other.spread)

    def pooled(self, add: Callable[..., None]) -> Tensor | None:
        """`(G, R, R)` over its mean diagonal, and a ridge; None where no output has a derivative that is a number.

        Of a group without any derivative there is the ridge alone. What the samples say about two outputs together
        counts less where it differs from sample to sample.

        Args:
            add: puts the sums over all processes into the tensors that it is given, in place.
        """
        add(self.sum)
        diagonal = self.sum.diagonal(dim1=1, dim2=2)
        shrinkage = self.spread.shrinkage(diagonal.sum(1, dtype=torch.float64), add=add)
        mean = diagonal.mean(1)
        if not (bool(torch.isfinite(self.sum).all()) and bool((mean > 0).any())):
            return None
        sides = self.sum / torch.where(mean > 0, mean, 1.0)[:, None, None]
        ridge = max(_OUTPUT_RIDGE, _RIDGE_PER_ODDS * shrinkage / max(1 - shrinkage, 1e-3))
        sides.diagonal(dim1=1, dim2=2).add_(three_digits(ridge))
        return sides


def sensitivities(
    stream: Stream,
    nodes: Sequence[WeightedNode],
    sampling: Sampling,
    batch: int,
    values: Values,
    outputs: dict[fx.Node, OutputMoment] | None = None,
) -> dict[fx.Node, Sensitivity]:
    """Derivatives of a random projection of the network's output by what weighted operators give.

    Args:
        stream: the float stream, nothing of it run.
        nodes: the weighted operators.
        sampling: which columns are asked for.
        batch: number of the batch.
        values: of the graph's inputs in it.
        outputs: by call site of operators of several outputs to a group, up to `MOST_ROWS`, or of several groups of one
            output, to which the derivatives are added. None where they are not asked for.

    Returns:
        By call site, its node in the float graph, the sensitivity at the columns of `sampling.columns`. A site is left
        out if its operator cannot be run from outside, or if no output has a derivative by what it gives.

    Raises:
        InvalidOptionError: an operator has no derivative.
        InvalidBatchError: an input does not fit its layer.
    """
    total: dict[fx.Node, Sensitivity] = {}
    # layers of one geometry have their columns in common
    known: dict[tuple[int, tuple[int | str, ...]], _Columns] = {}

    def watch(site: fx.Node, node: WeightedNode, x: Tensor) -> Callable[[Tensor], None]:
        node.check_input(x, batch)
        patches = node.op.patches(x, node.weight.shape)
        key = len(node.sites), patches.geometry
        if key not in known:
            index, position = sampling.columns(batch, patches, len(node.sites))
            known[key] = _Columns(index, position, sampling.own_numbers(batch, patches.samples, index.device)[index])
        if outputs is not None and site not in outputs:
            groups, rows, _ = shape_of_coupled(*node.op.rows(node.weight).shape)
            if 1 < rows <= MOST_ROWS:
                outputs[site] = OutputMoment(groups, rows, sampling.own, x.device)
        index, position, samples = known[key]
        probe = Probe.of(len(index), index.device, lambda some: patches.columns(index[some], position[some]))
        moment = None if outputs is None else outputs.get(site)

        def keep(square: Tensor) -> None:
            total[site] = Sensitivity(square, samples, probe)

        return _adder(node, known[key], keep, moment)

    differentiate(stream, nodes, values, sampling.numbers(batch), watch, mask=sampling.mask_of(batch))
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


def _adder(
    weighted: WeightedNode, columns: _Columns, keep: Callable[[Tensor], None], moment: OutputMoment | None
) -> Callable[[Tensor], None]:
    """What keeps the sensitivity to an output, if there is a derivative by it, and adds to its moment."""
    index, position, samples = columns
    joined = shape_of_sets(*weighted.op.rows(weighted.weight).shape)

    def add(gradient: Tensor) -> None:
        by_output = weighted.op.outputs_at(gradient, weighted.weight.shape, index, position)
        groups = len(by_output)
        if joined is not None:
            by_output = put_together(by_output, joined[0])
        square = by_output.square().sum(-1)
        keep(square.repeat_interleave(groups // len(square), 0))
        if moment is not None:
            moment.add(_of_one_sum(by_output, square, samples - samples[:1]), samples)

    return add


def _of_one_sum(by_output: Tensor, square: Tensor, samples: Tensor) -> Tensor:
    """`(G, n, R)` derivatives, whose squares `(G, n)` make 1 in every sample then."""
    count = int(samples.max()) + 1 if len(samples) else 0
    power = square.new_zeros(len(square), count).index_add_(1, samples, square)
    return by_output * power.clamp_min(torch.finfo(power.dtype).tiny).rsqrt()[:, samples].unsqueeze(-1)
