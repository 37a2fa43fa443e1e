"""`analyze` says what a layer's bits cost at the output, `suggest_bits` what to choose; the hosts take the answer."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export import Dim
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import X86InductorQuantizer

import adaround_plugin
from adaround_plugin import (
    AdaRoundObserver,
    Analysis,
    BitAllocation,
    InvalidBatchError,
    InvalidModelError,
    InvalidOptionError,
    adaround,
    analyze,
    get_adaround_qconfig_mapping,
    get_report,
    suggest_bits,
)
from adaround_plugin.guidance import effects, moments
from adaround_plugin.guidance.record import LayerAnalysis, Width
from adaround_plugin.hosts.pt2e import (
    AdaRoundQuantizer,
    AdaRoundWeightOnlyQuantizer,
    get_adaround_x86_inductor_config,
)
from integration_tests.benchmarks.bits_prediction import predictions
from integration_tests.models import Branches, Functional, batches, call, images, prepared_model, snapshot
from integration_tests.pt2e_models import calibrated, exported, prepared_pt2e

BITS = (2, 4, 8)


class Line(nn.Module):
    """A network that is linear in each weight, with one number for an answer: its losses are exact, signs cancel."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv1d(4, 6, 3, groups=2, padding=1)
        self.back = nn.ConvTranspose1d(6, 4, 2, stride=2)
        self.shared = nn.Linear(12, 12, bias=False)
        self.head = nn.Linear(48, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.back(F.relu(self.grouped(x)))
        return self.head((self.shared(x) + x).flatten(1))


class Twice(Line):
    """One module called at two places, of which neither feeds the other; linear in the weights from there on."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.back(self.grouped(x))
        return self.head((self.shared(x) - self.shared(x.flip(2).abs())).flatten(1))


@functools.cache
def line(kind: type[Line] = Line, host: str = "fx") -> tuple[nn.Module, fx.GraphModule, list[Tensor]]:
    """A network, prepared for weights alone, and its data."""
    torch.manual_seed(0)
    net, data = kind().eval(), batches(4, 6, sizes=(6, 6, 6))
    if host == "fx":
        return net, prepared_model(net, data, activation_bits=None, weight_bits=4), data
    return net, prepared_pt2e(net, data, AdaRoundWeightOnlyQuantizer(symmetric=True)), data


def measured(net: nn.Module, name: str, weight: Tensor, data: list[Tensor]) -> float:
    """The error of the output over its variance with another weight."""
    changed = {name: weight}
    with torch.no_grad():
        exact = torch.cat([net(batch) for batch in data]).double()
        found = torch.cat([torch.func.functional_call(net, changed, (batch,)) for batch in data]).double()
    return float((exact - found).square().mean() / exact.var(0).mean())


def nearest(weight: Tensor, bits: int, axis: int | None) -> Tensor:
    """Rounded to nearest by the host's own observer."""
    scheme = torch.per_tensor_symmetric if axis is None else torch.per_channel_symmetric
    observer = AdaRoundObserver(bits=bits, qscheme=scheme, ch_axis=axis or 0)
    observer(weight)
    grid = observer.chosen()
    return grid.dequantize(grid.nearest(weight.detach()))


@pytest.mark.parametrize("host", ["fx", "pt2e"])
@pytest.mark.parametrize("kind", [Line, Twice])
@pytest.mark.parametrize("numbers", [2**24, 300])
def test_the_loss_of_nearest_is_what_is_measured_where_the_network_is_linear(host, kind, numbers, monkeypatch):
    monkeypatch.setattr(effects, "_NUMBERS", numbers)
    net, prepared, data = line(kind, host)
    analysis = analyze(prepared, data, bits=BITS, progress=False)
    assert [layer.name for layer in analysis.layers] == ["grouped", "back", "shared", "head"]
    assert analysis.samples == 18
    for layer in analysis.layers[1 if kind is Line else 2 :]:
        weight = net.get_parameter(f"{layer.name}.weight")
        axis = 1 if layer.name == "back" else 0
        for width in layer.widths:
            expected = measured(net, f"{layer.name}.weight", nearest(weight, width.bits, axis), data)
            assert width.nearest_loss == pytest.approx(expected, rel=2e-3)
        assert layer.at(8).nearest_loss < layer.at(4).nearest_loss < layer.at(2).nearest_loss


def test_losses_behind_a_relu_are_those_of_small_changes():
    """Of 8 bits, whose changes are small, what is left out is small; one number has no noise of signs."""
    net, prepared, data = line()
    layer = analyze(prepared, data, bits=(8,), progress=False).layers[0]
    expected = measured(net, "grouped.weight", nearest(net.grouped.weight, 8, 0), data)
    assert layer.at(8).nearest_loss == pytest.approx(expected, rel=0.05)


def test_learned_losses_are_what_is_measured_too_with_the_bias_that_was_corrected():
    _, prepared, data = line(Twice)
    for one in predictions(prepared, data, data):
        torch.testing.assert_close(one.predicted[2:], one.measured[2:], rtol=2e-3, atol=1e-12)


def learned_loss_of_the_first(net: nn.Module, data: list[Tensor]) -> float:
    prepared = prepared_model(net, data, activation_bits=None, weight_bits=4)
    return analyze(prepared, data, bits=(2,), progress=False).layers[0].at(2).learned_loss


def test_rows_make_up_for_each_other_as_they_do_by_default(monkeypatch):
    """Of sixteen outputs of which the network's two are made, an error of one takes back those of others."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 2)).eval()
    # twelve numbers and a little noise in 32 inputs
    mix = torch.randn(12, 32)
    data = [torch.randn(128, 12) @ mix + 0.1 * torch.randn(128, 32) for _ in range(2)]
    together = learned_loss_of_the_first(net, data)
    # what channels of a depthwise convolution are, which stay apart here
    monkeypatch.setattr("adaround_plugin.guidance.candidates.shape_of_sets", lambda *_: (1, 16))
    assert together < 0.5 * learned_loss_of_the_first(net, data)


def test_columns_count_by_what_they_do_to_the_output(monkeypatch):
    """The output sees samples with a large last input alone; the others pull the weights elsewhere."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * torch.sigmoid(8 * x[:, -1:])

    net, (x,) = Gated().eval(), batches(12, sizes=(256,))
    # two kinds of samples, whose other inputs do not overlap
    kind = x[:, -1:] > x[:, -1:].median()
    data = [torch.cat([x[:, :5] * kind, 4 * x[:, 5:10] * ~kind, x[:, 10:11], torch.where(kind, 1.0, -1.0)], 1)]
    weighed = learned_loss_of_the_first(net, data)
    monkeypatch.setattr("adaround_plugin.learning.column_weights.ColumnWeights.weight", lambda *_: None)
    assert weighed < 0.9 * learned_loss_of_the_first(net, data)


def test_data_split_otherwise_and_layers_gathered_otherwise_give_the_same(monkeypatch):
    _, prepared, data = line()
    expected = analyze(prepared, data, bits=BITS, progress=False)
    monkeypatch.setattr(moments, "_MOMENT_BYTES", 1)
    found = analyze(prepared, torch.cat(data).split(5), bits=BITS, progress=False)
    moved = 0
    for one, other in zip(found.layers, expected.layers, strict=True):
        for width, wanted in zip(one.widths, other.widths, strict=True):
            assert width.nearest_loss == pytest.approx(wanted.nearest_loss, rel=1e-3)
            moved += width.learned_loss != pytest.approx(wanted.learned_loss, rel=0.05)
    # another order of sums can decide between two scales that are equally good
    assert moved <= 1


class TokensFirst(nn.Module):
    """An attention, whose layers have tokens along the leading axis, or tokens and samples in turns."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


def test_samples_are_told_apart_where_the_leading_axis_is_that_of_tokens():
    """As many tokens as there are samples in a batch, twice as many, and others: what samples give alone is known."""
    torch.manual_seed(0)
    net, generator = TokensFirst().eval(), torch.Generator().manual_seed(1)
    for tokens in (4, 8, 5):
        data = torch.randn(12, tokens, 8, generator=generator)
        program = exported(net, data[:4], ({0: Dim.AUTO},), strict=True)
        prepared = calibrated(program, data.split(4), AdaRoundWeightOnlyQuantizer(symmetric=True))
        one, whole = (analyze(prepared, data.split(size), bits=(2, 4), progress=False) for size in (1, 4))
        assert len(whole.layers) == 3
        for alone, together in zip(one.layers, whole.layers, strict=True):
            for width, other in zip(alone.widths, together.widths, strict=True):
                assert other.nearest_loss == pytest.approx(width.nearest_loss, rel=1e-3), (alone.name, tokens)


def test_an_analysis_is_the_same_every_time_and_leaves_model_data_and_generator_alone():
    _, prepared, data = line()
    before, state = snapshot(prepared), torch.get_rng_state()
    kept = [batch.clone() for batch in data]
    one, other = (analyze(prepared, data, bits=BITS, progress=False) for _ in range(2))
    assert one.layers == other.layers
    after = snapshot(prepared)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(kept, data, strict=True))


def test_outputs_count_alike_whatever_their_unit():
    class Two(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.one, self.other, self.factor = nn.Linear(5, 1), nn.Linear(5, 1), factor

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.one(x), self.factor * self.other(x)

    def losses(factor: float) -> list[float]:
        torch.manual_seed(1)
        data = batches(5)
        prepared = prepared_model(Two(factor), data, activation_bits=None)
        return [layer.at(2).nearest_loss for layer in analyze(prepared, data, bits=(2,), progress=False).layers]

    assert losses(1.0) == pytest.approx(losses(1000.0), rel=1e-4)


def test_what_cannot_be_analysed_is_listed_with_the_reason():
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen, self.unseen, self.left = nn.Linear(5, 4), nn.Linear(5, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.left(self.seen(x)) + (self.unseen(x) > 0).float()

    data = batches(5)
    mapping = get_adaround_qconfig_mapping("x86", activation_bits=None)
    mapping.set_module_name("left", None)
    prepared = prepared_model(Half(), data, mapping=mapping, activation_bits=None)
    analysis = analyze(prepared, data, bits=BITS, progress=False)
    assert [layer.name for layer in analysis.layers] == ["seen"]
    reasons = {name: reason for name, _, reason in analysis.skipped}
    assert reasons["left"].startswith("left in float")
    assert reasons["unseen"] == "the network's output has no finite derivative by its output"
    assert "not analysed unseen (Linear): the network's output" in str(analysis)


def test_layers_that_see_some_rows_are_analysed_and_those_that_see_none_are_listed():
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.never = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.zeros_like(x[:, :2])
            for number, expert in enumerate((self.first, self.second, self.never)):
                rows = ((x[:, 0] > 0.3).long() == number).nonzero().squeeze(1)
                y = y.index_add(0, rows, expert(x[rows]))
            return y

    torch.manual_seed(0)
    net, data = Experts(), batches(3, sizes=(5, 4) * 8)
    prepared = prepared_model(net, data, activation_bits=None)
    analysis = analyze(prepared, data, bits=(3,), progress=False)
    assert [(name, reason) for name, _, reason in analysis.skipped] == [("never", "no sample reached it")]
    assert [layer.name for layer in analysis.layers] == ["first", "second"]
    for layer in analysis.layers:
        weight = net.get_parameter(f"{layer.name}.weight")
        expected = measured(net, f"{layer.name}.weight", nearest(weight, 3, 0), data)
        assert layer.at(3).nearest_loss == pytest.approx(expected, rel=0.3)


def test_few_samples_are_projected_several_times():
    """The noise of signs is as for 256 samples."""
    torch.manual_seed(0)
    net, data = nn.Sequential(nn.Linear(5, 30)), batches(5, sizes=(4,))
    (layer,) = analyze(prepared_model(net, data, activation_bits=None), data, bits=(3,), progress=False).layers
    expected = measured(net, "0.weight", nearest(net[0].weight, 3, 0), data)
    assert layer.at(3).nearest_loss == pytest.approx(expected, rel=0.2)


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise RuntimeError("nobody wrote it")


class Blocked(nn.Module):
    """No derivative comes through."""

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = NoBackward.apply(x)
        return found


def test_networks_without_derivatives_and_bad_arguments_are_refused_by_name():
    from torch.ao.quantization.fx.custom_config import PrepareCustomConfig
    from torch.ao.quantization.quantize_fx import prepare_fx

    _, prepared, data = line()
    with pytest.raises(InvalidOptionError, match="bits"):
        analyze(prepared, data, bits=(2, 9), progress=False)
    with pytest.raises(InvalidOptionError, match="bits"):
        analyze(prepared, data, bits=(), progress=False)
    with pytest.raises(InvalidOptionError, match="symmetric"):
        analyze(prepared, data, symmetric="affine", progress=False)
    with pytest.raises(InvalidBatchError, match="no batches"):
        analyze(prepared, [], progress=False)
    with pytest.raises(InvalidModelError):
        analyze(nn.Linear(2, 2), data, progress=False)
    net = nn.Sequential(nn.Linear(5, 4), Blocked(), nn.Linear(4, 2)).eval()
    data = batches(5)
    config = PrepareCustomConfig().set_non_traceable_module_classes([Blocked])
    mapping = get_adaround_qconfig_mapping("x86")
    blocked = prepare_fx(net, mapping, (data[0],), prepare_custom_config=config)
    with torch.no_grad():
        blocked(data[0])
    with pytest.raises(InvalidModelError, match=r"no derivative could be taken.*nobody wrote it"):
        analyze(blocked, data, progress=False)


# --- what to choose


def made(*losses: tuple[float, ...], weights: int = 1000, bits: tuple[int, ...] = (2, 3, 4)) -> Analysis:
    """An analysis with these learned losses; those of nearest are twice as large, and the other way round."""
    layers = []
    for number, of_layer in enumerate(losses):
        widths = [
            Width(one, weights * one // 8 + 40, 2 * other, loss)
            for one, loss, other in zip(bits, of_layer, of_layer[::-1], strict=True)
        ]
        layers.append(LayerAnalysis(f"body.{number}", "Linear", (), (weights // 10, 10), weights, tuple(widths)))
    return Analysis(layers, [], bits)


def test_bits_go_where_they_gain_most():
    analysis = made((9.0, 3.0, 1.0), (0.9, 0.3, 0.1), (0.09, 0.03, 0.01))
    found = suggest_bits(analysis, average_bits=3)
    assert dict(found.bits) == {"body.0": 4, "body.1": 3, "body.2": 2}
    assert found.average_bits == 3
    assert found.predicted_loss == pytest.approx(1.39)
    assert found.bytes == (4 + 3 + 2) * 125 + 3 * 40
    assert dict(suggest_bits(analysis, size=found.bytes).bits) == dict(found.bits)
    assert suggest_bits(analysis, size=found.bytes - 1).predicted_loss > found.predicted_loss
    # the fewest bytes with no more loss
    assert suggest_bits(analysis, max_loss=1.39).bytes == found.bytes
    assert suggest_bits(analysis, max_loss=1.38).bytes > found.bytes
    assert dict(suggest_bits(analysis, average_bits=3, rounding="nearest").bits) != dict(found.bits)
    kept = suggest_bits(analysis, average_bits=3, fixed={"body": 3, r"body\.2": 4, "body.1": 2})
    assert dict(kept.bits) == {"body.0": 3, "body.1": 2, "body.2": 4}
    assert str(found).splitlines()[-1] == "1245 bytes, 3.00 bits a weight; predicted loss 1.39 (learned)"
    assert "<td>1000</td>" in found._repr_html_()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({}, "nothing is given"),
        ({"size": 1000, "max_loss": 1.0}, "size and max_loss is given"),
        ({"size": 100}, "the least that the widths allow is 870"),
        ({"average_bits": 1.9}, "the least that the widths allow is 2"),
        ({"max_loss": 1e-9}, "the least that the widths allow is 1.11"),
        ({"size": "1 MB"}, "size"),
        ({"average_bits": 3, "fixed": {"tail": 3}}, "matches none of"),
        ({"average_bits": 3, "fixed": {"body.0": 5}}, r"fixed\['body.0'\]"),
        ({"average_bits": 2.5, "fixed": {"body": 4}}, "the least that the widths allow is 4"),
        ({"average_bits": 3, "rounding": "both"}, "rounding"),
    ],
)
def test_bad_budgets_are_refused_by_name(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidOptionError, match=told):
        suggest_bits(made((9.0, 3.0, 1.0), (0.9, 0.3, 0.1), (0.09, 0.03, 0.01)), **arguments)


@pytest.mark.parametrize(
    ("bits", "rounding", "told"),
    [
        ({"body.0": 4, "body.1": 5}, "learned", r"5 was not analysed for 'body\.1'.*\[2, 3, 4\]"),
        ({"body.0": 4}, "learned", r"\['body\.1'\] are in one"),
        ({"body.0": 4, "body.1": 4, "tail": 4}, "learned", r"\['tail'\] are in one"),
        ([4, 4], "learned", "bits"),
        ({"body.0": 4, "body.1": 4}, "nearst", "rounding"),
    ],
)
def test_bits_chosen_by_hand_are_checked(bits: Any, rounding: Any, told: str) -> None:
    analysis = made((9.0, 3.0, 1.0), (0.9, 0.3, 0.1))
    assert BitAllocation(analysis, {"body.0": 4, "body.1": 2}).predicted_loss == pytest.approx(1.9)
    with pytest.raises(InvalidOptionError, match=told):
        BitAllocation(analysis, bits, rounding)


def test_fx_takes_the_bits():
    net, prepared, data = line(Twice)
    found = suggest_bits(analyze(prepared, data, bits=BITS, progress=False), average_bits=4.5, fixed={"head": 8})
    mapping = get_adaround_qconfig_mapping("x86", activation_bits=None, layer_bits=found.layer_bits, model=net)
    report = get_report(
        adaround(prepared_model(net, data, mapping=mapping, activation_bits=None), data, progress=False)
    )
    assert {layer.name: layer.bits for layer in report.layers} == dict(found.bits)
    assert set(found.bits.values()) <= set(BITS)
    assert found.bits["head"] == 8


@pytest.mark.parametrize("vendor", [True, False])
def test_the_quantizers_of_pt2e_take_the_bits(vendor):
    functional = Functional(F.linear, (6, 64), bias=6)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), functional).eval()
    data = batches(2, 6, 6, sizes=(6, 6))
    prepared = prepared_pt2e(net, data, strict=True)
    analysis = analyze(prepared, data, bits=BITS, progress=False)
    found = suggest_bits(analysis, average_bits=7.2)
    assert len(set(found.bits.values())) == 2
    quantizer: Any = AdaRoundWeightOnlyQuantizer(layers=found.layers)
    if vendor:
        quantizer = X86InductorQuantizer().set_global(get_adaround_x86_inductor_config(8))
        quantizer = AdaRoundQuantizer(quantizer, layers=found.layers)
    report = get_report(adaround(prepared_pt2e(net, data, quantizer, strict=True), data, progress=False))
    assert {layer.name: layer.bits for layer in report.layers} == dict(found.bits)


class Outer(nn.Linear):
    """A linear layer with another one inside."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.inside = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.relu(self.inside(x)))


def test_a_layer_inside_of_another_has_its_own_bits():
    """Whatever order the graph has them in: a name selects what is below it, too."""
    net, data = nn.Sequential(Outer(), nn.ReLU()).eval(), batches(8, sizes=(6,))
    prepared = prepared_pt2e(net, data, strict=True)
    found = BitAllocation(analyze(prepared, data, bits=(2, 8), progress=False), {"0.inside": 8, "0": 2})
    learned = adaround(
        prepared_pt2e(net, data, AdaRoundWeightOnlyQuantizer(layers=found.layers), strict=True),
        data,
        "nearest",
        progress=False,
    )
    assert {layer.name: layer.bits for layer in get_report(learned).layers} == {"0.inside": 8, "0": 2}


def test_neural_compressor_takes_the_bits():
    from adaround_plugin.inc import AdaRoundConfig

    analysis = made((9.0, 3.0, 1.0), (0.9, 0.3, 0.1), (0.09, 0.03, 0.01))
    found = suggest_bits(replace(analysis, layers=analysis.layers[:2]), average_bits=3.5)
    config = AdaRoundConfig.from_dict(json.loads(json.dumps(found.inc_config(act_dtype="fp32", damping=0.1))))
    net = nn.ModuleDict({"body": nn.Sequential(nn.Linear(10, 100), nn.Linear(10, 100))})
    parts = config.to_config_mapping(model_info=config.get_model_info(net))
    assert {name: part.bits for (name, _), part in parts.items() if name} == {"body.0": 4, "body.1": 3}
    assert {part.damping for part in parts.values()} == {0.1}


# --- how it is shown


def test_an_analysis_is_shown_as_table_page_frame_and_figure(tmp_path):
    analysis = made((9.0, 3.0, 1.0), (0.9, 0.0, float("nan")))
    layer = replace(analysis.layers[1], name="<b>$x_1$", tied=("y",))
    analysis = replace(analysis, layers=[analysis.layers[0], layer], skipped=[("z", "Linear", "why & how")])
    assert str(analysis).splitlines()[1].split() == [
        "body.0",
        "Linear",
        "100x10",
        "2",
        "->",
        "9",
        "6",
        "->",
        "3",
        "18",
        "->",
        "1",
    ]
    analysis.to_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;$x_" in page
    assert "<b>$" not in page
    assert "why &amp; how" in page
    assert page.count('<text class="after"') == 4
    assert "<title>GPTQ, 2 bits: 9</title>" in page
    assert "body.0" in analysis._repr_html_()
    table = analysis.to_dataframe()
    assert len(table) == 6
    assert list(table.columns) == ["name", "kind", "weights", "bits", "bytes", "nearest_loss", "learned_loss"]
    figure = analysis.plot()
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["body.0", "<b>$x_1$"]
    assert sum(text.get_text() in "234" for text in figure.axes[0].texts) == 8
    figure.savefig(tmp_path / "figure.png")


def test_bytes_are_those_of_packed_integers_with_scales_and_zero_points():
    net, data = nn.Sequential(nn.Linear(5, 3)), batches(5)
    prepared = prepared_model(net, data, activation_bits=None, weight_bits=4)

    def sizes(**options: Any) -> list[int]:
        (layer,) = analyze(prepared, data, bits=(2, 3, 8), progress=False, **options).layers
        return [width.bytes for width in layer.widths]

    # 15 weights; three scales of four bytes, and where grids are affine three zero points of one
    assert sizes() == [4 + 12, 6 + 12, 15 + 12]
    assert sizes(symmetric=None) == [4 + 15, 6 + 15, 15 + 12]
    assert sizes(symmetric=False) == [4 + 15, 6 + 15, 15 + 15]


def test_the_names_are_public():
    assert {"analyze", "suggest_bits", "Analysis", "BitAllocation"} <= set(adaround_plugin.__all__)


def test_a_branched_network_with_activations_in_integers_is_analysed():
    data = batches(4, 8, 8)
    net = Branches().eval()
    prepared = prepared_model(net, data)
    analysis = analyze(prepared, data, bits=(2, 8), progress=False)
    assert all(layer.at(2).learned_loss > layer.at(8).learned_loss for layer in analysis.layers)
    assert torch.isfinite(call(net, images(2, 4, 8, 8))).all()
