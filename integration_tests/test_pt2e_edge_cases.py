"""Shared and tied weights, what is skipped and why, excluded layers, degenerate data, and where a result goes next."""

from __future__ import annotations

import copy
import functools
import io
import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e
from torchao.quantization.pt2e.quantizer import Quantizer
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import X86InductorQuantizer

from adaround_plugin import InvalidOptionError, adaround, get_report
from adaround_plugin.hosts.pt2e import (
    AdaRoundQuantizer,
    AdaRoundWeightOnlyQuantizer,
    get_adaround_weight_spec,
    get_adaround_x86_inductor_config,
)
from integration_tests.models import assert_same, batches, call, learn
from integration_tests.pt2e_models import (
    EveryOperator,
    Unchanged,
    all_converted,
    all_learned,
    bias_node,
    calibrated,
    call_of,
    convert,
    exported,
    observer_statistics,
    operator,
    prepared_pt2e,
    value_of,
    weighted_calls,
    x86,
    xnnpack,
)

SHAPE = (4, 6, 6)
SIZES = (6, 6)


def data_of(*shape: int) -> list[Tensor]:
    return batches(*shape, sizes=SIZES)


@functools.cache
def program_of(kind: type[nn.Module], shape: tuple[int, ...], *arguments: Any) -> fx.GraphModule:
    """The export of a module for data of a shape; not to be changed."""
    torch.manual_seed(0)
    return exported(kind(*arguments), data_of(*shape)[0], strict=True)


def prepared_of(
    kind: type[nn.Module], shape: tuple[int, ...], *arguments: Any, quantizer: Quantizer | None = None
) -> tuple[fx.GraphModule, list[Tensor]]:
    """A calibrated prepared model (for x86 with 4-bit weights by default) and its data."""
    data = data_of(*shape)
    return calibrated(program_of(kind, shape, *arguments), data, x86() if quantizer is None else quantizer), data


def reasons(result: fx.GraphModule) -> dict[str, str]:
    """Why what was skipped was."""
    found = {name: reason for name, _, reason in get_report(result).skipped}
    assert len(found) == len(get_report(result).skipped)
    return found


def assert_exact(result: fx.GraphModule, data: list[Any]) -> fx.GraphModule:
    """The folded conversion, which holds what was learned, as the unfolded one does."""
    expected = all_learned(result)
    assert expected
    for fold in (False, True):
        model = convert(result, fold)
        found = all_converted(model)
        for name, one in expected.items():
            assert_same(found[name], one)
        with torch.no_grad():
            assert torch.isfinite(call(model, data[0])).all()
    return model


# --- shared and tied


class Tied(nn.Module):
    """Two linear layers with one weight, and, if asked for, one bias."""

    def __init__(self, bias: str = "own") -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6, bias=bias != "one"), nn.Linear(6, 2)
        self.b.weight = self.a.weight
        if bias == "shared":
            self.b.bias = self.a.bias

    def forward(self, x):
        return self.c(torch.relu(self.a(x)) + torch.relu(self.b(x * 0.5)))


class TiedBias(nn.Module):
    """Two weights with one bias."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.b.bias = self.a.bias

    def forward(self, x):
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


class TwoBiases(nn.Module):
    """Two calls of one weight with different biases, and one without."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6) * 0.4)
        self.one, self.two = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))

    def forward(self, x):
        y = torch.relu(F.linear(x, self.weight, self.one)) + F.linear(x * 0.5, self.weight, self.two)
        return y + F.linear(x.flip(0), self.weight)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.b(torch.relu(self.a(torch.relu(self.a(x)))))


def biases(model: fx.GraphModule) -> dict[str, Tensor | None]:
    """The bias of each call."""
    found = {}
    for node in weighted_calls(model):
        source = bias_node(node)
        found[node.name] = None if source is None else value_of(model, source)
    return found


def assert_corrected_alike(before: fx.GraphModule, result: fx.GraphModule, calls: list[str]) -> Tensor:
    """One correction was added to the biases of all these calls, missing ones counting as zero; returns it."""
    old, new = biases(before), biases(result)
    corrections = [new[name] - (0 if old[name] is None else old[name]) for name in calls]
    for one in corrections[1:]:
        torch.testing.assert_close(one, corrections[0], rtol=0, atol=1e-6)
    assert corrections[0].abs().max() > 0
    return corrections[0]


