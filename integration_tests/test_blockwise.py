"""Blocks of layers learned together (`BlockWise`), in FX and PT2E."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

from adaround_plugin import BlockWise, InvalidOptionError, LayerWise, adaround, get_report
from adaround_plugin.hosts.learned import learned_weights
from adaround_plugin.hosts.open import open_host
from adaround_plugin.learning.passes import Pass
from adaround_plugin.learning.progress import Progress
from adaround_plugin.learning.report_builder import ReportBuilder
from adaround_plugin.regions.blocks import find_blocks, layer_exits, output_exits
from adaround_plugin.regions.calibration import Sampling
from adaround_plugin.regions.minibatches import squared_error
from adaround_plugin.regions.region import Drawing, Region
from adaround_plugin.report import BlockReport, Report
from adaround_plugin.rounding.schemes import up_or_down
from integration_tests.models import RECIPE, uncompared
from integration_tests.pairs import pairwise
from integration_tests.region_models import (
    Net,
    Twice,
    ZeroPadded,
    converted,
    held_out_error,
    learn_in,
    prepared,
    prepared_by,
    samples,
    seeded,
    streamed,
)

JOINT = BlockWise(
    layers=LayerWise(**RECIPE), iterations=60, learning_rate=0.1, batch_size=8, drop=0.0, weighs_outputs=False
)
QUICK = replace(JOINT, layers=replace(JOINT.layers, solver="gptq"), iterations=20)
CASES = [("fx", None), ("fx", 8), ("fx", 4), ("pt2e", None), ("pt2e", 4)]
every_case = pytest.mark.parametrize(("host", "activation_bits"), CASES)
fx_8_and_weight_only = pytest.mark.parametrize("activation_bits", [None, 8])


def network(host: str) -> type[nn.Module]:
    return Net if host == "fx" else ZeroPadded


def prepared_net(host: str = "fx", activation_bits: int | None = None, **options: Any) -> fx.GraphModule:
    return prepared(host, activation_bits, network(host), **{"bits": 2, "count": 48, **options})


@functools.cache
def learned_by(host: str, activation_bits: int | None) -> tuple[fx.GraphModule, Pass]:
    """A network learned by blocks, once; not to be changed."""
    return learn_in(prepared_net(host, activation_bits), samples(), JOINT)


@functools.cache
def layers_alone(host: str, activation_bits: int | None) -> fx.GraphModule:
    """The same, layer by layer alone."""
    return adaround(prepared_net(host, activation_bits), samples(), JOINT.layers, progress=False)


@functools.cache
def quick(activation_bits: int | None, **options: Any) -> fx.GraphModule:
    """A network learned quickly by blocks, with some options."""
    return adaround(prepared_net("fx", activation_bits), samples(), replace(QUICK, **options), progress=False)


@functools.cache
def nearest_error(host: str, activation_bits: int | None) -> float:
    """Of the network's output, rounded to nearest."""
    error = report_of(prepared_net(host, activation_bits), "nearest").output_error
    assert error is not None
    return error


def report_of(prepared: fx.GraphModule, method: Any, data: list[Tensor] | None = None, **options: Any) -> Report:
    return get_report(adaround(prepared, data or samples(), method, progress=False, **options))


def kept(block: BlockReport) -> bool:
    """Whether what was learned of a block was taken."""
    if block.start_holdout is None or block.learned_holdout is None:
        return False
    return block.learned_holdout < block.start_holdout


@every_case
def test_the_quantized_stream_is_the_converted_model_bit_for_bit(host, activation_bits):
    learned, run = learned_by(host, activation_bits)
    assert any(kept(block) and not block.note for block in get_report(learned).blocks)
    model = converted(host, activation_bits, learned)
    with torch.no_grad():
        for batch in samples():
            assert torch.equal(streamed(run, batch), model(batch))


