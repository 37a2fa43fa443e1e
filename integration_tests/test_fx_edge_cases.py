"""Degenerate layers and data, mixed precision, what is skipped and why, and reports."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.quantization import QConfigMapping
from torch.ao.quantization.quantize_fx import convert_fx, convert_to_reference_fx, prepare_fx

from adaround_plugin import (
    AdaRoundObserver,
    InvalidModelError,
    LayerWise,
    adaround,
    get_adaround_qconfig_mapping,
    get_report,
    get_weight_only_backend_config,
)
from adaround_plugin.report import Report
from integration_tests.models import (
    COMPUTED_WEIGHTS,
    assert_same,
    batches,
    call,
    converted,
    images,
    learn,
    learned,
    prepared_model,
    prepared_net,
)
from integration_tests.pairs import pairwise

SHAPE = (4, 6, 6)
SOLVERS = ("annealing", "coordinate_descent", "gptq", "nearest")


def net(*, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, padding=1, bias=bias),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, bias=bias),
        nn.Flatten(),
        nn.Linear(64, 3),
    )


def assert_sound(
    model: nn.Module, data: list[Any], *, weight_only: bool = False, histogram: bool = False, **options: Any
) -> Report:
    """Learning works, nothing in its result or report is NaN, and the conversions are finite and exact."""
    prepared = prepared_model(model, data, histogram=histogram, activation_bits=None if weight_only else 8)
    result = learn(prepared, data, **{"solver": "gptq", **options})
    for name, value in result.state_dict().items():
        if isinstance(value, Tensor) and "activation_post_process" not in name:
            assert torch.isfinite(value.float()).all(), name
    report = get_report(result)
    for layer in report.layers:
        for value in (layer.nearest_error, layer.learned_error, layer.nearest_holdout, layer.learned_holdout):
            assert value is None or (math.isfinite(value) and value >= 0)
        assert torch.isfinite(learned(result, layer.name).scale).all()
    assert report.output_error is None or math.isfinite(report.output_error)
    config = get_weight_only_backend_config() if weight_only else None
    reference = convert_to_reference_fx(copy.deepcopy(result), backend_config=config)
    for layer in report.layers:
        assert_same(converted(reference, layer.name), learned(result, layer.name))
    with torch.no_grad():
        assert torch.isfinite(call(reference, data[0])).all()
    json.loads(report.to_json())
    assert str(report)
    return report


@pytest.mark.parametrize(
    ("which", "solver", "weight_only"),
    pairwise(["channels", "columns", "all", "bias", "everything"], SOLVERS, [False, True]),
)
def test_zero_weights(which, solver, weight_only):
    model = net()
    with torch.no_grad():
        for layer in (model[0], model[2], model[4]):
            if which == "channels":
                layer.weight[1:3] = 0
            elif which == "columns":
                layer.weight[:, 1:3] = 0
            elif which == "bias":
                layer.bias.zero_()
            else:
                layer.weight.zero_()
            if which == "everything":
                layer.bias.zero_()
    assert_sound(model, batches(*SHAPE), solver=solver, weight_only=weight_only)


def test_zero_channels_stay_zero():
    model = net()
    with torch.no_grad():
        model[0].weight[1:3] = 0
    data = batches(*SHAPE)
    result = learn(prepared_model(model, data), data, correct_bias=False, propagate_error=False)
    found = learned(result, "0")
    assert not (found.integers - found.zero_point.view(-1, 1, 1, 1))[1:3].any()


@pytest.mark.parametrize(
    ("value", "weight_only", "holdout", "solver"),
    pairwise([0.0, 1.0, -3.0, 1e-20, 1e10], [False, True], [0.0, 0.25], ["annealing", "gptq"]),
)
def test_constant_inputs(value, weight_only, holdout, solver):
    data = [torch.full_like(batch, value) for batch in batches(*SHAPE)]
    assert_sound(net(), data, weight_only=weight_only, holdout=holdout, solver=solver)


@pytest.mark.parametrize("value", [0.0, 1e10])
def test_constant_inputs_under_the_hosts_own_activation_observer(value):
    data = [torch.full_like(batch, value) for batch in batches(*SHAPE)]
    assert_sound(net(), data, histogram=True)


@pytest.mark.parametrize(
    ("kind", "recipe", "solver"),
    pairwise(
        ["zeros", "sparse", "one live channel", "dead relu"],
        [{"column_weighting": "inverse_norm"}, {"propagate_error": False}, {"correct_bias": False}],
        ["annealing", "gptq"],
    ),
)
def test_degenerate_activations_under_every_recipe(kind, recipe, solver):
    data = batches(*SHAPE)
    model = net()
    if kind == "zeros":
        data = [torch.zeros_like(batch) for batch in data]
    elif kind == "sparse":
        data = [batch * (images(*batch.shape, seed=9) > 2) for batch in data]
    elif kind == "one live channel":
        data = [torch.cat([batch[:, :1], torch.zeros_like(batch[:, 1:])], 1) for batch in data]
    else:
        with torch.no_grad():
            model[0].bias.fill_(-1e3)
    assert_sound(model, data, solver=solver, **recipe)


@pytest.mark.parametrize(
    "sizes",
    [(1,), (2,), (1, 1), (1, 1, 1), (6, 1), (1, 6), (8, 8, 3), (16,)],
    ids=lambda sizes: "+".join(map(str, sizes)),
)
def test_few_and_uneven_samples(sizes):
    data = batches(*SHAPE, sizes=sizes)
    report = assert_sound(net(), data)
    held = [layer.nearest_holdout is not None for layer in report.layers]
    assert all(held) == any(held) == (sum(sizes) > 1)
    result = adaround(prepared_model(net(), data), data, LayerWise(solver="gptq"), progress=False)
    assert len(get_report(result).trials) > 1


@pytest.mark.parametrize("solver", ["annealing", "coordinate_descent", "gptq"])
def test_fewer_columns_than_unknowns(solver):
    """A linear layer with 64 inputs and two samples: the hessian has rank one or two."""
    model = nn.Sequential(nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 2))
    assert_sound(model, batches(64, sizes=(2, 1)), solver=solver)
    assert_sound(model, batches(64, sizes=(1,)), solver=solver, holdout=0.0)


@pytest.mark.parametrize("max_columns", [1, 2, 7, 100])
def test_few_columns_by_choice(max_columns):
    report = assert_sound(net(), batches(*SHAPE), max_columns=max_columns)
    for layer in report.layers:
        # four per weight of a row are taken in any case
        assert layer.columns <= max(max_columns, 4 * math.prod(layer.shape[1:])) + 1


def test_batches_from_which_no_column_is_taken():
    """More samples than columns, one by one: many batches have no part in the moments."""
    data = batches(6, sizes=(1,) * 40)
    report = assert_sound(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)), data, max_columns=5)
    assert [layer.columns for layer in report.layers] == pytest.approx([24, 16], abs=1)


@pytest.mark.parametrize("holdout", [0.0, 0.01, 0.5])
def test_holdout_shares(holdout):
    report = assert_sound(net(), batches(*SHAPE), holdout=holdout)
    assert all((layer.nearest_holdout is None) == (holdout == 0) for layer in report.layers)


@pytest.mark.parametrize("weight_only", [False, True], ids=["w4a8", "w4"])
@pytest.mark.parametrize("kind", ["conv1d", "conv2d", "conv3d", "transposed2d", "linear"])
def test_unbatched_inputs(kind, weight_only):
    make, shape = {
        "conv1d": (lambda: nn.Conv1d(4, 3, 3), (4, 7)),
        "conv2d": (lambda: nn.Conv2d(4, 3, 3), SHAPE),
        "conv3d": (lambda: nn.Conv3d(4, 3, 2), (4, 3, 4, 4)),
        "transposed2d": (lambda: nn.ConvTranspose2d(4, 4, 2), SHAPE),
        "linear": (lambda: nn.Linear(5, 3), (5,)),
    }[kind]
    data = [images(*shape, seed=i) for i in range(6)]
    report = assert_sound(nn.Sequential(make(), nn.ReLU()), data, weight_only=weight_only)
    assert report.layers[0].columns > 0


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (1, 1, 5)])
def test_linear_on_inputs_of_any_rank(shape):
    data = batches(*shape)
    report = assert_sound(nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)), data)
    assert {layer.columns for layer in report.layers} == {16 * math.prod(shape[:-1])}


class Folded(nn.Module):
    """Windows folded into the leading axis, and a layer whose leading axis is not the samples'."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(16, 2)

    def forward(self, x):
        y = torch.relu(self.a(x)).flatten(0, 2)
        y = self.b(y).mean(0, keepdim=True)
        return y + self.c(torch.relu(x.flatten(1)[:, :16]))[:, :1]


