"""Weights of an ONNX model in 4 or 2 bits: the same integers, packed (`pip install 'adaround_plugin[onnx]'`).

`torch.onnx.export` writes learned integers as INT8, or as float with a QuantizeLinear behind it, whatever their bits.
ONNX has INT4 and UINT4 from opset 21 on, INT2 and UINT2 from opset 25 on
(https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TypeGuard

import numpy as np

from adaround_plugin.errors import InvalidModelError, InvalidOptionError, MissingDependencyError
from adaround_plugin.names import select
from adaround_plugin.options import check_bool

try:
    import onnx
    import onnx_ir as ir
    from onnx_ir.passes.common import LiftConstantsToInitializersPass, RemoveUnusedNodesPass
    from onnxscript.optimizer import fold_constants
except ImportError as error:
    raise MissingDependencyError.of("onnx", "onnx", error) from error

__all__ = ["pack_onnx_weights"]

# what a weight may be stored as, narrowest first: least and greatest integer, and the first opset that has it
_STORAGE = {
    ir.DataType.INT8: ((ir.DataType.INT2, -2, 1, 25), (ir.DataType.INT4, -8, 7, 21)),
    ir.DataType.UINT8: ((ir.DataType.UINT2, 0, 3, 25), (ir.DataType.UINT4, 0, 15, 21)),
}
_LEAST_OPSET = 21


def pack_onnx_weights(
    model: onnx.ModelProto, names: Iterable[str] | None = None, *, cast: bool = True
) -> onnx.ModelProto:
    """A copy of a quantized ONNX model that stores each weight in the fewest bits that hold its integers.

    A weight is a constant that DequantizeLinear reads, and it alone; constants in float that go through QuantizeLinear
    (and Clip) first become integers. One whose integers lie in [-8, 7] (unsigned: [0, 15]) is stored as INT4 (UINT4),
    one in [-2, 1] ([0, 3]) as INT2 (UINT2) if the model's opset is 25 or later. Others keep their 8 bits.

    Args:
        model: of opset 21 or later, such as the `model_proto` of what `torch.onnx.export` returns.
        names: of the constants to pack, as names or regular expressions; None for all that fit.
        cast: put a Cast back to 8 bits behind each packed weight. ONNX Runtime does it once, when it loads the model,
            and then runs the kernels and the numbers of the unpacked model. Without, DequantizeLinear reads the packed
            weight and its packed zero point: the weight stays packed in memory too, and integer kernels that take 8
            bits only are not used.

    Raises:
        InvalidOptionError: an argument is none, or a name matches no weight.
        InvalidModelError: an opset before 21, no weights, constants in a file that was not loaded, or weights that do
            not fit: any that `names` selects, or all.
    """
    check_bool("cast", cast)
    if not isinstance(model, onnx.ModelProto):
        raise InvalidOptionError(
            "model", f"a {type(model).__name__} is no onnx.ModelProto", "Pass onnx.load(path), or program.model_proto."
        )
    packed = ir.from_proto(model)
    graph, opset = packed.graph, packed.opset_imports.get("", 0)
    if opset < _LEAST_OPSET:
        raise InvalidModelError(
            "model", f"has opset {opset}, and 4-bit constants exist from 21 on", "Export it with opset_version=21."
        )
    for value in graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            raise InvalidModelError(
                f"constant {value.name!r}", "lies in a file that was not loaded", "Load all: onnx.load(path)."
            )
    _fold(packed)
    weights = {str(value.name): value for value in graph.initializers.values() if _is_weight(value)}
    if not weights:
        raise InvalidModelError(
            "model", "has no constant that DequantizeLinear reads", "Export a converted, quantized model."
        )
    chosen = list(weights) if names is None else _selected(names, list(weights))
    storage = {name: _storage(weights[name], opset, cast) for name in chosen}
    wide = [name for name, narrow in storage.items() if narrow is None]
    if wide and (names is not None or len(wide) == len(weights)):
        integers = _array(weights[wide[0]])
        raise InvalidModelError(
            f"weight {wide[0]!r}",
            f"has integers from {integers.min()} to {integers.max()} or zero points that do not fit 4 bits",
            "Learn it with weight_bits=4 or fewer, or leave it out of names.",
        )
    for name, narrow in storage.items():
        if narrow is not None:
            _pack(graph, weights[name], narrow, cast)
    return ir.to_proto(packed)


def _selected(names: Iterable[str], known: list[str]) -> list[str]:
    """The weights that a caller's names select."""
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise InvalidOptionError("names", f"{names!r} is no list of names", "Pass a list of strings, or None.")
    return list(dict.fromkeys(name for pattern in names for name in select(pattern, known, "names")))


