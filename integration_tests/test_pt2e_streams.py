"""The two streams through an exported program, and what `adaround` leaves untouched around them."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e
from torchao.quantization.pt2e.quantizer import Quantizer

import adaround_plugin.api
from adaround_plugin import InvalidModelError, adaround, get_report
from adaround_plugin.hosts.open import open_host
from adaround_plugin.hosts.pt2e.host import PreparedPT2E
from adaround_plugin.graph.streams import Stream
from integration_tests.models import assert_same, assert_unchanged, batches, call, learn, snapshot
from integration_tests.pt2e_models import (
    EveryOperator,
    Unchanged,
    all_converted,
    all_learned,
    calibrated,
    convert,
    copied,
    exported,
    is_observer,
    observer_statistics,
    split,
    weighted_calls,
    x86,
    xnnpack,
)
from integration_tests.test_fx_streams import NETS as FX_NETS
from integration_tests.test_fx_streams import assert_equal_trees, conv, run_stream

SHAPE = (4, 6, 6)


class Drops(nn.Module):
    """Dropout, as a module and as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.drop, self.b = conv(), nn.Dropout(0.5), conv()

    def forward(self, x):
        x = F.dropout(self.a(x), 0.3, self.training)
        return self.b(self.drop(F.relu(x, inplace=True)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 18), nn.Linear(6, 6)

    def forward(self, x):
        q, k, v = self.qkv(x).view(x.shape[0], x.shape[1], 3, 2, 3).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(y.transpose(1, 2).reshape(x.shape))


class AddInto(nn.Module):
    """In-place additions to activations that have other readers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(), conv(), conv(4, 2)

    def forward(self, x):
        y = self.a(x)
        z = self.b(y.relu_())
        z.add_(y)
        z += x
        return self.c(z)


class Buffers(nn.Module):
    """A constant and a buffer in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(), conv()
        self.register_buffer("shift", torch.randn(4, 1, 1))

    def forward(self, x):
        return self.b(self.a(x) + self.shift + torch.ones(4, 1, 1))


Make = Callable[[], tuple[nn.Module, list[Any]]]
NETS: dict[str, Make] = {
    # without control flow that no export follows, and what is another net again to an export
    **{name: make for name, make in FX_NETS.items() if name not in ("WithOpaque", "Standalone", "Int32Tokens")},
    "Drops": lambda: (Drops(), batches(*SHAPE)),
    "Attention": lambda: (Attention(), batches(5, 6)),
    "AddInto": lambda: (AddInto(), batches(*SHAPE)),
    "Buffers": lambda: (Buffers(), batches(*SHAPE)),
}
# they write to a value that is read later under another name; a dropout in eval mode is one
_VIEWS = {"ViewOverwritten", "ViewOutlivesBase", "AliasOverwritten"}


def names() -> list[str]:
    """The nets to learn on."""
    return [name for name in NETS if name not in _VIEWS]


@functools.cache
def _float(name: str) -> tuple[nn.Module, fx.GraphModule, list[Any]]:
    torch.manual_seed(0)
    model, data = NETS[name]()
    # batches of one size: the program is exported for that of the first
    data = data[:2]
    return model, exported(model, data[0]), data


def prepare(name: str, quantizer: Quantizer | None = None) -> tuple[fx.GraphModule, list[Any]]:
    """Calibrated prepared model and batches of a net."""
    _, program, data = _float(name)
    return calibrated(program, data, quantizer or x86()), copy.deepcopy(data)


@pytest.fixture
def opened(monkeypatch) -> list[PreparedPT2E]:
    """The hosts that `adaround` opens."""
    found: list[Any] = []

    def spy(*args: Any) -> Any:
        found.append(open_host(*args))
        return found[-1]

    monkeypatch.setattr(adaround_plugin.api, "open_host", spy)
    return found


def leaves_of(host: PreparedPT2E, batch: Any) -> list[Any]:
    """A batch as values of the placeholders."""
    args, kwargs = split(copy.deepcopy(batch))
    return host.flatten(host.signature.bind(*args, **kwargs))


def without_observers(prepared: fx.GraphModule) -> fx.GraphModule:
    """A copy that runs in float."""
    result = copied(prepared)
    for name, module in prepared.named_modules():
        if is_observer(module):
            result.set_submodule(name, nn.Identity())
    return result


@pytest.mark.parametrize("name", names())
def test_streams_equal_the_hosts_programs_and_nothing_else_changes(name, opened):
    model, program, data = _float(name)
    prepared, given = prepare(name)
    floats, exports = snapshot(model), snapshot(program)
    before, statistics = Unchanged(prepared), observer_statistics(prepared)
    result = learn(prepared, given)
    # what was learned is what is converted
    learned, converted = all_learned(result), convert(result)
    assert learned
    found = all_converted(converted)
    assert found.keys() == learned.keys()
    for key, one in learned.items():
        assert_same(found[key], one)
    # nothing else changed
    assert_equal_trees(given, data)
    assert_unchanged(floats, model)
    assert_unchanged(exports, program)
    before.check()
    assert result is not prepared
    after = observer_statistics(result)
    assert statistics.keys() == after.keys()
    for key, value in statistics.items():
        assert torch.equal(value, after[key]), key
    # the streams, as learning left them
    (host,) = opened
    plain = without_observers(prepared)
    for batch in data:
        with torch.no_grad():
            exact = run_stream(host.float_stream, leaves_of(host, batch))
            quantized = run_stream(host.quantized_stream, leaves_of(host, batch))
            assert_equal_trees(list(exact), tree_leaves(call(plain, copy.deepcopy(batch))))
            assert_equal_trees(list(quantized), tree_leaves(call(converted, copy.deepcopy(batch))))
            if name != "Normalized":  # folding a batch norm rounds differently
                assert_equal_trees(list(exact), tree_leaves(call(program, copy.deepcopy(batch))))


_OTHERS = {
    "xnnpack": (
        lambda: xnnpack(4),
        ["Residual", "Branches", "Inplace", "AddInto", "Split", "Views", "Tied", "Attention"],
    ),
    "w4": (lambda: x86(activation_bits=None), ["Residual", "Keywords", "Recursive", "Tokens", "Normalized"]),
    "a4": (lambda: x86(histogram=True, activation_bits=4), ["Branches", "FunctionalWeights", "Keywords", "Views"]),
    "dynamic": (
        lambda: EveryOperator(activation="dynamic"),
        ["Residual", "Views", "SharedFunctionalWeight", "Siamese"],
    ),
    "static": (lambda: EveryOperator(symmetric=False), ["Inplace", "Called3", "DictOutput", "TiedRecursive"]),
}


@pytest.mark.parametrize(("quantizer", "name"), [(key, name) for key, (_, nets) in _OTHERS.items() for name in nets])
def test_streams_equal_the_hosts_programs_under_other_quantizers(quantizer, name, opened):
    prepared, data = prepare(name, _OTHERS[quantizer][0]())
    result = learn(prepared, data)
    (host,) = opened
    plain, converted = without_observers(prepared), convert(result)
    with torch.no_grad():
        exact = run_stream(host.float_stream, leaves_of(host, data[1]))
        found = run_stream(host.quantized_stream, leaves_of(host, data[1]))
        assert_equal_trees(list(exact), tree_leaves(call(plain, copy.deepcopy(data[1]))))
        assert_equal_trees(list(found), tree_leaves(call(converted, copy.deepcopy(data[1]))))
    expected, integers = all_learned(result), all_converted(converted)
    assert expected.keys() == integers.keys()
    for key, one in expected.items():
        assert_same(integers[key], one)


@pytest.mark.parametrize("name", sorted(_VIEWS))
def test_writing_to_a_view_that_is_read_later_is_refused(name):
    prepared, data = prepare(name)
    before = Unchanged(prepared)
    with pytest.raises(InvalidModelError, match=r"overwrites .*Write that operation out of place"):
        learn(prepared, data)
    before.check()


@pytest.mark.parametrize("name", ["Residual", "Branches", "AddInto", "Keywords", "TupleOutput", "Tokens", "Attention"])
def test_output_error_is_that_of_the_converted_program_on_held_out_samples(name):
    _, program, data = _float(name)
    prepared, given = prepare(name)
    result = learn(prepared, given, holdout=0.25)
    converted = convert(result)
    error = power = 0.0
    every, number, golden = 4, 0, 0.6180339887498949
    for batch in data:
        with torch.no_grad():
            exact, quantized = (tree_leaves(call(m, copy.deepcopy(batch))) for m in (program, converted))
        size = len(tree_leaves(batch)[0])
        chosen = [int(((i // every + 1) * golden) % 1 * every) for i in range(number, number + size)]
        held = torch.tensor([(number + i) % every == one for i, one in enumerate(chosen)])
        number += size
        for one, other in zip(exact, quantized, strict=True):
            one, other = one[held].double(), other[held].double()
            error += float((one - other).square().sum())
            power += float((one - one.mean()).square().sum())
    assert get_report(result).output_error == pytest.approx(error / power, rel=1e-3)


def test_the_weighted_operators_run_once_per_batch_and_stream(monkeypatch):
    prepared, data = prepare("Siamese")
    calls: Counter[str] = Counter()
    plain = Stream.call_function

    def counted(self: Stream, target: Any, args: Any, kwargs: Any) -> Any:
        calls[str(target)] += 1
        return plain(self, target, args, kwargs)

    monkeypatch.setattr(Stream, "call_function", counted)
    learn(prepared, data)
    # a and b on the left and on the right side, in both streams
    assert calls["aten.conv2d.default"] == 2 * 4 * len(data)
    assert calls["aten.relu.default"] == 2 * 2 * len(data)


@pytest.mark.parametrize("name", ["Residual", "Tied", "FunctionalWeights"])
def test_inplace_changes_and_returns_the_given_model(name):
    model, program, _ = _float(name)
    prepared, data = prepare(name)
    floats, exports = snapshot(model), snapshot(program)
    apart = learn(prepared, data)
    assert learn(prepared, data, inplace=True) is prepared
    ours, theirs = all_learned(prepared), all_learned(apart)
    assert ours.keys() == theirs.keys()
    for key, one in ours.items():
        assert_same(one, theirs[key])
    assert_unchanged(floats, model)
    assert_unchanged(exports, program)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", ["Residual", "Tied", "Buffers"])
def test_the_users_models_are_untouched_even_where_the_flow_shares_memory(name, inplace):
    """The export has the model's own tensors, and `prepare_pt2e` works on the export itself."""
    torch.manual_seed(0)
    model, data = NETS[name]()
    data = data[:2]
    before = snapshot(model)
    prepared = prepare_pt2e(exported(model, data[0]), x86())
    for batch in data:
        call(prepared, batch)
    result = learn(prepared, data, inplace=inplace)
    assert all_learned(result)
    assert_unchanged(before, model)


@pytest.mark.parametrize("inplace", [False, True])
def test_an_error_in_the_middle_changes_nothing(inplace):
    class Breaks:
        calls = 0

        def solve(self, problem):
            self.calls += 1
            if self.calls > 1:
                raise RuntimeError("broken")
            return problem.best_of()

    prepared, data = prepare("Residual")
    before = Unchanged(prepared)
    with pytest.raises(RuntimeError, match="broken"):
        learn(prepared, data, solver=Breaks(), scale="observer", inplace=inplace)
    before.check()


@pytest.mark.parametrize("options", [{}, {"solver": "coordinate_descent"}, {"max_columns": 40}, {"scale": "observer"}])
def test_twice_is_the_same(options):
    prepared, data = prepare("Branches")
    one, two = (learn(prepared, data, **options) for _ in range(2))
    ours, theirs = all_learned(one), all_learned(two)
    for key, weight in ours.items():
        assert_same(weight, theirs[key])
    assert get_report(one).output_error == get_report(two).output_error


def test_the_automatic_recipe_is_the_same_twice_and_is_in_the_report():
    prepared, data = prepare("Branches")
    before = Unchanged(prepared)
    one, two = (adaround(prepared, data, progress=False) for _ in range(2))
    before.check()
    reports = [get_report(model) for model in (one, two)]
    assert len(reports[0].trials) > 1
    assert reports[0].trials == reports[1].trials
    assert reports[0].recipe == min(reports[0].trials, key=lambda trial: trial.output_error).recipe
    theirs = all_learned(two)
    for key, weight in all_learned(one).items():
        assert_same(weight, theirs[key])


# --- batches of several sizes


def dynamic(model: nn.Module, data: list[Tensor]) -> fx.GraphModule:
    """Prepared from an export whose batch size is free."""
    return calibrated(exported(model, data[0], ({0: torch.export.Dim("batch", min=1)},)), data, x86())


@pytest.mark.parametrize("name", ["Residual", "Split", "Views", "Called3", "Attention", "Normalized"])
def test_a_dynamic_batch_size_takes_batches_of_several_sizes(name, opened):
    model, data = NETS[name]()
    sizes = [len(batch) for batch in data]
    assert len(set(sizes)) > 1
    prepared = dynamic(model, data)
    before = Unchanged(prepared)
    result = learn(prepared, data)
    before.check()
    converted = convert(result)
    assert get_report(result).layers
    (host,) = opened
    for batch in data:
        with torch.no_grad():
            found = run_stream(host.quantized_stream, leaves_of(host, batch))
            assert_equal_trees(list(found), tree_leaves(call(converted, batch)))
    learned = all_learned(result)
    for key, one in all_converted(converted).items():
        assert_same(one, learned[key])


def test_results_do_not_depend_on_how_samples_are_batched_beyond_rounding():
    model, data = NETS["Residual"]()
    prepared = dynamic(model, data)
    one = learn(prepared, data, scale="observer")
    two = learn(prepared, [torch.cat(data)], scale="observer")
    ours, theirs = get_report(one), get_report(two)
    assert ours.output_error == pytest.approx(theirs.output_error, rel=0.05)
    assert [layer.columns for layer in ours.layers] == [layer.columns for layer in theirs.layers]


def test_batches_can_be_a_loader_a_generator_or_mapped_by_inputs():
    prepared, data = prepare("Residual")
    expected = all_learned(learn(prepared, data))
    labelled = torch.utils.data.TensorDataset(torch.cat(data), torch.arange(12))
    given: list[tuple[Any, dict[str, Any]]] = [
        ((batch for batch in data), {}),
        (tuple(data), {}),
        ([(batch,) for batch in data], {}),
        ([[batch] for batch in data], {}),
        ([{"x": batch} for batch in data], {}),
        ([(batch, "label") for batch in data], {"inputs": lambda pair: pair[0]}),
        (torch.utils.data.DataLoader(torch.cat(data), batch_size=6), {}),
        (torch.utils.data.DataLoader(labelled, batch_size=6), {"inputs": lambda pair: {"x": pair[0]}}),
    ]
    for source, options in given:
        found = all_learned(learn(prepared, source, **options))
        for key, one in expected.items():
            assert_same(found[key], one)


def test_keyword_inputs_may_come_in_any_order():
    prepared, data = prepare("PairsByName")
    expected = all_learned(learn(prepared, data))
    turned = [dict(reversed(batch.items())) for batch in data]
    assert list(turned[0]) != list(data[0])
    found = all_learned(learn(prepared, turned))
    for key, one in expected.items():
        assert_same(found[key], one)


# --- no layer worse than nearest


@pytest.mark.parametrize("solver", ["annealing", "coordinate_descent", "gptq"])
@pytest.mark.parametrize("name", ["Tied", "Views"])
def test_no_layer_is_worse_than_nearest(name, solver):
    prepared, data = prepare(name)
    for holdout in (0.25, 0.0):
        for layer in get_report(learn(prepared, data, solver=solver, holdout=holdout)).layers:
            if holdout:
                assert layer.learned == (layer.learned_holdout <= layer.nearest_holdout)
                assert layer.learned or "nearest" in layer.note
            else:
                assert layer.learned == (layer.learned_error <= layer.nearest_error)
            assert 0 <= layer.flipped <= 1
            assert layer.columns > 0


@pytest.mark.parametrize("name", ["Residual", "FunctionalWeights", "Siamese", "Recursive"])
def test_nearest_is_the_hosts_own_conversion(name):
    """Without learning, the result converts to what the prepared model converts to."""
    prepared, data = prepare(name)
    result = adaround(prepared, data, solver="nearest", scale="observer", progress=False)
    expected = all_converted(convert(prepared))
    found = all_learned(result)
    assert expected.keys() == found.keys()
    for key, one in expected.items():
        assert_same(found[key], one)
    assert all(layer.flipped == 0 and layer.bias == "kept" for layer in get_report(result).layers)
    assert len(expected) == len(weighted_calls(prepared))
