"""Integers put into Neural Compressor's packed linear layers come out again, by its own unpack, forward and load."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from neural_compressor.torch.quantization import RTNConfig, load, quantize, save
from torch import Tensor, nn

from adaround_plugin.errors import InvalidModelError
from adaround_plugin.inc.packing import IntegerLinear, pack


class Layers(nn.Module):
    """Linear layers whose names contain one another, one without a bias, and one known by two names."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            self.fc1 = nn.Linear(48, 32, bias=False)
            self.fc10 = nn.Linear(32, 24)
            self.head = nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc10(self.fc1(x).relu()).relu())


def integer_linear(linear: nn.Linear, bits: int, group_size: int, symmetric: bool, seed: int = 0) -> IntegerLinear:
    """Random integers, at both ends of the range too, and scales of about the layer's own size."""
    generator = torch.Generator().manual_seed(seed)
    outputs, inputs = linear.weight.shape
    groups = 1 if group_size == -1 else -(-inputs // group_size)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scale = (torch.rand(outputs, groups, generator=generator) + 0.5) / 2**bits
    # 8-bit zero points are left out of the affine case: INC's recover overflows
    zero_point = None if symmetric else torch.randint(low, high + 1, (outputs, groups), generator=generator)
    integers = torch.randint(low, high + 1, (outputs, inputs), generator=generator)
    return IntegerLinear(integers, scale.half().float(), zero_point, bits, group_size)


def dequantized(weight: IntegerLinear) -> Tensor:
    """`(q - zp) * scale`, group by group of columns, in float16 as INC computes it."""
    inputs = weight.integers.shape[1]
    group = torch.arange(inputs) // (inputs if weight.group_size == -1 else weight.group_size)
    zero_point = torch.zeros_like(weight.scale) if weight.zero_point is None else weight.zero_point
    return ((weight.integers - zero_point[:, group]) * weight.scale[:, group]).half().float()


@pytest.mark.parametrize("group_size", [-1, 16, 20])
@pytest.mark.parametrize(
    ("bits", "symmetric"), [*((bits, True) for bits in range(2, 9)), *((bits, False) for bits in range(2, 8))]
)
def test_a_packed_layer_holds_exactly_the_integers(bits: int, symmetric: bool, group_size: int) -> None:
    model = nn.Sequential(nn.Linear(48, 10))
    linear = model[0]
    weight = integer_linear(linear, bits, group_size, symmetric)
    before = copy.deepcopy(weight)
    packed = pack(model, {"0": weight})[0]
    unpacked = packed.unpack()
    shift = 2 ** (bits - 1)
    assert torch.equal(unpacked["int_weight"].long() - shift, weight.integers)
    assert torch.equal(unpacked["scales"].float(), weight.scale)
    zero_point = torch.zeros_like(weight.scale) if weight.zero_point is None else weight.zero_point
    assert torch.equal(unpacked["zp"].long() - shift, zero_point.long())
    assert torch.equal(packed.recover().float(), dequantized(weight))
    x = torch.randn(7, 48)
    assert torch.equal(packed(x), F.linear(x, dequantized(weight), linear.bias.half().float()))
    # INC's pack works in place on what it is given
    assert torch.equal(weight.integers, before.integers)


def test_a_bias_that_was_learned_replaces_the_layers_own() -> None:
    model = nn.Sequential(nn.Linear(8, 4, bias=False))
    weight = integer_linear(model[0], 4, -1, True)
    learned = IntegerLinear(weight.integers, weight.scale, None, 4, bias=torch.arange(4.0))
    packed = pack(model, {"0": learned})
    assert torch.equal(packed(torch.zeros(1, 8)), torch.arange(4.0)[None])


def test_a_layer_with_two_names_is_packed_once() -> None:
    linear = nn.Linear(8, 8)
    model = nn.Sequential(linear, nn.ReLU(), linear)
    packed = pack(model, {"0": integer_linear(linear, 4, -1, True)})
    assert packed[0] is packed[2]
    assert not isinstance(packed[0], nn.Linear)


def test_scales_that_float16_lacks_are_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    weight = IntegerLinear(torch.zeros(4, 8, dtype=torch.int64), torch.full((4, 1), 0.1), None, 4)
    with pytest.raises(InvalidModelError, match="float16"):
        pack(model, {"0": weight})


def packed_model() -> nn.Module:
    """Layers of different bits and groups, one left in float."""
    model = Layers()
    layers = {
        "fc1": integer_linear(model.fc1, 3, 16, True, 1),
        "fc10": integer_linear(model.fc10, 4, -1, False, 2),
    }
    return pack(model, layers)


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("stock", [False, True])
def test_the_stock_load_returns_the_same_model_in_a_fresh_process(tmp_path: Path, stock: bool, ran: bool) -> None:
    model, x = packed_model(), torch.randn(5, 48)
    expected = copy.deepcopy(model)(x)
    if ran:
        # INC keeps the recovered weight in the layer, and makes its bias float32
        model(x)
    if stock:
        save(model, str(tmp_path))
    else:
        model.save(str(tmp_path))
    torch.save({"x": x, "expected": expected}, tmp_path / "case.pt")
    code = (
        "import sys, torch\n"
        "from neural_compressor.torch.quantization import load\n"
        "from integration_tests.test_inc_packing import Layers\n"
        "torch.set_num_threads(1)\n"
        "case = torch.load(f'{sys.argv[1]}/case.pt')\n"
        "model = load(sys.argv[1], original_model=Layers())\n"
        "assert torch.equal(model(case['x']), case['expected'])\n"
        "assert model.fc1.bits == 3 and model.fc1.group_size == 16 and model.fc10.bits == 4\n"
    )
    root = Path(__file__).parent.parent
    run = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=root, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_round_to_nearest_of_inc_can_follow_for_other_layers() -> None:
    model = packed_model()
    before = copy.deepcopy(model.fc1.qweight)
    mixed = quantize(model, RTNConfig(bits=8, group_size=-1, use_layer_wise=False))
    assert torch.equal(mixed.fc1.qweight, before)
    assert mixed.head.bits == 8


def test_loading_needs_the_float_model() -> None:
    with pytest.raises(ValueError, match=r"qconfig\.json"):
        load("nowhere")
