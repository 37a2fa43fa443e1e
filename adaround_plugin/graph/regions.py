"""A region of both graphs as a function of the weights in it, with the calibration data at its entry.

A region ends at its *exits*, and begins wherever the two streams have got to: what it computes is everything between
the values that are known and its exits. In the quantized graph weighted nodes run as the host's own float operators on
given weights, and activations are quantized by torch's differentiable fake quantization with the host's scales.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from adaround_plugin.calibration import Sampling
from adaround_plugin.graph.compat import operator_name
from adaround_plugin.graph.host import CallSite, WeightedNode
from adaround_plugin.graph.samples import gathered, stack
from adaround_plugin.graph.streams import Stream, Values, tensors, unpacks
from adaround_plugin.graph.transforms import origin
from adaround_plugin.layer import LayerRounding
from adaround_plugin.solvers.relaxation import Relaxation

__all__ = ["Exit", "Region"]

BothValues = tuple[Values, Values]
# of a batch or of all samples: targets, entries, their float twins, importance; a value for each node
_Parts = tuple[list[Any], list[Any], list[Any], list[Any]]

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


class _Path:
    """What has to run to get from known values to some nodes.

    Attributes:
        entries: nodes whose values are known, and unpacked quantized values of such.
        order: nodes to run, in order.
    """

    def __init__(
        self, stream: Stream, goals: Iterable[fx.Node], known: Iterable[fx.Node], sites: Mapping[fx.Node, CallSite]
    ) -> None:
        needed, known = set(goals), set(known)
        self.entries: list[fx.Node] = []
        self.order: list[fx.Node] = []
        for node in reversed(stream.nodes):
            if node not in needed:
                continue
            if node in known or (unpacks(node) and known.issuperset(node.all_input_nodes[:1])):
                self.entries.append(node)
                continue
            self.order.append(node)
            site = sites.get(node)
            if site is None or site.call is None:
                needed.update(node.all_input_nodes)
            else:
                map_arg(site.call.arguments(node), needed.add)
        self.order.reverse()


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
        settings: of the relaxation.
        asymmetric: take the quantized stream's values at the entry, else the float stream's.
        batch_size: the number of samples that the graphs are made for, if not any.

    Attributes:
        nodes: those of the weights all of whose call sites are in the region and can be run with another weight.
        without_twin: entries that the float stream has no value for, which are taken from the quantized stream always.
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
        settings: Relaxation,
        asymmetric: bool,
        batch_size: int | None,
    ) -> None:
        self._streams, self._exits, self._settings, self._sampling = streams, exits, settings, sampling
        self._sites = {site.quantized_node: site for node in host_nodes for site in node.sites if site.call is not None}
        self._name = {site.quantized_node: node.name for node in host_nodes for site in node.sites}
        exact, quantized = streams
        known = values[0][0].keys(), values[0][1].keys()
        self._exact = _Path(exact, [exit.float_node for exit in exits], known[0], {})
        self._quantized = _Path(quantized, [exit.quantized_node for exit in exits], known[1], self._sites)
        inside = {node for node in self._quantized.order if node in self._sites}
        self.nodes = [node for node in nodes if inside.issuperset(site.quantized_node for site in node.sites)]
        self._index = {node.name: i for i, node in enumerate(self.nodes)}
        self._fixed = {
            name: (rounding.grid.dequantize(rounding.integers), rounding.bias_correction)
            for name, rounding in others.items()
            if name not in self._index
        }
        self._fixed_size = batch_size is not None
        self._size = min(settings.batch_size, sampling.total) if batch_size is None else batch_size
        self._collect(values, asymmetric)

    def _collect(self, values: list[BothValues], asymmetric: bool) -> None:
        """What minibatches are made of: targets, entries, their twins in the float stream, and importance."""
        exact, quantized = self._streams
        sizes = self._sampling.size
        twins = self._twins(values[0][0])
        self.without_twin = [node.name for node, twin in zip(self._quantized.entries, twins, strict=True) if twin is None]
        batches: list[_Parts] = []
        for of_float, of_quantized in values:
            entries = [quantized.value(node, of_quantized) for node in self._quantized.entries]
            floats = [
                entry if twin is None else exact.value(twin, of_float)
                for entry, twin in zip(entries, twins, strict=True)
            ]
            if not asymmetric:
                entries = floats
            mixed = floats if asymmetric and self._settings.drop else []
            importance = self._importance(of_float) if self._settings.fisher else []
            batches.append((self._targets(of_float), entries, mixed, importance))
        held = [self._sampling.held_out(batch, size) for batch, size in enumerate(sizes)]
        try:
            columns = zip(*batches, strict=True)
            stacked = tuple([stack(entry, sizes, self._size) for entry in zip(*column, strict=True)] for column in columns)
            self._batches, self._held, self.resampled = [stacked], [torch.cat(held)], True
        except ValueError:
            self._batches, self._held, self.resampled = batches, held, False

    def _twins(self, of_float: Values) -> list[fx.Node | None]:
        """The node of the float stream that is known and that an entry is the quantized value of."""
        counterpart = {origin(node): node for node in self._streams[0].nodes if node.op != "output"}
        twins = []
        for node in self._quantized.entries:
            while node is not None and origin(node) not in counterpart:
                # behind the host's quantize and dequantize
                node = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
            twin = None if node is None else counterpart[origin(node)]
            twins.append(twin if twin in of_float else None)
        return twins

    def _targets(self, values: Values) -> list[Tensor]:
        """The float stream's values at the exits, for one batch."""
        exact = self._streams[0]
        known = {node: exact.value(node, values) for node in self._exact.entries}
        found = dict(known)
        for node in self._exact.order:
            found[node] = _run(exact, node, found)
        return [self._inner_target(exit, found) if exit.inner else found[exit.float_node] for exit in self._exits]

    def _inner_target(self, exit: Exit, values: Values) -> Tensor:
        site, name = self._sites[exit.quantized_node], self._name[exit.quantized_node]
        assert site.call is not None
        args, kwargs = map_arg(site.call.arguments(exit.float_node), values.__getitem__)
        weight = next(node.weight for node in self.nodes if node.name == name)
        output: Tensor = site.call.inner(args, kwargs, weight, None)
        return output

    def _importance(self, values: Values) -> list[Tensor]:
        """Mean squared gradient, by every entry at the exits, of random projections of the network's output."""
        exact, goals = self._streams[0], [exit.float_node for exit in self._exits]
        ends: list[fx.Node] = []
        map_arg(exact.output_node.args[0], ends.append)
        path = _Path(exact, ends, {*values, *goals}, {})
        generator = torch.Generator().manual_seed(self._settings.seed)
        with torch.enable_grad():
            leaves = [target.detach().requires_grad_() for target in self._targets(values)]
            found = {node: exact.value(node, values) for node in path.entries if node not in goals}
            found.update(zip(goals, leaves, strict=True))
            for node in path.order:
                found[node] = _run(exact, node, found)
            outputs = tensors(map_arg(exact.output_node.args[0], found.__getitem__))
            total = [torch.zeros_like(leaf) for leaf in leaves]
            for _ in range(_PROJECTIONS):
                draws = [torch.randn(output.shape, generator=generator).to(output) for output in outputs]
                value = torch.stack([(output * draw).sum() for output, draw in zip(outputs, draws, strict=True)]).sum()
                gradients = torch.autograd.grad(value, leaves, retain_graph=True)
                for one, gradient in zip(total, gradients, strict=True):
                    one += gradient.square() / _PROJECTIONS
        return total

    def draw(self, generator: torch.Generator, size: int) -> _Minibatch:
        """Some learning samples at random: of all, or one of the caller's batches where these cannot be taken apart."""
        if not self.resampled:
            batch = int(torch.randint(len(self._batches), (), generator=generator))
            return _Minibatch(self, self._batches[batch], ~self._held[batch], generator)
        learning = (~self._held[0]).nonzero().flatten()
        chosen = torch.randperm(len(learning), generator=generator)[: self._size]
        return self._taken(learning[chosen], None, generator)

    def all(self, held_out: bool) -> Iterator[_Minibatch]:
        """The learning or the held-out samples, in order, with nothing dropped."""
        if not self.resampled:
            for parts, held in zip(self._batches, self._held, strict=True):
                if (kept := held == held_out).any():
                    yield _Minibatch(self, parts, kept, None)
            return
        for chosen in (self._held[0] == held_out).nonzero().flatten().split(self._size if self._fixed_size else _CHUNK):
            missing = self._size - len(chosen) if self._fixed_size else 0
            # filled up with a sample that is left out of the result
            kept = torch.arange(len(chosen) + missing) < len(chosen) if missing else None
            yield self._taken(torch.cat([chosen, chosen[:1].expand(missing)]), kept, None)

    def _taken(self, index: Tensor, kept: Tensor | None, generator: torch.Generator | None) -> _Minibatch:
        targets, entries, mixed, importance = (gathered(part, index) for part in self._batches[0])
        kept = torch.ones(len(index), dtype=torch.bool) if kept is None else kept
        return _Minibatch(self, (targets, entries, mixed, importance), kept, generator)

    def output_scale(self) -> list[float]:
        """Root mean square of the output of each weight's operator, over some samples."""
        batch = next(self.all(held_out=False))
        squares: dict[str, list[Tensor]] = {}
        with torch.no_grad():
            self.forward(batch.entries, [node.weight for node in self.nodes], [None] * len(self.nodes), None, squares)
        return [float(torch.stack(squares[node.name]).mean().sqrt()) for node in self.nodes]

    def forward(
        self,
        entries: Sequence[Any],
        weights: Sequence[Tensor],
        corrections: Sequence[Tensor | None],
        generator: torch.Generator | None,
        squares: dict[str, list[Tensor]] | None = None,
    ) -> list[Tensor]:
        """Values at the exits of the quantized graph.

        Args:
            entries: values at the entry.
            weights, corrections: of the region's weights.
            generator: for dropping quantization; None drops nothing.
            squares: takes the mean square of every weighted operator's output.
        """
        stream = self._streams[1]
        values: Values = dict(zip(self._quantized.entries, entries, strict=True))
        inner: dict[fx.Node, Tensor] = {}
        before = {exit.quantized_node for exit in self._exits if exit.inner}
        for node in self._quantized.order:
            site = self._sites.get(node)
            if site is not None and site.call is not None:
                name = self._name[node]
                weight, correction = self._fixed.get(name) or (weights[self._index[name]], corrections[self._index[name]])
                args, kwargs = map_arg(site.call.arguments(node), values.__getitem__)
                if node in before:
                    inner[node] = site.call.inner(args, kwargs, weight, correction)
                    continue
                values[node] = site.call.whole(args, kwargs, weight, correction)
                if squares is not None:
                    squares.setdefault(name, []).append(values[node].square().mean())
            elif quantizes(node):
                values[node] = self._dropped(_fake_quantized(node, values), values[node.args[0]], generator)
            elif unpacks(node) and values[node.args[0]].is_floating_point():
                values[node] = values[node.args[0]]
            else:
                values[node] = _run(stream, node, values)
        return [inner[exit.quantized_node] if exit.inner else values[exit.quantized_node] for exit in self._exits]

    def _dropped(self, quantized: Tensor, exact: Tensor, generator: torch.Generator | None) -> Tensor:
        """`quantized`, or with the probability `drop` entry by entry `exact`."""
        drop = self._settings.drop
        if generator is None or not drop or quantized is exact:
            return quantized
        chosen = (torch.rand(quantized.shape, generator=generator) < drop).to(quantized.device)
        return torch.where(chosen, exact, quantized)


