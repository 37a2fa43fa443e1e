"""Layer by layer: which recipes the options leave open, and whose scale is searched."""

from __future__ import annotations

from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import pytest

from adaround_plugin.learning.layer import Recipe
from adaround_plugin.learning.layerwise import LayerWise
from adaround_plugin.solvers import Annealing, Nearest

OPEN = dict.fromkeys(("propagate_error", "correct_bias", "column_weighting", "damping", "output_hessian"), "auto")
NEAREST: list[Any] = ["nearest", Nearest()]
SOLVERS: list[Any] = ["annealing", Annealing(), "gptq", *NEAREST]


def test_open_options_leave_three_recipes():
    assert {name: getattr(LayerWise(), name) for name in OPEN} == OPEN
    assert LayerWise().recipes() == [
        Recipe(True, True, "fisher", "auto", True),
        Recipe(True, True, "none", "auto", True),
        Recipe(True, True, "inverse_norm", "auto", True),
    ]


@pytest.mark.parametrize("is_baseline", [False, True])
def test_closed_options_leave_one(is_baseline):
    recipe = Recipe(False, True, "fisher", 0.3)
    assert LayerWise(**asdict(recipe)).recipes(is_baseline) == [recipe]


@pytest.mark.parametrize(
    ("given", "count"),
    [
        ({"column_weighting": "none"}, 1),
        ({"column_weighting": "fisher"}, 1),
        ({"propagate_error": False}, 3),
        ({"damping": 0.5}, 3),
        ({"propagate_error": True, "correct_bias": True, "damping": 0.5}, 3),
        ({"correct_bias": True, "column_weighting": "inverse_norm"}, 1),
        ({"propagate_error": False, "correct_bias": False, "column_weighting": "none"}, 1),
    ],
)
def test_what_is_given_is_in_every_recipe_and_none_comes_twice(given, count):
    found = LayerWise(**given).recipes()
    assert len(found) == len(set(found)) == count
    assert all(getattr(recipe, name) == value for recipe in found for name, value in given.items())
    # what is open is as the candidates have it, in their order
    everything = [replace(recipe, **given) for recipe in LayerWise().recipes()]
    assert found == list(dict.fromkeys(everything))


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ({}, [("none", False), ("inverse_norm", False)]),
        ({"output_hessian": True}, [("none", True), ("inverse_norm", True)]),
        ({"column_weighting": "fisher"}, [("fisher", False)]),
        ({"column_weighting": "fisher", "output_hessian": True}, [("fisher", True)]),
    ],
)
def test_without_derivatives_what_is_asked_for_by_name_stays(given, left):
    layers = LayerWise(**given)
    found = layers.without_derivatives(layers.recipes())
    assert [(recipe.column_weighting, recipe.output_hessian) for recipe in found] == left


@pytest.mark.parametrize("solver", SOLVERS)
def test_nearest_alone_is_the_baseline(solver):
    assert LayerWise(solver=solver).is_baseline == (solver in NEAREST)


@pytest.mark.parametrize("solver", NEAREST)
def test_the_baseline_does_only_what_is_asked_for(solver):
    def recipes(**given: Any) -> list[Recipe]:
        return LayerWise(solver=solver, **given).recipes(is_baseline=True)

    assert recipes() == [Recipe(False, False, "none", "auto")]
    assert recipes(correct_bias=True) == [Recipe(False, True, "none", "auto")]
    assert recipes(propagate_error=True) == [Recipe(True, False, "none", "auto")]
    # a start for what is learned after it is no baseline
    assert len(LayerWise(solver=solver).recipes()) == 3


@pytest.mark.parametrize("damping", [0.2, "auto"])
def test_a_recipe_closes_the_options(damping):
    recipe = Recipe(True, False, "inverse_norm", damping)
    closed = LayerWise(levels="up_or_down", holdout=0.0).with_recipe(recipe)
    assert closed.recipe == recipe
    assert closed.recipes() == [recipe]
    assert (closed.levels, closed.holdout) == ("up_or_down", 0.0)


@pytest.mark.parametrize("name", sorted(OPEN.keys() - {"damping"}))
def test_open_options_are_no_recipe(name):
    options = LayerWise(**{**asdict(Recipe()), name: "auto"})
    with pytest.raises(AssertionError):
        _ = options.recipe


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("keeps_scale", [False, True])
def test_a_scale_is_searched_where_it_is_ours_or_where_that_is_asked_for(solver, keeps_scale):
    node: Any = SimpleNamespace(keeps_scale=keeps_scale)
    layers = LayerWise(solver=solver)
    assert layers.searches_scale(node) == (not keeps_scale)
    for given in (True, False):
        assert replace(layers, search_scale=given).searches_scale(node) == given


def test_a_recipe_says_in_words_what_it_does():
    assert str(Recipe()) == "errors propagated, bias corrected, column weighting none, damping 0.01"
    assert str(Recipe(False, False, "fisher", 0.1)) == (
        "errors not propagated, bias kept, column weighting fisher, damping 0.1"
    )
