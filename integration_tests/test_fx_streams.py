"""The two streams through an FX graph, and what `adaround` leaves untouched around them."""

from __future__ import annotations

import copy
import functools
import itertools
import operator
from collections import Counter
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.fx.custom_config import PrepareCustomConfig
from torch.ao.quantization.quantize_fx import convert_fx, convert_to_reference_fx, prepare_fx
from torch.utils._pytree import tree_flatten, tree_map

from adaround_plugin import (
    BlockWise,
    InvalidOptionError,
    LayerWise,
    NonFiniteError,
    Paper,
    adaround,
    get_report,
    get_weight_only_backend_config,
)
from adaround_plugin.graph.paths import Path
from adaround_plugin.graph.streams import Stream
from adaround_plugin.graph.transforms import functionalize, inline
from adaround_plugin.hosts import weight_observers
from adaround_plugin.hosts.base import open_streams
from adaround_plugin.hosts.fx.clamps import insert_clamps
from adaround_plugin.hosts.fx.host import PreparedFX
from adaround_plugin.paper.weights import round_weights
from adaround_plugin.report import Report
from adaround_plugin.rounding.grid import Grid, GridSpec, same_grid
from adaround_plugin.rounding.problem import Rounding
from adaround_plugin.rounding.ranges import min_mse_grid
from adaround_plugin.rounding.result import LayerRounding
from adaround_plugin.rounding.schemes import get_scheme
from integration_tests.models import (
    NETS,
    SHAPE,
    Residual,
    arguments_of,
    assert_equal_trees,
    assert_same,
    assert_unchanged,
    batches,
    call,
    conv,
    converted,
    images,
    learn,
    learned,
    net_names,
    observer_state,
    own_mapping,
    prepared_model,
    prepared_net,
    relative_error,
    run_stream,
    snapshot,
    uncompared,
)
from integration_tests.pairs import pairwise


@functools.cache
def _learned_net(name: str, activation_bits: int | None = 8) -> tuple[nn.Module, Any, list[Any], Any]:
    """Float model, prepared model and batches of a net, and what `adaround` made of it; to look at only."""
    model, prepared, data = prepared_net(name, activation_bits)
    return model, prepared, data, learn(prepared, data, solver="gptq", holdout=0.25)


# the weight-only backend leaves recurrent layers alone
@pytest.mark.parametrize(
    ("name", "activation_bits"),
    [(name, bits) for name in net_names(aliases=True) for bits in (8, None) if (name, bits) != ("Recurrent", None)],
)
def test_streams_equal_the_hosts_models(name, activation_bits):
    model, prepared, data, result = _learned_net(name, activation_bits)
    config = get_weight_only_backend_config() if activation_bits is None else None
    for stage in (prepared, result):
        exact_stream, quantized_stream = open_streams(PreparedFX(stage))
        reference = convert_to_reference_fx(copy.deepcopy(stage), backend_config=config)
        for batch in data[::2]:
            before = copy.deepcopy(batch)
            with torch.no_grad():
                expected = call(reference, copy.deepcopy(batch))
                found = run_stream(quantized_stream, arguments_of(stage, batch))
                exact = run_stream(exact_stream, arguments_of(stage, batch))
                of_model = call(model, copy.deepcopy(batch)) if stage is prepared else None
            assert_equal_trees(found, expected)
            assert_equal_trees(batch, before)
            if of_model is not None and name == "Normalized":  # folding a batch norm rounds differently
                torch.testing.assert_close(exact, of_model)
            elif of_model is not None:
                assert_equal_trees(exact, of_model)


@pytest.mark.parametrize("activation_bits", [8, None])
def test_each_weight_is_searched_once(activation_bits, monkeypatch):
    searched: list[tuple[int, ...]] = []

    def search(weight: Tensor, spec: GridSpec) -> Grid:
        searched.append(tuple(weight.shape))
        return min_mse_grid(weight, spec)

    monkeypatch.setitem(weight_observers._GRID_OF, "mse", search)
    _, prepared, _ = prepared_net("FunctionalWeights", activation_bits)
    host = PreparedFX(prepared)
    assert Counter(searched) == Counter(tuple(node.weight.shape) for node in host.nodes)
    for node in host.nodes:
        expected = min_mse_grid(node.weight, node.grid)
        assert same_grid(node.grid, expected)


