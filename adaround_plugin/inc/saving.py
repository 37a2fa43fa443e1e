"""Save and load int8 models of `convert_fx`, which INC's own `load` does not know."""

from __future__ import annotations

import io
import os
import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.ao.quantization.quantize_fx import convert_fx

from adaround_plugin.errors import InvalidModelError, NonFiniteError, told_as
from adaround_plugin.files import write_whole
from adaround_plugin.graph.compat import forget_models
from adaround_plugin.graph.fingerprint import differing, structure
from adaround_plugin.inc.config import AdaRoundConfig
from adaround_plugin.inc.layers import weighted_layers
from adaround_plugin.inc.observed import observed
from adaround_plugin.inc.parts import META, ROOT, Parts

__all__ = ["load", "save"]

# one file, so that configuration and weights are always those of one model
_FILE = "adaround_model.pt"
_KEYS = {"parts", "structure", "state"}


def save(model: fx.GraphModule, folder: str | os.PathLike[str]) -> None:
    """Write integers, scales, biases and the configuration of a quantized model into a folder, all or nothing.

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
    content = {
        "parts": [(layer, part.get_params_dict()) for layer, part in parts.items()],
        "structure": structure(model),
        "state": model.state_dict(),
    }
    whole = io.BytesIO()
    torch.save(content, whole)
    write_whole(path / _FILE, whole.getbuffer())


def load(folder: str | os.PathLike[str], original_model: nn.Module) -> fx.GraphModule:
    """The quantized model that `save` wrote, bit for bit.

    Args:
        folder: what `save` was given.
        original_model: the float model in eval mode, as it was before quantization; its weights do not matter, and it
            is not changed.

    Raises:
        FileNotFoundError: `folder` does not hold such a model.
        InvalidModelError: the file is damaged, or `original_model` has other layers or settings, or is in train mode.
        NonFiniteError: a weight or a scale in the file is no number.
    """
    content = _read(Path(folder) / _FILE)
    parts = {tuple(layer): AdaRoundConfig(**config, white_list=None) for layer, config in content["parts"]}
    state = content["state"]
    if missing := parts.keys() - {ROOT, *weighted_layers(original_model)}:
        raise InvalidModelError(
            "original_model", f"lacks {sorted(missing)}", "Pass the float model that was quantized."
        )
    prepared = observed(original_model, parts)
    with warnings.catch_warnings():
        # ranges come from the file
        warnings.filterwarnings("ignore", "must run observer before calling calculate_qparams", UserWarning)
        quantized = convert_fx(prepared)
        forget_models()
    if unknown := state.keys() ^ quantized.state_dict().keys():
        raise InvalidModelError(
            "original_model", f"differs in {sorted(unknown)}", "Pass the float model that was quantized."
        )
    if others := differing(structure(quantized), content["structure"]):
        raise InvalidModelError(
            "original_model",
            f"has other settings in {others}",
            "Pass the float model that was quantized, with the same strides, paddings and activation functions.",
        )
    quantized.load_state_dict(state)
    quantized.meta[META] = parts
    return quantized


def _read(path: Path) -> dict[str, Any]:
    """What `save` wrote, checked."""
    damaged, data = "Quantize the model and save it again.", path.read_bytes()
    subject = f"file {str(path)!r}"
    if not zipfile.is_zipfile(io.BytesIO(data)):
        raise InvalidModelError(subject, "is cut off" if data else "is empty", damaged)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entry = archive.testzip()
    except (zipfile.BadZipFile, RuntimeError) as error:  # a damaged list of entries, or flags that nobody has
        raise InvalidModelError(subject, f"is damaged ({error})", damaged) from error
    if entry is not None:
        raise InvalidModelError(subject, f"is damaged in {entry!r}", damaged)
    unread = (RuntimeError, pickle.UnpicklingError)
    with (
        told_as(lambda error: InvalidModelError(subject, f"cannot be read ({error})", damaged), unread),
        # packed weights of functional calls
        torch.serialization.safe_globals([torch.ScriptObject]),
    ):
        content = torch.load(io.BytesIO(data), weights_only=True)
    if not isinstance(content, dict) or content.keys() != _KEYS:
        raise InvalidModelError(subject, "is not what save writes", damaged)
    for name, values in _floats(content["state"]):
        if not bool(torch.isfinite(values).all()):
            raise NonFiniteError(f"{name!r} in {subject}", "holds NaN or infinity", damaged)
    return content


def _floats(state: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The floats of a quantized model's state, scales of weights among them, and what they are called."""
    for name, entry in state.items():
        for value in entry if isinstance(entry, tuple) else (entry,):
            if not isinstance(value, Tensor):
                continue
            if not value.is_quantized:
                yield name, value
            elif value.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric):
                yield name, value.q_per_channel_scales()
            else:
                yield name, torch.tensor(value.q_scale(), device="cpu")
