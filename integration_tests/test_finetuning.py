"""Scales and biases of the whole network, and integers, learned in the end (`finetune=`), in FX and PT2E."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

from adaround_plugin import BlockWise, Finetune, InvalidOptionError, LayerWise, adaround, get_report
from adaround_plugin.graph.paths import quantizes
from adaround_plugin.hosts.activation_observers import AdaRoundActivationMixin
from adaround_plugin.hosts.learned import learned_weights
from adaround_plugin.hosts.open import open_host
from adaround_plugin.learning.passes import Pass
from adaround_plugin.report import BlockReport, Report
from adaround_plugin.rounding.schemes import up_or_down
from integration_tests.models import NETS, RECIPE, prepared_model
from integration_tests.region_models import (
    CASES,
    Dense,
    Opaque,
    converted,
    learn_in,
    prepared,
    prepared_by,
    samples,
    seeded,
    streamed,
)

QUICK = Finetune(iterations=80, batch_size=16, learning_rate=3e-3)
LAYERS = LayerWise(solver="gptq", **RECIPE)
DATA = samples(192)

every_case = pytest.mark.parametrize(("host", "activation_bits"), CASES)
every_host = pytest.mark.parametrize("host", ["fx", "pt2e"])


def learn(model: fx.GraphModule, method: Any = LAYERS, data: list[Tensor] | None = None, **options: Any):
    return adaround(model, DATA if data is None else data, method, progress=False, **options)


def finetuned(model: fx.GraphModule, method: Any = LAYERS, data: list[Tensor] | None = None, **options: Any) -> Report:
    return get_report(learn(model, method, data, **{"finetune": QUICK, **options}))


@functools.cache
def plain(host: str, activation_bits: int | None) -> fx.GraphModule:
    """A network learned layer by layer, once; not to be changed."""
    return learn(prepared(host, activation_bits))


@functools.cache
def learned_by(host: str, activation_bits: int | None) -> tuple[fx.GraphModule, Pass]:
    """The same, finetuned."""
    return learn_in(prepared(host, activation_bits), DATA, LAYERS, finetune=QUICK)


def kept(found: BlockReport | None) -> bool:
    """Whether what was learned was taken."""
    assert found is not None
    return found.learned_holdout < found.start_holdout


@every_case
def test_the_output_error_falls_and_no_integer_changes(host, activation_bits):
    before, (learned, _) = plain(host, activation_bits), learned_by(host, activation_bits)
    report = get_report(learned)
    assert get_report(before).finetuning is None
    assert kept(report.finetuning)
    assert report.output_error < get_report(before).output_error
    assert report.finetuning.iterations == QUICK.iterations
    assert "network" in str(report)
    one, other = learned_weights(before), learned_weights(learned)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name][0], other[name][0]) for name in one)
    assert any(not torch.equal(one[name][1].scale, other[name][1].scale) for name in one)


@every_case
def test_the_converted_model_is_the_quantized_stream_bit_for_bit(host, activation_bits):
    learned, run = learned_by(host, activation_bits)
    model = converted(host, activation_bits, learned)
    with torch.no_grad():
        for batch in DATA:
            assert torch.equal(streamed(run, batch), model(batch))


@every_host
def test_observers_report_the_scales_that_were_learned(host):
    model, (learned, _) = prepared(host, 4), learned_by(host, 4)
    watched = {
        name: observer
        for name, observer in learned.named_modules(remove_duplicate=False)
        if isinstance(observer, AdaRoundActivationMixin) and observer.quant_max == 15
    }
    moved = [name for name, observer in watched.items() if observer.learned_scale is not None]
    assert len(moved) >= 4
    for name in moved:
        before = float(model.get_submodule(name).calculate_qparams()[0])
        after = float(learned.get_submodule(name).calculate_qparams()[0])
        assert 0.5 < after / before < 2
    assert all(model.get_submodule(name).learned_scale is None for name in moved)
    held = {
        float(node.args[1]) if host == "pt2e" else float(getattr(model, str(node.args[1].target)))
        for model in [converted(host, 4, learned)]
        for node in model.graph.nodes
        if quantizes(node)
    }
    assert {float(learned.get_submodule(name).calculate_qparams()[0]) for name in moved} <= held
    # a second pass over the result begins at the scales learned
    quantizers = open_host(copy.deepcopy(learned)).quantizers
    scales = {name: quantizer.scale for quantizer in quantizers for name in quantizer.names}
    assert all(scales[name] == learned.get_submodule(name).learned_scale for name in moved)


def test_fx_keeps_four_bits_after_finetuning(engine):
    engine("onednn")
    model = convert_fx(copy.deepcopy(learned_by("fx", 4)[0]))
    loud = 10 * torch.cat(DATA)
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


@every_host
def test_scales_that_are_shared_stay_shared(host):
    tied = [one for one in open_host(prepared(host, 4)).quantizers if len(one.nodes) > 1]
    assert tied
    learned, _ = learned_by(host, 4)
    for one in tied:
        assert len({learned.get_submodule(name).learned_scale for name in one.names}) == 1


@every_host
def test_a_learned_scale_keeps_its_zero_point_whatever_is_observed_later(host):
    learned = copy.deepcopy(learned_by(host, 4)[0])
    observers = [m for m in learned.modules() if isinstance(m, AdaRoundActivationMixin) and m.learned_scale]
    before = [tuple(float(value) for value in observer.calculate_qparams()) for observer in observers]
    with torch.no_grad():
        for batch in samples(96, seed=1):
            learned(3 * batch + 2)
    assert observers
    assert before == [tuple(float(value) for value in observer.calculate_qparams()) for observer in observers]


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
    model = prepared_by("pt2e", 2, net, data)
    long = Finetune(iterations=400, batch_size=256, learning_rate=1e-2)
    layers = LayerWise(solver="nearest", search_scale=False, correct_bias=False, holdout=0.0, **FIXED)
    found = finetuned(model, layers, data, finetune=long).finetuning
    (one,) = open_host(model).quantizers
    x, weight = torch.cat(data).double(), net[0].weight.detach().double()

    def error(scale: float) -> float:
        q = (x / scale).round().add(one.zero_point).clamp(one.quant_min, one.quant_max).sub(one.zero_point)
        return float(((q * scale - x) @ weight.T).square().sum())

    best = min(error(one.scale * (0.5 + 0.005 * i)) for i in range(400))
    assert error(one.scale) > 1.05 * best
    assert found.learned_error / found.start_error < 1.02 * best / error(one.scale)


FIXED = {"propagate_error": False, "column_weighting": "none", "damping": 0.1}
INTEGERS = replace(QUICK, iterations=300, integers=True)
NEAREST = LayerWise(solver="nearest", correct_bias=True, search_scale=False, **FIXED)


@every_case
def test_integers_that_may_move_lower_the_error_further(host, activation_bits):
    model = prepared(host, activation_bits)
    before = learned_weights(learn(model, NEAREST))
    fixed = finetuned(model, NEAREST, finetune=replace(INTEGERS, iterations=80, integers=False))
    learned, run = learn_in(model, DATA, NEAREST, finetune=INTEGERS)
    report, after = get_report(learned), learned_weights(learned)
    # activations of 4 bits have most of the error where there are some
    assert report.output_error < 0.9 * fixed.output_error
    assert kept(report.finetuning)
    steps = {name: (integers - before[name][0]).abs() for name, (integers, _) in after.items()}
    moved = sum(int((step > 0).sum()) for step in steps.values())
    assert moved
    assert f"{moved} of {sum(step.numel() for step in steps.values())} integers" in report.finetuning.note
    assert all(int(step.max()) <= 1 for step in steps.values())
    assert all(grid.quant_min <= int(q.min()) <= int(q.max()) <= grid.quant_max for q, grid in after.values())
    for layer in report.layers:
        assert layer.learned >= bool((steps[layer.name] > 0).any())
    converted_model = converted(host, activation_bits, learned)
    with torch.no_grad():
        for batch in DATA:
            assert torch.equal(streamed(run, batch), converted_model(batch))


@pytest.mark.parametrize(("bits", "moves"), [(2, True), (3, False)])
def test_auto_learns_the_integers_of_weights_of_two_bits(bits, moves):
    model = prepared("fx", None, bits=bits, count=48)
    auto, given = (
        learn(model, NEAREST, samples(), finetune=replace(INTEGERS, iterations=60, integers=integers))
        for integers in ("auto", moves)
    )
    one, other = learned_weights(auto), learned_weights(given)
    assert all(torch.equal(one[name][0], other[name][0]) for name in one)
    assert get_report(auto).finetuning.learned_error == get_report(given).finetuning.learned_error


def test_the_integers_of_one_layer_are_about_the_best_neighbours():
    """Against brute force in float64: all ways to leave or move the five integers of a row, nothing else free."""
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 1, bias=False)).eval()
    with torch.no_grad():
        net[0].weight.copy_(torch.randn(1, 5, generator=generator))
    mixing = torch.randn(5, 5, generator=generator)
    data = [torch.randn(64, 5, generator=generator) @ mixing for _ in range(4)]
    model = prepared_by("fx", None, net, data)
    layers = replace(NEAREST, correct_bias=False, holdout=0.0)
    long = Finetune(iterations=1500, batch_size=256, integers=True)
    found = finetuned(model, layers, data, finetune=long).finetuning
    (node,) = open_host(model).nodes
    x, weight, start = torch.cat(data).double(), node.weight.double(), node.grid.nearest(node.weight)

    def error(integers: Tensor) -> float:
        return float((x @ (node.grid.dequantize(integers).double() - weight).T).square().sum())

    ways = torch.cartesian_prod(*[torch.tensor([-1, 0, 1])] * 5)
    best = min(error((start + way).clamp(node.grid.quant_min, node.grid.quant_max)) for way in ways)
    share = found.learned_error / found.start_error
    assert share < 0.9
    assert best / error(start) * (1 - 1e-6) <= share < 1.3 * best / error(start)


def test_integers_stay_up_or_down_where_that_is_asked_for():
    model = prepared()
    layers = replace(NEAREST, levels="up_or_down")
    before = learned_weights(learn(model, layers))
    learned = learned_weights(learn(model, layers, finetune=INTEGERS))
    assert not all(torch.equal(before[name][0], learned[name][0]) for name in before)
    nodes = {node.name: node for node in open_host(model).nodes}
    for name, (integers, grid) in learned.items():
        low, high = up_or_down(grid, nodes[name].weight)
        assert ((integers == low) | (integers == high)).all()


class Gated(nn.Module):
    """A network with a gate, through which no derivative goes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.gate, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(2, 4, 1), nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.a(x).relu() * (self.gate(x) > 0).float())


