"""From both streams' values at a layer to its moments: which columns are taken, and what each weighs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from adaround_plugin.errors import NonFiniteError
from adaround_plugin.graph.arguments import input_of
from adaround_plugin.graph.calls import CallSite
from adaround_plugin.graph.selection import chosen_rows
from adaround_plugin.graph.streams import BothValues
from adaround_plugin.hosts.base import WeightedNode
from adaround_plugin.learning.column_weights import ColumnWeights
from adaround_plugin.learning.passes import Pass
from adaround_plugin.processes import ALONE, Processes
from adaround_plugin.rounding.across import JoinedMoments, shape_of_sets
from adaround_plugin.rounding.linear_op import Patches
from adaround_plugin.rounding.moments import HeldOut, Moments, joined
from adaround_plugin.rounding.shrinkage import SampleSpread

__all__ = ["Columns", "LayerMoments"]

# columns of a layer that are taken in together: as many as these are wide, several times, but no more numbers than
# this; or as many as are worth the calls
_PENDING_TIMES, _PENDING_NUMBERS, _LEAST_PENDING = 4, 2**24, 2048


@dataclass(frozen=True)
class _Chosen:
    """Which columns of a batch are taken.

    Attributes:
        index, position: `(n,)`, as of `Sampling.columns`, those to learn from first.
        order: `(n,)`, their numbers there.
        count: of all there.
        sample: `(n,)`, the numbers of their samples among this process's.
        is_odd: `(n,)`, whether the number of the sample among all is.
        learning: how many are to learn from.
    """

    index: Tensor
    position: Tensor
    order: Tensor
    count: int
    sample: Tensor
    is_odd: Tensor
    learning: int


@dataclass(frozen=True)
class _Gathered:
    """Columns of one batch at one call site, those to learn from first.

    Attributes:
        exact, quantized: `(G, n, D)`, of either stream.
        chosen: which they are.
        samples: length of the leading axis that they are from.
        weight: `(G, n)`, what each counts, if that is known beforehand, as it is of all columns of a layer or of none.
    """

    exact: Tensor
    quantized: Tensor
    chosen: _Chosen
    samples: int
    weight: Tensor | None


class LayerMoments:
    """Moments of the learning and of the held-out samples of one layer.

    Columns that come in small batches are taken in together, so that products are of many, and the `(D, D)` sums are
    touched rarely.

    Args:
        node: the layer.
        weighting: as `column_weighting` of `LayerWise`.
        samples: how many this process has, where `damping` is wanted.
        with_across: whether `across` is wanted.

    Attributes:
        learning, holdout: of the columns taken in so far.
        across: of the learning samples, for groups of one row put together; None where no two can be.
        damping: what the samples ask for (`SampleSpread.damping`), when finished.
    """

    def __init__(
        self, node: WeightedNode, weighting: str, samples: int | None = None, with_across: bool = False
    ) -> None:
        self._rows, self._weighting = node.op.rows(node.weight), weighting
        groups, rows, columns = self._rows.shape
        self.learning = Moments(groups, rows, columns, node.weight.device)
        self.holdout = HeldOut()
        joined = shape_of_sets(*self._rows.shape) if with_across else None
        self.across = None if joined is None else JoinedMoments(joined, node.weight.device)
        self._spread = None if samples is None else SampleSpread(groups, columns, samples, node.weight.device)
        self.damping = 0.0
        most = _PENDING_NUMBERS // (groups * (columns + rows))
        self._together = max(_LEAST_PENDING, columns // 2, min(_PENDING_TIMES * columns, most))
        self._pending: list[_Gathered] = []
        self._waiting = 0

    @staticmethod
    def bytes(node: WeightedNode, with_across: bool) -> int:
        """Memory that the moments take."""
        shape = node.op.rows(node.weight).shape
        joined = shape_of_sets(*shape) if with_across else None
        return Moments.bytes(*shape) + (0 if joined is None else JoinedMoments.bytes(joined))

    def add(self, columns: _Gathered) -> None:
        """Take in columns, now or later."""
        self._pending.append(columns)
        self._waiting += columns.exact.shape[1]
        if self._waiting >= self._together:
            self._fold()

    def _fold(self) -> None:
        """Take in the columns that are pending."""
        parts, self._pending, self._waiting = self._pending, [], 0
        if not parts:
            return
        ends = [slice(one.chosen.learning) for one in parts], [slice(one.chosen.learning, None) for one in parts]

        def in_order(values: list[Tensor]) -> Tensor:
            """Of all parts what is to learn from, then what is held out."""
            if len(values) == 1:
                return values[0]
            return joined([value[:, run] for of_kind in ends for value, run in zip(values, of_kind, strict=True)])

        exact, quantized = (in_order([getattr(one, name) for one in parts]) for name in ("exact", "quantized"))
        weight = None
        if self._weighting == "inverse_norm":
            index, length = [], 0
            for one in parts:
                index.append((one.chosen.index + length).unsqueeze(0))
                length += one.samples
            weight = _inverse_norm(exact, in_order(index)[0], length)
        elif known := [one.weight for one in parts if one.weight is not None]:
            weight = in_order(known)
        deviation = (exact - quantized) @ self._rows.transpose(1, 2)
        count = sum(one.chosen.learning for one in parts)
        for moments, run in ((self.learning, slice(count)), (self.holdout, slice(count, None))):
            moments.add(quantized[:, run], deviation[:, run], None if weight is None else weight[:, run])
        quantized, deviation = quantized[:, :count], deviation[:, :count]
        weight = None if weight is None else weight[:, :count]
        if self.across is not None:
            is_odd = in_order([one.chosen.is_odd.unsqueeze(0) for one in parts])[0, :count]
            self.across.add(quantized, deviation, is_odd, weight)
        if self._spread is not None:
            sample = in_order([one.chosen.sample.unsqueeze(0) for one in parts])[0, :count]
            self._spread.add(quantized, sample, weight)

    def finish(self, node: WeightedNode, processes: Processes = ALONE) -> None:
        """Be ready to learn from, with the columns of all processes.

        Raises:
            NonFiniteError: an input of the layer holds NaN or infinity.
        """
        self._fold()
        of_learning = [one for one in (self.learning, self.across) if one is not None]
        for moments in of_learning:
            moments.finish()
        self.holdout.finish()
        if processes.size > 1:
            at = f"the moments of {node.name!r}"
            for moments in of_learning:
                moments.pool(lambda *sums: processes.add(at, *sums))
            self.holdout.pool(lambda part: processes.joined(at, part, 1), self._rows.new_empty(0))
        seen = [self.learning.mean, self.learning.deviation, *self.holdout.sums()]
        if not all(bool(torch.isfinite(one).all()) for one in seen):
            raise NonFiniteError(
                f"layer {node.name!r}", "its input holds NaN or infinity", "Check the model and the calibration data."
            )
        if not bool(torch.isfinite(self.learning.hessian.sum() + self.learning.cross.sum())):
            raise NonFiniteError(
                f"layer {node.name!r}",
                "its input is too large: products of its values overflow float32",
                "Check the model and the calibration data.",
            )
        if self._spread is not None:
            self.damping = self._spread.damping(self.learning, partial(processes.add, "what the samples differ by"))

    @property
    def count(self) -> int:
        """The number of columns taken in."""
        return self.learning.count + self.holdout.count


class Columns:
    """Gathers columns in a pass.

    Args:
        run: the pass.
        weighting: as `column_weighting` of `LayerWise`. `"fisher"` takes a forward and a backward pass now.
        with_outputs: whether `outputs` are wanted, which takes the same passes.
        decided: whether all layers are decided already: no columns will be gathered, and no passes are taken.

    Attributes:
        weights: what columns count, and how the outputs of layers do together.
    """

    def __init__(self, run: Pass, weighting: str, with_outputs: bool = False, *, decided: bool = False) -> None:
        self._run = run
        self._chosen_rows = chosen_rows(run.streams[1])
        self._known: dict[tuple[int, int, tuple[int | str, ...]], _Chosen] = {}
        self.weights = ColumnWeights()
        if decided or not (weighting == "fisher" or with_outputs):
            return
        with run.clock("importance"):
            self.weights = ColumnWeights.of(
                run.streams[0],
                run.nodes,
                run.sampling,
                lambda batch: run.values[batch][0],
                is_fixed=run.host.batch_size is not None,
                weighed=[node.name for node in run.nodes if weighting == "fisher" and self.is_paired(node)],
                with_outputs=with_outputs,
            )

    def is_paired(self, node: WeightedNode) -> bool:
        """Whether the columns of both streams belong together: not where the network chooses the rows of its input."""
        return all(input_of(site.quantized_node) not in self._chosen_rows for site in node.sites)

    def gather(self, node: WeightedNode, batch: int, values: BothValues, into: LayerMoments) -> None:
        """Add one batch's columns at every call site."""
        with self._run.clock("moments", node):
            for site in node.sites:
                self._gather(node, site, batch, values, into)

    def _gather(self, node: WeightedNode, site: CallSite, batch: int, values: BothValues, into: LayerMoments) -> None:
        exact_stream, quantized_stream = self._run.streams
        shape = node.weight.shape
        x_quantized = quantized_stream.value(input_of(site.quantized_node), values[1])
        node.check_input(x_quantized, batch)
        patches = node.op.patches(x_quantized.float(), shape)
        chosen = self._chosen(batch, patches, len(node.sites))
        index, position = chosen.index, chosen.position
        exact = quantized = patches.columns(index, position)
        if self.is_paired(node):
            x_float = exact_stream.value(input_of(site.float_node), values[0])
            exact = self._float_columns(node, site, batch, x_float, index, position)
        weight = self.weights.weight(node, site.float_node, batch, exact, chosen.order, chosen.count)
        into.add(_Gathered(exact, quantized, chosen, patches.samples, weight))

    def _chosen(self, batch: int, patches: Patches, sites: int) -> _Chosen:
        """The columns to take: layers of one geometry have them in common."""
        key = batch, sites, patches.geometry
        if key not in self._known:
            sampling = self._run.sampling
            index, position = sampling.columns(batch, patches, sites)
            held = sampling.held_out(batch, patches.samples, index.device)[index]
            # those to learn from first, so that either are a run; trials judge nothing
            learning = (~held).nonzero().squeeze(1)
            count = len(index)
            order = learning if self._run.is_trial else torch.cat([learning, held.nonzero().squeeze(1)])
            index, position = index[order], position[order]
            sample = sampling.own_numbers(batch, patches.samples, index.device)[index]
            is_odd = (sample + sampling.first[0]) % 2 == 1
            self._known[key] = _Chosen(index, position, order, count, sample, is_odd, len(learning))
        return self._known[key]

    def _float_columns(
        self, node: WeightedNode, site: CallSite, batch: int, x: Tensor, index: Tensor, position: Tensor
    ) -> Tensor:
        """The columns of the float stream, which trials beside each other gather once."""
        shared = self._run.shared
        found = None if shared is None else shared.columns(site.float_node, batch)
        if found is None:
            found = node.op.patches(x, node.weight.shape).columns(index, position)
            if shared is not None:
                shared.keep(site.float_node, batch, found)
        return found


def _inverse_norm(exact: Tensor, index: Tensor, length: int) -> Tensor:
    """`(G, n)` weights `1 / |x|^2`, the norm floored at a hundredth of the mean in the same sample."""
    power = exact.square().sum(2)
    total = power.new_zeros(power.shape[0], length).index_add_(1, index, power)
    count = torch.bincount(index, minlength=length).clamp_min(1)
    floor = 0.01 * (total / count)[:, index]
    return torch.where(floor > 0, 1 / (power + floor), 0.0)
