"""The range of an activation at few bits, against every pair of scale and zero point tried one by one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adaround_plugin.rounding.activation_range import min_mse_qparams

BINS = 256


def middles(low: float, high: float, bins: int = BINS) -> Tensor:
    return low + (high - low) / bins * (torch.arange(bins, dtype=torch.float64) + 0.5)


def squared_error(histogram: Tensor, low: float, high: float, scale: Tensor, zero_point: Tensor, top: int) -> Tensor:
    """Of rounding the middle of each bin to the nearest integer in `[0, top]`; of several grids at once."""
    x, scale, zero_point = middles(low, high, len(histogram)), scale[..., None], zero_point[..., None]
    quantized = ((x / scale).round() + zero_point).clamp(0, top)
    return ((quantized - zero_point) * scale - x).square() @ histogram.double()


def error_of(histogram: Tensor, low: float, high: float, found: tuple[float, int], top: int) -> float:
    return float(squared_error(histogram, low, high, *torch.tensor(found, dtype=torch.float64), top))


def brute_force(histogram: Tensor, low: float, high: float, top: int) -> float:
    """Smallest error over scales one percent apart, with every zero point."""
    scales = (max(high, 0.0) - min(low, 0.0)) / top * 0.99 ** torch.arange(501, dtype=torch.float64)
    zero_points = torch.arange(top + 1.0)
    errors = [squared_error(histogram, low, high, part, zero_points, top) for part in scales[:, None].split(50)]
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
