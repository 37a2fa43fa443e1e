"""Bad input: the right error, naming what is wrong and the remedy, and a model that is as it was."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.ao.quantization import QConfigMapping, get_default_qat_qconfig_mapping, get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx

from adaround_plugin import (
    AdaRoundError,
    AdaRoundObserver,
    InvalidBatchError,
    InvalidModelError,
    InvalidOptionError,
    LayerWise,
    NonFiniteError,
    adaround,
    get_adaround_qconfig_mapping,
    get_report,
)
from integration_tests.models import assert_unchanged, batches, images, learn, own_mapping, prepared_model, snapshot

SHAPE = (4, 6, 6)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.b = nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)

    def forward(self, x, dim=2):
        x = self.act(self.a(x))
        return self.b(x.transpose(dim, 3))


@pytest.fixture
def data() -> list[Any]:
    return batches(*SHAPE)


@functools.cache
def _prepared() -> fx.GraphModule:
    torch.manual_seed(0)
    return prepared_model(Net(), batches(*SHAPE), histogram=True)


@pytest.fixture
def prepared() -> fx.GraphModule:
    return copy.deepcopy(_prepared())


def refused(error: type[AdaRoundError], match: str, model: nn.Module, given: Any, **options: Any) -> AdaRoundError:
    """`adaround` raises `error`, whose message matches and names a remedy, and leaves the model as it was."""
    before = snapshot(model)
    meta = dict(getattr(model, "meta", {}))
    configs = {name: getattr(module, "qconfig", None) for name, module in model.named_modules()}
    for inplace in (False, True):
        with pytest.raises(error, match=match) as caught:
            learn(model, given, solver="nearest", inplace=inplace, **options)
    assert_unchanged(before, model)
    assert dict(getattr(model, "meta", {})) == meta
    assert all(getattr(module, "qconfig", None) is configs[name] for name, module in model.named_modules())
    found = caught.value
    assert found.subject
    assert found.remedy.endswith(".")
    assert str(found).startswith(found.subject)
    assert found.remedy in str(found)
    assert str(pickle.loads(pickle.dumps(found))) == str(found)
    return found


# --- models


def test_a_model_that_was_not_prepared(data):
    refused(InvalidModelError, "prepared.*Net.*prepare_fx", Net().eval(), data)


def test_a_converted_model(prepared, data):
    refused(InvalidModelError, "prepared.*prepare_fx", convert_fx(copy.deepcopy(prepared)), data)


def test_a_traced_model_that_was_not_prepared(data):
    refused(InvalidModelError, "prepared.*prepare_fx", torch.fx.symbolic_trace(Net().eval()), data)


@pytest.mark.parametrize("model", [None, 3, "model", lambda x: x])
def test_something_that_is_no_model(model, data):
    with pytest.raises(InvalidModelError, match="prepared"):
        adaround(model, data, progress=False)


def test_train_mode(prepared, data):
    prepared.train()
    refused(InvalidModelError, r"train mode.*eval\(\)", prepared, data)


def test_a_batch_norm_in_train_mode_is_named(data):
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.BatchNorm2d(4))
    prepared = prepared_model(model, data)
    prepared.get_submodule("2").train()
    refused(InvalidModelError, r"'2'.*train mode", prepared, data)


def test_no_calibration(data):
    prepared = prepare_fx(Net().eval(), get_adaround_qconfig_mapping("x86"), (data[0],))
    refused(InvalidModelError, "observer 'activation_post_process_0'.*no data.*calibration", prepared, data)


def test_one_branch_without_calibration(data):
    prepared = prepare_fx(Net().eval(), get_adaround_qconfig_mapping("x86"), (data[0],))
    prepared.get_submodule("activation_post_process_0")(data[0])
    refused(InvalidModelError, r"observer 'activation_post_process_[1-9]'.*no data", prepared, data)


def test_stock_observers_without_calibration(data):
    prepared = prepare_fx(Net().eval(), get_default_qconfig_mapping("x86"), (data[0],))
    refused(InvalidModelError, "observer .*no data", prepared, data)


def test_nothing_weighted(data):
    prepared = prepared_model(nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), data)
    refused(InvalidModelError, "prepared.*no convolution or linear.*qconfig", prepared, data)


def test_everything_left_in_float_by_the_qconfig(data):
    mapping = QConfigMapping().set_global(None)
    prepared = prepare_fx(Net().eval(), mapping, (data[0],))
    refused(InvalidModelError, "no weighted node is quantized.*a: left in float.*qconfig", prepared, data)


def test_a_model_prepared_for_training(data):
    prepared = prepare_qat_fx(Net().train(), get_default_qat_qconfig_mapping("x86"), (data[0],))
    prepared(data[0])
    refused(InvalidModelError, "prepared.*quantization-aware training.*prepare_fx", prepared.eval(), data)


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.complex, self.b = nn.Linear(6, 6), nn.Linear(6, 6, dtype=torch.complex64), nn.Linear(6, 3)

    def forward(self, x):
        return self.b(self.complex(torch.relu(self.a(x)).to(torch.complex64)).abs())


@pytest.mark.filterwarnings("ignore:Casting complex values to real:UserWarning")
@pytest.mark.parametrize("activation_bits", [8, None])
def test_complex_weights_are_refused_unless_they_stay_in_float(activation_bits):
    given = batches(6)
    prepared = prepared_model(Complex(), given, activation_bits=activation_bits)
    refused(InvalidModelError, "layer 'complex'.*complex weights.*qconfig of None", prepared, given)
    mapping = own_mapping(activation_bits=activation_bits).set_module_name("complex", None)
    prepared = prepared_model(Complex(), given, mapping=mapping, activation_bits=activation_bits)
    learned = get_report(learn(prepared, given, solver="gptq")).layers
    assert [layer.name for layer in learned] == ["a", "b"]


def test_half_precision_model(prepared, data):
    prepared.half()
    refused(InvalidModelError, r"parameter 'a.*weight'.*float16.*\.float\(\)", prepared, data)


def test_bfloat16_and_double_models(prepared, data):
    for dtype in (torch.bfloat16, torch.double):
        model = copy.deepcopy(prepared).to(dtype)
        refused(InvalidModelError, rf"parameter 'a.*'.*{dtype}".replace("torch.", r"torch\."), model, data)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weights_name_the_parameter(prepared, data, value):
    with torch.no_grad():
        prepared.get_submodule("b").weight[0, 0] = value
    refused(NonFiniteError, r"parameter 'b\.weight'.*NaN or infinity", prepared, data)


def test_non_finite_biases_name_the_parameter(prepared, data):
    with torch.no_grad():
        prepared.get_submodule("b").bias[0] = float("nan")
    refused(NonFiniteError, r"parameter 'b\.bias'", prepared, data)


def test_non_finite_buffers_do_not_pass(data):
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    prepared = prepared_model(model, data, activation_bits=None)
    prepared.get_submodule("2").running_mean[1] = float("nan")
    refused(NonFiniteError, "'2'|'3'", prepared, data)


def test_infinite_activations_seen_in_calibration_name_the_node(data):
    model = Net()
    with torch.no_grad():
        model.a.weight.mul_(1e30)
        model.b.weight.mul_(1e30)
    mapping = QConfigMapping().set_global(
        torch.ao.quantization.QConfig(
            torch.ao.quantization.MinMaxObserver.with_args(dtype=torch.quint8), AdaRoundObserver.with_args()
        )
    )
    try:
        prepared = prepared_model(model, data, mapping=mapping)
    except Exception as error:
        pytest.skip(f"the host's observer refuses infinity by itself: {error}")
    refused(NonFiniteError, "activation of 'b'.*observed", prepared, data)


def test_infinite_activations_in_the_streams_name_the_layer(data):
    model = Net()
    with torch.no_grad():
        model.a.weight.mul_(1e38)
        model.a.bias.mul_(1e38)
    prepared = prepared_model(model, data, activation_bits=None)
    refused(NonFiniteError, "layer 'b'.*NaN or infinity", prepared, [batch * 100 for batch in data])


# --- batches


@pytest.mark.parametrize("given", [[], (), iter(()), torch.utils.data.DataLoader([])])
def test_no_batches(prepared, given):
    refused(InvalidBatchError, "^data: .*no batches", prepared, given)


def test_a_consumed_iterator(prepared, data):
    iterator = iter(data)
    list(iterator)
    refused(InvalidBatchError, "^data: .*iterator", prepared, iterator)


@pytest.mark.parametrize("given", [images(4, *SHAPE), {"x": images(4, *SHAPE)}])
def test_a_batch_in_place_of_batches(prepared, given):
    refused(InvalidBatchError, r"^data: .*\[batch\]", prepared, given)


@pytest.mark.parametrize("given", [3, None, object()])
def test_no_iterable(prepared, given):
    refused(InvalidBatchError, "^data: .*iterable", prepared, given)


@pytest.mark.parametrize(
    "batch",
    [(images(2, *SHAPE), 2, torch.zeros(2)), {"image": images(2, *SHAPE)}, {"dim": 3}, ()],
    ids=["too many", "unknown name", "missing", "none"],
)
def test_a_batch_that_does_not_fit_the_signature(prepared, data, batch):
    found = refused(InvalidBatchError, r"batch 1.*\['x', 'dim'\].*inputs=", prepared, [data[0], batch])
    assert found.subject == "batch 1"


def test_labels_that_nothing_takes(data):
    prepared = prepared_model(nn.Sequential(nn.Conv2d(4, 4, 3)), data)
    pairs = [(batch, torch.zeros(len(batch))) for batch in data]
    refused(InvalidBatchError, r"batch 0.*inputs=lambda batch: batch\[0\]", prepared, pairs)
    learn(prepared, pairs, inputs=lambda pair: pair[0])


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16, torch.double])
def test_inputs_that_are_not_float32_are_named(prepared, data, dtype):
    refused(InvalidBatchError, "batch 1.*'x'.*Pass float32", prepared, [data[0], data[1].to(dtype)])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_inputs_are_named(prepared, data, value):
    data[2][1, 0, 0, 0] = value
    refused(InvalidBatchError, "batch 2.*'x'.*NaN or infinity", prepared, data)


def test_a_batch_without_samples(prepared, data):
    refused(InvalidBatchError, "batch 1.*no data", prepared, [data[0], data[1][:0]])


def test_a_batch_that_is_no_tensor(prepared, data):
    refused(InvalidBatchError, "batch 1", prepared, [data[0], "image"])


def test_a_shape_that_does_not_fit_names_the_layer(prepared, data):
    with pytest.raises(InvalidBatchError, match=r"layer 'a'.*\(4, 3, 6, 6\).*does not fit"):
        learn(prepared, [images(4, 3, 6, 6)])


def test_an_error_of_the_loader_is_the_callers(prepared, data):
    def loader():
        yield data[0]
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        learn(prepared, loader())


# --- options


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("solver", "anealing"),
        ("solver", None),
        ("solver", 3),
        ("search_scale", "mse"),
        ("search_scale", None),
        ("levels", "nearest"),
        ("holdout", -0.1),
        ("holdout", 0.6),
        ("holdout", float("nan")),
        ("holdout", "half"),
        ("holdout", None),
        ("max_columns", 0),
        ("max_columns", -5),
        ("max_columns", "all"),
        ("max_columns", None),
        ("damping", 0.0),
        ("damping", -1.0),
        ("damping", float("nan")),
        ("damping", "none"),
        ("damping", None),
        ("column_weighting", "norm"),
        ("column_weighting", None),
        ("propagate_error", "yes"),
        ("propagate_error", None),
        ("correct_bias", "no"),
    ],
)
def test_options_of_layers_out_of_range(option, value):
    with pytest.raises(InvalidOptionError, match=option) as caught:
        LayerWise(**{option: value})
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("finetune", 3),
        ("seed", "zero"),
        ("inputs", "x"),
        ("progress", None),
        ("inplace", "yes"),
        ("backend_config", "x86"),
    ],
)
def test_arguments_out_of_range(prepared, data, option, value):
    before = snapshot(prepared)
    with pytest.raises(InvalidOptionError, match=option):
        adaround(prepared, data, **{"progress": False, option: value})
    assert_unchanged(before, prepared)


@pytest.mark.parametrize("method", ["defualt", None, 3, LayerWise, nn.Linear(2, 2)])
def test_an_unknown_method_is_refused_with_the_known_ones(prepared, data, method):
    with pytest.raises(InvalidOptionError, match=r"method.*default.*blocks") as caught:
        adaround(prepared, data, method, progress=False)
    assert caught.value.subject == "method"


@pytest.mark.parametrize("bits", [1, 9, 0, -4, 4.0, True, "4", None])
def test_weight_bits(bits):
    with pytest.raises(InvalidOptionError, match=r"weight_bits.*2 to 8"):
        get_adaround_qconfig_mapping("x86", weight_bits=bits)
    with pytest.raises(InvalidOptionError, match=r"layer_bits\['a'\].*2 to 8"):
        get_adaround_qconfig_mapping("x86", layer_bits={"a": bits})


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"backend": "cuda"}, "backend.*cuda.*fbgemm"),
        ({"activation_bits": 9}, "activation_bits.*9"),
        ({"backend": "onednn", "symmetric": False}, "symmetric.*onednn"),
        ({"layer_bits": {"c": 4}, "model": Net()}, r"layer_bits\['c'\].*matches none of"),
        ({"layer_bits": {"[": 4}, "model": Net()}, r"layer_bits"),
        ({"layer_bits": {"[": 4}}, r"layer_bits"),
    ],
)
def test_mapping_options(options, match):
    with pytest.raises(InvalidOptionError, match=match):
        get_adaround_qconfig_mapping(**options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"bits": 9}, "bits"),
        ({"scale": "max"}, "scale"),
        ({"qscheme": torch.per_channel_affine_float_qparams}, "qscheme"),
        ({"quant_min": -200, "quant_max": 100}, "quant_min, quant_max"),
        ({"quant_min": 3, "quant_max": 2}, "quant_min, quant_max"),
        ({"quant_min": 0, "quant_max": 0}, "quant_min, quant_max"),
    ],
)
def test_observer_options(options, match):
    with pytest.raises(InvalidOptionError, match=match):
        AdaRoundObserver(**options)


def test_a_transposed_convolution_under_an_observer_along_its_inputs(data):
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ConvTranspose2d(4, 6, 2))
    mapping = get_adaround_qconfig_mapping("x86", activation_bits=None, layer_bits={"1": 3})
    prepared = prepared_model(model, data, mapping=mapping, activation_bits=None)
    refused(InvalidModelError, "layer '1'.*axis 0.*ch_axis=1.*model=", prepared, data)
