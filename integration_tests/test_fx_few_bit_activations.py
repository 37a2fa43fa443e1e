"""Activations of fewer than 8 bits in FX: every integer inside the range, and nothing else changed."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.ao.quantization import QConfig, QConfigMapping, get_default_qconfig_mapping
from torch.ao.quantization.observer import HistogramObserver, MinMaxObserver
from torch.ao.quantization.quantize_fx import convert_fx, convert_to_reference_fx
from torch.utils._pytree import tree_map

from adaround_plugin import get_adaround_qconfig_mapping
from adaround_plugin.hosts.base import open_streams
from adaround_plugin.hosts.fx.clamps import insert_clamps
from adaround_plugin.hosts.fx.host import PreparedFX
from adaround_plugin.hosts.fx.observers import AdaRoundActivationObserver, AdaRoundObserver
from integration_tests import models
from integration_tests.models import (
    SHAPE,
    Branches,
    Residual,
    arguments_of,
    assert_equal_trees,
    batches,
    call,
    conv,
    prepared_model,
    prepared_net,
    run_stream,
)

# residuals, a concatenation, in-place operations, functional weights, keywords, submodules of their own
NETS = ["Residual", "Branches", "Inplace", "FunctionalWeights", "Keywords", "Views", "WithOpaque", "Standalone"]


def learn(prepared: fx.GraphModule, data: Any, **options: Any) -> fx.GraphModule:
    """`adaround` without the search, which has no part in what activations do."""
    return models.learn(prepared, data, **{"solver": "nearest", "search_scale": False, **options})


@functools.cache
def _learned_net(name: str, activation_bits: int) -> tuple[fx.GraphModule, list[Any]]:
    """What `adaround` made of a net, and a batch in the order of its inputs; to be copied."""
    _, prepared, data = prepared_net(name, activation_bits)
    return learn(prepared, data), arguments_of(prepared, data[0])


class Watch(fx.Interpreter):
    """Runs a converted model and notes the integers of every quantized activation."""

    def __init__(self, module: fx.GraphModule, found: list[Tensor] | None = None) -> None:
        super().__init__(module)
        self.found: list[Tensor] = [] if found is None else found

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor) and result.is_quantized and result.dtype == torch.quint8:
            self.found.append(result.int_repr())
        return result

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        if isinstance(module, fx.GraphModule):
            return Watch(module, self.found).run(*args, **kwargs)
        return super().call_module(target, args, kwargs)


def integers(converted: fx.GraphModule, arguments: list[Any]) -> list[Tensor]:
    watch = Watch(converted)
    with torch.no_grad():
        watch.run(*copy.deepcopy(arguments))
    assert watch.found
    return watch.found


def far(arguments: list[Any]) -> list[Any]:
    """Inputs that reach far beyond what was calibrated."""
    return tree_map(lambda x: 20 * x if isinstance(x, Tensor) and x.is_floating_point() else x, arguments)


def named(prepared: fx.GraphModule, arguments: list[Any]) -> dict[str, Any]:
    placeholders = [str(node.target) for node in prepared.graph.nodes if node.op == "placeholder"]
    return dict(zip(placeholders, arguments, strict=True))


def clamps(model: fx.GraphModule) -> list[fx.Node]:
    graphs = [module for module in model.modules() if isinstance(module, fx.GraphModule)]
    return [node for graph in graphs for node in graph.graph.nodes if node.target is torch.clamp]


@pytest.mark.parametrize("convert", [convert_to_reference_fx, convert_fx])
@pytest.mark.parametrize("name", ["Branches", "FunctionalWeights", "Standalone"])
def test_converted_models_hold_four_bits_beyond_the_calibrated_range(name, convert):
    result, arguments = _learned_net(name, 4)
    found = integers(convert(copy.deepcopy(result)), far(arguments))
    assert max(int(x.max()) for x in found) == 15


@pytest.mark.parametrize("bits", range(2, 8))
def test_every_number_of_bits(bits):
    result, arguments = _learned_net("Residual", bits)
    found = integers(convert_to_reference_fx(copy.deepcopy(result)), far(arguments))
    assert len(found) == 6
    assert {int(x.min()) for x in found} == {0}
    assert max(int(x.max()) for x in found) == 2**bits - 1


def test_without_the_pass_the_host_lets_values_through():
    _, prepared, data = prepared_net("Residual", activation_bits=4)
    assert max(int(x.max()) for x in integers(convert_to_reference_fx(prepared), far([data[0]]))) > 15


@pytest.mark.parametrize("name", NETS)
def test_streams_equal_the_hosts_models(name):
    model, prepared, data = prepared_net(name, activation_bits=3)
    result = learn(prepared, data)
    clamped = copy.deepcopy(prepared)
    insert_clamps(clamped)
    for stage in (prepared, result):
        exact_stream, quantized_stream = open_streams(PreparedFX(stage))
        reference = convert_to_reference_fx(copy.deepcopy(clamped if stage is prepared else result))
        native = convert_fx(copy.deepcopy(clamped if stage is prepared else result))
        for arguments in (arguments_of(stage, data[0]), far(arguments_of(stage, data[1]))):
            with torch.no_grad():
                expected = reference(*copy.deepcopy(arguments))
                assert_equal_trees(run_stream(quantized_stream, arguments), expected)
                assert_equal_trees(native(*copy.deepcopy(arguments)), expected)
                exact = run_stream(exact_stream, arguments)
                # clamps have no part in the float model, even where the prepared one has them already
                if stage is prepared:
                    assert_equal_trees(exact, model(**named(stage, copy.deepcopy(arguments))))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", ["Residual", "Branches", "Standalone"])
def test_a_second_pass_adds_nothing(name, inplace):
    _, prepared, data = prepared_net(name, activation_bits=4)
    options = {"correct_bias": False, "inplace": inplace}
    first = learn(prepared, data, **options)
    assert (first is prepared) == inplace
    found, one = [node.args[1:] for node in clamps(first)], convert_to_reference_fx(copy.deepcopy(first))
    again = learn(first, data, **options)
    assert [node.args[1:] for node in clamps(again)] == found
    assert found
    other = convert_to_reference_fx(again)
    with torch.no_grad():
        for batch in data:
            assert_equal_trees(call(one, batch), call(other, batch))


def test_the_clamps_of_a_second_pass_follow_the_observers():
    _, prepared, data = prepared_net("Residual", activation_bits=4)
    first = learn(prepared, data)
    for module in first.modules():
        if isinstance(module, AdaRoundActivationObserver):
            module(100 * data[0])
    second = learn(first, data)
    assert len(clamps(second)) == len(clamps(first))
    assert all(a.args[2] < b.args[2] for a, b in zip(clamps(first), clamps(second), strict=True))


@pytest.mark.parametrize("name", ["Residual", "Standalone"])
def test_the_given_model_stays_as_it_was(name):
    _, prepared, data = prepared_net(name, activation_bits=4)
    code, known = prepared.code, dict(prepared.meta["_observed_graph_module_attrs"].node_name_to_qconfig)
    learn(prepared, data)
    assert prepared.code == code
    assert prepared.meta["_observed_graph_module_attrs"].node_name_to_qconfig == known
    assert not clamps(prepared)


def observers_in_order(prepared: fx.GraphModule) -> list[Any]:
    found = [prepared.get_submodule(n.target) for n in prepared.graph.nodes if n.op == "call_module"]
    return [module for module in found if isinstance(module, HistogramObserver)]


def _stock(observer: Any) -> QConfigMapping:
    return QConfigMapping().set_global(QConfig(activation=observer, weight=AdaRoundObserver.with_args(bits=4)))


@pytest.mark.parametrize(
    "mapping",
    [
        get_default_qconfig_mapping("fbgemm"),
        get_adaround_qconfig_mapping("x86", activation_bits=8),
        _stock(HistogramObserver.with_args(quant_min=0, quant_max=15)),
        _stock(MinMaxObserver.with_args(quant_min=0, quant_max=127)),
        _stock(AdaRoundActivationObserver.with_args(bits=8)),
    ],
    ids=["fbgemm", "x86", "histogram-15", "minmax-127", "adaround-8"],
)
def test_other_observers_get_no_clamp(mapping):
    prepared = prepared_model(Residual(), data := batches(*SHAPE), mapping=mapping)
    result = learn(prepared, data)
    assert not clamps(result)
    assert [node.name for node in result.graph.nodes] == [node.name for node in prepared.graph.nodes]
    assert not clamps(PreparedFX(prepared).quantized_graph)


def test_layers_may_have_activations_of_their_own_bits():
    mapping = get_adaround_qconfig_mapping(activation_bits=4, layer_bits={"a": (3, 8), "c": (8, 6)}, model=Residual())
    prepared = prepared_model(Residual(), data := batches(*SHAPE), mapping=mapping)
    result = learn(prepared, data)
    tops = [observer.quant_max for observer in observers_in_order(result)]
    # what enters the model is observed for `a`, with x86's own 7 of 8 bits; the activation functions and b have 4
    assert tops == [127, 127, 15, 15, 15, 63]
    found = integers(convert_to_reference_fx(copy.deepcopy(result)), far([data[0]]))
    assert all(int(x.max()) <= top for x, top in zip(found[2:], tops[2:], strict=True))
    for name, top in zip("abc", (3, 7, 127), strict=True):
        assert result.get_submodule(name).qconfig.weight().quant_max == top


class Excluded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(), conv(), conv()

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(self.a(x))))


def test_layers_left_in_float_stay_so():
    def observed(bits: int) -> list[str]:
        mapping = get_adaround_qconfig_mapping(activation_bits=bits).set_module_name("b", None)
        prepared = prepared_model(Excluded(), data := batches(*SHAPE), mapping=mapping)
        converted = convert_to_reference_fx(learn(prepared, data))
        assert type(converted.b) is nn.Conv2d
        assert type(converted.a) is not nn.Conv2d
        return [str(node.target) for node in converted.graph.nodes if node.target is not torch.clamp]

    assert observed(4) == observed(8)


@pytest.mark.parametrize("backend", ["x86", "fbgemm", "onednn", "qnnpack"])
@pytest.mark.filterwarnings("ignore:Default qconfig of oneDNN backend:UserWarning")
def test_every_backend_takes_four_bits(backend):
    prepared = prepared_model(Branches(), data := batches(*SHAPE), backend, activation_bits=4)
    converted = convert_to_reference_fx(learn(prepared, data))
    assert max(int(x.max()) for x in integers(converted, far([data[0]]))) == 15


class Softmax(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 4)
        self.softmax = nn.Softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.softmax(self.norm(self.a(x))))


def test_operators_with_an_observer_of_their_own_are_narrow_unless_their_range_is_fixed():
    prepared = prepared_model(Softmax(), data := batches(6), activation_bits=4)
    found = integers(convert_to_reference_fx(learn(prepared, data)), far([data[0]]))
    assert [int(x.max()) <= 15 for x in found] == [True, True, True, False, True]
