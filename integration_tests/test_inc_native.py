"""An eager model through Neural Compressor's own entry points becomes an int8 model with learned integers."""

from __future__ import annotations

import copy
import functools
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from neural_compressor.torch.quantization import (
    RTNConfig,
    TuningConfig,
    autotune,
    convert,
    get_all_config_set,
    prepare,
    quantize,
)
from torch import Tensor, fx, nn
from torch.ao.quantization.quantize_fx import convert_fx

from adaround_plugin import METHODS, BlockWise, Finetune, LayerWise, adaround, get_report
from adaround_plugin.errors import InvalidBatchError, InvalidModelError, InvalidOptionError
from adaround_plugin.inc import AdaRoundConfig
from adaround_plugin.inc.recording import Recording
from adaround_plugin.learning.methods import Preset
from integration_tests.inc_models import RECIPE, calibrate, data, network
from integration_tests.models import assert_same, assert_unchanged, converted, learn, prepared_model, snapshot

NAMES = ("0.0", "1", "3", "5")


def assert_same_model(one: nn.Module, other: nn.Module) -> None:
    """Integers, scales, zero points and biases of every layer are equal, and so is the output, bit for bit."""
    for name in NAMES:
        assert_same(converted(one, name), converted(other, name))
    assert torch.equal(one(data()[0]), other(data()[0]))


@functools.cache
def quantized_to(bits: int) -> nn.Module:
    """`network` with weights of so many bits, by `quantize` in one call; not to be changed."""
    return quantize(network(), AdaRoundConfig(bits=bits, **RECIPE), run_fn=calibrate(data()))


@functools.cache
def by_hand(**options: Any) -> fx.GraphModule:
    """`network` with 3-bit weights through torch's own flow; options are those of `learn`. Not to be changed."""
    return convert_fx(
        learn(prepared_model(network(), data(), weight_bits=3, symmetric=True, histogram=True), data(), **options)
    )


def test_the_float_model_can_be_pickled_as_before() -> None:
    model = network()
    quantize(model, AdaRoundConfig(method="nearest"), run_fn=calibrate(data()))
    assert not [name for name, module in model.named_modules() if hasattr(module, "qconfig")]
    pickle.dumps(model)


@pytest.mark.parametrize("entry", ["quantize", "a dict", "prepare and convert"])
def test_it_is_what_the_fx_flow_gives(entry: str) -> None:
    model, batches = network(), data()
    before = snapshot(model)
    config = AdaRoundConfig(bits=3, **RECIPE)
    if entry == "prepare and convert":
        prepared = prepare(model, config, example_inputs=batches[0])
        calibrate(batches)(prepared)
        quantized = convert(prepared)
    else:
        given = {"adaround": config.to_dict()} if entry == "a dict" else config
        quantized = quantize(model, given, run_fn=calibrate(batches), example_inputs=batches[0])
    assert_same_model(quantized, by_hand())
    assert isinstance(quantized, fx.GraphModule)
    assert_unchanged(before, model)


def test_example_inputs_are_not_needed_and_run_args_are_passed_on() -> None:
    def run(model: nn.Module, batches: list[Tensor], times: int) -> None:
        for batch in batches * times:
            model(input=batch)

    quantized = quantize(network(), AdaRoundConfig(**RECIPE), run_fn=run, run_args=(data(), 1))
    assert_same_model(quantized, quantized_to(4))


def test_parts_reach_their_layers() -> None:
    config = AdaRoundConfig(bits=3, **RECIPE)
    config.set_local("0.0", AdaRoundConfig(bits=8, use_sym=False))
    config.set_local("1", AdaRoundConfig(bits=6)).set_local("3", AdaRoundConfig(dtype="fp32"))
    config.set_local("5", AdaRoundConfig(bits=2, w_granularity="per_tensor"))
    quantized = quantize(network(), config, run_fn=calibrate(data()))
    report = get_report(quantized)
    assert {layer.name: layer.bits for layer in report.layers} == {"0.0": 8, "1": 6, "5": 2}
    assert [name for name, _, _ in report.skipped] == ["3"]
    assert type(quantized.get_submodule("3.0")) is nn.Linear
    assert converted(quantized, "0.0").axis == 0
    assert bool((converted(quantized, "0.0").zero_point != 0).any())
    assert converted(quantized, "5").axis is None
    assert set(converted(quantized, "5").integers.unique().tolist()) <= {-2, -1, 0, 1}


