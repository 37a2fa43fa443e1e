"""`AdaRoundConfig` says what it means: dictionaries, files, parts, lists, and no silent nonsense."""

from __future__ import annotations

import copy
import inspect
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from neural_compressor.common.base_config import ComposableConfig, ConfigRegistry
from neural_compressor.torch.quantization import RTNConfig, get_all_config_set
from torch import nn

from adaround_plugin import METHODS, LayerWise
from adaround_plugin.errors import InvalidOptionError
from adaround_plugin.inc import AdaRoundConfig
from adaround_plugin.inc.parameters import LAYER_PARAMETERS, PARAMETERS, method_of
from adaround_plugin.learning.methods import Preset
from integration_tests.inc_models import network

LAYERS = [("0.0", "Conv2d"), ("1", "ConvTranspose2d"), ("3", "Linear"), ("5", "Linear")]


def bits(config: AdaRoundConfig) -> dict[str, int]:
    """The bits that each layer of `network` gets; the entry of functional calls is called "*"."""
    mapping = config.to_config_mapping(model_info=config.get_model_info(model=network()))
    return {name or "*": 32 if part.dtype == "fp32" else part.bits for (name, _), part in mapping.items()}


def parts() -> AdaRoundConfig:
    """A global part, and local ones by type, by pattern and by name."""
    config = AdaRoundConfig(bits=3, solver="gptq")
    config.set_local(nn.Linear, AdaRoundConfig(bits=5))
    config.set_local("0.*", AdaRoundConfig(bits=8, use_sym=False))
    return config.set_local("5", AdaRoundConfig(dtype="fp32"))


# a value of each option of a layer that is not the default
OPTIONS: dict[str, Any] = {
    "solver": "coordinate_descent",
    "search_scale": False,
    "propagate_error": False,
    "correct_bias": False,
    "column_weighting": "inverse_norm",
    "damping": 0.5,
    "output_hessian": True,
    "levels": "up_or_down",
    "holdout": 0.25,
    "max_columns": 100,
}


def test_it_is_registered() -> None:
    assert ConfigRegistry.get_cls_configs()["torch"]["adaround"] is AdaRoundConfig
    assert any(isinstance(entry, AdaRoundConfig) for entry in get_all_config_set())
    (supported,) = AdaRoundConfig.supported_configs
    assert supported.config.bits == [2, 3, 4, 5, 6, 7, 8]


def test_without_neural_compressor_the_error_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['neural_compressor'] = None\n"
        "from adaround_plugin import MissingDependencyError\n"
        "try: import adaround_plugin.inc\n"
        "except MissingDependencyError as error: assert \"pip install 'adaround_plugin[inc]'\" in str(error)\n"
        "else: raise AssertionError"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- parameters


def test_the_signature_shows_every_parameter() -> None:
    given = inspect.signature(AdaRoundConfig).parameters
    kinds = inspect.Parameter
    expected = [*(one.name for one in PARAMETERS), "white_list"]
    assert [name for name, one in given.items() if one.kind is kinds.KEYWORD_ONLY] == expected
    assert {one.kind for one in given.values()} == {kinds.KEYWORD_ONLY, kinds.VAR_KEYWORD}
    config = AdaRoundConfig()
    for one in PARAMETERS:
        assert given[one.name].default == one.default == getattr(config, one.name)
    documented = inspect.getdoc(AdaRoundConfig).partition("Args:")[2]
    assert all(name in documented for name in expected)


def test_every_option_of_a_layer_is_a_parameter_of_the_same_name() -> None:
    given = inspect.signature(AdaRoundConfig).parameters
    assert OPTIONS.keys() == {field.name for field in fields(LayerWise)}
    for name, value in OPTIONS.items():
        assert value != getattr(LayerWise(), name)
        assert given[name].default is None
        # by itself, in a list for autotune, and as the method has it
        for one in (value, [value], None):
            assert getattr(AdaRoundConfig(**{name: one}), name) == one


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("method", ["default", "blocks"])
def test_an_option_changes_that_of_the_methods_layers_alone(method: str, option: str) -> None:
    chosen, finetune = method_of(AdaRoundConfig(method=method, **{option: OPTIONS[option]}))
    named = METHODS[method]
    layers = replace(named.method.layers, **{option: OPTIONS[option]})
    assert chosen == replace(named, method=named.method.with_layers(layers))
    assert chosen != named
    assert finetune is None


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("finetune", [None, True, False])
def test_without_options_method_and_finetuning_are_passed_on(method: str, finetune: bool | None) -> None:
    assert method_of(AdaRoundConfig(method=method, finetune=finetune)) == (method, finetune)


