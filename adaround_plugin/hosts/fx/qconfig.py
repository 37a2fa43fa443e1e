"""Qconfig mappings and the backend configuration that put the AdaRound observer into `prepare_fx`."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping

import torch
from torch import nn
from torch.ao.quantization import QConfig, QConfigMapping, get_default_qconfig_mapping
from torch.ao.quantization.backend_config import BackendConfig, DTypeConfig, get_native_backend_config
from torch.ao.quantization.observer import HistogramObserver, PlaceholderObserver

from adaround_plugin.errors import InvalidOptionError
from adaround_plugin.hosts.fx.observers import AdaRoundActivationObserver, AdaRoundObserver
from adaround_plugin.names import compiled, select
from adaround_plugin.options import check_bool, check_choice, check_mapping
from adaround_plugin.rounding.grid import check_bits, is_symmetric_by_default

__all__ = ["get_adaround_qconfig_mapping", "get_weight_only_backend_config"]

LayerBits = int | tuple[int, int]

_BACKENDS = ("x86", "fbgemm", "onednn", "qnnpack")
_TRANSPOSED_MODULES = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_TRANSPOSED_FUNCTIONS = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)


def get_adaround_qconfig_mapping(
    backend: str = "x86",
    weight_bits: int = 4,
    activation_bits: int | None = 8,
    per_channel: bool = True,
    symmetric: bool | None = None,
    layer_bits: Mapping[str, LayerBits] | None = None,
    model: nn.Module | None = None,
) -> QConfigMapping:
    """The backend's default mapping with the AdaRound observer as weight observer of every weighted operator.

    Args:
        backend: `"x86"`, `"fbgemm"`, `"onednn"` or `"qnnpack"`; decides the activation observer.
        weight_bits: 2 to 8.
        activation_bits: 8 for the backend's own activation observer; 2 to 7 for AdaRound's (operators with a fixed
            output range, such as softmax, keep 8 bits); None for weight-only quantization, then also pass
            `backend_config=get_weight_only_backend_config()` to `prepare_fx` and `convert_to_reference_fx`.
        per_channel: one scale per output channel, else one per weight. Transposed convolutions get one per weight
            where activations are quantized, since no native kernel of torch takes more.
        symmetric: zero point 0, else affine. None takes what is more accurate: affine for weights of 2 and 3 bits,
            symmetric for more, and for onednn, which takes no other where activations are quantized.
        layer_bits: for single layers by qualified name (or the name of a parent module) or regular expression, the
            bits of the weights, or a pair of these and the bits of the activations: those that come out of the layer,
            and those that enter it straight from the model's input.
        model: the float model; checks the names of `layer_bits`, and is needed when one of them is a transposed
            convolution or an operator with a fixed output range, or has such modules below it: these want observers of
            their own.

    Raises:
        InvalidOptionError: unknown backend, bits out of range, or a name in `layer_bits` that `model` lacks.
    """
    check_choice("backend", backend, _BACKENDS)
    check_bool("per_channel", per_channel)
    check_choice("symmetric", symmetric, (None, True, False))
    if layer_bits is not None:
        check_mapping("layer_bits", layer_bits)
    if model is not None and not isinstance(model, nn.Module):
        raise InvalidOptionError("model", f"{model!r} is no module", "Pass the float model.")
    weight_only = activation_bits is None
    takes_affine = backend != "onednn" or weight_only
    if symmetric is False and not takes_affine:
        raise InvalidOptionError("symmetric", "onednn kernels need zero point 0", "Pass symmetric=True.")
    check_bits(weight_bits, "weight_bits")
    mapping = QConfigMapping() if weight_only else get_default_qconfig_mapping(backend)
    default = mapping.global_qconfig
    own = PlaceholderObserver.with_args(dtype=torch.float) if default is None else default.activation

    def qconfig(bits: int, observed_bits: int | None, transposed: bool) -> QConfig:
        channels = per_channel and (weight_only or not transposed)
        is_symmetric = not takes_affine or is_symmetric_by_default(bits) if symmetric is None else symmetric
        if channels:
            scheme = torch.per_channel_symmetric if is_symmetric else torch.per_channel_affine
        else:
            scheme = torch.per_tensor_symmetric if is_symmetric else torch.per_tensor_affine
        observer = AdaRoundObserver.with_args(bits=bits, qscheme=scheme, ch_axis=1 if channels and transposed else 0)
        activation = own if observed_bits in (8, None) else AdaRoundActivationObserver.with_args(bits=observed_bits)
        return QConfig(activation=activation, weight=observer)  # type: ignore[no-untyped-call]

    if activation_bits is not None and check_bits(activation_bits, "activation_bits") < 8:
        _narrow(mapping, activation_bits)
    mapping.set_global(qconfig(weight_bits, activation_bits, transposed=False))
    transposed_qconfig = qconfig(weight_bits, activation_bits, transposed=True)
    for kind in (*_TRANSPOSED_MODULES, *_TRANSPOSED_FUNCTIONS):
        mapping.set_object_type(kind, transposed_qconfig)
    for pattern, given in (layer_bits or {}).items():
        argument = f"layer_bits[{pattern!r}]"
        bits = _layer_bits(given, activation_bits, argument)
        if model is not None:
            known = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
            for name in select(pattern, known, argument):
                module = model.get_submodule(name)
                transposed = isinstance(module, _TRANSPOSED_MODULES)
                # operators that need a qconfig of their own, such as softmax, keep it
                apart = None if transposed else mapping.object_type_qconfigs.get(type(module))
                mapping.set_module_name(name, apart or qconfig(*bits, transposed))
        elif re.fullmatch(r"[\w.]*", pattern):
            mapping.set_module_name(pattern, qconfig(*bits, transposed=False))
        else:
            # torch matches a prefix; this is the whole name, or that of a parent
            whole = rf"(?:{compiled(pattern, argument).pattern})(?:\..*)?$"
            mapping.set_module_name_regex(whole, qconfig(*bits, transposed=False))
    return mapping


def _layer_bits(given: LayerBits, activation_bits: int | None, argument: str) -> tuple[int, int | None]:
    """The bits of a layer's weights and activations."""
    if not isinstance(given, tuple):
        return check_bits(given, argument), activation_bits
    if len(given) != 2 or activation_bits is None:
        raise InvalidOptionError(
            argument, f"{given!r} does not fit", "Pass the bits of the weights, or a pair where activations have bits."
        )
    return check_bits(given[0], argument), check_bits(given[1], argument)


