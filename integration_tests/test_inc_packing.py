"""Integers put into Neural Compressor's packed linear layers come out again, by its own unpack, forward and load."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from neural_compressor.torch.quantization import RTNConfig, load, quantize, save
from torch import Tensor, nn

from adaround_plugin.errors import InvalidModelError
from adaround_plugin.inc.packing import IntegerLinear, pack
from integration_tests.inc_models import Layers, run_afresh
from integration_tests.pairs import pairwise


def integer_linear(linear: nn.Linear, bits: int, group_size: int, symmetric: bool, seed: int = 0) -> IntegerLinear:
    """Random integers, at both ends of the range too, and scales of about the layer's own size."""
    generator = torch.Generator().manual_seed(seed)
    outputs, inputs = linear.weight.shape
    groups = 1 if group_size == -1 else -(-inputs // group_size)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scale = (torch.rand(outputs, groups, generator=generator) + 0.5) / 2**bits
    zero_point = None if symmetric else torch.randint(low, high + 1, (outputs, groups), generator=generator)
    integers = torch.randint(low, high + 1, (outputs, inputs), generator=generator)
    return IntegerLinear(integers, scale.half().float(), zero_point, bits, group_size)


def dequantized(weight: IntegerLinear) -> Tensor:
    """`(q - zp) * scale`, group by group of columns, in float16 as INC computes it."""
    inputs = weight.integers.shape[1]
    group = torch.arange(inputs) // (inputs if weight.group_size == -1 else weight.group_size)
    zero_point = torch.zeros_like(weight.scale) if weight.zero_point is None else weight.zero_point
    return ((weight.integers - zero_point[:, group]) * weight.scale[:, group]).half().float()


# affine weights of 8 bits are left out: INC's recover overflows
@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric"),
    pairwise(range(2, 9), (-1, 16, 20), (True, False), allowed=lambda bits, _, symmetric: bits < 8 or symmetric),
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


def test_the_stock_load_returns_the_same_model_in_a_fresh_process(tmp_path: Path) -> None:
    """However it was saved, and whether it had run before."""
    x = torch.randn(5, 48)
    for ran in (False, True):
        for stock in (False, True):
            model = packed_model()
            if ran:
                # INC keeps the recovered weight in the layer, and makes its bias float32
                model(x)
            folder = str(tmp_path / f"{ran} {stock}")
            if stock:
                save(model, folder)
            else:
                model.save(folder)
    torch.save({"x": x, "expected": packed_model()(x)}, tmp_path / "case.pt")
    run_afresh(
        "from neural_compressor.torch.quantization import load\n"
        "from integration_tests.inc_models import Layers\n"
        "case = torch.load(f'{folder}/case.pt')\n"
        "for ran in (False, True):\n"
        "    for stock in (False, True):\n"
        "        model = load(f'{folder}/{ran} {stock}', original_model=Layers())\n"
        "        assert torch.equal(model(case['x']), case['expected']), (ran, stock)\n"
        "        assert model.fc1.bits == 3 and model.fc1.group_size == 16 and model.fc10.bits == 4\n",
        tmp_path,
    )


def test_round_to_nearest_of_inc_can_follow_for_other_layers() -> None:
    model = packed_model()
    before = copy.deepcopy(model.fc1.qweight)
    mixed = quantize(model, RTNConfig(bits=8, group_size=-1, use_layer_wise=False))
    assert torch.equal(mixed.fc1.qweight, before)
    assert mixed.head.bits == 8


def test_loading_needs_the_float_model() -> None:
    with pytest.raises(ValueError, match=r"qconfig\.json"):
        load("nowhere")
