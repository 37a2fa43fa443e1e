"""Decisions as facts and tensors of a file, and back: dataclasses of known types, and what JSON can hold."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from adaround_plugin.learning.layer import Recipe
from adaround_plugin.regions.learnable import LearnedWeight
from adaround_plugin.report import BlockReport, ClippedActivation, RecipeTrial
from adaround_plugin.rounding.grid import Grid
from adaround_plugin.rounding.result import LayerRounding

__all__ = ["decode", "encode"]

# what decisions are made of
_TYPES = {
    kind.__name__: kind
    for kind in (Grid, LayerRounding, LearnedWeight, BlockReport, RecipeTrial, Recipe, ClippedActivation)
}
# where integers fit
_NARROW = (torch.int8, torch.int16, torch.int32)


def encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """A value as JSON can hold it; its tensors go into `tensors`, integers as narrow as they fit."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = _narrowed(value)
        return {"tensor": name, "dtype": str(value.dtype), "device": str(value.device)}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value)}
    if is_dataclass(value):
        return {
            "type": type(value).__name__,
            "fields": {one.name: encode(getattr(value, one.name), tensors) for one in fields(value)},
        }
    if isinstance(value, dict):
        return {"dict": [[name, encode(one, tensors)] for name, one in value.items()]}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [encode(one, tensors) for one in value]}
    assert value is None or isinstance(value, bool | int | float | str), f"{value!r} is no part of a decision"
    return value


def decode(facts: Any, tensors: dict[str, Tensor], whole: type, device: torch.device | None = None) -> Any:
    """The value that was encoded: every tensor has its dtype and its device again.

    Args:
        facts, tensors: as `encode` made them.
        whole: the type of the decision.
        device: where tensors lie that lay on a GPU, if not where they lay.
    """
    if not isinstance(facts, dict):
        return facts
    if "tensor" in facts:
        place = facts["device"] if device is None or facts["device"] == "cpu" else device
        return tensors[facts["tensor"]].to(place, _dtype(facts["dtype"]))
    if "dtype" in facts:
        return _dtype(facts["dtype"])
    if "type" in facts:
        kind: Any = {**_TYPES, whole.__name__: whole}[facts["type"]]
        return kind(**{name: decode(one, tensors, whole, device) for name, one in facts["fields"].items()})
    if "dict" in facts:
        return {name: decode(one, tensors, whole, device) for name, one in facts["dict"]}
    ((kind, values),) = facts.items()
    found = (decode(one, tensors, whole, device) for one in values)
    return tuple(found) if kind == "tuple" else list(found)


def _narrowed(value: Tensor) -> Tensor:
    if value.dtype != torch.int64 or not value.numel():
        return value
    low, high = int(value.min()), int(value.max())
    fitting = (dtype for dtype in _NARROW if torch.iinfo(dtype).min <= low and high <= torch.iinfo(dtype).max)
    return value.to(next(fitting, value.dtype))


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name.removeprefix("torch."))
    assert isinstance(found, torch.dtype)
    return found
