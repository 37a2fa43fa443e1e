"""After `adaround`, the host's convert reproduces the learned integers exactly, wherever the host itself converts."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.ao.quantization import QConfig, QConfigMapping, get_default_qconfig
from torch.ao.quantization.quantize_fx import convert_fx, convert_to_reference_fx

from adaround_plugin import AdaRoundObserver, get_adaround_qconfig_mapping, get_report, get_weight_only_backend_config
from adaround_plugin.solvers import Relaxation
from integration_tests.models import (
    Functional,
    assert_same,
    batches,
    converted,
    converted_function,
    learn,
    learned,
    prepared_model,
    reference_function,
)
from integration_tests.pairs import pairwise

ENGINES = ("x86", "fbgemm", "onednn", "qnnpack")
SPATIAL = {1: (7,), 2: (6, 6), 3: (3, 4, 4)}
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}

Case = tuple[Callable[[], nn.Module], tuple[int, ...]]


def _norm(dims: int, channels: int) -> nn.Module:
    norm = NORM[dims](channels)
    norm.running_mean = torch.randn(channels) * 0.2
    norm.running_var = torch.rand(channels) + 0.5
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias)
    return norm


def _module_cases() -> dict[str, Case]:
    cases: dict[str, Case] = {}

    def add(name: str, shape: tuple[int, ...], *make: Callable[[], nn.Module]) -> None:
        cases[name] = (lambda: nn.Sequential(*(part() for part in make)), shape)

    for d, space in SPATIAL.items():
        conv, transposed, shape = CONV[d], TRANSPOSED[d], (4, *space)
        add(f"conv{d}d", shape, lambda conv=conv: conv(4, 3, 3, padding=1))
        add(f"conv{d}d-nobias", shape, lambda conv=conv: conv(4, 3, 2, bias=False))
        add(f"conv{d}d-relu", shape, lambda conv=conv: conv(4, 3, 3), nn.ReLU)
        add(f"conv{d}d-bn", shape, lambda conv=conv: conv(4, 3, 3), lambda d=d: _norm(d, 3))
        add(f"conv{d}d-nobias-bn-relu", shape, lambda c=conv: c(4, 3, 2, bias=False), lambda d=d: _norm(d, 3), nn.ReLU)
        add(f"conv{d}d-depthwise", shape, lambda conv=conv: conv(4, 4, 3, groups=4))
        add(f"conv{d}d-multiplier", shape, lambda conv=conv: conv(4, 8, 2, groups=4))
        add(f"conv{d}d-grouped-strided", shape, lambda conv=conv: conv(4, 6, 3, stride=2, padding=1, groups=2))
        add(f"conv{d}d-dilated", shape, lambda conv=conv: conv(4, 3, 2, dilation=2, padding=1))
        for mode in ("reflect", "replicate", "circular"):
            add(f"conv{d}d-{mode}", shape, lambda c=conv, mode=mode: c(4, 3, 3, padding=1, padding_mode=mode))
        add(f"conv{d}d-same", shape, lambda conv=conv: conv(4, 3, 2, padding="same"))
        add(f"transposed{d}d", shape, lambda t=transposed: t(4, 4, 3, stride=2, padding=1))
        add(f"transposed{d}d-wider", shape, lambda t=transposed: t(4, 6, 2, bias=False))
        add(f"transposed{d}d-bn", shape, lambda t=transposed: t(4, 4, 2), lambda d=d: _norm(d, 4))
        add(f"transposed{d}d-relu", shape, lambda t=transposed: t(4, 4, 2), nn.ReLU)
        add(
            f"transposed{d}d-grouped",
            shape,
            lambda t=transposed: t(4, 6, 3, stride=2, output_padding=1, groups=2, dilation=2),
        )
    add("linear", (5,), lambda: nn.Linear(5, 4))
    add("linear-nobias", (5,), lambda: nn.Linear(5, 4, bias=False))
    add("linear-relu", (5,), lambda: nn.Linear(5, 4), nn.ReLU)
    add("linear-bn", (5,), lambda: nn.Linear(5, 4), lambda: _norm(1, 4))
    add("linear-3d", (3, 5), lambda: nn.Linear(5, 4))
    return cases


def _function_cases() -> dict[str, Case]:
    cases: dict[str, Case] = {}

    def add(name: str, shape: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        cases[name] = (lambda: Functional(*arguments, **options), shape)

    for d, space in SPATIAL.items():
        conv, transposed, shape = getattr(F, f"conv{d}d"), getattr(F, f"conv_transpose{d}d"), (4, *space)
        zero, one, two = (0,) * d, (1,) * d, (2,) * d
        add(f"F.conv{d}d", shape, conv, (3, 4, *(3,) * d), one, one, one, 1, bias=3)
        add(f"F.conv{d}d-nobias", shape, conv, (3, 4, *two), one, zero, one, 1, bias=None)
        add(f"F.conv{d}d-relu", shape, conv, (3, 4, *two), one, zero, one, 1, bias=3, relu=True)
        add(f"F.conv{d}d-grouped", shape, conv, (6, 2, *two), two, one, two, 2, bias=6)
        add(f"F.conv_transpose{d}d", shape, transposed, (4, 4, *two), two, one, zero, 1, one, bias=4)
        add(f"F.conv_transpose{d}d-grouped", shape, transposed, (4, 2, *two), two, one, one, 2, one, bias=4)
    add("F.linear", (5,), F.linear, (4, 5), bias=4)
    add("F.linear-nobias", (5,), F.linear, (4, 5), bias=None)
    add("F.linear-relu", (5,), F.linear, (4, 5), bias=4, relu=True)
    add("F.linear-3d", (3, 5), F.linear, (4, 5), bias=4)
    return cases


MODULES, FUNCTIONS = _module_cases(), _function_cases()
CASES = MODULES | FUNCTIONS


# --- every two settings of these meet

_DIMENSIONS, _BITS, _BOTH = (1, 2, 3), (2, 4, 8), (True, False)
# per channel or not, symmetric or not
_SCHEMES = list(itertools.product(_BOTH, _BOTH))


def _kinds(names: Iterable[str]) -> list[str]:
    """The cases with their number of dimensions left open; linear layers have none."""
    return list(dict.fromkeys(re.sub(r"(?<=[a-z])[123]d", "{}d", name) for name in names))


def _is_case(kind: str, dimensions: int) -> bool:
    return "{}" in kind or dimensions == 1


def _settings() -> list[tuple[str, str, bool, bool, int]]:
    def allowed(kind: str, dimensions: int, engine: str, scheme: tuple[bool, bool], bits: int) -> bool:
        # onednn's kernels take zero point 0 only, and the mapping says so
        return _is_case(kind, dimensions) and (engine != "onednn" or scheme[1])

    found = pairwise(_kinds(CASES), _DIMENSIONS, ENGINES, _SCHEMES, _BITS, allowed=allowed)
    return [(kind.format(dimensions), engine, *scheme, bits) for kind, dimensions, engine, scheme, bits in found]


def _weight_only_settings() -> list[tuple[str, bool, bool, int]]:
    found = pairwise(
        _kinds(MODULES), _DIMENSIONS, _SCHEMES, _BITS, allowed=lambda kind, dimensions, *_: _is_case(kind, dimensions)
    )
    return [(kind.format(dimensions), *scheme, bits) for kind, dimensions, scheme, bits in found]


# --- what stock torch (2.13) cannot do, without any plugin: (pattern of the case, engines, reason)
_LIMITS = (
    (r"conv.d-(replicate|circular)", ENGINES, "quantized convolutions take zeros and reflect padding"),
    (r"conv3d-reflect", ENGINES, "quantized Conv3d takes zeros padding only"),
    (r"conv.d-same", ENGINES, "quantized convolutions take no padding='same'"),
    (r"(transposed.d|F.conv_transpose.d)-grouped", ("onednn",), "onednn takes no output_padding"),
    (r".*3d.*", ("qnnpack",), "qnnpack converts 3-d convolutions but their packed weight cannot be read back"),
)


def _stock_limit(name: str, engine: str) -> str | None:
    for pattern, engines, reason in _LIMITS:
        if engine in engines and re.fullmatch(pattern, name) and not name.startswith(("linear", "F.linear")):
            return reason
    return None


def _check(name: str, result: Any, converted_model: Any, layer: str) -> None:
    """What a reference or native conversion holds is what was learned."""
    expected = learned(result, layer)
    if name not in FUNCTIONS:
        found = converted(converted_model, layer)
    else:
        (found,) = reference_function(converted_model) or converted_function(converted_model)
    if found.integers.shape != expected.integers.shape:  # 1-d weights are packed as 2-d ones
        found = replace(found, integers=found.integers.reshape(expected.integers.shape))
    if expected.bias is None and found.bias is not None and not found.bias.any():  # qnnpack packs None as zeros
        found = replace(found, bias=None)
    assert_same(found, expected)


@pytest.mark.parametrize(("name", "backend", "per_channel", "symmetric", "bits"), _settings())
def test_converted_integers_are_the_learned_ones(name, backend, per_channel, symmetric, bits, engine):
    engine(backend)
    make, shape = CASES[name]
    data = batches(*shape)
    grid = {"weight_bits": bits, "per_channel": per_channel, "symmetric": symmetric}
    # weights are what this is about: the histograms of activations take time
    prepared = prepared_model(make(), data, backend, histogram=name == "linear", **grid)
    result = learn(prepared, data, solver="gptq")
    report = get_report(result)
    assert [layer.bits for layer in report.layers] == [bits]
    assert report.skipped == []
    layer = report.layers[0].name
    reference = convert_to_reference_fx(copy.deepcopy(result))
    _check(name, result, reference, layer)
    if _stock_limit(name, backend) is None:
        _check(name, result, convert_fx(copy.deepcopy(result)), layer)
    expected = learned(result, layer)
    if symmetric:
        assert not expected.zero_point.any()
    assert (expected.axis is None) == (not per_channel or "transpose" in name)
    assert torch.isfinite(reference(data[0])).all()


@pytest.mark.parametrize(
    ("kind", "dimensions", "bits", "symmetric"),
    [
        (kind, dimensions, *grid)
        for kind, dimensions, grid in pairwise(
            [kind for kind in _kinds(CASES) if "transpose" in kind], _DIMENSIONS, [(4, True), (2, False)]
        )
    ],
)
def test_per_channel_transposed_convolutions_in_the_reference_conversion(kind, dimensions, bits, symmetric):
    name = kind.format(dimensions)
    make, shape = CASES[name]
    data = batches(*shape)
    scheme = torch.per_channel_symmetric if symmetric else torch.per_channel_affine
    weight = AdaRoundObserver.with_args(bits=bits, qscheme=scheme, ch_axis=1)
    mapping = QConfigMapping().set_global(QConfig(get_default_qconfig("x86").activation, weight))
    result = learn(prepared_model(make(), data, mapping=mapping), data, solver="gptq")
    layer = get_report(result).layers[0].name
    assert learned(result, layer).axis == 1
    _check(name, result, convert_to_reference_fx(copy.deepcopy(result)), layer)


# qnnpack's packed weights of 3-d convolutions cannot be read back
@pytest.mark.parametrize("name", ["F.conv_transpose1d", "F.conv_transpose2d"])
def test_per_channel_functional_transposed_convolutions_in_qnnpack(name, engine):
    engine("qnnpack")
    make, shape = FUNCTIONS[name]
    data = batches(*shape)
    weight = AdaRoundObserver.with_args(bits=4, qscheme=torch.per_channel_symmetric, ch_axis=1)
    mapping = QConfigMapping().set_global(QConfig(get_default_qconfig("qnnpack").activation, weight))
    result = learn(prepared_model(make(), data, mapping=mapping), data, solver="gptq")
    for convert in (convert_to_reference_fx, convert_fx):
        _check(name, result, convert(copy.deepcopy(result)), get_report(result).layers[0].name)


@pytest.mark.parametrize(("name", "per_channel", "symmetric", "bits"), _weight_only_settings())
def test_weight_only_integers_are_the_learned_ones(name, per_channel, symmetric, bits):
    make, shape = MODULES[name]
    data = batches(*shape)
    prepared = prepared_model(
        make(), data, weight_bits=bits, activation_bits=None, per_channel=per_channel, symmetric=symmetric
    )
    result = learn(prepared, data, solver="gptq")
    layer = get_report(result).layers[0].name
    expected = learned(result, layer)
    assert (expected.axis is None) == (not per_channel)
    assert expected.axis in (None, 1 if "transpose" in name else 0)
    reference = convert_to_reference_fx(copy.deepcopy(result), backend_config=get_weight_only_backend_config())
    _check(name, result, reference, layer)
    # activations stay float: the output is the float operator's on the learned weight
    assert not [node for node in reference.graph.nodes if "quantize" in str(node.target)]


@pytest.mark.parametrize("name", ["F.conv2d", "F.linear", "F.conv_transpose2d", "F.conv1d-relu"])
def test_weight_only_functional_operators(name):
    make, shape = FUNCTIONS[name]
    data = batches(*shape)
    result = learn(prepared_model(make(), data, activation_bits=None), data, solver="gptq")
    reference = convert_to_reference_fx(copy.deepcopy(result), backend_config=get_weight_only_backend_config())
    _check(name, result, reference, get_report(result).layers[0].name)


@pytest.mark.parametrize(
    ("solver", "levels", "search_scale"),
    pairwise(
        ["annealing", "coordinate_descent", "gptq", "nearest", Relaxation(iterations=200)], ["all", "up_or_down"], _BOTH
    ),
)
def test_every_solver_and_option_stays_exact_and_in_range(solver, levels, search_scale, engine):
    engine("x86")
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 4, 2), nn.Flatten(), nn.Linear(100, 3))
    data = batches(4, 6, 6)
    prepared = prepared_model(model, data, weight_bits=3)
    result = learn(prepared, data, solver=solver, levels=levels, search_scale=search_scale)
    reference, native = (convert(copy.deepcopy(result)) for convert in (convert_to_reference_fx, convert_fx))
    names = [layer.name for layer in get_report(result).layers]
    assert names == ["0", "2", "4"]
    for name in names:
        assert_same(converted(reference, name), learned(result, name))
        assert_same(converted(native, name), learned(result, name))


@pytest.mark.parametrize("low_high", [(-7, 7), (-1, 1), (-3, 1), (-127, 127)])
def test_own_integer_ranges_are_kept(low_high, engine):
    engine("x86")
    low, high = low_high
    weight = AdaRoundObserver.with_args(quant_min=low, quant_max=high)
    mapping = QConfigMapping().set_global(QConfig(get_default_qconfig("x86").activation, weight))
    data = batches(4, 6, 6)
    result = learn(prepared_model(nn.Sequential(nn.Conv2d(4, 6, 3)), data, mapping=mapping), data)
    found = converted(convert_fx(copy.deepcopy(result)), "0")
    assert_same(found, learned(result, "0"))
    assert low <= int(found.integers.min())
    assert int(found.integers.max()) <= high


@pytest.mark.parametrize("magnitude", [1e-20, 1e-6, 1.0, 1e6, 1e18])
def test_tiny_and_huge_weights_stay_exact(magnitude):
    model = nn.Sequential(nn.Linear(6, 5))
    with torch.no_grad():
        model[0].weight.mul_(magnitude)
        model[0].bias.mul_(magnitude)
    data = batches(6)
    result = learn(prepared_model(model, data, activation_bits=None), data)
    reference = convert_to_reference_fx(copy.deepcopy(result), backend_config=get_weight_only_backend_config())
    assert_same(converted(reference, "0"), learned(result, "0"))
    assert get_report(result).layers[0].learned_error < 0.1


def test_converting_keeps_integers_through_the_hosts_own_variants(engine):
    engine("x86")
    data = batches(4, 6, 6)
    mapping = get_adaround_qconfig_mapping("x86")
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 1))
    result = learn(prepared_model(model, data, mapping=mapping), data)
    variants = [
        convert_fx(copy.deepcopy(result)),
        convert_fx(copy.deepcopy(copy.deepcopy(result))),
        convert_fx(copy.deepcopy(result).to("cpu")),
        convert_fx(copy.deepcopy(result), qconfig_mapping=mapping),
        convert_fx(copy.deepcopy(result), keep_original_weights=True),
    ]
    for variant in variants:
        for name in ("0", "2"):
            assert_same(converted(variant, name), learned(result, name))
    x = data[0]
    assert all(torch.equal(variant(x), variants[0](x)) for variant in variants)


def test_writing_back_unchanged_leaves_the_converted_model_unchanged(engine):
    """A model that is already on the grid and is rounded to nearest converts to the same model again."""
    engine("x86")
    data = batches(4, 6, 6)
    once = learn(prepared_model(nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 1)), data), data)
    twice = learn(once, data, solver="nearest", correct_bias=False, propagate_error=False)
    for name in ("0", "2"):
        assert_same(learned(twice, name), learned(once, name))
    first, second = convert_fx(copy.deepcopy(once)), convert_fx(copy.deepcopy(twice))
    assert torch.equal(first(data[0]), second(data[0]))
