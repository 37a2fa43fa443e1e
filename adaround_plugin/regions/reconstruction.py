"""Reconstruction of a region: all of its roundings learned together, by the error of the region's output.

A region is one layer with its activation function (AdaRound, equation 25), or a block of layers (BRECQ, Li et al.
2021, arXiv 2102.05426). What it computes is given as a function of weights; where that comes from is not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from adaround_plugin.regions.learnable import LearnableWeight, Outcome, WeightInit, learned_errors, slopes
from adaround_plugin.regions.minibatches import Samples, squared_error
from adaround_plugin.rounding.schemes import up_or_down
from adaround_plugin.rounding.soft_rounding import SoftRounding, bracket
from adaround_plugin.solvers.relaxation import Schedule, descend

__all__ = ["descend_in_turn", "reconstruct"]

# learning rate of scales, relative to themselves, and of biases, relative to the root mean square of the layer's output
_RATE = 1e-3
# share of the iterations that is kept for scales and biases, after the weights are rounded
_LAST_SHARE = 0.2
_ERROR_CONTEXT = ("method", "Pass method='default', or blocks without the operator that has none.")


def reconstruct(
    samples: Samples,
    inits: Sequence[WeightInit],
    schedule: Schedule,
    *,
    from_weight: bool,
    seed: int,
    report: Callable[[int, float], None] | None = None,
) -> Outcome:
    """Learn the integers of a region's weights, and scales and biases where they may move.

    Args:
        samples: the data.
        inits: the weights, in the order in which `samples` takes them.
        schedule: of the relaxation.
        from_weight: begin at the float weight's place on the grid, as the paper does, instead of at the integers.
        seed: of the minibatches.
        report: called now and then with the number of iterations and the loss relative to that of the start.

    Raises:
        InvalidOptionError: no derivative could be taken.
    """
    processes = samples.processes
    # each process draws otherwise
    generator = torch.Generator().manual_seed(seed + processes.rank)
    before = [init.as_it_is() for init in inits]
    start_square, start_error = learned_errors(samples, before, held_out=False)
    _, start_holdout = learned_errors(samples, before, held_out=True)
    if not start_square or not isfinite(start_square):
        return Outcome(
            weights=before,
            start_error=0.0,
            learned_error=0.0,
            start_holdout=start_holdout,
            learned_holdout=start_holdout,
            iterations=0,
            notes=[] if isfinite(start_square) else ["its output is no finite number"],
        )
    with torch.enable_grad():
        learned = _begin(samples, inits, schedule, from_weight)

        def loss(progress: float | None) -> Tensor:
            batch = samples.draw(generator)
            outputs = batch.run([one.weight(progress) for one in learned], [one.correction for one in learned], None)
            return squared_error(batch, outputs) / (batch.samples * start_square)

        iterations = descend_in_turn(
            [one.soft for one in learned if one.soft is not None],
            [group for one in learned for group in one.groups],
            loss,
            schedule,
            report=report,
            error_context=_ERROR_CONTEXT,
            average=partial(processes.averaged, "a step of a region"),
        )
    unreached = sum(one.soft is None for one in learned)
    after = [one.result() for one in learned]
    _, learned_error = learned_errors(samples, after, held_out=False)
    _, learned_holdout = learned_errors(samples, after, held_out=True)
    return Outcome(
        weights=after,
        start_error=start_error or 0.0,
        learned_error=learned_error or 0.0,
        start_holdout=start_holdout,
        learned_holdout=learned_holdout,
        iterations=iterations,
        notes=[f"no derivative reaches {unreached} of {len(inits)} weights"] if unreached else [],
    )


def descend_in_turn(
    softs: Sequence[SoftRounding],
    others: Sequence[dict[str, Any]],
    loss: Callable[[float | None], Tensor],
    schedule: Schedule,
    *,
    report: Callable[[int, float], None] | None,
    decay: bool = False,
    **options: Any,
) -> int:
    """Learn roundings with all else, and in the last fifth of the iterations all else alone, on what they rounded to.

    Args:
        softs, others, schedule, report, options: as for `descend`; without `softs` all iterations are for the others.
        loss: as there, from None once the weights are rounded.
        decay: let the rates of the others fall to zero in the end.

    Returns:
        The number of iterations made.
    """
    share = _LAST_SHARE if softs else 1.0
    last = int(schedule.iterations * share) if others else 0
    made = 0
    if softs:
        first = replace(schedule, iterations=schedule.iterations - last)
        made = descend(softs, others, loss, first, report=report, **options)
    if not last:
        return made
    later = None if report is None else lambda step, value: report(made + step, value)
    second = replace(schedule, iterations=last)
    return made + descend([], others, lambda progress: loss(None), second, report=later, decay=decay, **options)


def _begin(
    samples: Samples, inits: Sequence[WeightInit], schedule: Schedule, from_weight: bool
) -> list[LearnableWeight]:
    """Every weight where it begins."""
    found = [None] * len(inits) if from_weight else slopes(samples, inits, _ERROR_CONTEXT)
    scales = samples.output_scale() if any(init.moves_bias for init in inits) else [0.0] * len(inits)
    learned = []
    for init, slope, output_scale in zip(inits, found, scales, strict=True):
        soft = _soft(init, slope, schedule)
        movable = init if soft is not None else replace(init, moves_bias=False, moves_scale=False)
        learned.append(LearnableWeight(movable, soft, output_scale, _RATE))
    return learned


def _soft(init: WeightInit, slope: Tensor | None, schedule: Schedule) -> SoftRounding | None:
    """Soft coordinates between the weight's floor and ceil, or between its integer and a neighbour.

    None where no derivative reaches the weight, as behind the choice of an index.
    """
    if slope is not None and not bool(slope.any()):
        return None
    if schedule.soft_rounding.spans_grid:
        lower, upper = init.lowest, init.highest
    elif slope is None:
        lower, upper = up_or_down(init.grid, init.weight)
    else:
        lower, upper = bracket(init.integers, slope, init.lowest, init.highest)
    begin = init.grid.coordinates(init.weight) if slope is None else init.integers
    return schedule.soften(lower, upper, begin)
