"""Scales and biases of the whole network, learned in the end (`refine=True`), in FX and PT2E."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx, nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, convert_to_reference_fx, prepare_fx
from torch.export import Dim
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import X86InductorQuantizer

from adaround_plugin import (
    InvalidOptionError,
    Refinement,
    adaround,
    get_adaround_qconfig_mapping,
    get_report,
    get_weight_only_backend_config,
)
from adaround_plugin.hosts.activation_observers import AdaRoundActivationMixin
from adaround_plugin.hosts.open import learned_weights, open_host
from adaround_plugin.graph.paths import quantizes
from adaround_plugin.hosts.pt2e import AdaRoundWeightOnlyQuantizer, get_adaround_x86_inductor_config
from adaround_plugin.rounding.schemes import up_or_down
from adaround_plugin.solvers import Annealing, Relaxation
from integration_tests.test_column_importance import Opaque
from integration_tests.test_relaxation import RECIPE, samples

QUICK = Refinement(iterations=120, batch_size=16, learning_rate=3e-3)
CASES = [("fx", 4), ("fx", None), ("pt2e", 4), ("pt2e", None)]


class Dense(nn.Module):
    """A network with an output for every position, a branch, and values that are quantized with one scale."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(2, 4, 3, padding=1)
        self.pool, self.c = nn.MaxPool2d(3, 1, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.d, self.head = nn.Conv2d(8, 8, 3, padding=1, groups=4), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(self.pool(torch.cat([self.a(x), self.b(x)], 1))).relu()
        return self.head((x + self.d(x)).relu())


def prepared_by(host: str, activation_bits: int | None, net: nn.Module | None = None, batches=None) -> fx.GraphModule:
    net = (net or Dense()).eval()
    batches = batches or samples(96)
    if host == "fx":
        backend = get_weight_only_backend_config() if activation_bits is None else None
        mapping = get_adaround_qconfig_mapping("x86", 3, activation_bits, model=net)
        prepared = prepare_fx(net, mapping, (batches[0],), backend_config=backend)
    else:
        quantizer = (
            AdaRoundWeightOnlyQuantizer(weight_bits=3)
            if activation_bits is None
            else X86InductorQuantizer().set_global(get_adaround_x86_inductor_config(3, activation_bits))
        )
        program = torch.export.export(net, (batches[0],), dynamic_shapes=({0: Dim.AUTO},), strict=True).module()
        prepared = prepare_pt2e(program, quantizer)
    with torch.no_grad():
        for batch in batches:
            prepared(batch)
    return prepared


def converted(host: str, activation_bits: int | None, learned: fx.GraphModule) -> fx.GraphModule:
    learned = copy.deepcopy(learned)
    if host == "pt2e":
        return convert_pt2e(learned)
    backend = get_weight_only_backend_config() if activation_bits is None else None
    return convert_to_reference_fx(learned, backend_config=backend)


@pytest.mark.parametrize(("host", "activation_bits"), CASES)
def test_the_output_error_falls_and_no_integer_changes(host, activation_bits):
    prepared = prepared_by(host, activation_bits)
    plain = adaround(prepared, samples(96), progress=False, **RECIPE)
    refined = adaround(prepared, samples(96), refine=QUICK, progress=False, **RECIPE)
    before, after = get_report(plain), get_report(refined)
    assert before.refinement is None
    assert after.refinement.learned_holdout < after.refinement.start_holdout
    assert after.output_error < before.output_error
    assert after.refinement.iterations == QUICK.iterations
    assert ("0 step sizes" in after.refinement.note) == (activation_bits is None)
    assert "network" in str(after)
    one, other = learned_weights(plain), learned_weights(refined)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name][0], other[name][0]) for name in one)
    assert any(not torch.equal(one[name][1].scale, other[name][1].scale) for name in one)


