"""Derivatives of random projections of a network's output, which every method that asks how much matters makes use of.

The squared error of the network's own output has the Hessian `2 J^T J`, and `E (J^T v)(J^T v)^T` over random signs `v`
is `J^T J` (Hutchinson 1990). Derivatives start before a last softmax or sigmoid, through which they would vanish
wherever the network is sure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from math import sqrt
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from adaround_plugin.errors import taking_derivatives
from adaround_plugin.graph.calls import Tap
from adaround_plugin.graph.compat import tree_map
from adaround_plugin.graph.ends import ends_of
from adaround_plugin.graph.paths import Path, run_node
from adaround_plugin.graph.streams import Stream, Values, tensors
from adaround_plugin.hosts.base import WeightedNode
from adaround_plugin.regions.masks import counted, without_padding

__all__ = ["Watch", "differentiate", "projections", "run_differentiably", "taking"]

# called with a call site in the float graph, its layer and its input; returns what takes the derivatives by its output
Watch = Callable[[fx.Node, WeightedNode, Tensor], Callable[[Tensor], None]]


def differentiate(
    stream: Stream,
    nodes: Sequence[WeightedNode],
    values: Values,
    samples: Sequence[int],
    watch: Watch,
    variances: Sequence[float] | None = None,
    mask: Tensor | None = None,
) -> None:
    """Take derivatives of a random projection of the network's output by what weighted operators give.

    Args:
        stream: the float stream, nothing of it run.
        nodes: the weighted operators; one that cannot be run from outside is not watched.
        values: of the graph's inputs in a batch.
        samples: the numbers of the batch's samples.
        watch: what takes the derivatives at a call site, if there are any; called once with each, in order.
        variances, mask: as of `projections`.

    Raises:
        InvalidOptionError: an operator has no derivative.
    """
    sites = {site.float_node: (site.call, node) for node in nodes for site in node.sites if site.call is not None}
    path = Path(stream, ends_of(stream), values, {})
    found: dict[fx.Node, Any] = {node: stream.value(node, values) for node in path.entries}
    with torch.enable_grad():
        # added to every operator's output, so that each has a derivative, and no weight needs one
        zero = torch.zeros((), requires_grad=True, device="cpu")
        for node in path.order:
            if node not in sites:
                found[node] = run_differentiably(stream, node, found)
                continue
            call, weighted = sites[node]
            args, kwargs = map_arg(call.arguments(node), found.__getitem__)
            x = args[0] if args else kwargs["input"]
            found[node] = call.tapped(args, kwargs, weighted.weight, _tap(watch(node, weighted, x.detach()), zero))
        for value in projections(stream, found, 1, samples, variances, mask):
            with taking():
                torch.autograd.grad(value, zero, allow_unused=True)


def _tap(take: Callable[[Tensor], None], zero: Tensor) -> Tap:
    """What lets the derivatives by an output be taken."""

    def tap(output: Tensor) -> Tensor:
        output = output + zero.to(output.device)
        output.register_hook(take)  # type: ignore[no-untyped-call]
        return output

    return tap


def run_differentiably(stream: Stream, node: fx.Node, found: Values) -> Any:
    """The value of one node, with a derivative.

    What it raises for values without one, too, is the network's own error, and no matter of derivatives.
    """
    try:
        return run_node(stream, node, found)
    except RuntimeError:
        plain = {source: tree_map(_detached, found[source]) for source in node.all_input_nodes}
        with torch.no_grad():
            run_node(stream, node, plain)
        with taking():
            raise


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def taking() -> AbstractContextManager[None]:
    """Name the options that ask for derivatives where torch cannot take one."""
    off = "LayerWise(column_weighting='none', output_hessian=False) and BlockWise(weighs_outputs=False)"
    remedy = f"Pass method='default', which does without, or {off}."
    return taking_derivatives("column_weighting, output_hessian, weighs_outputs", remedy)


def projections(
    stream: Stream,
    found: Values,
    count: int,
    samples: Sequence[int],
    variances: Sequence[float] | None = None,
    mask: Tensor | None = None,
) -> Iterator[Tensor]:
    """Random projections of those ends that have a derivative; none if none has.

    Each sample has random signs of its own, whatever batch it is in. Of several ends each is taken over its standard
    deviation in the batch, so that none counts by its unit.

    Args:
        stream: whose ends they are.
        found: their values.
        count: number of projections.
        samples: the numbers of the batch's samples.
        variances: of each end over all samples, as `OutputError` has them. Of small changes of the ends, the square of
            a projection is on the mean the sum of the samples' relative errors then.
        mask: `(samples, tokens)`, which tokens count, or None.
    """
    ends = tensors([found[end] for end in ends_of(stream)])
    if variances is None:
        outputs = [without_padding(_scores(output), mask) for output in ends if output.requires_grad]
        unit = _over_spread(outputs)
    else:
        known = sum(variance > 0 for variance in variances)
        pairs = [(one, variance) for one, variance in zip(ends, variances, strict=True) if one.requires_grad]
        outputs = [without_padding(one, mask) for one, _ in pairs]
        unit = [
            sqrt(len(samples) / (entries * variance * known)) if variance > 0 and entries else 0.0
            for entries, variance in ((_entries(one, mask), variance) for one, variance in pairs)
        ]
    for number in range(count if outputs else 0):
        sums = []
        for which, (output, one) in enumerate(zip(outputs, unit, strict=True)):
            seeds = [(sample * count + number) * len(outputs) + which for sample in samples]
            sums.append(one * (output * _signs(output, seeds)).sum())
        yield torch.stack([one.to(sums[0].device) for one in sums]).sum()


def _entries(output: Tensor, mask: Tensor | None) -> float:
    """The number of entries of an output that count."""
    counts = counted(mask, output.shape)
    return output.numel() if counts is None else output.numel() * float(counts.float().mean())


def _over_spread(outputs: Sequence[Tensor]) -> list[float]:
    """One over the standard deviation of each of several; 1 for a lone one."""
    if len(outputs) < 2:
        return [1.0] * len(outputs)
    known = [values[torch.isfinite(values)] for values in (output.detach() for output in outputs)]
    spread = [float(values.std()) if values.numel() > 1 else 0.0 for values in known]
    return [1 / one if one > 0 else 1.0 for one in spread]


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
