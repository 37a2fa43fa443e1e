"""Every private name of torch that the package touches, in one place."""

from __future__ import annotations

from typing import Any

from torch import fx, nn
from torch.ao.nn.intrinsic.modules.fused import _FusedModule
from torch.ao.nn.quantized.reference.modules.utils import ReferenceQuantizedModule
from torch.ao.quantization.observer import _is_activation_post_process

__all__ = ["Convolution", "Dropout", "Normalization", "is_observed", "is_observer", "is_quantized", "unfused"]

Convolution = nn.modules.conv._ConvNd
Dropout = nn.modules.dropout._DropoutNd
Normalization = nn.modules.batchnorm._NormBase


def is_observed(module: nn.Module) -> bool:
    """Whether `module` is a graph that `prepare_fx` returned, or a standalone module inside one."""
    return isinstance(module, fx.GraphModule) and "_observed_graph_module_attrs" in module.meta


def is_observer(module: nn.Module) -> bool:
    """Whether `module` is an observer or fake-quantizer that a prepare step inserted."""
    return bool(_is_activation_post_process(module))  # type: ignore[no-untyped-call]


def is_quantized(module: nn.Module) -> bool:
    """Whether `module` is a reference module with one quantized weight."""
    return isinstance(module, ReferenceQuantizedModule)


def unfused(module: Any) -> Any:
    """The weighted module inside a fused one (convolution + ReLU, ...), or `module` itself."""
    return module[0] if isinstance(module, _FusedModule) else module
