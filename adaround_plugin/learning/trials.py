"""Choosing a recipe: the candidates are tried on part of the data, and judged by the network's output."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from adaround_plugin.hosts.base import Host
from adaround_plugin.learning.layerwise import LayerWise, PendingLayers
from adaround_plugin.learning.methods import Method
from adaround_plugin.learning.passes import Pass
from adaround_plugin.learning.report_builder import ReportBuilder
from adaround_plugin.regions.calibration import Sampling

__all__ = ["choose_recipe"]

# recipes are tried on an eighth of the samples, but on about this many if there are: fewer overfit more than the run
# that follows, and speak against propagated errors
_TRIAL_SHARE, _LEAST_SAMPLES = 8, 128
# columns of a layer: at most this many where they come from many samples, else twice as many
_TRIAL_COLUMNS = 2048
# so few samples need it
_TRIAL_DAMPING = 0.1


def choose_recipe(
    method: Method,
    host: Host,
    arguments: list[list[Any]],
    *,
    excluded: frozenset[str],
    seed: int,
    report: ReportBuilder,
) -> LayerWise:
    """The options of a method's layers, with the recipe that leaves the smallest error of the network's output.

    Recipes are tried by GPTQ, whose rows do not make up for each other.

    Args:
        method: whose recipe may be open.
        host: of the network.
        arguments: of each batch, as the host's graphs take them.
        excluded: names of the weighted nodes that stay nearest.
        seed: of the pass.
        report: takes the trials.
    """
    layers = method.layers
    if method.is_baseline and layers.search_scale == "auto":
        layers = replace(layers, search_scale=False)
    total = Sampling.of(arguments, 0, 1, 0).total
    recipes = layers.recipes(total, method.is_baseline)
    if len(recipes) == 1 or len(excluded) == len(host.nodes):
        return layers.with_recipe(recipes[0])
    report.progress.say("choosing a recipe")
    wanted = max(_LEAST_SAMPLES, total // _TRIAL_SHARE)
    part = arguments[:: max(1, min(total // wanted, len(arguments)))]
    columns = _TRIAL_COLUMNS if total >= _TRIAL_SHARE * _LEAST_SAMPLES else 2 * _TRIAL_COLUMNS
    sampling = Sampling.of(part, layers.holdout, columns, seed)
    runs: list[Pass] = []
    pending = []
    for recipe in recipes:
        tried = replace(recipe, output_hessian=False)
        if layers.damping == "auto":
            tried = replace(tried, damping=_TRIAL_DAMPING)
        beside = runs[0] if runs else None
        options: dict[str, Any] = {"excluded": excluded, "seed": seed, "report": report}
        runs.append(Pass(host, part, sampling, **options, is_trial=True, beside=beside))
        pending.append(PendingLayers(runs[-1], layers.with_recipe(tried)))
    # side by side, so that what they have in common is there for all of them
    while pending[0].pending:
        for one in pending:
            one.decide_next()
        runs[0].forget_float_columns()
    errors = [run.finish() for run in runs]
    for one, error in zip(pending, errors, strict=True):
        report.trial(one.recipe, error)
    return layers.with_recipe(recipes[errors.index(min(errors))])
