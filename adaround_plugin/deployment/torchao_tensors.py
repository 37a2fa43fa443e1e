"""Learned integers as torchao's quantized tensors in the linear layers of an eager model.

They are what torchao's `quantize_` makes with `IntxWeightOnlyConfig`, `Int8DynamicActivationIntxWeightConfig`,
`Int8WeightOnlyConfig` and `Int8DynamicActivationInt8WeightConfig`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from adaround_plugin.deployment.folded import check_unfolded
from adaround_plugin.errors import InvalidModelError, InvalidOptionError, MissingDependencyError
from adaround_plugin.graph.reparametrized import deep_copy, is_reparametrized
from adaround_plugin.hosts.learned import LearnedLayer, learned_layers
from adaround_plugin.options import check_bool, check_choice
from adaround_plugin.report import get_report, set_report
from adaround_plugin.rounding.grid import Grid, integer_range

try:
    from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor, PerRow
    from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs
except ImportError as error:
    raise MissingDependencyError.of("torchao", "pt2e", error) from error

__all__ = ["to_torchao"]

# each row of the activations gets a range of its own; a plain string, which torchao's safetensors can store
_ROWS = "int8_asym_per_token"


def to_torchao(
    model: nn.Module,
    learned: nn.Module,
    *,
    tensor: Literal["intx", "int8"] = "intx",
    dynamic_activations: bool = False,
    inplace: bool = False,
) -> nn.Module:
    """The float model with torchao's quantized tensors as weights, holding exactly the learned integers.

    Biases become the learned ones, also where there was none. What is no learned linear layer stays in float.

    Args:
        model: the eager model that was exported and prepared, in float32. It is not changed unless `inplace`.
        learned: what `adaround` returned for it, before conversion; every learned layer is a `nn.Linear` of `model`.
        tensor: `"intx"` for `IntxUnpackedToInt8Tensor`: 2 to 8 bits in an int8 each, with channels or groups, symmetric
            or affine; what torchao's `IntxWeightOnlyConfig` makes, and ExecuTorch's language models. `"int8"` for
            `Int8Tensor`, which multiplies integers where activations are dynamic: one scale per row, symmetric.
        dynamic_activations: quantize the inputs of these layers to 8 bits with the range of each row: asymmetric for
            `"intx"`, symmetric for `"int8"`. Activations are in float otherwise, whatever `learned` has.
        inplace: change `model` itself, as a whole, instead of a deep copy.

    Returns:
        The model; `get_report` reads the report from it.

    Raises:
        InvalidOptionError: an argument is none of these, or `"int8"` for a grid that it cannot hold.
        InvalidModelError: `learned` carries no report or is converted, holds a weight that is no linear layer's or a
            grid that no tensor of torchao has, a layer took in a batch norm when it was prepared, or `model` has other
            layers than the one that was learned. (Values are not compared where no batch norm is missing: what is
            learned twice begins with learned weights.)
    """
    check_choice("tensor", tensor, ("intx", "int8"))
    check_bool("dynamic_activations", dynamic_activations)
    check_bool("inplace", inplace)
    if not isinstance(model, nn.Module):
        raise InvalidOptionError("model", f"{type(model).__name__} is no module", "Pass the float model.")
    report = get_report(learned)
    layers = learned_layers(learned)
    modules = dict(model.named_modules(remove_duplicate=False))
    users = {name: _users(modules, name, layer) for name, layer in layers.items()}
    for name, layer in layers.items():
        _check_grid(name, layer.grid, tensor)
    check_unfolded(model, learned, report.weights)
    make = _intx_tensor if tensor == "intx" else _int8_tensor
    parameters: dict[str, dict[str, nn.Parameter]] = {}
    for name, layer in layers.items():
        weight = _parameter(make(layer, dynamic_activations))
        for user in users[name]:
            bias = layer.modules.get(user)
            parameters[user] = {"weight": weight} | ({} if bias is None else {"bias": _parameter(bias.clone())})
    result = model if inplace else deep_copy(model)
    for name, new in parameters.items():
        for leaf, parameter in new.items():
            result.get_submodule(name).register_parameter(leaf, parameter)
    set_report(result, report)
    return result


def _parameter(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)


def _is_linear(module: nn.Module | None) -> bool:
    """Whether a module runs torchao's tensors; that of `nn.MultiheadAttention` does not, and has its own class."""
    return isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear)


