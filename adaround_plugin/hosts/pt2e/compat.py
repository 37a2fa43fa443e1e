"""Every private name of torchao that the package touches, in one place."""

from __future__ import annotations

from torch import fx
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec

__all__ = ["annotate_inputs"]


def annotate_inputs(node: fx.Node, specs: dict[fx.Node, QuantizationSpec]) -> None:
    """Tell `prepare_pt2e` which inputs of a node to observe, and how; the node then counts as annotated."""
    node.meta["quantization_annotation"] = QuantizationAnnotation(input_qspec_map=specs, _annotated=True)
