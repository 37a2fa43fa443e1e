"""Activations whose scale is ours to choose: their observers in the prepared graph, their quantize nodes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import fx, nn

from adaround_plugin.graph.arguments import attribute, owner_of
from adaround_plugin.graph.clamps import is_clamp
from adaround_plugin.graph.paths import quantizes
from adaround_plugin.graph.streams import Stream, unpacks
from adaround_plugin.graph.transforms import has_origin, origin
from adaround_plugin.hosts.activation_observers import AdaRoundActivationMixin, grid_ends
from adaround_plugin.hosts.base import ActivationQuantizer

__all__ = ["activation_quantizers", "quantize_nodes", "scale_of", "write_scales"]

# what is observed: origin of the node, scale, zero point, range
_Observed = tuple[str, float, int, int, int]


def activation_quantizers(
    prepared: fx.GraphModule, quantized: fx.GraphModule, fixed: Collection[nn.Module] = ()
) -> list[ActivationQuantizer]:
    """Find the activations that an `AdaRoundActivationObserver` watches.

    Observers that are one object, or watch one node with one scale, have their scale in common.

    Args:
        prepared: the prepared graph, written out, with its observers.
        quantized: the host's conversion of it, written out.
        fixed: observers whose scale another one is derived from.
    """
    found: dict[_Observed, list[str]] = defaultdict(list)
    observers: dict[int, list[_Observed]] = defaultdict(list)
    for node in prepared.graph.nodes:
        observer = prepared.get_submodule(node.target) if node.op == "call_module" else None
        if not isinstance(observer, AdaRoundActivationMixin) or observer in fixed:
            continue
        scale, zero_point = (value.item() for value in observer.calculate_qparams())
        key = (origin(node.args[0]), scale, int(zero_point), observer.quant_min, observer.quant_max)
        found[key].append(str(node.target))
        observers[id(observer)].append(key)
    nodes = quantize_nodes(quantized)
    result = []
    for keys in _connected(list(observers.values())):
        ours = [node for key in keys for node in nodes[key[0]] if _settings(quantized, node) == key[1:3]]
        if ours:
            names = tuple(dict.fromkeys(name for key in keys for name in found[key]))
            result.append(_quantizer(names, ours, keys[0]))
    return result


def write_scales(model: nn.Module, scales: Mapping[str, float]) -> None:
    """Let observers report other scales, by their qualified names."""
    for name, scale in scales.items():
        observer = model.get_submodule(name)
        assert isinstance(observer, AdaRoundActivationMixin)
        observer.keep(scale)


def scale_of(quantized: fx.GraphModule, node: fx.Node) -> float | None:
    """The scale of a quantize node; None where it is computed."""
    scale: float | None = _settings(quantized, node)[0]
    return scale


def quantize_nodes(quantized: fx.GraphModule) -> dict[str, list[fx.Node]]:
    """Quantize nodes by the origin of what they quantize."""
    found: dict[str, list[fx.Node]] = defaultdict(list)
    for node in quantized.graph.nodes:
        if quantizes(node):
            source = node.args[0]
            source = source.args[0] if is_clamp(source) else source
            if has_origin(source):
                found[origin(source)].append(node)
    return found


def _connected(groups: list[list[_Observed]]) -> list[list[_Observed]]:
    """Groups that share a member, put together; members in order and once."""
    result: list[list[_Observed]] = []
    for group in groups:
        touching = [other for other in result if not set(other).isdisjoint(group)]
        result = [other for other in result if other not in touching]
        result.append(list(dict.fromkeys(key for other in (*touching, group) for key in other)))
    return result


def _settings(quantized: fx.GraphModule, node: fx.Node) -> tuple[Any, ...]:
    """Scale and zero point of a quantize node: numbers in PT2E, buffers in FX; None where they are computed."""
    values = []
    for argument in node.args[1:3]:
        if isinstance(argument, fx.Node):
            argument = attribute(quantized, str(argument.target)).item() if argument.op == "get_attr" else None
        values.append(argument)
    return tuple(values)


def _quantizer(names: tuple[str, ...], nodes: list[fx.Node], observed: _Observed) -> ActivationQuantizer:
    _, scale, zero_point, quant_min, quant_max = observed
    sources = [node.args[0] for node in nodes]
    clamps = tuple(dict.fromkeys(node for node in sources if isinstance(node, fx.Node) and is_clamp(node)))

    def set_scale(stream: Stream, value: float) -> None:
        for clamp in clamps:
            low, high = grid_ends(value, zero_point, quant_min, quant_max)
            stream.replace_arguments(clamp, (clamp.args[0], low, high))
        for node in nodes:
            argument = node.args[1]
            if isinstance(argument, fx.Node):
                module, leaf = owner_of(stream.module, str(argument.target))
                # a new tensor: other streams have the old one
                setattr(module, leaf, torch.full_like(getattr(module, leaf), value))
                continue
            unpacking = [user for user in node.users if unpacks(user)]
            for one in (node, *unpacking):
                stream.replace_arguments(one, (one.args[0], value, *one.args[2:]))

    return ActivationQuantizer(
        names=names,
        nodes=tuple(nodes),
        clamps=clamps,
        scale=scale,
        zero_point=zero_point,
        quant_min=quant_min,
        quant_max=quant_max,
        set_scale=set_scale,
    )
