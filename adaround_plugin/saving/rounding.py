"""`save_rounding` and `load_rounding`: what `adaround` wrote into a prepared model, in a file and back."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.ao.quantization.backend_config import BackendConfig

from adaround_plugin.digests import digest
from adaround_plugin.errors import InvalidModelError
from adaround_plugin.files import check_path
from adaround_plugin.graph.compat import is_observed, take_over
from adaround_plugin.graph.fingerprint import differing, fingerprint
from adaround_plugin.hosts.base import Host
from adaround_plugin.hosts.open import host_type, open_host
from adaround_plugin.options import check_bool
from adaround_plugin.report import KEY, Report, get_report, set_report
from adaround_plugin.saving.layers import layer_facts, read_layer
from adaround_plugin.saving.observers import Reported, read_observers, write_observers
from adaround_plugin.storage import read_tensors, write_tensors

__all__ = ["load_rounding", "save_rounding"]

_KIND, _VERSION = "adaround_plugin rounding", 1
_AGAIN = "Save what adaround(...) returned again."
_SAME = "Prepare the float network that was learned, with the same configuration."
# so many names are told in an error
_SHOWN = 5


def save_rounding(
    learned: nn.Module, path: str | os.PathLike[str], *, backend_config: BackendConfig | None = None
) -> None:
    """Write what `adaround` learned of a prepared model into one file of the safetensors format, all or nothing.

    The file holds the integers of every weight, packed at their width, scales, zero points and biases, what activation
    observers report, and the report; of parameters that were not learned it holds digests alone.

    Args:
        learned: what `adaround` or `load_rounding` returned, before it is converted.
        path: of the file; one that is there is replaced.
        backend_config: the one given to `prepare_fx`, if any.

    Raises:
        InvalidOptionError: `path` is no path, or that of a folder, or lies in a folder that does not exist.
        InvalidModelError: `learned` is no such model, or was changed since, or has an observer without a per-tensor or
            per-channel scale.
    """
    target = check_path("path", path)
    report = get_report(learned)
    host = open_host(learned, backend_config)
    facts: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    for number, node in enumerate(host.nodes):
        described, held = layer_facts(host, node, f"layers.{number}")
        facts.append(described)
        tensors |= held
    observers = read_observers(host.prepared)
    if observers:
        tensors["observers.scale"] = torch.cat([one.scale.cpu() for one in observers.values()])
        tensors["observers.zero_point"] = torch.cat([one.zero_point.cpu() for one in observers.values()])
    content = {
        "toolkit": host.toolkit,
        "layers": facts,
        "observers": {name: [one.settings, one.scale.numel()] for name, one in observers.items()},
        "fingerprint": fingerprint(host.prepared),
        "report": report.to_json(indent=None),
    }
    write_tensors(target, _KIND, _VERSION, tensors, content)


def load_rounding(
    prepared: nn.Module,
    path: str | os.PathLike[str],
    *,
    backend_config: BackendConfig | None = None,
    inplace: bool = False,
) -> fx.GraphModule:
    """Put what `save_rounding` wrote into a freshly prepared model: it converts to the same model, bit for bit.

    Args:
        prepared: the same float network, prepared with the same configuration; it need not be calibrated.
        path: of the file.
        backend_config: the one given to `prepare_fx`, if any.
        inplace: change `prepared` itself, as a whole when all is done, instead of returning a deep copy.

    Returns:
        The prepared model with learned weights, biases and frozen observers, to be converted by the host; `get_report`
        reads what was done when it was learned.

    Raises:
        InvalidOptionError: `path` is no path, or that of a folder, or lies in a folder that does not exist.
        FileNotFoundError: there is no such file.
        InvalidModelError: the file is cut off, was changed, or is none of `save_rounding`; or `prepared` is not ready,
            is another network, has other weights, or was prepared with another configuration.
    """
    check_bool("inplace", inplace)
    tensors, content = read_tensors(check_path("path", path), _KIND, _VERSION, _AGAIN)
    if not is_observed(prepared):
        raise InvalidModelError(
            "prepared", "does not come from prepare_fx or prepare_pt2e", "Call the host's prepare step first."
        )
    assert isinstance(prepared, fx.GraphModule)
    kind = host_type(prepared)
    if kind.toolkit != content["toolkit"]:
        raise InvalidModelError(
            "prepared", f"was prepared for {kind.toolkit}, the file is of {content['toolkit']}", _SAME
        )
    ready = kind.copied(prepared)
    with torch.no_grad():
        write_observers(kind, ready, _reported(content["observers"], tensors))
    host = open_host(ready, backend_config)
    report = Report.from_json(content["report"])
    _check_weights(host, report.weights)
    roundings = {
        node.name: read_layer(host, node, facts, f"layers.{number}", tensors)
        for number, (node, facts) in enumerate(zip(host.nodes, content["layers"], strict=True))
    }
    loaded = host.copy()
    host.write(loaded, roundings, {})
    if others := differing(fingerprint(loaded), content["fingerprint"]):
        raise InvalidModelError("prepared", f"is not the network that was learned: {_some(others)} differ", _SAME)
    set_report(loaded, report)
    if not inplace:
        return loaded
    take_over(prepared, loaded, KEY)
    return prepared


def _reported(observers: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Reported]:
    """What each observer reports."""
    counts = [count for _, count in observers.values()]
    scales, zero_points = (
        torch.split(tensors[f"observers.{what}"], counts) if counts else () for what in ("scale", "zero_point")
    )
    return {
        name: Reported(settings, scale, zero_point)
        for (name, (settings, _)), scale, zero_point in zip(observers.items(), scales, zero_points, strict=True)
    }


def _check_weights(host: Host, weights: Mapping[str, str]) -> None:
    """Raise unless a model has the layers that were learned, with the weights that they were learned from.

    Args:
        host: of the model.
        weights: a digest of each, by name of the layer.
    """
    found = {node.name: digest(node.weight) for node in host.nodes}
    if others := sorted(found.keys() ^ weights.keys()):
        raise InvalidModelError("prepared", f"has other quantized layers than the file: {_some(others)}", _SAME)
    if others := differing(found, weights):
        raise InvalidModelError("prepared", f"has other float weights in {_some(others)}", _SAME)


def _some(names: list[str]) -> str:
    """Names, or the first of many."""
    left = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + left
