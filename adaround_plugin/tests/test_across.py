"""Groups of one row that make up for each other, against sums over all columns and against all integers there are."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adaround_plugin.learning.coupling import solve_across_groups
from adaround_plugin.processes import ALONE
from adaround_plugin.rounding.across import JoinedMoments, joined_problem, put_together, shape_of_sets, take_apart
from adaround_plugin.rounding.hessian import Hessian
from adaround_plugin.rounding.moments import Moments
from adaround_plugin.rounding.problem import RoundingProblem
from adaround_plugin.solvers import GPTQ, Annealing, CoordinateDescent
from adaround_plugin.tests.problems import correlated

COUNT = 60


@dataclass(frozen=True)
class Example:
    """Groups of one row, some sets of them, and the columns that they have seen.

    Attributes:
        x, deviation, column_weight: `(G, n, D)`, `(G, n, 1)` and `(sets, n)` float64.
        sides: `(sets, G / sets, G / sets)`.
        weight, scale: `(G, 1, D)`, the weight in grid coordinates.
        problem: of the groups apart.
    """

    x: Tensor
    deviation: Tensor
    column_weight: Tensor
    sides: Tensor
    weight: Tensor
    scale: Tensor
    problem: RoundingProblem

    @property
    def is_odd(self) -> Tensor:
        """`(n,)`: whether a column's sample is; each has three columns."""
        return torch.arange(COUNT) // 3 % 2 == 1

    @property
    def halves(self) -> JoinedMoments:
        sets, size, _ = self.sides.shape
        found = JoinedMoments((sets, size, size * self.x.shape[2]), self.x.device)
        # what each column counts differs from group to group
        by_group = torch.linspace(0.5, 1.5, size).repeat(sets).unsqueeze(1)
        weight = self.column_weight.repeat_interleave(size, 0).float() * by_group
        for part in (slice(0, 7), slice(7, None)):
            found.add(self.x[:, part].float(), self.deviation[:, part].float(), self.is_odd[part], weight[:, part])
        return found.finish()

    @property
    def moments(self) -> Moments:
        return self.halves.whole

    def joined(self, damping: float = 1e-9, propagate_error: bool = True, correct_bias: bool = True) -> RoundingProblem:
        return joined_problem(
            self.problem,
            self.moments,
            self.sides,
            self.scale,
            damping=damping,
            propagate_error=propagate_error,
            correct_bias=correct_bias,
        )

    def by_definition(self, q: Tensor, propagate_error: bool = True, correct_bias: bool = True) -> Tensor:
        """`(sets,)`: the mean over columns of products of all pairs of outputs' errors, as the sides weigh them."""
        sets = len(self.sides)
        error = self.x @ ((self.weight - q) * self.scale).transpose(1, 2)
        if propagate_error:
            error = error + self.deviation
        error = put_together(error, sets)
        share = (self.column_weight / self.column_weight.sum(1, keepdim=True)).unsqueeze(2)
        if correct_bias:
            error = error - (share * error).sum(1, keepdim=True)
        return torch.einsum("snc,snd,scd->s", share * error, error, self.sides)


def example(seed: int, groups: int = 6, sets: int = 2, columns: int = 3, bits: int = 2) -> Example:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    # inputs of neighbouring groups are alike, and are not centred
    x = (normal(1, COUNT, columns) + 0.7 * normal(groups, COUNT, columns) + 0.5).float().double()
    size = groups // sets
    sides = correlated(sets, size, 3 * size, seed)
    sides = sides / sides.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] + 0.1 * torch.eye(size).double()
    weight = 2 ** (bits - 1) * normal(groups, 1, columns).clamp(-1, 1)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    bound = torch.ones_like(weight, dtype=torch.int64)
    problem = RoundingProblem(
        weight,
        Hessian(correlated(groups, columns, 12, seed)),
        low * bound,
        high * bound,
        weight.round().long().clamp(low, high),
    )
    scale = 0.5 + torch.rand(groups, 1, 1, generator=generator).double().expand(weight.shape)
    return Example(x, 0.3 * normal(groups, COUNT, 1), 0.2 + normal(sets, COUNT).abs(), sides, weight, scale, problem)