def test_leading_axes_that_are_not_the_samples():
    report = assert_sound(Folded(), batches(*SHAPE))
    assert sorted(layer.name for layer in report.layers) == ["a", "b", "c"]


def test_spatial_sizes_that_differ_between_batches():
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 3, 1))
    data = [images(4, 4, 6, 6), images(3, 4, 9, 5), images(2, 4, 3, 3)]
    report = assert_sound(model, data)
    assert report.layers[0].columns == 4 * 16 + 3 * 21 + 2
    assert_sound(model, data, max_columns=20)


def test_a_network_without_biases_gets_them_where_it_helps():
    data = batches(*SHAPE)
    result = learn(prepared_model(net(bias=False), data), data, holdout=0.0)
    layer = get_report(result).layers[0]
    assert layer.bias == ("added" if layer.learned else "kept")
    assert (result.get_submodule("0")[0].bias is not None) == (layer.bias == "added")
    without = learn(prepared_model(net(bias=False), data), data, correct_bias=False)
    assert without.get_submodule("0")[0].bias is None


def test_one_output_channel_and_one_input_channel():
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(), nn.Conv2d(1, 1, 3, bias=False), nn.Flatten(), nn.Linear(16, 1))
    assert_sound(model, batches(1, 6, 6))


# --- mixed precision


