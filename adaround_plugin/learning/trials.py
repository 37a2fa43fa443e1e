"""Choosing a recipe: the candidates are tried on part of the data, and judged by the network's output."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from adaround_plugin.hosts.base import Host
from adaround_plugin.learning.layerwise import LayerWise
from adaround_plugin.learning.passes import Pass
from adaround_plugin.learning.report_builder import ReportBuilder
from adaround_plugin.regions.calibration import Sampling
from adaround_plugin.solvers import GPTQ

__all__ = ["choose_recipe"]

# recipes are tried on about this many samples, with at most so many columns a layer
_TRIAL_SAMPLES = 128
_TRIAL_COLUMNS = 4096
# so few samples need it
_TRIAL_DAMPING = 0.1


def choose_recipe(
    layers: LayerWise,
    host: Host,
    arguments: list[list[Any]],
    *,
    excluded: frozenset[str],
    seed: int,
    report: ReportBuilder,
) -> LayerWise:
    """The options with the recipe whose trial by GPTQ leaves the smallest error of the network's output.

    Args:
        layers: the options, of whose recipe some may be open.
        host: of the network.
        arguments: of each batch, as the host's graphs take them.
        excluded: names of the weighted nodes that stay nearest.
        seed: of the pass.
        report: is told of the trials.
    """
    total = Sampling.of(arguments, 0, 1, 0).total
    recipes = layers.recipes(total)
    if len(recipes) == 1 or len(excluded) == len(host.nodes):
        return layers.with_recipe(recipes[0])
    part = arguments[:: max(1, min(total // _TRIAL_SAMPLES, len(arguments)))]
    sampling = Sampling.of(part, layers.holdout, _TRIAL_COLUMNS, seed)
    errors = []
    for recipe in recipes:
        tried = replace(recipe, damping=_TRIAL_DAMPING) if layers.damping == "auto" else recipe
        run = Pass(host, part, sampling, excluded=excluded, seed=seed)
        replace(layers, solver=GPTQ()).with_recipe(tried).learn(run)
        errors.append(run.finish())
        report.trial(tried, errors[-1])
    return layers.with_recipe(recipes[errors.index(min(errors))])
