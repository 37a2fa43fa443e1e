"""The two graphs between what a pass knows and some exits, as functions: float targets, and quantized outputs.

In the quantized graph weighted nodes run as the host's own float operators on given weights, and activations are
quantized by torch's differentiable fake quantization with the host's scales.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from adaround_plugin.graph.calls import CallSite
from adaround_plugin.graph.compat import learnable_fake_quantize
from adaround_plugin.graph.memory import Memory
from adaround_plugin.graph.paths import Path, as_quantized, fake_quantized, quantizes, run_node
from adaround_plugin.graph.selection import chosen_rows
from adaround_plugin.graph.streams import BothValues, Values, unpacks
from adaround_plugin.graph.transforms import origin
from adaround_plugin.hosts.activation_observers import grid_ends
from adaround_plugin.hosts.base import ActivationQuantizer, Host, Streams, WeightedNode
from adaround_plugin.regions.calibration import Sampling
from adaround_plugin.regions.masks import counted
from adaround_plugin.rounding.result import LayerRounding

__all__ = ["Exit", "Forward", "Place", "Targets"]


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


@dataclass(frozen=True)
class Place:
    """What a region starts from: the streams' values of each batch, and the roundings of now.

    Attributes:
        host: of the network.
        streams: the float and the quantized stream.
        values: what the streams keep of each batch.
        roundings: by name of the weighted node, as they are now.
        sampling: which samples are held out.
        memory: where values are kept.
    """

    host: Host
    streams: Streams
    values: Sequence[BothValues]
    roundings: Mapping[str, LayerRounding]
    sampling: Sampling
    memory: Memory

    @cached_property
    def sites(self) -> dict[fx.Node, tuple[WeightedNode, CallSite]]:
        """The weighted nodes of the quantized graph that can be run with another weight."""
        return {
            site.quantized_node: (node, site)
            for node in self.host.nodes
            for site in node.sites
            if site.call is not None
        }


class Targets:
    """The float stream's values at some exits.

    Args:
        place: from where.
        exits: to where.
    """

    def __init__(self, place: Place, exits: Sequence[Exit]) -> None:
        self._stream, self._exits, self._sites = place.streams[0], exits, place.sites
        self._path = Path(self._stream, [end.float_node for end in exits], place.values[0][0], {})

    def __call__(self, values: Values) -> list[Any]:
        """The values at the exits for one batch."""
        found = {node: self._stream.value(node, values) for node in self._path.entries}
        kept = {source for end in self._exits if end.inner for source in end.float_node.all_input_nodes}
        for node in self._path.order:
            found[node] = run_node(self._stream, node, found)
            for dead in self._path.dead[node] - kept:
                del found[dead]
        return [self._inner(end, found) if end.inner else found[end.float_node] for end in self._exits]

    def _inner(self, end: Exit, values: Values) -> Any:
        """What the weighted operator at an exit gives, before the activation function that is fused to it."""
        node, site = self._sites[end.quantized_node]
        assert site.call is not None
        args, kwargs = map_arg(site.call.arguments(end.float_node), values.__getitem__)
        return site.call.inner(args, kwargs, node.weight, None)


class Forward:
    """The quantized graph from what is known to some exits, as a function of the weights in it.

    Args:
        place: from where.
        exits: to where.
        nodes: whose weights are given at each call; all others keep their present rounding.
        quantizers: of activations whose scales may be given.
        drop: probability with which an activation is left unquantized (QDrop, arXiv 2203.05740).

    Attributes:
        entries: the nodes whose values are known.
        nodes: those of the weights all of whose call sites are on the way and can be run with another weight.
        quantizers: those of the activations that are quantized on the way.
    """

    def __init__(
        self,
        place: Place,
        exits: Sequence[Exit],
        nodes: Iterable[WeightedNode],
        quantizers: Iterable[ActivationQuantizer],
        drop: float,
    ) -> None:
        self._stream, self._exits, self._drop = place.streams[1], exits, drop
        self._sites = place.sites
        calls = {node: site for node, (_, site) in self._sites.items()}
        self._path = Path(self._stream, [end.quantized_node for end in exits], place.values[0][1], calls)
        self.entries = self._path.entries
        inside = set(self._path.order)
        self.nodes = [
            node
            for node in nodes
            if all(site.quantized_node in inside and site.call is not None for site in node.sites)
        ]
        self.quantizers = [one for one in quantizers if inside.issuperset(one.nodes)]
        self._quantizer = {node: i for i, one in enumerate(self.quantizers) for node in one.nodes}
        self._clamps = {clamp for one in self.quantizers for clamp in one.clamps}
        self._inner = {end.quantized_node for end in exits if end.inner}
        # exits that others on the way read, too
        self._passed = {node for node in self._inner if not inside.isdisjoint(node.users)}
        self._index = {node.name: i for i, node in enumerate(self.nodes)}
        names = {node.name for at, (node, _) in self._sites.items() if at in inside}
        self._fixed = {
            name: (rounding.weight, rounding.bias_correction)
            for name, rounding in place.roundings.items()
            if name in names and name not in self._index
        }

    def float_counterparts(self, streams: Streams, of_float: Values) -> list[fx.Node | None]:
        """The nodes of the float stream, with known values, that the entries are the quantized values of."""
        counterpart = {origin(node): node for node in streams[0].nodes if node.op != "output"}
        chosen, found = chosen_rows(streams[1]), list[fx.Node | None]()
        for node in self.entries:
            if node in chosen:
                found.append(None)
                continue
            source: Any = node
            while isinstance(source, fx.Node) and origin(source) not in counterpart:
                # behind the host's quantize and dequantize
                source = source.args[0] if source.args else None
            exact = counterpart[origin(source)] if isinstance(source, fx.Node) else None
            found.append(exact if exact in of_float else None)
        return found

    def __call__(
        self,
        entries: Sequence[Any],
        weights: Sequence[Tensor],
        corrections: Sequence[Tensor | None],
        *,
        generator: torch.Generator | None = None,
        scale_factors: Sequence[Tensor] | None = None,
        squares: dict[str, list[Tensor]] | None = None,
        mask: Tensor | None = None,
    ) -> list[Any]:
        """Values at the exits.

        Args:
            entries: values at the entries.
            weights, corrections: of `nodes`, and of their biases.
            generator: for dropping quantization; None drops nothing.
            scale_factors: of the scales of `quantizers`; None for the scales as they are.
            squares: takes the mean square of every weighted operator's output that has entries.
            mask: `(samples, tokens)`, which tokens count there, or None.
        """
        values: Values = dict(zip(self.entries, entries, strict=True))
        inner: Values = {}
        for node in self._path.order:
            if node in self._sites:
                weighted, _ = self._sites[node]
                given = self._fixed.get(weighted.name)
                if given is None:
                    index = self._index[weighted.name]
                    given = weights[index], corrections[index]
                output = self._weighted(node, values, *given, inner=node in self._inner)
                (inner if node in self._inner else values)[node] = output
                if node in self._passed:
                    values[node] = self._weighted(node, values, *given, inner=False)
                if squares is not None:
                    counts = counted(mask, output.shape)
                    seen = output if counts is None else output[counts.to(output.device)]
                    if seen.numel():
                        squares.setdefault(weighted.name, []).append(seen.square().mean())
            else:
                values[node] = self._other(node, values, generator, scale_factors)
            for dead in self._path.dead[node]:
                del values[dead]
        return [(inner if end.inner else values)[end.quantized_node] for end in self._exits]

    def _weighted(
        self, node: fx.Node, values: Values, weight: Tensor, correction: Tensor | None, *, inner: bool
    ) -> Any:
        """The host's float operator on a weight; `inner` before the activation function that is fused to it."""
        call = self._sites[node][1].call
        assert call is not None
        args, kwargs = map_arg(call.arguments(node), values.__getitem__)
        run = call.inner if inner else call.whole
        return run(args, kwargs, weight, correction)

    def _other(
        self,
        node: fx.Node,
        values: Values,
        generator: torch.Generator | None,
        scale_factors: Sequence[Tensor] | None,
    ) -> Any:
        """The value of a node without a weight, in floats throughout."""
        if scale_factors is not None and node in self._clamps:
            # the range that it keeps moves with the scale
            return values[node.all_input_nodes[0]]
        if scale_factors is not None and node in self._quantizer:
            i = self._quantizer[node]
            one, x = self.quantizers[i], values[node.all_input_nodes[0]]
            scale = one.scale * scale_factors[i]
            made = learnable_fake_quantize(x, scale, one.zero_point, one.quant_min, one.quant_max)
            if node.target is not torch.quantize_per_tensor:
                return made
            step = float(scale.detach())
            ends = grid_ends(step, one.zero_point, one.quant_min, one.quant_max)
            dtype: Any = node.args[3]
            return as_quantized(made, x.detach().clamp(*ends), step, one.zero_point, dtype)
        if quantizes(node) and not self._stream.is_remade(node):
            exact = values[node.all_input_nodes[0]]
            return self.dropped(fake_quantized(self._stream, node, values), exact, generator)
        if unpacks(node) and values[node.all_input_nodes[0]].is_floating_point():
            return values[node.all_input_nodes[0]]
        return run_node(self._stream, node, values)

    def dropped(self, quantized: Any, exact: Any, generator: torch.Generator | None) -> Any:
        """`quantized`, or with the probability of dropping, entry by entry, `exact`."""
        if generator is None or not self._drop or not isinstance(quantized, Tensor) or not isinstance(exact, Tensor):
            return quantized
        drawn = torch.rand(quantized.shape, generator=generator, dtype=torch.float32, device="cpu")
        chosen = (drawn < self._drop).to(quantized.device)
        return torch.where(chosen, exact, quantized)
