"""Biases that integer kernels can have: multiples of the input's scale times the weight's, in both hosts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from adaround_plugin import InvalidOptionError, adaround, get_report
from adaround_plugin.hosts.biases import bias_at
from adaround_plugin.hosts.open import open_host
from adaround_plugin.hosts.pt2e import AdaRoundWeightOnlyQuantizer
from integration_tests.models import QUICK, batches, call, learn, prepared_model
from integration_tests.pt2e_models import calibrated, convert, exported, x86

SHAPE = (4, 8, 8)
DATA = batches(*SHAPE, sizes=(8, 8))


class Net(nn.Module):
    """Convolutions, one depthwise, one transposed, one without a bias, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 6, 3), nn.Conv2d(6, 6, 3, groups=6)
        self.c, self.d = nn.ConvTranspose2d(6, 4, 2, groups=2), nn.Conv2d(4, 3, 3, bias=False)
        self.e = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.c(torch.relu(self.b(torch.relu(self.a(x))))))
        return self.e(torch.relu(self.d(x)).mean((2, 3)))


class Twice(nn.Module):
    """One layer with inputs of two scales, and one whose input is in float."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(self.a(x) * 9.0)))


def _network(kind: type[nn.Module] = Net) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


def _prepared(host: str, bits: int = 4, kind: type[nn.Module] = Net, data: Any = DATA) -> fx.GraphModule:
    if host == "fx":
        return prepared_model(_network(kind), data, "qnnpack", weight_bits=bits)
    return calibrated(exported(_network(kind), data[0], strict=True), data, x86(weight_bits=bits))


def _steps(learned: fx.GraphModule) -> dict[str, Tensor]:
    """The biases of a learned model in steps of the input's scale times the weight's, by layer, with both read from the
    host's own conversion."""
    host = open_host(learned)
    found = {}
    for node in host.nodes:
        bias, source = bias_at(host, node.sites[0].float_node), node.sites[0].quantized_node.args[0]
        quantize = source.args[0]
        scale = quantize.args[1]
        if isinstance(scale, fx.Node):
            scale = getattr(host.quantized_graph, str(scale.target)).item()
        if bias is not None:
            weights = node.op.rows(node.grid.expand(node.grid.scale, node.weight.shape))[..., 0].flatten()
            found[node.name] = bias.double() / (scale * weights.double())
    return found


def _are_whole(values: Tensor) -> bool:
    """Up to the precision of float32."""
    return bool(((values - values.round()).abs() < 1e-2 + 1e-7 * values.abs()).all())


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("host", ["fx", "x86"])
def test_biases_are_whole_steps(host, bits):
    prepared = _prepared(host, bits)
    result = learn(prepared, DATA, integer_biases=True)
    steps = _steps(result)
    assert len(steps) >= 4
    for name, values in steps.items():
        assert _are_whole(values), name
        assert values.round().abs().max() > 0
    free = _steps(learn(prepared, DATA))
    assert not any(map(_are_whole, free.values()))
    # the first layer is learned alike, and its biases are rounded to nearest
    assert (steps["a"] - free["a"]).abs().max() < 0.5 + 1e-2
    assert not any("bias in float" in layer.note for layer in get_report(result).layers)


@pytest.mark.parametrize("method", ["nearest", "blocks"])
def test_every_method_rounds_them(method):
    prepared = _prepared("x86", 2)
    result = adaround(prepared, DATA, method, exclude=["b"], integer_biases=True, progress=False)
    for name, values in _steps(result).items():
        assert _are_whole(values), name


class Pooled(nn.Module):
    """Errors of single positions average out, and those of a bias do not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 12, 1), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).mean((2, 3)))


def test_the_layers_behind_make_up_for_it():
    data = batches(*SHAPE, sizes=(64, 64))
    model = _network(Pooled)
    prepared = _prepared("x86", 2, Pooled, data)
    free, whole = (learn(prepared, data, integer_biases=integer) for integer in (False, True))
    # the float biases of the one model, rounded afterwards
    rounded, steps = copy.deepcopy(free), _steps(free)
    for name, parameter in rounded.named_parameters():
        layer = name.removesuffix(".bias")
        if layer in steps:
            parameter.data.mul_(steps[layer].round() / steps[layer])

    def error(result: fx.GraphModule) -> float:
        """Of the mean output."""
        converted = convert(copy.deepcopy(result))
        with torch.no_grad():
            return float(sum((converted(batch) - model(batch)).mean(0) for batch in data).square().sum())

    assert error(whole) < 0.5 * error(rounded)


@pytest.mark.parametrize("host", ["fx", "x86"])
def test_a_layer_whose_bias_stays_in_float_says_why(host):
    data = batches(6, sizes=(8, 8))
    result = learn(_prepared(host, kind=Twice, data=data), data, integer_biases=True)
    notes = {layer.name: layer.note for layer in get_report(result).layers}
    assert "bias in float: the inputs of its calls have several scales" in notes["a"]
    assert "bias in float" not in notes["b"]


def test_a_shared_functional_weight_with_several_biases_says_so():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.last = nn.Parameter(torch.randn(6, 6)), nn.Linear(6, 2)
            self.one, self.other = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.relu(F.linear(x, self.weight, self.one) + F.linear(x, self.weight, self.other)))

    data = batches(6, sizes=(8, 8))
    result = learn(_prepared("x86", kind=Shared, data=data), data, integer_biases=True)
    notes = {layer.name: layer.note for layer in get_report(result).layers}
    assert "bias in float: its calls have several biases" in next(
        note for name, note in notes.items() if name != "last"
    )


def test_the_prepared_model_is_not_changed_and_nothing_else_is_learned_in_it():
    prepared = _prepared("x86")
    before = copy.deepcopy(prepared.state_dict())
    one, other = (adaround(prepared, DATA, QUICK, integer_biases=True, progress=False) for _ in range(2))
    assert all(torch.equal(value, before[name]) for name, value in prepared.state_dict().items())
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    assert torch.equal(call(convert(one), DATA[0]), call(convert(other), DATA[0]))


def test_where_no_layer_can_have_one_it_is_refused():
    prepared = calibrated(exported(_network(), DATA[0]), DATA, AdaRoundWeightOnlyQuantizer())
    with pytest.raises(InvalidOptionError, match=r"integer_biases.*of 'a', the input is not quantized"):
        adaround(prepared, DATA, integer_biases=True, progress=False)


@pytest.mark.parametrize("options", [{"finetune": True}, {"method": "best"}])
def test_finetuning_is_refused(options):
    with pytest.raises(InvalidOptionError, match=r"integer_biases: finetuning moves.*finetune=False"):
        adaround(_prepared("x86"), DATA, integer_biases=True, progress=False, **options)
