"""What the paper compares its rectified sigmoid with: where shares begin, how they harden, what becomes of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from adaround_plugin.errors import InvalidOptionError
from adaround_plugin.paper.variants import Sigmoid, StraightThrough, Temperature
from adaround_plugin.rounding.soft_rounding import SoftRounding, annealed_beta, regularizer

BETA = (20.0, 2.0)
every_variant = pytest.mark.parametrize("kind", [Sigmoid, Temperature, StraightThrough])


def soft(kind: type[SoftRounding], start=(0.25, 3.5, -1.0), lower=(0, 3, -1), upper=(1, 4, -1)) -> SoftRounding:
    return kind(torch.tensor(lower), torch.tensor(upper), torch.tensor(start, dtype=torch.float64), 0.2, BETA)


def close(values: Tensor, expected: list[float], atol: float) -> bool:
    return torch.allclose(values.detach(), torch.tensor(expected), rtol=0, atol=atol)


@pytest.mark.parametrize("kind", [Sigmoid, Temperature])
def test_shares_begin_where_they_are_told(kind):
    assert close(soft(kind).coordinates(0.0), [0.25, 3.5, -1.0], 2e-3)


@every_variant
def test_integers_are_the_nearer_level(kind):
    assert soft(kind, start=(0.25, 3.6, -1.0)).integers().tolist() == [0, 4, -1]


@every_variant
def test_a_start_outside_the_bounds_begins_at_the_nearer_one(kind):
    rounding = soft(kind, start=(-7.0, 9.0, 0.4))
    assert rounding.integers().tolist() == [0, 4, -1]
    assert close(rounding.coordinates(0.0), [0.0, 4.0, -1.0], 2e-3)


@every_variant
def test_what_is_learned_is_a_leaf_with_a_gradient(kind):
    parameter = soft(kind).parameter
    assert parameter.is_leaf
    assert parameter.requires_grad


@every_variant
def test_only_what_spans_the_grid_takes_more_than_two_levels(kind):
    if kind.spans_grid:
        assert soft(kind, start=(1.6, 3.5, -1.0), upper=(2, 4, -1)).integers()[0] == 2
    else:
        with pytest.raises(InvalidOptionError, match="more than two levels"):
            soft(kind, upper=(2, 4, -1))
    assert kind.spans_grid == (kind is StraightThrough)


def test_temperature_hardens_without_a_regularizer():
    rounding = soft(Temperature, start=(0.3, 3.6, -1.0))
    assert rounding.penalty(0.9) is None
    assert close(rounding.coordinates(1.0), [0.0, 4.0, -1.0], 1e-6)


def test_a_temperature_that_is_still_warm_has_settled_nothing():
    warm = soft(Temperature, start=(0.3, 3.6, -1.0))
    assert not warm.settled(0.0)
    assert warm.settled(1.0)


def test_the_sigmoids_penalty_is_the_mean_over_the_weights():
    rounding = soft(Sigmoid, start=(0.5, 3.5, -1.0))
    assert rounding.penalty(0.1) is None
    # a weight whose bounds are equal has a share too, at an end
    expected = regularizer((rounding.coordinates(0.5) - rounding.lower).detach(), annealed_beta(0.5, 0.2, BETA)).mean()
    assert rounding.penalty(0.5).item() == pytest.approx(float(expected), abs=2e-2)


def test_straight_through_rounds_forward_and_passes_the_gradient():
    rounding = soft(StraightThrough, start=(0.3, 3.6, 5.0), lower=(-2, -2, -2), upper=(4, 4, 4))
    coordinates = rounding.coordinates(0.0)
    assert coordinates.tolist() == [0.0, 4.0, 4.0]
    # clipped coordinates have none
    assert torch.autograd.grad(coordinates.sum(), rounding.parameter)[0].tolist() == [1.0, 1.0, 0.0]
    assert rounding.penalty(0.9) is None
    assert not rounding.settled(1.0)