@pytest.mark.parametrize("quantizer", [x86, EveryOperator])
def test_a_module_called_twice_has_one_set_of_integers(quantizer):
    prepared, data = prepared_of(Twice, SHAPE, quantizer=quantizer())
    result = learn(prepared, data)
    assert [(layer.name, layer.tied) for layer in get_report(result).layers] == [("a", ()), ("b", ())]
    one, two, _ = all_learned(result).values()
    assert_same(one, two)
    assert_exact(result, data)


def test_a_call_that_the_quantizer_leaves_out_keeps_the_float_weight_and_bias():
    """The XNNPACK quantizer annotates the first call only of a convolution that is followed by an activation."""
    prepared, data = prepared_of(Twice, SHAPE, quantizer=xnnpack())
    result = learn(prepared, data, holdout=0.0, solver="gptq")
    first, second, _ = (node.name for node in weighted_calls(result))
    assert first in all_learned(result)
    assert second not in all_learned(result)
    (node,) = (node for node in weighted_calls(result) if node.name == second)
    assert torch.equal(value_of(result, node.args[1]), prepared.get_parameter("a.weight"))
    assert torch.equal(biases(result)[second], prepared.get_parameter("a.bias"))
    assert not torch.equal(biases(result)[first], prepared.get_parameter("a.bias"))
    assert "float" in reasons(result)["a"]
    assert_exact(result, data)


@pytest.mark.parametrize("quantizer", [x86, EveryOperator])
@pytest.mark.parametrize("bias", ["own", "shared", "one"])
def test_a_weight_tied_across_modules(bias, quantizer):
    prepared, data = prepared_of(Tied, (6,), bias, quantizer=quantizer())
    result = learn(prepared, data, holdout=0.0, solver="gptq")
    assert {layer.name for layer in get_report(result).layers} == {"a", "c"}
    assert all(layer.learned for layer in get_report(result).layers)
    one, two, _ = all_learned(result).values()
    assert torch.equal(one.integers, two.integers)
    assert torch.equal(one.scale, two.scale)
    calls = [node.name for node in weighted_calls(prepared)][:2]
    assert_corrected_alike(prepared, result, calls)
    assert_exact(result, data)


@pytest.mark.parametrize("quantizer", [x86, EveryOperator])
def test_a_bias_tied_between_two_weights(quantizer):
    """Each layer gets a correction of its own."""
    prepared, data = prepared_of(TiedBias, (6,), quantizer=quantizer())
    result = learn(prepared, data, holdout=0.0, solver="gptq")
    first, second, _ = (layer.bias for layer in get_report(result).layers)
    assert first == second == "corrected"
    old, new = biases(prepared), biases(result)
    names = list(old)
    assert torch.equal(old[names[0]], old[names[1]])
    assert not torch.equal(new[names[0]], new[names[1]])
    assert_exact(result, data)
    apart = TiedBias()
    apart.load_state_dict(_tied_bias_state(prepared))
    apart.b.bias = nn.Parameter(apart.a.bias.detach().clone())
    expected = all_learned(learn(prepared_pt2e(apart, data, quantizer()), data, holdout=0.0, solver="gptq"))
    for key, one in all_learned(result).items():
        assert_same(one, expected[key])


def _tied_bias_state(prepared: fx.GraphModule) -> dict[str, Tensor]:
    found = {}
    for name, node in zip("abc", weighted_calls(prepared), strict=True):
        found[f"{name}.weight"] = value_of(prepared, node.args[1].args[0])
        found[f"{name}.bias"] = value_of(prepared, node.args[2])
    return found


@pytest.mark.parametrize("quantizer", [x86, EveryOperator])
def test_calls_of_one_weight_with_different_biases(quantizer):
    prepared, data = prepared_of(TwoBiases, (6,), quantizer=quantizer())
    result = learn(prepared, data, holdout=0.0, solver="gptq")
    (layer,) = get_report(result).layers
    assert layer.name == "weight"
    assert layer.bias == "added"
    assert_corrected_alike(prepared, result, list(biases(prepared)))
    assert_exact(result, data)


class TiedEmbedding(nn.Module):
    """A language model's head shares its weight with the embedding."""

    def __init__(self, order: str = "embedding first") -> None:
        super().__init__()
        if order == "embedding first":
            self.embedding = nn.Embedding(11, 6)
        self.fc, self.head = nn.Linear(6, 6), nn.Linear(6, 11, bias=False)
        if order != "embedding first":
            self.embedding = nn.Embedding(11, 6)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(torch.relu(self.fc(self.embedding(tokens))))