@pytest.mark.parametrize("name", net_names())
def test_learning_leaves_everything_else_as_it_was(name):
    model, prepared, data = prepared_net(name)
    given, floats, state, observers = copy.deepcopy(data), snapshot(model), snapshot(prepared), observer_state(prepared)
    code, keys = prepared.code, set(prepared.meta)
    result = learn(prepared, data, solver="gptq")
    assert_equal_trees(data, given)
    assert_unchanged(floats, model)
    assert_unchanged(state, prepared)
    assert prepared.code == code
    assert set(prepared.meta) == keys
    assert result is not prepared
    # the result has the same observers with the same statistics; functional weights got frozen ones
    after = observer_state(result)
    for key, value in observers.items():
        if key in after:
            assert torch.equal(value, after[key]), key
    functional = name in ("FunctionalWeights", "SharedFunctionalWeight")
    assert functional or after.keys() == observers.keys()
    report = get_report(result)
    assert report.layers
    for layer in report.layers:
        for linked in (layer.name, *layer.tied):
            learned(result, linked)
        if layer.nearest_holdout is not None and layer.learned:
            assert layer.learned_holdout <= layer.nearest_holdout
    assert torch.isfinite(torch.tensor(report.output_error))
    # it survives deepcopy and conversion of the copy, twice over
    converted_once = convert_to_reference_fx(copy.deepcopy(result))
    converted_twice = convert_to_reference_fx(copy.deepcopy(copy.deepcopy(result)))
    batch = data[0]
    with torch.no_grad():
        outputs = [call(m, copy.deepcopy(batch)) for m in (converted_once, converted_twice)]
    assert_equal_trees(*outputs)
    assert all(torch.isfinite(t).all() for t in tree_flatten(outputs)[0] if isinstance(t, Tensor))


