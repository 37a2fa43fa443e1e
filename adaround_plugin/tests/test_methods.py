"""Methods by name and as objects, and their settings: each is checked where it is made, and named in the error."""

from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest

from adaround_plugin import METHODS, BlockWise, Finetune, InvalidOptionError, LayerWise, Paper
from adaround_plugin.learning.methods import Preset, get_preset
from adaround_plugin.paper.variants import Sigmoid, StraightThrough, Temperature
from adaround_plugin.rounding.soft_rounding import RectifiedSigmoid
from adaround_plugin.solvers import GPTQ, Annealing, Nearest

NAN, INF = float("nan"), float("inf")

COUNT = ([1, 7, 10**6], [0, -1, 1.5, True, "1", None])
RATE = ([1e-9, 1, 0.5], [0, 0.0, -1.0, NAN, INF, "a", True, None])
SHARE = ([0, 0.0, 0.999], [-0.1, 1, 1.0, NAN, "a", None])
HELD_OUT = ([0, 0.0, 0.125, 0.5], [-0.1, 0.51, 1, NAN, "auto", True, None])
FLAG = ([True, False], [0, 1, "auto", "yes", None])
OPEN_FLAG = ([True, False, "auto"], [0, 1, "yes", None])

# by field: values that are accepted, and values that are not
SETTINGS: dict[type[Any], dict[str, tuple[list[Any], list[Any]]]] = {
    LayerWise: {
        "solver": (["gptq", "nearest", Annealing(), GPTQ()], ["sequential", "", None, 3, Annealing]),
        "search_scale": OPEN_FLAG,
        "propagate_error": OPEN_FLAG,
        "correct_bias": OPEN_FLAG,
        "column_weighting": (["auto", "none", "inverse_norm", "fisher"], ["all", "", None, True]),
        "damping": (["auto", 0.01, 1], [0, -0.1, NAN, INF, "none", True, None]),
        "output_hessian": OPEN_FLAG,
        "levels": (["all", "up_or_down"], ["grid", "", None, True]),
        "holdout": HELD_OUT,
        "max_columns": COUNT,
    },
    BlockWise: {
        "layers": ([LayerWise(), LayerWise(solver="gptq")], ["default", None, LayerWise, BlockWise(), Paper()]),
        "blocks": ([None, "auto", ["a"], ("a", "b.*")], ["a", [], (), 3, [1], ["a", None], {"a": 1}]),
        "iterations": COUNT,
        "batch_size": COUNT,
        "learning_rate": RATE,
        "drop": SHARE,
        "weighs_outputs": FLAG,
        "learns_scale": FLAG,
    },
    Paper: {
        "iterations": COUNT,
        "batch_size": COUNT,
        "learning_rate": RATE,
        "regularization": ([0, 0.01, 3], [-0.1, NAN, INF, "a", None]),
        "warm_start": SHARE,
        "beta": ([(20.0, 2.0), [8, 2], (1, 1)], [(20.0, 0.0), (-1, 2), (20.0,), (1, 2, 3), 20.0, "ab", None]),
        "asymmetric": FLAG,
        "activation": FLAG,
        "variant": ([RectifiedSigmoid, Sigmoid, Temperature, StraightThrough], ["sigmoid", None, int, Annealing]),
        "start": ([None, Annealing(), Nearest()], ["annealing", 3, Annealing]),
        "correct_bias": FLAG,
        "search_scale": FLAG,
        "holdout": HELD_OUT,
        "max_columns": COUNT,
    },
    Finetune: {
        "iterations": ([None, *COUNT[0]], COUNT[1][:-1]),
        "batch_size": COUNT,
        "learning_rate": RATE,
        "integers": (["auto", True, False], [0, 1, "yes", None]),
    },
}
RIGHT = [(kind, name, value) for kind, of in SETTINGS.items() for name, (good, _) in of.items() for value in good]
WRONG = [(kind, name, value) for kind, of in SETTINGS.items() for name, (_, bad) in of.items() for value in bad]
every_kind = pytest.mark.parametrize("kind", SETTINGS)


@every_kind
def test_every_field_has_values_here(kind):
    assert [field.name for field in fields(kind)] == list(SETTINGS[kind])


@pytest.mark.parametrize(("kind", "name", "value"), RIGHT)
def test_settings_in_range_are_taken(kind, name, value):
    assert getattr(kind(**{name: value}), name) == value


@pytest.mark.parametrize(("kind", "name", "value"), WRONG)
def test_settings_out_of_range_are_refused_by_name(kind, name, value):
    with pytest.raises(InvalidOptionError) as caught:
        kind(**{name: value})
    assert caught.value.subject == f"{kind.__name__}.{name}"


