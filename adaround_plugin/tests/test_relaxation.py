"""The relaxation as a solver of the rounding problem, and its settings."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from adaround_plugin.errors import InvalidOptionError
from adaround_plugin.paper.variants import Sigmoid, StraightThrough, Temperature
from adaround_plugin.rounding.hessian import Hessian
from adaround_plugin.rounding.problem import RoundingProblem
from adaround_plugin.rounding.soft_rounding import RectifiedSigmoid
from adaround_plugin.solvers import Annealing, Nearest, Relaxation, get_solver
from adaround_plugin.solvers.relaxation import Schedule
from adaround_plugin.tests.problems import CATALOGUE, optimum, small_problem

FAST = Relaxation(iterations=400, learning_rate=2e-2)

every_variant = pytest.mark.parametrize("kind", [RectifiedSigmoid, Sigmoid, Temperature, StraightThrough])


def together(problems: list[RoundingProblem]) -> RoundingProblem:
    """Problems of one size as one of several groups: so many steps are made once."""
    hessian = Hessian(torch.cat([problem.hessian.matrix for problem in problems]))
    names = ("target", "lower", "upper", "nearest", "step")
    return RoundingProblem(
        hessian=hessian, **{name: torch.cat([getattr(problem, name) for problem in problems]) for name in names}
    )


def test_relaxation_comes_close_to_the_optimum_of_all_roundings():
    best = nearest = found = 0.0
    for first in range(4):
        # every fourth has as many columns
        problem = together([small_problem(seed) for seed in range(first, 16, 4)])
        best += float(optimum(problem).sum())
        nearest += float(problem.loss(problem.nearest).sum())
        found += float(FAST.solve(problem).loss.sum())
    # measured: 0.1 of the way from the optimum to nearest; three levels of which two are searched are among these
    assert 0 <= (found - best) / (nearest - best) < 0.25


@every_variant
def test_no_row_is_above_its_start(kind):
    problem = CATALOGUE["correlated"]
    found = replace(FAST, soft_rounding=kind, start=Annealing(), iterations=60).solve(problem)
    assert (found.loss <= Annealing().solve(problem).loss).all()


@every_variant
def test_every_variant_is_better_than_nearest_by_far(kind):
    problem = CATALOGUE["correlated"]
    loss = replace(FAST, soft_rounding=kind).solve(problem).loss.sum()
    assert loss < 0.6 * Nearest().solve(problem).loss.sum()


def test_the_name_means_the_paper_s_settings():
    settings = get_solver("relaxation")
    assert settings == Relaxation()
    assert (settings.iterations, settings.warm_up, settings.beta) == (10_000, 0.2, (20.0, 2.0))
    assert (settings.learning_rate, settings.start, settings.soft_rounding) == (1e-3, None, RectifiedSigmoid)


@pytest.mark.parametrize("kind", [Schedule, Relaxation])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("iterations", value) for value in (0, 1.5, True)),
        *(("learning_rate", value) for value in (0.0, -1.0, "a", float("nan"))),
        *(("regularization", value) for value in (-1.0, float("inf"), None)),
        *(("warm_up", value) for value in (-0.1, 1.0, "a")),
        *(("soft_rounding", value) for value in ("sigmoid", None, int)),
        *(("beta", value) for value in ((20.0, 0.0), (20.0,), 20.0, "ab", ("a", 2.0))),
    ],
)
def test_bad_settings_are_refused_by_name(kind, field, value):
    with pytest.raises(InvalidOptionError) as caught:
        kind(**{field: value})
    assert caught.value.subject == f"{kind.__name__}.{field}"


@pytest.mark.parametrize("start", ["annealing", Annealing, 3])
def test_a_start_that_is_no_solver_is_refused(start):
    with pytest.raises(InvalidOptionError, match=r"Relaxation\.start"):
        Relaxation(start=start)


def test_targets_outside_of_two_levels_leave_both_open():
    """As where roundings are up or down, and the target makes up for what came before."""
    best = found = nearest = 0.0
    for seed in range(6):
        problem = small_problem(seed)
        target = problem.target + 2 * (
            torch.rand(problem.target.shape, generator=torch.Generator().manual_seed(seed)) - 0.5
        )
        lower = problem.target.floor().long().clamp(problem.lower, problem.upper - 1)
        moved = replace(problem, target=target, lower=lower, upper=lower + 1)
        moved = replace(moved, nearest=moved.clamp(target.round()).long())
        best += float(optimum(moved).sum())
        nearest += float(moved.loss(moved.nearest).sum())
        found += float(FAST.solve(moved).loss.sum())
    assert 0 <= (found - best) / (nearest - best) < 0.25
