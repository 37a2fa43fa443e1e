"""Refinement: scales and biases of a whole network learned together, and the integers too where that is asked for.

What rounding could not undo is spread over the whole network: steps of activations that are chosen one by one, by the
squared error of the values that pass, and biases that are corrected layer by layer. As step sizes are learned end to
end in EfficientQAT (Chen et al. 2024, arXiv 2407.11062), by gradients as in LSQ (Esser et al. 2020, arXiv 1902.08153),
but from the float network's output in place of labels. Integers move as in the relaxation of blocks: each between where
it is and the neighbour on the side to which the error falls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from adaround_plugin.errors import InvalidOptionError, taking_derivatives
from adaround_plugin.regions.reconstruction import (
    LAST_SHARE,
    Minibatch,
    Moving,
    Reconstructed,
    Reconstruction,
    Samples,
    Start,
    relative_errors,
    slopes,
    squared_error,
)
from adaround_plugin.rounding.soft_rounding import SoftRounding, bracket, soft_rounding
from adaround_plugin.solvers.relaxation import Relaxation, descend

__all__ = ["Refinement", "refine"]

_BLAME = ("refine", "Pass refine=False.")
# how integers are learned: as in the preset "blocks", at half its rate
_INTEGERS = Relaxation(learning_rate=0.05, regularization=30.0, beta=(8.0, 2.0))


@dataclass(frozen=True)
class Refinement:
    """How scales and biases are learned, and whether integers are.

    Attributes:
        iterations: steps of Adam; the rate falls to zero along a half cosine, over the last fifth where integers are
            learned before that.
        batch_size: samples in a minibatch; a program exported for one batch size has that.
        learning_rate: the first; of scales relative to themselves, of biases relative to the root mean square of the
            layer's output.
        seed: of the minibatches.
        integers: learn integers too, in the first four fifths of the steps: for 2 bits, with 1,000 steps or more. Each
            stays or goes to the neighbour on whose side the error falls.

    Raises:
        InvalidOptionError: a number is out of range.
    """

    iterations: int = 300
    batch_size: int = 32
    learning_rate: float = 1e-3
    seed: int = 0
    integers: bool = False

    # as `Relaxation` has them: every activation is quantized, and the network's output is what matters
    drop: ClassVar[float] = 0.0
    fisher: ClassVar[bool] = False

    def __post_init__(self) -> None:
        def refuse(name: str, remedy: str) -> None:
            raise InvalidOptionError(f"Refinement.{name}", f"{getattr(self, name)!r} is not accepted", remedy)

        for name in ("iterations", "batch_size"):
            if not _is_integer(getattr(self, name)) or getattr(self, name) < 1:
                refuse(name, "Pass a positive integer.")
        rate = self.learning_rate
        if not (isinstance(rate, float) or _is_integer(rate)) or not 0 < rate < math.inf:
            refuse("learning_rate", "Pass a positive number.")
        if not _is_integer(self.seed):
            refuse("seed", "Pass an integer.")
        if not isinstance(self.integers, bool):
            refuse("integers", "Pass True or False.")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def refine(
    samples: Samples,
    starts: Sequence[Start],
    activations: int,
    settings: Refinement,
    report: Callable[[int, float], None] | None = None,
) -> Reconstruction:
    """Learn scales and biases where they may move, the scales of activations, and integers if so set.

    Args:
        samples: the data, with the network's outputs as exits.
        starts: the weights, in the order in which `samples` takes them.
        activations: how many scales of activations `samples` takes.
        settings: how.
        report: called now and then with the number of iterations and the loss relative to that of the start.

    Raises:
        InvalidOptionError: no derivative could be taken.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    before = [Reconstructed(start.grid, start.integers, start.correction) for start in starts]
    start_square, start_error = relative_errors(samples.all(held_out=False), before)
    _, start_holdout = relative_errors(samples.all(held_out=True), before)
    moves_bias = any(start.moves_bias for start in starts)
    output_scales = samples.output_scale() if moves_bias else [0.0] * len(starts)
    pairs = zip(starts, output_scales, strict=True)
    softs = _softs(samples, starts) if settings.integers and start_square else [None] * len(starts)
    moving = [
        Moving(start, soft, output_scale, settings.learning_rate)
        for (start, output_scale), soft in zip(pairs, softs, strict=True)
    ]
    logarithms = [torch.zeros((), requires_grad=True) for _ in range(activations)]
    groups = [group for one in moving for group in one.groups]
    if logarithms:
        groups.append({"params": logarithms, "lr": settings.learning_rate})
    soft = [one for one in softs if one is not None]
    if not start_square or not (groups or soft):
        return Reconstruction(before, start_error or 0.0, start_error or 0.0, start_holdout, start_holdout, 0)
    with torch.enable_grad():

        def loss_of(batch: Minibatch, progress: float | None) -> Tensor:
            corrections = [one.correction for one in moving]
            stretches = [logarithm.exp() for logarithm in logarithms]
            outputs = batch.run([one.weight(progress) for one in moving], corrections, stretches)
            return squared_error(batch, outputs) / (batch.samples * start_square)

        # what lies behind an operator that no derivative goes through, such as a comparison, stays as it is
        reached = groups
        if groups:
            reached = _reached(loss_of(samples.draw(torch.Generator().manual_seed(settings.seed)), None), groups)
        last = int(settings.iterations * LAST_SHARE) if soft and reached else 0 if soft else settings.iterations
        made = 0
        if soft:
            made = descend(
                *(soft, reached, lambda progress: loss_of(samples.draw(generator), progress)),
                replace(_INTEGERS, iterations=settings.iterations - last),
                report,
                blame=_BLAME,
            )
        if last and reached:
            goes_on = None if report is None else lambda step, value: report(made + step, value)
            made += descend(
                *([], reached, lambda progress: loss_of(samples.draw(generator), None)),
                Relaxation(iterations=last),
                goes_on,
                decay=True,
                blame=_BLAME,
            )
    after = [one.result() for one in moving]
    stretches = [logarithm.detach().exp() for logarithm in logarithms]
    _, learned_error = relative_errors(samples.all(held_out=False), after, stretches)
    _, learned_holdout = relative_errors(samples.all(held_out=True), after, stretches)
    return Reconstruction(
        *(after, start_error or 0.0, learned_error or 0.0, start_holdout, learned_holdout, made),
        [float(stretch) for stretch in stretches],
        _count(groups) - _count(reached),
    )


def _softs(samples: Samples, starts: Sequence[Start]) -> list[SoftRounding | None]:
    """Every weight's integers on their way to a neighbour; None where no derivative reaches them."""
    found: list[SoftRounding | None] = []
    with torch.enable_grad():
        falling = slopes(samples, starts, _BLAME, unreached=True)
    for start, slope in zip(starts, falling, strict=True):
        lower, upper = bracket(start.integers, slope, start.lowest, start.highest)
        at = (lower, upper, start.integers)
        reached = bool(slope.any())
        found.append(soft_rounding(_INTEGERS.variant, *at, _INTEGERS.warm_up, _INTEGERS.beta) if reached else None)
    return found


def _reached(loss: Tensor, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The parameter groups without the parameters that the loss does not depend on; empty ones are left out."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    with taking_derivatives(*_BLAME):
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    known = {id(one) for one, gradient in zip(parameters, gradients, strict=True) if gradient is not None}
    kept = [{**group, "params": [one for one in group["params"] if id(one) in known]} for group in groups]
    return [group for group in kept if group["params"]]


def _count(groups: list[dict[str, Any]]) -> int:
    return sum(len(group["params"]) for group in groups)
