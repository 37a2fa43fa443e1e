"""The two streams through an exported program, and what `adaround` leaves untouched around them."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from adaround_plugin import adaround, get_report
from adaround_plugin.graph.streams import Stream
from integration_tests.models import (
    assert_equal_trees,
    assert_same,
    assert_unchanged,
    call,
    learn,
    relative_error,
    run_stream,
    snapshot,
    uncompared,
)
from integration_tests.pairs import pairwise
from integration_tests.pt2e_models import (
    NETS,
    EveryOperator,
    Unchanged,
    all_converted,
    all_learned,
    calibrated,
    convert,
    copied,
    exported,
    exported_net,
    is_observer,
    leaves_of,
    observer_statistics,
    prepared_net,
    weighted_calls,
    x86,
    xnnpack,
)


def without_observers(prepared: fx.GraphModule) -> fx.GraphModule:
    """A copy that runs in float."""
    result = copied(prepared)
    for name, module in prepared.named_modules():
        if is_observer(module):
            result.set_submodule(name, nn.Identity())
    return result


# converted by another test
_OF_THE_BATCH = "BatchStatistics"


@pytest.mark.parametrize("name", [name for name in NETS if name != _OF_THE_BATCH])
def test_streams_equal_the_hosts_programs_and_nothing_else_changes(name, passes):
    check(name, passes)


def test_batch_norms_with_the_statistics_of_the_batch(passes):
    """Of values, and of a weight; together, for torchao takes twenty seconds to convert what is learned."""
    report = check(_OF_THE_BATCH, passes, computed={"conv2d_1"})
    assert [layer.name for layer in report.layers] == ["a", "b"]
    ((_, _, reason),) = report.skipped
    assert "computed" in reason


def check(name, passes, computed=frozenset()):
    model, program, data = exported_net(name)
    prepared, given = prepared_net(name)
    floats, exports = snapshot(model), snapshot(program)
    before, statistics = Unchanged(prepared), observer_statistics(prepared)
    result = learn(prepared, given, solver="gptq")
    # what was learned is what is converted
    learned, converted = all_learned(result), convert(result)
    assert learned
    found = all_converted(converted)
    assert found.keys() == learned.keys() | computed
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
    (run,) = passes
    plain = without_observers(prepared)
    for batch in data:
        with torch.no_grad():
            exact = run_stream(run.streams[0], leaves_of(run.host, batch))
            quantized = run_stream(run.streams[1], leaves_of(run.host, batch))
            assert_equal_trees(list(exact), tree_leaves(call(plain, copy.deepcopy(batch))))
            assert_equal_trees(list(quantized), tree_leaves(call(converted, copy.deepcopy(batch))))
            if name != "Normalized":  # folding a batch norm rounds differently
                assert_equal_trees(list(exact), tree_leaves(call(program, copy.deepcopy(batch))))
    return get_report(result)


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
def test_streams_equal_the_hosts_programs_under_other_quantizers(quantizer, name, passes):
    prepared, data = prepared_net(name, _OTHERS[quantizer][0]())
    result = learn(prepared, data, solver="gptq")
    (run,) = passes
    plain, converted = without_observers(prepared), convert(result)
    with torch.no_grad():
        exact = run_stream(run.streams[0], leaves_of(run.host, data[1]))
        found = run_stream(run.streams[1], leaves_of(run.host, data[1]))
        assert_equal_trees(list(exact), tree_leaves(call(plain, copy.deepcopy(data[1]))))
        assert_equal_trees(list(found), tree_leaves(call(converted, copy.deepcopy(data[1]))))
    expected, integers = all_learned(result), all_converted(converted)
    assert expected.keys() == integers.keys()
    for key, one in expected.items():
        assert_same(integers[key], one)


@pytest.mark.parametrize("name", ["Residual", "Branches", "AddInto", "Keywords", "TupleOutput", "Tokens", "Attention"])
def test_output_error_is_that_of_the_converted_program_on_held_out_samples(name):
    _, program, data = exported_net(name)
    prepared, given = prepared_net(name)
    result = learn(prepared, given, holdout=0.25, solver="gptq")
    converted = convert(result)
    outputs, chosen_samples = [], []
    every, number, golden = 4, 0, 0.6180339887498949
    for batch in data:
        with torch.no_grad():
            exact, quantized = (tree_leaves(call(m, copy.deepcopy(batch))) for m in (program, converted))
        size = len(tree_leaves(batch)[0])
        chosen = [int(((i // every + 1) * golden) % 1 * every) for i in range(number, number + size)]
        chosen_samples += [(number + i) % every == one for i, one in enumerate(chosen)]
        number += size
        outputs.append(list(zip(exact, quantized, strict=True)))
    held = torch.tensor(chosen_samples)
    errors = [relative_error(of_one, held) for of_one in zip(*outputs, strict=True)]
    assert get_report(result).output_error == pytest.approx(sum(errors) / len(errors), rel=1e-3)


def test_the_weighted_operators_run_once_per_batch_and_stream(monkeypatch):
    prepared, data = prepared_net("Siamese")
    calls: Counter[str] = Counter()
    plain = Stream.call_function

    def counted(self: Stream, target: Any, args: Any, kwargs: Any) -> Any:
        calls[str(target)] += 1
        return plain(self, target, args, kwargs)

    monkeypatch.setattr(Stream, "call_function", counted)
    uncompared(monkeypatch)
    learn(prepared, data, solver="gptq")
    # a and b on the left and on the right side, in both streams
    assert calls["aten.conv2d.default"] == 2 * 4 * len(data)
    assert calls["aten.relu.default"] == 2 * 2 * len(data)


@pytest.mark.parametrize("name", ["Residual", "Tied", "FunctionalWeights"])
def test_inplace_changes_and_returns_the_given_model(name):
    model, program, _ = exported_net(name)
    prepared, data = prepared_net(name)
    floats, exports = snapshot(model), snapshot(program)
    apart = learn(prepared, data, solver="gptq")
    assert learn(prepared, data, solver="gptq", inplace=True) is prepared
    ours, theirs = all_learned(prepared), all_learned(apart)
    assert ours.keys() == theirs.keys()
    for key, one in ours.items():
        assert_same(one, theirs[key])
    assert_unchanged(floats, model)
    assert_unchanged(exports, program)


@pytest.mark.parametrize("name", ["Residual", "Tied", "Buffers"])
def test_the_users_models_are_untouched_even_where_the_flow_shares_memory(name):
    """The export has the model's own tensors, and `prepare_pt2e` works on the export itself."""
    torch.manual_seed(0)
    model, data = NETS[name]()
    data = data[:2]
    before = snapshot(model)
    prepared = prepare_pt2e(exported(model, data[0]), x86())
    for batch in data:
        call(prepared, batch)
    for inplace in (False, True):
        result = learn(prepared, data, solver="gptq", inplace=inplace)
        assert all_learned(result)
        assert_unchanged(before, model)


