"""A weight that is learned on samples: where it begins, what of it moves, what becomes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adaround_plugin.errors import taking_derivatives
from adaround_plugin.regions.minibatches import Samples, relative_errors, squared_error
from adaround_plugin.rounding.grid import Grid
from adaround_plugin.rounding.soft_rounding import SoftRounding

__all__ = ["LearnableWeight", "LearnedWeight", "Outcome", "WeightInit", "learned_errors", "slopes"]


@dataclass(frozen=True, kw_only=True)
class WeightInit:
    """A weight as it is before, and what of it may move.

    Attributes:
        weight: the float weight.
        grid, integers: its rounding.
        lowest, highest: int64 bounds of the integers, of the weight's shape.
        outputs: length of the bias.
        correction: `(outputs,)` what is added to the bias; None for nothing.
        moves_bias: whether the bias is learned too.
        moves_scale: whether the scale is learned too.
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

    def as_it_is(self) -> LearnedWeight:
        """The weight before anything is learned."""
        return LearnedWeight(self.grid, self.integers, self.correction)


@dataclass(frozen=True)
class LearnedWeight:
    """Grid and integers (int64, of the weight's shape) of a weight, and the correction of its bias."""

    grid: Grid
    integers: Tensor
    correction: Tensor | None

    @property
    def weight(self) -> Tensor:
        """The weight that the host makes of it."""
        return self.grid.dequantize(self.integers)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What was learned, and the error of the region's output: mean square over the float output's variance.

    Attributes:
        weights: in the order given.
        start_error, learned_error: on learning samples.
        start_holdout, learned_holdout: on held-out samples, None without any.
        iterations: steps made.
        scale_factors: of the scales of activations, where these were learned.
        notes: remarks for the report.
    """

    weights: list[LearnedWeight]
    start_error: float
    learned_error: float
    start_holdout: float | None
    learned_holdout: float | None
    iterations: int
    scale_factors: Sequence[float] = ()
    notes: Sequence[str] = ()

    @property
    def better(self) -> bool:
        """Whether the error fell, on held-out samples where there are some."""
        if self.start_holdout is not None and self.learned_holdout is not None:
            return self.learned_holdout < self.start_holdout
        return self.learned_error < self.start_error


class LearnableWeight:
    """One weight on its way: soft coordinates, and the bias and the scale where they move.

    Args:
        init: where it begins.
        soft: its coordinates; None if its integers stay.
        output_scale: root mean square of the output of its operator.
        rate: learning rate of the scale, relative to itself, and of the bias, relative to `output_scale`.

    Attributes:
        correction: of the bias, as it is now.
        groups: parameter groups of the optimizer for bias and scale.
    """

    def __init__(self, init: WeightInit, soft: SoftRounding | None, output_scale: float, rate: float) -> None:
        self.init, self.soft = init, soft
        self.correction = init.correction
        self.groups: list[dict[str, Any]] = []
        self._log_factor = torch.zeros_like(init.grid.scale)
        if init.moves_bias:
            zeros = init.weight.new_zeros(init.outputs)
            self.correction = (zeros if init.correction is None else init.correction.clone()).requires_grad_()
            self.groups.append({"params": [self.correction], "lr": rate * output_scale})
        if init.moves_scale:
            self.groups.append({"params": [self._log_factor.requires_grad_()], "lr": rate})

    def _grid(self) -> Grid:
        grid = self.init.grid
        return grid.at(grid.scale * self._log_factor.exp(), grid.zero_point) if self.init.moves_scale else grid

    def _integers(self) -> Tensor:
        return self.init.integers if self.soft is None else self.soft.integers()

    def weight(self, progress: float | None) -> Tensor:
        """The weight at a share of the iterations; None for rounded."""
        if self.soft is None or progress is None:
            return self._grid().dequantize(self._integers())
        return self._grid().dequantize(self.soft.coordinates(progress))

    def result(self) -> LearnedWeight:
        """What was learned."""
        correction = None if self.correction is None else self.correction.detach()
        with torch.no_grad():
            return LearnedWeight(self._grid(), self._integers(), correction)


def learned_errors(
    samples: Samples, weights: Sequence[LearnedWeight], held_out: bool, scale_factors: Sequence[Tensor] | None = None
) -> tuple[float, float | None]:
    """`relative_errors` of weights on the learning or the held-out samples."""
    return relative_errors(
        samples.all(held_out),
        [one.weight for one in weights],
        [one.correction for one in weights],
        scale_factors,
        samples.processes,
    )


def slopes(
    samples: Samples, inits: Sequence[WeightInit], error_context: tuple[str, str], unreached: bool = False
) -> list[Tensor]:
    """Derivative of the region's error by every grid coordinate, at the start, over the learning samples.

    Args:
        samples: the data.
        inits: the weights.
        error_context: the option and the remedy that an error names where no derivative can be taken.
        unreached: whether it is no error that no derivative reaches any weight. Of those that none reaches it is 0.

    Raises:
        InvalidOptionError: no derivative could be taken.
    """
    coordinates = [init.integers.float().requires_grad_() for init in inits]
    found = [torch.zeros_like(q) for q in coordinates]
    for batch in samples.all(held_out=False, with_gradient=True):
        weights = [init.grid.dequantize(q) for init, q in zip(inits, coordinates, strict=True)]
        square = squared_error(batch, batch.run(weights, [init.correction for init in inits], None))
        if unreached and not (coordinates and square.requires_grad):
            continue
        with taking_derivatives(*error_context):
            gradients = torch.autograd.grad(square, coordinates, materialize_grads=True)
        for slope, gradient in zip(found, gradients, strict=True):
            slope += gradient
    samples.processes.add("the slopes of a region", *found)
    return found
