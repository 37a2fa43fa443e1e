"""Bad input to the PT2E host: the right error, naming what is wrong and the remedy, and a model that is as it was."""

from __future__ import annotations

import functools
import pickle
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.ao.quantization import MinMaxObserver as TorchAoObserver
from torch.ao.quantization.backend_config import get_native_backend_config
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e, prepare_qat_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

from adaround_plugin import (
    AdaRoundError,
    InvalidBatchError,
    InvalidModelError,
    InvalidOptionError,
    NonFiniteError,
    get_report,
)
from adaround_plugin.hosts.pt2e import AdaRoundWeightOnlyQuantizer
from integration_tests.models import batches, images, learn
from integration_tests.pt2e_models import (
    EveryOperator,
    Unchanged,
    calibrated,
    convert,
    copied,
    exported,
    x86,
)

SHAPE = (4, 6, 6)
SIZES = (6, 6)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.b = nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)

    def forward(self, x, shift=None):
        x = self.act(self.a(x))
        return self.b(x if shift is None else x + shift)


class Keywords(Net):
    def forward(self, x, *, shift):
        return super().forward(x, shift)


class Nested(Net):
    def forward(self, inputs):
        return super().forward(inputs["x"], inputs["shift"])


@functools.cache
def _program() -> fx.GraphModule:
    torch.manual_seed(0)
    return exported(Net(), images(6, *SHAPE))


@pytest.fixture
def data() -> list[Any]:
    return batches(*SHAPE, sizes=SIZES)


@pytest.fixture
def prepared(data) -> fx.GraphModule:
    return calibrated(_program(), data, x86())


def refused(error: type[AdaRoundError], match: str, model: Any, given: Any, **options: Any) -> AdaRoundError:
    """`adaround` raises `error`, whose message matches and names a remedy, and leaves the model as it was."""
    before = Unchanged(model)
    for inplace in (False, True):
        with pytest.raises(error, match=match) as caught:
            learn(model, given, inplace=inplace, **options)
    before.check()
    found = caught.value
    assert found.subject
    assert found.remedy.endswith(".")
    assert str(found).startswith(found.subject)
    assert found.remedy in str(found)
    assert str(pickle.loads(pickle.dumps(found))) == str(found)
    return found


# --- models


def test_an_export_that_was_not_prepared(data):
    refused(InvalidModelError, "prepared.*prepare_pt2e.*calibrate", copied(_program()), data)


def test_a_converted_program(prepared, data):
    found = refused(InvalidModelError, "prepared.*(prepare_pt2e|converted)", convert(prepared), data)
    assert "quantizer" not in found.remedy


def test_the_exported_program_itself(data):
    program = torch.export.export(Net().eval(), (data[0],), strict=True)
    with pytest.raises(InvalidModelError, match=r"prepared.*ExportedProgram.*prepare_pt2e"):
        learn(program, data)


def test_a_model_prepared_for_training(data):
    program = torch.export.export(Net().train(), (data[0],), strict=True).module()
    config = get_default_x86_inductor_quantization_config(is_qat=True)
    prepared = prepare_qat_pt2e(program, X86InductorQuantizer().set_global(config))
    prepared(data[0])
    refused(InvalidModelError, "prepared.*quantization-aware training.*prepare_pt2e", prepared, data)


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.complex = nn.Linear(6, 6), nn.Linear(6, 6, dtype=torch.complex64)

    def forward(self, x):
        return self.complex(torch.relu(self.a(x)).to(torch.complex64)).abs()


def test_complex_weights_are_refused_unless_they_stay_in_float():
    given = batches(6, sizes=SIZES)
    program = exported(Complex(), given[0])
    prepared = calibrated(program, given, AdaRoundWeightOnlyQuantizer())
    refused(InvalidModelError, "layer 'complex.weight'.*complex weights.*no annotation", prepared, given)
    prepared = calibrated(program, given, AdaRoundWeightOnlyQuantizer({"complex": None}))
    learned = get_report(learn(prepared, given, solver="gptq")).layers
    assert [layer.name for layer in learned] == ["a"]


def test_no_calibration(data):
    model = prepare_pt2e(copied(_program()), x86())
    found = refused(InvalidModelError, r"observer '.*'.*no data.*calibration", model, data)
    assert re.match(r"observer 'activation_post_process_\d'", found.subject)


def test_no_calibration_of_weights_only(data):
    """The weights' observers are in the graph: they have seen nothing, either."""
    model = prepare_pt2e(copied(_program()), x86(activation_bits=None))
    refused(InvalidModelError, r"observer 'activation_post_process_\d'.*no data|seen no weight", model, data)


def test_one_observer_without_calibration(prepared, data):
    (late,) = (node.target for node in prepared.graph.nodes if node.op == "call_module" and "relu" in str(node.args))
    fresh = x86().global_config.input_activation.observer_or_fake_quant_ctr()
    prepared.set_submodule(late, fresh)
    refused(InvalidModelError, f"observer '{late}'.*no data", prepared, data)


