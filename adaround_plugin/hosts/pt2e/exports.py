"""Exports of modules as the programs that PT2E quantizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from adaround_plugin.graph.compat import exports_forgotten

__all__ = ["strictly_exported"]


def strictly_exported(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None, shapes: Any = None
) -> ExportedProgram:
    """The program of a module, of which torch keeps nothing.

    Args:
        model: that is exported; without `strict`, functional calls inside modules are lost.
        args, kwargs: of a call.
        shapes: what is dynamic, as `torch.export.export` takes it.
    """
    with exports_forgotten():
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=True)