class _Minibatch:
    """Samples at a region's entry; see `adaround_plugin.reconstruction.Minibatch`."""

    def __init__(self, region: Region, parts: _Parts, kept: Tensor, generator: torch.Generator | None) -> None:
        targets, entries, mixed, importance = parts
        self._region, self._kept, self._generator = region, kept, generator
        self.samples = int(kept.sum())
        self.target = [_selected(target, kept) for target in targets]
        self.importance = [_selected(weight, kept) for weight in importance] or None
        self.entries = [
            region._dropped(entry, exact, generator) if isinstance(entry, Tensor) else entry
            for entry, exact in zip(entries, mixed or entries, strict=True)
        ]

    def run(self, weights: Sequence[Tensor], corrections: Sequence[Tensor | None]) -> list[Tensor]:
        outputs = self._region.forward(self.entries, weights, corrections, self._generator)
        return [_selected(output, self._kept) for output in outputs]


def _selected(output: Tensor, kept: Tensor) -> Tensor:
    """The runs of the leading axis that belong to the samples kept; all where it is no axis of samples."""
    if bool(kept.all()) or not output.dim() or output.shape[0] % len(kept):
        return output
    return output[kept.repeat_interleave(output.shape[0] // len(kept)).to(output.device)]


def _run(stream: Stream, node: fx.Node, values: Values) -> Any:
    """The value of one node by the stream's own operator."""
    args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
    return getattr(stream, node.op)(node.target, args, kwargs)


def quantizes(node: fx.Node) -> bool:
    """Whether a node quantizes an activation with one scale."""
    return node.op == "call_function" and operator_name(node)[0].startswith("quantize_per_tensor")


def _fake_quantized(node: fx.Node, values: Values) -> Tensor:
    """What a host's quantize node and its dequantize make of a value, with a gradient inside the range."""
    x, *settings = map_arg(node.args, lambda source: values[source])
    if len(settings) == 3:  # torch.quantize_per_tensor(x, scale, zero_point, dtype) fills the dtype's range
        info = torch.iinfo(torch.uint8 if settings[2] == torch.quint8 else torch.int8)
        settings[2:] = [info.min, info.max]
    if len(settings) < 4:
        # the range comes with each batch
        exact: Tensor = node.target(x, *settings).dequantize()  # type: ignore[operator]
        return x + (exact - x).detach()
    scale, zero_point, low, high = settings[:4]
    return torch.fake_quantize_per_tensor_affine(x, float(scale), int(zero_point), int(low), int(high))