@pytest.mark.parametrize(("host", "activation_bits"), CASES)
def test_the_converted_model_is_the_quantized_stream_bit_for_bit(host, activation_bits, learners):
    prepared = prepared_by(host, activation_bits)
    learned = adaround(prepared, samples(96), refine=QUICK, progress=False, **RECIPE)
    assert get_report(learned).refinement.learned_holdout < get_report(learned).refinement.start_holdout
    model = converted(host, activation_bits, learned)
    with torch.no_grad():
        for batch in samples(96):
            found = fx.Interpreter(learners[-1].host.quantized_stream.module).run(batch)
            assert torch.equal(found[0] if isinstance(found, tuple) else found, model(batch))


@pytest.mark.parametrize("host", ["fx", "pt2e"])
def test_observers_report_the_scales_that_were_learned(host):
    prepared = prepared_by(host, 4)
    learned = adaround(prepared, samples(96), refine=QUICK, progress=False, **RECIPE)
    watched = {
        name: observer
        for name, observer in learned.named_modules(remove_duplicate=False)
        if isinstance(observer, AdaRoundActivationMixin) and observer.quant_max == 15
    }
    moved = [name for name, observer in watched.items() if observer.learned_scale is not None]
    assert len(moved) >= 4
    for name in moved:
        before = float(prepared.get_submodule(name).calculate_qparams()[0])
        after = float(learned.get_submodule(name).calculate_qparams()[0])
        assert 0.5 < after / before < 2
    assert any(prepared.get_submodule(name).learned_scale is None for name in moved)
    held = {
        float(node.args[1]) if host == "pt2e" else float(getattr(model, str(node.args[1].target)))
        for model in [converted(host, 4, learned)]
        for node in model.graph.nodes
        if quantizes(node)
    }
    assert {float(learned.get_submodule(name).calculate_qparams()[0]) for name in moved} <= held
    # a second pass over the result begins at the scales learned
    quantizers = open_host(learned).quantizers
    scales = {name: quantizer.scale for quantizer in quantizers for name in quantizer.names}
    assert all(scales[name] == learned.get_submodule(name).learned_scale for name in moved)


def test_fx_keeps_four_bits_after_refinement(engine):
    engine("onednn")
    learned = adaround(prepared_by("fx", 4), samples(96), refine=QUICK, progress=False, **RECIPE)
    model = convert_fx(copy.deepcopy(learned))
    loud = 10 * torch.cat(samples(96))
    found: list[Tensor] = []

    class Watched(fx.Interpreter):
        def run_node(self, n):
            value = super().run_node(n)
            if quantizes(n):
                found.append(value.int_repr())
            return value

    Watched(model).run(loud)
    assert found
    assert all(int(integers.max()) <= 15 for integers in found[:-1])


@pytest.mark.parametrize("host", ["fx", "pt2e"])
def test_scales_that_are_shared_stay_shared(host, learners):
    prepared = prepared_by(host, 4, Dense())
    tied = [one for one in open_host(prepared).quantizers if len(one.nodes) > 1]
    assert tied
    learned = adaround(prepared, samples(96), refine=QUICK, progress=False, **RECIPE)
    assert get_report(learned).refinement.learned_holdout < get_report(learned).refinement.start_holdout
    for one in tied:
        assert len({learned.get_submodule(name).learned_scale for name in one.names}) == 1
    model = converted(host, 4, learned)
    with torch.no_grad():
        found = fx.Interpreter(learners[-1].host.quantized_stream.module).run(samples()[0])
        assert torch.equal(found[0] if isinstance(found, tuple) else found, model(samples()[0]))