class Scalars(nn.Module):
    """Two heads of one number for each sample, without an axis for it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 1), nn.Linear(8, 1)

    def forward(self, x):
        x = torch.relu(self.a(x))
        return self.b(x).squeeze(-1), self.c(x).squeeze(-1)


def test_outputs_of_one_number_for_each_sample_are_learned():
    data = list(torch.randn(64, 6, generator=torch.Generator().manual_seed(0)).split(16))
    net = prepared_by("fx", None, seeded(Scalars), data, 3)
    report = get_report(adaround(net, data, replace(QUICK, weighs_outputs=True), progress=False))
    assert any(block.iterations for block in report.blocks)
    assert report.output_error <= report.nearest_output_error


@pytest.mark.parametrize("inplace", [True, False])
def test_layers_end_behind_their_activation_function_in_place_or_not(inplace):
    net = nn.Sequential(*(part for _ in range(3) for part in (nn.Conv2d(2, 2, 1), nn.Hardswish(inplace=inplace))))
    host = open_host(prepared_by("fx", None, net.eval(), samples(), 3))
    exits = layer_exits(host, host.nodes, activation=True)
    assert [end.float_node.name.rpartition("_")[2] for (end,) in exits.values()] == ["1", "3", "5"]


@every_case
def test_the_output_error_is_that_of_the_converted_model(host, activation_bits, monkeypatch):
    # by the pass itself: a stream that was not run again after a block would be measured as it was before
    uncompared(monkeypatch)
    learned, run = learned_by(host, activation_bits)
    error = held_out_error(run, converted(host, activation_bits, learned), seeded(network(host)), samples())
    assert get_report(learned).output_error == pytest.approx(error, rel=1e-3)


@every_case
def test_the_converted_model_holds_the_integers_that_were_learned(host, activation_bits):
    learned, _ = learned_by(host, activation_bits)
    expected = learned_weights(learned)
    assert all(grid.quant_min <= q.min() <= q.max() <= grid.quant_max for q, grid in expected.values())
    if host == "pt2e":
        found = dict(convert_pt2e(copy.deepcopy(learned), fold_quantize=False).named_parameters())
        for name, (q, grid) in expected.items():
            assert torch.equal(found[f"{name}.weight" if f"{name}.weight" in found else name], grid.dequantize(q))
        return
    held = {
        name.removesuffix(".0"): module.get_quantized_weight().int_repr().long()
        for name, module in converted(host, activation_bits, learned).named_modules()
        if hasattr(module, "get_quantized_weight")
    }
    assert len(held) == 6
    assert all(torch.equal(integers, expected[name][0]) for name, integers in held.items())


@every_case
def test_what_is_taken_of_a_block_is_better_than_its_start_on_held_out_samples(host, activation_bits):
    learned, _ = learned_by(host, activation_bits)
    before = learned_weights(layers_alone(host, activation_bits))
    after, blocks = learned_weights(learned), get_report(learned).blocks
    # the first block starts where layers alone end
    names, taken = blocks[0].layers, kept(blocks[0])
    changed = [
        not (torch.equal(before[name][0], after[name][0]) and torch.equal(before[name][1].scale, after[name][1].scale))
        for name in names
    ]
    assert any(changed) == taken
    assert all(("start kept" in block.note) != kept(block) for block in blocks)


def test_blocks_leave_a_smaller_error_than_layers_alone():
    learned = sum(get_report(learned_by(*case)[0]).output_error for case in CASES)
    alone = sum(get_report(layers_alone(*case)).output_error for case in CASES)
    # measured: 0.6
    assert learned < 0.8 * alone


def test_the_steps_shown_of_a_block_only_rise(monkeypatch):
    shown: list[tuple[str, int]] = []
    monkeypatch.setattr(ReportBuilder, "steps", lambda self, name: lambda step, loss: shown.append((name, step)))
    # so slow that weights take their time to settle
    slow = replace(QUICK, iterations=300, learning_rate=1e-4, blocks=["a|b|short"])
    (made,) = [block.iterations for block in report_of(prepared_net(), slow).blocks if block.iterations]
    # the last 60 steps are for scales and biases alone
    before = made - 60
    assert shown == [("a|b|short", step) for step in (*range(50, before + 1, 50), before + 50)]
    assert before >= 100


def test_blocks_are_found_by_dominance():
    host = open_host(prepared_net())
    blocks = [[node.name for node in block.nodes] for block in find_blocks(host)]
    assert blocks == [["stem.0"], ["a", "b", "short"], ["up", "weight", "head"]]


def test_exits_are_behind_the_activation_function():
    host = open_host(prepared_net())
    exits = {name: str(ends[0].float_node.name) for name, ends in layer_exits(host, host.nodes, True).items()}
    assert exits["a"] == "act"
    assert exits["up"] == "relu_1"
    # two users, and a sum: no activation function of its own
    assert exits["b"] == "b"
    # fused to its ReLU
    assert [ends[0].inner for ends in layer_exits(host, host.nodes, False).values()].count(True) == 1


@every_case
def test_auto_learns_blocks_where_activations_have_few_bits_and_layers_elsewhere(host, activation_bits):
    found = adaround(prepared_net(host, activation_bits), samples(), replace(QUICK, blocks="auto"), progress=False)
    other = QUICK if activation_bits == 4 else QUICK.layers
    expected = adaround(prepared_net(host, activation_bits), samples(), other, progress=False)
    assert [one.layers for one in get_report(found).blocks] == [one.layers for one in get_report(expected).blocks]
    assert bool(get_report(found).blocks) == (activation_bits == 4)
    weights = learned_weights(expected)
    assert weights.keys() == learned_weights(found).keys()
    for name, (integers, _) in learned_weights(found).items():
        assert torch.equal(integers, weights[name][0])


def test_blocks_can_be_named_and_the_rest_is_learned_one_by_one():
    report = report_of(prepared_net(), replace(QUICK, blocks=["a|b|short"]))
    assert [block.layers for block in report.blocks if block.iterations] == [("a", "b", "short")]
    assert {layer.name for layer in report.layers} == {"stem.0", "a", "b", "short", "up", "weight", "head"}


@pytest.mark.parametrize(
    ("blocks", "word"), [(["a"], "ends 'a'"), (["a|b|short", "b"], "share"), (["nothing"], "matches none")]
)
def test_blocks_that_are_none_are_refused_before_any_batch_is_read(blocks, word):
    def unread() -> Iterator[Tensor]:
        raise AssertionError
        yield

    with pytest.raises(InvalidOptionError, match=word) as caught:
        adaround(prepared_net(), unread(), replace(QUICK, blocks=blocks), progress=False)
    assert caught.value.subject == "BlockWise.blocks"


@pytest.mark.parametrize("options", [{"drop": 0.5}, {"weighs_outputs": True}, {"learns_scale": False}])
@fx_8_and_weight_only
def test_every_option_is_better_than_nearest_and_has_an_effect(options, activation_bits):
    plain, changed = quick(activation_bits), quick(activation_bits, **options)
    assert get_report(changed).output_error < 0.5 * nearest_error("fx", activation_bits)
    one, other = (learned_weights(learned) for learned in (plain, changed))
    same = all(
        torch.equal(one[name][0], other[name][0]) and torch.equal(one[name][1].scale, other[name][1].scale)
        for name in one
    )
    # without quantized activations there is no quantization that could be dropped
    assert same == ("drop" in options and activation_bits is None)


def test_the_more_quantization_is_dropped_the_closer_the_float_weights_come_to_the_float_network():
    host = open_host(prepared("fx", 4, count=48))
    arguments = [[batch] for batch in samples()]
    report = ReportBuilder(Progress(shown=False))
    run = Pass(host, arguments, Sampling.of(arguments, 0.0, 1, 0), report=report)

    def error(drop: float) -> float:
        region = Region(run.place(), run.nodes, output_exits(run.streams), Drawing(48, drop))
        batch = region.draw(torch.Generator().manual_seed(0))
        outputs = batch.run([node.weight for node in region.nodes], [None] * len(region.nodes), None)
        return float(squared_error(batch, outputs).detach())

    # measured: 0.17; clamps to the range of the observers stay
    assert error(0.999) < 0.4 * error(0.5)
    assert error(0.5) < 0.9 * error(0.0)


def test_the_same_seed_gives_the_same_and_another_seed_another_network():
    model, method = prepared_net(), replace(QUICK, drop=0.5, weighs_outputs=True)
    found = [
        [parameter.detach() for parameter in adaround(model, samples(), method, seed=seed, progress=False).parameters()]
        for seed in (0, 0, 1)
    ]
    assert all(torch.equal(one, same) for one, same in zip(found[0], found[1], strict=True))
    assert any(not torch.equal(one, other) for one, other in zip(found[0], found[2], strict=True))


class ByBatch(nn.Module):
    """The batch's size is a number that is alive at the entry of the second layer, and used behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        count = x.size(0)
        y = self.second(F.relu(self.first(x)))
        return self.third(y.reshape(count, -1))