def _tokens() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 11, (6, 5), generator=generator) for _ in range(2)]


@functools.cache
def _tied_embedding(order: str) -> tuple[TiedEmbedding, fx.GraphModule, list[Tensor]]:
    torch.manual_seed(0)
    model, data = TiedEmbedding(order), _tokens()
    return model, exported(model, data[0], strict=True), data


@pytest.mark.parametrize("quantizer", [x86, EveryOperator])
@pytest.mark.parametrize("order", ["embedding first", "embedding last"])
def test_a_weight_shared_with_an_embedding_stays_float_there(order, quantizer):
    model, program, data = _tied_embedding(order)
    table = model.embedding.weight.detach().clone()
    result = learn(calibrated(program, data, quantizer()), data, holdout=0.0, solver="gptq")
    assert torch.equal(model.embedding.weight, table)
    # the float program looks tokens up in the float table, and so does the prepared result
    (lookup,) = (node for node in result.graph.nodes if operator(node) == "embedding")
    source = lookup.args[0]
    while source.op == "call_module":
        source = source.args[0]
    assert torch.equal(value_of(result, source), table)
    model = assert_exact(result, data)
    (lookup,) = (node for node in model.graph.nodes if operator(node) == "embedding")
    assert torch.equal(value_of(model, lookup.args[0]), table)
    *_, head = all_converted(model).values()
    assert not torch.equal(head.dequantize(), table)
    # one of its names is in the report for each of its uses
    report = get_report(result)
    assert len(report.layers) == 2
    assert any("embedding" in reason for _, _, reason in report.skipped)


def test_weights_tied_under_different_grids_are_skipped_and_converted_by_the_host():
    class Differently(EveryOperator):
        def spec(self, node):
            return get_adaround_weight_spec(8 if node.name == "linear_1" else 4)

    prepared, data = prepared_of(Tied, (6,), "own", quantizer=Differently())
    result = learn(prepared, data)
    assert [layer.name for layer in get_report(result).layers] == ["c"]
    assert all("grid" in reason for reason in reasons(result).values())
    assert reasons(result)
    before, after = all_converted(convert(prepared)), all_converted(convert(result))
    for name in ("linear", "linear_1"):
        assert_same(after[name], before[name])


def test_a_weight_that_is_quantized_in_one_call_and_float_in_another():
    class First(EveryOperator):
        def annotate(self, model):
            super().annotate(model)
            weighted_calls(model)[1].meta.pop("quantization_annotation")
            return model

    prepared, data = prepared_of(Tied, (6,), "own", quantizer=First())
    original = {node.name: value_of(prepared, node) for node in prepared.graph.nodes if node.op == "get_attr"}
    result = learn(prepared, data, holdout=0.0, solver="gptq")
    names = [node.name for node in weighted_calls(result)]
    learned = all_learned(result)
    assert list(learned) == [names[0], names[2]]
    float_weight = weighted_calls(result)[1].args[1]
    assert float_weight.op == "get_attr"
    assert torch.equal(value_of(result, float_weight), original["a_weight"])
    assert any("float" in reason for reason in reasons(result).values())
    assert_exact(result, data)


# --- what is not learned


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.inner = nn.Embedding(11, 6), nn.Linear(6, 6)
        self.lstm, self.plain, self.last = nn.LSTM(6, 6, batch_first=True), nn.Linear(6, 6), nn.Linear(6, 2)
        self.matrix, self.offset = nn.Parameter(torch.randn(6, 6) * 0.4), nn.Parameter(torch.randn(6))
        self.computed = nn.Parameter(torch.randn(6, 6) * 0.2)
        self.right = nn.Parameter(torch.randn(6, 6) * 0.4)

    def forward(self, tokens):
        x = self.inner(self.embedding(tokens))
        x, _ = self.lstm(x)
        x = torch.addmm(self.offset, x.mean(1), self.matrix)
        x = F.linear(x, self.computed * 2.0)
        return self.last(torch.relu(self.plain(x)) @ self.right)


@functools.cache
def _everything() -> tuple[fx.GraphModule, list[Tensor]]:
    torch.manual_seed(0)
    data = _tokens()
    return exported(Everything(), data[0], strict=True), data


