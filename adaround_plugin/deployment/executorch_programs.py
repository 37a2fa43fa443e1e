"""Converted programs as programs of ExecuTorch, lowered to a backend, with errors that name backend and layer.

ExecuTorch itself lets what a backend does not take run on its portable kernels, which multiply in float, and reports
what a backend cannot compile by whatever the backend's code ran into.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import fx

from adaround_plugin.deployment.ranges import quantized_weights
from adaround_plugin.errors import InvalidModelError, InvalidOptionError, MissingDependencyError, told_as
from adaround_plugin.graph.operators import is_linear
from adaround_plugin.hosts.pt2e.exports import strictly_exported
from adaround_plugin.hosts.pt2e.nodes import innermost_module
from adaround_plugin.options import check_bool

try:
    from executorch.exir import ExecutorchProgramManager, to_edge_transform_and_lower
    from executorch.exir.backend.partitioner import Partitioner
except ImportError as error:
    raise MissingDependencyError.of("executorch", "executorch", error) from error

__all__ = ["lower_to_executorch"]

# parts of the names of operators between a weight and the operator that multiplies by it
_ON_THE_WAY = ("quantize", "permute", "view", "transpose_copy", "clone", "getitem")


def lower_to_executorch(
    converted: fx.GraphModule,
    example: tuple[Any, ...],
    partitioners: Sequence[Partitioner] = (),
    *,
    partial: bool = False,
) -> ExecutorchProgramManager:
    """A converted program, exported and lowered to the backends of some partitioners.

    Args:
        converted: what `convert_pt2e` or `widen_weight_ranges` returned; it is not changed.
        example: positional inputs of the sizes that the program is to run with.
        partitioners: of the backends, such as `XnnpackPartitioner()`, the first choice first. With none, all runs on
            ExecuTorch's portable kernels, which dequantize and multiply in float.
        partial: whether the layers that no backend takes may run on the portable kernels.

    Returns:
        ExecuTorch's program: `buffer` is the content of the `.pte` file.

    Raises:
        InvalidOptionError: `example` is no tuple of inputs that the program takes, `partitioners` are none, or
            `partial` is no bool.
        InvalidModelError: the program has no quantized weights, a backend fails at a layer, or no backend takes one and
            `partial` is not set. Backend, layer and remedy are named, the backend's own error is the cause.
    """
    check_bool("partial", partial)
    if not isinstance(example, tuple):
        raise InvalidOptionError("example", f"{type(example).__name__} is no tuple of inputs", "Pass (x,).")
    if not isinstance(partitioners, Sequence) or not all(isinstance(one, Partitioner) for one in partitioners):
        raise InvalidOptionError(
            "partitioners", f"{partitioners!r} is no sequence of partitioners", "Pass, say, [XnnpackPartitioner()]."
        )
    layers = {str(node.all_input_nodes[0].target): call for node, call in quantized_weights(converted).items()}
    backends = ", ".join(type(one).__name__ for one in partitioners) or "portable kernels"
    program = _exported(converted, example)
    with told_as(lambda error: _failure(backends, error, layers)):
        edge = to_edge_transform_and_lower(program, partitioner=list(partitioners) or None)
    lowered = edge.exported_program().graph_module
    left = [_name(call) for target, call in layers.items() if _is_read(lowered, target)]
    if left and partitioners and not partial:
        raise InvalidModelError(
            f"{backends}: layers {left}",
            "are not taken by the backend, and would be multiplied in float by the portable kernels",
            "Leave them to a partitioner that takes them, quantize them as the backend's quantizer does, "
            "or pass partial=True.",
        )
    if left:
        # registers quantize and dequantize operators; programs without them do not need it
        importlib.import_module("executorch.kernels.quantized")
    return edge.to_executorch()


def _exported(converted: fx.GraphModule, example: tuple[Any, ...]) -> torch.export.ExportedProgram:
    def misfit(error: Exception) -> InvalidOptionError:
        problem = f"the program cannot be exported with it ({error})"
        return InvalidOptionError("example", problem, "Pass a tuple of its inputs.")

    with told_as(misfit):
        return strictly_exported(converted, example)


def _name(call: fx.Node) -> str:
    """What the report calls a layer."""
    return innermost_module(call)[0] or call.name


def _parameter(placeholder: fx.Node) -> str:
    """The attribute that an exported program takes as an input; its name has the kind of input in front."""
    return placeholder.name.partition("_")[2]


def _is_read(lowered: fx.GraphModule, target: str) -> bool:
    """Whether a weight is still dequantized outside of the backends."""
    inputs = [node for node in lowered.graph.nodes if node.op == "placeholder" and node.users]
    return target.replace(".", "_") in map(_parameter, inputs)


def _failure(backends: str, error: Exception, layers: dict[str, fx.Node]) -> InvalidModelError:
    """What to raise for an error of a backend."""
    node = next(_operators(error.__traceback__), None)
    call = None if node is None else _layer_of(node, layers)
    subject = backends if node is None else f"{backends}: node {node.name!r}"
    remedy = "Leave it in float by the vendor's quantizer, or see what the backend's error says."
    if call is not None:
        subject = f"{backends}: layer {_name(call)!r}"
        if not is_linear(call.target):
            remedy = "If its weight has fewer than 8 bits, pass widen_weight_ranges(converted); else leave it in float."
    return InvalidModelError(subject, f"the backend failed ({type(error).__name__}: {error})", remedy)


def _operators(trace: TracebackType | None) -> Iterator[fx.Node]:
    """The operators that the frames of an error were at, from the innermost outwards."""
    frames = []
    while trace is not None:
        frames.append(trace.tb_frame)
        trace = trace.tb_next
    for frame in reversed(frames):
        for value in frame.f_locals.values():
            if isinstance(value, fx.Node) and value.op == "call_function" and not _is_on_the_way(value):
                yield value


def _is_on_the_way(node: fx.Node) -> bool:
    return any(part in getattr(node.target, "__name__", "") for part in _ON_THE_WAY)


def _layer_of(node: fx.Node, layers: dict[str, fx.Node]) -> fx.Node | None:
    """The layer whose weight an operator of a lowered graph multiplies by."""
    by_name = {target.replace(".", "_"): call for target, call in layers.items()}
    open_nodes = list(node.all_input_nodes)
    while open_nodes:
        source = open_nodes.pop()
        if source.op == "placeholder" and _parameter(source) in by_name:
            return by_name[_parameter(source)]
        if _is_on_the_way(source):
            open_nodes.extend(source.all_input_nodes)
    return None