class Positions(ByBatch):
    """A tensor is alive there whose leading axis is no axis of samples, though as long as a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.third = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.size(2)).float()
        y = self.second(F.relu(self.first(x))).flatten(1)
        return self.third(y[:, :6] + positions)


@pytest.mark.parametrize(("make", "batch_size", "holdout"), pairwise([ByBatch, Positions], [3, 6], [0.125, 0.0]))
def test_samples_that_cannot_be_told_apart_are_taken_batch_by_batch(make, batch_size, holdout):
    method = replace(QUICK, blocks=["first", "second|third"], batch_size=batch_size)
    method = method.with_layers(replace(method.layers, holdout=holdout))
    first, second = report_of(prepared(make=make, bits=2, count=48, size=6), method, samples(size=6)).blocks
    assert "your batches" not in first.note
    assert "your batches" in second.note
    assert second.iterations
    assert (second.start_holdout is None) == (not holdout)


class Heads(nn.Module):
    """Two towers and two outputs, one of which is integers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(2, 2, 3, padding=1) for _ in range(4))

    def forward(self, x: Tensor) -> Any:
        left = self.b(F.relu(self.a(x)))
        right = self.d(F.relu(self.c(x)))
        return left, right.argmax(1)


class Towers(Heads):
    """The sum of two towers."""

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x))) + self.d(F.relu(self.c(x)))