def test_the_step_of_one_activation_is_the_best_one():
    """Against brute force: a linear layer with weights on the grid, one activation at 2 bits, nothing else free."""
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 4)).eval()
    # what is small in the squared error of the activations is large in that of the output
    with torch.no_grad():
        net[0].weight.copy_(torch.randint(0, 2, (4, 6), generator=generator) * 1.0)
        net[0].weight[:, 0] = 3.0
    sizes = torch.tensor([1.0, 4.0, 4.0, 4.0, 4.0, 4.0])
    data = [sizes * torch.rand(64, 6, generator=generator) for _ in range(4)]
    quantizer = X86InductorQuantizer().set_global(get_adaround_x86_inductor_config(3, 2))
    program = torch.export.export(net, (data[0],), dynamic_shapes=({0: Dim.AUTO},), strict=True).module()
    prepared = prepare_pt2e(program, quantizer)
    for batch in data:
        prepared(batch)
    options = {"solver": "nearest", "scale": "observer", "holdout": 0.0, "progress": False}
    long = Refinement(iterations=600, batch_size=256, learning_rate=1e-2)
    report = get_report(adaround(prepared, data, refine=long, **options))
    assert report.refinement.note == "0 scales of weights, 0 biases, 1 step sizes of activations"
    (one,) = open_host(prepared).quantizers
    x, weight = torch.cat(data).double(), net[0].weight.detach().double()

    def error(scale: float) -> float:
        q = (x / scale).round().add(one.zero_point).clamp(one.quant_min, one.quant_max).sub(one.zero_point)
        return float(((q * scale - x) @ weight.T).square().sum())

    best = min(error(one.scale * (0.5 + 0.005 * i)) for i in range(400))
    share = report.refinement.learned_error / report.refinement.start_error
    assert error(one.scale) > 1.05 * best
    assert share < 1.02 * best / error(one.scale)


INTEGERS = replace(QUICK, iterations=300, integers=True)
NEAREST = {"solver": "nearest", "correct_bias": True, "progress": False}


@pytest.mark.parametrize(("host", "activation_bits"), CASES)
def test_integers_that_may_move_lower_the_error_further(host, activation_bits, learners):
    prepared = prepared_by(host, activation_bits)
    before = learned_weights(adaround(prepared, samples(96), **NEAREST))
    fixed = get_report(adaround(prepared, samples(96), refine=replace(INTEGERS, integers=False), **NEAREST))
    learned = adaround(prepared, samples(96), refine=INTEGERS, **NEAREST)
    report, after = get_report(learned), learned_weights(learned)
    # activations of 4 bits have most of the error where there are some
    assert report.output_error < 0.9 * fixed.output_error
    assert report.refinement.learned_holdout < report.refinement.start_holdout
    steps = {name: (integers - before[name][0]).abs() for name, (integers, _) in after.items()}
    moved = sum(int((step > 0).sum()) for step in steps.values())
    assert f"{moved} of {sum(step.numel() for step in steps.values())} integers moved" in report.refinement.note
    assert moved
    assert all(int(step.max()) <= 1 for step in steps.values())
    assert all(grid.quant_min <= int(q.min()) <= int(q.max()) <= grid.quant_max for q, grid in after.values())
    for layer in report.layers:
        assert layer.learned >= bool((steps[layer.name] > 0).any())
    model = converted(host, activation_bits, learned)
    for batch in samples(96):
        found = fx.Interpreter(learners[-1].host.quantized_stream.module).run(batch)
        assert torch.equal(found[0] if isinstance(found, tuple) else found, model(batch))


def test_the_integers_of_one_layer_are_about_the_best_neighbours():
    """Against brute force in float64: all ways to leave or move the five integers of a row, nothing else free."""
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 1, bias=False)).eval()
    with torch.no_grad():
        net[0].weight.copy_(torch.randn(1, 5, generator=generator))
    mixing = torch.randn(5, 5, generator=generator)
    data = [torch.randn(64, 5, generator=generator) @ mixing for _ in range(4)]
    prepared = prepared_by("fx", None, net, data)
    options = {"solver": "nearest", "scale": "observer", "correct_bias": False, "holdout": 0.0, "progress": False}
    long = Refinement(iterations=1500, batch_size=256, integers=True)
    report = get_report(adaround(prepared, data, refine=long, **options))
    (node,) = open_host(prepared).nodes
    x, weight, start = torch.cat(data).double(), node.weight.double(), node.grid.nearest(node.weight)

    def error(integers: Tensor) -> float:
        return float((x @ (node.grid.dequantize(integers).double() - weight).T).square().sum())

    ways = torch.cartesian_prod(*[torch.tensor([-1, 0, 1])] * 5)
    best = min(error((start + way).clamp(node.grid.quant_min, node.grid.quant_max)) for way in ways)
    share = report.refinement.learned_error / report.refinement.start_error
    assert share < 0.9
    assert best / error(start) * (1 - 1e-6) <= share < 1.3 * best / error(start)


