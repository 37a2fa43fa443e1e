"""Learned integers into Neural Compressor's packed linear layers, which its own save() and load() know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from adaround_plugin.errors import InvalidModelError
from adaround_plugin.inc.compat import INCWeightOnlyLinear, RTNConfig, save_weight_only

__all__ = ["IntegerLinear", "pack"]


@dataclass(frozen=True)
class IntegerLinear:
    """The weight of a linear layer on its grid: `(integers - zero_point) * scale`, group by group of columns.

    Attributes:
        integers: `(out, in)`, each in `[-2^(bits-1), 2^(bits-1) - 1]`.
        scale: `(out, groups)` float32, of values that float16 has: INC stores no others.
        zero_point: `(out, groups)` in the range of the integers, or None for zero.
        bits: 2 to 8; at 8, INC's arithmetic overflows where `integers - zero_point` leaves the range of int8.
        group_size: columns in a group (the last one may have fewer); -1 for one group.
        bias: `(out,)`, or None to keep the layer's own. INC rounds it to float16.
    """

    integers: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int
    group_size: int = -1
    bias: Tensor | None = None


def pack(model: nn.Module, layers: Mapping[str, IntegerLinear]) -> nn.Module:
    """Replace linear layers of `model`, in place, by packed ones: all, or, where that is interrupted, none.

    A packed layer multiplies by `(integers - zero_point) * scale` rounded to float16: that is INC's own arithmetic.

    Args:
        model: the float model.
        layers: weights by qualified name; a layer known by several names is replaced under each.

    Returns:
        `model`, with the attributes that INC's `save` asks for.

    Raises:
        InvalidModelError: a scale is not a float16 number.
    """
    labels = _labels(model, layers)
    packed = {id(model.get_submodule(name)): _packed(name, model, weight) for name, weight in layers.items()}
    named = model.named_modules(remove_duplicate=False)
    replaced = {name: module for name, module in named if id(module) in packed}
    try:
        for name, module in replaced.items():
            model.set_submodule(name, packed[id(module)])
    except BaseException:
        for name, module in replaced.items():
            model.set_submodule(name, module)
        raise
    result: Any = model
    result.qconfig = labels
    result.save = MethodType(save_weight_only, model)
    return model


def _packed(name: str, model: nn.Module, weight: IntegerLinear) -> nn.Module:
    linear: Any = model.get_submodule(name)
    if not torch.equal(weight.scale.half().float(), weight.scale):
        raise InvalidModelError(name, "has scales that float16 lacks", "Round them before the integers are learned.")
    outputs, inputs = weight.integers.shape
    packed = INCWeightOnlyLinear(
        inputs, outputs, bits=weight.bits, group_size=weight.group_size, zp=True, bias=True, device=weight.scale.device
    )
    # INC's storage is unsigned
    shift = 2 ** (weight.bits - 1)
    zero_point = torch.zeros_like(weight.scale) if weight.zero_point is None else weight.zero_point
    bias = linear.bias if weight.bias is None else weight.bias
    bias = None if bias is None else bias.detach()
    packed.pack(weight.integers.int() + shift, weight.scale, zero_point.int() + shift, bias)
    return packed.eval()  # type: ignore[no-any-return]


def _labels(model: nn.Module, layers: Mapping[str, IntegerLinear]) -> dict[tuple[str, str], Any]:
    """The configuration of each layer as INC's load() reads it: that of round-to-nearest, the storage is the same.

    load() takes the last entry whose name *contains* that of the layer: the layer's own must come after longer ones.
    """
    return {
        (name, type(model.get_submodule(name)).__name__): RTNConfig(
            bits=weight.bits, group_size=weight.group_size, use_sym=weight.zero_point is None
        )
        for name, weight in sorted(layers.items(), key=lambda entry: len(entry[0]), reverse=True)
    }
