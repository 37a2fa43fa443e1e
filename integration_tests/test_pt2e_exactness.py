"""After `adaround`, `convert_pt2e` reproduces the learned integers exactly, for whatever a quantizer annotates."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e
from torchao.quantization.pt2e.quantizer import QuantizationSpec, Quantizer
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

from adaround_plugin import get_report
from adaround_plugin.hosts.pt2e import AdaRoundObserver
from adaround_plugin.solvers import Relaxation
from integration_tests.models import Functional, Quantized, assert_same, batches, call, learn
from integration_tests.pairs import pairwise
from integration_tests.pt2e_models import (
    EveryOperator,
    all_converted,
    all_learned,
    calibrated,
    convert,
    copied,
    exported,
    value_of,
    weighted_calls,
    x86,
    xnnpack,
)

SPATIAL = {1: (7,), 2: (6, 6), 3: (3, 4, 4)}
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
SIZES = (6, 6)

Case = tuple[Callable[[], nn.Module], tuple[int, ...]]


def _norm(dims: int, channels: int) -> nn.Module:
    norm = NORM[dims](channels)
    norm.running_mean = torch.randn(channels) * 0.2
    norm.running_var = torch.rand(channels) + 0.5
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias)
    return norm


def _cases() -> dict[str, Case]:
    cases: dict[str, Case] = {}

    def add(name: str, shape: tuple[int, ...], *make: Callable[[], nn.Module]) -> None:
        cases[name] = (lambda: nn.Sequential(*(part() for part in make)), shape)

    def add_function(name: str, shape: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        cases[name] = (lambda: Functional(*arguments, **options), shape)

    for d, space in SPATIAL.items():
        conv, transposed, shape = CONV[d], TRANSPOSED[d], (4, *space)
        add(f"conv{d}d", shape, lambda conv=conv: conv(4, 3, 3, padding=1))
        add(f"conv{d}d-bn", shape, lambda conv=conv: conv(4, 3, 3), lambda d=d: _norm(d, 3))
        add(f"conv{d}d-grouped-strided", shape, lambda conv=conv: conv(4, 6, 3, stride=2, padding=1, groups=2))
        add(f"conv{d}d-same", shape, lambda conv=conv: conv(4, 3, 2, padding="same"))
        add(f"transposed{d}d", shape, lambda t=transposed: t(4, 6, 3, stride=2, padding=1))
        add(
            f"transposed{d}d-grouped",
            shape,
            lambda t=transposed: t(4, 6, 3, stride=2, output_padding=1, groups=2, dilation=2),
        )
        one, two, f = (1,) * d, (2,) * d, getattr(F, f"conv{d}d")
        add_function(f"F.conv{d}d", shape, f, (6, 2, *two), two, one, two, 2, bias=6)
    shape = (4, 6, 6)
    add("conv2d-nobias-relu", shape, lambda: nn.Conv2d(4, 3, 2, bias=False), nn.ReLU)
    add("conv2d-nobias-bn-relu", shape, lambda: nn.Conv2d(4, 3, 2, bias=False), lambda: _norm(2, 3), nn.ReLU)
    add("conv2d-depthwise", shape, lambda: nn.Conv2d(4, 8, 2, groups=4))
    add("conv2d-dilated", shape, lambda: nn.Conv2d(4, 3, 2, dilation=2, padding=1))
    add("transposed2d-nobias-relu", shape, lambda: nn.ConvTranspose2d(4, 4, 2, bias=False), nn.ReLU)
    for mode in ("reflect", "replicate", "circular"):
        add(f"conv2d-{mode}", (4, 6, 6), lambda mode=mode: nn.Conv2d(4, 3, 3, padding=1, padding_mode=mode))
    add("transposed2d-bn", (4, 6, 6), lambda: nn.ConvTranspose2d(4, 6, 2), lambda: _norm(2, 6))
    add("linear", (5,), lambda: nn.Linear(5, 4))
    add("linear-nobias", (5,), lambda: nn.Linear(5, 4, bias=False))
    add("linear-relu", (5,), lambda: nn.Linear(5, 4), nn.ReLU)
    add("linear-bn", (5,), lambda: nn.Linear(5, 4), lambda: _norm(1, 4))
    add("linear-3d", (3, 5), lambda: nn.Linear(5, 4))
    add("linear-3d-nobias", (3, 5), lambda: nn.Linear(5, 4, bias=False))
    add_function("F.linear", (5,), F.linear, (4, 5), bias=4)
    add_function("F.linear-nobias", (3, 5), F.linear, (4, 5), bias=None)
    add_function("F.conv2d-plain", (4, 6, 6), F.conv2d, (3, 4, 3, 3), bias=None)
    add_function("F.conv_transpose2d", (4, 6, 6), F.conv_transpose2d, (4, 2, 2, 2), 2, 1, 1, 2, 1, bias=4)
    return cases


CASES = _cases()


@functools.cache
def _program(name: str, strict: bool) -> fx.GraphModule:
    make, shape = CASES[name]
    torch.manual_seed(0)
    return exported(make(), batches(*shape, sizes=SIZES)[0], strict=strict)


def _prepared(name: str, quantizer: Quantizer) -> tuple[fx.GraphModule, list[Any]]:
    data = batches(*CASES[name][1], sizes=SIZES)
    strict = name.startswith("F.") and not isinstance(quantizer, EveryOperator)
    return calibrated(_program(name, strict), data, quantizer), data


def assert_exact(
    result: fx.GraphModule, data: list[Any], *, bits: int | None = 4
) -> tuple[dict[str, Quantized], fx.GraphModule]:
    """Both conversions hold what was learned, for every weighted operator of the graph.

    Returns what was learned, and the conversion of `result` itself, which it consumes.
    """
    expected = all_learned(result)
    # nothing stayed float
    assert list(expected) == [node.name for node in weighted_calls(result)]
    report = get_report(result)
    assert report.skipped == []
    assert bits is None or {layer.bits for layer in report.layers} == {bits}
    unfolded, folded = convert(result, fold_quantize=False), convert_pt2e(result)
    for model in (unfolded, folded):
        found = all_converted(model)
        assert found.keys() == expected.keys()
        for name, one in found.items():
            assert_same(one, expected[name])
    outputs = [call(model, data[0]) for model in (unfolded, folded)]
    assert torch.equal(*outputs)
    assert torch.isfinite(outputs[0]).all()
    return expected, folded


def only(found: dict[str, Quantized]) -> Quantized:
    """The weight of a graph that has one."""
    (one,) = found.values()
    return one


# --- every operator, by a quantizer that annotates them all

# pairs of settings on the main operators, one grid in turn on each of the others
_MAIN = ("conv2d-bn", "linear-3d", "transposed2d", "F.conv2d")
_GRID = ((2, 4, 8), (True, False), (True, False), ("static", None, "dynamic"))


def _settings() -> list[tuple[str, int, bool, bool, str | None]]:
    every = list(itertools.product(*_GRID))
    others = [name for name in CASES if name not in _MAIN]
    return [*pairwise(_MAIN, *_GRID), *((name, *every[(7 * i) % len(every)]) for i, name in enumerate(others))]


@pytest.mark.parametrize(("name", "bits", "per_channel", "symmetric", "activation"), _settings())
def test_converted_integers_are_the_learned_ones(name, bits, per_channel, symmetric, activation):
    prepared, data = _prepared(name, EveryOperator(bits, per_channel, symmetric, activation))
    result = learn(prepared, data, solver="gptq")
    expected, model = assert_exact(result, data, bits=bits)
    found = only(expected)
    if symmetric:
        assert not found.zero_point.any()
    assert found.axis == (None if not per_channel else 1 if "transpose" in name else 0)
    assert found.scale.numel() == (1 if found.axis is None else found.integers.shape[found.axis])
    if "bn" in name:  # folded, or the test would not be about folding
        assert not [node for node in model.graph.nodes if "batch_norm" in str(node.target)] or "linear" in name


# --- torchao's own quantizers


# how many bits and whether by channel, to torchao's quantizer
QUANTIZERS: dict[str, Callable[[int, bool], Quantizer]] = {
    "x86": lambda bits, by_channel: x86(weight_bits=bits, per_channel=by_channel),
    "x86-w": lambda bits, by_channel: x86(weight_bits=bits, activation_bits=None, per_channel=by_channel),
    "x86-dynamic": lambda bits, by_channel: x86(weight_bits=bits, per_channel=by_channel, is_dynamic=True),
    "xnnpack": xnnpack,
    "xnnpack-dynamic": functools.partial(xnnpack, is_dynamic=True),
}
_DYNAMIC = ("linear", "linear-nobias", "linear-3d", "F.linear", "linear-relu")
_X86 = ("conv2d", "conv2d-nobias-bn-relu", "conv2d-grouped-strided", "F.conv2d", "linear-3d-nobias")
# what each of them annotates
SUPPORTED = {
    "x86": _X86,
    "x86-w": _X86,
    "x86-dynamic": _DYNAMIC,
    "xnnpack": (
        *("conv1d", "conv2d-bn", "conv2d-nobias-relu", "conv2d-depthwise", "F.conv2d", "linear", "F.linear-nobias"),
    ),
    "xnnpack-dynamic": _DYNAMIC,
}
_NAMES = list(dict.fromkeys(name for names in SUPPORTED.values() for name in names))


def _torchaos() -> list[tuple[str, str, int, bool]]:
    """Every operator with every quantizer that annotates it, by channel or by tensor, and bits in turn."""
    quantizers = list(QUANTIZERS)
    chosen = pairwise(quantizers, _NAMES, (True, False), allowed=lambda one, name, _: name in SUPPORTED[one])
    return [(one, name, (2, 3, 4, 8)[i % 4], by_channel) for i, (one, name, by_channel) in enumerate(chosen)]


@pytest.mark.parametrize(("quantizer", "name", "bits", "by_channel"), _torchaos())
def test_torchaos_quantizers(quantizer, name, bits, by_channel):
    prepared, data = _prepared(name, QUANTIZERS[quantizer](bits, by_channel))
    result = learn(prepared, data, solver="gptq")
    expected, model = assert_exact(result, data, bits=bits)
    assert (only(expected).axis is None) == (not by_channel)
    # activations are as asked for, or the test would be about weights only
    activation = weighted_calls(model)[0].args[0]
    assert (activation.op == "placeholder") == (quantizer == "x86-w")
    if quantizer != "x86-w":
        overload = "tensor" if "dynamic" in quantizer else "default"
        assert str(activation.target) == f"quantized_decomposed.dequantize_per_tensor.{overload}"


@pytest.mark.parametrize(
    ("name", "is_dynamic"),
    [("conv2d-bn", False), ("F.linear-nobias", False), ("linear-3d", True), ("linear-relu", True)],
)
def test_stock_observers_keep_their_scale(name, is_dynamic):
    config = get_default_x86_inductor_quantization_config(is_dynamic=is_dynamic)
    prepared, data = _prepared(name, X86InductorQuantizer().set_global(config))
    stock = only(all_converted(convert(prepared)))
    kept, searched = (learn(prepared, data, search_scale=search, holdout=0.0) for search in ("auto", True))
    found = only(assert_exact(kept, data, bits=8)[0])
    assert torch.equal(found.scale, stock.scale)
    assert torch.equal(found.zero_point, stock.zero_point)
    assert not torch.equal(found.integers, stock.integers)
    assert not torch.equal(only(assert_exact(searched, data, bits=8)[0]).scale, stock.scale)


# --- options, ranges, magnitudes


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.up, self.b = nn.Conv2d(4, 6, 3), nn.ConvTranspose2d(6, 4, 2), nn.Linear(100, 3)

    def forward(self, x):
        return self.b(self.up(torch.relu(self.a(x))).flatten(1))


@functools.cache
def _mixed() -> fx.GraphModule:
    torch.manual_seed(0)
    return exported(Mixed(), batches(4, 6, 6, sizes=SIZES)[0])


_SOLVERS = ("annealing", "coordinate_descent", "gptq", "nearest", Relaxation(iterations=20))


@pytest.mark.parametrize(("solver", "levels", "search_scale"), pairwise(_SOLVERS, ("all", "up_or_down"), (True, False)))
def test_every_solver_and_option_stays_exact_and_in_range(solver, levels, search_scale):
    data = batches(4, 6, 6, sizes=SIZES)
    prepared = calibrated(_mixed(), data, EveryOperator(3))
    result = learn(prepared, data, solver=solver, levels=levels, search_scale=search_scale)
    assert len(assert_exact(result, data, bits=3)[0]) == 3


@pytest.mark.parametrize("low_high", [(-7, 7), (-1, 1), (-3, 1), (-127, 127)])
def test_own_integer_ranges_are_kept(low_high):
    low, high = low_high
    spec = QuantizationSpec(
        dtype=torch.int8,
        quant_min=low,
        quant_max=high,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
        observer_or_fake_quant_ctr=AdaRoundObserver.with_args(),
    )
    prepared, data = _prepared("conv2d", EveryOperator(weight=spec))
    found = only(assert_exact(learn(prepared, data), data, bits=None)[0])
    assert low <= int(found.integers.min())
    assert int(found.integers.max()) <= high


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("magnitude", [1e-20, 1e-6, 1e6, 1e18])
def test_tiny_and_huge_weights_stay_exact(magnitude, per_channel):
    model = nn.Sequential(nn.Linear(6, 5))
    with torch.no_grad():
        model[0].weight.mul_(magnitude)
        model[0].bias.mul_(magnitude)
    data = batches(6, sizes=SIZES)
    program = exported(model, data[0])
    result = learn(calibrated(program, data, EveryOperator(activation=None, per_channel=per_channel)), data)
    assert get_report(result).layers[0].learned_error < 0.1
    assert_exact(result, data)


@pytest.mark.parametrize("name", ["conv2d", "linear", "transposed2d"])
def test_a_derived_bias_follows_the_learned_scale(name):
    """An int32 bias whose scale is that of the input by that of the weight, as accelerators want it."""
    prepared, data = _prepared(name, EveryOperator(derived_bias=True))
    before = only(all_converted(convert(prepared)))
    result = learn(prepared, data, holdout=0.0)
    (layer,) = get_report(result).layers
    assert layer.learned
    found = only(all_learned(result))
    assert not torch.equal(found.scale, before.scale)
    (original,) = (value for key, value in prepared.state_dict().items() if key.endswith("bias"))
    assert (layer.bias == "kept") == torch.equal(found.bias, original)
    for model in (convert(result, fold_quantize=False), convert(result)):
        one = only(all_converted(model))
        assert_same(replace(one, bias=None), replace(found, bias=None))
        (node,) = weighted_calls(model)
        assert "dequantize_per_channel" in str(node.args[2].target)
        scale = value_of(model, node.args[2].args[1])
        torch.testing.assert_close(scale, found.scale * node.args[0].args[1], rtol=1e-6, atol=0)
        # the integers stand for the bias that was learned, within half a step
        integers = value_of(model, node.args[2].args[0])
        assert integers.dtype == torch.int32
        assert ((integers * scale - found.bias).abs() <= 0.5001 * scale).all()


def test_converting_keeps_integers_through_copies():
    data = batches(4, 6, 6, sizes=SIZES)
    result = learn(calibrated(_mixed(), data, EveryOperator()), data)
    expected = all_learned(result)
    for variant in (copied(result), copied(copied(result)), copied(result).to("cpu")):
        found = all_converted(convert(variant))
        for name, one in expected.items():
            assert_same(found[name], one)


def test_a_result_still_runs_as_a_float_model_on_the_learned_weights():
    data = batches(4, 6, 6, sizes=SIZES)
    result = learn(calibrated(_mixed(), data, EveryOperator(activation=None)), data)
    assert torch.equal(result(data[0]), convert(result)(data[0]))


def test_writing_back_unchanged_leaves_the_converted_model_unchanged():
    """A model that is already on the grid and is rounded to nearest converts to the same model again."""
    data = batches(4, 6, 6, sizes=SIZES)
    once = learn(calibrated(_mixed(), data, EveryOperator()), data)
    twice = learn(once, data, solver="nearest", correct_bias=False, propagate_error=False)
    before, after = all_learned(once), all_learned(twice)
    assert before.keys() == after.keys()
    for name, one in before.items():
        assert_same(after[name], one)
    assert torch.equal(convert(once)(data[0]), convert(twice)(data[0]))
