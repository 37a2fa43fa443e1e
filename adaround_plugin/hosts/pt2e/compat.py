"""Every private name of torchao that the package touches, in one place."""

from __future__ import annotations

from torch import fx, nn
from torchao.quantization.pt2e.prepare import _create_obs_or_fq_from_qspec
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec
from torchao.utils import _assert_and_get_unique_device

from adaround_plugin.graph import compat

__all__ = ["annotate_inputs", "forget_models", "new_observer"]


def annotate_inputs(node: fx.Node, specs: dict[fx.Node, QuantizationSpec]) -> None:
    """Tell `prepare_pt2e` which inputs of a node to observe, and how; the node then counts as annotated."""
    node.meta["quantization_annotation"] = QuantizationAnnotation(input_qspec_map=specs, _annotated=True)


def forget_models() -> None:
    """Let torchao's steps, which remember the device of each model, there and in torch.ao, keep none in memory."""
    _assert_and_get_unique_device.cache_clear()
    compat.forget_models()


def new_observer(spec: QuantizationSpec) -> nn.Module:
    """The observer or fake-quantizer that `prepare_pt2e` makes of a specification."""
    observer = _create_obs_or_fq_from_qspec(spec, {}, False)
    assert isinstance(observer, nn.Module)
    return observer
