"""Whether a prepared model computes what the float model does that it was made of, and its conversion reads writes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from adaround_plugin.errors import InvalidModelError, InvalidOptionError
from adaround_plugin.graph.aliases import strided_copy
from adaround_plugin.graph.clamps import is_clamp
from adaround_plugin.graph.compat import Convolution, Normalization, tree_map
from adaround_plugin.graph.paths import quantizes
from adaround_plugin.graph.reparametrized import deep_copy
from adaround_plugin.graph.streams import Stream, tensors, unpacks
from adaround_plugin.graph.transforms import has_origin, origin, written_by
from adaround_plugin.hosts.base import Host

__all__ = ["check_original"]

# of the norm of an output. Folding batch norms moves those of torchvision's networks by 1e-6 to 6e-4, folding one
# wrongly by 0.4 and more; 8-bit activations move them by 1e-2
_TOLERANCE = 1e-2


def check_original(host: Host, float_model: nn.Module, arguments: list[Any]) -> None:
    """Raise unless the host's graphs do on one batch what a float model does, in eval mode and without gradients.

    The float model is left as it is.

    Args:
        host: of the prepared model.
        float_model: what was prepared.
        arguments: the batch, as values of the graph's placeholders.

    Raises:
        InvalidModelError: they do not.
        InvalidOptionError: `float_model` is no module, or returns nothing that can be compared.
    """
    if not isinstance(float_model, nn.Module):
        raise InvalidOptionError("float_model", f"{float_model!r} is no module", "Pass the model that was prepared.")
    copied = deep_copy(float_model).eval()
    expected = tensors(_outputs(host, copied, arguments))
    if not expected:
        raise InvalidOptionError("float_model", "returns no floating-point values to compare", "Leave it out.")
    graph = host.float_graph
    error = _difference(_run(graph, graph.graph, arguments), expected)
    if not error <= _TOLERANCE:
        raise _changed(error, _folded_wrongly(host, copied, arguments))
    for write, reader, changed in _unread_writes(graph.graph, host.quantized_graph.graph):
        if not _difference(_run(graph, changed, arguments), expected) <= _TOLERANCE:
            raise InvalidModelError(
                f"node {write!r}",
                f"writes to a value in place, and the host's conversion loses that: {reader!r} reads what was before",
                "Write that operation out of place, and prepare the model again.",
            )


def _run(module: nn.Module, graph: fx.Graph, arguments: list[Any]) -> list[Tensor]:
    """The floating-point values that a graph returns."""
    stream = Stream(module, graph)
    ends = stream.output_node.all_input_nodes
    with torch.no_grad():
        values = dict(zip(ends, stream.outputs(arguments, ends), strict=True))
    return tensors(map_arg(stream.output_node.args[0], values.__getitem__))


def _outputs(host: Host, model: nn.Module, arguments: list[Any]) -> Any:
    """What a model returns for a copy of a batch; an error tells which model it was."""
    own = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, arguments)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return host.call(model, own)
    except Exception as error:
        error.add_note("while running float_model on the first batch")
        raise


def _difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference of an output, relative to its norm; infinite where the outputs do not fit."""
    if [one.shape for one in found] != [one.shape for one in expected]:
        return float("inf")
    errors = []
    for one, other in zip(found, expected, strict=True):
        differs = (one != other) & ~(one.isnan() & other.isnan())
        distance = (one.double() - other.double())[differs].norm()
        norm = other.double()[other.isfinite()].norm()
        errors.append(float(distance / norm) if norm else float(distance))
    # NaN where one of them alone is not finite
    return max(float("inf") if error != error else error for error in errors)


def _changed(error: float, layer: str | None) -> InvalidModelError:
    problem = f"its float graph differs from float_model on the first batch by {error:.2g} of the norm of the output"
    if layer is None:
        return InvalidModelError(
            "prepared",
            f"{problem}: it was made of another model, or the host's prepare step changes what this one computes",
            "Pass the float model that was prepared, as it was then.",
        )
    return InvalidModelError(
        "prepared",
        f"{problem}: the host folds a batch norm into layer {layer!r}, of which not every call is followed by that one",
        "Give each call a layer of its own, and prepare the model again.",
    )


def _folded_wrongly(host: Host, model: nn.Module, arguments: list[Any]) -> str | None:
    """The first layer whose calls are followed by different batch norms, or some by none."""
    followers: dict[str, list[nn.Module | None]] = {}

    def layer_called(name: str, output: Any) -> None:
        calls = followers.setdefault(name, [])
        if isinstance(output, Tensor):
            output.made_by = calls, len(calls)  # type: ignore[attr-defined]
        calls.append(None)

    def norm_called(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        made_by = getattr(inputs[0] if inputs else named.get("input"), "made_by", None)
        if made_by is not None:
            calls, number = made_by
            calls[number] = module

    for name, module in model.named_modules():
        if isinstance(module, Convolution | nn.Linear):
            module.register_forward_hook(lambda _, inputs, output, name=name: layer_called(name, output))
        elif isinstance(module, Normalization):
            module.register_forward_pre_hook(norm_called, with_kwargs=True)
    _outputs(host, model, arguments)
    return next((name for name, calls in followers.items() if len(set(calls)) > 1), None)


def _unread_writes(exact: fx.Graph, quantized: fx.Graph) -> Iterator[tuple[str, str, fx.Graph]]:
    """In-place operations whose results nodes read in the float graph, but not in the quantized one.

    With the name of the reader, and the float graph in which that one and all before read what the quantized one reads.
    """
    counterpart = {_named(node): node for node in quantized.nodes}
    graph = fx.Graph()
    graph.output(graph.graph_copy(exact, {}))
    by_name = {_named(node): node for node in graph.nodes}
    for node in list(graph.nodes):
        other = counterpart.get(_named(node))
        # one place after another: a node may read a value twice
        reads = [] if other is None else _read_by(other)
        for source, read in zip(_read_by(node), reads, strict=False):
            write, before = written_by(_source(source)), by_name.get(_named(_source(read)))
            if write not in (None, written_by(_source(read))) and before is not None:
                node.replace_input_with(source, before)
                yield str(write), _named(node), graph


def _read_by(node: fx.Node) -> list[fx.Node]:
    found: list[fx.Node] = []
    map_arg((node.args, node.kwargs), found.append)
    return found


def _named(node: fx.Node) -> str:
    return origin(node) if has_origin(node) else node.name


def _source(node: fx.Node) -> fx.Node:
    """What a value was before it was quantized or copied."""
    while quantizes(node) or unpacks(node) or is_clamp(node) or node.target is strided_copy:
        node = node.all_input_nodes[0]
    return node