@pytest.mark.parametrize("method", ["default", "best"])
@pytest.mark.parametrize("finetune", [None, True, False])
def test_finetuning_beside_options_stays_what_it_is_without(method: str, finetune: bool | None) -> None:
    chosen, passed = method_of(AdaRoundConfig(method=method, finetune=finetune, holdout=0.25))
    assert isinstance(chosen, Preset)
    assert chosen.finetune == METHODS[method].finetune
    assert passed is finetune


def test_a_method_that_has_no_place_for_options_says_so_before_anything_runs() -> None:
    config = AdaRoundConfig(method="paper", damping=0.5, solver="gptq")
    with pytest.raises(InvalidOptionError, match=r"'paper'.*\['damping', 'solver'\]") as caught:
        bits(config)
    assert caught.value.subject == "method"
    # one by one they may be given
    assert bits(AdaRoundConfig(method="paper"))
    assert bits(AdaRoundConfig(damping=0.5, solver="gptq"))


# --- parts


def test_parts_apply_to_their_layers() -> None:
    assert AdaRoundConfig().get_model_info(network()) == LAYERS
    assert bits(AdaRoundConfig(bits=6)) == {"*": 6, "0.0": 6, "1": 6, "3": 6, "5": 6}
    assert bits(parts()) == {"*": 3, "0.0": 8, "1": 3, "3": 5, "5": 32}


def test_a_name_beats_a_type_whatever_the_order() -> None:
    config = AdaRoundConfig().set_local("3", AdaRoundConfig(bits=2)).set_local("Linear", AdaRoundConfig(bits=7))
    assert bits(config) == {"*": 4, "0.0": 4, "1": 4, "3": 2, "5": 7}


def test_a_name_is_a_whole_name() -> None:
    """INC itself matches prefixes: "1" would also set "10"."""
    layers = [("1", "Linear"), ("10", "Linear")]
    mapping = AdaRoundConfig(white_list=["1"]).to_config_mapping(model_info=layers)
    assert list(mapping) == [("1", "Linear")]


def test_white_lists_select_names_and_types() -> None:
    assert bits(AdaRoundConfig(bits=2, white_list=["0", nn.Linear])) == {"0.0": 2, "3": 2, "5": 2}
    assert bits(AdaRoundConfig(white_list=None).set_local("5", AdaRoundConfig(bits=2))) == {"5": 2}


@pytest.mark.parametrize(
    "config", [AdaRoundConfig(bits=2, seed=3), parts(), AdaRoundConfig(bits=2, white_list=["0", nn.Linear])]
)
def test_dictionaries_and_files_keep_everything(config: AdaRoundConfig, tmp_path: Path) -> None:
    file = str(tmp_path / "config.json")
    config.to_json_file(file)
    for back in (
        AdaRoundConfig.from_dict(config.to_dict()),
        AdaRoundConfig.from_json_file(file),
        copy.deepcopy(config),
    ):
        assert back.to_dict() == config.to_dict()
        assert bits(back) == bits(config)
        assert back.to_json_string() == config.to_json_string()


def test_a_missing_global_part_has_the_defaults() -> None:
    config = AdaRoundConfig.from_dict({"local": {"5": {"bits": 8}}})
    assert bits(config) == {"*": 4, "0.0": 4, "1": 4, "3": 4, "5": 8}


def test_lists_expand_to_their_combinations() -> None:
    config = AdaRoundConfig(bits=[4, 8], use_sym=[True, False], seed=7)
    config.set_local("5", AdaRoundConfig(bits=6))
    expanded = config.expand()
    assert [(one.bits, one.use_sym, one.seed) for one in expanded] == [
        (4, True, 7),
        (4, False, 7),
        (8, True, 7),
        (8, False, 7),
    ]
    assert all(bits(one)["5"] == 6 for one in expanded)
    single = AdaRoundConfig()
    assert single.expand() == [single]


def test_the_lists_of_a_white_list_expand_too() -> None:
    expanded = AdaRoundConfig(bits=[4, 8], white_list=["3"]).expand()
    assert [bits(one) for one in expanded] == [{"3": 4}, {"3": 8}]


def test_a_later_assignment_is_checked_and_reaches_the_global_part() -> None:
    config = AdaRoundConfig()
    config.bits = 7
    assert bits(config)["5"] == 7
    with pytest.raises(InvalidOptionError, match="bits"):
        config.bits = 9


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("bits", value) for value in (1, 9, "4", True, [4, 9], [])),
        *(("dtype", value) for value in ("int4", None)),
        *(("use_sym", value) for value in (1, "yes")),
        ("solver", "gradient"),
        *(("method", value) for value in ("thorough", None, 3)),
        ("search_scale", "mse"),
        ("propagate_error", "sometimes"),
        ("correct_bias", 1),
        ("column_weighting", "all"),
        ("output_hessian", "yes"),
        *(("damping", value) for value in (0.0, "much", [0.1, 0.0])),
        ("levels", "grid"),
        ("holdout", 0.6),
        ("max_columns", 0),
        ("finetune", "yes"),
        ("seed", 0.5),
        ("white_list", "5"),
        ("white_list", [3]),
    ],
)
def test_values_out_of_range_are_refused(option: str, value: object) -> None:
    with pytest.raises(InvalidOptionError, match=option):
        AdaRoundConfig(**{option: value})


