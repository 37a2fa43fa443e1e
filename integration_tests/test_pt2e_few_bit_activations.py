"""Activations of fewer than 8 bits in PT2E: every integer inside the range (test_pt2e_streams has the streams)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map
from torchao.quantization.pt2e import HistogramObserver, PlaceholderObserver
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import get_default_x86_inductor_quantization_config

from adaround_plugin.errors import InvalidOptionError
from adaround_plugin.hosts.pt2e import get_adaround_x86_inductor_config
from adaround_plugin.hosts.pt2e.host import PreparedPT2E
from adaround_plugin.hosts.pt2e.observers import AdaRoundActivationObserver
from adaround_plugin.rounding.ranges import min_mse_qparams
from integration_tests import models
from integration_tests.pt2e_models import convert, leaves_of, prepared_net, x86


class Watch(fx.Interpreter):
    """Runs a converted program and notes the integers of every quantized activation."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: list[Tensor] = []

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor) and result.dtype == torch.uint8:
            self.found.append(result)
        return result


def learn(prepared: fx.GraphModule, data: list[Any]) -> fx.GraphModule:
    """`adaround` without the search, which has no part in what activations do."""
    return models.learn(prepared, data, solver="nearest", search_scale=False)


def far(batch: Any) -> Any:
    """Inputs that reach far beyond what was calibrated."""
    return tree_map(lambda x: 20 * x if isinstance(x, Tensor) and x.is_floating_point() else x, batch)


def integers(host: PreparedPT2E, converted: fx.GraphModule, batch: Any) -> list[Tensor]:
    watch = Watch(converted)
    with torch.no_grad():
        watch.run(*leaves_of(host, batch))
    assert watch.found
    return watch.found


@pytest.mark.parametrize("bits", [2, 4, 7])
def test_converted_programs_hold_the_bits_beyond_the_calibrated_range(bits):
    prepared, data = prepared_net("Residual", x86(histogram=True, activation_bits=bits))
    host = PreparedPT2E(prepared)
    found = integers(host, convert(learn(prepared, data)), far(data[0]))
    assert {int(x.min()) for x in found} == {0}
    assert {int(x.max()) for x in found} == {2**bits - 1}


@pytest.mark.parametrize("bits", [2, 4])
def test_dynamic_activations_have_the_bits_too(bits):
    prepared, data = prepared_net("SharedFunctionalWeight", x86(activation_bits=bits, is_dynamic=True))
    host = PreparedPT2E(prepared)
    converted = convert(learn(prepared, data))
    for batch in (data[0], far(data[0])):
        found = integers(host, converted, batch)
        assert {int(x.max()) for x in found} == {2**bits - 1}


def test_the_observer_is_that_of_the_range():
    prepared, _ = prepared_net("Residual", x86(histogram=True, activation_bits=4))
    observers = [module for module in prepared.modules() if isinstance(module, HistogramObserver)]
    assert observers
    for observer in observers:
        assert isinstance(observer, AdaRoundActivationObserver)
        scale, zero_point = observer.calculate_qparams()
        expected = min_mse_qparams(observer.histogram, float(observer.min_val), float(observer.max_val), 0, 15)
        assert (float(scale), int(zero_point)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("bits", range(2, 8))
@pytest.mark.parametrize("is_dynamic", [False, True])
def test_the_configuration_for_x86_has_the_bits(bits, is_dynamic):
    default = get_default_x86_inductor_quantization_config(is_dynamic=is_dynamic)
    config = get_adaround_x86_inductor_config(activation_bits=bits, is_dynamic=is_dynamic)
    for spec in (config.input_activation, config.output_activation):
        assert (spec.quant_min, spec.quant_max) == (0, 2**bits - 1)
        for field in ("dtype", "qscheme", "is_dynamic"):
            assert getattr(spec, field) == getattr(default.input_activation, field)
        kind = PlaceholderObserver if is_dynamic else AdaRoundActivationObserver
        assert isinstance(spec.observer_or_fake_quant_ctr(), kind)


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"dtype": torch.int8}, "dtype"),
        ({"qscheme": torch.per_tensor_symmetric}, "qscheme"),
        ({"quant_min": -8, "quant_max": 7}, "quant_min, quant_max"),
        ({"quant_min": 0, "quant_max": 256}, "quant_min, quant_max"),
        ({"quant_min": 3, "quant_max": 3}, "quant_min, quant_max"),
    ],
)
def test_options_of_the_observer_out_of_range_are_named(options, argument):
    with pytest.raises(InvalidOptionError) as caught:
        AdaRoundActivationObserver(**options)
    assert caught.value.subject == argument
