"""The choice of a scale under the layer's hessian: searched, and fitted to integers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adaround_plugin.learning.scale_search import SearchedRows, refit_group_scale, refit_scale, search_grid
from adaround_plugin.rounding.grid import Grid, GridSpec, integer_range
from adaround_plugin.rounding.hessian import Hessian
from adaround_plugin.rounding.problem import RoundingProblem
from adaround_plugin.rounding.ranges import min_mse_grid
from adaround_plugin.solvers import GPTQ
from adaround_plugin.solvers.gptq import round_in_order
from adaround_plugin.tests.problems import correlated


def normal(seed: int) -> Tensor:
    return torch.randn(5, 16, generator=torch.Generator().manual_seed(seed))


def layer(seed: int, bits: int, axis: int | None = 0, symmetric: bool = True) -> tuple[Grid, Tensor, Tensor, Hessian]:
    """A linear layer: starting grid, channel of each row, target in weight units, hessian."""
    weight = normal(seed).double()
    grid = min_mse_grid(weight, GridSpec(*integer_range(bits), axis, symmetric, torch.qint8))
    channel = torch.zeros(1, 5, dtype=torch.int64) if axis is None else torch.arange(5)[None]
    hessian = Hessian.damped(correlated(1, 16, 60, seed % 1000), 0.01)
    return grid, channel, (weight + 0.1 * normal(seed + 1))[None], hessian


def problem_on(grid: Grid, target: Tensor, hessian: Hessian) -> RoundingProblem:
    coordinates = grid.coordinates(target[0])[None]
    low = torch.full_like(coordinates, grid.quant_min).long()
    high = torch.full_like(low, grid.quant_max)
    return RoundingProblem(coordinates, hessian, low, high, grid.nearest(target[0])[None])


def loss_of(grid: Grid, integers: Tensor, target: Tensor, hessian: Hessian, channel: Tensor) -> Tensor:
    """The loss in weight units, per channel of the grid."""
    loss = hessian.quadratic(grid.dequantize(integers[0]).double()[None] - target)
    return torch.zeros(grid.scale.numel(), dtype=torch.float64).index_add_(0, channel[0], loss[0])


cases = st.tuples(st.integers(0, 2**31 - 2), st.integers(2, 8), st.sampled_from([None, 0]), st.booleans())


@given(cases)
def test_refitting_never_increases_the_loss(case):
    grid, channel, target, hessian = layer(*case)
    q = GPTQ().solve(problem_on(grid, target, hessian)).integers
    refitted = refit_scale(grid, channel, hessian, target, q)
    before, after = (loss_of(at, q, target, hessian, channel) for at in (grid, refitted))
    # float32 holds the scale to 6e-8 of it, and the loss is flat around its minimum
    assert (after <= before * (1 + 1e-6) + 1e-12).all()
    assert torch.equal(refitted.zero_point, grid.zero_point)


@given(cases, st.sampled_from([0.99, 1.01]))
def test_no_other_scale_is_better_than_the_refitted(case, factor):
    grid, channel, target, hessian = layer(*case)
    q = GPTQ().solve(problem_on(grid, target, hessian)).integers
    refitted = refit_scale(grid, channel, hessian, target, q)
    other = grid.at(refitted.scale * factor, grid.zero_point)
    best, worse = (loss_of(at, q, target, hessian, channel) for at in (refitted, other))
    assert (best < worse).all()


def test_integers_that_represent_nothing_keep_their_scale():
    grid, channel, target, hessian = layer(0, 4)
    q = GPTQ().solve(problem_on(grid, target, hessian)).integers
    q[0, 1] = 0  # nothing to scale
    q[0, 2] = -q[0, 2]  # the best scale would be negative
    refitted = refit_scale(grid, channel, hessian, target, q)
    assert (refitted.scale == grid.scale).tolist() == [False, True, True, False, False]


@given(cases)
def test_the_searched_grid_is_no_worse_than_the_starting_one(case):
    grid, channel, target, hessian = layer(*case)
    found = search_grid(grid, SearchedRows(target, hessian, channel))

    def loss(at: Grid) -> Tensor:
        q, _ = round_on(at, target, hessian)
        return loss_of(at, q, target, hessian, channel)

    assert (loss(found) <= loss(grid) * (1 + 1e-3)).all()
    ratio = found.scale / grid.scale
    assert ((ratio > 0.59) & (ratio < 1.21)).all()
    assert ((found.zero_point >= grid.quant_min) & (found.zero_point <= grid.quant_max)).all()
    assert not grid.symmetric or (found.zero_point == 0).all()


def round_on(grid: Grid, target: Tensor, hessian: Hessian) -> tuple[Tensor, Tensor]:
    """One pass of error feedback, without the guard that falls back to nearest."""
    return round_in_order(problem_on(grid, target, hessian))


@pytest.mark.parametrize(("bits", "symmetric"), [(2, True), (2, False), (3, True)])
def test_searching_pays_at_few_bits(bits, symmetric):
    before = after = 0.0
    for seed in range(8):
        grid, channel, target, hessian = layer(seed, bits, 0, symmetric)
        found = search_grid(grid, SearchedRows(target, hessian, channel))
        for at in (grid, found):
            loss = float(loss_of(at, round_on(at, target, hessian)[0], target, hessian, channel).sum())
            before, after = (before + loss, after) if at is grid else (before, after + loss)
    assert after < 0.9 * before


def test_the_search_is_the_same_when_candidates_do_not_fit_together(monkeypatch):
    grid, channel, target, hessian = layer(3, 3, 0, False)
    whole = search_grid(grid, SearchedRows(target, hessian, channel))
    monkeypatch.setattr("adaround_plugin.learning.scale_search._ELEMENTS", 2 * target.numel())
    parts = search_grid(grid, SearchedRows(target, hessian, channel))
    assert torch.equal(whole.scale, parts.scale)
    assert torch.equal(whole.zero_point, parts.zero_point)


@given(st.integers(0, 2**31 - 2))
def test_what_the_order_of_sums_leaves_decides_nothing(seed):
    """Integers that move along with a zero point leave the same error."""
    grid, channel, target, hessian = layer(seed, 3, symmetric=False)
    noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(seed)).double()
    found, other = (
        search_grid(grid, SearchedRows(one, hessian, channel)) for one in (target, target * (1 + 1e-7 * noise))
    )
    assert torch.equal(found.scale, other.scale)
    assert torch.equal(found.zero_point, other.zero_point)


@pytest.mark.parametrize("size", [4, 5, 6, 12])
def test_no_other_scales_of_the_groups_fit_the_integers_better(size):
    generator = torch.Generator().manual_seed(size)
    weight = torch.randn(8, 12, generator=generator)
    grid = min_mse_grid(weight, GridSpec(-4, 3, 0, True, torch.int8, group_size=size))
    hessian = Hessian.damped(correlated(1, 12, 60, 0), 0.01)
    integers = grid.nearest(weight)

    def loss(at):
        return hessian.quadratic((at.dequantize(integers).double() - weight.double())[None])[0]

    fitted = refit_group_scale(grid, hessian, weight.double()[None], integers[None])
    refitted = (fitted.scale != grid.scale).reshape(8, -1).all(1)
    assert refitted.sum() >= 4
    assert (loss(fitted)[refitted] < loss(grid)[refitted]).all()
    assert torch.equal(loss(fitted)[~refitted], loss(grid)[~refitted])
    for i in range(grid.scale.numel()):
        for factor in (0.99, 1.01):
            moved = fitted.scale.clone()
            moved[i] *= factor
            assert (loss(fitted.at(moved, fitted.zero_point)) >= loss(fitted) * (1 - 1e-6))[refitted].all()


def test_a_group_without_any_step_keeps_its_scale():
    weight = torch.tensor([[0.0, 0.0, 1.0, -2.0]])
    grid = GridSpec(-4, 3, 0, True, torch.int8, group_size=2).at(torch.tensor([0.7, 0.7]), torch.zeros(2))
    hessian = Hessian.damped(correlated(1, 4, 60, 0), 0.01)
    fitted = refit_group_scale(grid, hessian, weight.double()[None], grid.nearest(weight)[None])
    assert fitted.scale[0] == grid.scale[0]
    assert fitted.scale[1] != grid.scale[1]


@pytest.mark.parametrize("size", [4, 5, 16])
@pytest.mark.parametrize("up_or_down", [False, True])
def test_runs_of_columns_are_judged_each_by_its_own_share_of_the_hessian(size, up_or_down):
    weight, target = normal(0), (normal(0) + 0.1 * normal(1)).double()[None]
    hessian = Hessian.damped(correlated(1, 16, 60, 0), 0.01)
    grid = min_mse_grid(weight, GridSpec(-4, 3, 0, True, torch.int8, group_size=size))
    channel = torch.arange(5)[None]
    rows = SearchedRows(target, hessian, channel, weight[None] if up_or_down else None).in_runs(size)
    found = rows.errors([grid, grid.at(0.8 * grid.scale, grid.zero_point)]).reshape(2, 5, -1)
    for which, factor in enumerate((1.0, 0.8)):
        for g in range(found.shape[2]):
            run = slice(g * size, (g + 1) * size)
            scale = factor * grid.scale.reshape(5, -1)[None, :, g, None].double()
            # the share as a matrix of its own, which is damped already
            share = Hessian.damped(hessian.matrix[:, run, run], 1e-12)
            loss = judged(target[:, :, run], weight[None, :, run] if up_or_down else None, share, scale, -4, 3)
            torch.testing.assert_close(found[which, :, g], loss[0], rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("axis", "symmetric"), [(0, True), (0, False), (None, False)])
def test_only_floor_and_ceil_are_judged_where_they_alone_may_be_taken(seed, bits, axis, symmetric):
    grid, channel, target, hessian = layer(seed, bits, axis, symmetric)
    weight = normal(seed)[None]
    found = SearchedRows(target, hessian, channel, weight).errors([grid])[0]
    scale, zero_point = (values.reshape(-1)[channel].unsqueeze(-1) for values in (grid.scale, grid.zero_point))
    loss = judged(target, weight, hessian, scale.double(), grid.quant_min, grid.quant_max, zero_point)
    expected = torch.zeros_like(found).index_add_(0, channel[0], loss[0])
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=1e-6)


def judged(
    target: Tensor,
    weight: Tensor | None,
    hessian: Hessian,
    scale: Tensor,
    low: int,
    high: int,
    zero_point: Tensor | int = 0,
) -> Tensor:
    """`(G, R)`: what one pass of error feedback loses in weight units, in float64 by its definition.

    Column after column is rounded where the loss would be smallest if those to come could take any value.
    """
    shift = torch.as_tensor(zero_point).expand_as(target).long()
    lower, upper = torch.full_like(shift, low), torch.full_like(shift, high)
    if weight is not None:
        below = (weight.double() / scale).floor().long() + shift
        lower, upper = below.clamp(low, high), (below + 1).clamp(low, high)
    error = torch.zeros_like(target)
    for g, matrix in enumerate(hessian.matrix):
        order = hessian.order[g]
        for place, j in enumerate(order):
            seen, ahead = order[: place + 1], order[place + 1 :]
            coupled = matrix[ahead][:, seen]
            left = matrix[seen][:, seen] - coupled.T @ torch.linalg.solve(matrix[ahead][:, ahead], coupled)
            wanted = target[g, :, j] - error[g][:, seen[:-1]] @ left[-1, :-1] / left[-1, -1]
            integers = (wanted / scale[g, :, 0]).round().long() + shift[g, :, j]
            integers = integers.clamp(lower[g, :, j], upper[g, :, j])
            error[g, :, j] = (integers - shift[g, :, j]) * scale[g, :, 0] - target[g, :, j]
    return hessian.quadratic(error)