def test_integers_behind_a_gate_stay():
    model = prepared(make=Gated)
    before = learned_weights(learn(model, NEAREST))
    learned = learned_weights(learn(model, NEAREST, finetune=INTEGERS))
    assert torch.equal(before["gate"][0], learned["gate"][0])
    assert not all(torch.equal(before[name][0], learned[name][0]) for name in before)


@every_case
def test_what_no_derivative_reaches_stays_and_is_reported(host, activation_bits):
    model = prepared(host, activation_bits, Gated)
    before, learned = learn(model), learn(model, finetune=replace(QUICK, iterations=30))
    found = get_report(learned).finetuning
    assert found.iterations == 30
    # scale and bias of the gate; FX also quantizes what the gate compares
    behind = 3 if (host, activation_bits) == ("fx", 4) else 2
    assert f"reaches {behind} of" in found.note
    one, other = learned_weights(before), learned_weights(learned)
    assert torch.equal(one["gate"][1].scale, other["gate"][1].scale)


@pytest.mark.parametrize("activation_bits", [None, 4])
def test_without_a_layer_to_learn_nothing_but_steps_of_activations_moves(activation_bits):
    short = replace(INTEGERS, iterations=20)
    found = finetuned(prepared("fx", activation_bits), finetune=short, exclude=[".*"]).finetuning
    assert found.layers == ()
    assert found.iterations == (0 if activation_bits is None else 20)


