"""The algorithm `adaround`, as Neural Compressor calls it."""

from __future__ import annotations

from typing import Any

from torch import nn

from adaround_plugin.errors import InvalidOptionError
from adaround_plugin.hosts.open import is_exported
from adaround_plugin.inc.compat import Mode, Quantizer
from adaround_plugin.inc.exported import ExportedQuantizer
from adaround_plugin.inc.native import NativeQuantizer
from adaround_plugin.inc.parts import Parts, blocks_of, float_activations
from adaround_plugin.inc.weight_only import WeightOnlyQuantizer

__all__ = ["adaround_entry"]


def adaround_entry(model: nn.Module, configs_mapping: Parts, *args: Any, mode: Mode, **kwargs: Any) -> nn.Module:
    """What INC's `quantize`, `prepare` and `convert` call.

    Args:
        model: a float model, or at `Mode.CONVERT` one that `Mode.PREPARE` gave.
        configs_mapping: the part of the configuration for each layer.
        mode: prepare, convert, or both with calibration between (`run_fn` and `run_args` in `kwargs`).
    """
    quantizer = _quantizer(model, configs_mapping)
    return quantizer(configs_mapping).execute(model, mode, *args, **kwargs)  # type: ignore[no-any-return]


def _quantizer(model: nn.Module, parts: Parts) -> type[Quantizer]:
    """The kind of result: the model decides, and whether activations stay in float."""
    if is_exported(model):
        if blocks_of(parts) is not None:
            raise InvalidOptionError("blocks", "are those of an eager model", "Pass the model itself, or None.")
        return ExportedQuantizer
    return WeightOnlyQuantizer if float_activations(parts) else NativeQuantizer
