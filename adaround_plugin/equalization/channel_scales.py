"""Scales of the channels between linked layers: the mathematics of cross-layer equalization.

Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction" (arXiv 1906.04721),
section 4.1, which makes weight ranges equal. If `f(s x) = s f(x)` for every positive `s`, as for ReLU, then for every
diagonal `S` of such

    W2 f(W1 x + b1) = (W2 S) f(S^-1 W1 x + S^-1 b1)

The same freedom makes the ranges of the activations equal (`level`). Ranges need no more of a layer than the largest
magnitude in each of its kernels, so all sweeps run on these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adaround_plugin.rounding.linear_op import LinearOp

__all__ = ["Balance", "Link", "balance", "kernels", "level"]


@dataclass(frozen=True)
class Link:
    """The output channels of one layer are the input channels of another.

    Attributes:
        first, second: positions of the two layers.
        repeat: how many neighbouring inputs of the second layer one output channel becomes: more than 1 if its
            positions were flattened.
    """

    first: int
    second: int
    repeat: int = 1


@dataclass(frozen=True)
class Balance:
    """What `balance` or `level` found.

    Attributes:
        scales: `(channels,)` of each link: the first layer's outputs are divided by them, the second's inputs
            multiplied.
        before, after: of each link two `(channels,)` ranges: the first layer's weights by output (`level`: the
            activations), and the second's by input.
        iterations: sweeps over all links that were made.
        converged: whether the last sweep changed no scale by more than the tolerance.
    """

    scales: list[Tensor]
    before: list[tuple[Tensor, Tensor]]
    after: list[tuple[Tensor, Tensor]]
    iterations: int
    converged: bool


def kernels(weight: Tensor, op: LinearOp) -> Tensor:
    """A weight as `(groups, outputs, inputs, positions)`, outputs and inputs of each group, in float64 on the CPU.

    Its inverse is `op.unrows` of the last two axes flattened.
    """
    rows = op.rows(weight.detach().to("cpu", torch.float64))
    inputs = weight.shape[0] // op.groups if op.kind == "conv_transpose" else weight.shape[1]
    return rows.reshape(*rows.shape[:2], inputs, -1)


def balance(
    layers: Sequence[Tensor], links: Sequence[Link], *, iterations: int, tolerance: float, limit: float
) -> Balance:
    """Find the scales that make both ranges of each channel of each link equal.

    Links are set right one after the other, again and again: a layer in the middle of a chain takes part in two. A
    channel whose range is zero on one side keeps its scale, because no scale makes the two equal.

    Args:
        layers: `(groups, outputs, inputs)` of each layer, the largest magnitude in each kernel, batch norm folded.
        links: a layer is the first of at most one link, and the second of at most one.
        iterations: the largest number of sweeps.
        tolerance: a sweep in which every scale changes by a smaller factor than `1 + tolerance` is the last.
        limit: scales are kept within `[1 / limit, limit]`.
    """
    layers = [layer.clone() for layer in layers]
    before = [_ranges(layers, link) for link in links]
    scales = [torch.ones_like(first) for first, _ in before]
    change, sweeps = 0.0, 0
    while sweeps < iterations:
        changes = [_step(layers, link, scale, limit) for link, scale in zip(links, scales, strict=True)]
        change, sweeps = max(changes, default=0.0), sweeps + 1
        if change <= tolerance:
            break
    after = [_ranges(layers, link) for link in links]
    return Balance(scales, before, after, sweeps, change <= tolerance)


def level(layers: Sequence[Tensor], links: Sequence[Link], ranges: Sequence[Tensor], limit: float) -> Balance:
    """Find the scales that give all channels of a link activations of one range, the median of what they have.

    On one grid for all channels, with a step `D` in proportion to the largest range `r_c / s_c`, the rounded
    activations add `D^2 / 12 sum_c s_c^2 |w_c|^2` to the error of the second layer's output, where `w_c` are its
    weights of channel `c`. It is least where all ranges are equal: a larger `s_c` raises the sum, a smaller one the
    step. A channel whose activations are all zero keeps its scale.

    Args:
        layers, links: as for `balance`.
        ranges: `(channels,)` of each link, of the activations that the second layer reads, in float64 on the CPU.
        limit: scales are kept within `[1 / limit, limit]`.
    """
    layers = [layer.clone() for layer in layers]
    before = [(seen, _ranges(layers, link)[1]) for link, seen in zip(links, ranges, strict=True)]
    scales = [_leveling(seen).clamp(1 / limit, limit) for seen in ranges]
    for link, scale in zip(links, scales, strict=True):
        _rescale(layers, link, scale)
    after = [(seen / scale, _ranges(layers, link)[1]) for link, seen, scale in zip(links, ranges, scales, strict=True)]
    return Balance(scales, before, after, 1, True)


def _leveling(ranges: Tensor) -> Tensor:
    """What brings each range to their median; 1 for a range of zero."""
    positive = ranges[ranges > 0]
    return torch.where(ranges > 0, ranges / positive.median(), 1.0) if len(positive) else torch.ones_like(ranges)


def _ranges(layers: Sequence[Tensor], link: Link) -> tuple[Tensor, Tensor]:
    """`(channels,)` each: r^(1), over the first layer's outputs, and r^(2), over the second's inputs."""
    outputs = layers[link.first].amax(2).flatten()
    inputs = layers[link.second].amax(1).reshape(len(outputs), link.repeat).amax(1)
    return outputs, inputs


def _step(layers: list[Tensor], link: Link, scale: Tensor, limit: float) -> float:
    """Make the ranges of one link equal, in place; returns by how much the most changed scale did, less 1."""
    first, second = _ranges(layers, link)
    # s_i = (1 / r_i^(2)) sqrt(r_i^(1) r_i^(2)), which makes both ranges sqrt(r_i^(1) r_i^(2))
    factor = torch.where((first > 0) & (second > 0), (first / second).sqrt(), 1.0)
    factor = (scale * factor).clamp(1 / limit, limit) / scale
    scale *= factor
    _rescale(layers, link, factor)
    return float(torch.maximum(factor, 1 / factor).max()) - 1


def _rescale(layers: list[Tensor], link: Link, factor: Tensor) -> None:
    """Divide the first layer's outputs and multiply the second's inputs, in place."""
    groups, outputs, _ = layers[link.first].shape
    layers[link.first] /= factor.reshape(groups, outputs, 1)
    groups, _, inputs = layers[link.second].shape
    layers[link.second] *= factor.repeat_interleave(link.repeat).reshape(groups, 1, inputs)