class Compared(nn.Module):
    """A network whose weights all lie before a comparison, beside values that can be learned from."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Conv2d(2, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return (x + 1).mean(1, keepdim=True) * (self.gate(x) > 0).float()


@every_case
def test_integers_that_no_derivative_reaches_do_not_keep_the_rest_from_learning(host, activation_bits):
    model = prepared(host, activation_bits, Compared)
    for integers in (False, True):
        short = replace(INTEGERS, iterations=20, integers=integers)
        # FX quantizes sums and products too
        if host == "fx" and activation_bits is not None:
            assert finetuned(model, NEAREST, finetune=short).finetuning.iterations == 20
        else:
            with pytest.raises(InvalidOptionError, match="derivative"):
                finetuned(model, NEAREST, finetune=short)


def test_integers_count_as_moved_only_where_they_are_kept():
    wild = replace(INTEGERS, learning_rate=3.0, iterations=100)
    found = finetuned(prepared(), finetune=wild).finetuning
    assert not kept(found)
    assert "moved" not in found.note


@pytest.mark.parametrize("iterations", [1, 7])
def test_all_steps_are_for_integers_where_nothing_else_may_move(iterations):
    layers = replace(NEAREST, correct_bias=False)
    found = finetuned(prepared(), layers, finetune=replace(INTEGERS, iterations=iterations)).finetuning
    assert found.iterations == iterations


def test_scales_that_are_the_users_choice_stay():
    # of few samples biases alone have something left to learn
    data = samples(96)
    model = prepare_fx(seeded(Dense), get_default_qconfig_mapping("x86"), (data[0],))
    for batch in data:
        model(batch)
    learned = learn(model, data=data, finetune=QUICK)
    assert kept(get_report(learned).finetuning)
    found = learned_weights(learned)
    assert all(torch.equal(node.grid.scale, found[node.name][1].scale) for node in open_host(model).nodes)


@every_host
def test_what_is_worse_on_held_out_samples_is_not_kept(host):
    wild = replace(QUICK, learning_rate=3.0, iterations=5)
    learned = learn(prepared(host, 4), finetune=wild)
    report = get_report(learned)
    assert not kept(report.finetuning)
    assert report.output_error == get_report(plain(host, 4)).output_error
    one, other = (converted(host, 4, model) for model in (plain(host, 4), learned))
    assert all(torch.equal(one(batch), other(batch)) for batch in DATA)


@pytest.mark.parametrize("count", [1, 2])
def test_a_dictionary_among_the_arguments_is_taken_apart(count):
    net, data = NETS["DictArgument"]()
    data = data[:count]
    report = finetuned(prepared_model(net.eval(), data, activation_bits=None), data=data)
    assert report.finetuning.iterations == QUICK.iterations
    assert report.finetuning.start_holdout is not None


def test_nothing_to_learn_is_in_the_report():
    found = finetuned(prepared(), replace(NEAREST, correct_bias=False)).finetuning
    assert found.iterations == 0
    assert found.note


def test_layers_that_keep_nearest_or_are_excluded_say_so():
    before = get_report(learn(prepared(), exclude=["head"]))
    report = finetuned(prepared(), exclude=["head"], finetune=replace(QUICK, iterations=20))
    assert "head" not in report.finetuning.layers
    assert [(name, "excluded" in reason) for name, _, reason in report.skipped] == [("head", True)]
    for one, other in zip(before.layers, report.layers, strict=True):
        assert (one.name, one.learned) == (other.name, other.learned)


def test_it_follows_blocks_too():
    joint = BlockWise(layers=LAYERS, iterations=20, batch_size=8, drop=0.0, weighs_outputs=False)
    report = finetuned(prepared("fx", 4), joint, finetune=replace(QUICK, iterations=20))
    assert report.blocks
    assert report.finetuning.iterations == 20
    assert report.seconds["finetune"] > 0


def test_a_program_for_one_batch_size_is_finetuned_in_batches_of_that():
    model = prepared("pt2e", 4, dynamic=False)
    assert kept(finetuned(model, finetune=replace(QUICK, batch_size=5)).finetuning)


def test_the_same_call_gives_the_same_scales_whatever_the_global_seed():
    torch.manual_seed(2)
    again = learn(prepared("fx", 4), finetune=QUICK)
    assert torch.initial_seed() == 2
    for one, other in zip(learned_by("fx", 4)[0].parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("finetune", ["yes", 1, 300, Finetune])
def test_bad_options_are_refused(finetune):
    with pytest.raises(InvalidOptionError) as caught:
        learn(prepared(), finetune=finetune)
    assert caught.value.subject == "finetune"


def test_an_operator_without_a_derivative_is_an_error_with_a_remedy():
    batches = [torch.randn(32, 12, generator=torch.Generator().manual_seed(0))]
    with pytest.raises(InvalidOptionError, match="finetune=False"):
        finetuned(prepared_by("fx", None, seeded(Opaque), batches), data=batches)


class Transposed(Dense):
    """A network whose output has its samples on another axis than the first."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).movedim(0, 1)


