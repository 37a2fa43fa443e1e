"""Which host a prepared model belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.ao.quantization.backend_config import BackendConfig

from adaround_plugin.errors import InvalidOptionError
from adaround_plugin.graph.arguments import argument
from adaround_plugin.graph.compat import operator_name
from adaround_plugin.hosts.base import Host, WeightedNode
from adaround_plugin.hosts.biases import bias_at, with_integer_bias
from adaround_plugin.hosts.fx.host import PreparedFX
from adaround_plugin.rounding.grid import Grid

__all__ = ["LearnedLayer", "is_exported", "learned_layers", "learned_weights", "open_host"]

# hosts convert as they do by default, whatever torch's default device is
_CPU = torch.device("cpu")


def open_host(
    prepared: nn.Module, backend_config: BackendConfig | None = None, *, integer_biases: bool = False
) -> Host:
    """The host of a prepared model: PT2E for graphs of ATen operators, else FX.

    Args:
        prepared, backend_config, integer_biases: as of `adaround`.

    Raises:
        InvalidModelError: the model is not ready for the pass.
        InvalidOptionError: a backend configuration for a PT2E model, or something else in its place; or integer biases
            where no layer can have one.
        MissingDependencyError: torchao is not installed.
        NonFiniteError: a weight holds NaN or infinity.
    """
    if backend_config is not None and not isinstance(backend_config, BackendConfig):
        raise InvalidOptionError(
            "backend_config", f"{backend_config!r} is not a BackendConfig", "Pass a torch.ao BackendConfig."
        )
    host = _opened(prepared, backend_config)
    if integer_biases:
        host.nodes = [with_integer_bias(host, node) for node in host.nodes]
        if all(node.float_bias for node in host.nodes):
            first = host.nodes[0]
            raise InvalidOptionError(
                "integer_biases", f"no layer can have one: of {first.name!r}, {first.float_bias}", "Leave it out."
            )
    return host


def _opened(prepared: nn.Module, backend_config: BackendConfig | None) -> Host:
    if not is_exported(prepared):
        with _CPU:
            return PreparedFX(prepared, backend_config)
    if backend_config is not None:
        raise InvalidOptionError("backend_config", "is for prepare_fx only", "Leave it out: PT2E has a quantizer.")
    from adaround_plugin.hosts.pt2e.host import PreparedPT2E

    assert isinstance(prepared, fx.GraphModule)
    with _CPU:
        return PreparedPT2E(prepared)


@dataclass(frozen=True)
class LearnedLayer:
    """What `adaround` wrote for one weight.

    Attributes:
        integers: int64, of the weight's shape.
        grid: their scale, zero point and range.
        modules: the learned bias `(out,)` of each module that uses the weight, by its name: tied layers have each
            their own. None where there is none. Empty where the host leaves no way to change them.
    """

    integers: Tensor
    grid: Grid
    modules: Mapping[str, Tensor | None]


def learned_layers(prepared: nn.Module) -> dict[str, LearnedLayer]:
    """Every weight that `adaround` wrote, by layer name; tied names have the same object."""
    host = open_host(prepared)
    layers = {
        node: LearnedLayer(node.grid.nearest(node.weight), node.grid, _modules(host, node)) for node in host.nodes
    }
    return {name: layers[node] for node in host.nodes for name in node.names}


def learned_weights(prepared: nn.Module) -> dict[str, tuple[Tensor, Grid]]:
    """Integers (int64, of the weight's shape) and grid of every weight that `adaround` wrote, by layer name."""
    return {name: (layer.integers, layer.grid) for name, layer in learned_layers(prepared).items()}


def _modules(host: Host, node: WeightedNode) -> dict[str, Tensor | None]:
    """The modules that use a weight, and their biases: the one that is called, and the one that the bias belongs to."""
    if node.bias == "fixed":
        return {}
    found: dict[str, Tensor | None] = {}
    for site in node.sites:
        call = site.float_node
        bias = bias_at(host, call)
        if call.op == "call_module":
            found[str(call.target)] = bias
            continue
        # imported where it is needed, as only exported programs need torchao
        from adaround_plugin.hosts.pt2e.nodes import innermost_module

        caller, _ = innermost_module(call)
        found[caller] = bias
        source = argument(call, 2, "bias")
        if source is not None:
            found.setdefault(str(source.target).rpartition(".")[0], bias)
    return found


def is_exported(model: nn.Module) -> bool:
    """Whether a model is a graph of ATen operators."""
    return isinstance(model, fx.GraphModule) and any(
        node.op == "call_function" and operator_name(node)[1] for node in model.graph.nodes
    )