def _is_constant(value: ir.Value | None) -> TypeGuard[ir.Value]:
    """Whether a value is one that whoever runs the model cannot replace."""
    return value is not None and value.is_initializer() and not value.is_graph_input() and not value.is_graph_output()


def _array(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None
    return value.const_value.numpy()


def _is_weight(value: ir.Value) -> bool:
    """Whether a value is a constant of 8 bits that DequantizeLinear alone reads, in subgraphs too."""
    readers = {(node.op_type, index) for node, index in value.uses()}
    return value.dtype in _STORAGE and _is_constant(value) and readers == {("DequantizeLinear", 0)}


def _zero_point(node: ir.Node) -> ir.Value | None:
    return node.inputs[2] if len(node.inputs) > 2 else None


def _storage(weight: ir.Value, opset: int, cast: bool) -> ir.DataType | None:
    """The narrowest type that a weight fits, with its zero points unless it is cast back; None if 8 bits are needed."""
    assert weight.dtype is not None
    held = [weight]
    if not cast:
        zero_points = [zero_point for node, _ in weight.uses() if (zero_point := _zero_point(node)) is not None]
        if not all(map(_is_constant, zero_points)):
            return None
        held += zero_points
    low, high = min(int(_array(value).min()) for value in held), max(int(_array(value).max()) for value in held)
    for narrow, least, most, since in _STORAGE[weight.dtype]:
        if least <= low and high <= most and since <= opset:
            return narrow
    return None


def _constant(graph: ir.Graph, name: str, values: np.ndarray, dtype: ir.DataType) -> ir.Value:
    """A new constant of a graph."""
    tensor = ir.tensor(values.astype(dtype.numpy()), dtype=dtype, name=name)
    value = ir.Value(name=name, shape=ir.Shape(values.shape), type=ir.TensorType(dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _pack(graph: ir.Graph, weight: ir.Value, narrow: ir.DataType, cast: bool) -> None:
    """Put a constant of a narrow type in the place of a weight, and what reads it behind it."""
    packed = _constant(graph, f"{weight.name}.packed", _array(weight), narrow)
    source = packed
    if cast:
        assert weight.dtype is not None
        node = ir.node("Cast", [packed], {"to": weight.dtype}, name=f"{weight.name}.cast")
        graph.insert_before(graph[0], node)
        (source,) = node.outputs
    for node, index in tuple(weight.uses()):
        node.replace_input_with(index, source)
        zero_point = _zero_point(node)
        if not cast and zero_point is not None:
            # one zero point may serve several weights, of which each has its own type
            name = f"{zero_point.name}.{weight.name}.packed"
            known = graph.initializers.get(name)
            narrowed = _constant(graph, name, _array(zero_point), narrow) if known is None else known
            node.replace_input_with(2, narrowed)
            if not zero_point.uses():
                del graph.initializers[str(zero_point.name)]
    del graph.initializers[str(weight.name)]


def _fold(model: ir.Model) -> None:
    """Make integers of constants in float that go through QuantizeLinear, and through Clip behind it."""

    def is_rounding(node: ir.Node) -> bool:
        return node.op_type == "QuantizeLinear" or (node.op_type == "Clip" and node.outputs[0].dtype in _STORAGE)

    fold_constants(model, output_size_limit=sys.maxsize, should_fold=is_rounding)
    LiftConstantsToInitializersPass()(model)
    RemoveUnusedNodesPass()(model)
