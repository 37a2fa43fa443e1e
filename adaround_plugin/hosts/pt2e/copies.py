"""Deep copies of prepared programs whose quantization annotations name nodes of the copy.

A copy of torch's shares the annotations of the original, and they name the original's nodes. `convert_pt2e` then fails
where activations are dynamic (`No chose qparams node found`), and forgets which module its new nodes belong to.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import fx
from torchao.quantization.pt2e.quantizer import DerivedQuantizationSpec, SharedQuantizationSpec

__all__ = ["deep_copy"]


def deep_copy(prepared: fx.GraphModule, memo: dict[int, Any] | None = None) -> fx.GraphModule:
    """A deep copy that `convert_pt2e` takes as it takes the original; `copy.deepcopy` of the copy makes such ones, too.

    Args:
        prepared: from `prepare_pt2e`.
        memo: of `copy.deepcopy`.
    """
    result: fx.GraphModule = fx.GraphModule.__deepcopy__(prepared, {} if memo is None else memo)
    by_name = {node.name: node for node in result.graph.nodes}
    for node in by_name.values():
        annotation = node.meta.get("quantization_annotation")
        if annotation is not None:
            inputs = annotation.input_qspec_map.items()
            # the annotation itself is the original's, too
            node.meta["quantization_annotation"] = replace(
                annotation,
                input_qspec_map={_moved(source, by_name): _spec(spec, by_name) for source, spec in inputs},
                output_qspec=_spec(annotation.output_qspec, by_name),
            )
    # torch gives every graph module a class of its own, which also holds the code of its forward
    type(result).__deepcopy__ = deep_copy  # type: ignore[assignment]
    return result


def _moved(value: Any, by_name: dict[str, fx.Node]) -> Any:
    """A node, or the two of an edge, in the copy."""
    if isinstance(value, tuple):
        return tuple(_moved(one, by_name) for one in value)
    return by_name.get(value.name, value)


def _spec(spec: Any, by_name: dict[str, fx.Node]) -> Any:
    """A specification of a tensor, with the nodes of the copy in it."""
    if isinstance(spec, SharedQuantizationSpec):
        return replace(spec, edge_or_node=_moved(spec.edge_or_node, by_name))
    if isinstance(spec, DerivedQuantizationSpec):
        return replace(spec, derived_from=[_moved(source, by_name) for source in spec.derived_from])
    return spec
