"""An eager model to one with Neural Compressor's packed linear layers: weights quantized, activations in float."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

from adaround_plugin.api import adaround
from adaround_plugin.errors import InvalidModelError, InvalidOptionError, is_out_of_memory
from adaround_plugin.inc.compat import Quantizer
from adaround_plugin.inc.layers import weighted_layers
from adaround_plugin.inc.packing import pack
from adaround_plugin.inc.parts import ROOT, pass_options
from adaround_plugin.inc.programs import integer_linears, weight_only_quantizer
from adaround_plugin.inc.recording import Batch, Recording
from adaround_plugin.report import KEY, get_report

__all__ = ["WeightOnlyQuantizer"]


class WeightOnlyQuantizer(Quantizer):
    """Inputs recorded, the model exported, `adaround` on the program, the integers packed into the eager model.

    Args:
        quant_config: the part of the configuration for each layer, as `AdaRoundConfig.to_config_mapping` gives it.
    """

    def prepare(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """`model` itself, recording its inputs.

        Raises:
            InvalidModelError: it is in train mode.
            InvalidOptionError: affine weights of 8 bits, which INC's packed layers get wrong.
        """
        if any(part.bits == 8 and not part.use_sym and part.dtype != "fp32" for part in self.quant_config.values()):
            raise InvalidOptionError("use_sym", "INC's packed layers overflow at 8 bits", "Pass use_sym=True.")
        if model.training:
            raise InvalidModelError("model", "is in train mode", "Call .eval() first.")
        Recording(weighted_layers(model, linear_only=True)).start(model)
        return model

    def convert(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """`model` with packed linear layers; `get_report` reads its report.

        Raises:
            InvalidModelError: `prepare` did not make this model, or torch.export fails on it.
            InvalidBatchError: no data went through it.
        """
        batches = Recording.taken(model)
        # functional calls cannot be packed
        parts = {layer: part for layer, part in self.quant_config.items() if layer != ROOT}
        program = _exported(model, batches)
        prepared = prepare_pt2e(program, weight_only_quantizer(program, parts))
        with torch.no_grad():
            args, kwargs = _call(batches[0])
            prepared(*args, **kwargs)  # weight observers see their weights
        learned = adaround(prepared, batches, **pass_options(self.quant_config))
        packed = pack(model, integer_linears(learned, parts))
        vars(packed)[KEY] = get_report(learned)
        return packed


def _call(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A batch as positional and keyword arguments."""
    return ((), batch) if isinstance(batch, dict) else (batch, {})


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """Let a language model of transformers return no keys and values, which no program can, inside."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "use_cache", False) is not True:
        yield
        return
    config.use_cache = False
    try:
        yield
    finally:
        config.use_cache = True


def _exported(model: nn.Module, batches: list[Batch]) -> fx.GraphModule:
    """The model as a program that takes every batch."""
    (args, kwargs), *others = map(_call, batches)
    shapes: Any = torch.export.AdditionalInputs()  # type: ignore[no-untyped-call]
    for other in others:
        shapes.add(*other)
    try:
        with _without_cache(model):
            # without strict, functional calls inside modules are lost
            program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=True).module()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise InvalidModelError(
            "model", f"torch.export fails on it ({error})", "Change what it names, or leave the code out of the model."
        ) from error
    assert isinstance(program, fx.GraphModule)
    return program
