"""Which layers of a float model a configuration can address, and how."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx, nn

from adaround_plugin.errors import InvalidModelError, InvalidOptionError
from adaround_plugin.graph.compat import Convolution, is_observed
from adaround_plugin.graph.operators import is_weighted_function
from adaround_plugin.hosts.open import is_exported
from adaround_plugin.hosts.pt2e.nodes import innermost_module
from adaround_plugin.inc.recording import Layer, Recording
from adaround_plugin.names import select

__all__ = ["WEIGHTED", "Layer", "is_type", "selected", "text", "weighted_layers"]

WEIGHTED: tuple[type[nn.Module], ...] = (nn.Linear, Convolution)


def weighted_layers(model: nn.Module, linear_only: bool = False) -> list[Layer]:
    """The linear layers and, if wanted, the convolutions; those of the float model, where `model` is prepared.

    Linear layers alone are those to be packed: of a class that computes something of its own, nothing would be left.
    In an exported program both count, and a functional call as its module's own: name and type are of that module.

    Raises:
        InvalidModelError: `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise InvalidModelError("model", f"is a {type(model).__name__}, no module", "Pass program.module().")
    # an eager model has its own names still, whatever it records
    recording = Recording.of(model) if is_observed(model) else None
    if recording is not None:
        return recording.layers
    if is_exported(model):
        assert isinstance(model, fx.GraphModule)
        owners = [innermost_module(node) for node in model.graph.nodes if is_weighted_function(node)]
        return list(dict.fromkeys((path, kind.rpartition(".")[2]) for path, kind in owners if path))
    return [
        (name, type(module).__name__)
        for name, module in model.named_modules(remove_duplicate=False)
        if name and (_is_packed(module) if linear_only else isinstance(module, WEIGHTED))
    ]


def _is_packed(module: nn.Module) -> bool:
    """Whether INC's packed layer computes what a module does."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def text(key: str | type) -> str:
    """The key of a local part as JSON can hold it: a type by its name."""
    return key.__name__ if isinstance(key, type) else key


def is_type(key: str | type, layers: Sequence[Layer]) -> bool:
    """Whether the key of a local part means a type of layer, rather than names."""
    return isinstance(key, type) or any(kind == key for _, kind in layers)


def selected(key: str | type, layers: Sequence[Layer]) -> list[Layer]:
    """The layers that the key of a local part selects.

    Raises:
        InvalidOptionError: it selects none.
    """
    if not is_type(key, layers):
        kind_of = dict(layers)
        return [(name, kind_of[name]) for name in select(text(key), kind_of, "white_list or set_local")]
    found = [(name, kind) for name, kind in layers if kind == text(key)]
    if not found:
        kinds = sorted({kind for _, kind in layers})
        raise InvalidOptionError("white_list or set_local", f"no layer is a {text(key)}", f"There are {kinds}.")
    return found
