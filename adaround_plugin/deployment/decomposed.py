"""A learned FX model as a graph that `torch.export`, and so `torch.onnx.export`, takes."""

from __future__ import annotations

from torch import fx, nn
from torch.ao.quantization.backend_config import BackendConfig

from adaround_plugin.errors import InvalidModelError
from adaround_plugin.hosts.fx.host import PreparedFX
from adaround_plugin.hosts.open import is_exported, open_host
from adaround_plugin.report import get_report

__all__ = ["convert_to_decomposed_fx"]


def convert_to_decomposed_fx(learned: nn.Module, backend_config: BackendConfig | None = None) -> fx.GraphModule:
    """Convert a learned FX model like `convert_to_reference_fx`, with the quantization operators of PT2E.

    torch.export does not take quantized tensors, of which reference models make use. Here, integers are int8 and uint8
    tensors between `quantized_decomposed` operators. Weights are in float on their grid, and become the learned
    integers when the model runs; `pack_onnx_weights` stores the integers.

    Args:
        learned: what `adaround` returned for a model of `prepare_fx`; it is not changed.
        backend_config: the one given to `prepare_fx`, if any (the weight-only one is recognized).

    Raises:
        InvalidModelError: not learned, already converted, or a program of `prepare_pt2e`.
        InvalidOptionError: `backend_config` is none.
    """
    get_report(learned)
    if is_exported(learned):
        raise InvalidModelError("learned", "is a program of prepare_pt2e", "Convert it with convert_pt2e.")
    host = open_host(learned, backend_config)
    assert isinstance(host, PreparedFX)
    return host.decomposed()
