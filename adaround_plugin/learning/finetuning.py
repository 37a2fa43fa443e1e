"""Finetuning: scales and biases of a whole network learned together, and the integers too where that is asked for.

What rounding could not undo is spread over the whole network: steps of activations that are chosen one by one, by the
squared error of the values that pass, and biases that are corrected layer by layer. As step sizes are learned end to
end in EfficientQAT (Chen et al. 2024, arXiv 2407.11062), by gradients as in LSQ (Esser et al. 2020, arXiv 1902.08153),
but from the float network's output in place of labels. Integers move as in the relaxation of blocks: each between where
it is and the neighbour on the side to which the error falls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite
from typing import Any, Literal

import torch
from torch import Tensor

from adaround_plugin.errors import taking_derivatives
from adaround_plugin.learning.layerwise import LayerWise
from adaround_plugin.learning.passes import Pass, Snapshot
from adaround_plugin.learning.region_step import RegionStep
from adaround_plugin.options import check_choice, check_integer, check_number, named
from adaround_plugin.processes import Processes
from adaround_plugin.regions.blocks import output_exits
from adaround_plugin.regions.learnable import (
    LearnableWeight,
    LearnedWeight,
    Outcome,
    WeightInit,
    learned_errors,
    slopes,
)
from adaround_plugin.regions.minibatches import Samples, squared_error
from adaround_plugin.regions.reconstruction import descend_in_turn
from adaround_plugin.regions.region import Drawing, Region
from adaround_plugin.rounding.soft_rounding import SoftRounding, bracket
from adaround_plugin.solvers.relaxation import Schedule

__all__ = ["Finetune", "finetune"]

_ERROR_CONTEXT = ("finetune", "Pass finetune=False.")
# how integers are learned: as in blocks, at half their rate
_INTEGERS = Schedule(learning_rate=0.05, regularization=30.0, beta=(8.0, 2.0))
_STEPS, _STEPS_WITH_INTEGERS = 300, 2500
# `integers="auto"` learns those of weights of at most so many bits
_FEW_BITS = 2


@dataclass(frozen=True, kw_only=True)
class Finetune:
    """Learn scales and biases of the whole network by the error of its output, after all weights are rounded.

    Learned are scales of weights and biases as the method leaves them free, and step sizes of the activations that
    AdaRound's observers watch. What is no better than its start on held-out samples is not taken.

    Attributes:
        iterations: steps of Adam; None for 300, or 2,500 where integers are learned. The rate falls to zero along a
            half cosine, over the last fifth where integers are learned before that.
        batch_size: samples in a minibatch; a program exported for one batch size has that.
        learning_rate: the first; of scales relative to themselves, of biases relative to the root mean square of the
            layer's output.
        integers: learn integers too, in the first four fifths of the steps: each stays or goes to the neighbour on
            whose side the error falls. `"auto"` learns those of weights of 2 bits, where it pays.

    Raises:
        InvalidOptionError: an option is out of range.
    """

    iterations: int | None = None
    batch_size: int = 32
    learning_rate: float = 1e-3
    integers: bool | Literal["auto"] = False

    def __post_init__(self) -> None:
        if self.iterations is not None:
            check_integer(*named(self, "iterations"), least=1)
        check_integer(*named(self, "batch_size"), least=1)
        check_number(*named(self, "learning_rate"), above=0)
        check_choice(*named(self, "integers"), choices=(True, False, "auto"))

    def moves_integers(self, init: WeightInit) -> bool:
        """Whether the integers of a weight are learned."""
        return init.grid.bits <= _FEW_BITS if self.integers == "auto" else self.integers

    def steps(self, inits: Sequence[WeightInit]) -> int:
        """How many steps are made."""
        if self.iterations is not None:
            return self.iterations
        return _STEPS_WITH_INTEGERS if any(map(self.moves_integers, inits)) else _STEPS

    def learn(self, run: Pass, layers: LayerWise, start: Snapshot) -> None:
        """Finetune what a pass has decided.

        Args:
            run: the pass, all of its layers decided.
            layers: the options by which they were; they say which scales, biases and integers may move.
            start: of the pass, at the network's inputs.
        """
        step = RegionStep(
            run=run,
            layers=layers,
            name="network",
            nodes=run.nodes,
            exits=output_exits(run.streams),
            drawing=Drawing(self.batch_size),
            phase="finetune",
            learns_scale=True,
            propagate_error=True,
            quantizers=run.host.quantizers,
            start=start,
            decides=False,
        )

        def learn(region: Region, inits: list[WeightInit], report: Callable[[int, float], None]) -> Outcome | None:
            run.report.progress.stage("finetuning", self.steps(inits), "step")
            return finetune(region, inits, len(region.quantizers), self, seed=run.seed, report=report)

        run.report.finetuning = step.learn(learn)


def finetune(
    samples: Samples,
    inits: Sequence[WeightInit],
    activations: int,
    settings: Finetune,
    *,
    seed: int = 0,
    report: Callable[[int, float], None] | None = None,
) -> Outcome | None:
    """Learn scales and biases where they may move, the scales of activations, and integers if so set.

    Args:
        samples: the data, with the network's outputs as exits.
        inits: the weights, in the order in which `samples` takes them.
        activations: how many scales of activations `samples` takes.
        settings: how.
        seed: of the minibatches.
        report: called now and then with the number of iterations and the loss relative to that of the start.

    Returns:
        The outcome; None where nothing may move.

    Raises:
        InvalidOptionError: no derivative could be taken.
    """
    if not activations and not any(
        init.moves_scale or init.moves_bias or settings.moves_integers(init) for init in inits
    ):
        return None
    before = [init.as_it_is() for init in inits]
    start_square, start_error = learned_errors(samples, before, held_out=False)
    _, start_holdout = learned_errors(samples, before, held_out=True)
    outcome = Outcome(
        weights=before,
        start_error=start_error or 0.0,
        learned_error=start_error or 0.0,
        start_holdout=start_holdout,
        learned_holdout=start_holdout,
        iterations=0,
        scale_factors=[1.0] * activations,
    )
    if not start_square or not isfinite(start_square):
        unknown = [] if isfinite(start_square) else ["the output is no finite number"]
        return replace(outcome, notes=[*_notes(inits, outcome, 0, settings), *unknown])
    network = _Network(samples, inits, activations, settings, start_square)
    made, unreached = network.descend(seed, report)
    after, factors = network.result()
    _, learned_error = learned_errors(samples, after, held_out=False, scale_factors=factors)
    _, learned_holdout = learned_errors(samples, after, held_out=True, scale_factors=factors)
    outcome = replace(
        outcome,
        weights=after,
        learned_error=learned_error or 0.0,
        learned_holdout=learned_holdout,
        iterations=made,
        scale_factors=[float(factor) for factor in factors],
    )
    return replace(outcome, notes=_notes(inits, outcome, unreached, settings))


class _Network:
    """All that is learned of a network.

    Args:
        samples, inits, activations, settings: as for `finetune`.
        start_square: squared error per sample at the start.
    """

    def __init__(
        self,
        samples: Samples,
        inits: Sequence[WeightInit],
        activations: int,
        settings: Finetune,
        start_square: float,
    ) -> None:
        self._samples, self._settings, self._start_square = samples, settings, start_square
        self._iterations = settings.steps(inits)
        moves_bias = any(init.moves_bias for init in inits)
        output_scales = samples.output_scale() if moves_bias else [0.0] * len(inits)
        softs = _softs(samples, inits, settings)
        self._weights = [
            LearnableWeight(init, soft, output_scale, settings.learning_rate)
            for init, soft, output_scale in zip(inits, softs, output_scales, strict=True)
        ]
        self._softs = [soft for soft in softs if soft is not None]
        zeros = torch.zeros(activations, dtype=torch.float32, device="cpu")
        self._logarithms = [zero.clone().requires_grad_() for zero in zeros]

    def _factors(self) -> list[Tensor]:
        return [logarithm.exp() for logarithm in self._logarithms]

    def _loss(self, generator: torch.Generator, progress: float | None) -> Tensor:
        """The error on a minibatch, relative to that of the start."""
        batch = self._samples.draw(generator)
        weights = [one.weight(progress) for one in self._weights]
        outputs = batch.run(weights, [one.correction for one in self._weights], self._factors())
        return squared_error(batch, outputs) / (batch.samples * self._start_square)

    def descend(self, seed: int, report: Callable[[int, float], None] | None) -> tuple[int, int]:
        """Make the steps; how many were made, and how many scales and biases no derivative reaches."""
        processes = self._samples.processes
        # each process draws otherwise
        generator = torch.Generator().manual_seed(seed + processes.rank)
        groups = [group for one in self._weights for group in one.groups]
        if self._logarithms:
            groups.append({"params": self._logarithms, "lr": self._settings.learning_rate})
        reached = groups
        with torch.enable_grad():
            # what lies behind an operator that no derivative goes through, such as a comparison, stays as it is
            if groups:
                reached = _reached(self._loss(torch.Generator().manual_seed(seed), None), groups, processes)
            made = descend_in_turn(
                self._softs,
                reached,
                lambda progress: self._loss(generator, progress),
                replace(_INTEGERS, iterations=self._iterations),
                report=report,
                decay=True,
                error_context=_ERROR_CONTEXT,
                average=partial(processes.averaged, "a step of finetuning"),
            )
        return made, _count(groups) - _count(reached)

    def result(self) -> tuple[list[LearnedWeight], list[Tensor]]:
        """What was learned: weights, and factors of the scales of activations."""
        return [one.result() for one in self._weights], [factor.detach() for factor in self._factors()]


def _notes(inits: Sequence[WeightInit], found: Outcome, unreached: int, settings: Finetune) -> list[str]:
    """What was learned, in words."""
    notes = [
        f"learned: scales of {sum(init.moves_scale for init in inits)} weights, "
        f"{sum(init.moves_bias for init in inits)} biases, step sizes of {len(found.scale_factors)} activations"
    ]
    if unreached:
        notes.append(f"no derivative reaches {unreached} of these")
    movable = [(init, one) for init, one in zip(inits, found.weights, strict=True) if settings.moves_integers(init)]
    if found.better and movable:
        moved = sum(int((init.integers != learned.integers).sum()) for init, learned in movable)
        notes.append(f"{moved} of {sum(init.integers.numel() for init, _ in movable)} integers moved")
    return notes


def _softs(samples: Samples, inits: Sequence[WeightInit], settings: Finetune) -> list[SoftRounding | None]:
    """Soft roundings of the weights whose integers are learned; None for others, or where no derivative reaches."""
    if not any(map(settings.moves_integers, inits)):
        return [None] * len(inits)
    with torch.enable_grad():
        falling = slopes(samples, inits, _ERROR_CONTEXT, unreached=True)
    found: list[SoftRounding | None] = []
    for init, slope in zip(inits, falling, strict=True):
        lower, upper = bracket(init.integers, slope, init.lowest, init.highest)
        moves = settings.moves_integers(init) and bool(slope.any())
        found.append(_INTEGERS.soften(lower, upper, init.integers) if moves else None)
    return found


def _reached(loss: Tensor, groups: list[dict[str, Any]], processes: Processes) -> list[dict[str, Any]]:
    """The parameter groups without the parameters that the loss does not depend on; empty ones are left out.

    Of several processes those are left that it depends on in all of them.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    with taking_derivatives(*_ERROR_CONTEXT):
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    mine = [number for number, gradient in enumerate(gradients) if gradient is not None]
    everywhere = set(mine).intersection(*processes.gathered("what finetuning reaches", mine))
    known = {id(parameters[number]) for number in everywhere}
    kept = [{**group, "params": [one for one in group["params"] if id(one) in known]} for group in groups]
    return [group for group in kept if group["params"]]


def _count(groups: list[dict[str, Any]]) -> int:
    return sum(len(group["params"]) for group in groups)
