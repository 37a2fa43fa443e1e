"""What observers report, read from a calibrated model and put into another one, which may have seen no data.

An observer that keeps a range of what it saw is replaced by a frozen one, which reports the same scale and zero point.
AdaRound's activation observers stay, as a host's graph depends on them, and are told. The frozen observers of weights
are not meant: they belong to the layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from adaround_plugin.errors import InvalidModelError
from adaround_plugin.graph.arguments import attribute
from adaround_plugin.hosts.activation_observers import AdaRoundActivationMixin
from adaround_plugin.hosts.base import Host
from adaround_plugin.hosts.checks import observed_range
from adaround_plugin.hosts.grids import observed_spec
from adaround_plugin.hosts.weight_observers import AdaRoundWeightMixin, FrozenMixin
from adaround_plugin.rounding.grid import Grid, GridSpec

__all__ = ["Reported", "read_observers", "write_observers"]

_WITH_ZERO_POINT = (
    *(torch.per_tensor_symmetric, torch.per_tensor_affine),
    *(torch.per_channel_symmetric, torch.per_channel_affine),
)


@dataclass(frozen=True)
class Reported:
    """What an observer reports.

    Attributes:
        settings: its integer range, scheme and dtype, in words.
        scale, zero_point: `(1,)` or `(channels,)`.
    """

    settings: str
    scale: Tensor
    zero_point: Tensor


def read_observers(model: nn.Module) -> dict[str, Reported]:
    """What each observer of a model reports that keeps a range, by qualified name.

    Raises:
        InvalidModelError: an observer has no per-tensor or per-channel scale.
    """
    found = {}
    for name, observer in _observers(model).items():
        settings = _settings(name, observer)
        scale, zero_point = observer.calculate_qparams()
        found[name] = Reported(settings, scale.detach().reshape(-1), zero_point.detach().reshape(-1))
    return found


def write_observers(host: type[Host], model: fx.GraphModule, reported: Mapping[str, Reported]) -> None:
    """Let the observers of a model report this from now on, in place, and show weights to their observers.

    Args:
        host: of the model.
        model: a copy of a prepared model.
        reported: by qualified name.

    Raises:
        InvalidModelError: the model has other observers.
    """
    for observer, parameter in _of_parameters(model):
        if observed_range(observer) is None or _is_unseen(observer):
            # as calibration would
            observer(parameter)
    observers = _observers(model)
    unseen = [name for name, observer in observers.items() if name not in reported and _is_unseen(observer)]
    strange = [*unseen, *(name for name in reported if name not in observers)]
    if strange:
        raise InvalidModelError(
            "prepared",
            f"has other observers than the model that was saved: {strange}",
            "Prepare the same network with the same configuration.",
        )
    for name, one in reported.items():
        observer = observers[name]
        found = _settings(name, observer)
        if found != one.settings:
            raise InvalidModelError(
                f"observer {name!r}",
                f"has {found}, that of the model that was saved {one.settings}",
                "Prepare the network with the same configuration.",
            )
        if isinstance(observer, AdaRoundActivationMixin):
            observer.restore(float(one.scale), int(one.zero_point))
        else:
            host.freeze(model, name, _grid(observer, one))


def _observers(model: nn.Module) -> dict[str, Any]:
    """Observers that report one scale for all data, by qualified name; not ours of parameters."""
    of_parameters = {id(observer) for observer, _ in _of_parameters(model)}
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "calculate_qparams")
        and not getattr(module, "is_dynamic", False)
        and (
            observed_range(module) is not None
            # of weights that are computed, too
            or (isinstance(module, FrozenMixin | AdaRoundWeightMixin) and id(module) not in of_parameters)
        )
    }


def _settings(name: str, observer: Any) -> str:
    """The integer range, scheme and dtype of an observer."""
    if getattr(observer, "qscheme", None) not in _WITH_ZERO_POINT:
        raise InvalidModelError(
            f"observer {name!r}",
            f"{type(observer).__name__} has no per-tensor or per-channel scale with an integer zero point",
            "Save the converted model instead.",
        )
    spec = _spec(observer)
    axis = "" if spec.ch_axis is None else f" along axis {spec.ch_axis}"
    return f"{spec.dtype} from {spec.quant_min} to {spec.quant_max}, {spec.qscheme}{axis}"


def _grid(observer: Any, reported: Reported) -> Grid:
    spec, device = _spec(observer), observer.eps.device
    scale, zero_point = (spec.per_channel(value.to(device)) for value in (reported.scale, reported.zero_point))
    # with the dtype of the zero point that the observer has
    return replace(spec.at(scale, zero_point), zero_point=zero_point)


def _spec(observer: Any) -> GridSpec:
    """The grid of an observer without its scale."""
    if isinstance(observer, FrozenMixin):
        return observer.chosen()
    return observer.spec if isinstance(observer, AdaRoundWeightMixin) else observed_spec(observer)


def _is_unseen(observer: nn.Module) -> bool:
    """Whether an observer keeps a range, and has none yet."""
    range_ = observed_range(observer)
    if range_ is None:
        return False
    low, high = range_
    return low.numel() == 0 or bool((low > high).any())


def _of_parameters(model: nn.Module) -> Iterator[tuple[nn.Module, Tensor]]:
    """Observers of weights and other parameters, and what they watch."""
    for graph in [module for module in model.modules() if isinstance(module, fx.GraphModule)]:
        for node in graph.graph.nodes:
            source = node.args[0] if node.op == "call_module" and node.args else None
            if isinstance(source, fx.Node) and source.op == "get_attr":
                observer = graph.get_submodule(str(node.target))
                if hasattr(observer, "calculate_qparams"):
                    yield observer, attribute(graph, str(source.target)).detach()
