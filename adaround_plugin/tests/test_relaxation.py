"""The relaxation as a solver of the rounding problem, and its settings."""

from __future__ import annotations

from dataclasses import replace

import pytest

from adaround_plugin.errors import InvalidOptionError
from adaround_plugin.rounding.soft_rounding import VARIANTS
from adaround_plugin.solvers import Annealing, Nearest, Relaxation, get_solver
from adaround_plugin.tests.problems import CATALOGUE, optimum, small_problem

FAST = Relaxation(data="moments", iterations=400, learning_rate=2e-2)


def test_relaxation_comes_close_to_the_optimum_of_all_roundings():
    best = nearest = found = 0.0
    for seed in range(12):
        problem = small_problem(seed)
        best += float(optimum(problem).sum())
        nearest += float(problem.loss(problem.nearest).sum())
        found += float(FAST.solve(problem).loss.sum())
    # measured: 0.1 of the way from the optimum to nearest; three levels of which two are searched are among these
    assert 0 <= (found - best) / (nearest - best) < 0.25


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_row_is_above_its_start(variant):
    problem = CATALOGUE["correlated"]
    found = replace(FAST, variant=variant, start=Annealing(), iterations=60).solve(problem)
    assert (found.loss <= Annealing().solve(problem).loss).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_better_than_nearest_by_far(variant):
    problem = CATALOGUE["correlated"]
    loss = replace(FAST, variant=variant).solve(problem).loss.sum()
    assert loss < 0.6 * Nearest().solve(problem).loss.sum()


def test_the_name_means_the_paper_s_settings():
    settings = get_solver("relaxation")
    assert settings == Relaxation()
    assert (settings.iterations, settings.batch_size, settings.warm_up) == (10_000, 32, 0.2)
    assert (settings.beta, settings.learning_rate, settings.start) == ((20.0, 2.0), 1e-3, None)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"iterations": 0}, "iterations"),
        ({"batch_size": 1.5}, "batch_size"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"regularization": -1.0}, "regularization"),
        ({"warm_up": 1.0}, "warm_up"),
        ({"drop": 1.0}, "drop"),
        ({"beta": (20.0, 0.0)}, "beta"),
        ({"variant": "soft"}, "variant"),
        ({"data": "all"}, "data"),
        ({"data": "moments", "fisher": True}, "data"),
        ({"start": "annealing"}, "start"),
    ],
)
def test_bad_settings_are_refused_by_name(options, named):
    with pytest.raises(InvalidOptionError, match=rf"Relaxation\.{named}"):
        Relaxation(**options)
