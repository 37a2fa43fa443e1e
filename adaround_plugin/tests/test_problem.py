"""The rounding problem: its loss, and the problems that are parts of it or put together from it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adaround_plugin.errors import InvalidOptionError, NonFiniteError
from adaround_plugin.rounding.hessian import Hessian
from adaround_plugin.rounding.problem import Rounding, RoundingProblem
from adaround_plugin.tests.problems import CATALOGUE, correlated, definition, make

FIELDS = ("target", "lower", "upper", "nearest", "step")


@st.composite
def problems(draw: st.DrawFn, size: int | None = None) -> RoundingProblem:
    """Some groups, rows and columns, with a step that varies along rows, by runs of `size` columns if given."""
    groups, rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 13))
    seed = draw(st.integers(0, 10_000))
    problem = make(correlated(groups, columns, 2 * columns, seed), rows, seed)
    run = size or draw(st.integers(1, columns))
    generator = torch.Generator().manual_seed(seed)
    step = 0.2 + torch.rand(groups, rows, -(-columns // run), generator=generator, dtype=torch.float64)
    return replace(problem, step=step.repeat_interleave(run, 2)[..., :columns])


def drawn(problem: RoundingProblem, seed: int = 0) -> Tensor:
    """Integers anywhere in the box."""
    share = torch.rand(problem.target.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (problem.lower + share * (problem.upper - problem.lower + 1)).long().minimum(problem.upper)


@given(problems())
def test_the_loss_is_that_of_the_definition(problem):
    q = drawn(problem)
    torch.testing.assert_close(problem.loss(q), definition(problem, q), rtol=1e-9, atol=0)


@pytest.mark.parametrize("step", [None, torch.tensor(0.5), torch.full((5, 1), 0.5), torch.full((1, 5, 12), 0.5)])
def test_the_step_is_one_unless_given_and_broadcasts(step):
    problem = make(correlated(1, 12, 30, 0), 5, 0)
    found = problem if step is None else replace(problem, step=step)
    assert found.step.shape == problem.target.shape
    q = drawn(problem)
    torch.testing.assert_close(found.loss(q), problem.loss(q) * (1.0 if step is None else 0.25))


@given(problems())
def test_map_takes_every_tensor_along(problem):
    order = torch.randperm(problem.target.shape[2], generator=torch.Generator().manual_seed(0))
    matrix = problem.hessian.matrix[:, order][:, :, order]
    found = problem.map(lambda values: values[..., order], Hessian(matrix))
    q = drawn(problem)
    torch.testing.assert_close(found.loss(q[..., order]), problem.loss(q), rtol=1e-9, atol=1e-9)
    for field in FIELDS:
        assert torch.equal(getattr(found, field), getattr(problem, field)[..., order])


@given(problems(), st.integers(0, 2), st.integers(0, 3), st.integers(1, 4))
def test_a_part_has_the_loss_of_its_rows(problem, group, row, count):
    groups, rows = slice(group, group + 1), slice(row, row + count)
    if not problem.target[groups, rows].numel():
        return
    found, q = problem.part(groups, rows), drawn(problem)
    torch.testing.assert_close(found.loss(q[groups, rows]), problem.loss(q)[groups, rows], rtol=1e-9, atol=1e-12)
    for field in FIELDS:
        assert torch.equal(getattr(found, field), getattr(problem, field)[groups, rows])


def test_clamp_keeps_the_type_and_the_box():
    problem = CATALOGUE["targets_outside_the_range"]
    for values in (problem.target, problem.target.long()):
        found = problem.clamp(values)
        assert found.dtype == values.dtype
        assert ((found >= problem.lower) & (found <= problem.upper)).all()


def test_best_of_prefers_nearest_then_the_first_on_ties():
    one = torch.ones(1, 2, 1, dtype=torch.int64)
    target = torch.full((1, 2, 1), 0.5, dtype=torch.float64)
    problem = RoundingProblem(target, Hessian(torch.ones(1, 1, 1).double()), 0 * one, one, one)
    assert torch.equal(problem.best_of(0 * one).integers, one)
    assert isinstance(problem.best_of(), Rounding)


def test_best_of_chooses_row_by_row():
    target = torch.tensor([[[0.1, 0.1], [0.9, 0.9]]], dtype=torch.float64)
    zero, one = torch.zeros(1, 2, 2, dtype=torch.int64), torch.ones(1, 2, 2, dtype=torch.int64)
    nearest = torch.tensor([[[0, 1], [1, 0]]])
    problem = RoundingProblem(target, Hessian(torch.eye(2).double()[None]), zero, one, nearest)
    assert problem.best_of(zero, one).integers.tolist() == [[[0, 0], [1, 1]]]


def test_a_hessian_that_does_not_fit_is_refused():
    problem = CATALOGUE["correlated"]
    with pytest.raises(InvalidOptionError, match="does not fit a target of shape"):
        RoundingProblem(problem.target[..., 1:], problem.hessian, problem.lower, problem.upper, problem.nearest)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_target_that_is_not_finite_is_refused(value):
    target = CATALOGUE["correlated"].target.clone()
    target[0, 1, 2] = value
    with pytest.raises(NonFiniteError, match="target"):
        replace(CATALOGUE["correlated"], target=target)