@pytest.mark.parametrize("with_model", [False, True])
def test_bits_of_single_layers(with_model, engine):
    engine("x86")
    model, data = net(), batches(*SHAPE)
    options: dict[str, Any] = {"layer_bits": {"0": 8, r"[4]": 2}, "model": model if with_model else None}
    result = learn(prepared_model(model, data, weight_bits=3, **options), data, solver="gptq")
    assert [(layer.name, layer.bits) for layer in get_report(result).layers] == [("0", 8), ("2", 3), ("4", 2)]
    native = convert_fx(copy.deepcopy(result))
    for name, bits in (("0", 8), ("2", 3), ("4", 2)):
        found = converted(native, name)
        assert_same(found, learned(result, name))
        assert -(2 ** (bits - 1)) <= int(found.integers.min())
        assert int(found.integers.max()) < 2 ** (bits - 1)


def test_bits_of_a_parent_and_of_a_transposed_convolution():
    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.ConvTranspose2d(4, 4, 2))
            self.head = nn.Conv2d(4, 2, 1)

        def forward(self, x):
            return self.head(self.body(x))

    model, data = Parent().eval(), batches(*SHAPE)
    for bits in (8, None):
        prepared = prepared_model(model, data, layer_bits={"body": 2}, model=model, activation_bits=bits)
        found = {layer.name: layer.bits for layer in get_report(learn(prepared, data)).layers}
        assert found == {"body.0": 2, "body.3": 2, "head": 4}


