"""Reconstruction of a region: all of its roundings learned together, by the error of the region's output.

A region is one layer with its activation function (AdaRound, equation 25), or a block of layers (BRECQ, Li et al.
2021, arXiv 2102.05426). What it computes is given as a function of weights; where that comes from is not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from adaround_plugin.grid import Grid
from adaround_plugin.soft_rounding import SoftRounding, bracket, soft_rounding
from adaround_plugin.solvers.relaxation import Relaxation, descend

__all__ = ["Minibatch", "Reconstructed", "Reconstruction", "Samples", "Start", "reconstruct"]

# learning rate of biases, relative to the root mean square of the layer's output
_BIAS_RATE = 1e-3


class Minibatch(Protocol):
    """Some samples at a region's entry.

    Attributes:
        samples: how many.
        target: the float model's values at the region's exits.
        importance: weights of the entries of `target`, or None.
    """

    samples: int
    target: Sequence[Tensor]
    importance: Sequence[Tensor] | None

    def run(self, weights: Sequence[Tensor], corrections: Sequence[Tensor | None]) -> list[Tensor]:
        """Values at the exits with these weights and corrections of the biases."""


class Samples(Protocol):
    """The calibration data at a region's entry."""

    def draw(self, generator: torch.Generator, size: int) -> Minibatch:
        """Some learning samples at random, as a step of learning sees them."""

    def all(self, held_out: bool) -> Iterator[Minibatch]:
        """The learning or the held-out samples, in order."""

    def output_scale(self) -> list[float]:
        """Root mean square of the output of each weight's operator."""


@dataclass(frozen=True)
class Start:
    """A weight as it is before.

    Attributes:
        weight: the float weight.
        grid, integers: its rounding.
        outputs: length of the bias.
        correction: `(outputs,)` what is added to the bias; None for nothing.
        moves_bias: whether the bias is learned too.
        from_weight: begin at the float weight's place on the grid, as the paper does, instead of at `integers`.
    """

    weight: Tensor
    grid: Grid
    integers: Tensor
    outputs: int
    correction: Tensor | None
    moves_bias: bool
    from_weight: bool


@dataclass(frozen=True)
class Reconstructed:
    """Integers of a weight (int64, of its shape) and the correction of its bias."""

    integers: Tensor
    correction: Tensor | None


@dataclass(frozen=True)
class Reconstruction:
    """What was learned, and the error of the region's output: mean square over the float output's variance.

    Attributes:
        weights: in the order given.
        start_error, learned_error: on learning samples.
        start_holdout, learned_holdout: on held-out samples, None without any.
        iterations: steps made.
    """

    weights: list[Reconstructed]
    start_error: float
    learned_error: float
    start_holdout: float | None
    learned_holdout: float | None
    iterations: int

    @property
    def better(self) -> bool:
        """Whether the error fell, on held-out samples where there are some."""
        if self.start_holdout is not None and self.learned_holdout is not None:
            return self.learned_holdout < self.start_holdout
        return self.learned_error < self.start_error