@pytest.mark.parametrize("which", ["activation", "weight"])
def test_observers_of_torch_ao(prepared, data, which):
    for node in prepared.graph.nodes:
        if node.op == "call_module" and (node.args[0].op == "get_attr") == (which == "weight"):
            prepared.set_submodule(node.target, TorchAoObserver())
    with torch.no_grad():
        prepared(data[0])
    refused(InvalidModelError, r"observer '.*'.*torch\.ao\.quantization.*torchao", prepared, data)


class InTraining(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a, self.kind, self.bn, self.drop = nn.Conv2d(4, 4, 3), kind, nn.BatchNorm2d(4), nn.Dropout(0.5)

    def forward(self, x):
        x = torch.relu(self.a(x))
        if self.kind == "batch_norm":
            return self.bn(x)
        if self.kind == "dropout":
            return self.drop(x)
        if self.kind == "feature_dropout":
            return F.dropout2d(x, 0.5, True)
        if self.kind == "functional":
            return F.dropout(x)
        x = x.flatten(2)
        return F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)


@pytest.mark.parametrize(
    ("kind", "node"),
    [
        ("batch_norm", "batch_norm"),
        ("dropout", "dropout"),
        ("feature_dropout", "feature_dropout"),
        ("functional", "dropout"),
        ("attention", "scaled_dot_product_attention"),
    ],
)
def test_an_export_in_train_mode(data, kind, node):
    model = InTraining(kind).train()
    program = torch.export.export(model, (data[0],), strict=True).module()
    prepared = calibrated(program, data, EveryOperator())
    found = refused(InvalidModelError, r"train mode.*\.eval\(\) before torch\.export", prepared, data)
    assert node in found.subject


def test_nothing_weighted(data):
    program = exported(nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), data[0])
    prepared = calibrated(program, data, EveryOperator())
    refused(InvalidModelError, "prepared.*(no convolution or linear|without observers).*", prepared, data)


def test_everything_left_in_float_by_the_quantizer(data):
    prepared = calibrated(_program(), data, X86InductorQuantizer())
    found = refused(InvalidModelError, "prepared", prepared, data)
    assert re.search("a: .*float", str(found))
    assert "quantizer" in found.remedy


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16, torch.double])
def test_other_precisions(prepared, data, dtype):
    model = prepared.to(dtype)
    refused(InvalidModelError, rf"parameter 'a.*'.*{dtype}.*\.float\(\)".replace("torch.", r"torch\."), model, data)


def test_a_program_exported_in_half_precision(data):
    model = Net().half()
    halves = [batch.half() for batch in data]
    prepared = calibrated(exported(model, halves[0]), halves, EveryOperator())
    refused(InvalidModelError, r"parameter 'a\.weight'.*float16.*\.float\(\)", prepared, halves)