def _narrow(mapping: QConfigMapping, bits: int) -> None:
    """Give the operators whose activation observer the backend sets apart, but for a fixed range, the narrow one."""
    for kind, qconfig in mapping.object_type_qconfigs.items():
        if qconfig is None:
            continue
        with warnings.catch_warnings():
            # the host's advice on a range that is not used
            warnings.simplefilter("ignore")
            is_ranged = isinstance(qconfig.activation(), HistogramObserver)
        if is_ranged:
            observer = AdaRoundActivationObserver.with_args(bits=bits)
            mapping.set_object_type(kind, QConfig(activation=observer, weight=qconfig.weight))  # type: ignore[no-untyped-call]


def get_weight_only_backend_config() -> BackendConfig:
    """A backend for float activations and integer weights: convolutions and linear layers, with what fuses into them.

    Pass it to `prepare_fx` and `convert_to_reference_fx` beside a mapping with `activation_bits=None`.
    """
    weight_only = DTypeConfig(
        input_dtype=torch.float, output_dtype=torch.float, weight_dtype=torch.qint8, bias_dtype=torch.float
    )
    result = BackendConfig("adaround_weight_only")
    for config in get_native_backend_config().configs:
        if any(dtypes.weight_dtype == torch.qint8 and not dtypes.is_dynamic for dtypes in config.dtype_configs):
            config = copy.copy(config)
            config.dtype_configs = [weight_only]
            result.set_backend_pattern_config(config)
    return result