def integers(one: Example, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 2, one.weight.shape, generator=generator)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((16, 1, 9), (1, 16, 144)),
        ((384, 1, 9), (4, 96, 864)),
        ((960, 1, 25), (24, 40, 1000)),
        # a prime number of groups that do not fit together
        ((997, 1, 9), None),
        ((4, 2, 9), None),
        ((1, 1, 9), None),
        # two groups are more than a set may have
        ((4, 1, 513), None),
    ],
)
def test_sets_are_as_large_as_may_be_and_alike(shape, expected):
    assert shape_of_sets(*shape) == expected


@given(sets=st.integers(1, 3), size=st.integers(1, 3), count=st.integers(1, 3), width=st.integers(1, 3))
def test_what_is_put_together_comes_apart_again(sets, size, count, width):
    values = torch.arange(sets * size * count * width).reshape(sets * size, count, width)
    together = put_together(values, sets)
    assert together.shape == (sets, count, size * width)
    for group in range(sets * size):
        first = group % size * width
        assert torch.equal(together[group // size, :, first : first + width], values[group])
    assert torch.equal(take_apart(together, sets * size), values)


@given(seed=st.integers(0, 2**31), propagate_error=st.booleans(), correct_bias=st.booleans())
def test_the_loss_is_the_outputs_errors_together(seed, propagate_error, correct_bias):
    one, options = example(seed), {"propagate_error": propagate_error, "correct_bias": correct_bias}
    problem = one.joined(**options)
    a, b = integers(one, seed), integers(one, seed + 1)
    # but for what no integers change
    expected = one.by_definition(a, **options) - one.by_definition(b, **options)
    losses = (problem.loss(put_together(q, len(one.sides))).squeeze(1) for q in (a, b))
    torch.testing.assert_close(next(losses) - next(losses), expected, rtol=1e-3, atol=1e-3)


def test_the_box_and_the_steps_are_those_of_the_groups():
    one = example(0)
    problem, groups = one.joined(), len(one.weight)
    for name in ("lower", "upper", "nearest"):
        assert torch.equal(take_apart(getattr(problem, name), groups), getattr(one.problem, name))
    assert torch.equal(take_apart(problem.step, groups), one.scale)


def test_damping_is_relative_to_each_group_and_constant_ones_stay_where_they_are():
    one = example(3)
    one.x[1] *= 100
    one.x[4] = 0.25
    plain, damped = one.joined(1e-12).hessian.diagonal, one.joined(0.5).hessian.diagonal
    ratio = take_apart((damped / plain).unsqueeze(1), 6).squeeze(1)
    for group in (0, 1, 2, 3, 5):
        own = take_apart(plain.unsqueeze(1), 6)[group, 0]
        torch.testing.assert_close(ratio[group], 1 + 0.5 * own.mean() / own, rtol=1e-6, atol=0)
    side = one.sides[1, 1, 1]
    torch.testing.assert_close(take_apart(damped.unsqueeze(1), 6)[4, 0], side.expand(3), rtol=1e-6, atol=1e-6)
    target = take_apart(one.joined(0.5).target, 6)
    torch.testing.assert_close(target[4], one.weight[4], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(target[0], one.weight[0], rtol=1e-2)


@pytest.mark.parametrize("seed", range(5))
def test_annealing_finds_the_best_of_all_integers(seed):
    one = example(seed, groups=3, sets=1, columns=2)
    problem = one.joined(0.01)
    every = torch.tensor(list(itertools.product(range(-2, 2), repeat=6)))
    losses = torch.stack([problem.loss(q.reshape(1, 1, 6)).squeeze() for q in every])
    found = float(Annealing().solve(problem).loss)
    apart = float(problem.loss(put_together(Annealing().solve(one.problem).integers, 1)))
    assert float(losses.min()) - 1e-9 <= found <= float(losses.min()) * 1.05 + 1e-9
    assert found <= apart


@pytest.mark.parametrize("solver", [Annealing(), GPTQ(), CoordinateDescent()])
def test_no_solver_leaves_more_than_the_start(solver):
    for seed in range(10):
        problem = example(seed).joined(0.01)
        found = solver.solve(problem)
        assert bool((found.loss <= problem.loss(problem.nearest) + 1e-9).all())


@given(seed=st.integers(0, 2**31), correct_bias=st.booleans())
def test_agreement_is_that_of_two_halves_of_the_samples(seed, correct_bias):
    one = example(seed)
    sets, size, _ = one.sides.shape
    x, width = put_together(one.x * one.scale.transpose(1, 2)[:, :1], sets), one.x.shape[2]

    def between(chosen: Tensor) -> Tensor:
        """What the loss has between groups, of some columns, in steps of the grid."""
        part, share = x[:, chosen], one.column_weight[:, chosen]
        share = (share / share.sum(1, keepdim=True)).unsqueeze(2)
        if correct_bias:
            part = part - (share * part).sum(1, keepdim=True)
        second = (share * part).transpose(1, 2) @ part
        found = second.reshape(sets, size, width, size, width) * one.sides[:, :, None, :, None]
        found[:, range(size), :, range(size)] = 0
        return found

    first, second = between(~one.is_odd), between(one.is_odd)
    expected = (first * second).sum() / between(torch.ones(COUNT, dtype=torch.bool)).square().sum()
    found = one.halves.agreement(one.sides, one.scale, correct_bias=correct_bias)
    assert found == pytest.approx(min(1.0, max(0.0, float(expected))), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize(("common", "low", "high"), [(0.0, 0.0, 0.1), (0.35, 0.3, 0.6), (3.0, 0.9, 1.0)])
def test_halves_agree_about_what_groups_have_in_common(common, low, high):
    generator = torch.Generator().manual_seed(0)
    count, groups = 200, 40
    x = common * torch.randn(1, count, 3, generator=generator) + torch.randn(groups, count, 3, generator=generator)
    found = JoinedMoments((1, groups, 3 * groups), x.device)
    found.add(x, torch.zeros(groups, count, 1), torch.arange(count) % 2 == 1)
    sides, scale = torch.ones(1, groups, groups), torch.ones(groups, 1, 3).double()
    agreement = found.finish().agreement(sides, scale, correct_bias=True)
    assert low <= agreement <= high
    # no factor on the hessian is nearer to the true one, by far
    true = (common**2 * torch.eye(3).double()).repeat(groups, groups)
    known = found.whole.hessian[0]
    apart = torch.block_diag(*torch.ones(groups, 3, 3).double()) == 0
    error = [float((factor * known - true)[apart].square().sum()) for factor in (agreement, 0, 1)]
    assert error[0] <= 1.02 * min(error)


def test_one_half_alone_agrees_with_nothing():
    one = JoinedMoments((1, 2, 6), torch.device("cpu"))
    one.add(torch.randn(2, 10, 3), torch.zeros(2, 10, 1), torch.zeros(10, dtype=torch.bool))
    scale = torch.ones(2, 1, 3).double()
    assert one.finish().agreement(torch.ones(1, 2, 2), scale, correct_bias=True) == 0.0


def test_a_dead_channel_makes_up_for_no_other():
    moved = 0
    for seed in range(10):
        one = example(seed, sets=1)
        scale = one.scale.clone()
        scale[2] *= 1e-6
        apart = one.sides.clone()
        apart[:, 2, [0, 1, 3, 4, 5]] = apart[:, [0, 1, 3, 4, 5], 2] = 0
        options = {"damping": 0.01, "propagate_error": True, "correct_bias": True}
        found, expected = (
            solve_across_groups(one.problem, one.halves, sides, scale, GPTQ(), ALONE, **options)
            for sides in (one.sides, apart)
        )
        assert torch.equal(found, expected)
        # the problem itself would move it
        joined = joined_problem(one.problem, one.moments, one.sides, scale, **options)
        moved += not torch.equal(take_apart(GPTQ().solve(joined).integers, 6)[2], expected[2])
    assert moved
