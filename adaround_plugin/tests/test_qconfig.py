"""The mapping as `prepare_fx` reads it: which layer gets how many bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.ao.quantization import QConfigMapping, get_default_qconfig_mapping
from torch.ao.quantization.observer import FixedQParamsObserver, PlaceholderObserver
from torch.ao.quantization.quantize_fx import prepare_fx

from adaround_plugin.errors import InvalidOptionError
from adaround_plugin.hosts.fx.observers import AdaRoundObserver
from adaround_plugin.hosts.fx.qconfig import get_adaround_qconfig_mapping, get_weight_only_backend_config

# torch's own default activation observers say this of themselves
pytestmark = pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max:UserWarning")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()) for _ in range(12)))
        self.up = nn.ConvTranspose2d(4, 6, 3)
        self.head = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.up(self.blocks(self.stem(x))).mean((2, 3)))


X = torch.randn(1, 3, 32, 32)


def test_operators_with_a_fixed_range_keep_their_observer_below_a_name() -> None:
    """torch leaves them in float with any other, and says so in a warning."""
    gate = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sigmoid())
    model = nn.ModuleDict({"gate": gate}).eval()
    mapping = get_adaround_qconfig_mapping("x86", layer_bits={"gate": 3}, model=model)
    assert mapping.module_name_qconfigs["gate.0"].weight().spec.bits == 3
    assert isinstance(mapping.module_name_qconfigs["gate.1"].activation(), FixedQParamsObserver)


def observers(mapping: QConfigMapping, **backend: Any) -> dict[str, AdaRoundObserver]:
    """The weight observer that each weighted module of a prepared `Net` has."""
    prepared = prepare_fx(Net().eval(), mapping, (X,), **backend)
    found = {}
    for node in prepared.graph.nodes:
        module = prepared.get_submodule(node.target) if node.op == "call_module" else None
        inner = module[0] if isinstance(module, nn.Sequential) else module  # fused with its activation
        if isinstance(inner, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            found[node.target] = module.qconfig.weight()
    return found


def bits(mapping: QConfigMapping) -> dict[str, int]:
    return {name: observer.spec.bits for name, observer in observers(mapping).items()}


NAMES = ["stem", *(f"blocks.{i}.0" for i in range(12)), "up", "head"]


def expected(default: int, **special: int) -> dict[str, int]:
    return {name: special.get(name.replace(".", "_"), default) for name in NAMES}


@pytest.mark.parametrize("backend", ["x86", "fbgemm", "onednn", "qnnpack"])
def test_activations_are_observed_as_the_backend_wants(backend):
    mapping, default = get_adaround_qconfig_mapping(backend), get_default_qconfig_mapping(backend)
    assert mapping.global_qconfig.activation().__class__ is default.global_qconfig.activation().__class__
    assert mapping.global_qconfig.activation().dtype == default.global_qconfig.activation().dtype
    assert isinstance(mapping.global_qconfig.weight(), AdaRoundObserver)


@pytest.mark.parametrize("weight_bits", [2, 3, 4, 8])
def test_every_weighted_module_gets_the_bits(weight_bits):
    assert bits(get_adaround_qconfig_mapping(weight_bits=weight_bits)) == expected(weight_bits)


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_scheme_follows_the_arguments(per_channel, symmetric):
    found = observers(get_adaround_qconfig_mapping(per_channel=per_channel, symmetric=symmetric))
    for name in ("stem", "head"):
        assert found[name].spec.ch_axis == (0 if per_channel else None)
        assert found[name].spec.symmetric == symmetric


def test_transposed_convolutions_get_one_scale_beside_quantized_activations():
    found = observers(get_adaround_qconfig_mapping())
    assert found["up"].spec.ch_axis is None
    assert found["stem"].spec.ch_axis == 0


def test_weight_only_mappings_leave_activations_alone():
    mapping = get_adaround_qconfig_mapping(activation_bits=None, weight_bits=3)
    activation = mapping.global_qconfig.activation()
    assert isinstance(activation, PlaceholderObserver)
    assert activation.dtype == torch.float32
    found = observers(mapping, backend_config=get_weight_only_backend_config())
    assert {name: observer.spec.bits for name, observer in found.items()} == expected(3)
    assert found["up"].spec.ch_axis == 1
    assert found["stem"].spec.ch_axis == 0


def test_the_weight_only_backend_quantizes_nothing_but_weights():
    configs = get_weight_only_backend_config().configs
    patterns = [config.pattern for config in configs]
    for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.functional.linear):
        assert kind in patterns
    for config in configs:
        for dtypes in config.dtype_configs:
            assert dtypes.input_dtype == dtypes.output_dtype == torch.float
            assert dtypes.weight_dtype == torch.qint8
    prepared = prepare_fx(
        Net().eval(),
        get_adaround_qconfig_mapping(activation_bits=None),
        (X,),
        backend_config=get_weight_only_backend_config(),
    )
    kinds = {type(module) for module in prepared.modules() if hasattr(module, "calculate_qparams")}
    assert kinds <= {PlaceholderObserver, AdaRoundObserver}


@pytest.mark.parametrize("model", [None, Net()], ids=["without_model", "with_model"])
@pytest.mark.parametrize(
    ("layer_bits", "special"),
    [
        ({"head": 8}, {"head": 8}),
        ({"blocks.1.0": 8}, {"blocks_1_0": 8}),
        ({"blocks.1": 8}, {"blocks_1_0": 8}),
        ({"blocks": 3}, {f"blocks_{i}_0": 3 for i in range(12)}),
        ({r"blocks\.[0-3]\.0": 2}, {f"blocks_{i}_0": 2 for i in range(4)}),
        ({"stem": 8, "head": 2}, {"stem": 8, "head": 2}),
    ],
)
def test_layer_bits_by_name_parent_and_pattern(layer_bits, special, model):
    assert bits(get_adaround_qconfig_mapping(layer_bits=layer_bits, model=model)) == expected(4, **special)


@pytest.mark.parametrize("pattern", [r"blocks\.1", r"blocks\.\d\.0", "ste.*", ".*ead"])
def test_a_pattern_selects_the_same_layers_with_and_without_the_model(pattern):
    with_model, without = (
        bits(get_adaround_qconfig_mapping(layer_bits={pattern: 8}, model=model)) for model in (Net(), None)
    )
    assert with_model == without


def test_the_model_gives_a_transposed_convolution_its_own_observer():
    mapping = get_adaround_qconfig_mapping(layer_bits={"up": 8}, model=Net())
    assert observers(mapping)["up"].spec.ch_axis is None
    weight_only = get_adaround_qconfig_mapping(activation_bits=None, layer_bits={"up": 8}, model=Net())
    found = observers(weight_only, backend_config=get_weight_only_backend_config())["up"]
    assert (found.spec.ch_axis, found.spec.bits) == (1, 8)


@pytest.mark.parametrize("pattern", ["tail", "blocks.99", r"blocks\.\d\d\d", "stem.weight"])
def test_names_that_the_model_lacks_are_refused(pattern):
    with pytest.raises(InvalidOptionError, match="matches none of") as caught:
        get_adaround_qconfig_mapping(layer_bits={pattern: 8}, model=Net())
    assert repr(pattern) in caught.value.subject


@pytest.mark.parametrize("model", [None, Net()], ids=["without_model", "with_model"])
def test_a_pattern_that_is_no_regular_expression_is_refused(model):
    with pytest.raises(InvalidOptionError, match="layer_bits"):
        get_adaround_qconfig_mapping(layer_bits={"*conv": 8}, model=model)


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"backend": "tpu"}, "backend"),
        ({"weight_bits": 1}, "weight_bits"),
        ({"weight_bits": 9}, "weight_bits"),
        ({"weight_bits": 4.0}, "weight_bits"),
        ({"activation_bits": 1}, "activation_bits"),
        ({"activation_bits": 9}, "activation_bits"),
        ({"activation_bits": 4.0}, "activation_bits"),
        ({"activation_bits": True}, "activation_bits"),
        ({"layer_bits": {"stem": (4, 16)}}, "layer_bits['stem']"),
        ({"layer_bits": {"stem": (4, 8, 8)}}, "layer_bits['stem']"),
        ({"layer_bits": {"stem": (4, 8)}, "activation_bits": None}, "layer_bits['stem']"),
        ({"layer_bits": {"stem": 16}}, "layer_bits['stem']"),
        ({"layer_bits": {"stem": None}}, "layer_bits['stem']"),
        ({"backend": "onednn", "symmetric": False}, "symmetric"),
    ],
)
def test_options_out_of_range_are_named(options, argument):
    with pytest.raises(InvalidOptionError) as caught:
        get_adaround_qconfig_mapping(**options)
    assert caught.value.subject == argument
