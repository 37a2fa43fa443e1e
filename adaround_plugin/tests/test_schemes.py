"""Rounding schemes against their definitions, over every kind of grid."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adaround_plugin.errors import InvalidOptionError
from adaround_plugin.rounding.grid import Grid, GridSpec
from adaround_plugin.rounding.schemes import ceil, floor, get_scheme, nearest, stochastic, up_or_down

NAMES = ("nearest", "floor", "ceil", "stochastic")


@st.composite
def weights(draw: st.DrawFn) -> tuple[Grid, Tensor]:
    """A weight of a convolution, partly outside of its grid: per tensor or channel, symmetric or affine."""
    bits, ch_axis = draw(st.sampled_from([2, 3, 4, 8])), draw(st.sampled_from([None, 0, 1]))
    symmetric, seed = draw(st.booleans()), draw(st.integers(0, 10_000))
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 3, 2, 2, generator=generator)
    shape = () if ch_axis is None else (weight.shape[ch_axis],)
    size = draw(st.sampled_from([1e-6, 0.05, 1.0, 1e4]))
    scale = (0.2 + torch.rand(shape, generator=generator)) * size
    zero_point = torch.zeros(shape) if symmetric else torch.randint(-2, 2, shape, generator=generator)
    grid = GridSpec(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, ch_axis, symmetric, torch.qint8).at(scale, zero_point)
    return grid, weight * 2**bits * size * 0.3


def on_grid(grid: Grid) -> tuple[Tensor, Tensor]:
    """Integers all over the range, and the float32 weight that they stand for."""
    integers = torch.randint(
        grid.quant_min, grid.quant_max + 1, (4, 3, 2, 2), generator=torch.Generator().manual_seed(0)
    )
    return integers, grid.dequantize(integers)


def inside(grid: Grid, weight: Tensor) -> Tensor:
    """Which weights lie between the ends of the grid."""
    coordinates = grid.coordinates(weight)
    return (coordinates >= grid.quant_min) & (coordinates <= grid.quant_max)


@given(weights())
def test_floor_and_ceil_enclose_the_weight_by_one_step(case):
    grid, weight = case
    low, high, real = floor(grid, weight), ceil(grid, weight), grid.coordinates(weight)
    within = inside(grid, weight)
    assert ((low <= real) & (real <= high))[within].all()
    assert (high - low <= 1).all()
    # a whole step apart unless the weight is on the grid, or out of it
    assert ((high - low == 1) | (real == real.round()))[within].all()
    for clipped, end in ((real > grid.quant_max, grid.quant_max), (real < grid.quant_min, grid.quant_min)):
        assert (low[clipped] == end).all()
        assert (high[clipped] == end).all()


@given(weights(), st.sampled_from(NAMES))
def test_every_scheme_gives_integers_inside_the_range(case, name):
    grid, weight = case
    integers = get_scheme(name)(grid, weight)
    assert integers.dtype == torch.int64
    assert integers.shape == weight.shape
    assert integers.min() >= grid.quant_min
    assert integers.max() <= grid.quant_max


@given(weights(), st.sampled_from(NAMES))
def test_a_weight_on_the_grid_stays(case, name):
    integers, weight = on_grid(case[0])
    assert torch.equal(get_scheme(name)(case[0], weight), integers)


@given(weights())
def test_nearest_and_stochastic_are_floor_or_ceil(case):
    grid, weight = case
    low, high = floor(grid, weight), ceil(grid, weight)
    for integers in (nearest(grid, weight), stochastic(grid, weight, torch.Generator().manual_seed(0))):
        assert ((integers == low) | (integers == high)).all()
    assert torch.equal(nearest(grid, weight), grid.nearest(weight))


@given(weights())
def test_stochastic_is_unbiased_inside_the_range(case):
    grid, weight = case
    generator, draws = torch.Generator().manual_seed(0), 100
    total = sum(stochastic(grid, weight, generator) for _ in range(draws))
    real, within = grid.coordinates(weight), inside(grid, weight)
    share = real - real.floor()
    error, variance = (total / draws - real)[within], (share * (1 - share) / draws)[within]
    # six standard deviations, of each weight's mean over the draws and of the sum over the weights
    assert (error.abs() <= 6 * variance.sqrt() + 1 / draws).all()
    assert error.sum().abs() <= 6 * variance.sum().sqrt() + 1e-3


@given(weights())
def test_the_papers_search_space_has_floor_and_the_next_integer(case):
    grid, weight = case
    low, high = up_or_down(grid, weight)
    assert torch.equal(low, floor(grid, weight))
    real = grid.coordinates(weight)
    between = inside(grid, weight) & (real < grid.quant_max)
    assert (high - low == 1)[between & (real != real.round())].all()
    assert (low <= nearest(grid, weight)).all()
    assert (nearest(grid, weight) <= high).all()
    assert high.max() <= grid.quant_max


def test_the_papers_search_space_goes_up_from_a_weight_on_the_grid():
    grid = GridSpec(-8, 7, None, True, torch.qint8).at(torch.tensor(0.5), torch.tensor(0))
    low, high = up_or_down(grid, torch.tensor([1.0, -1.0, 3.5, -9.0]))
    assert low.tolist() == [2, -2, 7, -8]
    assert high.tolist() == [3, -1, 7, -8]


def test_stochastic_goes_on_drawing_from_its_seed():
    grid = GridSpec(-8, 7, None, True, torch.qint8).at(torch.tensor(1.0), torch.tensor(0))
    weight = torch.full((200,), 0.5)
    one, same = get_scheme("stochastic", seed=3), get_scheme("stochastic", seed=3)
    first = one(grid, weight)
    assert torch.equal(first, same(grid, weight))
    assert not torch.equal(first, one(grid, weight))
    assert not torch.equal(first, get_scheme("stochastic", seed=4)(grid, weight))


@pytest.mark.parametrize("scheme", ["up", "", None])
def test_an_unknown_scheme_is_refused_with_those_there_are(scheme):
    with pytest.raises(InvalidOptionError, match=r"scheme.*nearest.*floor.*ceil.*stochastic"):
        get_scheme(scheme)


def test_a_seed_that_is_no_integer_is_refused():
    with pytest.raises(InvalidOptionError, match="seed"):
        get_scheme("stochastic", seed=0.5)