def reconstruct(
    samples: Samples,
    starts: Sequence[Start],
    settings: Relaxation,
    report: Callable[[int, float], None] | None = None,
) -> Reconstruction:
    """Learn the integers of a region's weights, and biases where they may move.

    Args:
        samples: the data.
        starts: the weights, in the order in which `samples` takes them.
        settings: of the relaxation.
        report: called now and then with the number of iterations and the loss relative to that of the start.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    before = [Reconstructed(start.integers, start.correction) for start in starts]
    start_square, start_error = _errors(samples.all(held_out=False), starts, before)
    _, start_holdout = _errors(samples.all(held_out=True), starts, before)
    if not start_square:
        return Reconstruction(before, 0.0, 0.0, start_holdout, start_holdout, 0)
    with torch.enable_grad():
        softs = _softs(samples, starts, settings)
        corrections, groups = _corrections(samples, starts)

        def loss(progress: float) -> Tensor:
            batch = samples.draw(generator, settings.batch_size)
            weights = [start.grid.dequantize(soft.coordinates(progress)) for start, soft in zip(starts, softs, strict=True)]
            outputs = batch.run(weights, corrections)
            return _square(batch, outputs) / (batch.samples * start_square)

        iterations = descend(softs, groups, loss, settings, report)
    after = [
        Reconstructed(soft.integers(), None if correction is None else correction.detach())
        for soft, correction in zip(softs, corrections, strict=True)
    ]
    _, learned_error = _errors(samples.all(held_out=False), starts, after)
    _, learned_holdout = _errors(samples.all(held_out=True), starts, after)
    return Reconstruction(after, start_error or 0.0, learned_error or 0.0, start_holdout, learned_holdout, iterations)


def _softs(samples: Samples, starts: Sequence[Start], settings: Relaxation) -> list[SoftRounding]:
    """Soft coordinates of every weight, where it begins."""
    slopes = None if all(start.from_weight for start in starts) else _slopes(samples, starts)
    softs = []
    for i, start in enumerate(starts):
        grid = start.grid
        lowest = torch.full_like(start.integers, grid.quant_min)
        highest = torch.full_like(start.integers, grid.quant_max)
        begin = grid.coordinates(start.weight) if start.from_weight else start.integers
        if settings.variant == "straight_through":
            lower, upper = lowest, highest
        elif slopes is None:
            floor = begin.floor().long()
            lower, upper = torch.clamp(floor, lowest, highest), torch.clamp(floor + 1, lowest, highest)
        else:
            lower, upper = bracket(start.integers, slopes[i], lowest, highest)
        softs.append(soft_rounding(settings.variant, lower, upper, begin, settings.warm_up, settings.beta))
    return softs


def _slopes(samples: Samples, starts: Sequence[Start]) -> list[Tensor]:
    """Derivative of the region's error by every grid coordinate, at the start, over the learning samples."""
    coordinates = [start.integers.float().requires_grad_() for start in starts]
    slopes = [torch.zeros_like(q) for q in coordinates]
    for batch in samples.all(held_out=False):
        weights = [start.grid.dequantize(q) for start, q in zip(starts, coordinates, strict=True)]
        square = _square(batch, batch.run(weights, [start.correction for start in starts]))
        for slope, gradient in zip(slopes, torch.autograd.grad(square, coordinates), strict=True):
            slope += gradient
    return slopes


def _corrections(samples: Samples, starts: Sequence[Start]) -> tuple[list[Tensor | None], list[dict[str, Any]]]:
    """The corrections of the biases, those that move as leaves, and the optimizer's groups for these."""
    corrections: list[Tensor | None] = []
    groups: list[dict[str, Any]] = []
    scales = samples.output_scale() if any(start.moves_bias for start in starts) else [0.0] * len(starts)
    for start, scale in zip(starts, scales, strict=True):
        correction = start.correction
        if start.moves_bias:
            correction = (start.weight.new_zeros(start.outputs) if correction is None else correction.clone()).requires_grad_()
            groups.append({"params": [correction], "lr": _BIAS_RATE * scale})
        corrections.append(correction)
    return corrections, groups


def _square(batch: Minibatch, outputs: Sequence[Tensor]) -> Tensor:
    """Sum of squared errors at the exits."""
    total = torch.zeros(())
    importance = batch.importance or [None] * len(outputs)
    for target, output, weight in zip(batch.target, outputs, importance, strict=True):
        square = (output - target).square()
        total = total.to(square.device) + (square if weight is None else square * weight).sum()
    return total


def _errors(
    batches: Iterator[Minibatch], starts: Sequence[Start], weights: Sequence[Reconstructed]
) -> tuple[float, float | None]:
    """Squared error of the exits per sample, and over the variance of the float values (None without samples)."""
    square = power = 0.0
    count = 0
    dequantized = [start.grid.dequantize(weight.integers) for start, weight in zip(starts, weights, strict=True)]
    with torch.no_grad():
        for batch in batches:
            square += float(_square(batch, batch.run(dequantized, [weight.correction for weight in weights])))
            means = [target.mean(0, keepdim=True) for target in batch.target]
            power += float(_square(batch, [mean.expand_as(target) for mean, target in zip(means, batch.target, strict=True)]))
            count += batch.samples
    if not count:
        return 0.0, None
    return square / count, square / power if power > 0 else square
