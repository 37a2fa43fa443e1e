"""What the host tests share: the flow in one call, and readers of what was learned and of what was converted."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.ao.nn.intrinsic.modules.fused import _FusedModule
from torch.ao.nn.quantized.reference.modules.utils import ReferenceQuantizedModule
from torch.ao.quantization.observer import _is_activation_post_process
from torch.ao.quantization.quantize_fx import prepare_fx

from adaround_plugin import adaround, get_adaround_qconfig_mapping, get_weight_only_backend_config

# one recipe: the trials of "auto" are tested on their own
RECIPE: dict[str, Any] = {"asymmetric": True, "correct_bias": True, "column_weighting": "none", "damping": 0.01}


def images(*shape: int, seed: int = 0) -> Tensor:
    """Normal noise with an offset, so that zero points and biases matter."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.3


def batches(*shape: int, sizes: Sequence[int] = (6, 6, 4)) -> list[Tensor]:
    """Batches of the given sizes, each of samples of `shape`."""
    return [images(size, *shape, seed=i) for i, size in enumerate(sizes)]


def call(model: nn.Module, batch: Any) -> Any:
    """Run a model on a batch as a loader yields it: tensor, tuple (positional) or dict (keywords)."""
    if isinstance(batch, dict):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def prepared_model(
    float_model: nn.Module, data: Sequence[Any], backend: str = "x86", mapping: Any = None, **options: Any
) -> fx.GraphModule:
    """`prepare_fx` and calibration on a copy; `options` go to `get_adaround_qconfig_mapping`."""
    if mapping is None:
        mapping = get_adaround_qconfig_mapping(backend, **options)
    first = data[0]
    example = tuple(first.values()) if isinstance(first, dict) else first if isinstance(first, tuple) else (first,)
    weight_only = options.get("activation_bits", 8) is None
    config = get_weight_only_backend_config() if weight_only else None
    prepared = prepare_fx(copy.deepcopy(float_model).eval(), mapping, example, backend_config=config)
    with torch.no_grad():
        for batch in data:
            call(prepared, copy.deepcopy(batch))
    return prepared


def learn(prepared: nn.Module, data: Any, **options: Any) -> fx.GraphModule:
    """`adaround` with one recipe and no progress bar."""
    return adaround(prepared, data, **{"progress": False, **RECIPE, **options})


@dataclass(frozen=True)
class Quantized:
    """A quantized weight: integers (int64), scale and zero point (one entry or one per channel), axis, and bias."""

    integers: Tensor
    scale: Tensor
    zero_point: Tensor
    axis: int | None
    bias: Tensor | None

    def dequantize(self) -> Tensor:
        """`(q - zero_point) * scale` in float32."""
        view = [1] * self.integers.dim()
        if self.axis is not None:
            view[self.axis] = -1
        return (self.integers - self.zero_point.view(view)).float() * self.scale.float().view(view)


def assert_same(one: Quantized, other: Quantized) -> None:
    """Integers, scale, zero point, axis and bias are equal, exactly."""
    torch.testing.assert_close(one.integers, other.integers, rtol=0, atol=0)
    # packed parameters keep a scale as double: the float32 value of it is what was learned
    torch.testing.assert_close(one.scale.float(), other.scale.float(), rtol=0, atol=0)
    torch.testing.assert_close(one.zero_point, other.zero_point, rtol=0, atol=0)
    assert one.axis == other.axis
    assert (one.bias is None) == (other.bias is None)
    if one.bias is not None:
        torch.testing.assert_close(one.bias.detach(), other.bias.detach(), rtol=0, atol=0)


def _inner(module: nn.Module) -> nn.Module:
    return module[0] if isinstance(module, _FusedModule) else module


def learned(model: fx.GraphModule, name: str) -> Quantized:
    """What `adaround` left in the prepared model for a weighted node: its weight must lie on the observer's grid."""
    path, _, leaf = name.rpartition(".")
    found = getattr(model.get_submodule(path), leaf)
    if isinstance(found, nn.Module):
        module = _inner(found)
        assert module.qconfig is found.qconfig
        weight, bias, observer = module.weight.detach(), module.bias, found.qconfig.weight()
        observer(weight)
    else:
        weight, bias = found.detach(), None
        users = [user for n in model.graph.nodes if n.op == "get_attr" and n.target == name for user in n.users]
        observers = {model.get_submodule(str(user.target)) for user in users if user.op == "call_module"}
        assert len(observers) == 1
        observer = observers.pop()
        calls = {user for node in users for user in node.users}
        biases = {n.args[2] if len(n.args) > 2 else n.kwargs.get("bias") for n in calls}
        if len(biases) == 1 and isinstance(node := biases.pop(), fx.Node):
            while node.op == "call_module":
                node = node.args[0]
            bias = getattr(model, str(node.target)).detach()
    scale, zero_point = observer.calculate_qparams()
    per_channel = observer.qscheme in (torch.per_channel_symmetric, torch.per_channel_affine)
    axis = observer.ch_axis if per_channel else None
    assert _is_activation_post_process(observer)
    view = [1] * weight.dim()
    if axis is not None:
        view[axis] = -1
    coordinates = weight.double() / scale.double().view(view) + zero_point.view(view)
    integers = coordinates.round().long()
    assert int(integers.min()) >= observer.quant_min
    assert int(integers.max()) <= observer.quant_max
    result = Quantized(integers, scale, zero_point.long(), axis, bias)
    # on the grid, to the last bit
    assert torch.equal(result.dequantize(), weight)
    return result