@pytest.mark.parametrize("name", net_names())
def test_output_error_is_that_of_the_reference_conversion_on_held_out_samples(name):
    model, _, data, result = _learned_net(name)
    reference = convert_to_reference_fx(copy.deepcopy(result))
    outputs, chosen_samples = [], []
    total = sum(len(tree_flatten(batch)[0][0]) for batch in data)
    every, number = min(4, total), 0
    for batch in data:
        with torch.no_grad():
            exact, quantized = (
                [t for t in tree_flatten(call(m, copy.deepcopy(batch)))[0] if isinstance(t, Tensor)]
                for m in (model, reference)
            )
        size = len(tree_flatten(batch)[0][0])
        golden = 0.6180339887498949
        chosen = [int(((i // every + 1) * golden) % 1 * every) for i in range(number, number + size)]
        chosen_samples += [(number + i) % every == one for i, one in enumerate(chosen)]
        number += size
        outputs.append(list(zip(exact, quantized, strict=True)))
    held = torch.tensor(chosen_samples)
    errors = [relative_error(of_one, held) for of_one in zip(*outputs, strict=True)]
    assert get_report(result).output_error == pytest.approx(sum(errors) / len(errors), rel=1e-3)


def test_all_of_an_output_without_an_axis_of_samples_counts_in_its_error():
    class Transposed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight, self.bias).T

    data = [images(8, 6, seed=i) for i in range(3)]
    model = nn.Sequential(nn.Linear(6, 3), nn.ReLU(), Transposed(3, 5)).eval()
    result = learn(prepared_model(model, data), data)
    reference = convert_to_reference_fx(copy.deepcopy(result))
    with torch.no_grad():
        pairs = [(model(x), reference(x)) for x in data]
    # a batch is a sample then, and what is held out is some of each
    exact, quantized = (torch.stack(list(of_one)).double() for of_one in zip(*pairs, strict=True))
    error = (exact - quantized).square().mean() / exact.var(0).mean()
    assert get_report(result).output_error == pytest.approx(float(error), rel=1e-3)


@pytest.mark.parametrize("name", ["Residual", "Tied", "FunctionalWeights"])
def test_streams_of_one_host_do_not_see_each_others_roundings(name):
    _, prepared, (batch, *_) = prepared_net(name, activation_bits=4)
    host = PreparedFX(prepared)
    before, graph = snapshot(host.quantized_graph), str(host.quantized_graph.graph)
    schemes = ("floor", "ceil")
    streams = {scheme: open_streams(host)[1] for scheme in schemes}
    for node in host.nodes:
        for scheme, stream in streams.items():
            integers = get_scheme(scheme, 0)(node.grid, node.weight)
            node.set_quantized(stream.module, LayerRounding(node.grid, integers))
    expected = {scheme: _output(round_weights(prepared, scheme), batch) for scheme in schemes}
    for scheme in schemes:
        assert_equal_trees(run_stream(streams[scheme], [batch]), expected[scheme])
    # a scale of an activation is a stream's own, too
    assert host.quantizers
    for quantizer in host.quantizers:
        quantizer.set_scale(streams["floor"], 4 * quantizer.scale)
    assert not torch.equal(run_stream(streams["floor"], [batch]), expected["floor"])
    assert_equal_trees(run_stream(streams["ceil"], [batch]), expected["ceil"])
    stock = _output(prepared, batch)
    for stream in (open_streams(host)[1], Stream(host.quantized_graph, host.quantized_graph.graph)):
        assert_equal_trees(run_stream(stream, [batch]), stock)
    assert_unchanged(before, host.quantized_graph)
    assert str(host.quantized_graph.graph) == graph


def _output(prepared: fx.GraphModule, batch: Any) -> Any:
    """The output of the host's conversion of a copy, with the clamps that activations of few bits need."""
    clamped = copy.deepcopy(prepared)
    insert_clamps(clamped)
    return call(convert_to_reference_fx(clamped), batch)


DEPTH = 40


def test_constants_that_are_used_twice_are_computed_once():
    """Diamonds on diamonds: each constant is made of the one before, twice, so that 2^40 paths lead to the last."""
    calls: Counter[str] = Counter()

    def counted(one: Tensor, other: Tensor) -> Tensor:
        calls["constant"] += 1
        return (one + other) / 2

    graph = fx.Graph()
    x = graph.placeholder("x")
    constant = graph.get_attr("constant")
    for _ in range(DEPTH):
        constant = graph.call_function(counted, (constant, constant))
    scaled = graph.call_function(torch.mul, (x, constant))
    graph.output(graph.call_function(torch.add, (scaled, constant)))
    root = nn.Module()
    root.register_buffer("constant", torch.tensor(3.0))
    module = inline(fx.GraphModule(root, graph), lambda _: False)
    stream = Stream(module, module.graph)
    found = run_stream(stream, [torch.ones(2)])
    assert torch.equal(found, torch.full((2,), 6.0))
    # it is made again where it is used, and there it takes as many steps as it has nodes
    assert calls["constant"] == 2 * DEPTH
    calls.clear()
    assert torch.equal(stream.value(stream.nodes[-4], {}), torch.tensor(3.0))
    assert calls["constant"] == DEPTH
    # so do looks ahead, and none of it is kept
    mul, add = stream.nodes[-3:-1]
    assert stream.reaches(add, stream.runnable(set()))
    assert stream.finish([]) == {stream.placeholders[0], mul, add}
    path = Path(stream, [add], stream.placeholders, {})
    assert len(path.order) == len(set(path.order)) == DEPTH + 3


class Counting(nn.Module):
    """Counts its calls, whatever copies of it are made."""

    calls: ClassVar[Counter[str]] = Counter()

    def __init__(self, key: str) -> None:
        super().__init__()
        self.key = key

    def forward(self, x):
        Counting.calls[self.key] += 1
        return x * 1.0


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = conv(), conv(), conv(8, 4, 1), conv(4, 2)
        self.n0, self.n1, self.n2, self.n3, self.n4 = (Counting(f"n{i}") for i in range(5))

    def forward(self, x):
        y = torch.relu(self.a(self.n0(x)))
        z = self.n1(self.b(self.n2(y)))
        return self.n4(self.d(self.n3(self.c(torch.cat([y, z], 1)))))


@pytest.mark.parametrize("solver", ["gptq", "nearest"])
def test_each_node_runs_once_per_batch_and_stream(solver, monkeypatch):
    model = Counted().eval()
    data = batches(*SHAPE)
    custom = PrepareCustomConfig().set_non_traceable_module_classes([Counting])
    prepared = prepare_fx(model, own_mapping(), (data[0],), prepare_custom_config=custom)
    for batch in data:
        prepared(batch)
    Counting.calls.clear()
    uncompared(monkeypatch)
    learn(prepared, data, solver=solver)
    assert Counting.calls == {f"n{i}": 2 * len(data) for i in range(5)}


def test_the_weighted_modules_run_once_per_batch_and_stream(monkeypatch):
    _, prepared, data = prepared_net("Siamese")
    calls: Counter[str] = Counter()
    plain = nn.Conv2d.forward
    reference = torch.ao.nn.quantized.reference.Conv2d.forward

    def counted(kind: str, forward: Any) -> Any:
        def run(self: nn.Module, x: Tensor) -> Tensor:
            calls[kind] += 1
            return forward(self, x)

        return run

    monkeypatch.setattr(nn.Conv2d, "forward", counted("float", plain))
    monkeypatch.setattr(torch.ao.nn.quantized.reference.Conv2d, "forward", counted("quantized", reference))
    uncompared(monkeypatch)
    learn(prepared, data)
    # a and b on the left and on the right side; fused relus call their convolution through these, too
    assert calls == {"float": 4 * len(data), "quantized": 4 * len(data)}


@pytest.mark.parametrize("name", ["Residual", "Tied", "FunctionalWeights"])
def test_inplace_changes_and_returns_the_given_model(name):
    model, prepared, data = prepared_net(name)
    floats = snapshot(model)
    apart = learn(prepared, data)
    assert learn(prepared, data, inplace=True) is prepared
    for layer in get_report(apart).layers:
        assert_same(learned(prepared, layer.name), learned(apart, layer.name))
    assert_unchanged(floats, model)


def test_the_users_float_model_is_untouched_even_where_prepare_shares_it():
    """prepare_fx shares modules that it does not fuse with the model it was given."""
    model = Residual().eval()
    data = batches(*SHAPE)
    before = snapshot(model)
    prepared = prepare_fx(model, own_mapping(), (data[0],))
    for batch in data:
        prepared(batch)
    learn(prepared, data)
    assert_unchanged(before, model)
    learn(prepared, data, inplace=True)
    assert_unchanged(before, model)
    assert "qconfig" not in vars(model) or model.qconfig is None


@pytest.mark.parametrize(
    "method",
    [
        LayerWise(column_weighting="fisher", solver="gptq"),
        BlockWise(layers=LayerWise(column_weighting="fisher", solver="gptq"), iterations=5),
        Paper(iterations=5),
    ],
    ids=["fisher", "blocks", "paper"],
)
@pytest.mark.parametrize("name", ["Residual", "Tied"])
def test_no_hook_and_no_other_parameter_gets_into_the_given_model(name, method, monkeypatch):
    _, prepared, data = prepared_net(name)
    theirs = dict(prepared.named_modules())
    tensors = {name: dict(module._parameters) | dict(module._buffers) for name, module in theirs.items()}
    hooked: Counter[str] = Counter()
    plain = nn.Module._call_impl

    def watch() -> None:
        for name, module in theirs.items():
            assert not module._forward_hooks, name
            assert not module._forward_pre_hooks, name
            assert not module._backward_hooks, name
            now = module._parameters | module._buffers
            assert now.keys() == tensors[name].keys(), name
            assert all(now[key] is value for key, value in tensors[name].items()), name

    def watched(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        watch()
        # what is watched for does happen, to modules of our own
        hooked["hook"] += bool(module._forward_hooks)
        hooked["tensor"] += any(type(value) is Tensor for value in module._parameters.values())
        return plain(module, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "_call_impl", watched)
    adaround(prepared, data, method, progress=False)
    watch()
    assert hooked["hook"] or isinstance(method, Paper)
    assert hooked["tensor"]


@pytest.mark.parametrize("inplace", [False, True])
def test_an_error_in_the_middle_changes_nothing(inplace):
    class Breaks:
        calls = 0

        def solve(self, problem):
            self.calls += 1
            if self.calls > 1:
                raise RuntimeError("broken")
            return problem.best_of()

    model, prepared, data = prepared_net("Residual")
    floats, state, given = snapshot(model), snapshot(prepared), copy.deepcopy(data)
    configs = {name: getattr(module, "qconfig", None) for name, module in prepared.named_modules()}
    with pytest.raises(RuntimeError, match="broken"):
        learn(prepared, data, solver=Breaks(), search_scale=False, inplace=inplace)
    assert_unchanged(floats, model)
    assert_unchanged(state, prepared)
    assert_equal_trees(data, given)
    assert all(getattr(module, "qconfig", None) is configs[name] for name, module in prepared.named_modules())
    assert "adaround_report" not in prepared.meta


@pytest.mark.parametrize(
    "options", [{}, {"solver": "coordinate_descent"}, {"max_columns": 40}, {"search_scale": False}]
)
def test_twice_is_the_same(options):
    _, prepared, data = prepared_net("Branches")
    one, two = (learn(prepared, data, **options) for _ in range(2))
    for layer in get_report(one).layers:
        assert_same(learned(one, layer.name), learned(two, layer.name))
    assert get_report(one).output_error == get_report(two).output_error


def test_the_automatic_recipe_is_the_same_twice_and_is_in_the_report():
    _, prepared, data = prepared_net("Branches")
    one, two = (adaround(prepared, data, progress=False) for _ in range(2))
    reports = [get_report(model) for model in (one, two)]
    assert len(reports[0].trials) > 1
    assert reports[0].trials == reports[1].trials
    assert reports[0].recipe == reports[1].recipe
    assert reports[0].recipe in [trial.recipe for trial in reports[0].trials]
    for layer in reports[0].layers:
        assert_same(learned(one, layer.name), learned(two, layer.name))


def test_results_do_not_depend_on_how_samples_are_batched_beyond_rounding():
    _, prepared, data = prepared_net("Residual")
    joined = torch.cat(data)
    one = learn(prepared, data, search_scale=False)
    two = learn(prepared, [joined], search_scale=False)
    ours, theirs = get_report(one), get_report(two)
    assert ours.output_error == pytest.approx(theirs.output_error, rel=0.05)
    assert [layer.columns for layer in ours.layers] == [layer.columns for layer in theirs.layers]


def test_batches_can_be_a_loader_a_generator_or_mapped_by_inputs():
    _, prepared, data = prepared_net("Residual")
    expected = learn(prepared, data, solver="gptq")
    labelled = torch.utils.data.TensorDataset(torch.cat(data), torch.arange(16))
    given: list[tuple[Any, dict[str, Any]]] = [
        ((batch for batch in data), {}),
        (tuple(data), {}),
        ([(batch,) for batch in data], {}),
        ([{"x": batch} for batch in data], {}),
        ([(batch, "label") for batch in data], {"inputs": lambda pair: pair[0]}),
        (torch.utils.data.DataLoader(torch.cat(data), batch_size=6), {}),
        (torch.utils.data.DataLoader(labelled, batch_size=6), {"inputs": lambda pair: {"x": pair[0]}}),
    ]
    for source, options in given:
        result = learn(prepared, source, solver="gptq", **options)
        for name in ("a", "b", "c"):
            assert_same(learned(result, name), learned(expected, name))


def test_item_assignment_works_on_a_copy():
    """Symbolic tracing refuses `x[...] = v`; graphs from elsewhere may have it."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    early = graph.call_function(torch.mul, (x, 2.0))
    graph.call_function(operator.setitem, (x, (slice(None), 0), 7.0))
    graph.output((early, graph.call_function(torch.add, (x, 1.0))))
    module = functionalize(inline(fx.GraphModule(nn.Module(), graph), lambda _: False))
    given = torch.arange(6.0).reshape(2, 3)
    before = given.clone()
    found = run_stream(Stream(module, module.graph), [given])
    expected = before.clone()
    expected[:, 0] = 7.0
    assert torch.equal(found[0], before * 2)
    assert torch.equal(found[1], expected + 1)
    assert torch.equal(given, before)


def _stock(name: str) -> tuple[Any, list[Any]]:
    model, data = NETS[name]()
    prepared = prepare_fx(model.eval(), get_default_qconfig_mapping("x86"), (data[0],))
    for batch in data:
        prepared(batch)
    return prepared, data


def _stock_qparams(prepared: Any, name: str) -> tuple[Tensor, Tensor]:
    path, _, leaf = name.rpartition(".")
    found = getattr(prepared.get_submodule(path), leaf)
    if isinstance(found, nn.Module):
        observer = found.qconfig.weight()
        observer((found[0] if isinstance(found, nn.Sequential) else found).weight)
    else:
        (node,) = (n for n in prepared.graph.nodes if n.op == "get_attr" and n.target == name)
        observer = prepared.get_submodule(str(next(iter(node.users)).target))
    return observer.calculate_qparams()


@pytest.mark.parametrize("name", ["Residual", "Tied", "FunctionalWeights", "Views"])
def test_stock_observers_keep_their_scale_unless_a_search_is_asked_for(name):
    prepared, data = _stock(name)
    # without held-out samples nothing falls back to nearest and with it to the stock scale
    kept, searched = (learn(prepared, data, search_scale=search, holdout=0.0) for search in ("auto", True))
    changed = []
    for layer in get_report(kept).layers:
        scale, zero_point = _stock_qparams(prepared, layer.name)
        found = learned(kept, layer.name)
        assert torch.equal(found.scale, scale)
        assert torch.equal(found.zero_point, zero_point.long())
        changed.append(not torch.equal(learned(searched, layer.name).scale, scale))
        assert layer.bits == 8
    assert all(changed)
    native = convert_fx(copy.deepcopy(kept))
    if name != "FunctionalWeights":
        for layer in get_report(kept).layers:
            assert_same(converted(native, layer.name), learned(kept, layer.name))


def test_own_observers_keep_their_scale_when_asked_to_and_search_otherwise():
    _, prepared, data = prepared_net("Residual")
    kept, searched = learn(prepared, data, search_scale=False), learn(prepared, data)
    for name in ("a", "b", "c"):
        scale, _ = _stock_qparams(prepared, name)
        assert torch.equal(learned(kept, name).scale, scale)
    assert any(not torch.equal(learned(searched, n).scale, _stock_qparams(prepared, n)[0]) for n in ("a", "b", "c"))


@pytest.mark.parametrize("name", ["Residual", "FunctionalWeights", "Siamese", "Recursive"])
def test_nearest_is_nearest_on_the_observers_grid(name):
    _, prepared, data = prepared_net(name)
    result = adaround(prepared, data, LayerWise(solver="nearest", search_scale=False), progress=False)
    for layer in get_report(result).layers:
        found = learned(result, layer.name)
        scale, zero_point = _stock_qparams(prepared, layer.name)
        module = (
            prepared.get_parameter(layer.name)
            if "." not in layer.name and hasattr(dict(prepared.named_parameters()).get(layer.name), "shape")
            else prepared.get_submodule(layer.name)
        )
        weight = (
            module
            if isinstance(module, Tensor)
            else (module[0] if isinstance(module, nn.Sequential) else module).weight
        )
        view = [-1] + [1] * (weight.dim() - 1)
        real = weight.double() / scale.double().view(view) + zero_point.view(view)
        assert torch.equal(found.integers, real.round().clamp(-8, 7).long())
        assert layer.flipped == 0
        assert layer.bias == "kept"
        assert layer.learned_error == layer.nearest_error


@pytest.mark.parametrize("solver", ["annealing", "coordinate_descent", "gptq"])
def test_up_or_down_gives_only_floor_and_ceil(solver):
    _, prepared, data = prepared_net("Residual")
    result = learn(prepared, data, levels="up_or_down", solver=solver)
    for name in ("a", "b", "c"):
        found = learned(result, name)
        module = prepared.get_submodule(name)
        weight = (module[0] if isinstance(module, nn.Sequential) else module).weight.double()
        view = [-1] + [1] * (weight.dim() - 1)
        real = weight / found.scale.double().view(view) + found.zero_point.view(view)
        low, high = real.floor().clamp(-8, 7), (real.floor() + 1).clamp(-8, 7)
        assert ((found.integers == low) | (found.integers == high)).all()


@pytest.mark.parametrize(
    ("name", "solver", "holdout"),
    pairwise(
        ["Residual", "Branches", "Tied", "FunctionalWeights", "Views"],
        ["annealing", "coordinate_descent", "gptq"],
        [0.25, 0.0],
    ),
)
def test_no_layer_is_worse_than_nearest(name, solver, holdout):
    _, prepared, data = prepared_net(name)
    report = get_report(learn(prepared, data, solver=solver, holdout=holdout))
    for layer in report.layers:
        if holdout:
            # not learned: worse there, and the note says that nearest was kept
            assert layer.learned == (layer.learned_holdout <= layer.nearest_holdout)
            assert layer.learned or "nearest" in layer.note
        else:
            assert layer.learned_holdout is None
            assert layer.nearest_holdout is None
            assert layer.learned == (layer.learned_error <= layer.nearest_error)
        assert 0 <= layer.flipped <= 1
        assert 0 <= layer.clipped <= 1
        assert layer.columns > 0


def test_a_layer_worse_than_nearest_falls_back_to_it():
    class Awful:
        def solve(self, problem):
            return Rounding(problem.upper, problem.loss(problem.upper))

    _, prepared, data = prepared_net("Residual")
    result = learn(prepared, data, solver=Awful(), search_scale=False, correct_bias=False)
    nearest = learn(prepared, data, solver="nearest", search_scale=False, correct_bias=False)
    for layer in get_report(result).layers:
        assert not layer.learned
        assert "nearest" in layer.note
        assert_same(learned(result, layer.name), learned(nearest, layer.name))


# --- exclude


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv()
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Flatten())
        self.head = nn.Linear(64, 3)

    def forward(self, x):
        return self.head(self.body(torch.relu(self.stem(x))))


@functools.cache
def _nested() -> tuple[fx.GraphModule, list[Tensor]]:
    """To look at only."""
    torch.manual_seed(0)
    data = batches(*SHAPE)
    return prepared_model(Nested(), data), data


@functools.cache
def _nearest_of_nested() -> fx.GraphModule:
    return learn(*_nested(), solver="nearest", search_scale=False, correct_bias=False)


@pytest.mark.parametrize(
    ("exclude", "expected"),
    [
        ("stem", {"stem"}),
        (["stem", "head"], {"stem", "head"}),
        (["body"], {"body.0", "body.2"}),
        ([r"body\.\d"], {"body.0", "body.2"}),
        ([".*e.*"], {"stem", "head"}),
        ([nn.Linear], {"head"}),
        (nn.Conv2d, {"stem", "body.0", "body.2"}),
        ([nn.Conv2d, "head"], {"stem", "body.0", "body.2", "head"}),
        ((), set()),
    ],
)
def test_excluded_layers_are_nearest_on_their_own_grid(exclude, expected, engine):
    engine("x86")
    prepared, data = _nested()
    result = learn(prepared, data, solver="gptq", exclude=exclude)
    report = get_report(result)
    names = ["stem", "body.0", "body.2", "head"]
    assert [layer.name for layer in report.layers] == [name for name in names if name not in expected]
    assert {name for name, _, _ in report.skipped} == expected
    assert all("excluded" in reason for _, _, reason in report.skipped)
    native = convert_fx(copy.deepcopy(result))
    for name in names:
        assert_same(converted(native, name), learned(result, name))
        if name in expected:
            assert_same(learned(result, name), learned(_nearest_of_nested(), name))


@pytest.mark.parametrize("exclude", ["nothing", ["stem", "nothing"], ["Body"], [""]])
def test_an_unknown_name_in_exclude_is_an_error_that_lists_the_known_ones(exclude):
    prepared, data = _nested()
    with pytest.raises(InvalidOptionError, match=r"exclude.*stem.*body\.0.*head"):
        learn(prepared, data, exclude=exclude)


@pytest.mark.parametrize("exclude", ["[", 3, [3]])
def test_a_malformed_exclude_is_an_option_error(exclude):
    prepared, data = _nested()
    with pytest.raises(InvalidOptionError, match="exclude"):
        learn(prepared, data, exclude=exclude)


# --- ties, reports


def test_tied_weights_get_one_set_of_integers_and_biases_of_their_own(engine):
    engine("x86")
    _, prepared, data = prepared_net("Tied")
    result = learn(prepared, data)
    (layer,) = (entry for entry in get_report(result).layers if entry.name == "a")
    assert layer.tied == ("b",)
    a, b = learned(result, "a"), learned(result, "b")
    assert torch.equal(a.integers, b.integers)
    assert torch.equal(a.scale, b.scale)
    native = convert_fx(copy.deepcopy(result))
    for name in "abc":
        assert_same(converted(native, name), learned(result, name))


def test_tied_recursive_and_reused_modules_convert_exactly(engine):
    engine("x86")
    for name in ("Called3", "Recursive", "TiedRecursive", "Siamese"):
        *_, result = _learned_net(name)
        native = convert_fx(copy.deepcopy(result))
        for layer in get_report(result).layers:
            for linked in (layer.name, *layer.tied):
                assert_same(converted(native, linked), learned(result, linked))


# where the learned layers are not all there is, or not what the modules are called
_LAYERS = {
    "Recurrent": {"inner", "lstm", "gru", "last"},
    "Tokens": {"embedding", "fc", "head"},
    "WithOpaque": {"a", "opaque", "b"},
    "Standalone": {"a", "inner.a", "inner.b", "inner.c", "b"},
    "FunctionalWeights": {"kernel", "matrix"},
    "Tied": {"a", "b", "c"},
}


@pytest.mark.parametrize("name", net_names())
def test_no_layer_is_left_out_or_reported_twice(name):
    report: Report = get_report(_learned_net(name)[-1])
    found = list(itertools.chain.from_iterable((layer.name, *layer.tied) for layer in report.layers))
    found += [entry[0] for entry in report.skipped]
    assert len(found) == len(set(found))
    assert name not in _LAYERS or set(found) == _LAYERS[name]


def test_a_nan_inside_the_network_names_the_layer_and_changes_nothing():
    class Poles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv(), conv()

        def forward(self, x, pole):
            return self.b(torch.relu(self.a(x)) * pole)

    data = [(x, torch.ones(len(x), 1, 1, 1)) for x in batches(*SHAPE)]
    prepared = prepared_model(Poles(), data, activation_bits=None)
    state = snapshot(prepared)
    huge = [(x, tree_map(lambda t: t * 3e38, pole)) for x, pole in data]
    with pytest.raises(NonFiniteError, match="'b'"):
        learn(prepared, huge)
    assert_unchanged(state, prepared)


def test_values_whose_products_overflow_name_the_layer():
    data = [1e20 * batch for batch in batches(4)]
    prepared = prepared_model(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), data, activation_bits=None)
    with pytest.raises(NonFiniteError, match="layer '0': its input is too large"):
        learn(prepared, data)
