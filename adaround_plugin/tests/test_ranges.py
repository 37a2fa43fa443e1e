"""Grids from values alone: of weights by their range or squared error, of activations by that of their histogram."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adaround_plugin.rounding.grid import Grid, GridSpec, integer_range
from adaround_plugin.rounding.ranges import min_max_grid, min_mse_grid, min_mse_qparams

BINS = 256


def spec(bits: int, axis: int | None = 0, symmetric: bool = True) -> GridSpec:
    return GridSpec(*integer_range(bits), axis, symmetric, torch.qint8)


def normal(*shape: int, seed: int = 0, shift: float = 0.0) -> Tensor:
    return shift + torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weight_error(weight: Tensor, grid: Grid) -> Tensor:
    """Squared error per channel."""
    return grid.channels((grid.dequantize(grid.nearest(weight)) - weight).double().square()).sum(1)


specs = st.builds(spec, st.integers(2, 8), st.sampled_from([None, 0, 1]), st.booleans())
weights = st.builds(
    lambda seed, exponent, shift: 10.0**exponent * normal(4, 30, seed=seed, shift=shift),
    st.integers(0, 2**31),
    st.integers(-12, 12),
    st.sampled_from([-5.0, -1.0, 0.0, 1.0, 5.0]),
)


@given(weights, specs)
def test_min_max_clips_nothing(weight, of):
    grid = min_max_grid(weight, of)
    x = grid.coordinates(weight)
    # a zero point is an integer: an affine grid may miss an end by half a step, to which it still rounds
    slack = 1e-4 if of.symmetric else 0.5 + 1e-4
    assert x.min() >= of.quant_min - slack
    assert x.max() <= of.quant_max + slack


@given(weights, specs)
def test_min_max_wastes_nothing(weight, of):
    grid = min_max_grid(weight, of)
    channels = of.channels(grid.coordinates(weight))
    low, high = channels.amin(1), channels.amax(1)
    zero_point = grid.zero_point.reshape(-1)
    if of.symmetric:
        assert torch.maximum(high / of.quant_max, low / of.quant_min).allclose(torch.ones(()).double(), atol=1e-4)
    else:
        span = torch.maximum(high, zero_point) - torch.minimum(low, zero_point)
        assert span.allclose(torch.tensor(of.quant_max - of.quant_min).double(), atol=1e-3)


@given(weights, specs, st.sampled_from([min_max_grid, min_mse_grid]))
def test_a_grid_is_what_hosts_accept(weight, of, choose):
    grid = choose(weight, of)
    channels = () if of.ch_axis is None else (weight.shape[of.ch_axis],)
    assert grid.scale.shape == grid.zero_point.shape == channels
    assert grid.scale.dtype == torch.float32
    assert grid.zero_point.dtype == torch.int64
    assert (grid.scale > 0).all()
    assert ((grid.zero_point >= of.quant_min) & (grid.zero_point <= of.quant_max)).all()
    assert not of.symmetric or (grid.zero_point == 0).all()


@given(weights, specs)
def test_min_mse_is_never_worse_than_min_max(weight, of):
    best, widest = weight_error(weight, min_mse_grid(weight, of)), weight_error(weight, min_max_grid(weight, of))
    assert (best <= widest * (1 + 1e-5)).all()


@pytest.mark.parametrize(("bits", "share"), [(2, 1.02), (3, 1.02), (4, 1.02), (8, 1.1)])
@pytest.mark.parametrize("heavy_tails", [False, True])
def test_min_mse_is_close_to_a_fine_scan(bits, share, heavy_tails):
    weight = normal(6, 300, seed=bits)
    if heavy_tails:
        weight = weight * weight.abs()
    of = spec(bits)
    best = weight_error(weight, min_mse_grid(weight, of))
    widest = min_max_grid(weight, of)
    scan = [weight_error(weight, of.at(widest.scale * i / 3000, widest.zero_point)) for i in range(150, 3300, 5)]
    assert (best <= torch.stack(scan).amin(0) * share).all()


def one_by_one(weight: Tensor, of: GridSpec) -> Tensor:
    """Least squared error per channel over the candidates, each tried by itself in float64."""
    channels = of.channels(weight)
    low, high = torch.aminmax(channels, dim=1)

    def error(ratio: Tensor) -> Tensor:
        ends = torch.stack([low * ratio, high * ratio], 1)
        return weight_error(weight, min_max_grid(ends if of.ch_axis == 0 else ends.reshape(-1), of))

    best, least = torch.ones_like(low), torch.full_like(low, float("inf")).double()
    for fan in ([-0.015 * i for i in range(60)], [0.015 * i / 8 for i in range(-7, 8)]):
        around = best
        for offset in fan:
            tried = error(around + offset)
            best = torch.where(tried < least, around + offset, best)
            least = torch.minimum(tried, least)
    return least


@pytest.mark.parametrize("axis", [0, None])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", [(3, 9), (40, 700), (2, 9000)])
def test_min_mse_tries_all_candidates_however_large_the_weight_is(shape, symmetric, axis):
    # more than one part, more than one run, and a channel that is alone in its part
    weight = normal(*shape, shift=0.3)
    of = spec(4, axis, symmetric)
    found = weight_error(weight, min_mse_grid(weight, of))
    torch.testing.assert_close(found, one_by_one(weight, of), rtol=1e-5, atol=0)


def test_min_mse_shrinks_the_range_of_few_bits():
    weight = normal(4, 500)
    assert (min_mse_grid(weight, spec(2)).scale < 0.7 * min_max_grid(weight, spec(2)).scale).all()


@given(st.integers(2, 8), st.sampled_from([None, 0]), st.booleans(), st.sampled_from([min_max_grid, min_mse_grid]))
def test_all_zero_channels_have_scale_one_and_stay_zero(bits, axis, symmetric, choose):
    weight = torch.zeros(3, 8)
    if axis == 0:
        weight[1] = normal(8)
    grid = choose(weight, spec(bits, axis, symmetric))
    empty = torch.tensor([True, axis is None, True])
    assert (grid.expand(grid.scale, weight.shape)[empty] == 1).all()
    q = grid.nearest(weight)
    assert torch.equal(q[empty], grid.expand(grid.zero_point, weight.shape)[empty])
    assert (grid.dequantize(q)[empty] == 0).all()


@given(
    st.integers(2, 8), st.booleans(), st.sampled_from([-3.0, 1e-10, 0.7]), st.sampled_from([min_max_grid, min_mse_grid])
)
def test_constant_weights_are_represented_exactly(bits, symmetric, value, choose):
    weight = torch.full((2, 5), value)
    grid = choose(weight, spec(bits, 0, symmetric))
    torch.testing.assert_close(grid.dequantize(grid.nearest(weight)), weight, rtol=1e-5, atol=0)


@pytest.mark.parametrize("choose", [min_max_grid, min_mse_grid])
def test_channels_do_not_influence_one_another(choose):
    weight = torch.stack([normal(20), 1e4 * normal(20, seed=1)])
    together, alone = choose(weight, spec(4)), choose(weight[:1], spec(4))
    assert together.scale[0] == alone.scale[0]


# --- activations: every pair of scale and zero point tried one by one


def middles(low: float, high: float, bins: int = BINS) -> Tensor:
    return low + (high - low) / bins * (torch.arange(bins, dtype=torch.float64) + 0.5)


def histogram_error(histogram: Tensor, low: float, high: float, scale: Tensor, zero_point: Tensor, top: int) -> Tensor:
    """Of rounding the middle of each bin to the nearest integer in `[0, top]`; of several grids at once."""
    x, scale, zero_point = middles(low, high, len(histogram)), scale[..., None], zero_point[..., None]
    quantized = ((x / scale).round() + zero_point).clamp(0, top)
    return ((quantized - zero_point) * scale - x).square() @ histogram.double()


def error_of(histogram: Tensor, low: float, high: float, found: tuple[float, int], top: int) -> float:
    return float(histogram_error(histogram, low, high, *torch.tensor(found, dtype=torch.float64), top))


def brute_force(histogram: Tensor, low: float, high: float, top: int) -> float:
    """Smallest error over scales one percent apart, with every zero point."""
    scales = (max(high, 0.0) - min(low, 0.0)) / top * 0.99 ** torch.arange(501, dtype=torch.float64)
    zero_points = torch.arange(top + 1.0)
    errors = [histogram_error(histogram, low, high, part, zero_points, top) for part in scales[:, None].split(50)]
    return float(torch.cat(errors).min())


def counts(seed: int, kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.linspace(-4, 4, BINS)
    noise = torch.rand(BINS, generator=generator)
    return {
        "flat": noise.round(decimals=1) * 50,
        "bell": (1000 * torch.exp(-x.square()) * noise).round(),
        "tail": (1e5 * torch.exp(-2 * (x + 4)) * noise).round() + 1,
        "sparse": (noise > 0.97).float() * 7 + (noise == noise.max()),
    }[kind]


histograms = st.builds(counts, st.integers(0, 2**31), st.sampled_from(["flat", "bell", "tail", "sparse"]))
ends = st.tuples(
    st.sampled_from([-5.0, -1.0, -0.01, 0.0, 0.5]), st.sampled_from([0.6, 1.0, 30.0]), st.integers(-6, 6)
).map(lambda drawn: (drawn[0] * 10.0 ** drawn[2], drawn[1] * 10.0 ** drawn[2]))


@pytest.mark.parametrize("mirrored", [False, True])
@settings(max_examples=20)
@given(histograms, ends, st.sampled_from([2, 3, 4]))
def test_no_grid_is_better(mirrored, histogram, range_, bits):
    low, high = range_
    if mirrored:
        histogram, low, high = histogram.flip(0), -high, -low
    top = 2**bits - 1
    grid = min_mse_qparams(histogram, low, high, 0, top)
    assert 0 <= grid[1] <= top
    found = error_of(histogram, low, high, grid, top)
    assert found == pytest.approx(brute_force(histogram, low, high, top), rel=1e-6, abs=1e-9 * (high - low) ** 2)


@settings(max_examples=12)
@given(histograms, ends, st.integers(2, 8))
def test_it_is_never_worse_than_the_range_that_clips_nothing(histogram, range_, bits):
    low, high = range_
    top = 2**bits - 1
    widest = (max(high, 0.0) - min(low, 0.0)) / top
    plain = error_of(histogram, low, high, (widest, round(-min(low, 0.0) / widest)), top)
    found = error_of(histogram, low, high, min_mse_qparams(histogram, low, high, 0, top), top)
    assert found <= plain + 1e-9 * float(histogram.sum()) * widest**2


@settings(max_examples=6)
@given(histograms, ends, st.integers(2, 6), st.sampled_from([-100, -7, 3]))
def test_an_offset_of_the_integers_moves_the_zero_point(histogram, range_, bits, offset):
    top = 2**bits - 1
    scale, zero_point = min_mse_qparams(histogram, *range_, 0, top)
    assert min_mse_qparams(histogram, *range_, offset, top + offset) == (scale, zero_point + offset)


@settings(max_examples=12)
@given(histograms, st.integers(2, 8))
def test_values_on_one_side_of_zero_use_every_level(histogram, bits):
    top = 2**bits - 1
    assert min_mse_qparams(histogram, 0.0, 3.0, 0, top)[1] == 0
    assert min_mse_qparams(histogram, -3.0, 0.0, 0, top)[1] == top


def test_rare_outliers_are_clipped():
    histogram = torch.ones(2048) * 1e-3
    histogram[:64] = 1000.0
    scale, _ = min_mse_qparams(histogram, 0.0, 32.0, 0, 15)
    assert 1.0 / 15 <= scale <= 2.0 / 15


@pytest.mark.parametrize("value", [-2.0, 3.0])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_constant_is_met_exactly(value, bits):
    scale, zero_point = min_mse_qparams(torch.tensor([0.0, 9.0, 0.0]), value, value, 0, 2**bits - 1)
    integer = round(value / scale) + zero_point
    assert 0 <= integer < 2**bits
    assert (integer - zero_point) * scale == pytest.approx(value)


def test_zeros_have_no_scale():
    assert min_mse_qparams(torch.ones(4), 0.0, 0.0, 0, 15) == (0.0, 0)
