"""Fake quantization with a gradient by the scale, against its definition in float64."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaround_plugin.graph.compat import learnable_fake_quantize


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    scale=st.floats(0.05, 2.0),
    bits=st.integers(2, 8),
    share=st.floats(0, 1),
)
def test_values_and_gradients_are_those_of_lsq(seed, scale, bits, share):
    generator = torch.Generator().manual_seed(seed)
    x = (3 * torch.randn(64, generator=generator)).requires_grad_()
    high = 2**bits - 1
    zero_point = round(share * high)
    s = torch.tensor(scale, requires_grad=True)
    gradient = torch.randn(64, generator=generator)
    y = learnable_fake_quantize(x, s, zero_point, 0, high)
    found = torch.autograd.grad((y * gradient).sum(), (x, s))

    exact, step = x.detach().double(), float(s.detach())
    place = exact / step + zero_point
    # values that sit on a border to within float32 may go either way
    inner = ((place - place.floor() - 0.5).abs() > 1e-3) | (place < -1) | (place > high + 1)
    q = place.round().clamp(0, high)
    torch.testing.assert_close(y.detach().double()[inner], ((q - zero_point) * step)[inner], rtol=1e-5, atol=1e-5)
    inside = (place.round() >= 0) & (place.round() <= high)
    assert torch.equal(found[0][inner], (gradient * inside)[inner])
    slope = torch.where(inside, place.round() - place, q - zero_point)
    expected = float((slope * gradient.double()).sum())
    slack = float(gradient.abs()[~inner].sum()) + 1e-3 * (1 + float((slope * gradient).abs().sum()))
    assert abs(float(found[1]) - expected) <= slack
