"""Checks of what a user sets: what passes, what is refused, and that the error names the argument."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from adaround_plugin.errors import InvalidOptionError
from adaround_plugin.options import (
    check_bool,
    check_choice,
    check_integer,
    check_mapping,
    check_number,
    check_seed,
    check_solver,
    named,
)
from adaround_plugin.paper.cross_entropy import CrossEntropy
from adaround_plugin.solvers import Annealing, Nearest

NAN, INF = float("nan"), float("inf")


def refused(check: Any, value: Any, *args: Any, **limits: Any) -> str:
    """What the error says, once it has named its argument and the value."""
    with pytest.raises(InvalidOptionError) as caught:
        check("some.argument", value, *args, **limits)
    assert caught.value.subject == "some.argument"
    assert repr(value) in caught.value.problem
    return caught.value.remedy


@pytest.mark.parametrize(("value", "least"), [(0, None), (-5, None), (1, 1), (7, 1), (0, 0), (2**40, 1)])
def test_integers_pass(value, least):
    check_integer("argument", value, least)


@pytest.mark.parametrize("value", [1.0, True, False, "1", None, [1], 1j, NAN, torch.tensor(1)])
def test_what_is_no_integer_is_refused(value):
    for least in (None, 0):
        assert "integer" in refused(check_integer, value, least)


@pytest.mark.parametrize(("value", "least"), [(0, 1), (-1, 0), (4, 5)])
def test_integers_that_are_too_small_are_refused_with_the_least(value, least):
    assert f"at least {least}" in refused(check_integer, value, least)
    check_integer("argument", value)


def test_integers_that_are_too_large_are_refused_with_the_most():
    assert "at most 4" in refused(check_integer, 5, 0, 4)
    check_integer("argument", 4, 0, 4)


@pytest.mark.parametrize("value", [0, 7, -3, 2**62, -(2**62)])
def test_seeds_pass_that_a_generator_takes(value):
    check_seed("argument", value)
    torch.Generator().manual_seed(value)


@pytest.mark.parametrize("value", [2**70, -(2**70), "x", 1.0, None, True])
def test_other_seeds_are_refused(value):
    refused(check_seed, value)


@pytest.mark.parametrize("value", [{}, {"a": 1}])
def test_mappings_by_names_pass(value):
    check_mapping("argument", value)


@pytest.mark.parametrize("value", [[("a", 1)], "a", 3, None, {1: "a"}, {"a"}])
def test_what_is_no_mapping_by_names_is_refused(value):
    assert "dict" in refused(check_mapping, value)


@pytest.mark.parametrize(
    ("value", "limits"),
    [
        (0, {}),
        (-1e300, {}),
        (0.0, {"least": 0}),
        (1, {"above": 0}),
        (1e-9, {"above": 0}),
        (0.5, {"least": 0, "most": 0.5}),
        (0.999, {"least": 0, "below": 1}),
        (3, {"above": 2, "below": 4}),
    ],
)
def test_numbers_pass(value, limits):
    check_number("argument", value, **limits)


@pytest.mark.parametrize(
    ("value", "limits", "wanted"),
    [
        (-1e-9, {"least": 0}, ["at least 0"]),
        (0, {"above": 0}, ["above 0"]),
        (0.6, {"least": 0, "most": 0.5}, ["at least 0", "at most 0.5"]),
        (1, {"least": 0, "below": 1}, ["at least 0", "below 1"]),
        (1.0, {"below": 1.0}, ["below 1"]),
    ],
)
def test_numbers_out_of_range_are_refused_with_the_range(value, limits, wanted):
    remedy = refused(check_number, value, **limits)
    assert all(one in remedy for one in wanted)


@pytest.mark.parametrize("value", [NAN, INF, -INF, True, False, "1", None, [1.0], 1j, torch.tensor(1.0)])
@pytest.mark.parametrize("limits", [{}, {"above": 0}, {"least": -1, "most": 1}])
def test_what_is_no_finite_number_is_refused(value, limits):
    assert "number" in refused(check_number, value, **limits)


def test_a_remedy_without_a_range_names_none():
    assert refused(check_number, "a") == "Pass a number."


@pytest.mark.parametrize("value", [True, False])
def test_bools_pass(value):
    check_bool("argument", value)


@pytest.mark.parametrize("value", [0, 1, "True", None, "auto", 1.0])
def test_what_is_no_bool_is_refused(value):
    remedy = refused(check_bool, value)
    assert "True" in remedy
    assert "False" in remedy


@pytest.mark.parametrize("value", ["auto", True, False])
def test_choices_pass(value):
    check_choice("argument", value, ("auto", True, False))


@pytest.mark.parametrize("value", [0, 1, 1.0, "Auto", "", None, ["auto"], {}])
def test_what_is_no_choice_is_refused_with_those_there_are(value):
    # 1 equals True, and is another type
    assert "['auto', True, False]" in refused(check_choice, value, ("auto", True, False))


@pytest.mark.parametrize("solver", [Annealing(), Nearest(), CrossEntropy()])
def test_solvers_pass(solver):
    check_solver("argument", solver)


def test_any_object_that_solves_is_a_solver():
    class Own:
        def solve(self, problem):
            return problem.best_of()

    check_solver("argument", Own())
    assert "solver" in refused(check_solver, Own)


@pytest.mark.parametrize("value", ["annealing", None, 3, Annealing, {"solve": 1}])
def test_what_cannot_solve_is_refused(value):
    assert "solver" in refused(check_solver, value)


def test_named_is_what_errors_call_a_field():
    @dataclass
    class Settings:
        width: int = 3

    assert named(Settings(), "width") == ("Settings.width", 3)
    with pytest.raises(InvalidOptionError, match=r"Settings\.width: 3 is too small\. Pass at least 4\."):
        check_integer(*named(Settings(), "width"), least=4)
