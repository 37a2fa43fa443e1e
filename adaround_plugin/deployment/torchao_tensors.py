"""Learned integers as torchao's quantized tensors in the linear layers of an eager model."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from adaround_plugin.errors import InvalidModelError, InvalidOptionError, MissingDependencyError
from adaround_plugin.graph.compat import Normalization
from adaround_plugin.graph.reparametrized import deep_copy
from adaround_plugin.hosts.open import LearnedLayer, is_exported, learned_layers
from adaround_plugin.options import check_bool, check_choice
from adaround_plugin.report import KEY, get_report

try:
    from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor, PerRow
    from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs
    from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import (
        IntxUnpackedToInt8TensorActivationQuantization,
    )
except ImportError as error:
    raise MissingDependencyError(
        "torchao", f"cannot be imported ({error})", "Run: pip install 'adaround_plugin[pt2e]'."
    ) from error

__all__ = ["to_torchao"]

# each row of the activations gets a range of its own
_ROWS = IntxUnpackedToInt8TensorActivationQuantization.INT8_ASYM_PER_TOKEN


def to_torchao(
    model: nn.Module,
    learned: nn.Module,
    *,
    tensor: Literal["intx", "int8"] = "intx",
    dynamic_activations: bool = False,
    inplace: bool = False,
) -> nn.Module:
    """The float model with torchao's quantized tensors as weights, holding exactly the learned integers.

    Biases become the learned ones. What is no learned linear layer stays in float.

    Args:
        model: the eager model that was exported and prepared, in float32. It is not changed unless `inplace`.
        learned: what `adaround` returned for it, before conversion; every learned layer is a `nn.Linear` of `model`.
        tensor: `"intx"` for `IntxUnpackedToInt8Tensor`: 2 to 8 bits in an int8 each, with channels or groups, symmetric
            or affine; what torchao's `IntxWeightOnlyConfig` makes, and ExecuTorch's language models. `"int8"` for
            `Int8Tensor`, which has 8-bit kernels: one scale per row, symmetric.
        dynamic_activations: quantize the inputs of these layers to 8 bits with the range of each row: asymmetric for
            `"intx"`, symmetric for `"int8"`. Activations are in float otherwise, whatever `learned` has.
        inplace: change `model` itself, as a whole, instead of a deep copy.

    Returns:
        The model; `get_report` reads the report from it.

    Raises:
        InvalidOptionError: an argument is none of these, or `"int8"` for a grid that it cannot hold.
        InvalidModelError: `learned` carries no report or is converted, or `model` is not the one that was learned.
    """
    check_choice("tensor", tensor, ("intx", "int8"))
    check_bool("dynamic_activations", dynamic_activations)
    check_bool("inplace", inplace)
    if not isinstance(model, nn.Module):
        raise InvalidOptionError("model", f"{type(model).__name__} is no module", "Pass the float model.")
    report = get_report(learned)
    layers = learned_layers(learned)
    for name, layer in layers.items():
        _check(model, name, layer)
    _check_unfolded(model, learned)
    make = _intx_tensor if tensor == "intx" else _int8_tensor
    # tied layers share their weight
    weights = {id(layer): _parameter(make(name, layer, dynamic_activations)) for name, layer in layers.items()}
    biases = {id(layer): _parameter(layer.bias.clone()) for layer in layers.values() if layer.bias is not None}
    result = model if inplace else deep_copy(model)
    for name, layer in layers.items():
        linear = result.get_submodule(name)
        linear.register_parameter("weight", weights[id(layer)])
        if id(layer) in biases:
            linear.register_parameter("bias", biases[id(layer)])
    vars(result)[KEY] = report
    return result


def _parameter(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)


def _check(model: nn.Module, name: str, layer: LearnedLayer) -> None:
    """Raise unless a learned layer is a linear layer of the model."""
    found = dict(model.named_modules(remove_duplicate=False)).get(name)
    if not isinstance(found, nn.Linear):
        what = "no module of the model" if found is None else f"a {type(found).__name__}"
        raise InvalidModelError(
            f"layer {name!r}",
            f"is {what}, and torchao's tensors go into nn.Linear",
            "Pass the model that was exported, and learn with AdaRoundWeightOnlyQuantizer(linear_only=True).",
        )
    if found.weight.shape != layer.integers.shape:
        raise InvalidModelError(
            f"layer {name!r}",
            f"has a weight of {tuple(found.weight.shape)}, the learned one has {tuple(layer.integers.shape)}",
            "Pass the model that was exported.",
        )
    if found.weight.dtype != torch.float32 or found.weight.device != layer.integers.device:
        raise InvalidModelError(
            f"layer {name!r}",
            f"is {found.weight.dtype} on {found.weight.device}, learned was float32 on {layer.integers.device}",
            "Move or convert the model before.",
        )


def _check_unfolded(model: nn.Module, learned: nn.Module) -> None:
    """Raise if `prepare_fx` folded a batch norm into a layer: the model would apply it twice."""
    if is_exported(learned):
        return  # prepare_pt2e folds them into convolutions alone
    left = dict(learned.named_modules())
    for name, module in model.named_modules():
        if isinstance(module, Normalization) and name not in left:
            raise InvalidModelError(
                f"module {name!r}",
                "was folded into a layer by prepare_fx",
                "Use the PT2E flow, or fold it into the float model before.",
            )


def _by_row(values: Tensor, rows: int) -> Tensor:
    """Scales or zero points `()`, `(rows,)` or `(rows * groups,)` as `(rows, groups)`."""
    return (values.expand(rows) if values.dim() == 0 else values).reshape(rows, -1)


def _intx_tensor(name: str, layer: LearnedLayer, dynamic_activations: bool) -> Tensor:
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


def _int8_tensor(name: str, layer: LearnedLayer, dynamic_activations: bool) -> Tensor:
    integers, grid = layer.integers, layer.grid
    if bool(grid.zero_point.any()) or grid.group_size is not None:
        raise InvalidOptionError(
            "tensor",
            f"'int8' holds no zero points and no groups, which layer {name!r} has",
            "Pass 'intx', or learn with symmetric=True and without group_size.",
        )
    return Int8Tensor(  # type: ignore[no-any-return]
        integers.to(torch.int8),
        _by_row(grid.scale, integers.shape[0]),
        block_size=[1, integers.shape[1]],
        dtype=torch.float32,
        act_quant_kwargs=QuantizeTensorToInt8Kwargs(granularity=PerRow()) if dynamic_activations else None,
    )