def test_what_is_skipped_has_its_reason():
    program, data = _everything()
    quantizer = X86InductorQuantizer().set_global(get_adaround_x86_inductor_config())
    quantizer.set_module_name_qconfig("plain", None)
    prepared = calibrated(program, data, quantizer)
    result = learn(prepared, data)
    report = get_report(result)
    assert [layer.name for layer in report.layers] == ["inner", "last"]
    found = reasons(result)
    assert "embedding" in found.pop("embedding")
    assert "float" in found.pop("plain")
    assert "product" in found.pop("matrix")
    assert "product" in found.pop("right")
    (recurrent,) = (name for name in found if name.startswith("lstm"))
    assert "recurrent" in found.pop(recurrent)
    ((_, computed),) = found.items()
    assert "computed" in computed
    assert all(name in str(report) for name, _, _ in report.skipped)
    before, after = prepared.state_dict(), result.state_dict()
    for name in ("plain.weight", "plain.bias", "matrix", "offset", "computed", "right", "embedding.weight"):
        assert torch.equal(before[name], after[name]), name
    assert_exact(result, data)


class Unused(nn.Module):
    """A layer is called for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.unused(x)
        return self.used(x)


def test_a_layer_whose_result_is_not_used_is_skipped():
    data = data_of(16, 6)
    result = learn(
        prepared_pt2e(Unused(), data, X86InductorQuantizer().set_global(get_adaround_x86_inductor_config())), data
    )
    assert [layer.name for layer in get_report(result).layers] == ["used"]
    assert "not used" in reasons(result)["unused"]


def test_an_excluded_name_of_a_skipped_layer_is_no_error():
    program, data = _everything()
    result = learn(calibrated(program, data, x86()), data, exclude=["embedding", "last"])
    assert {"embedding", "last"} <= set(reasons(result))
    assert [layer.name for layer in get_report(result).layers] == ["inner", "plain"]


class Branching(nn.Module):
    """A linear layer in each branch of a condition."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.inside, self.other = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        x = torch.relu(self.a(x))
        return torch.cond(x.sum() > 0, lambda y: self.inside(y) * 1.0, lambda y: self.other(y) * 2.0, (x,))


def test_the_bodies_of_conditions_are_left_alone():
    data = data_of(6)
    prepared = prepared_pt2e(Branching(), data, strict=True)
    before, statistics = Unchanged(prepared), observer_statistics(prepared)
    result = learn(prepared, data)
    before.check()
    assert [layer.name for layer in get_report(result).layers] == ["a"]
    found = reasons(result)
    assert len(found) == 2
    assert all("higher-order" in reason for reason in found.values())
    assert statistics.keys() == observer_statistics(result).keys()
    assert_exact(result, data)


