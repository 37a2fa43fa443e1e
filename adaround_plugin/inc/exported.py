"""An exported program to a PT2E program with quantize and dequantize operators, which INC's own load() reads."""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import fx

from adaround_plugin.api import adaround
from adaround_plugin.errors import InvalidOptionError
from adaround_plugin.hosts.pt2e import get_adaround_x86_inductor_config
from adaround_plugin.inc.compat import (
    STATIC_QUANT,
    W8A8PT2EQuantizer,
    X86InductorQuantizer,
    mark_exported,
    save_exported,
)
from adaround_plugin.inc.layers import weighted_layers
from adaround_plugin.inc.parts import ROOT, Parts, float_activations, own_parts, pass_options
from adaround_plugin.inc.programs import weight_only_quantizer
from adaround_plugin.inc.recording import Recording
from adaround_plugin.names import depth

__all__ = ["ExportedQuantizer"]

# of the model from INC's export(); its save() asks for it, and a copy loses it
_SHAPES = "adaround_dynamic_shapes"


class ExportedQuantizer(W8A8PT2EQuantizer):
    """INC's own PT2E flow with AdaRound's weight observers, `adaround` before its conversion.

    Args:
        parts: the part of the configuration for each layer.
    """

    def __init__(self, parts: Parts) -> None:
        super().__init__(quant_config={})
        self.parts = parts

    def update_quantizer_based_on_quant_config(self, quant_config: Any = None) -> Any:
        """The quantizer of torchao that INC's `prepare` uses."""
        return self.quantizer

    def prepare(self, model: fx.GraphModule, *args: Any, **kwargs: Any) -> fx.GraphModule:
        """The program with observers, recording its inputs."""
        layers = weighted_layers(model)
        weight_only = float_activations(self.parts)
        self.quantizer = weight_only_quantizer(model, self.parts) if weight_only else _static_quantizer(self.parts)
        shapes = getattr(model, "dynamic_shapes", None)
        prepared: fx.GraphModule = super().prepare(mark_exported(model))
        prepared.meta[_SHAPES] = shapes
        Recording(layers).start(prepared)
        return prepared

    def convert(self, model: fx.GraphModule, *args: Any, **kwargs: Any) -> fx.GraphModule:
        """The program with learned integers; `get_report` reads its report.

        Raises:
            InvalidModelError: `prepare` did not make this model.
            InvalidBatchError: no data went through it.
        """
        with Recording.taken(model) as batches:
            learned = adaround(model, batches, **pass_options(self.parts))
        quantized: Any = super().convert(learned, **kwargs)
        quantized.dynamic_shapes = learned.meta[_SHAPES]
        quantized.qconfig = {STATIC_QUANT: next(iter(self.parts.values()))}
        quantized.save = MethodType(save_exported, quantized)
        return quantized  # type: ignore[no-any-return]


def _static_quantizer(parts: Parts) -> X86InductorQuantizer:
    quantizer = X86InductorQuantizer()
    whole = _inductor_config(parts[ROOT]) if ROOT in parts else None
    if whole is not None:
        quantizer.set_global(whole)
    # the first that a name lies in counts
    for (name, _), part in sorted(own_parts(parts).items(), key=lambda entry: -depth(entry[0][0])):
        quantizer.set_module_name_qconfig(name, _inductor_config(part))
    return quantizer


def _inductor_config(part: Any) -> Any:
    """The settings of torchao's quantizer for a part; None for float.

    Raises:
        InvalidOptionError: affine weights, which the quantizer does not take.
    """
    if part.dtype == "fp32":
        return None
    if not part.use_sym:
        raise InvalidOptionError("use_sym", "exported programs take symmetric weights only", "Pass use_sym=True.")
    return get_adaround_x86_inductor_config(part.bits, per_channel=part.w_granularity == "per_channel")