def test_integers_stay_up_or_down_where_that_is_asked_for():
    prepared = prepared_by("fx", None)
    learned = adaround(prepared, samples(96), refine=INTEGERS, rounding="up_or_down", **NEAREST)
    assert " 0 of" not in get_report(learned).refinement.note
    nodes = {node.name: node for node in open_host(prepared).nodes}
    for name, (integers, grid) in learned_weights(learned).items():
        low, high = up_or_down(grid, nodes[name].weight)
        assert ((integers == low) | (integers == high)).all()


def test_integers_behind_a_gate_stay():
    prepared = prepared_by("fx", None, Gated())
    plain = learned_weights(adaround(prepared, samples(96), progress=False, **RECIPE))
    learned = learned_weights(adaround(prepared, samples(96), refine=INTEGERS, progress=False, **RECIPE))
    assert torch.equal(plain["gate"][0], learned["gate"][0])
    assert not all(torch.equal(plain[name][0], learned[name][0]) for name in plain)


@pytest.mark.parametrize("activation_bits", [None, 4])
def test_without_a_layer_to_learn_nothing_but_steps_of_activations_moves(activation_bits):
    prepared = prepared_by("fx", activation_bits)
    learned = adaround(prepared, samples(96), refine=INTEGERS, exclude=[".*"], progress=False, **RECIPE)
    note = get_report(learned).refinement.note
    assert "nothing that may move" in note if activation_bits is None else "6 step sizes" in note


