"""Options for single layers of an exported program, which its quantizers take by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import fx

from adaround_plugin.graph.arguments import argument
from adaround_plugin.graph.compat import has_export_inputs
from adaround_plugin.graph.operators import is_weighted_function
from adaround_plugin.names import select
from adaround_plugin.options import check_mapping

__all__ = ["LayerOptions", "check_layers", "is_body", "layer_names", "options_by_name"]

# by qualified name, name of a parent, or regular expression; None where the quantizer leaves a layer alone
LayerOptions = Mapping[str, Mapping[str, Any] | None]


def check_layers(
    layers: LayerOptions | None, check: Callable[[Mapping[str, Any]], None]
) -> dict[str, Mapping[str, Any] | None]:
    """A copy of the options for single layers.

    Args:
        layers: as the user gave them.
        check: raises `InvalidOptionError` about the options of one entry.

    Raises:
        InvalidOptionError: no mapping of strings, or options that `check` refuses.
    """
    if layers is None:
        return {}
    check_mapping("layers", layers)
    for pattern, changed in layers.items():
        if changed is not None:
            check_mapping(f"layers[{pattern!r}]", changed)
            check(changed)
    return dict(layers)


def layer_names(model: fx.GraphModule) -> dict[fx.Node, str]:
    """The calls of linear layers and convolutions whose weight is a parameter, with the names of the layers."""
    weights = {node: argument(node, 1, "weight") for node in model.graph.nodes if is_weighted_function(node)}
    return {
        node: str(weight.target).removesuffix(".weight")
        for node, weight in weights.items()
        if isinstance(weight, fx.Node) and weight.op == "get_attr"
    }


def is_body(model: fx.GraphModule) -> bool:
    """Whether a graph is the body of a control flow operator, which `prepare_pt2e` has annotated by itself.

    Its weights are inputs, and have no names.
    """
    return not has_export_inputs(model)


def options_by_name(
    model: fx.GraphModule, names: Iterable[str], options: Mapping[str, Any], layers: LayerOptions
) -> dict[str, Mapping[str, Any] | None]:
    """The options of each layer of a program by its name; the last entry of `layers` that matches counts.

    Raises:
        InvalidOptionError: an entry of `layers` matches no name; not in the body of a control flow operator.
    """
    names = list(dict.fromkeys(names))
    if not names and is_body(model):
        return {}
    found: dict[str, Mapping[str, Any] | None] = dict.fromkeys(names, options)
    for pattern, changed in layers.items():
        for name in select(pattern, names, f"layers[{pattern!r}]"):
            found[name] = None if changed is None else {**options, **changed}
    return found