@pytest.mark.parametrize("leaf", ["weight", "bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weights_name_the_parameter(prepared, data, value, leaf):
    with torch.no_grad():
        prepared.get_parameter(f"b.{leaf}").view(-1)[0] = value
    refused(NonFiniteError, rf"parameter 'b\.{leaf}'.*NaN or infinity", prepared, data)


def test_infinite_activations_seen_in_calibration_name_the_node(data):
    model = Net()
    with torch.no_grad():
        model.a.weight.mul_(1e38)
        model.a.bias.mul_(1e38)
    huge = [batch * 100 for batch in data]
    prepared = calibrated(exported(model, huge[0]), huge, EveryOperator())
    refused(NonFiniteError, "activation of 'relu'.*observed", prepared, huge)


def test_infinite_activations_in_the_streams_name_the_layer(data):
    model = Net()
    with torch.no_grad():
        model.a.weight.mul_(1e38)
        model.a.bias.mul_(1e38)
    prepared = calibrated(exported(model, data[0]), data, x86(activation_bits=None))
    refused(NonFiniteError, "layer 'b'.*NaN or infinity", prepared, [batch * 100 for batch in data])


# --- batches


@pytest.mark.parametrize("given", [[], iter(()), torch.utils.data.DataLoader([])])
def test_no_batches(prepared, given):
    refused(InvalidBatchError, "data.*no batches", prepared, given)


@pytest.mark.parametrize("given", [images(6, *SHAPE), {"x": images(6, *SHAPE)}])
def test_a_batch_in_place_of_batches(prepared, given):
    refused(InvalidBatchError, r"batches.*\[batch\]", prepared, given)


@pytest.mark.parametrize(
    "batch",
    [(images(6, *SHAPE), 2), {"image": images(6, *SHAPE)}, {}, ()],
    ids=["too many", "unknown name", "empty", "none"],
)
def test_a_batch_that_does_not_fit_the_signature(prepared, data, batch):
    found = refused(InvalidBatchError, r"batch 1.*\['x'\].*inputs=", prepared, [data[0], batch])
    assert found.subject == "batch 1"


@pytest.mark.parametrize("shape", [(4, *SHAPE), (6, 4, 5, 6), (6, 3, 6, 6), (6, 4, 6), (1, 6, *SHAPE)])
def test_a_shape_other_than_the_exports(prepared, data, shape):
    found = refused(InvalidBatchError, "batch 1.*does not fit", prepared, [data[0], images(*shape)])
    assert found.subject == "batch 1"


def test_another_batch_size_names_dynamic_shapes(prepared, data):
    refused(InvalidBatchError, "batch 1.*dynamic_shapes", prepared, [data[0], images(4, *SHAPE)])


def test_a_dynamic_batch_still_has_its_other_dimensions(data):
    program = exported(Net(), data[0], {"x": {0: torch.export.Dim("batch")}})
    prepared = calibrated(program, data, x86())
    refused(InvalidBatchError, "batch 1.*does not fit", prepared, [data[0], images(6, 4, 5, 5)])
    learn(prepared, [data[0], images(4, *SHAPE)])


def _keywords() -> tuple[fx.GraphModule, Tensor, Tensor]:
    x, shift = images(6, *SHAPE), images(6, 4, 4, 4, seed=1)
    program = torch.export.export(Keywords().eval(), (x,), {"shift": shift}, strict=True).module()
    prepared = prepare_pt2e(program, x86())
    with torch.no_grad():
        prepared(x, shift=shift)
    return prepared, x, shift


def test_keyword_names_are_checked():
    prepared, x, shift = _keywords()
    for batch in ({"x": x}, {"x": x, "shifts": shift}, {"shift": shift}, (x,), x, (x, shift, shift)):
        refused(InvalidBatchError, r"batch 0.*\['x', 'shift'\]", prepared, [batch])
    learn(prepared, [{"shift": shift, "x": x}])


@pytest.mark.parametrize(
    "batch",
    [
        (images(6, *SHAPE),),
        ([images(6, *SHAPE), images(6, 4, 4, 4)],),
        ({"x": images(6, *SHAPE)},),
        ({"x": images(6, *SHAPE), "other": images(6, 4, 4, 4)},),
        ({"x": images(6, *SHAPE), "shift": images(6, 4, 4, 4), "more": images(1)},),
    ],
    ids=["tensor", "list", "missing", "other name", "more"],
)
def test_a_structure_other_than_the_exports(batch):
    given = ({"x": images(6, *SHAPE), "shift": images(6, 4, 4, 4, seed=1)},)
    prepared = calibrated(exported(Nested(), given), [given], x86())
    refused(InvalidBatchError, "(?s)batch 1.*structure.*example inputs", prepared, [given, batch])


def test_labels_that_nothing_takes(prepared, data):
    pairs = [(batch, torch.zeros(len(batch))) for batch in data]
    refused(InvalidBatchError, r"batch 0.*inputs=lambda batch: batch\[0\]", prepared, pairs)
    learn(prepared, pairs, inputs=lambda pair: pair[0])


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16, torch.double])
def test_inputs_that_are_not_float32_are_named(prepared, data, dtype):
    refused(InvalidBatchError, "batch 1.*'x'.*Pass float32", prepared, [data[0], data[1].to(dtype)])


def test_inputs_of_integers_where_the_export_has_floats(prepared, data):
    refused(InvalidBatchError, "batch 1.*int64", prepared, [data[0], torch.ones(6, *SHAPE, dtype=torch.long)])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_inputs_are_named(prepared, data, value):
    data[1][1, 0, 0, 0] = value
    refused(InvalidBatchError, "batch 1.*'x'.*NaN or infinity", prepared, data)


@pytest.mark.parametrize("batch", ["image", None, 3, images(6, *SHAPE)[:0]])
def test_a_batch_without_data(prepared, data, batch):
    refused(InvalidBatchError, "batch 1", prepared, [data[0], batch])


# --- options


def test_a_backend_config_is_for_fx(prepared, data):
    config = get_native_backend_config()
    found = refused(InvalidOptionError, "backend_config.*prepare_fx.*quantizer", prepared, data, backend_config=config)
    assert found.subject == "backend_config"


@pytest.mark.parametrize(
    ("option", "value"), [("solver", "anealing"), ("search_scale", "mse"), ("holdout", 0.6), ("exclude", ["c"])]
)
def test_options_out_of_range(prepared, data, option, value):
    refused(InvalidOptionError, option, prepared, data, **{option: value})


def test_a_transposed_convolution_under_an_observer_along_its_inputs(data):
    program = exported(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ConvTranspose2d(4, 6, 2)), data[0])
    prepared = calibrated(program, data, EveryOperator(transposed_axis=0))
    refused(InvalidModelError, "layer '1'.*axis 0.*ch_axis=1", prepared, data)