class Compared(nn.Module):
    """A network whose weights all lie before a comparison, beside values that can be learned from."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Conv2d(2, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return (x + 1).mean(1, keepdim=True) * (self.gate(x) > 0).float()


@pytest.mark.parametrize(("host", "activation_bits"), CASES)
def test_integers_that_no_derivative_reaches_do_not_keep_the_rest_from_learning(host, activation_bits):
    prepared = prepared_by(host, activation_bits, Compared())
    fixed = replace(INTEGERS, integers=False)
    outcomes = []
    for refinement in (fixed, INTEGERS):
        try:
            outcomes.append(get_report(adaround(prepared, samples(96), refine=refinement, **NEAREST)).refinement.layers)
        except InvalidOptionError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]


def test_integers_count_as_moved_only_where_they_are_kept():
    prepared = prepared_by("fx", None)
    wild = replace(INTEGERS, learning_rate=3.0, iterations=100)
    learned = adaround(prepared, samples(96), refine=wild, progress=False, **RECIPE)
    note = get_report(learned).refinement.note
    assert "start kept" in note
    assert "moved" not in note


def test_all_steps_are_for_integers_where_nothing_else_may_move():
    prepared = prepared_by("fx", None)
    options = {"solver": "nearest", "scale": "observer", "correct_bias": False, "progress": False}
    for iterations in (1, 7):
        learned = adaround(prepared, samples(96), refine=replace(INTEGERS, iterations=iterations), **options)
        assert get_report(learned).refinement.iterations == iterations


def test_scales_that_are_the_users_choice_stay():
    net = Dense().eval()
    prepared = prepare_fx(net, get_default_qconfig_mapping("x86"), (samples()[0],))
    for batch in samples(96):
        prepared(batch)
    learned = adaround(prepared, samples(96), refine=QUICK, progress=False, **RECIPE)
    assert "0 scales of weights, 5 biases, 0 step sizes" in get_report(learned).refinement.note
    found = learned_weights(learned)
    assert all(torch.equal(node.grid.scale, found[node.name][1].scale) for node in open_host(prepared).nodes)


@pytest.mark.parametrize("host", ["fx", "pt2e"])
def test_what_is_worse_on_held_out_samples_is_not_kept(host):
    prepared = prepared_by(host, 4)
    wild = replace(QUICK, learning_rate=3.0, iterations=5)
    plain = adaround(prepared, samples(96), progress=False, **RECIPE)
    refined = adaround(prepared, samples(96), refine=wild, progress=False, **RECIPE)
    report = get_report(refined)
    assert "start kept" in report.refinement.note
    assert report.output_error == get_report(plain).output_error
    for batch in samples(96):
        assert torch.equal(converted(host, 4, plain)(batch), converted(host, 4, refined)(batch))


def test_nothing_to_learn_is_in_the_report():
    prepared = prepared_by("fx", None)
    options = {"solver": "nearest", "scale": "observer", "correct_bias": False}
    learned = adaround(prepared, samples(96), refine=QUICK, progress=False, **options)
    assert get_report(learned).refinement.iterations == 0
    assert "nothing that may move" in get_report(learned).refinement.note


def test_layers_that_keep_nearest_or_are_excluded_say_so():
    prepared = prepared_by("fx", None)
    plain = adaround(prepared, samples(96), exclude=["head"], progress=False, **RECIPE)
    learned = adaround(prepared, samples(96), exclude=["head"], refine=QUICK, progress=False, **RECIPE)
    assert "head" not in get_report(learned).refinement.layers
    for one, other in zip(get_report(plain).layers, get_report(learned).layers, strict=True):
        assert (one.name, one.learned) == (other.name, other.learned)


def test_it_follows_blocks_too():
    joint = Relaxation(iterations=30, learning_rate=3e-2, batch_size=8, start=Annealing(), learn_scale=True)
    prepared = prepared_by("fx", 4)
    learned = adaround(prepared, samples(96), preset="blocks", solver=joint, refine=QUICK, progress=False, **RECIPE)
    report = get_report(learned)
    assert report.blocks
    assert report.refinement.iterations == QUICK.iterations
    assert report.seconds["refine"] > 0


def test_a_program_for_one_batch_size_is_refined_in_batches_of_that():
    net = Dense().eval()
    data = samples(96, size=16)
    quantizer = X86InductorQuantizer().set_global(get_adaround_x86_inductor_config(3, 4))
    prepared = prepare_pt2e(torch.export.export(net, (data[0],), strict=True).module(), quantizer)
    for batch in data:
        prepared(batch)
    learned = adaround(prepared, data, refine=replace(QUICK, batch_size=5), progress=False, **RECIPE)
    assert get_report(learned).refinement.learned_holdout < get_report(learned).refinement.start_holdout


def test_the_same_call_gives_the_same_scales_whatever_the_global_seed():
    prepared = prepared_by("fx", 4)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        learned = adaround(prepared, samples(96), refine=QUICK, progress=False, **RECIPE)
        found.append([parameter.detach() for parameter in learned.parameters()])
        assert torch.initial_seed() == seed
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("refine", ["yes", 1, None, 300])
def test_bad_options_are_refused(refine):
    with pytest.raises(InvalidOptionError, match="Pass True, False or a Refinement"):
        adaround(prepared_by("fx", None), samples(), refine=refine, progress=False)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(
            ("iterations", 0),
            ("iterations", 1.5),
            ("iterations", True),
            ("batch_size", -1),
            ("seed", "x"),
            ("seed", 1.5),
        ),
        ("integers", 1),
        *(("learning_rate", value) for value in (0, float("nan"), float("inf"), "a")),
    ],
)
def test_bad_settings_are_refused(field, value):
    with pytest.raises(InvalidOptionError, match=f"Refinement.{field}"):
        Refinement(**{field: value})


def test_an_operator_without_a_derivative_is_an_error_with_a_remedy():
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(32, 12, generator=generator)]
    prepared = prepared_by("fx", None, Opaque(), batches)
    with pytest.raises(InvalidOptionError, match="refine=False"):
        adaround(prepared, batches, refine=QUICK, progress=False, **RECIPE)


class Gated(nn.Module):
    """A network with a gate, through which no derivative goes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.gate, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(2, 4, 1), nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.a(x).relu() * (self.gate(x) > 0).float())