def test_every_result_converts_by_itself_and_so_does_the_prepared_model():
    """Annotations, which `convert_pt2e` reads for dynamic activations, name nodes of their own graph in each."""
    prepared, data = prepared_net("SharedFunctionalWeight", EveryOperator(activation="dynamic"))
    results = [learn(prepared, data, solver=solver) for solver in ("gptq", "nearest")]
    expected = [all_learned(result) for result in results]
    for result, learned in zip(results, expected, strict=True):
        found = all_converted(convert_pt2e(result))
        assert found.keys() == learned.keys()
        for key, one in learned.items():
            assert_same(found[key], one)
    assert all_converted(convert_pt2e(prepared)).keys() == expected[0].keys()


@pytest.mark.parametrize("inplace", [False, True])
def test_an_error_in_the_middle_changes_nothing(inplace):
    class Breaks:
        calls = 0

        def solve(self, problem):
            self.calls += 1
            if self.calls > 1:
                raise RuntimeError("broken")
            return problem.best_of()

    prepared, data = prepared_net("Residual")
    before = Unchanged(prepared)
    with pytest.raises(RuntimeError, match="broken"):
        learn(prepared, data, solver=Breaks(), search_scale=False, inplace=inplace)
    before.check()


@pytest.mark.parametrize(
    "options", [{}, {"solver": "coordinate_descent"}, {"max_columns": 40}, {"search_scale": False}]
)
def test_twice_is_the_same(options):
    prepared, data = prepared_net("Branches")
    one, two = (learn(prepared, data, **options) for _ in range(2))
    ours, theirs = all_learned(one), all_learned(two)
    for key, weight in ours.items():
        assert_same(weight, theirs[key])
    assert get_report(one).output_error == get_report(two).output_error