@every_kind
def test_settings_are_given_by_name_and_stay(kind):
    with pytest.raises(TypeError):
        kind(1)
    with pytest.raises(FrozenInstanceError):
        kind().batch_size = 3
    assert kind() == kind()
    assert pickle.loads(pickle.dumps(kind())) == kind()


# --- by name


def test_names_stand_for_methods():
    assert list(METHODS) == ["default", "nearest", "blocks", "best", "paper"]
    assert METHODS["default"] == Preset(LayerWise())
    assert METHODS["nearest"] == Preset(LayerWise(solver=Nearest()))
    assert METHODS["blocks"] == Preset(BlockWise())
    assert METHODS["paper"] == Preset(Paper())
    best = METHODS["best"]
    assert isinstance(best.method, BlockWise)
    assert best.method == BlockWise(layers=LayerWise(), blocks="auto")
    assert best.finetune == Finetune(integers="auto")


@pytest.mark.parametrize("name", METHODS)
def test_a_preset_is_found_by_its_name(name):
    assert get_preset(name) is METHODS[name]


@pytest.mark.parametrize("method", [LayerWise(solver="gptq"), BlockWise(drop=0.1), Paper(iterations=7)])
def test_an_object_is_a_method_without_finetuning(method):
    found = get_preset(method)
    assert found.method is method
    assert found.finetune is None


@pytest.mark.parametrize("method", ["annealing", "Default", "", "blocks "])
def test_an_unknown_name_is_refused_with_those_there_are(method):
    with pytest.raises(InvalidOptionError, match="method") as caught:
        get_preset(method)
    assert caught.value.subject == "method"
    assert all(repr(name) in caught.value.remedy for name in METHODS)


def test_a_preset_is_itself():
    preset = Preset(BlockWise(drop=0.1), Finetune(iterations=7))
    assert get_preset(preset) is preset


NO_METHODS = [LayerWise, BlockWise, Paper, Finetune, Finetune(), Annealing(), None, 3, ["default"], {"method": 1}]


@pytest.mark.parametrize("method", NO_METHODS)
def test_what_is_no_method_is_refused_with_what_is(method):
    with pytest.raises(InvalidOptionError) as caught:
        get_preset(method)
    assert caught.value.subject == "method"
    assert all(name in caught.value.remedy for name in ("LayerWise(", "BlockWise(", "Paper("))


# --- how their layers are decided


def test_only_nearest_with_nothing_learned_after_it_is_the_baseline():
    nearest = LayerWise(solver="nearest")
    assert nearest.is_baseline
    assert not LayerWise().is_baseline
    assert not BlockWise(layers=nearest).is_baseline
    assert not Paper().is_baseline


def test_layers_can_be_decided_otherwise():
    layers = LayerWise(solver="gptq", damping=0.5)
    assert LayerWise().layers == LayerWise()
    assert LayerWise().with_layers(layers) is layers
    blocks = BlockWise(drop=0.25, blocks=["a"])
    assert blocks.with_layers(layers) == BlockWise(drop=0.25, blocks=["a"], layers=layers)
    assert blocks.layers == LayerWise(column_weighting="fisher")


def test_the_paper_says_itself_how_layers_are_decided():
    plain = {"column_weighting": "none", "damping": 0.01, "levels": "up_or_down", "output_hessian": False}
    assert Paper().layers == LayerWise(
        solver=Nearest(), search_scale=False, propagate_error=True, correct_bias=False, holdout=0.0, **plain
    )
    own = Paper(asymmetric=False, correct_bias=True, search_scale=True, holdout=0.25, max_columns=7, start=Annealing())
    assert own.layers == LayerWise(
        solver=Annealing(),
        search_scale=True,
        propagate_error=False,
        correct_bias=True,
        holdout=0.25,
        max_columns=7,
        **plain,
    )
    assert own.with_layers(own.layers) is own
    with pytest.raises(InvalidOptionError, match="Set the fields of Paper"):
        own.with_layers(LayerWise())


def test_the_defaults_of_the_paper_are_its_settings():
    paper = Paper()
    assert (paper.iterations, paper.batch_size, paper.learning_rate) == (10_000, 32, 1e-3)
    assert (paper.warm_start, paper.beta, paper.variant) == (0.2, (20.0, 2.0), RectifiedSigmoid)
    assert (paper.asymmetric, paper.activation, paper.correct_bias, paper.start) == (True, True, False, None)