@pytest.mark.parametrize(("host", "activation_bits"), CASES)
def test_what_no_derivative_reaches_stays_and_is_reported(host, activation_bits):
    prepared = prepared_by(host, activation_bits, Gated())
    plain = adaround(prepared, samples(96), progress=False, **RECIPE)
    learned = adaround(prepared, samples(96), refine=QUICK, progress=False, **RECIPE)
    refinement = get_report(learned).refinement
    assert refinement.iterations == QUICK.iterations
    # scale and bias of the gate; FX also quantizes what the gate compares
    behind = 3 if (host, activation_bits) == ("fx", 4) else 2
    assert f"no derivative reaches {behind} of these" in refinement.note
    one, other = learned_weights(plain), learned_weights(learned)
    assert torch.equal(one["gate"][1].scale, other["gate"][1].scale)


class Transposed(Dense):
    """A network whose output has its samples on another axis than the first."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).movedim(0, 1)


@pytest.mark.parametrize("size", [16, 9])
def test_without_an_axis_of_samples_nothing_counts_as_held_out(size):
    # outputs of 3 channels in batches of 9 or 16: samples are no runs of the first axis
    prepared = prepared_by("fx", None, Transposed())
    report = get_report(adaround(prepared, samples(96, size=size), refine=QUICK, progress=False, **RECIPE))
    assert report.refinement.start_holdout is None
    assert report.refinement.learned_holdout is None
    assert "nothing held out" in report.refinement.note
    assert report.refinement.learned_error < report.refinement.start_error


class Time(nn.Module):
    """Time steps first: in batches of 4 samples the 8 steps could be taken for runs of samples."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu()).transpose(0, 1)


def test_time_steps_are_not_taken_for_samples():
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(4, 8, 6, generator=generator) for _ in range(8)]
    report = get_report(adaround(prepared_by("fx", None, Time(), data), data, refine=QUICK, progress=False, **RECIPE))
    assert report.refinement.start_holdout is None
    assert "nothing held out" in report.refinement.note


@pytest.mark.parametrize("host", ["fx", "pt2e"])
def test_a_learned_scale_keeps_its_zero_point_whatever_is_observed_later(host):
    learned = adaround(prepared_by(host, 4), samples(96), refine=QUICK, progress=False, **RECIPE)
    observers = [m for m in learned.modules() if isinstance(m, AdaRoundActivationMixin) and m.learned_scale]
    before = [tuple(float(value) for value in observer.calculate_qparams()) for observer in observers]
    with torch.no_grad():
        for batch in samples(96, seed=1):
            learned(3 * batch + 2)
    assert observers
    assert before == [tuple(float(value) for value in observer.calculate_qparams()) for observer in observers]


def test_no_weight_counts_as_flipped_by_refinement():
    prepared = prepared_by("fx", None)
    options = {"solver": "nearest", "scale": "search", "correct_bias": True, "progress": False}
    report = get_report(adaround(prepared, samples(96), refine=QUICK, **options))
    assert report.refinement.learned_holdout < report.refinement.start_holdout
    plain = get_report(adaround(prepared, samples(96), **options))
    assert [layer.flipped for layer in report.layers] == [layer.flipped for layer in plain.layers]


class Extras(Dense):
    """A network that returns a parameter and a value twice as well."""

    def __init__(self) -> None:
        super().__init__()
        self.constant = nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = super().forward(x)
        return y, self.constant, y


@pytest.mark.parametrize("host", ["fx", "pt2e"])
def test_constants_and_repetitions_among_the_outputs_do_not_matter(host):
    def refined(net: nn.Module):
        torch.manual_seed(0)
        prepared = prepared_by(host, 4, net())
        return get_report(adaround(prepared, samples(96), refine=QUICK, progress=False, **RECIPE)).refinement

    one, other = refined(Dense), refined(Extras)
    assert one.note == other.note
    assert one.learned_holdout == other.learned_holdout


class Index(Dense):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).argmax(1)


def test_a_network_without_a_float_output_is_left_as_it_is():
    report = get_report(adaround(prepared_by("fx", None, Index()), samples(96), refine=True, progress=False, **RECIPE))
    assert report.refinement.iterations == 0
    assert "no output from which could be learned" in report.refinement.note
