"""A region of both graphs as a function of the weights in it, with the calibration data at its entry.

A region ends at its *exits*, and begins wherever the two streams have got to: what it computes is everything between
the values that are known and its exits. In the quantized graph weighted nodes run as the host's own float operators on
given weights, and activations are quantized by torch's differentiable fake quantization with the host's scales.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from adaround_plugin.regions.calibration import Sampling
from adaround_plugin.graph.compat import learnable_fake_quantize
from adaround_plugin.hosts.base import ActivationQuantizer, WeightedNode
from adaround_plugin.regions.importance import importance
from adaround_plugin.graph.paths import Path, fake_quantized, quantizes, run_node
from adaround_plugin.regions.samples import Rows, gathered, stack
from adaround_plugin.graph.streams import BothValues, Stream, Values, unpacks
from adaround_plugin.graph.transforms import origin
from adaround_plugin.learning.layer import LayerRounding
from adaround_plugin.regions.reconstruction import Minibatch

__all__ = ["Exit", "Region"]

_log = logging.getLogger(__name__)

# of a batch or of all samples: targets, entries, their float twins, importance; a value for each node
_Parts = tuple[list[Any], ...]

# samples in one step where no gradient is asked for
_CHUNK = 128
# random projections of the network's output in an estimate of importance
_PROJECTIONS = 8


@dataclass(frozen=True)
class Exit:
    """Where a region's output is compared.

    Attributes:
        float_node, quantized_node: the same node in both graphs.
        inner: take a weighted node's value before the activation function that is fused to it.
    """

    float_node: fx.Node
    quantized_node: fx.Node
    inner: bool = False


class RegionSettings(Protocol):
    """How samples are drawn: those of `Relaxation` and of `Refinement`, whose attributes these are."""

    @property
    def batch_size(self) -> int:
        """Samples in a minibatch."""

    @property
    def drop(self) -> float:
        """Probability with which the quantization of an activation is dropped."""

    @property
    def fisher(self) -> bool:
        """Whether entries at the exits are weighed by their importance."""

    @property
    def seed(self) -> int:
        """Of the projections by which importance is estimated."""


class Region:
    """Weights between the streams' present place and some exits, and the samples to learn them from.

    Args:
        nodes: the weights to learn.
        exits: where the output is compared.
        others: roundings by name of all the host's weighted nodes, for those in the region that are not learned.
        host_nodes: all the host's weighted nodes.
        streams: the float and the quantized stream.
        values: what the streams keep of each batch.
        sampling: which samples are held out.
        settings: how samples are drawn.
        asymmetric: take the quantized stream's values at the entry, else the float stream's.
        batch_size: the number of samples that the graphs are made for, if not any.
        quantizers: of activations whose scales are learned.

    Attributes:
        nodes: those of the weights all of whose call sites are in the region and can be run with another weight.
        quantizers: those of the activations that are quantized in the region.
        exits: those whose values can be learned from.
        has_samples: whether the leading axis at every exit is one of samples; else none can be held out.
        without_twin: entries that the float stream has no value for, which are taken from the quantized stream always.
        is_unweighed: whether entries at an exit should be weighed by their importance, which is not known.
        resampled: whether minibatches are drawn from all samples; else they are the caller's batches.
    """

    def __init__(
        self,
        nodes: Sequence[WeightedNode],
        exits: Sequence[Exit],
        others: Mapping[str, LayerRounding],
        host_nodes: Sequence[WeightedNode],
        streams: tuple[Stream, Stream],
        values: list[BothValues],
        sampling: Sampling,
        settings: RegionSettings,
        asymmetric: bool,
        batch_size: int | None,
        quantizers: Sequence[ActivationQuantizer] = (),
    ) -> None:
        self._streams, self._settings, self._sampling = streams, settings, sampling
        self.exits = list(exits)
        self._sites = {site.quantized_node: site for node in host_nodes for site in node.sites if site.call is not None}
        self._name = {site.quantized_node: node.name for node in host_nodes for site in node.sites}
        exact, quantized = streams
        known = values[0][0].keys(), values[0][1].keys()
        self.nodes, self.without_twin, self.resampled = list(nodes), list[str](), True
        self.is_unweighed, self.has_samples = False, True
        self._exact = Path(exact, [end.float_node for end in exits], known[0], {})
        targets = self._targets(values[0][0])
        # integers, such as the index of the largest logit, have no error that could be learned from
        self.exits = [end for end, target in zip(exits, targets, strict=True) if _is_learnable(target)]
        self._exact = Path(exact, [end.float_node for end in self.exits], known[0], {})
        self._quantized = Path(quantized, [end.quantized_node for end in self.exits], known[1], self._sites)
        inside = {node for node in self._quantized.order if node in self._sites}
        self.nodes = [node for node in nodes if inside.issuperset(site.quantized_node for site in node.sites)]
        order = set(self._quantized.order)
        self.quantizers = [one for one in quantizers if order.issuperset(one.nodes)]
        self._stretched = {node: i for i, one in enumerate(self.quantizers) for node in one.nodes}
        self._clamps = {clamp for one in self.quantizers for clamp in one.clamps}
        self._index = {node.name: i for i, node in enumerate(self.nodes)}
        self._fixed = {
            name: (rounding.grid.dequantize(rounding.integers), rounding.bias_correction)
            for name, rounding in others.items()
            if name not in self._index and name in {self._name[node] for node in inside}
        }
        self._fixed_size = batch_size
        self._size = min(settings.batch_size, sampling.total) if batch_size is None else batch_size
        if self.nodes or self.quantizers:
            self._collect(values, asymmetric)

    def _collect(self, values: list[BothValues], asymmetric: bool) -> None:
        """What minibatches are made of: targets, entries, their twins in the float stream, and importance."""
        exact, quantized = self._streams
        sizes = self._sampling.size
        twins = self._twins(values[0][0])
        self.without_twin = [
            node.name for node, twin in zip(self._quantized.entries, twins, strict=True) if twin is None
        ]
        batches: list[_Parts] = []
        for of_float, of_quantized in values:
            entries = [quantized.value(node, of_quantized) for node in self._quantized.entries]
            floats = [
                entry if twin is None else exact.value(twin, of_float)
                for entry, twin in zip(entries, twins, strict=True)
            ]
            if not asymmetric:
                entries = floats
            # only what the host quantizes can be left unquantized
            pairs = zip(self._quantized.entries, entries, floats, strict=True)
            mixed = [other if unpacks(node) else None for node, _, other in pairs] if self._settings.drop else []
            targets = self._targets(of_float)
            weights: list[Tensor] = []
            if self._settings.fisher:
                goals = [end.float_node for end in self.exits]
                found = importance(exact, goals, targets, of_float, _PROJECTIONS, self._settings.seed)
                weights = [weight for weight in found if weight is not None]
                self.is_unweighed |= len(weights) < len(found)
            batches.append((targets, entries, mixed, weights))
        if self.is_unweighed:
            batches = [(*parts[:3], []) for parts in batches]
        self.has_samples = all(
            self._sampling.has_samples(i, target.shape[0]) for i, parts in enumerate(batches) for target in parts[0]
        )
        try:
            columns = zip(*batches, strict=True)
            stacked: _Parts | None = tuple(
                [stack(entry, sizes) for entry in zip(*column, strict=True)] for column in columns
            )
        except ValueError:
            stacked = None
        self.resampled = stacked is not None and self._separable(stacked[1], batches)
        held = [self._sampling.held_out(batch, size) & self.has_samples for batch, size in enumerate(sizes)]
        if stacked is not None and self.resampled:
            self._batches, self._held = [stacked], [torch.cat(held)]
        else:
            self._batches, self._held = batches, held

    def _separable(self, stacked: list[Any], batches: list[_Parts]) -> bool:
        """Whether samples give the same however they are put together: tried on the float weights."""
        weights, none = [node.weight for node in self.nodes], [None] * len(self.nodes)
        some = batches[:1] if self._fixed_size else batches[:2]
        count = sum(self._sampling.size[: len(some)])
        # in another order, and one less where the graphs take any number
        index = torch.arange(count).flip(0)[: count if self._fixed_size else max(1, count - 1)]
        try:
            with torch.no_grad():
                apart = [self._forward(parts[1], weights, none, None) for parts in some]
                together = self._forward(gathered(stacked, index), weights, none, None)
        except Exception as error:
            # whatever a graph raises whose values depend on the size of the batch
            _log.debug("samples cannot be told apart: %s", error)
            return False
        pairs = list(zip(zip(*apart, strict=True), together, strict=True))
        rows = [sum(output.shape[0] for output in outputs) for outputs, _ in pairs]
        self.has_samples &= all(
            total * len(index) == count * output.shape[0] for total, (_, output) in zip(rows, pairs, strict=True)
        )
        return self.has_samples and all(
            _same_rows(torch.cat(outputs), output, count, index) for outputs, output in pairs
        )

    def _twins(self, of_float: Values) -> list[fx.Node | None]:
        """The node of the float stream that is known and that an entry is the quantized value of."""
        counterpart = {origin(node): node for node in self._streams[0].nodes if node.op != "output"}
        twins = []
        for node in self._quantized.entries:
            source: Any = node
            while isinstance(source, fx.Node) and origin(source) not in counterpart:
                # behind the host's quantize and dequantize
                source = source.args[0] if source.args else None
            twin = counterpart[origin(source)] if isinstance(source, fx.Node) else None
            twins.append(twin if twin in of_float else None)
        return twins

    def _targets(self, values: Values) -> list[Tensor]:
        """The float stream's values at the exits, for one batch."""
        exact = self._streams[0]
        found = {node: exact.value(node, values) for node in self._exact.entries}
        kept = {source for end in self.exits if end.inner for source in end.float_node.all_input_nodes}
        for node in self._exact.order:
            found[node] = run_node(exact, node, found)
            for dead in self._exact.dead[node] - kept:
                del found[dead]
        return [self._inner_target(end, found) if end.inner else found[end.float_node] for end in self.exits]

    def _inner_target(self, end: Exit, values: Values) -> Tensor:
        site, name = self._sites[end.quantized_node], self._name[end.quantized_node]
        assert site.call is not None
        args, kwargs = map_arg(site.call.arguments(end.float_node), values.__getitem__)
        weight = next(node.weight for node in self.nodes if node.name == name)
        output: Tensor = site.call.inner(args, kwargs, weight, None)
        return output

    def draw(self, generator: torch.Generator) -> Minibatch:
        """Some learning samples at random: of all, or one of the caller's batches where these cannot be taken apart."""
        if not self.resampled:
            usable = [batch for batch, held in enumerate(self._held) if not held.all()]
            batch = usable[int(torch.randint(len(usable), (), generator=generator))]
            return self._minibatch(self._batches[batch], ~self._held[batch], generator)
        learning = (~self._held[0]).nonzero().flatten()
        chosen = learning[torch.randperm(len(learning), generator=generator)[: self._size]]
        return self._taken(chosen, generator)

    def all(self, held_out: bool) -> Iterator[Minibatch]:
        """The learning or the held-out samples, in order, with nothing dropped."""
        if not self.resampled:
            for parts, held in zip(self._batches, self._held, strict=True):
                if (kept := held == held_out).any():
                    yield self._minibatch(parts, kept, None)
            return
        chosen_of_all = (self._held[0] == held_out).nonzero().flatten()
        if not len(chosen_of_all):
            return
        for chosen in torch.split(chosen_of_all, self._fixed_size or _CHUNK):
            yield self._taken(chosen, None)

    def _taken(self, index: Tensor, generator: torch.Generator | None) -> Minibatch:
        """Some of all samples; filled up with one that does not count, if the graphs want more."""
        missing = 0 if self._fixed_size is None else self._fixed_size - len(index)
        kept = torch.arange(len(index) + missing) < len(index)
        index = torch.cat([index, index[:1].expand(missing)])
        targets, entries, mixed, weights = (gathered(part, index) for part in self._batches[0])
        return self._minibatch((targets, entries, mixed, weights), kept, generator)

    def _minibatch(self, parts: _Parts, kept: Tensor, generator: torch.Generator | None) -> Minibatch:
        targets, entries, mixed, weights = parts
        pairs = zip(entries, mixed or [None] * len(entries), strict=True)
        entries = [self._dropped(entry, exact, generator) for entry, exact in pairs]

        def run(
            weights: Sequence[Tensor],
            corrections: Sequence[Tensor | None],
            stretches: Sequence[Tensor] | None,
        ) -> list[Tensor]:
            outputs = self._forward(entries, weights, corrections, generator, stretches)
            return [_selected(output, kept) for output in outputs]

        target, weighed = ([_selected(value, kept) for value in values] for values in (targets, weights))
        return Minibatch(int(kept.sum()), target, weighed or None, run)

    def output_scale(self) -> list[float]:
        """Root mean square of the output of each weight's operator, over some samples."""
        index = torch.arange(self._fixed_size or min(_CHUNK, len(self._held[0])))
        entries = gathered(self._batches[0][1], index) if self.resampled else self._batches[0][1]
        squares: dict[str, list[Tensor]] = {}
        with torch.no_grad():
            self._forward(
                entries, [node.weight for node in self.nodes], [None] * len(self.nodes), None, squares=squares
            )
        return [float(torch.stack(squares[node.name]).mean().sqrt()) for node in self.nodes]

    def _forward(
        self,
        entries: Sequence[Any],
        weights: Sequence[Tensor],
        corrections: Sequence[Tensor | None],
        generator: torch.Generator | None,
        stretches: Sequence[Tensor] | None = None,
        squares: dict[str, list[Tensor]] | None = None,
    ) -> list[Tensor]:
        """Values at the exits of the quantized graph.

        Args:
            entries: values at the entry.
            weights, corrections: of the region's weights.
            generator: for dropping quantization; None drops nothing.
            stretches: factors of the scales of the region's activations, None for the scales as they are.
            squares: takes the mean square of every weighted operator's output.
        """
        stream = self._streams[1]
        values: Values = dict(zip(self._quantized.entries, entries, strict=True))
        inner: dict[fx.Node, Tensor] = {}
        before = {end.quantized_node for end in self.exits if end.inner}
        for node in self._quantized.order:
            site = self._sites.get(node)
            if site is not None and site.call is not None:
                name = self._name[node]
                weight, correction = self._fixed.get(name) or (
                    weights[self._index[name]],
                    corrections[self._index[name]],
                )
                args, kwargs = map_arg(site.call.arguments(node), values.__getitem__)
                run = site.call.inner if node in before else site.call.whole
                output = run(args, kwargs, weight, correction)
                (inner if node in before else values)[node] = output
                if squares is not None:
                    squares.setdefault(name, []).append(output.square().mean())
            elif stretches is not None and node in self._clamps:
                # the range that it keeps moves with the scale
                values[node] = values[node.all_input_nodes[0]]
            elif stretches is not None and node in self._stretched:
                i = self._stretched[node]
                one = self.quantizers[i]
                values[node] = learnable_fake_quantize(
                    values[node.all_input_nodes[0]],
                    one.scale * stretches[i],
                    *(one.zero_point, one.quant_min, one.quant_max),
                )
            elif quantizes(node) and not stream.is_remade(node):
                values[node] = self._dropped(fake_quantized(node, values), values[node.all_input_nodes[0]], generator)
            elif unpacks(node) and values[node.all_input_nodes[0]].is_floating_point():
                values[node] = values[node.all_input_nodes[0]]
            else:
                values[node] = run_node(stream, node, values)
            for dead in self._quantized.dead[node]:
                del values[dead]
        return [inner[end.quantized_node] if end.inner else values[end.quantized_node] for end in self.exits]

    def _dropped(self, quantized: Any, exact: Any, generator: torch.Generator | None) -> Any:
        """`quantized`, or with the probability `drop` entry by entry `exact`."""
        drop = self._settings.drop
        if generator is None or not drop or not isinstance(quantized, Tensor) or not isinstance(exact, Tensor):
            return quantized
        chosen = (torch.rand(quantized.shape, generator=generator) < drop).to(quantized.device)
        return torch.where(chosen, exact, quantized)


def _is_learnable(target: Any) -> bool:
    return isinstance(target, Tensor) and target.is_floating_point() and target.dim() > 0


def _same_rows(outputs: Tensor, output: Tensor, count: int, index: Tensor) -> bool:
    """Whether `output` has the runs of `outputs` (`count` of them) that `index` names, but for rounding."""
    if outputs.shape[0] % count:
        return False
    expected = Rows(outputs.reshape(count, -1, *outputs.shape[1:])).take(index)
    return expected.shape == output.shape and bool((expected - output).square().sum() <= 1e-3 * expected.square().sum())


def _selected(output: Tensor, kept: Tensor) -> Tensor:
    """The runs of the leading axis that belong to the samples kept; all where it is no axis of samples."""
    if bool(kept.all()) or not output.dim() or output.shape[0] % len(kept):
        return output
    return output[kept.repeat_interleave(output.shape[0] // len(kept)).to(output.device)]