def test_outputs_that_are_integers_are_not_learned_from():
    report = report_of(prepared(make=Heads, count=48), QUICK)
    assert {layer.name for layer in report.layers} == {"a", "b", "c", "d"}
    first, second = report.blocks
    assert first.layers == ("a", "b")
    assert first.iterations
    # nothing of the second block was learned
    assert (second.name, second.layers, second.iterations) == ("c ... d", (), 0)
    assert second.note


def test_towers_side_by_side_are_blocks_of_their_own():
    report = report_of(prepared(make=Towers, count=48), replace(QUICK, blocks=["a|b|c|d"]))
    assert [set(block.layers) for block in report.blocks] == [{"a", "b", "c", "d"}]
    assert report.blocks[0].iterations


@pytest.mark.parametrize("weighs_outputs", [False, True])
def test_a_weight_with_two_call_sites_is_learned_from_both(weighs_outputs):
    model = prepared(make=Twice, bits=2, count=48)
    report = report_of(model, replace(JOINT, weighs_outputs=weighs_outputs))
    assert [block.layers for block in report.blocks if block.iterations] == [("a",)]
    assert report.output_error < report_of(model, "nearest").output_error


def test_a_program_of_one_batch_size_gets_minibatches_of_that_size():
    report = report_of(prepared_net("pt2e", dynamic=False), QUICK)
    assert all(block.iterations for block in report.blocks)


@fx_8_and_weight_only
def test_up_or_down_holds_for_blocks_too(activation_bits):
    model = prepared_net("fx", activation_bits, bits=3)
    method = JOINT.with_layers(replace(JOINT.layers, levels="up_or_down"))
    learned = adaround(model, samples(), method, progress=False)
    assert any(kept(block) for block in get_report(learned).blocks)
    weights = {node.name: node.weight for node in open_host(model).nodes}
    for name, (integers, grid) in learned_weights(learned).items():
        lower, upper = up_or_down(grid, weights[name])
        assert ((integers == lower) | (integers == upper)).all()


def test_nothing_of_the_users_is_changed_and_no_gradient_left():
    model = prepared_net("fx", 8)
    state, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    report_of(model, replace(QUICK, drop=0.5, weighs_outputs=True))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear))
    assert torch.equal(generator, torch.get_rng_state())
