"""Choosing a recipe: the candidates are tried on part of the data, and judged by the network's output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite, sqrt
from typing import Any

import torch
from torch import Tensor

from adaround_plugin.errors import InvalidOptionError
from adaround_plugin.graph.memory import Memory
from adaround_plugin.hosts.base import Host, open_streams
from adaround_plugin.learning.checkpoint import Checkpoint
from adaround_plugin.learning.layer import Recipe
from adaround_plugin.learning.layerwise import LayerWise, PendingLayers
from adaround_plugin.learning.methods import Method
from adaround_plugin.learning.output_error import OutputError
from adaround_plugin.learning.passes import Pass
from adaround_plugin.learning.report_builder import ReportBuilder
from adaround_plugin.learning.shared import Shared
from adaround_plugin.regions.batches import Batches, sizes_of
from adaround_plugin.regions.calibration import Sampling
from adaround_plugin.regions.importance import sensitivities
from adaround_plugin.regions.pieces import is_separable, piece, takes_one
from adaround_plugin.regions.shards import spread_over
from adaround_plugin.report import RecipeTrial

__all__ = ["NO_MASSIVE", "choose_recipe"]

# why a recipe is not tried
NO_MASSIVE = "no layer's input has massive activations"

# recipes learn from an eighth of the samples, but from about this many if there are: fewer overfit more than the run
# that follows. As many again judge; a quarter does where there are fewer
_TRIAL_SHARE, _LEAST_SAMPLES = 8, 128
# columns of a layer: at most this many where they come from many samples, else twice as many; or so many for a weight
# of a row
_TRIAL_COLUMNS, _PER_WEIGHT = 2048, 2
# so few samples need it
_TRIAL_DAMPING = 0.1
# by so much another recipe must be ahead of columns that count unlike: trials of few samples may be too hard on these
_FAVOUR = 0.15
# a layer has massive activations where a smaller share of its columns counts; without any it was 0.4 or more
_MASSIVE = 0.1
# a recipe must be better than the first by so many standard deviations, and is in doubt up to there
_SURE = 1.0


def choose_recipe(
    method: Method,
    host: Host,
    arguments: Sequence[list[Any]],
    sampling: Sampling,
    *,
    excluded: frozenset[str],
    report: ReportBuilder,
    checkpoint: Checkpoint,
    memory: Memory,
) -> LayerWise:
    """The options of a method's layers, with a recipe for what is open.

    Recipes are tried on samples from all batches, by GPTQ, whose rows do not make up for each other. The first is taken
    unless another is clearly better. What needs derivatives that cannot be taken is left out, and reported.

    Args:
        method: whose recipe may be open.
        host: of the network.
        arguments: of each batch, as the host's graphs take them.
        sampling: of these batches, and of those of other processes: all make the same trials, on samples of all.
        excluded: names of the weighted nodes that stay nearest.
        report: takes the trials.
        checkpoint: keeps the choice.
        memory: where values are kept.

    Raises:
        InvalidOptionError: an option that is not open asks for derivatives that cannot be taken.
    """
    layers = method.layers
    if method.is_baseline and layers.search_scale == "auto":
        layers = replace(layers, search_scale=False)
    recipes = layers.recipes(method.is_baseline)
    if len(excluded) == len(host.nodes):
        return layers.with_recipe(recipes[-1])

    def choose() -> _Chosen:
        trials = _Trials(layers, host, arguments, sampling, excluded, report, memory)
        return _Chosen(_best(layers, recipes, trials, report), report.trials)

    chosen = checkpoint.decide("recipe", "", _Chosen, choose)
    report.trials = chosen.trials
    return layers.with_recipe(chosen.recipe)


@dataclass(frozen=True)
class _Chosen:
    """The recipe that was chosen, and those that were tried."""

    recipe: Recipe
    trials: list[RecipeTrial]


def _best(layers: LayerWise, recipes: list[Recipe], trials: _Trials, report: ReportBuilder) -> Recipe:
    """The recipe that is taken."""
    without = layers.without_derivatives(recipes)
    if without != recipes and (problem := trials.problem_of_derivatives()) is not None:
        for recipe in recipes:
            if recipe not in without:
                report.trial(recipe, None, problem)
        recipes = without
    if len(recipes) > 1:
        return trials.best(recipes)
    return recipes[0]


class _Trials:
    """Passes over part of the samples, from all batches.

    Args:
        layers: the options, of which a recipe takes some.
        host, arguments, sampling, excluded, report, memory: as of `choose_recipe`.
    """

    def __init__(
        self,
        layers: LayerWise,
        host: Host,
        arguments: Sequence[list[Any]],
        sampling: Sampling,
        excluded: frozenset[str],
        report: ReportBuilder,
        memory: Memory,
    ) -> None:
        self._layers, self._host, self._arguments = layers, host, arguments
        self._excluded, self._seed, self._mask, self._report = excluded, sampling.seed, sampling.mask, report
        self._shared, self._memory = Shared(), memory
        self._processes = processes = sampling.processes
        learned = max(_LEAST_SAMPLES, sampling.total // _TRIAL_SHARE)
        self._total, largest = sampling.total, sampling.size[sampling.largest]
        self._size = max(processes.gathered("the largest batch", largest))
        self._wanted, self._holdout = (2 * learned, 0.5) if sampling.total >= 2 * learned else (sampling.total, 0.25)
        self._columns = _TRIAL_COLUMNS if sampling.total >= _TRIAL_SHARE * _LEAST_SAMPLES else 2 * _TRIAL_COLUMNS
        if self._wanted < self._size and host.batch_size is None:
            stream, _ = open_streams(host)
            apart = is_separable(stream, stream.bind(arguments[sampling.largest]), largest)
            if processes.agree("whether samples can be told apart", apart):
                self._size = self._wanted

    def _part(self, offset: float = 0.5) -> Batches:
        part = spread_over(self._processes, self._arguments, self._wanted, self._size, offset)
        return Batches.of(part, self._memory)

    def problem_of_derivatives(self) -> str | None:
        """Why the network's output has no derivatives, if it has none."""
        found = self._processes.gathered("whether there are derivatives", self._own_problem_of_derivatives())
        return next((problem for problem in found if problem is not None), None)

    def _own_problem_of_derivatives(self) -> str | None:
        stream, _ = open_streams(self._host)
        whole = stream.bind(self._arguments[0])
        length = sizes_of(self._arguments)[0]
        # operators that have no derivative have none of one sample either
        size = 1 if self._host.batch_size is None and takes_one(stream, whole, length) else length
        try:
            sampling = Sampling((0,), (size,), 0, 1, 0)
            sensitivities(stream, self._host.nodes, sampling, 0, piece(whole, length, 0, size))
        except InvalidOptionError as error:
            return error.problem
        return None

    def best(self, recipes: Sequence[Recipe]) -> Recipe:
        """The first of two or more, or the best of those that are clearly better.

        The second best is tried again on other samples if that is in doubt, and there are as many.
        """
        tried = self._tried(recipes)
        first, *others = tried
        second = max(others, key=lambda one: one.margin(first), default=first)
        others_left = self._total >= 2 * len(first.errors[0].samples)
        doubtful = bool(others and others_left and abs(second.margin(first)) < _SURE * second.deviation(first))
        if self._processes.shared("whether trials are in doubt", doubtful):
            again = self._errors([first.recipe, second.recipe], offset=0.0)
            first.errors.append(again[0])
            second.errors.append(again[1])
        for one in tried:
            self._report.trial(one.recipe, one.predicted if isfinite(one.predicted) else None)
        known = [one.recipe for one in tried]
        for recipe in recipes:
            if recipe not in known:
                self._report.trial(recipe, None, NO_MASSIVE)
        better = [one for one in others if one.margin(first) > _SURE * one.deviation(first)]
        return max(better, key=lambda one: one.margin(first), default=first).recipe

    def _tried(self, recipes: Sequence[Recipe]) -> list[_Tried]:
        """The recipes with what they lead to; those against massive activations where there are any."""
        against = [
            one
            for one in recipes
            if one.column_weighting == "inverse_norm" and replace(one, column_weighting="none") in recipes
        ]
        always = [one for one in recipes if one not in against]
        errors = self._errors(always)
        if self._processes.shared("whether activations are massive", self._shared.least_share < _MASSIVE):
            always, errors = always + against, errors + self._errors(against)
        return [_Tried(recipe, [error], self._total) for recipe, error in zip(always, errors, strict=True)]

    def _errors(self, recipes: Sequence[Recipe], offset: float = 0.5) -> list[OutputError]:
        """What recipes lead to on one part of the samples."""
        part = self._part(offset)
        sampling = Sampling.of(part, self._holdout, self._columns, self._seed, _PER_WEIGHT, self._mask)
        trials: list[tuple[Pass, PendingLayers]] = []
        for recipe in recipes:
            tried = replace(recipe, output_hessian=False)
            if self._layers.damping == "auto":
                tried = replace(tried, damping=_TRIAL_DAMPING)
            run = Pass(
                self._host,
                part,
                sampling,
                memory=self._memory,
                excluded=self._excluded,
                seed=self._seed,
                report=self._report,
                shared=self._shared,
                beside=trials[0][0] if trials else None,
            )
            trials.append((run, PendingLayers(run, self._layers.with_recipe(tried))))
        progress, total = self._report.progress, sum(len(pending.pending) for _, pending in trials)
        progress.stage("choosing a recipe", total)
        # side by side, so that what they have in common is there for all of them
        while trials[0][1].pending:
            for _, pending in trials:
                pending.decide_next()
                progress.move(total - sum(len(one.pending) for _, one in trials))
            self._shared.end_step()
        return [run.finish() for run, _ in trials]