@pytest.mark.parametrize("size", [16, 9])
def test_without_an_axis_of_samples_nothing_counts_as_held_out(size):
    # outputs of 3 channels in batches of 9 or 16: samples are no runs of the first axis
    found = finetuned(prepared(make=Transposed), data=samples(96, size=size)).finetuning
    assert found.start_holdout is None
    assert found.learned_holdout is None
    assert "held out" in found.note
    assert found.learned_error < found.start_error


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
    found = finetuned(prepared_by("fx", None, seeded(Time), data), data=data).finetuning
    assert found.start_holdout is None
    assert "held out" in found.note


def test_no_weight_counts_as_flipped_by_finetuning():
    layers = replace(NEAREST, search_scale=True)
    report, before = finetuned(prepared(), layers), get_report(learn(prepared(), layers))
    assert kept(report.finetuning)
    assert [layer.flipped for layer in report.layers] == [layer.flipped for layer in before.layers]


class Extras(Dense):
    """A network that returns a parameter and a value twice as well."""

    def __init__(self) -> None:
        super().__init__()
        self.constant = nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return y, self.constant, y


@every_host
def test_constants_and_repetitions_among_the_outputs_do_not_matter(host):
    found = finetuned(prepared(host, 4, Extras)).finetuning
    expected = get_report(learned_by(host, 4)[0]).finetuning
    assert (found.note, found.learned_holdout) == (expected.note, expected.learned_holdout)


class Index(Dense):
    """A network that returns integers."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).argmax(1)


def test_a_network_without_a_float_output_is_left_as_it_is():
    found = finetuned(prepared(make=Index), finetune=True).finetuning
    assert found.iterations == 0
    assert "output" in found.note
