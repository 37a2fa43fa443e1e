"""An eager model to an int8 model of `convert_fx`, by way of Neural Compressor's prepare and convert."""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import fx, nn
from torch.ao.quantization.quantize_fx import convert_fx

from adaround_plugin.api import adaround
from adaround_plugin.graph.compat import forget_models
from adaround_plugin.inc.compat import Quantizer
from adaround_plugin.inc.layers import weighted_layers
from adaround_plugin.inc.observed import observed
from adaround_plugin.inc.parts import META, pass_options
from adaround_plugin.inc.recording import Recording
from adaround_plugin.inc.saving import save
from adaround_plugin.report import get_report, set_report

__all__ = ["NativeQuantizer"]


class NativeQuantizer(Quantizer):
    """prepare_fx, calibration with the inputs recorded, `adaround`, convert_fx.

    Args:
        quant_config: the part of the configuration for each layer, as `AdaRoundConfig.to_config_mapping` gives it.
    """

    def prepare(self, model: nn.Module, *args: Any, **kwargs: Any) -> fx.GraphModule:
        """The model with observers, recording its inputs.

        Raises:
            InvalidModelError: `model` is in train mode.
        """
        prepared = observed(model, self.quant_config)
        Recording(weighted_layers(model)).start(prepared)
        return prepared

    def convert(self, model: fx.GraphModule, *args: Any, **kwargs: Any) -> fx.GraphModule:
        """The int8 model with learned integers, on the processor, where alone its kernels run.

        `get_report` reads its report.

        Raises:
            InvalidModelError: `prepare` did not make this model.
            InvalidBatchError: no data went through it.
        """
        with Recording.taken(model) as batches:
            learned = adaround(model, batches, **pass_options(self.quant_config))
        quantized: Any = convert_fx(learned.cpu())
        forget_models()
        set_report(quantized, get_report(learned))
        quantized.meta[META] = dict(self.quant_config)
        # INC's save() asks for both
        quantized.qconfig = self.quant_config
        quantized.save = MethodType(save, quantized)
        return quantized  # type: ignore[no-any-return]