@dataclass(frozen=True)
class _Tried:
    """A recipe, and the errors that it left in its trials.

    Of a least-squares fit of `d` numbers to `n` samples the error is `e (1 - d / n)` on these and `e (1 + d / n)` on
    others (Akaike 1970, "Statistical predictor identification"): both together tell the error on others after learning
    from `total` samples.

    Attributes:
        recipe: that was tried.
        errors: of each trial.
        total: number of samples of the run that is to follow.
    """

    recipe: Recipe
    errors: list[OutputError]
    total: int

    @property
    def share(self) -> float:
        """Of the samples of the run, that a trial learned from."""
        return min(1.0, int((~self.errors[0].held_out).sum()) / self.total)

    def parts(self, rounds: int | None = None) -> list[tuple[float, Tensor]]:
        """What the mean errors of held-out and of learning samples count in the prediction, and these errors.

        Of the first trials, or of all of them.
        """
        held = torch.cat([error.samples[error.held_out] for error in self.errors[:rounds]])
        learned = torch.cat([error.samples[~error.held_out] for error in self.errors[:rounds]])
        # a lone sample cannot be held out
        return [((1 + self.share) / 2, held if len(held) else learned), ((1 - self.share) / 2, learned)]

    def predicted_by(self, rounds: int) -> float:
        """The error of the run by the first trials, infinite where it is no number."""
        found = sum(count * float(errors.mean()) for count, errors in self.parts(rounds))
        return found if isfinite(found) else inf

    @property
    def predicted(self) -> float:
        """The error of the run by all trials."""
        return self.predicted_by(len(self.errors))

    def _in_common(self, first: _Tried) -> int:
        return min(len(self.errors), len(first.errors))

    def margin(self, first: _Tried) -> float:
        """By how much this is predicted to be better than the first, which trials may be too hard on.

        Both by the trials that they have in common.
        """
        favour = _FAVOUR * (1 - first.share) if first.recipe.column_weighting == "fisher" else 0.0
        rounds = self._in_common(first)
        if first.predicted_by(rounds) == inf:
            return 0.0 if self.predicted_by(rounds) == inf else inf
        return (1 - favour) * first.predicted_by(rounds) - self.predicted_by(rounds)

    def deviation(self, first: _Tried) -> float:
        """Standard deviation of the difference of the predictions, as it comes from the choice of samples."""
        variance, rounds = 0.0, self._in_common(first)
        for (count, ours), (_, theirs) in zip(self.parts(rounds), first.parts(rounds), strict=True):
            if len(ours) > 1:
                variance += count**2 * float((ours - theirs).var()) / len(ours)
        return sqrt(variance) if isfinite(variance) else 0.0
