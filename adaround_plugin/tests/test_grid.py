"""Integers and their real values: against torch's own quantize functions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adaround_plugin.errors import InvalidOptionError
from adaround_plugin.rounding.grid import Grid, GridSpec, check_bits, integer_range

SHAPES = [(6,), (3, 5), (4, 3, 2), (2, 3, 3, 2), (2, 3, 2, 2, 2)]


@st.composite
def grids(draw: st.DrawFn) -> tuple[Grid, Tensor]:
    """A grid of 2 to 8 bits with any scheme, scale and axis, and a weight that partly lies outside its range."""
    bits = draw(st.integers(2, 8))
    low, high = integer_range(bits)
    shape = draw(st.sampled_from(SHAPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    axis = draw(st.none() | st.integers(0, len(shape) - 1))
    symmetric = draw(st.booleans())
    channels = () if axis is None else (shape[axis],)
    scale = torch.rand(channels, generator=generator) * 10.0 ** draw(st.integers(-12, 6)) + 1e-20
    zero_point = torch.zeros(channels) if symmetric else torch.randint(low, high + 1, channels, generator=generator)
    grid = GridSpec(low, high, axis, symmetric, torch.qint8).at(scale, zero_point)
    real = torch.randn(shape, generator=generator, dtype=torch.float64) * draw(st.sampled_from([0.3, 1.0, 30.0])) * high
    return grid, (real * grid.expand(grid.scale, torch.Size(shape))).float()


def by_torch(weight: Tensor, grid: Grid) -> Tensor:
    """The integers torch makes of `weight`, clamped to the range."""
    if grid.ch_axis is None:
        found = torch.quantize_per_tensor(weight, float(grid.scale), int(grid.zero_point), torch.qint8)
    else:
        found = torch.quantize_per_channel(weight, grid.scale, grid.zero_point, grid.ch_axis, torch.qint8)
    return found.int_repr().long().clamp(grid.quant_min, grid.quant_max)


@given(grids())
def test_integers_lie_in_the_range(case):
    grid, weight = case
    q = grid.nearest(weight)
    assert q.dtype == torch.int64
    assert q.shape == weight.shape
    assert q.min() >= grid.quant_min
    assert q.max() <= grid.quant_max


@given(grids())
def test_a_dequantized_weight_quantizes_back_to_the_same_integers(case):
    grid, weight = case
    q = grid.nearest(weight)
    back = grid.dequantize(q)
    assert back.dtype == torch.float32
    assert torch.equal(grid.nearest(back), q)
    assert torch.equal(by_torch(back, grid), q)


@given(grids())
def test_nearest_is_what_torch_quantizes_to(case):
    grid, weight = case
    x = grid.coordinates(weight)
    tie = (x - x.floor() - 0.5).abs() < 1e-3  # torch divides in float32
    assert torch.equal(torch.where(tie, 0, grid.nearest(weight)), torch.where(tie, 0, by_torch(weight, grid)))


@given(grids())
def test_no_grid_point_is_nearer(case):
    grid, weight = case
    levels = torch.arange(grid.quant_min, grid.quant_max + 1).double()
    x = grid.coordinates(weight)
    distance = (x - grid.nearest(weight)).abs()
    assert torch.allclose(distance, (x.unsqueeze(-1) - levels).abs().amin(-1), rtol=0, atol=1e-9)


@given(grids())
def test_coordinates_are_the_inverse_of_dequantize(case):
    grid, weight = case
    q = grid.nearest(weight)
    assert grid.coordinates(weight).dtype == torch.float64
    torch.testing.assert_close(grid.coordinates(grid.dequantize(q)), q.double(), rtol=0, atol=1e-4)


def test_coordinates_are_not_clipped():
    grid = GridSpec(-2, 1, None, False, torch.qint8).at(torch.tensor(0.5), torch.tensor(1))
    assert grid.coordinates(torch.tensor([-5.0, 0.25, 5.0])).tolist() == [-9.0, 1.5, 11.0]


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_channels_follow_the_axis(axis):
    weight = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    spec = GridSpec(-8, 7, axis, True, torch.qint8)
    channels = spec.channels(weight)
    assert channels.shape == (weight.shape[axis], weight.numel() // weight.shape[axis])
    for c in range(weight.shape[axis]):
        assert torch.equal(channels[c].sort()[0], weight.select(axis, c).flatten().sort()[0])
        index = torch.arange(weight.shape[axis])
        assert (spec.expand(index, weight.shape).select(axis, c) == c).all()


def test_per_tensor_is_one_channel():
    spec = GridSpec(-8, 7, None, True, torch.qint8)
    assert spec.channels(torch.zeros(2, 3, 4)).shape == (1, 24)
    assert spec.per_channel(torch.zeros(1)).shape == ()
    assert spec.expand(torch.tensor(2.0), torch.Size((2, 3))).tolist() == [[2.0] * 3] * 2


@pytest.mark.parametrize(
    ("axis", "symmetric", "scheme"),
    [
        (None, True, torch.per_tensor_symmetric),
        (None, False, torch.per_tensor_affine),
        (1, True, torch.per_channel_symmetric),
        (1, False, torch.per_channel_affine),
    ],
)
def test_qscheme_is_torch_s_name(axis, symmetric, scheme):
    assert GridSpec(-8, 7, axis, symmetric, torch.qint8).qscheme == scheme


@pytest.mark.parametrize("bits", range(2, 9))
def test_bits_and_range_belong_together(bits):
    low, high = integer_range(bits)
    assert high - low + 1 == 2**bits
    assert low == -high - 1
    assert GridSpec(low, high, None, True, torch.qint8).bits == bits
    assert GridSpec(low + 1, high, None, True, torch.qint8).bits == bits
    assert check_bits(bits) == bits


@pytest.mark.parametrize("bits", [1, 9, 0, -4, 4.0, True, "4", None])
def test_bits_out_of_range_are_refused(bits):
    with pytest.raises(InvalidOptionError, match=r"weight_bits.*from 2 to 8"):
        check_bits(bits, "weight_bits")
    with pytest.raises(InvalidOptionError, match="bits"):
        integer_range(bits)


@pytest.mark.parametrize("columns", [8, 10, 3, 4])
def test_groups_of_a_row_have_a_scale_each(columns):
    weight = torch.randn(5, columns, generator=torch.Generator().manual_seed(0))
    spec = GridSpec(-8, 7, 0, True, torch.int8, group_size=4)
    laid = spec.channels(weight)
    count = -(-columns // 4)
    assert laid.shape == (5 * count, 4)
    scale = 0.05 + torch.rand(5 * count, generator=torch.Generator().manual_seed(1))
    grid = spec.at(scale, torch.zeros(5 * count))
    q = grid.nearest(weight)
    for r in range(5):
        for j in range(columns):
            step = scale[r * count + j // 4]
            assert q[r, j] == (weight[r, j].double() / step.double()).round().clamp(-8, 7)
            assert laid[r * count + j // 4, j % 4] == weight[r, j]
    assert torch.equal(grid.nearest(grid.dequantize(q)), q)


def test_scales_are_rounded_to_the_dtype_that_the_host_stores():
    spec = GridSpec(-8, 7, 0, True, torch.int8, scale_dtype=torch.float16)
    scale = torch.tensor([0.1, 1e-12, 3.3333])
    grid = spec.at(scale, torch.zeros(3))
    assert grid.scale.dtype == torch.float32
    assert torch.equal(grid.scale, grid.scale.half().float())
    assert (grid.scale > 0).all()
    torch.testing.assert_close(grid.scale[[0, 2]], scale[[0, 2]], rtol=5e-4, atol=0)
