"""Vendors' own quantizers with learned rounding: converted integers are the learned ones, and never worse than nearest.

Here are those of ExecuTorch's wheel that need nothing beside it and prepare a network in a second. The others are in
`python -m integration_tests.benchmarks.executorch_backends`.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torchao.quantization.pt2e import MinMaxObserver
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import QuantizationSpec, Quantizer
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import X86InductorQuantizer

from adaround_plugin import InvalidModelError, InvalidOptionError, adaround, get_report
from adaround_plugin.hosts.learned import learned_weights
from adaround_plugin.hosts.pt2e import AdaRoundObserver, AdaRoundQuantizer
from integration_tests.benchmarks.vendor_quantizers import VENDORS, calibrated, learn, qualcomm, samples
from integration_tests.models import QUICK
from integration_tests.pt2e_models import EveryOperator, exported

TESTED = ("XNNPACK", "Qualcomm 8a8w", "Qualcomm 16a4w", "Samsung", "Vulkan", "Cadence")
DATA = samples(count=2)


@functools.cache
def quantizer(vendor: str) -> Any:
    return VENDORS[vendor]()


def prepared(wrapped: Any, model: nn.Module | None = None) -> fx.GraphModule:
    """A calibrated model, of a net with a shared layer unless another is given."""
    torch.manual_seed(0)
    program = prepare_pt2e(exported(model or Shared(), DATA[0]), wrapped)
    program(DATA[0])
    return program


class Shared(nn.Module):
    """A convolution that is called twice, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.twice, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(4 * 36, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.twice(torch.relu(self.twice(torch.relu(self.conv(x)))))).flatten(1))


@pytest.mark.parametrize("bits", ["stock", 4, 2], ids=str)
@pytest.mark.parametrize("vendor", TESTED)
def test_converted_integers_are_the_learned_ones_and_no_worse_than_nearest(vendor, bits):
    wrapped = quantizer(vendor) if bits == "stock" else AdaRoundQuantizer(quantizer(vendor), weight_bits=bits)
    found = learn(vendor, wrapped, DATA, QUICK)
    assert found.exact
    report = found.report
    named = {layer.name for layer in report.layers}
    # Vulkan has quantized kernels for linear layers alone
    assert named == ({"head"} if vendor == "Vulkan" else {"conv", "depthwise", "pointwise", "head"})
    assert {reason for _, _, reason in report.skipped} <= {"left in float by the quantizer"}
    own = 4 if vendor == "Qualcomm 16a4w" else 8
    assert {layer.bits for layer in report.layers} == {bits if isinstance(bits, int) else own}
    assert report.output_error <= report.nearest_output_error
    if own == 4 or isinstance(bits, int):
        assert report.output_error < report.nearest_output_error / 2


@pytest.mark.parametrize("bits", [None, 4])
def test_of_a_weight_only_observer_and_range_change(bits):
    """All else in the annotations is the vendor's."""

    def annotations(wrapped: Any) -> list[Any]:
        program = wrapped.annotate(exported(Shared(), DATA[0]))
        found = []
        for node in program.graph.nodes:
            annotation = node.meta.get("quantization_annotation")
            for source, spec in ({} if annotation is None else annotation.input_qspec_map).items():
                found.append((node.name, source.name, spec))
            found.append((node.name, "", annotation and annotation.output_qspec))
        return found

    marked = 0
    own, ours = (annotations(one) for one in (EveryOperator(weight_bits=8), AdaRoundQuantizer(EveryOperator(8), bits)))
    for (node, source, before), (same_node, same_source, after) in zip(own, ours, strict=True):
        assert (node, source) == (same_node, same_source)
        if "weight" not in source:
            assert before == after
            continue
        marked += 1
        assert (after.dtype, after.qscheme, after.ch_axis) == (before.dtype, before.qscheme, before.ch_axis)
        assert (after.quant_min, after.quant_max) == ((-8, 7) if bits == 4 else (before.quant_min, before.quant_max))
        assert isinstance(after.observer_or_fake_quant_ctr(), AdaRoundObserver)
    assert marked == 4


@pytest.mark.parametrize("vendor", ["XNNPACK", "Qualcomm 8a8w"])
def test_a_layer_that_is_called_twice_keeps_one_weight(vendor):
    learned = adaround(prepared(AdaRoundQuantizer(quantizer(vendor), 4)), DATA, QUICK, progress=False)
    assert [layer.name for layer in get_report(learned).layers] == ["conv", "twice", "head"]
    convert_pt2e(learned)(DATA[0])


def test_options_of_single_layers():
    layers = {"depthwise": {"weight_bits": 6}, "p.*": None, "head": {"weight_bits": None}}
    wrapped = AdaRoundQuantizer(quantizer("XNNPACK"), 4, layers)
    found = calibrated("XNNPACK", wrapped, DATA)
    ours = [type(module).__name__ for module in found.modules() if type(module).__module__.startswith("adaround")]
    assert ours == ["AdaRoundObserver"] * 3
    grids = {name: grid for name, (_, grid) in learned_weights(found).items()}
    ranges = {name: (grid.quant_min, grid.quant_max) for name, grid in grids.items()}
    # XNNPACK's own range leaves -128 out
    assert ranges == {"conv": (-8, 7), "depthwise": (-32, 31), "pointwise": (-127, 127), "head": (-127, 127)}