class Looping(nn.Module):
    """A linear layer in the body of a loop, which torchao prepares as a graph of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.inside = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        x = torch.relu(self.a(x))
        count = torch.tensor(0)

        def body(i, y):
            return i + 1, torch.tanh(self.inside(y))

        return torch._higher_order_ops.while_loop(lambda i, y: i < 3, body, (count, x))[1]


def test_the_bodies_of_loops_keep_their_observers_statistics():
    data = data_of(6)
    prepared = prepared_pt2e(Looping(), data, strict=True)
    assert any(name.count(".") for name in observer_statistics(prepared)), "torchao does not prepare bodies any more"
    before, statistics = Unchanged(prepared), observer_statistics(prepared)
    # other data than that of the calibration
    result = learn(prepared, [batch * 10 for batch in data])
    before.check()
    after = observer_statistics(result)
    for name, value in statistics.items():
        assert torch.equal(value, after[name]), name
    assert [layer.name for layer in get_report(result).layers] == ["a"]
    assert all("higher-order" in reason for reason in reasons(result).values())
    assert reasons(result)


@pytest.mark.parametrize(
    "quantizer",
    [
        AdaRoundQuantizer(X86InductorQuantizer().set_global(get_adaround_x86_inductor_config(8)), 4, {"a": {}}),
        AdaRoundWeightOnlyQuantizer({"a": {"weight_bits": 3}}),
    ],
)
def test_names_of_layers_are_looked_for_outside_of_the_bodies_of_loops(quantizer):
    data = data_of(6)
    report = get_report(learn(prepared_pt2e(Looping(), data, quantizer, strict=True), data))
    assert [layer.name for layer in report.layers] == ["a"]
    with pytest.raises(InvalidOptionError, match="matches none"):
        prepared_pt2e(Looping(), data, AdaRoundWeightOnlyQuantizer({"b": {"weight_bits": 3}}), strict=True)


# --- biases


class Biases(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.with_bias, self.without = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.weight, self.offset = nn.Parameter(torch.randn(6, 6) * 0.4), nn.Parameter(torch.randn(6))

    def forward(self, x):
        x = torch.relu(self.without(torch.relu(self.with_bias(x))))
        return F.linear(x, self.weight, self.offset * 2.0)


def test_biases_are_corrected_added_or_kept():
    prepared, data = prepared_of(Biases, (6,))
    result = learn(prepared, data, holdout=0.0, solver="gptq")
    layers = {layer.name: layer for layer in get_report(result).layers}
    assert all(layer.learned for layer in layers.values())
    assert {name: layer.bias for name, layer in layers.items()} == {
        "with_bias": "corrected",
        "without": "added",
        "weight": "kept",
    }
    assert "bias" in layers["weight"].note
    assert layers["with_bias"].note == layers["without"].note == ""
    added = biases(result)[call_of(result, "without.weight")]
    assert added.abs().max() > 0
    assert torch.equal(result.get_parameter("without.bias"), added)
    assert torch.equal(result.get_parameter("offset"), prepared.get_parameter("offset"))
    assert not torch.equal(result.get_parameter("with_bias.bias"), prepared.get_parameter("with_bias.bias"))
    # the computed bias cannot be read as a value before convert
    model = convert(result)
    found = all_converted(model)
    assert torch.equal(found[call_of(result, "without.weight")].bias, added)
    kept = learn(prepared, data, correct_bias=False)
    assert bias_node(weighted_calls(kept)[1]) is None


# --- names and exclude


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 4, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Flatten())
        self.head = nn.Linear(64, 3)

    def forward(self, x):
        return self.head(self.body(torch.relu(self.stem(x))))


def test_names_and_kinds_are_those_of_the_float_model():
    class Functions(Nested):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Module()
            self.part.matrix = nn.Parameter(torch.randn(3, 3))

        def forward(self, x):
            return F.linear(super().forward(x), self.part.matrix)

    model, data = Functions().eval(), data_of(*SHAPE)
    report = get_report(learn(prepared_pt2e(model, data, strict=True), data))
    found = [(layer.name, layer.kind) for layer in report.layers]
    assert found == [
        ("stem", "Conv2d"),
        ("body.0", "Conv2d"),
        ("body.3", "Conv2d"),
        ("head", "Linear"),
        ("part.matrix", "aten.linear"),
    ]
    for layer in report.layers[:-1]:
        assert layer.shape == tuple(model.get_submodule(layer.name).weight.shape)


@pytest.mark.parametrize(
    ("exclude", "expected"),
    [
        ("stem", {"stem"}),
        (["stem", "head"], {"stem", "head"}),
        (["body"], {"body.0", "body.3"}),
        ([r"body\.\d"], {"body.0", "body.3"}),
        ([".*e.*"], {"stem", "head"}),
        ([nn.Linear], {"head"}),
        (nn.Conv2d, {"stem", "body.0", "body.3"}),
        ([nn.Conv2d, "head"], {"stem", "body.0", "body.3", "head"}),
        ((), set()),
    ],
)
def test_excluded_layers_are_nearest_on_their_own_grid(exclude, expected):
    prepared, data = prepared_of(Nested, SHAPE, quantizer=EveryOperator())
    result = learn(prepared, data, exclude=exclude, solver="gptq")
    names = ["stem", "body.0", "body.3", "head"]
    assert [layer.name for layer in get_report(result).layers] == [name for name in names if name not in expected]
    assert set(reasons(result)) == expected
    assert all("excluded" in reason for reason in reasons(result).values())
    nearest, found = all_converted(convert(prepared)), all_learned(result)
    assert_exact(result, data)
    for name in names:
        call_name = call_of(result, f"{name}.weight")
        if name in expected:
            assert_same(found[call_name], nearest[call_name])


def test_an_unknown_name_in_exclude_is_an_error_that_lists_the_known_ones():
    prepared, data = prepared_of(Nested, SHAPE, quantizer=EveryOperator())
    before = Unchanged(prepared)
    for exclude in ("nothing", ["stem", "nothing"], ["Body"], [""]):
        with pytest.raises(InvalidOptionError, match=r"exclude.*stem.*body\.0.*head"):
            learn(prepared, data, exclude=exclude)
    before.check()


def test_bits_of_single_layers():
    quantizer = X86InductorQuantizer().set_global(get_adaround_x86_inductor_config(3))
    quantizer.set_module_name_qconfig("stem", get_adaround_x86_inductor_config(8))
    quantizer.set_module_name_qconfig("head", get_adaround_x86_inductor_config(2))
    prepared, data = prepared_of(Nested, SHAPE, quantizer=quantizer)
    result = learn(prepared, data)
    found = {layer.name: layer.bits for layer in get_report(result).layers}
    assert found == {"stem": 8, "body.0": 3, "body.3": 3, "head": 2}
    assert_exact(result, data)


# --- degenerate weights and data


@pytest.mark.parametrize("solver", ["annealing", "coordinate_descent", "gptq", "nearest"])
@pytest.mark.parametrize("which", ["channels", "all", "constant data"])
def test_degenerate_weights_and_data(which, solver):
    program, data = copy.deepcopy(program_of(Nested, SHAPE)), data_of(*SHAPE)
    with torch.no_grad():
        for layer in (program.stem, program.head):
            if which == "channels":
                layer.weight[1:3] = 0
            elif which == "all":
                layer.weight.zero_()
                layer.bias.zero_()
            else:
                data = [torch.full_like(batch, 1e-3) for batch in data]
    result = learn(calibrated(program, data, EveryOperator()), data, solver=solver)
    report = get_report(result)
    for layer in report.layers:
        for value in (layer.nearest_error, layer.learned_error, layer.nearest_holdout, layer.learned_holdout):
            assert value is None or (math.isfinite(value) and value >= 0)
    json.loads(report.to_json())
    assert_exact(result, data)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
def test_linear_on_inputs_of_any_rank(shape):
    data = data_of(*shape)
    result = learn(prepared_pt2e(nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)), data), data)
    assert {layer.columns for layer in get_report(result).layers} == {12 * math.prod(shape[:-1])}
    assert_exact(result, data)


def test_unbatched_inputs():
    data = [batch[0] for batch in data_of(*SHAPE)]
    result = learn(prepared_pt2e(nn.Sequential(nn.Conv2d(4, 3, 3), nn.ReLU()), data), data)
    assert_exact(result, data)


def test_gradients_and_grad_mode_are_left_alone():
    prepared, data = prepared_of(Nested, SHAPE)
    data = [batch.requires_grad_() for batch in data]
    with torch.enable_grad():
        result = learn(prepared, data)
        assert torch.is_grad_enabled()
    assert all(batch.grad is None for batch in data)
    assert all(parameter.grad is None for parameter in result.parameters())


# --- where a result goes next


@pytest.mark.parametrize("quantizer", [x86, EveryOperator])
def test_a_saved_and_loaded_program_holds_the_learned_integers(quantizer):
    prepared, data = prepared_of(Nested, SHAPE, quantizer=quantizer())
    result = learn(prepared, data)
    expected, model = all_learned(result), convert(result)
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (data[0],), strict=True), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    found = all_converted(loaded)
    assert len(found) == len(expected) == 4
    for one, other in zip(found.values(), expected.values(), strict=True):
        assert_same(one, other)
    assert torch.equal(loaded(data[0]), model(data[0]))


@pytest.mark.parametrize("inplace", [False, True])
def test_deep_copies_of_the_result_convert_with_dynamic_activations(inplace):
    prepared, data = prepared_of(functools.partial(nn.Linear, 6, 3), SHAPE, quantizer=xnnpack(is_dynamic=True))
    result = learn(prepared, data, inplace=inplace)
    copies = [copy.deepcopy(result), copy.deepcopy(copy.deepcopy(result))]
    outputs = [convert_pt2e(model)(data[0]) for model in (*copies, result)]
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[2])


def test_copies_of_what_prepare_made_do_not_convert_with_dynamic_activations():
    """Why copies of the result are made otherwise: if this converts one day, that is not needed."""
    prepared, _ = prepared_of(functools.partial(nn.Linear, 6, 3), SHAPE, quantizer=xnnpack(is_dynamic=True))
    with pytest.raises(Exception, match="PortNodeMetaForQDQ") as caught:
        convert_pt2e(copy.deepcopy(prepared))
    assert "No chose qparams node found" in str(caught.value.__cause__)


def test_the_defaults():
    """The whole call with defaults, as in the documents."""
    prepared, data = prepared_of(Nested, SHAPE)
    result = adaround(prepared, data, progress=False)
    report = get_report(result)
    assert len(report.trials) > 1
    assert report.output_error < 1
    assert_exact(result, data)
