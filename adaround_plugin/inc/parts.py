"""Which part of a configuration applies to which layer."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from adaround_plugin.errors import InvalidOptionError
from adaround_plugin.inc.compat import LM_HEAD_NAMES, TorchBaseConfig
from adaround_plugin.inc.layers import Layer, is_type, selected
from adaround_plugin.inc.parameters import LAYER_PARAMETERS, PASS_PARAMETERS, method_of

__all__ = [
    "META",
    "ROOT",
    "Parts",
    "blocks_of",
    "float_activations",
    "model_path_of",
    "own_parts",
    "pass_options",
    "resolve",
]

# a configuration for each layer, in INC's own form
Parts = Mapping[Layer, TorchBaseConfig]

# the entry that stands for what has no name of its own: functional calls
ROOT: Layer = ("", "")

# where a quantized model keeps its parts: meta survives a deep copy, attributes of a GraphModule do not
META = "adaround_parts"


def resolve(configs: Sequence[TorchBaseConfig], layers: Sequence[Layer]) -> OrderedDict[Layer, TorchBaseConfig]:
    """The part that applies to each layer: the last local one that selects it by name, else by type, else the global.

    Args:
        configs: their parts apply in turn; the first says what holds for the whole pass.
        layers: to choose from.

    Raises:
        InvalidOptionError: a local part selects no layer, nothing selects any, a parameter is still a list, or a
            local part differs in what holds for the whole pass.
    """
    chosen: OrderedDict[Layer, TorchBaseConfig] = OrderedDict()
    for config in configs:
        if config.global_config is not None:
            chosen.update(dict.fromkeys([ROOT, *layers], config.global_config))
        for by_type in (True, False):
            for key, part in config.local_config.items():
                if is_type(key, layers) == by_type:
                    chosen.update(dict.fromkeys(selected(key, layers), part))
    if not chosen:
        raise InvalidOptionError("white_list", "selects no layer, and no local part does", "Name some layers.")
    completed = OrderedDict((layer, _completed(part, configs[0])) for layer, part in chosen.items())
    for (name, kind), part in completed.items():
        if not part.quant_lm_head and any(re.match(pattern, name) for pattern in LM_HEAD_NAMES):
            completed[name, kind] = type(part)(**{**part.get_params_dict(), "dtype": "fp32"}, white_list=None)
    return completed


def _completed(part: TorchBaseConfig, whole: TorchBaseConfig) -> TorchBaseConfig:
    """`part` with the settings that hold for the whole pass, ready for it."""
    default = type(part)(white_list=None)
    names = [parameter.name for parameter in PASS_PARAMETERS]
    for name in names:
        if getattr(part, name) not in (getattr(whole, name), getattr(default, name)):
            raise InvalidOptionError(name, "holds for the whole pass", "Set it in the global part only.")
    shared = {name: getattr(whole, name) for name in names}
    completed = type(part)(**{**part.get_params_dict(), **shared}, white_list=None)
    for name, value in completed.get_params_dict().items():
        if isinstance(value, list):
            raise InvalidOptionError(
                name, f"is the list {value}", "Pass one value: autotune tries lists of the global part."
            )
    if completed.group_size != -1 and completed.act_dtype != "fp32":
        raise InvalidOptionError("group_size", "integer kernels know no groups", "Pass act_dtype='fp32', or -1.")
    if completed.blocks is not None and completed.act_dtype != "fp32":
        raise InvalidOptionError("blocks", "are learned with activations in float", "Pass act_dtype='fp32', or None.")
    if completed.model_path is not None and completed.blocks is None:
        raise InvalidOptionError("model_path", "is read block by block", "Pass blocks=, or leave it out.")
    return completed


def own_parts(parts: Parts) -> Parts:
    """The parts of layers that ask for something else than the part of all others; of all layers, if that is float.

    Hosts quantize several operators as one only where they have one setting.
    """
    whole = parts.get(ROOT)
    common = None if whole is None or whole.dtype == "fp32" else _settings(whole)
    return {layer: part for layer, part in parts.items() if layer != ROOT and _settings(part) != common}


def _settings(part: TorchBaseConfig) -> tuple[Any, ...]:
    return tuple(getattr(part, parameter.name) for parameter in LAYER_PARAMETERS)


def pass_options(parts: Parts) -> dict[str, Any]:
    """The arguments of `adaround` that all parts share."""
    first: Any = next(iter(parts.values()))
    method, finetune = method_of(first)
    return {
        "method": method,
        "finetune": finetune,
        "token_mask": first.token_mask,
        "seed": first.seed,
        "checkpoint": first.checkpoint,
    }


def blocks_of(parts: Parts) -> str | None:
    """The name of the blocks that are learned one by one; None where all is learned together."""
    first: Any = next(iter(parts.values()))
    name: str | None = first.blocks
    return name


def model_path_of(parts: Parts) -> str | None:
    """Where the weights are that the model has on the device `meta`; None where it has none."""
    first: Any = next(iter(parts.values()))
    path: str | None = first.model_path
    return path


def float_activations(parts: Parts) -> bool:
    """Whether parts ask for quantized weights alone."""
    return bool(next(iter(parts.values())).act_dtype == "fp32")