def test_eight_bits_of_a_range_without_its_lowest_integer_are_that_range():
    found = calibrated("XNNPACK", AdaRoundQuantizer(quantizer("XNNPACK"), 8), DATA)
    assert {(grid.quant_min, grid.quant_max) for _, grid in learned_weights(found).values()} == {(-127, 127)}


def test_the_scale_is_the_observers_choice():
    searched, whole = (
        calibrated("XNNPACK", AdaRoundQuantizer(quantizer("XNNPACK"), 3, scale=scale), DATA)
        for scale in ("mse", "minmax")
    )
    pairs = zip(learned_weights(searched).values(), learned_weights(whole).values(), strict=True)
    assert all(one.scale.mean() < other.scale.mean() for (_, one), (_, other) in pairs)


def test_what_a_quantizer_switches_off_is_on_again_for_the_next():
    """Qualcomm's takes oneDNN from the process on AMD's processors, which changes what Cortex-M's quantizer takes."""
    enabled = torch.backends.mkldnn.enabled
    qualcomm("use_8a8w")
    assert torch.backends.mkldnn.enabled == enabled


# --- bad input


@pytest.mark.parametrize("value", [None, X86InductorQuantizer, "XNNPACK"], ids=["none", "class", "name"])
def test_what_is_no_quantizer_is_refused(value):
    with pytest.raises(InvalidOptionError, match=r"quantizer: .* is no object of torchao's class Quantizer"):
        AdaRoundQuantizer(value)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"weight_bits": 9}, "weight_bits: 9"),
        ({"weight_bits": True}, "weight_bits: True"),
        ({"scale": "l2"}, "scale: 'l2'"),
        ({"layers": ["head"]}, "layers: "),
        ({"layers": {"head": 4}}, r"layers\['head'\]"),
        ({"layers": {"head": {"bits": 4}}}, "options: 'bits'"),
        ({"layers": {"head": {"weight_bits": 1}}}, "weight_bits: 1"),
    ],
)
def test_bad_options_are_refused_at_once(options, match):
    with pytest.raises(InvalidOptionError, match=match):
        AdaRoundQuantizer(X86InductorQuantizer(), **options)


def test_a_quantizer_that_annotates_no_weight_is_named_with_the_remedy():
    with pytest.raises(InvalidModelError, match=r"X86InductorQuantizer: annotates no weight.*set_global.*strict=True"):
        prepared(AdaRoundQuantizer(X86InductorQuantizer()))


def test_a_name_that_matches_no_annotated_weight_is_refused():
    with pytest.raises(InvalidOptionError, match=r"layers\['conv'\].*matches none of \['head'\]"):
        calibrated("Vulkan", AdaRoundQuantizer(quantizer("Vulkan"), layers={"conv": None}), DATA)


def test_more_bits_than_the_vendors_range_has_are_refused():
    match = r"weight_bits: QnnQuantizer gives layer 'conv' the range \[-7, 7\], which has no 8 bits"
    with pytest.raises(InvalidOptionError, match=match):
        calibrated("Qualcomm 16a4w", AdaRoundQuantizer(quantizer("Qualcomm 16a4w"), 8), DATA)


def test_weights_of_another_type_are_refused_by_the_name_of_their_layer():
    unsigned = QuantizationSpec(torch.uint8, MinMaxObserver, 0, 255, torch.per_tensor_affine)
    with pytest.raises(InvalidModelError, match=r"layer 'conv': .* by EveryOperator to torch.uint8.*layers=\{'conv'"):
        prepared(AdaRoundQuantizer(EveryOperator(weight=unsigned)))


def test_weights_in_blocks_are_refused_by_the_name_of_their_observer():
    vendor = qualcomm("use_16a4w_block")
    vendor.set_block_size_map({"conv2d": (1, 3, 1, 1)})
    with pytest.raises(
        InvalidModelError, match=r"layer 'conv': .*QnnQuantizer by PerBlock\w+, which has no per-tensor"
    ):
        calibrated("Qualcomm 16a4w", AdaRoundQuantizer(vendor), DATA)


def test_the_vendors_own_hooks_are_called():
    called = []

    class Hooked(EveryOperator):
        def transform_for_annotation(self, model: fx.GraphModule) -> fx.GraphModule:
            called.append("transform")
            return model

        def validate(self, model: fx.GraphModule) -> None:
            called.append("validate")

        def prepare_obs_or_fq_callback(self, model: fx.GraphModule, edge_or_node_to_obs_or_fq: Any) -> None:
            called.append("callback")

    wrapped = AdaRoundQuantizer(Hooked())
    assert isinstance(wrapped, Quantizer)
    prepared(wrapped)
    assert called == ["transform", "validate", "callback"]
