"""The weight-only quantizer: every weighted operator, options by layer, and scales of groups of columns."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

from adaround_plugin import InvalidModelError, InvalidOptionError, get_report
from adaround_plugin.hosts.learned import learned_weights
from adaround_plugin.hosts.pt2e import AdaRoundWeightOnlyQuantizer, get_adaround_weight_spec
from integration_tests.models import batches, learn
from integration_tests.pt2e_models import calibrated, exported


class Net(nn.Module):
    """A convolution, a transposed one, and three linear layers, one without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up = nn.Conv2d(3, 6, 3, padding=1), nn.ConvTranspose2d(6, 4, 2, 2)
        self.first, self.second, self.head = nn.Linear(24, 16), nn.Linear(16, 12, bias=False), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.up(torch.relu(self.conv(x)))).mean(3).flatten(1)[:, :24]
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


DATA = batches(3, 6, 6)


@functools.cache
def _program() -> fx.GraphModule:
    torch.manual_seed(1)
    return exported(Net(), DATA[0], ({0: torch.export.Dim("batch")},))


def learned(layers: Any = None, linear_only: bool = False, **options: Any) -> fx.GraphModule:
    prepared = calibrated(_program(), DATA, AdaRoundWeightOnlyQuantizer(layers, linear_only, **options))
    return learn(prepared, DATA)


def folded(converted: fx.GraphModule) -> dict[str, Tensor]:
    """The integers in a converted program, by the name of the operator's node that reads them."""
    found = {}
    for node in converted.graph.nodes:
        if node.op == "call_function" and node.target in (
            torch.ops.quantized_decomposed.dequantize_per_channel.default,
            torch.ops.quantized_decomposed.dequantize_per_tensor.default,
            torch.ops.torchao.dequantize_affine,
            torch.ops.torchao.dequantize_affine.default,
        ):
            (user,) = node.users
            path, _ = list(user.meta["nn_module_stack"].values())[-1]
            found[path] = getattr(converted, node.args[0].target)
    return found


OPTIONS = [
    {"weight_bits": 4},
    {"weight_bits": 2, "symmetric": False},
    {"weight_bits": 3, "per_channel": False},
    {"weight_bits": 8, "scale_dtype": torch.float16},
    {"weight_bits": 4, "group_size": 4},
    {"weight_bits": 2, "group_size": 4, "symmetric": False, "scale_dtype": torch.float16},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_converted_integers_and_scales_are_the_learned_ones(options):
    result = learned(**options)
    found = learned_weights(result)
    assert list(found) == ["conv", "up", "first", "second", "head"]
    converted = convert_pt2e(copy.deepcopy(result), fold_quantize=True)
    integers = folded(converted)
    for name, (expected, grid) in found.items():
        assert torch.equal(integers[name].long(), expected), name
        assert int(expected.min()) >= -(2 ** (options["weight_bits"] - 1))
        assert int(expected.max()) < 2 ** (options["weight_bits"] - 1)
        if "scale_dtype" in options:
            assert torch.equal(grid.scale, grid.scale.half().float())
        if "group_size" in options and name in ("first", "second", "head"):
            assert grid.scale.numel() == expected.numel() // 4
    unfolded = convert_pt2e(copy.deepcopy(result), fold_quantize=False)
    weights = {name: grid.dequantize(q) for name, (q, grid) in found.items()}
    reference = Net().eval()
    reference.load_state_dict({**result.state_dict(), **{f"{n}.weight": w for n, w in weights.items()}}, strict=False)
    reference.second.bias = nn.Parameter(result.get_parameter("second.bias"))
    for x in DATA:
        assert torch.equal(converted(x), unfolded(x))
        torch.testing.assert_close(converted(x), reference(x))


def test_groups_leave_a_smaller_error_than_channels():
    errors = [get_report(learned(weight_bits=2, group_size=size, symmetric=True)).output_error for size in (None, 4)]
    assert errors[1] < errors[0]


def test_options_of_single_layers():
    layers = {"f.*": {"weight_bits": 8}, "conv": None, "second": {"group_size": 8}, "head": {"group_size": None}}
    result = learned(layers, group_size=4)
    grids = {name: grid for name, (_, grid) in learned_weights(result).items()}
    assert {name: (grid.bits, grid.group_size) for name, grid in grids.items()} == {
        "up": (4, None),
        "first": (8, 4),
        "second": (4, 8),
        "head": (4, None),
    }
    ((name, _, reason),) = get_report(result).skipped
    assert name == "conv"
    assert "float" in reason


def test_linear_only():
    result = learned(linear_only=True)
    assert [layer.name for layer in get_report(result).layers] == ["first", "second", "head"]


def test_the_axis_of_the_channels_is_that_of_each_operator():
    grids = {name: grid for name, (_, grid) in learned_weights(learned(ch_axis=1)).items()}
    assert {name: grid.ch_axis for name, grid in grids.items()} == {
        "conv": 0,
        "up": 1,
        "first": 0,
        "second": 0,
        "head": 0,
    }


def test_groups_that_do_not_divide_a_row_are_refused_by_name():
    with pytest.raises(InvalidModelError, match=r"'first.weight'.*24 columns.*group_size 7"):
        learned(group_size=7)


@pytest.mark.parametrize(
    "options",
    [
        {"group_size": 4, "per_channel": False},
        {"group_size": 4, "ch_axis": 1},
        {"weight_bits": 9},
    ],
)
def test_bad_options_are_refused_at_once(options):
    with pytest.raises(InvalidOptionError):
        get_adaround_weight_spec(**options)
    with pytest.raises(InvalidOptionError):
        AdaRoundWeightOnlyQuantizer(**options)


def test_names_that_match_nothing_are_refused():
    with pytest.raises(InvalidOptionError, match="nowhere"):
        learned({"nowhere": None})
