"""Reconstruction of a region: all of its roundings learned together, by the error of the region's output.

A region is one layer with its activation function (AdaRound, equation 25), or a block of layers (BRECQ, Li et al.
2021, arXiv 2102.05426). What it computes is given as a function of weights; where that comes from is not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from adaround_plugin.errors import taking_derivatives
from adaround_plugin.rounding.grid import Grid
from adaround_plugin.rounding.schemes import up_or_down
from adaround_plugin.rounding.soft_rounding import SoftRounding, bracket, soft_rounding
from adaround_plugin.solvers.relaxation import NO_DERIVATIVE, Relaxation, descend

__all__ = [
    "LAST_SHARE",
    "Minibatch",
    "Moving",
    "Reconstructed",
    "Reconstruction",
    "Samples",
    "Start",
    "reconstruct",
    "relative_errors",
    "slopes",
    "squared_error",
]

# learning rate of scales, relative to themselves, and of biases, relative to the root mean square of the layer's output
_RATE = 1e-3
# share of the iterations that is kept for scales and biases, after the weights are rounded
LAST_SHARE = 0.2


@dataclass(frozen=True)
class Minibatch:
    """Some samples at a region's entry.

    Attributes:
        samples: how many.
        target: the float model's values at the region's exits.
        importance: weights of the entries of `target`, or None.
        run: from weights, corrections of their biases, and factors of the learnable scales of activations (None leaves
            them as they are), to values at the exits.
    """

    samples: int
    target: Sequence[Tensor]
    importance: Sequence[Tensor] | None
    run: Callable[[Sequence[Tensor], Sequence[Tensor | None], Sequence[Tensor] | None], list[Tensor]]


class Samples(Protocol):
    """The calibration data at a region's entry."""

    def draw(self, generator: torch.Generator) -> Minibatch:
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
        lowest, highest: int64 bounds of the integers, of the weight's shape.
        outputs: length of the bias.
        correction: `(outputs,)` what is added to the bias; None for nothing.
        moves_bias: whether the bias is learned too.
        moves_scale: whether the scale is learned too.
        from_weight: begin at the float weight's place on the grid, as the paper does, instead of at `integers`.
    """

    weight: Tensor
    grid: Grid
    integers: Tensor
    lowest: Tensor
    highest: Tensor
    outputs: int
    correction: Tensor | None
    moves_bias: bool
    moves_scale: bool
    from_weight: bool


@dataclass(frozen=True)
class Reconstructed:
    """Grid and integers (int64, of the weight's shape) of a weight, and the correction of its bias."""

    grid: Grid
    integers: Tensor
    correction: Tensor | None

    @property
    def weight(self) -> Tensor:
        """The weight that the host makes of it."""
        return self.grid.dequantize(self.integers)


@dataclass(frozen=True)
class Reconstruction:
    """What was learned, and the error of the region's output: mean square over the float output's variance.

    Attributes:
        weights: in the order given.
        start_error, learned_error: on learning samples.
        start_holdout, learned_holdout: on held-out samples, None without any.
        iterations: steps made.
        stretches: factors of the scales of activations, where these were learned.
        unreached: how many scales and biases no derivative of the error reaches.
    """

    weights: list[Reconstructed]
    start_error: float
    learned_error: float
    start_holdout: float | None
    learned_holdout: float | None
    iterations: int
    stretches: list[float] = field(default_factory=list)
    unreached: int = 0

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
    """Learn the integers of a region's weights, and scales and biases where they may move.

    Args:
        samples: the data.
        starts: the weights, in the order in which `samples` takes them.
        settings: of the relaxation.
        report: called now and then with the number of iterations and the loss relative to that of the start.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    before = [Reconstructed(start.grid, start.integers, start.correction) for start in starts]
    start_square, start_error = relative_errors(samples.all(held_out=False), before)
    _, start_holdout = relative_errors(samples.all(held_out=True), before)
    if not start_square:
        return Reconstruction(before, 0.0, 0.0, start_holdout, start_holdout, 0)
    with torch.enable_grad():
        learned = _begin(samples, starts, settings)

        def loss(progress: float | None) -> Tensor:
            batch = samples.draw(generator)
            outputs = batch.run([one.weight(progress) for one in learned], [one.correction for one in learned], None)
            return squared_error(batch, outputs) / (batch.samples * start_square)

        groups = [group for one in learned for group in one.groups]
        # at the end only what is not rounded is learned, on the roundings as they will be
        last = int(settings.iterations * LAST_SHARE) if groups else 0
        first = replace(settings, iterations=settings.iterations - last)
        iterations = descend([one.soft for one in learned if one.soft is not None], groups, loss, first, report)
        if last:
            made = iterations
            goes_on = None if report is None else lambda step, value: report(made + step, value)
            second = replace(settings, iterations=last)
            iterations += descend([], groups, lambda progress: loss(None), second, goes_on)
    after = [one.result() for one in learned]
    _, learned_error = relative_errors(samples.all(held_out=False), after)
    _, learned_holdout = relative_errors(samples.all(held_out=True), after)
    return Reconstruction(after, start_error or 0.0, learned_error or 0.0, start_holdout, learned_holdout, iterations)


class Moving:
    """One weight on its way: soft coordinates, and the bias and the scale where they move.

    Args:
        start: where it begins.
        soft: its coordinates; None if its integers stay.
        output_scale: root mean square of the output of its operator.
        rate: learning rate of the scale, relative to itself, and of the bias, relative to `output_scale`.

    Attributes:
        groups: parameter groups of the optimizer for bias and scale.
    """

    def __init__(self, start: Start, soft: SoftRounding | None, output_scale: float, rate: float = _RATE) -> None:
        self.start, self.soft = start, soft
        self.correction = start.correction
        self.groups: list[dict[str, Any]] = []
        self._log_stretch = torch.zeros_like(start.grid.scale)
        if start.moves_bias:
            zeros = start.weight.new_zeros(start.outputs)
            self.correction = (zeros if start.correction is None else start.correction.clone()).requires_grad_()
            self.groups.append({"params": [self.correction], "lr": rate * output_scale})
        if start.moves_scale:
            self.groups.append({"params": [self._log_stretch.requires_grad_()], "lr": rate})

    def _grid(self) -> Grid:
        grid = self.start.grid
        return grid.at(grid.scale * self._log_stretch.exp(), grid.zero_point) if self.start.moves_scale else grid

    def weight(self, progress: float | None) -> Tensor:
        """The weight at a share of the iterations; None for rounded."""
        if self.soft is None or progress is None:
            return self._grid().dequantize(self._integers())
        return self._grid().dequantize(self.soft.coordinates(progress))

    def _integers(self) -> Tensor:
        return self.start.integers if self.soft is None else self.soft.integers()

    def result(self) -> Reconstructed:
        """What was learned."""
        correction = None if self.correction is None else self.correction.detach()
        with torch.no_grad():
            return Reconstructed(self._grid(), self._integers(), correction)


def _begin(samples: Samples, starts: Sequence[Start], settings: Relaxation) -> list[Moving]:
    """Every weight where it begins."""
    blame = ("solver", NO_DERIVATIVE)
    found = None if all(start.from_weight for start in starts) else slopes(samples, starts, blame)
    scales = samples.output_scale() if any(start.moves_bias for start in starts) else [0.0] * len(starts)
    learned = []
    for i, start in enumerate(starts):
        grid = start.grid
        begin = grid.coordinates(start.weight) if start.from_weight else start.integers
        if settings.variant == "straight_through":
            lower, upper = start.lowest, start.highest
        elif found is None:
            lower, upper = up_or_down(grid, start.weight)
        else:
            lower, upper = bracket(start.integers, found[i], start.lowest, start.highest)
        soft = soft_rounding(settings.variant, lower, upper, begin, settings.warm_up, settings.beta)
        learned.append(Moving(start, soft, scales[i]))
    return learned


def slopes(samples: Samples, starts: Sequence[Start], blame: tuple[str, str], unreached: bool = False) -> list[Tensor]:
    """Derivative of the region's error by every grid coordinate, at the start, over the learning samples.

    Args:
        samples: the data.
        starts: the weights.
        blame: the option and the remedy that an error names where no derivative can be taken.
        unreached: whether weights that no derivative reaches are no error; theirs is 0.

    Raises:
        InvalidOptionError: no derivative could be taken.
    """
    coordinates = [start.integers.float().requires_grad_() for start in starts]
    found = [torch.zeros_like(q) for q in coordinates]
    for batch in samples.all(held_out=False):
        weights = [start.grid.dequantize(q) for start, q in zip(starts, coordinates, strict=True)]
        square = squared_error(batch, batch.run(weights, [start.correction for start in starts], None))
        if unreached and not (coordinates and square.requires_grad):
            continue
        with taking_derivatives(*blame):
            gradients = torch.autograd.grad(square, coordinates, materialize_grads=unreached)
        for slope, gradient in zip(found, gradients, strict=True):
            slope += gradient
    return found


def squared_error(batch: Minibatch, outputs: Sequence[Tensor]) -> Tensor:
    """Sum of squared errors at the exits."""
    total = torch.zeros(())
    for i, (target, output) in enumerate(zip(batch.target, outputs, strict=True)):
        square = (output - target).square()
        weighed = square if batch.importance is None else square * batch.importance[i]
        total = total.to(square.device) + weighed.sum()
    return total


def relative_errors(
    batches: Iterator[Minibatch], weights: Sequence[Reconstructed], stretches: Sequence[Tensor] | None = None
) -> tuple[float, float | None]:
    """Squared error of the exits per sample, and over the variance of the float values (None without samples)."""
    square = 0.0
    count = 0
    # of the float values at each exit: sum of weights, weighted sum, weighted sum of squares
    sums: list[tuple[float, float, float]] = []
    dequantized = [weight.weight for weight in weights]
    with torch.no_grad():
        for batch in batches:
            outputs = batch.run(dequantized, [weight.correction for weight in weights], stretches)
            square += float(squared_error(batch, outputs))
            found = [_sums(batch, i) for i in range(len(batch.target))]
            before = sums or [(0.0, 0.0, 0.0)] * len(found)
            sums = [(a + x, b + y, c + z) for (a, b, c), (x, y, z) in zip(before, found, strict=True)]
            count += batch.samples
    if not count:
        return 0.0, None
    power = sum(squares - total * total / weight for weight, total, squares in sums if weight > 0)
    return square / count, square / power if power > 0 else square


def _sums(batch: Minibatch, i: int) -> tuple[float, float, float]:
    """Sum of the weights of an exit's entries, of its float values times these, and of the values' squares."""
    target = batch.target[i].double()
    weight = torch.ones_like(target) if batch.importance is None else batch.importance[i].double()
    return float(weight.sum()), float((weight * target).sum()), float((weight * target.square()).sum())
