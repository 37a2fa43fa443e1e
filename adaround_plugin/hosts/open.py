"""Which host a prepared model belongs to."""

from __future__ import annotations

import torch
from torch import fx, nn
from torch.ao.quantization.backend_config import BackendConfig

from adaround_plugin.errors import InvalidOptionError
from adaround_plugin.graph.compat import has_export_inputs, operator_name
from adaround_plugin.hosts.base import Host
from adaround_plugin.hosts.biases import with_integer_bias
from adaround_plugin.hosts.fx.host import PreparedFX

__all__ = ["host_type", "is_exported", "open_host"]

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
    if backend_config is not None and is_exported(prepared):
        raise InvalidOptionError("backend_config", "is for prepare_fx only", "Leave it out: PT2E has a quantizer.")
    kind = host_type(prepared)
    with _CPU:
        return kind(prepared) if backend_config is None else PreparedFX(prepared, backend_config)


def host_type(prepared: nn.Module) -> type[Host]:
    """The class of a prepared model's host.

    Raises:
        MissingDependencyError: torchao is not installed.
    """
    if not is_exported(prepared):
        return PreparedFX
    from adaround_plugin.hosts.pt2e.host import PreparedPT2E

    return PreparedPT2E


def is_exported(model: nn.Module) -> bool:
    """Whether a model is a graph of ATen operators, as torch.export makes them: `torch.fx` keeps operators that the
    model itself calls so."""
    return (
        isinstance(model, fx.GraphModule)
        and has_export_inputs(model)
        and any(node.op == "call_function" and operator_name(node)[1] for node in model.graph.nodes)
    )