def test_the_automatic_recipe_is_the_same_twice_and_is_in_the_report():
    prepared, data = prepared_net("Branches")
    before = Unchanged(prepared)
    one, two = (adaround(prepared, data, progress=False) for _ in range(2))
    before.check()
    reports = [get_report(model) for model in (one, two)]
    assert len(reports[0].trials) > 1
    assert reports[0].trials == reports[1].trials
    assert reports[0].recipe == reports[1].recipe
    assert reports[0].recipe in [trial.recipe for trial in reports[0].trials]
    theirs = all_learned(two)
    for key, weight in all_learned(one).items():
        assert_same(weight, theirs[key])


# --- batches of several sizes


def dynamic(model: nn.Module, data: list[Tensor]) -> fx.GraphModule:
    """Prepared from an export whose batch size is free."""
    return calibrated(exported(model, data[0], ({0: torch.export.Dim("batch", min=1)},), strict=True), data, x86())


@pytest.mark.parametrize("name", ["Residual", "Split", "Views", "Called3", "Attention", "Normalized"])
def test_a_dynamic_batch_size_takes_batches_of_several_sizes(name, passes):
    model, data = NETS[name]()
    sizes = [len(batch) for batch in data]
    assert len(set(sizes)) > 1
    prepared = dynamic(model, data)
    before = Unchanged(prepared)
    result = learn(prepared, data, solver="gptq")
    before.check()
    converted = convert(result)
    assert get_report(result).layers
    (run,) = passes
    for batch in data:
        with torch.no_grad():
            found = run_stream(run.streams[1], leaves_of(run.host, batch))
            assert_equal_trees(list(found), tree_leaves(call(converted, batch)))
    learned = all_learned(result)
    for key, one in all_converted(converted).items():
        assert_same(one, learned[key])


def test_results_do_not_depend_on_how_samples_are_batched_beyond_rounding():
    model, data = NETS["Residual"]()
    prepared = dynamic(model, data)
    one = learn(prepared, data, search_scale=False)
    two = learn(prepared, [torch.cat(data)], search_scale=False)
    ours, theirs = get_report(one), get_report(two)
    assert ours.output_error == pytest.approx(theirs.output_error, rel=0.05)
    assert [layer.columns for layer in ours.layers] == [layer.columns for layer in theirs.layers]


def test_batches_can_be_a_loader_a_generator_or_mapped_by_inputs():
    prepared, data = prepared_net("Residual")
    expected = all_learned(learn(prepared, data, solver="gptq"))
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
        found = all_learned(learn(prepared, source, solver="gptq", **options))
        for key, one in expected.items():
            assert_same(found[key], one)


def test_keyword_inputs_may_come_in_any_order():
    prepared, data = prepared_net("PairsByName")
    expected = all_learned(learn(prepared, data, solver="gptq"))
    turned = [dict(reversed(batch.items())) for batch in data]
    assert list(turned[0]) != list(data[0])
    found = all_learned(learn(prepared, turned, solver="gptq"))
    for key, one in expected.items():
        assert_same(found[key], one)


# --- no layer worse than nearest


@pytest.mark.parametrize(
    ("name", "solver", "holdout"),
    pairwise(("Tied", "Views"), ("annealing", "coordinate_descent", "gptq"), (0.25, 0.0)),
)
def test_no_layer_is_worse_than_nearest(name, solver, holdout):
    prepared, data = prepared_net(name)
    for layer in get_report(learn(prepared, data, solver=solver, holdout=holdout)).layers:
        if holdout:
            if "the network's output is better" not in layer.note:
                assert layer.learned == (layer.learned_holdout <= layer.nearest_holdout)
            assert layer.learned or "nearest" in layer.note
        elif "the network's output is better" not in layer.note:
            assert layer.learned == (layer.learned_error <= layer.nearest_error)
        assert 0 <= layer.flipped <= 1
        assert layer.columns > 0


@pytest.mark.parametrize("name", ["Residual", "FunctionalWeights", "Siamese", "Recursive"])
def test_nearest_is_the_hosts_own_conversion(name):
    """Without learning, the result converts to what the prepared model converts to."""
    prepared, data = prepared_net(name)
    result = adaround(prepared, data, "nearest", progress=False)
    expected = all_converted(convert(prepared))
    found = all_learned(result)
    assert expected.keys() == found.keys()
    for key, one in expected.items():
        assert_same(found[key], one)
    assert all(layer.flipped == 0 and layer.bias == "kept" for layer in get_report(result).layers)
    assert len(expected) == len(weighted_calls(prepared))
