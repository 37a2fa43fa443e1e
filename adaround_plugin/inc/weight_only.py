"""An eager model to one with Neural Compressor's packed linear layers: weights quantized, activations in float."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

from adaround_plugin.api import adaround
from adaround_plugin.errors import InvalidModelError, InvalidOptionError
from adaround_plugin.inc.compat import Quantizer
from adaround_plugin.inc.layers import weighted_layers
from adaround_plugin.inc.packing import pack
from adaround_plugin.inc.parts import ROOT, pass_options
from adaround_plugin.inc.programs import integer_linears, weight_only_quantizer
from adaround_plugin.inc.recording import Batch, Recording
from adaround_plugin.report import KEY, get_report
from adaround_plugin.sequential.programs import Call, exported

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
        program = exported(model, [_call(batch) for batch in batches])
        prepared = prepare_pt2e(program, weight_only_quantizer(program, parts))
        with torch.no_grad():
            args, kwargs = _call(batches[0])
            prepared(*args, **kwargs)  # weight observers see their weights
        learned = adaround(prepared, batches, **pass_options(self.quant_config))
        packed = pack(model, integer_linears(learned, parts))
        vars(packed)[KEY] = get_report(learned)
        return packed


def _call(batch: Batch) -> Call:
    """A batch as positional and keyword arguments."""
    return ((), batch) if isinstance(batch, dict) else (batch, {})
