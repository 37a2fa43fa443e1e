"""Which host a prepared model belongs to."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.ao.quantization.backend_config import BackendConfig

from adaround_plugin.errors import InvalidOptionError
from adaround_plugin.graph.compat import operator_name
from adaround_plugin.hosts.base import Host
from adaround_plugin.hosts.fx.host import PreparedFX
from adaround_plugin.rounding.grid import Grid

__all__ = ["is_exported", "learned_weights", "open_host"]

# hosts convert as they do by default, whatever torch's default device is
_CPU = torch.device("cpu")


def open_host(prepared: nn.Module, backend_config: BackendConfig | None = None) -> Host:
    """The host of a prepared model: PT2E for graphs of ATen operators, else FX.

    Raises:
        InvalidModelError: the model is not ready for the pass.
        InvalidOptionError: a backend configuration for a PT2E model, or something else in its place.
        MissingDependencyError: torchao is not installed.
        NonFiniteError: a weight holds NaN or infinity.
    """
    if backend_config is not None and not isinstance(backend_config, BackendConfig):
        raise InvalidOptionError(
            "backend_config", f"{backend_config!r} is not a BackendConfig", "Pass a torch.ao BackendConfig."
        )
    if not is_exported(prepared):
        with _CPU:
            return PreparedFX(prepared, backend_config)
    if backend_config is not None:
        raise InvalidOptionError("backend_config", "is for prepare_fx only", "Leave it out: PT2E has a quantizer.")
    from adaround_plugin.hosts.pt2e.host import PreparedPT2E

    assert isinstance(prepared, fx.GraphModule)
    with _CPU:
        return PreparedPT2E(prepared)


def learned_weights(prepared: nn.Module) -> dict[str, tuple[Tensor, Grid]]:
    """Integers (int64, of the weight's shape) and grid of every weight that `adaround` wrote, by layer name."""
    nodes = open_host(prepared).nodes
    return {name: (node.grid.nearest(node.weight), node.grid) for node in nodes for name in node.names}


def is_exported(model: nn.Module) -> bool:
    """Whether a model is a graph of ATen operators."""
    return isinstance(model, fx.GraphModule) and any(
        node.op == "call_function" and operator_name(node)[1] for node in model.graph.nodes
    )
