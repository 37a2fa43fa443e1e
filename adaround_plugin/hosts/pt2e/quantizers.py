"""Quantizer settings of the PT2E flow that use AdaRound's observers, and a quantizer for weights only."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import fx
from torchao.quantization.pt2e.quantizer import QuantizationConfig, QuantizationSpec, Quantizer
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import get_default_x86_inductor_quantization_config

from adaround_plugin.errors import InvalidOptionError
from adaround_plugin.graph.arguments import argument
from adaround_plugin.graph.operators import is_linear, is_transposed
from adaround_plugin.hosts.pt2e.compat import annotate_inputs
from adaround_plugin.hosts.pt2e.layer_options import LayerOptions, check_layers, layer_names, options_by_name
from adaround_plugin.hosts.pt2e.observers import AdaRoundActivationObserver, AdaRoundGroupObserver, AdaRoundObserver
from adaround_plugin.hosts.weight_observers import check_weight_grid
from adaround_plugin.options import check_bool, check_choice, check_integer
from adaround_plugin.rounding.grid import check_bits, integer_range, is_symmetric_by_default

__all__ = ["AdaRoundWeightOnlyQuantizer", "get_adaround_weight_spec", "get_adaround_x86_inductor_config"]


def get_adaround_weight_spec(
    weight_bits: int = 4,
    per_channel: bool = True,
    symmetric: bool | None = True,
    ch_axis: int = 0,
    group_size: int | None = None,
    scale: Literal["mse", "minmax"] = "mse",
    scale_dtype: torch.dtype = torch.float32,
) -> QuantizationSpec:
    """The weight specification with AdaRound's observer, for the annotations or configuration of any quantizer.

    Args:
        weight_bits: 2 to 8; integers in `[-2^(b-1), 2^(b-1) - 1]`, stored as int8.
        per_channel: one scale per channel along `ch_axis`, else one per weight.
        symmetric: zero point 0, which most backends ask for, else affine. None takes what is more accurate: affine for
            2 and 3 bits, symmetric for more.
        ch_axis: 0, or 1 for transposed convolutions.
        group_size: for linear layers, entries of a row that share a scale; it divides the row. None for whole rows.
        scale: the observer's own choice of scale, `"mse"` or `"minmax"`.
        scale_dtype: scales are rounded to numbers of this dtype, for a host that stores them so.

    Raises:
        InvalidOptionError: bits out of range, an unknown scale, or groups where there is one scale per tensor.
    """
    check_bits(weight_bits, "weight_bits")
    check_bool("per_channel", per_channel)
    check_choice("symmetric", symmetric, (None, True, False))
    check_weight_grid(ch_axis, scale, scale_dtype)
    observer = AdaRoundObserver.with_args(ch_axis=ch_axis, scale=scale, scale_dtype=scale_dtype)
    if group_size is not None:
        check_integer("group_size", group_size, least=1)
        if not per_channel or ch_axis:
            raise InvalidOptionError("group_size", "is for rows of a matrix", "Leave per_channel and ch_axis alone.")
        observer = AdaRoundGroupObserver.with_args(group_size=group_size, scale=scale, scale_dtype=scale_dtype)
    low, high = integer_range(weight_bits)
    if symmetric is None:
        symmetric = is_symmetric_by_default(weight_bits)
    if per_channel:
        qscheme = torch.per_channel_symmetric if symmetric else torch.per_channel_affine
    else:
        qscheme = torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine
    return QuantizationSpec(
        dtype=torch.int8,
        quant_min=low,
        quant_max=high,
        qscheme=qscheme,
        ch_axis=ch_axis if per_channel else None,
        is_dynamic=False,
        observer_or_fake_quant_ctr=observer,
    )


def get_adaround_x86_inductor_config(
    weight_bits: int = 4,
    activation_bits: int | None = 8,
    per_channel: bool = True,
    is_dynamic: bool = False,
) -> QuantizationConfig:
    """A configuration of `X86InductorQuantizer` with AdaRound's weight observer beside its own activation observers.

    Pass it to `set_global`, `set_module_name_qconfig` and their like.

    Args:
        weight_bits: 2 to 8, symmetric.
        activation_bits: 8 for the quantizer's own activation observers; 2 to 7 for AdaRound's, or where dynamic for the
            range of each batch on that many bits; None for weight-only quantization.
        per_channel: one scale per output channel, else one per weight.
        is_dynamic: activations are quantized with the range of each batch (linear layers only).

    Raises:
        InvalidOptionError: bits out of range.
    """
    check_bool("is_dynamic", is_dynamic)
    if is_dynamic and activation_bits is None:
        raise InvalidOptionError("is_dynamic", "there are no activations to quantize", "Pass activation_bits=8.")
    default = get_default_x86_inductor_quantization_config(is_dynamic=is_dynamic)
    entering, leaving = default.input_activation, default.output_activation
    if activation_bits is None:
        entering = leaving = None
    elif check_bits(activation_bits, "activation_bits") < 8:
        entering, leaving = _narrow(entering, activation_bits), _narrow(leaving, activation_bits)
    return QuantizationConfig(
        input_activation=entering,
        output_activation=leaving,
        weight=get_adaround_weight_spec(weight_bits, per_channel, symmetric=True),
        bias=default.bias,
    )


def _narrow(spec: QuantizationSpec | None, bits: int) -> QuantizationSpec | None:
    """The specification of an activation for fewer bits."""
    if spec is None:
        return None
    observer = spec.observer_or_fake_quant_ctr
    if not spec.is_dynamic:
        observer = AdaRoundActivationObserver.with_args(eps=2**-12)
    return replace(spec, quant_min=0, quant_max=2**bits - 1, observer_or_fake_quant_ctr=observer)


class AdaRoundWeightOnlyQuantizer(Quantizer):
    """Quantizes the weights of linear layers and convolutions, transposed ones included, and no activations.

    Args:
        layers: for layers by qualified name, name of a parent, or regular expression, the options that differ, such as
            `{"head": {"weight_bits": 8}}`; None leaves a layer in float. The last entry that matches counts.
        linear_only: leave convolutions in float.
        **options: of `get_adaround_weight_spec`, for all layers, but `symmetric` is None unless given. Convolutions
            ignore `group_size`, and `ch_axis` is set for each operator.

    Raises:
        InvalidOptionError: an option is out of range; at `prepare_pt2e`, where a name in `layers` matches nothing.
    """

    def __init__(self, layers: LayerOptions | None = None, linear_only: bool = False, **options: Any) -> None:
        super().__init__()
        check_bool("linear_only", linear_only)
        # complains now, if it must
        _check_options(options)
        self.layers, self.linear_only = check_layers(layers, _check_options), linear_only
        self.options = {"symmetric": None, **options}

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        """Called by `prepare_pt2e`."""
        names = layer_names(model)
        options = options_by_name(model, names.values(), self.options, self.layers)
        for node, name in names.items():
            given = options[name]
            linear = is_linear(node.target)
            if given is None or (self.linear_only and not linear):
                continue
            fitting = {"ch_axis": 0} if linear else {"ch_axis": int(is_transposed(node)), "group_size": None}
            spec = get_adaround_weight_spec(**{**given, **fitting})
            annotate_inputs(node, {argument(node, 1, "weight"): spec})
        return model

    def validate(self, model: fx.GraphModule) -> None:
        """Called by `prepare_pt2e`; every annotation is fine for every operator."""


def _check_options(options: Mapping[str, Any]) -> None:
    """Raise `InvalidOptionError` unless `get_adaround_weight_spec` takes these options."""
    known = list(inspect.signature(get_adaround_weight_spec).parameters)
    for name in options:
        check_choice("options", name, known)
    get_adaround_weight_spec(**options)
