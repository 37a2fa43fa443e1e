"""An eager model with the observers that a configuration asks for."""

from __future__ import annotations

import torch
from torch import fx, nn
from torch.ao.quantization import QConfig, QConfigMapping
from torch.ao.quantization.quantize_fx import prepare_fx

from adaround_plugin.errors import InvalidModelError
from adaround_plugin.graph.reparametrized import deep_copy
from adaround_plugin.hosts.fx.qconfig import get_adaround_qconfig_mapping
from adaround_plugin.inc.compat import TorchBaseConfig
from adaround_plugin.inc.parts import ROOT, Parts, own_parts

__all__ = ["observed"]


def observed(model: nn.Module, parts: Parts) -> fx.GraphModule:
    """`prepare_fx` with the observers that the parts of a configuration ask for, for torch's quantized engine.

    Raises:
        InvalidModelError: `model` is in train mode.
    """
    if model.training:
        raise InvalidModelError("model", "is in train mode", "Call .eval() first.")
    # prepare_fx leaves qconfigs in the modules of the model, some of which cannot be pickled
    return prepare_fx(deep_copy(model), _mapping(model, parts), ())


def _mapping(model: nn.Module, parts: Parts) -> QConfigMapping:
    whole = parts.get(ROOT)
    mapping = QConfigMapping() if whole is None or whole.dtype == "fp32" else _whole_mapping(whole)
    # one qconfig object for all that share one: prepare_fx fuses a convolution and its ReLU only then
    for (name, _), part in own_parts(parts).items():
        mapping.set_module_name(name, _qconfig(model.get_submodule(name), part))
    return mapping


def _whole_mapping(part: TorchBaseConfig) -> QConfigMapping:
    return get_adaround_qconfig_mapping(
        torch.backends.quantized.engine,
        weight_bits=part.bits,
        per_channel=part.w_granularity == "per_channel",
        symmetric=part.use_sym,
    )


def _qconfig(module: nn.Module, part: TorchBaseConfig) -> QConfig | None:
    if part.dtype == "fp32":
        return None
    mapping = _whole_mapping(part)
    return mapping.object_type_qconfigs.get(type(module), mapping.global_qconfig)