def test_a_white_list_leaves_the_rest_in_float() -> None:
    config = AdaRoundConfig(bits=3, white_list=["0", "5"], **RECIPE)
    quantized = quantize(network(), config, run_fn=calibrate(data()))
    assert [layer.name for layer in get_report(quantized).layers] == ["0.0", "5"]
    # fused, though the mapping names the convolution alone
    assert get_report(quantized).layers[0].kind == "ConvReLU2d"
    assert type(quantized.get_submodule("3.0")) is nn.Linear


class Functional(nn.Module):
    """No weighted module at all, and keyword inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor, gain: Tensor) -> Tensor:
        return F.linear(x * gain, self.weight, None)


def test_functional_calls_follow_the_global_part() -> None:
    def run(model: nn.Module) -> None:
        for batch in data():
            model(batch.reshape(-1, 6), gain=torch.ones(6))

    quantized = quantize(Functional().eval(), AdaRoundConfig(**RECIPE), run_fn=run)
    assert [layer.name for layer in get_report(quantized).layers] == ["weight"]


def test_keywords_are_recorded_by_the_names_of_forward() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor, *, y: Tensor | None = None, **rest: Tensor) -> Tensor:
            return x

    model, one = Model(), torch.ones(1)
    Recording([]).start(model)
    model(one)
    model(one, y=2 * one, z=3 * one)
    with Recording.taken(model) as found:
        assert found == [(one,), {"x": one, "y": 2 * one, "z": 3 * one}]


def test_inputs_are_recorded_as_they_were() -> None:
    """The caller refills one buffer."""
    batches = data()

    def run(model: nn.Module) -> None:
        buffer = torch.empty_like(batches[0])
        for batch in batches:
            model(buffer.copy_(batch))

    quantized = quantize(network(), AdaRoundConfig(**RECIPE), run_fn=run)
    assert_same_model(quantized, quantized_to(4))


def test_convert_on_a_copy_keeps_the_prepared_model() -> None:
    prepared = prepare(network(), AdaRoundConfig(**RECIPE))
    calibrate(data())(prepared)
    assert_same_model(convert(prepared, inplace=False), convert(prepared))


def test_a_quantized_model_keeps_its_report_through_a_copy() -> None:
    report = get_report(copy.deepcopy(quantized_to(4)))
    assert [layer.name for layer in report.layers] == list(NAMES)
    assert report.solver == "Annealing"


def test_options_reach_the_pass() -> None:
    options: dict[str, Any] = {
        "solver": "gptq",
        "search_scale": False,
        "propagate_error": False,
        "correct_bias": False,
        "column_weighting": "inverse_norm",
        "damping": 0.5,
        "output_hessian": False,
        "levels": "up_or_down",
        "holdout": 0,
        "max_columns": 100,
        "seed": 3,
    }
    quantized = quantize(network(), AdaRoundConfig(bits=3, **options), run_fn=calibrate(data()))
    report = get_report(quantized)
    assert report.solver == "GPTQ"
    assert all(layer.nearest_holdout is None for layer in report.layers)
    assert_same_model(quantized, by_hand(**options))


def test_options_are_looked_for_in_the_methods_layers() -> None:
    """Whatever the method, the pass has what `adaround` has by the same words."""
    for method, options in (("nearest", {}), ("nearest", {"search_scale": True, "damping": 0.5})):
        quantized = quantize(network(), AdaRoundConfig(bits=3, method=method, **options), run_fn=calibrate(data()))
        prepared = prepared_model(network(), data(), weight_bits=3, symmetric=True, histogram=True)
        layers = LayerWise(solver="nearest", **options)
        assert_same_model(quantized, convert_fx(adaround(prepared, data(), layers, progress=False)))
        assert get_report(quantized).method == ("LayerWise" if options else "nearest")


def _score(model: nn.Module) -> float:
    """Closeness to the float model, 1 for equal."""
    with torch.no_grad():
        expected = network()(data()[0])
        return 1 - float((model(data()[0]) - expected).norm() / expected.norm())


def test_autotune_takes_the_first_that_is_good_enough() -> None:
    tuning = TuningConfig([AdaRoundConfig(bits=[2, 8], **RECIPE)], tolerable_loss=0.02)
    quantized = autotune(network(), tuning, eval_fn=_score, run_fn=calibrate(data()))
    assert {layer.bits for layer in get_report(quantized).layers} == {8}
    assert_same_model(quantized, quantized_to(8))


def test_autotune_quantizes_the_best_again_to_the_same_integers() -> None:
    """Nothing is good enough, and the best is not the last: INC quantizes once more."""
    tuning = TuningConfig([AdaRoundConfig(bits=[2, 8, 3], **RECIPE)], tolerable_loss=-1, max_trials=3)
    quantized = autotune(network(), tuning, eval_fn=_score, run_fn=calibrate(data()))
    assert_same_model(quantized, quantized_to(8))


def test_autotune_beside_configurations_of_inc() -> None:
    configs = [RTNConfig(bits=2, group_size=-1, use_layer_wise=False), AdaRoundConfig(bits=8, **RECIPE)]
    quantized = autotune(network(), TuningConfig(configs, tolerable_loss=0.1), eval_fn=_score, run_fn=calibrate(data()))
    assert {layer.bits for layer in get_report(quantized).layers} == {8}


def test_autotune_over_everything_registered_knows_it() -> None:
    (own,) = [entry for entry in get_all_config_set() if isinstance(entry, AdaRoundConfig)]
    assert [config.bits for config in own.expand()] == [4, 8]


def test_a_model_in_train_mode_is_refused() -> None:
    with pytest.raises(InvalidModelError, match="train mode"):
        quantize(network().train(), AdaRoundConfig(), run_fn=calibrate(data()))


@pytest.mark.parametrize("run", [None, lambda model: None])
def test_calibration_without_data_is_an_error(run: object) -> None:
    with pytest.raises(InvalidBatchError, match="run_fn"):
        quantize(network(), AdaRoundConfig(), run_fn=run)


def test_converting_what_was_not_prepared_is_an_error() -> None:
    with pytest.raises(InvalidModelError, match="Call prepare first"):
        convert(network(), AdaRoundConfig())


def test_nothing_to_quantize_is_an_error() -> None:
    with pytest.raises(InvalidOptionError, match="selects no layer"):
        quantize(network(), AdaRoundConfig(white_list=None), run_fn=calibrate(data()))
    with pytest.raises(InvalidModelError):
        quantize(network(), AdaRoundConfig(dtype="fp32"), run_fn=calibrate(data()))


def test_a_method_learns_blocks_on_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    # with fewer steps, which take less time
    monkeypatch.setitem(METHODS, "blocks", Preset(replace(METHODS["blocks"].method, iterations=100)))
    quantized = quantize(network(), AdaRoundConfig(bits=2, method="blocks", **RECIPE), run_fn=calibrate(data()))
    report = get_report(quantized)
    assert report.method == "BlockWise"
    assert any(block.iterations for block in report.blocks)
    nearest = quantize(network(), AdaRoundConfig(bits=2, method="nearest"), run_fn=calibrate(data()))
    assert report.output_error < get_report(nearest).output_error


def test_scales_and_biases_are_finetuned() -> None:
    quantized = quantize(network(), AdaRoundConfig(bits=2, finetune=True, **RECIPE), run_fn=calibrate(data()))
    finetuned = get_report(quantized).finetuning
    assert finetuned is not None
    assert finetuned.iterations == 300
    assert "0 activations" in finetuned.note


@pytest.mark.parametrize("options", [{}, {"solver": "gptq", **RECIPE}], ids=["by name", "with options"])
def test_finetuning_is_what_the_methods_name_stands_for_unless_it_is_given(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    short = Preset(BlockWise(layers=LayerWise(solver="gptq", **RECIPE), iterations=2), Finetune(iterations=3))
    monkeypatch.setitem(METHODS, "best", short)
    monkeypatch.setitem(METHODS, "blocks", Preset(short.method))
    for method, finetune, iterations in (
        ("best", None, 3),
        ("best", False, None),
        ("blocks", None, None),
    ):
        config = AdaRoundConfig(bits=2, method=method, finetune=finetune, **options)
        found = get_report(quantize(network(), config, run_fn=calibrate(data()))).finetuning
        assert (None if found is None else found.iterations) == iterations
