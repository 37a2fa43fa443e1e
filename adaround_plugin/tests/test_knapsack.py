"""Choices under a budget, held against every combination."""

from __future__ import annotations

import random
from itertools import product

import pytest

from adaround_plugin.guidance import knapsack
from adaround_plugin.guidance.knapsack import Option, choose


def brute_force(items: list[list[Option]], budget: float) -> tuple[float, float] | None:
    """The least value, and the least cost that it can be had for."""
    totals = [(sum(one.value for one in every), sum(one.cost for one in every)) for every in product(*items)]
    return min((one for one in totals if one[1] <= budget), default=None)


def problem(seed: int, items: int = 5) -> list[list[Option]]:
    """Items whose values fall with their costs, most of the time."""
    draw = random.Random(seed)
    found = []
    for _ in range(items):
        size, scale = draw.randint(1, 40), 10 ** draw.uniform(-3, 3)
        widths = draw.sample((2, 3, 4, 6, 8), draw.randint(1, 5))
        found.append([Option(size * bits, scale * draw.uniform(0.5, 2) * 4.0**-bits) for bits in widths])
    return found


@pytest.mark.parametrize("seed", range(60))
def test_nothing_is_better_within_the_budget(seed: int) -> None:
    items = problem(seed)
    least = sum(min(one.cost for one in options) for options in items)
    most = sum(max(one.cost for one in options) for options in items)
    for share in (0.0, 0.1, 0.35, 0.8, 1.0):
        budget = least + share * (most - least)
        found = choose(items, budget)
        assert found is not None
        chosen = [options[number] for options, number in zip(items, found, strict=True)]
        expected = brute_force(items, budget)
        assert expected is not None
        assert sum(one.cost for one in chosen) <= budget
        assert sum(one.value for one in chosen) == pytest.approx(expected[0], rel=1e-9)


def test_what_cannot_be_paid_is_none() -> None:
    items = problem(0)
    least = sum(min(one.cost for one in options) for options in items)
    assert choose(items, least) is not None
    assert choose(items, least - 1) is None


def test_of_equal_values_the_cheaper_one_is_taken() -> None:
    assert choose([[Option(3, 1.0), Option(2, 1.0), Option(1, 5.0)]], 10) == [1]


def test_a_step_that_does_not_fit_is_made_up_for_by_others() -> None:
    """Steps by their slope alone would buy the first, and have nothing left for both others."""
    items = [[Option(0, 10), Option(6, 0)], [Option(0, 8), Option(5, 0)], [Option(0, 8), Option(5, 0)]]
    assert choose(items, 10) == [0, 1, 1]


def test_of_too_many_partial_choices_the_best_bounds_are_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    items = problem(3, items=60)
    budget = sum(options[0].cost for options in items)
    exact = choose(items, budget)
    monkeypatch.setattr(knapsack, "_MOST_PARTIAL", 3)
    found = choose(items, budget)
    assert exact is not None
    assert found is not None
    values, costs = (
        [
            sum(getattr(options[i], what) for options, i in zip(items, choices, strict=True))
            for choices in (exact, found)
        ]
        for what in ("value", "cost")
    )
    assert costs[1] <= budget
    assert values[0] <= values[1] <= 1.05 * values[0]
