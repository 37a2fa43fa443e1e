"""The cross-entropy method on its own ground: two levels per weight, against all roundings of small problems."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from adaround_plugin.errors import InvalidOptionError
from adaround_plugin.paper import cross_entropy
from adaround_plugin.paper.cross_entropy import CrossEntropy
from adaround_plugin.rounding.hessian import Hessian
from adaround_plugin.rounding.problem import RoundingProblem
from adaround_plugin.rounding.qubo import two_levels
from adaround_plugin.tests.problems import CATALOGUE, correlated, make, optimum

SMALL = range(24)
THOROUGH = CrossEntropy(samples=4096, smoothing=0.2)


def two_level_problem(seed: int, columns: int | None = None) -> RoundingProblem:
    """Four rows of 4 to 10 columns, floor and ceil of a weight; every third has a step that varies."""
    columns = 4 + seed % 7 if columns is None else columns
    problem = make(correlated(1, columns, 3 * columns, seed), 4, seed, shift=0.4)
    generator = torch.Generator().manual_seed(seed)
    low = (problem.nearest - torch.randint(0, 2, problem.nearest.shape, generator=generator)).clamp(-8, 7)
    high = torch.minimum(low + 1, torch.tensor(7))
    step = 0.3 + torch.rand(problem.target.shape, generator=generator, dtype=torch.float64)
    return replace(problem, lower=low, upper=high, step=torch.ones(()) if seed % 3 else step)


def hits(solver: CrossEntropy) -> float:
    """Share of the rows of the small problems that are at the optimum over all their roundings."""
    found = [solver.solve(problem).loss <= optimum(problem) * (1 + 1e-9) for problem in map(two_level_problem, SMALL)]
    return float(torch.cat(found, 1).double().mean())


def restricted(problem: RoundingProblem) -> RoundingProblem:
    """The same problem with the two levels that are closest to the target, and the better of them as nearest."""
    low, high = two_levels(problem)
    return replace(problem, lower=low, upper=high, nearest=torch.where(problem.target - low < 0.5, low, high))


def test_it_is_at_the_optimum_of_small_problems():
    assert hits(CrossEntropy()) > 0.95  # measured: 0.990


def test_more_samples_find_more_optima():
    # measured: 0.77 and 0.990
    assert hits(CrossEntropy(samples=16, elite=0.2)) + 0.1 < hits(CrossEntropy())


def test_it_finds_the_best_of_all_roundings_of_a_problem_without_a_factor():
    # indefinite: the loss has no minimum over the reals, only over the box
    problem = two_level_problem(4, columns=8)
    matrix = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    problem = replace(problem, hessian=Hessian(matrix + matrix.transpose(1, 2)))
    best = optimum(problem)
    assert (best < 0).all()
    torch.testing.assert_close(THOROUGH.solve(problem).loss, best, rtol=1e-9, atol=0)


def test_a_wider_box_is_searched_at_floor_and_ceil_of_the_target():
    problem = make(correlated(1, 8, 24, 1), 5, 1, shift=0.5)
    assert (problem.upper - problem.lower > 1).all()
    found = THOROUGH.solve(problem)
    nearest = problem.loss(problem.nearest)
    torch.testing.assert_close(found.loss, torch.minimum(nearest, optimum(restricted(problem))), rtol=1e-9, atol=0)


def test_a_target_on_the_grid_may_still_be_rounded_away_from():
    # only the sum counts, and 0.4 too much is better than 0.6 too little, which is all that the others allow
    target = torch.tensor([[[3.0, 0.6]]], dtype=torch.float64)
    matrix = torch.tensor([[[1.0, 0.99], [0.99, 1.0]]], dtype=torch.float64)
    low = torch.tensor([[[3, 0]]])
    problem = RoundingProblem(target, Hessian(matrix), low, low + torch.tensor([1, 0]), low)
    assert CrossEntropy().solve(problem).integers.tolist() == [[[4, 0]]]


@pytest.mark.parametrize("name", ["grouped", "step_varies_in_groups", "depthwise", "up_or_down"])
def test_the_answer_does_not_depend_on_how_many_rows_fit_in_memory(name, monkeypatch):
    whole = CrossEntropy(samples=64).solve(CATALOGUE[name]).integers
    monkeypatch.setattr(cross_entropy, "_ENTRIES", 1)
    assert torch.equal(CrossEntropy(samples=64).solve(CATALOGUE[name]).integers, whole)


def test_the_seed_decides():
    problem = CATALOGUE["wider_than_a_block"]
    one, same, other = (CrossEntropy(samples=32, seed=seed).solve(problem).integers for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_no_global_random_number_is_drawn():
    before = torch.random.get_rng_state()
    CrossEntropy(samples=8).solve(CATALOGUE["up_or_down"])
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    "setting",
    [
        *({"samples": 0}, {"samples": 1.5}, {"iterations": 0}, {"elite": 0.0}, {"elite": 1.1}),
        *({"smoothing": 0.0}, {"smoothing": 2.0}, {"seed": 0.5}),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(InvalidOptionError, match=f"{next(iter(setting))}: "):
        CrossEntropy(**setting)