def test_an_unknown_parameter_is_refused() -> None:
    with pytest.raises(InvalidOptionError, match="'bit'"):
        AdaRoundConfig(bit=4)
    with pytest.raises(InvalidOptionError, match="'bits'"):
        AdaRoundConfig.from_dict({"bits": 8, "local": {}})


@pytest.mark.parametrize("key", ["4", "fc1", "conv", nn.Conv1d, nn.ReLU])
def test_a_local_part_that_selects_nothing_is_an_error(key: object) -> None:
    for config in (AdaRoundConfig().set_local(key, AdaRoundConfig(bits=8)), AdaRoundConfig(white_list=[key])):
        with pytest.raises(InvalidOptionError, match="white_list or set_local"):
            bits(config)


def test_a_configuration_that_selects_nothing_is_an_error() -> None:
    with pytest.raises(InvalidOptionError, match="selects no layer"):
        bits(AdaRoundConfig(white_list=None))


def test_lists_are_for_autotune() -> None:
    with pytest.raises(InvalidOptionError, match=r"\[4, 8\].*autotune"):
        bits(AdaRoundConfig(bits=[4, 8]))


def test_what_holds_for_the_pass_cannot_be_local() -> None:
    for one in PARAMETERS:
        if one not in LAYER_PARAMETERS:
            others = {"act_dtype": "fp32", "method": "blocks", "finetune": True, "token_mask": "mask", "seed": 1}
            others |= {"checkpoint": "folder", "blocks": "layers", "model_path": "folder", "quant_lm_head": False}
            other = {**OPTIONS, **others}[one.name]
            with pytest.raises(InvalidOptionError, match=f"{one.name}: holds for the whole pass"):
                bits(AdaRoundConfig().set_local("5", AdaRoundConfig(**{one.name: other})))


def test_local_parts_follow_the_whole_pass() -> None:
    """Also where there is no global part, and after a dictionary."""
    config = AdaRoundConfig(white_list=["3"], solver="nearest", act_dtype="fp32")
    config.set_local("5", AdaRoundConfig(bits=8))
    for one in (config, AdaRoundConfig.from_dict(config.to_dict())):
        mapping = one.to_config_mapping(model_info=one.get_model_info(model=network()))
        assert {part.solver for part in mapping.values()} == {"nearest"}
        assert {part.act_dtype for part in mapping.values()} == {"fp32"}


def test_sums_keep_both_local_parts() -> None:
    one, other = AdaRoundConfig(bits=2, white_list=["3"]), AdaRoundConfig(bits=8, white_list=["5"])
    assert bits(one + other) == {"3": 2, "5": 8}
    assert bits(one) == {"3": 2}
    everything = AdaRoundConfig(bits=6)
    assert bits(one + everything) == bits(everything + one) == {"*": 6, "0.0": 6, "1": 6, "3": 2, "5": 6}


def test_a_sum_of_two_global_parts_is_refused() -> None:
    with pytest.raises(InvalidOptionError, match="two global parts"):
        AdaRoundConfig(bits=2) + AdaRoundConfig(bits=8)


def bits_of_sum(total: ComposableConfig) -> object:
    """What INC's quantize asks of a sum."""
    return total.to_config_mapping(model_info=total.get_model_info(model=network()))


def test_a_sum_with_another_algorithm_is_refused() -> None:
    for total in (lambda: AdaRoundConfig() + RTNConfig(), lambda: bits_of_sum(RTNConfig() + AdaRoundConfig())):
        with pytest.raises(InvalidOptionError, match="mixes algorithms"):
            total()


def test_a_dictionary_of_two_algorithms_is_refused() -> None:
    """INC reads the first one twice, and forgets the second."""
    registry = ConfigRegistry.get_cls_configs()["torch"]
    with pytest.raises(InvalidOptionError, match="Name one algorithm"):
        ComposableConfig.from_dict({"adaround": {"bits": 4}, "rtn": {"bits": 8}}, config_registry=registry)


def test_lists_reach_the_layers_of_a_white_list_from_a_file_too(tmp_path: Path) -> None:
    config = AdaRoundConfig(bits=[3, 4], white_list=["conv"]).set_local("head", AdaRoundConfig(bits=8))
    config.to_json_file(str(tmp_path / "config.json"))
    for one in (config, AdaRoundConfig.from_json_file(str(tmp_path / "config.json"))):
        expanded = [{key: part.bits for key, part in each.local_config.items()} for each in one.expand()]
        assert expanded == [{"conv": 3, "head": 8}, {"conv": 4, "head": 8}]