def _users(modules: Mapping[str, nn.Module], name: str, layer: LearnedLayer) -> list[str]:
    """The linear layers of the model that have a learned weight, which PT2E knows by one of its names."""
    linear = [user for user in dict.fromkeys((name, *layer.modules)) if _is_linear(modules.get(user))]
    if not linear:
        what = f"a {type(modules[name]).__name__}" if name in modules else "no module of the model"
        raise InvalidModelError(
            f"layer {name!r}",
            f"is {what}, and torchao's tensors go into nn.Linear",
            "Pass the model that was exported, and learn its nn.Linear alone: "
            f"AdaRoundWeightOnlyQuantizer(linear_only=True, layers={{{name!r}: None}}).",
        )
    first, *others = linear
    users = [first, *(user for user in others if modules[user].weight is modules[first].weight)]
    for user in users:
        _check_user(modules[user], user, layer)
    return users


def _check_user(found: nn.Module, name: str, layer: LearnedLayer) -> None:
    """Raise unless a linear layer of the model can take what was learned."""
    weight, problem = found.weight, None
    assert isinstance(weight, Tensor)
    if is_reparametrized(found):
        problem = "computes its weight", "Remove its parametrizations before the export."
    elif weight.shape != layer.integers.shape:
        shapes = f"{tuple(weight.shape)}, the learned one has {tuple(layer.integers.shape)}"
        problem = f"has a weight of {shapes}", "Pass the model that was exported."
    elif weight.dtype != torch.float32 or weight.device != layer.integers.device:
        kinds = f"{weight.dtype} on {weight.device}, learned was float32 on {layer.integers.device}"
        problem = f"is {kinds}", "Move or convert the model before, and back behind."
    elif layer.modules and name not in layer.modules:
        owners = ", ".join(map(repr, layer.modules))
        problem = f"is called with a bias of {owners}, where a learned one cannot go", "Let the bias be its own."
    if problem is not None:
        raise InvalidModelError(f"layer {name!r}", *problem)


def _check_grid(name: str, grid: Grid, tensor: str) -> None:
    """Raise unless a tensor of torchao has such a grid."""
    low, high = integer_range(grid.bits)
    if grid.quant_min < low or grid.quant_max > high or grid.ch_axis not in (None, 0):
        raise InvalidModelError(
            f"layer {name!r}",
            f"has integers from {grid.quant_min} to {grid.quant_max} and scales along axis {grid.ch_axis}; "
            "torchao's tensors hold signed integers with scales of rows or groups",
            "Prepare it with get_adaround_weight_spec().",
        )
    if tensor == "int8" and (bool(grid.zero_point.any()) or grid.group_size is not None):
        raise InvalidOptionError(
            "tensor",
            f"'int8' holds no zero points and no groups, which layer {name!r} has",
            "Pass 'intx', or learn with symmetric=True and without group_size.",
        )


def _by_row(values: Tensor, rows: int) -> Tensor:
    """Scales or zero points `()`, `(rows,)` or `(rows * groups,)` as `(rows, groups)`, in memory of their own."""
    return (
        (values.expand(rows) if values.dim() == 0 else values)
        .reshape(rows, -1)
        .clone(memory_format=torch.contiguous_format)
    )


def _intx_tensor(layer: LearnedLayer, dynamic_activations: bool) -> Tensor:
    integers, grid = layer.integers, layer.grid
    rows, columns = integers.shape
    return IntxUnpackedToInt8Tensor(  # type: ignore[no-any-return]
        integers.to(torch.int8),
        _by_row(grid.scale, rows),
        _by_row(grid.zero_point, rows).to(torch.int8),
        target_dtype=getattr(torch, f"int{grid.bits}"),
        block_size=(1, grid.group_size or columns),
        dtype=torch.float32,
        activation_quantization=_ROWS if dynamic_activations else None,
    )


def _int8_tensor(layer: LearnedLayer, dynamic_activations: bool) -> Tensor:
    integers, grid = layer.integers, layer.grid
    rows, columns = integers.shape
    return Int8Tensor(  # type: ignore[no-any-return]
        integers.to(torch.int8),
        _by_row(grid.scale, rows),
        block_size=[1, columns],
        dtype=torch.float32,
        zero_point=_by_row(grid.zero_point, rows).to(torch.int8),
        act_quant_kwargs=QuantizeTensorToInt8Kwargs(granularity=PerRow()) if dynamic_activations else None,
    )