# --- what is not learned


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.inner = nn.Embedding(11, 6), nn.Linear(6, 6)
        self.lstm, self.gru = nn.LSTM(6, 6, batch_first=True), nn.GRU(6, 6, batch_first=True)
        self.cell, self.plain, self.last = nn.GRUCell(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, tokens):
        x = self.inner(self.embedding(tokens))
        x, _ = self.gru(self.lstm(x)[0])
        return self.last(torch.relu(self.plain(self.cell(x.mean(1)))))


def _everything() -> tuple[nn.Module, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return Everything(), [torch.randint(0, 11, (size, 5), generator=generator) for size in (6, 6, 4)]


def test_what_is_skipped_has_its_reason():
    model, data = _everything()
    mapping = get_adaround_qconfig_mapping("x86").set_module_name("plain", None)
    result = learn(prepared_model(model, data, mapping=mapping), data, solver="gptq")
    report = get_report(result)
    assert [layer.name for layer in report.layers] == ["inner", "last"]
    reasons = {name: reason for name, _, reason in report.skipped}
    assert set(reasons) == {"embedding", "lstm", "gru", "cell", "plain"}
    assert "embedding" in reasons["embedding"]
    for name in ("lstm", "gru", "cell"):
        assert "recurrent" in reasons[name]
    assert "float" in reasons["plain"]
    assert "qconfig" in reasons["plain"]
    text = str(report)
    assert all(name in text for name in reasons)
    before, after = model.state_dict(), result.state_dict()
    for name in ("plain.weight", "lstm.weight_ih_l0", "gru.weight_hh_l0", "cell.weight_ih", "embedding.weight"):
        assert torch.equal(before[name], after[name])


def test_an_excluded_name_of_a_skipped_layer_is_no_error():
    model, data = _everything()
    result = learn(prepared_model(model, data), data, exclude=["lstm", "last"])
    assert {"lstm", "last"} <= {name for name, _, _ in get_report(result).skipped}


def test_float_layers_between_learned_ones_stay_as_they_were():
    model, data = net(), batches(*SHAPE)
    mapping = get_adaround_qconfig_mapping("x86").set_module_name("2", None)
    result = learn(prepared_model(model, data, mapping=mapping), data, solver="gptq")
    assert [layer.name for layer in get_report(result).layers] == ["0", "4"]
    assert torch.equal(result.get_submodule("2").weight, model[2].weight)
    assert torch.equal(result.get_submodule("2").bias, model[2].bias)
    assert isinstance(convert_fx(copy.deepcopy(result)).get_submodule("2"), nn.Conv2d)


class Odd(nn.Module):
    """Functional calls whose weight or settings are computed, and a parameter that is read elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(4, 4, 3, padding=1)
        self.used, self.computed = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        x = self.a(x).mean((2, 3))
        x = F.linear(x, self.used) * self.used.sum()
        return F.linear(x, self.computed * 2.0)


def test_functional_calls_that_cannot_be_written_are_skipped():
    data = batches(*SHAPE)
    result = learn(prepared_model(Odd(), data), data, solver="gptq")
    report = get_report(result)
    assert [layer.name for layer in report.layers] == ["a"]
    reasons = {name: reason for name, _, reason in report.skipped}
    assert len(reasons) == 2
    assert "without quantization" in reasons["used"]
    assert any("computed" in reason for reason in reasons.values())
    convert_to_reference_fx(copy.deepcopy(result))


def test_weights_tied_under_different_grids_are_skipped_and_converted_by_the_host():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.c(self.b(torch.relu(self.a(x))))

    data = batches(6)
    result = learn(prepared_model(Tied(), data, layer_bits={"b": 8}), data, solver="gptq")
    report = get_report(result)
    assert [layer.name for layer in report.layers] == ["c"]
    assert [name for name, _, _ in report.skipped] == ["a", "b"]
    assert all("tied" in reason for _, _, reason in report.skipped)
    convert_to_reference_fx(copy.deepcopy(result))


@pytest.mark.parametrize("activation_bits", [8, None])
@pytest.mark.parametrize("kind", COMPUTED_WEIGHTS)
def test_beside_a_computed_weight_the_other_layers_are_learned(kind, activation_bits):
    _, prepared, data = prepared_net(kind.__name__, activation_bits)
    report = get_report(learn(prepared, data, solver="gptq"))
    modules = {name for name, module in kind().named_children()}
    assert {layer.name for layer in report.layers} == modules
    assert {reason for _, _, reason in report.skipped} == {"its weight is computed, not a parameter"}


class PartlyUsed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Conv2d(4, 2, 3), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.used(x)


def test_a_module_that_is_never_called_is_neither_learned_nor_reported():
    data = batches(*SHAPE)
    report = get_report(learn(prepared_model(PartlyUsed(), data), data, solver="gptq"))
    assert [layer.name for layer in report.layers] == ["used"]
    assert report.skipped == []


class Unread(PartlyUsed):
    """Layers are called for nothing."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, 1, 1))

    def forward(self, x):
        self.unused(x)
        torch.conv2d(x, self.weight)
        return self.used(x)


def test_a_layer_whose_result_is_not_used_is_skipped_with_that_reason():
    data = batches(*SHAPE)
    report = get_report(learn(prepared_model(Unread(), data), data, solver="gptq"))
    assert [layer.name for layer in report.layers] == ["used"]
    reason = "its result is not used: the host's convert drops it"
    assert [(name, why) for name, _, why in report.skipped] == [("unused", reason), ("weight", reason)]


# --- reports


@pytest.mark.parametrize("model", [nn.Linear(2, 2), torch.fx.symbolic_trace(nn.Linear(2, 2)), None])
def test_a_foreign_model_has_no_report(model):
    with pytest.raises(InvalidModelError, match=r"model.*no AdaRound report.*adaround\(\.\.\.\)"):
        get_report(model)


def test_a_prepared_model_has_no_report_yet():
    data = batches(*SHAPE)
    with pytest.raises(InvalidModelError, match="no AdaRound report"):
        get_report(prepared_model(net(), data))


def test_the_report_as_json_is_the_report():
    data = batches(*SHAPE)
    result = adaround(prepared_model(net(), data), data, progress=False, exclude=["2"])
    report = get_report(result)
    assert Report.from_json(report.to_json()) == report
    assert json.loads(report.to_json(indent=None)) == json.loads(report.to_json())
    assert get_report(copy.deepcopy(result)) == report
    assert all(layer.name in str(report) for layer in report.layers)
    assert "tried" in str(report)
    assert {"forward", "moments", "solve", "trials", "total"} <= set(report.seconds)


def test_the_reports_json_is_strict_even_for_a_constant_output():
    """NaN and Infinity are no JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    data = [torch.zeros_like(batch) for batch in batches(*SHAPE)]
    report = get_report(learn(prepared_model(net(), data), data, solver="gptq"))
    json.loads(report.to_json(), parse_constant=refuse)


def test_own_observer_in_a_hand_made_mapping():
    data = batches(*SHAPE)
    activation = torch.ao.quantization.get_default_qconfig("x86").activation
    weight = AdaRoundObserver.with_args(bits=5, scale="minmax", qscheme=torch.per_tensor_affine)
    mapping = QConfigMapping().set_global(torch.ao.quantization.QConfig(activation, weight))
    result = learn(prepared_model(net(), data, mapping=mapping), data, solver="gptq")
    assert {layer.bits for layer in get_report(result).layers} == {5}


def test_a_progress_bar_counts_the_layers(capsys):
    data = batches(*SHAPE)
    learn(prepared_model(net(), data), data, solver="gptq", progress=True)
    captured = capsys.readouterr()
    assert "3/3" in captured.err
    assert captured.out == ""


def test_gradients_and_grad_mode_are_left_alone():
    data = [batch.requires_grad_() for batch in batches(*SHAPE)]
    prepared = prepared_model(net(), [batch.detach() for batch in data])
    with torch.enable_grad():
        result = learn(prepared, data)
        assert torch.is_grad_enabled()
    assert all(batch.grad is None for batch in data)
    assert all(parameter.grad is None for parameter in result.parameters())


class TiedHead(nn.Module):
    """A head on the weight of an embedding, or of a layer that stays in float."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embedding, self.fc, self.body = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(self.embedding(x))
        return F.linear(h, self.embedding.weight if self.kind == "embedding" else self.fc.weight) + self.fc(h)[..., :1]


@pytest.mark.parametrize(("kind", "name"), [("embedding", "embedding.weight"), ("layer", "fc.weight")])
def test_a_functional_weight_of_a_module_in_float_stays_so(kind: str, name: str) -> None:
    model = TiedHead(kind).eval()
    data = [torch.randint(9, (8, 5), generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    mapping = get_adaround_qconfig_mapping(weight_bits=2, activation_bits=None).set_module_name("fc", None)
    mapping.set_module_name("embedding", None)
    prepared = prepared_model(model, data, mapping=mapping, activation_bits=None)
    result = learn(prepared, data)
    report = get_report(result)
    assert [layer.name for layer in report.layers] == ["body"]
    assert (name, "its parameter is also used without quantization") in {(one, why) for one, _, why in report.skipped}
    reference = convert_to_reference_fx(result, backend_config=get_weight_only_backend_config())
    assert torch.equal(reference.get_submodule(kind if kind == "embedding" else "fc").weight, model.get_parameter(name))


class ByKeyword(nn.Module):
    """What has no weight is called by keyword; an activation writes to the input of the network."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.drop, self.same = nn.SiLU(inplace=True), nn.Dropout(), nn.Identity()
        self.flat, self.a, self.b = nn.Flatten(), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, unused: Tensor | None = None, **others: Tensor) -> Tensor:
        x = self.flat(input=self.act(input=x))
        x = F.relu(input=self.a(self.drop(input=x)), inplace=True)
        return self.b(self.same(input=x))


class ByPosition(ByKeyword):
    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(self.drop(self.flat(F.silu(x)))))
        return self.b(self.same(x))


@pytest.mark.parametrize("activation_bits", [None, 8])
def test_modules_may_be_called_by_keyword(activation_bits: int | None) -> None:
    data, reports = batches(2, 4), []
    before = [batch.clone() for batch in data]
    for kind in (ByKeyword, ByPosition):
        torch.manual_seed(0)
        reports.append(get_report(learn(prepared_model(kind(), data, activation_bits=activation_bits), data)))
        assert all(map(torch.equal, data, before))
    assert [layer.learned_error for layer in reports[0].layers] == [layer.learned_error for layer in reports[1].layers]


class LayerByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(input=self.a(x))


def test_a_layer_that_the_host_cannot_convert_by_keyword_is_named():
    prepared = prepared_model(LayerByKeyword(), batches(4), activation_bits=None)
    with pytest.raises(InvalidModelError, match="layer 'b': is called with its input by keyword"):
        learn(prepared, batches(4))


class Reading(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor, **others: Tensor) -> Tensor:
        return self.layer(x) + others["shift"]


def test_inputs_without_a_name_that_are_read_are_refused() -> None:
    prepared = prepare_fx(Reading().eval(), get_adaround_qconfig_mapping(), (batches(4)[0],))
    with torch.no_grad():
        prepared(batches(4)[0], shift=torch.ones(3))
    with pytest.raises(InvalidModelError, match=r"input '\*\*others': is read by the model"):
        learn(prepared, batches(4))


class OwnOperator(nn.Module):
    """An operator of torch's library called as such."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.ops.aten.gelu.default(self.a(x)))


@pytest.mark.parametrize("activation_bits", [None, 8])
def test_operators_called_as_exported_programs_do_are_no_such_program(activation_bits: int | None) -> None:
    data = batches(4)
    prepared = prepared_model(OwnOperator(), data, activation_bits=activation_bits)
    assert len(get_report(learn(prepared, data)).layers) == 2