def _of_tensor(weight: Tensor, bias: Tensor | None) -> Quantized:
    """A quantized tensor of torch."""
    if weight.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric):
        return Quantized(
            weight.int_repr().long(),
            weight.q_per_channel_scales(),
            weight.q_per_channel_zero_points().long(),
            weight.q_per_channel_axis(),
            bias,
        )
    scale, zero_point = torch.tensor([weight.q_scale()]), torch.tensor([weight.q_zero_point()])
    return Quantized(weight.int_repr().long(), scale, zero_point, None, bias)


def converted(model: fx.GraphModule, name: str) -> Quantized:
    """What a native or reference conversion holds for a module."""
    outer = model.get_submodule(name)
    module = outer[0] if isinstance(outer, nn.Sequential) else outer
    if isinstance(module, ReferenceQuantizedModule):
        return _of_tensor(module.get_quantized_weight().detach(), module.bias)
    assert callable(module.weight), f"{name} stayed float: {type(module)}"
    return _of_tensor(module.weight(), module.bias())


_UNPACK = {
    torch.ops.quantized.linear: torch.ops.quantized.linear_unpack,
    torch.ops.quantized.conv1d: torch.ops.quantized.conv1d_unpack,
    torch.ops.quantized.conv2d: torch.ops.quantized.conv2d_unpack,
    torch.ops.quantized.conv3d: torch.ops.quantized.conv3d_unpack,
    torch.ops.quantized.conv_transpose1d: torch.ops.quantized.conv_transpose1d_unpack,
    torch.ops.quantized.conv_transpose2d: torch.ops.quantized.conv_transpose2d_unpack,
    torch.ops.quantized.conv_transpose3d: torch.ops.quantized.conv_transpose3d_unpack,
}
_UNPACK.update(
    {
        getattr(torch.ops.quantized, f"{op.__name__}_relu"): unpack
        for op, unpack in list(_UNPACK.items())
        if "transpose" not in op.__name__
    }
)


def converted_function(model: fx.GraphModule) -> list[Quantized]:
    """What a native conversion holds for its functional operators, in graph order."""
    found = []
    for node in model.graph.nodes:
        if node.op == "call_function" and node.target in _UNPACK:
            packed = getattr(model, str(node.args[1].target))
            weight, bias = _UNPACK[node.target](packed)
            found.append(_of_tensor(weight, bias))
    return found


_FUNCTIONS = {
    F.linear,
    *(getattr(torch, f"conv{d}d") for d in (1, 2, 3)),
    *(getattr(torch, f"conv_transpose{d}d") for d in (1, 2, 3)),
}


def reference_function(model: fx.GraphModule) -> list[Quantized]:
    """What a reference conversion quantizes for its functional operators, in graph order."""
    found = []
    for node in model.graph.nodes:
        if node.op != "call_function" or node.target not in _FUNCTIONS:
            continue
        weight, bias = (
            node.args[i] if len(node.args) > i else node.kwargs.get(("", "weight", "bias")[i]) for i in (1, 2)
        )
        assert weight.target == "dequantize", f"{node} stayed float"
        weight = weight.args[0]
        values = [getattr(model, str(arg.target)) if isinstance(arg, fx.Node) else arg for arg in weight.args]
        values[0] = values[0].detach()
        bias = None if bias is None else getattr(model, str(bias.target)).detach()
        found.append(_of_tensor(weight.target(*values), bias))
    return found


class Functional(nn.Module):
    """A functional operator on parameters, with or without a bias."""

    def __init__(self, op: Any, weight_shape: Sequence[int], *arguments: Any, bias: int | None, relu: bool = False):
        super().__init__()
        self.op, self.arguments, self.relu = op, arguments, relu
        self.weight = nn.Parameter(torch.randn(*weight_shape) * 0.3)
        self.bias = None if bias is None else nn.Parameter(torch.randn(bias))

    def forward(self, x: Tensor) -> Tensor:
        x = self.op(x, self.weight, self.bias, *self.arguments)
        return F.relu(x) if self.relu else x


def observer_state(model: nn.Module) -> dict[str, Tensor]:
    """The statistics of every activation observer (weights of functional calls excepted by the caller)."""
    return {
        f"{name}.{key}": value.clone()
        for name, module in model.named_modules()
        if _is_activation_post_process(module)
        for key, value in module.state_dict().items()
        if isinstance(value, Tensor)
    }


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, cloned."""
    return {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def assert_unchanged(before: dict[str, Tensor], model: nn.Module) -> None:
    """The model's parameters and buffers are those of the snapshot, bit for bit."""
    after = snapshot(model)
    assert before.keys() == after.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=0, equal_nan=True, msg=name)
