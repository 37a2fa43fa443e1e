"""What learning on samples sees of a region: minibatches with targets, and the errors of its output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Protocol

import torch
from torch import Tensor

from adaround_plugin.processes import ALONE, Processes

__all__ = ["Minibatch", "Samples", "relative_errors", "squared_error"]


@dataclass(frozen=True)
class Minibatch:
    """Some samples at a region's entry.

    Attributes:
        samples: by what a sum over them is divided for their mean; of several processes that draw, the mean number.
        target: the float model's values at the region's exits.
        importance: weights of the entries of `target`, or None.
        run: from weights, corrections of their biases, and factors of the learnable scales of activations (None leaves
            them as they are), to values at the exits.
    """

    samples: float
    target: Sequence[Tensor]
    importance: Sequence[Tensor] | None
    run: Callable[[Sequence[Tensor], Sequence[Tensor | None], Sequence[Tensor] | None], list[Tensor]]


class Samples(Protocol):
    """The calibration data at a region's entry.

    Attributes:
        processes: this one and those that have other samples.
    """

    processes: Processes

    def draw(self, generator: torch.Generator) -> Minibatch:
        """Some learning samples at random, as a step of learning sees them."""

    def all(self, held_out: bool, with_gradient: bool = False) -> Iterator[Minibatch]:
        """The learning or the held-out samples, in order; with a gradient no more of them at once than a step has."""

    def output_scale(self) -> list[float]:
        """Root mean square of the output of each weight's operator."""


def squared_error(batch: Minibatch, outputs: Sequence[Tensor]) -> Tensor:
    """Sum of squared errors at the exits, where the float values are numbers: masked scores may be minus infinity."""
    total = torch.zeros((), dtype=torch.float32, device="cpu")
    for i, (target, output) in enumerate(zip(batch.target, outputs, strict=True)):
        square = torch.where(torch.isfinite(target), output - target, 0.0).square()
        weighed = square if batch.importance is None else square * batch.importance[i]
        total = total.to(square.device) + weighed.sum()
    return total


def relative_errors(
    batches: Iterator[Minibatch],
    weights: Sequence[Tensor],
    corrections: Sequence[Tensor | None],
    scale_factors: Sequence[Tensor] | None = None,
    processes: Processes = ALONE,
) -> tuple[float, float | None]:
    """Squared error of the exits per sample, and over the variance of the float values (None without samples).

    Of the batches of all processes.
    """
    square, count = 0.0, 0.0
    # of the float values at each exit: sum of weights, weighted sum, weighted sum of squares
    sums: list[tuple[float, ...]] = []
    with torch.no_grad():
        for batch in batches:
            square += float(squared_error(batch, batch.run(weights, corrections, scale_factors)))
            found = [_sums(batch, i) for i in range(len(batch.target))]
            sums = _added(sums, found)
            count += batch.samples
    squares, counts, parts = zip(*processes.gathered("the error of a region", (square, count, sums)), strict=True)
    square, count, sums = sum(squares), sum(counts), reduce(_added, parts)
    if not count:
        return 0.0, None
    power = sum(squares - total * total / weight for weight, total, squares in sums if weight > 0)
    return square / count, square / power if power > 0 else square


def _added(one: list[tuple[float, ...]], other: list[tuple[float, ...]]) -> list[tuple[float, ...]]:
    """Entry by entry; either may be empty, which is 0."""
    if not one or not other:
        return one or other
    return [tuple(map(add, left, right)) for left, right in zip(one, other, strict=True)]


def _sums(batch: Minibatch, i: int) -> tuple[float, ...]:
    """Sum of the weights of an exit's entries, of its float values times these, and of the values' squares.

    Of entries that are numbers.
    """
    target = batch.target[i].double()
    weight = torch.isfinite(target).double()
    if batch.importance is not None:
        weight = weight * batch.importance[i]
    target = torch.where(weight > 0, target, 0.0)
    return float(weight.sum()), float((weight * target).sum()), float((weight * target.square()).sum())
