"""Save and load int8 models of `convert_fx`, which INC's own `load` does not know."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import torch
from torch import fx, nn
from torch.ao.quantization.quantize_fx import convert_fx

from adaround_plugin.errors import InvalidModelError
from adaround_plugin.inc.config import AdaRoundConfig
from adaround_plugin.inc.layers import weighted_layers
from adaround_plugin.inc.observed import observed
from adaround_plugin.inc.parts import META, ROOT, Parts

__all__ = ["load", "save"]

_STATE = "adaround_state.pt"
_CONFIG = "adaround_config.json"


def save(model: fx.GraphModule, folder: str | os.PathLike[str]) -> None:
    """Write integers, scales, biases and the configuration of a quantized model into a folder.

    Args:
        model: what `quantize`, `convert` or `autotune` returned for an eager model and an `AdaRoundConfig`.
        folder: is created where it does not exist.

    Raises:
        InvalidModelError: `model` is not such a model.
    """
    parts: Parts | None = model.meta.get(META) if isinstance(model, fx.GraphModule) else None
    if parts is None:
        raise InvalidModelError("model", "was not quantized with AdaRoundConfig", "Save what quantize returned.")
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    entries = [{"layer": layer, "config": part.get_params_dict()} for layer, part in parts.items()]
    (path / _CONFIG).write_text(json.dumps(entries, indent=2), encoding="utf-8")
    torch.save(model.state_dict(), path / _STATE)


def load(folder: str | os.PathLike[str], original_model: nn.Module) -> fx.GraphModule:
    """The quantized model that `save` wrote, bit for bit.

    Args:
        folder: what `save` was given.
        original_model: the float model in eval mode, as it was before quantization; its weights do not matter, and it
            is not changed.

    Raises:
        FileNotFoundError: `folder` does not hold such a model.
        InvalidModelError: `original_model` has other layers, or is in train mode.
    """
    path = Path(folder)
    entries = json.loads((path / _CONFIG).read_text(encoding="utf-8"))
    parts = {tuple(entry["layer"]): AdaRoundConfig(**entry["config"], white_list=None) for entry in entries}
    if missing := parts.keys() - {ROOT, *weighted_layers(original_model)}:
        raise InvalidModelError(
            "original_model", f"lacks {sorted(missing)}", "Pass the float model that was quantized."
        )
    prepared = observed(original_model, parts)
    with warnings.catch_warnings():
        # ranges come from the file
        warnings.filterwarnings("ignore", "must run observer before calling calculate_qparams", UserWarning)
        quantized = convert_fx(prepared)
    # packed weights of functional calls
    with torch.serialization.safe_globals([torch.ScriptObject]):
        state = torch.load(path / _STATE, weights_only=True)
    if differing := state.keys() ^ quantized.state_dict().keys():
        raise InvalidModelError(
            "original_model", f"differs in {sorted(differing)}", "Pass the float model that was quantized."
        )
    quantized.load_state_dict(state)
    quantized.meta[META] = parts
    return quantized
