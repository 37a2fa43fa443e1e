"""The relaxation's mathematics, against equations 22 to 24 as the paper prints them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaround_plugin.errors import InvalidOptionError
from adaround_plugin.rounding.soft_rounding import (
    RectifiedSigmoid,
    annealed_beta,
    bracket,
    inverse_rectified_sigmoid,
    rectified_sigmoid,
    regularizer,
)

BETA = (20.0, 2.0)
shares = st.floats(0, 1)


def soft(start=(0.25, 3.5, -1.0), lower=(0, 3, -1), upper=(1, 4, -1)) -> RectifiedSigmoid:
    begin = torch.tensor(start, dtype=torch.float64)
    return RectifiedSigmoid(torch.tensor(lower), torch.tensor(upper), begin, 0.2, BETA)


@given(st.floats(-20, 20))
def test_rectified_sigmoid_is_equation_23(v):
    expected = min(1.0, max(0.0, 1.2 / (1 + math.exp(-v)) - 0.1))
    assert float(rectified_sigmoid(torch.tensor(v, dtype=torch.float64))) == pytest.approx(expected, abs=1e-12)


@given(shares)
def test_inverse_gives_back_the_share(share):
    v = inverse_rectified_sigmoid(torch.tensor(share, dtype=torch.float64))
    assert float(rectified_sigmoid(v)) == pytest.approx(share, abs=1e-12)


@given(shares, st.floats(1, 30))
def test_regularizer_is_the_summand_of_equation_24(share, beta):
    value = float(regularizer(torch.tensor(share, dtype=torch.float64), beta))
    assert value == pytest.approx(1 - abs(2 * share - 1) ** beta, abs=1e-12)
    assert -1e-12 <= value <= 1 + 1e-12


def test_beta_is_off_in_warm_up_and_then_falls_from_first_to_last():
    assert annealed_beta(0.19, 0.2, BETA) is None
    assert annealed_beta(0.2, 0.2, BETA) == pytest.approx(20)
    assert annealed_beta(1.0, 0.2, BETA) == pytest.approx(2)
    found = [annealed_beta(0.2 + 0.8 * i / 50, 0.2, BETA) for i in range(51)]
    assert found == sorted(found, reverse=True)


def test_shares_begin_where_they_are_told():
    coordinates = soft().coordinates(0.0).detach()
    assert torch.allclose(coordinates, torch.tensor([0.25, 3.5, -1.0]), atol=2e-3)


def test_integers_are_the_nearer_level():
    assert soft(start=(0.25, 3.6, -1.0)).integers().tolist() == [0, 4, -1]
    assert soft(start=(-7.0, 9.0, 0.4)).integers().tolist() == [0, 4, -1]


def test_a_start_at_an_integer_is_that_integer_and_can_leave_it():
    rounding = soft(start=(0.0, 4.0, -1.0))
    coordinates = rounding.coordinates(0.0)
    assert torch.allclose(coordinates.detach(), torch.tensor([0.0, 4.0, -1.0]), atol=1e-3)
    gradient = torch.autograd.grad(coordinates.sum(), rounding.parameter)[0]
    # the share that is to grow must have a gradient; equal bounds have none
    assert gradient[0] > 0
    assert gradient[2] == 0


def test_penalty_is_the_mean_over_the_weights():
    rounding = soft(start=(0.5, 3.5, -1.0))
    assert rounding.penalty(0.1) is None
    # a weight whose bounds are equal has a share too, at an end
    expected = regularizer((rounding.coordinates(0.5) - rounding.lower).detach(), annealed_beta(0.5, 0.2, BETA)).mean()
    assert rounding.penalty(0.5).item() == pytest.approx(float(expected), abs=2e-2)


def test_settled_says_whether_every_share_is_at_an_end():
    assert not soft().settled(0.5)
    hard = soft(start=(0.0, 4.0, -1.0))
    assert not hard.settled(0.5)
    with torch.no_grad():
        hard.parameter.copy_(torch.tensor([-3.0, 3.0, 0.0]))
    assert hard.settled(0.5)


@given(st.lists(st.tuples(st.integers(-8, 7), st.floats(-1, 1)), min_size=1, max_size=20))
def test_bracket_holds_the_integer_and_the_neighbour_downhill(pairs):
    integers = torch.tensor([q for q, _ in pairs])
    slope = torch.tensor([g for _, g in pairs], dtype=torch.float64)
    lowest, highest = torch.full_like(integers, -8), torch.full_like(integers, 7)
    lower, upper = bracket(integers, slope, lowest, highest)
    for q, g, low, high in zip(integers.tolist(), slope.tolist(), lower.tolist(), upper.tolist(), strict=True):
        wanted = (q - 1, q) if g > 0 else (q, q + 1)
        assert (low, high) == (max(wanted[0], -8), min(wanted[1], 7))


@pytest.mark.parametrize("upper", [(2, 4, -1), (-1, 4, -1)])
def test_bounds_that_are_not_two_levels_are_refused(upper):
    with pytest.raises(InvalidOptionError, match="more than two levels"):
        soft(upper=upper)
