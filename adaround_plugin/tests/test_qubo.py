"""The binary form has the energy of the rounding problem, bit by bit."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adaround_plugin.errors import InvalidOptionError
from adaround_plugin.rounding.problem import RoundingProblem
from adaround_plugin.rounding.qubo import Qubo, two_levels
from adaround_plugin.tests.problems import CATALOGUE, correlated, definition, make, optimum

every_problem = pytest.mark.parametrize("problem", CATALOGUE.values(), ids=CATALOGUE)


@st.composite
def binary_problems(draw: st.DrawFn) -> RoundingProblem:
    """One or two levels per coordinate, some targets outside of them; with and without a step that varies."""
    groups, rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 8))
    seed = draw(st.integers(0, 10_000))
    problem = make(correlated(groups, columns, 2 * columns, seed), rows, seed, shift=draw(st.sampled_from([0.0, 2.0])))
    low, high = two_levels(problem)
    generator = torch.Generator().manual_seed(seed)
    single = torch.rand(low.shape, generator=generator) < 0.2
    step = 0.1 + torch.rand(low.shape, generator=generator, dtype=torch.float64)
    step = step if draw(st.booleans()) else torch.ones(())
    return replace(problem, lower=low, upper=torch.where(single, low, high), step=step)


def bits_of(problem: RoundingProblem, seed: int) -> Tensor:
    """Random bits for every coordinate."""
    return torch.randint(0, 2, problem.target.shape, generator=torch.Generator().manual_seed(seed)).bool()


@given(binary_problems(), st.integers(0, 100))
def test_the_energy_is_the_loss_of_the_integers(problem, seed):
    qubo, bits = Qubo.of(problem), bits_of(problem, seed)
    integers = qubo.integers(bits)
    assert torch.equal(integers, torch.where(bits, problem.upper, problem.lower))
    scale = definition(problem, problem.lower).abs().max() + definition(problem, problem.upper).abs().max()
    torch.testing.assert_close(qubo.energy(bits), definition(problem, integers), rtol=1e-9, atol=1e-12 * float(scale))


@given(binary_problems(), st.integers(0, 100))
def test_matrix_linear_and_constant_are_the_terms_of_the_energy(problem, seed):
    qubo, bits = Qubo.of(problem), bits_of(problem, seed)
    b = bits.double()
    terms = torch.einsum("grj,grjk,grk->gr", b, qubo.matrix, b) + (b * qubo.linear).sum(-1) + qubo.constant
    scale = qubo.constant.abs().max() + qubo.linear.abs().sum() + qubo.matrix.abs().sum()
    torch.testing.assert_close(qubo.energy(bits), terms, rtol=1e-9, atol=1e-12 * float(scale))


@given(binary_problems())
def test_the_least_energy_is_the_least_loss(problem):
    columns = problem.target.shape[2]
    every = torch.tensor(list(product([0, 1], repeat=columns))).reshape(-1, 1, 1, columns)
    energy = Qubo.of(problem).energy(every.expand(-1, *problem.target.shape))
    assert energy.shape == (2**columns, *problem.target.shape[:2])
    torch.testing.assert_close(energy.amin(0), optimum(problem), rtol=1e-9, atol=1e-9)


def test_a_wider_box_is_refused():
    with pytest.raises(InvalidOptionError, match="more than two levels"):
        Qubo.of(CATALOGUE["correlated"])


@every_problem
def test_two_levels_are_neighbours_inside_the_box(problem):
    low, high = two_levels(problem)
    assert (low >= problem.lower).all()
    assert (high <= problem.upper).all()
    assert torch.equal(high - low, (problem.upper - problem.lower).clamp(max=1))


@every_problem
def test_two_levels_are_those_closest_to_the_target(problem):
    low, high = two_levels(problem)
    inside = problem.clamp(problem.target)
    # what the box has of the target is between them
    assert ((low <= inside) & (inside <= high)).all()


@pytest.mark.parametrize("name", ["two_levels", "up_or_down"])
def test_a_box_of_two_levels_stays_as_it_is(name):
    low, high = two_levels(CATALOGUE[name])
    assert torch.equal(low, CATALOGUE[name].lower)
    assert torch.equal(high, CATALOGUE[name].upper)
