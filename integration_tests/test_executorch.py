"""Programs with learned rounding, lowered to ExecuTorch's XNNPACK backend and run by its runtime.

What runs is compared with what `convert_pt2e` made. XNNPACK stores a bias as an integer, in steps of the input's scale
times the weight's. So an activation may come out one step away, unless biases were rounded so before.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx, nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

from adaround_plugin import InvalidModelError, InvalidOptionError, adaround
from adaround_plugin.deployment import widen_weight_ranges
from adaround_plugin.graph.compat import operator_name
from adaround_plugin.hosts.pt2e import AdaRoundQuantizer, AdaRoundWeightOnlyQuantizer
from integration_tests.benchmarks.executorch_backends import lowered, run_program, steps_apart
from integration_tests.benchmarks.vendor_quantizers import VENDORS, Linears, calibrated, integers, learn, samples
from integration_tests.models import QUICK

DATA = samples(count=2)


class Convolutions(nn.Sequential):
    """Convolutions alone, without biases."""

    def __init__(self) -> None:
        first, depthwise = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.Conv2d(16, 16, 3, groups=16, bias=False)
        super().__init__(first, nn.ReLU(), depthwise, nn.ReLU(), nn.Conv2d(16, 8, 1, bias=False))


@functools.cache
def converted(bits: int | None, build: Any = None, dynamic: bool = False) -> fx.GraphModule:
    """A learned network for XNNPACK; not to be changed."""
    vendor: Any = VENDORS["XNNPACK"]
    quantizer = vendor(is_dynamic=True) if dynamic else vendor()
    more = {} if build is None else {"build": build}
    found = learn("XNNPACK", AdaRoundQuantizer(quantizer, bits), DATA, QUICK, **more)
    assert found.exact
    return found.converted


def ranges(model: fx.GraphModule) -> list[tuple[int, int]]:
    """What the weights declare, in the order of the layers."""
    nodes = [node for node in model.graph.nodes if operator_name(node)[0] == "dequantize_per_channel"]
    return [tuple(node.args[4:6]) for node in nodes]


# --- what runs


def test_eight_bit_convolutions_run_as_converted_to_the_last_bit():
    method = replace(QUICK, correct_bias=False)
    model = learn("XNNPACK", VENDORS["XNNPACK"](), DATA, method, Convolutions).converted
    assert torch.equal(run_program(lowered(model, DATA[0]), DATA[0]), model(DATA[0]))


@pytest.mark.parametrize(("bits", "linear_bits"), [(8, 8), (4, 4), (2, 8)])
def test_programs_with_integer_biases_run_as_converted(bits, linear_bits):
    prepared = calibrated("XNNPACK", AdaRoundQuantizer(VENDORS["XNNPACK"](), bits), DATA)
    model = convert_pt2e(adaround(prepared, DATA, QUICK, integer_biases=True, progress=False))
    apart = steps_apart(model, lowered(widen_weight_ranges(model, linear_bits), DATA[0]), DATA[0])
    # none is apart in a process of its own; what ran before in one moves the last bits of what is learned
    assert apart.max() < 1.01
    assert (apart < 0.01).float().mean() > 0.98


@pytest.mark.parametrize(("bits", "linear_bits"), [(8, 8), (4, 4), (2, 4)])
def test_programs_run_within_a_step(bits, linear_bits):
    model = converted(bits)
    apart = steps_apart(model, lowered(widen_weight_ranges(model, linear_bits), DATA[0]), DATA[0])
    assert apart.max() < 1.01
    assert (apart < 0.01).float().mean() > 0.5


def test_linear_layers_are_stored_in_four_bits():
    model = converted(3, Linears)
    wide, narrow = (lowered(widen_weight_ranges(model, bits), DATA[0]) for bits in (8, 4))
    weights = sum(one.numel() for one in integers(model))
    assert len(wide) - len(narrow) == pytest.approx(weights / 2, rel=0.02)
    assert steps_apart(model, narrow, DATA[0]).max() < 1.01


def test_dynamic_activations_run():
    model = converted(4, Linears, dynamic=True)
    output = run_program(lowered(widen_weight_ranges(model, 4), DATA[0]), DATA[0])
    expected = model(DATA[0])
    assert (output - expected).abs().max() < 0.02 * (expected.max() - expected.min())


def test_four_bit_convolutions_do_not_lower_as_converted():
    """Why `widen_weight_ranges` exists: if this lowers one day, it is needed less."""
    with pytest.raises(AssertionError, match="convert_to_qc4w: expecting input tensor to be 2d, got 4"):
        lowered(converted(4), DATA[0])


# --- ranges


@pytest.mark.parametrize(
    ("bits", "linear_bits", "convolutions", "linear"),
    [
        (8, 8, (-127, 127), (-127, 127)),
        (8, 4, (-127, 127), (-127, 127)),
        (4, 8, (-127, 127), (-127, 127)),
        (6, 4, (-127, 127), (-127, 127)),
        (4, 4, (-127, 127), (-8, 7)),
        (2, 4, (-127, 127), (-8, 7)),
    ],
)
def test_ranges_become_those_of_stored_types_and_nothing_else_changes(bits, linear_bits, convolutions, linear):
    model = converted(bits)
    before = ranges(model)
    widened = widen_weight_ranges(model, linear_bits)
    assert ranges(widened) == [convolutions] * 3 + [linear]
    assert ranges(model) == before
    state, same = dict(model.named_buffers()), dict(widened.named_buffers())
    assert state.keys() == same.keys()
    assert all(torch.equal(value, same[name]) for name, value in state.items())
    assert torch.equal(widened(DATA[0]), model(DATA[0]))


def test_scales_per_tensor_and_in_groups_are_widened_too():
    for options, kind, position in (
        ({"per_channel": False}, "dequantize_per_tensor", 3),
        ({"group_size": 16}, "dequantize_affine", 5),
    ):
        prepared = calibrated("XNNPACK", AdaRoundWeightOnlyQuantizer(weight_bits=3, symmetric=True, **options), DATA)
        model = convert_pt2e(adaround(prepared, DATA, "nearest", progress=False))
        widened = widen_weight_ranges(model, 4)
        found = [node for node in widened.graph.nodes if operator_name(node)[0] == kind]
        assert found[-1].args[position : position + 2] == (-8, 7)
        assert torch.equal(widened(DATA[0]), model(DATA[0]))


def test_activations_keep_their_ranges():
    prepared = calibrated("XNNPACK", AdaRoundQuantizer(VENDORS["Qualcomm 16a4w"]()), DATA)
    model = convert_pt2e(prepared)

    def activations(program: fx.GraphModule) -> list[Any]:
        return [node.args[1:] for node in program.graph.nodes if operator_name(node)[0] == "dequantize_per_tensor"]

    assert activations(model)
    assert activations(widen_weight_ranges(model)) == activations(model)


@pytest.mark.parametrize("value", [2, 16, 4.0, None, True])
def test_other_bits_are_refused(value):
    with pytest.raises(InvalidOptionError, match="linear_bits"):
        widen_weight_ranges(converted(8), value)


def _prepared() -> fx.GraphModule:
    return calibrated("XNNPACK", AdaRoundQuantizer(VENDORS["XNNPACK"]()), DATA)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: nn.Linear(2, 2), "converted: is Linear.*convert_pt2e"),
        (_prepared, "converted: has no quantized weight.*convert_pt2e"),
        (lambda: convert_pt2e(_prepared(), fold_quantize=False), "node 'dequantize_per_channel.*fold_quantize=True"),
    ],
    ids=["module", "prepared", "unfolded"],
)
def test_programs_that_are_not_converted_are_refused(make, match):
    with pytest.raises(InvalidModelError, match=match):
        widen_weight_ranges(make())
