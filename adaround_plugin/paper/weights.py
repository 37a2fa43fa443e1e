"""Integers of one's own choice in a prepared model: by a rounding scheme, the best of some draws, or given outright.

This is the paper's table 1 (arXiv 2004.10568), and the way back from a rounding problem that was solved by hand.
Nothing is judged here: no layer falls back to nearest. Scales and biases stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.ao.quantization.backend_config import BackendConfig

from adaround_plugin.errors import InvalidOptionError
from adaround_plugin.hosts.base import Host, WeightedNode, handed_over
from adaround_plugin.hosts.open import open_host
from adaround_plugin.names import select
from adaround_plugin.options import check_bool, check_integer, check_mapping, check_seed
from adaround_plugin.report import KEY
from adaround_plugin.rounding.result import LayerRounding
from adaround_plugin.rounding.schemes import Scheme, get_scheme

__all__ = ["Draws", "best_of_draws", "named_node", "round_weights", "write_integers"]


def round_weights(
    prepared: nn.Module,
    scheme: Scheme,
    layers: Iterable[str] | None = None,
    *,
    seed: int = 0,
    backend_config: BackendConfig | None = None,
    inplace: bool = False,
) -> fx.GraphModule:
    """Round the weights of a prepared model by a scheme that looks at no data; the host's convert keeps the integers.

    Args:
        prepared: a calibrated model from `prepare_fx` or `prepare_pt2e`.
        scheme: `"nearest"`, `"floor"`, `"ceil"` or `"stochastic"` (one draw).
        layers: names (a parent's name covers its children) or regular expressions of the layers to round so; None for
            all. The other layers that the host quantizes are rounded to nearest. To keep a layer in float, give it no
            qconfig.
        seed: of `"stochastic"`, whose draws follow one another in the order of the graph.
        backend_config: the one given to `prepare_fx`, if any.
        inplace: change `prepared` itself instead of a deep copy.

    Raises:
        InvalidOptionError: an unknown scheme, or a name that selects no quantized layer.
        InvalidModelError: the model is not ready, see `adaround`.
    """
    rounded = get_scheme(scheme, seed)
    check_bool("inplace", inplace)
    host = open_host(prepared, backend_config)
    chosen = _selected(host, layers)
    return _written(host, {node.name: rounded(node.grid, node.weight) for node in chosen}, inplace)


def write_integers(
    prepared: nn.Module,
    integers: Mapping[str, Tensor],
    *,
    backend_config: BackendConfig | None = None,
    inplace: bool = False,
) -> fx.GraphModule:
    """Write integers into a prepared model, on the grids of its observers; the host's convert keeps them.

    Args:
        prepared: a calibrated model from `prepare_fx` or `prepare_pt2e`.
        integers: by name of the layer, of its weight's shape, of an integer type and inside its range. Layers that
            are not named are rounded to nearest.
        backend_config, inplace: as in `round_weights`.

    Raises:
        InvalidOptionError: a name that is no quantized layer's, or integers that do not fit it.
        InvalidModelError: the model is not ready, see `adaround`.
    """
    check_mapping("integers", integers)
    check_bool("inplace", inplace)
    host = open_host(prepared, backend_config)
    given: dict[str, Tensor] = {}
    for name, values in integers.items():
        node = named_node(host, name, "integers")
        _check_fits(name, values, node)
        found = values.to(node.weight.device, torch.int64)
        if not torch.equal(given.setdefault(node.name, found), found):
            raise InvalidOptionError(
                f"integers of {name!r}", "are others than those of a layer that it is tied to", "Pass them once."
            )
    return _written(host, given, inplace)


@dataclass(frozen=True)
class Draws:
    """Stochastic roundings and what they are worth.

    Attributes:
        model: the prepared model with the best of them, to be converted by the host.
        best: its number.
        scores: of every draw. Draw `i` is `round_weights(..., "stochastic", seed=seed + i)`.
    """

    model: fx.GraphModule
    best: int
    scores: tuple[float, ...]


def best_of_draws(
    prepared: nn.Module,
    score: Callable[[fx.GraphModule], float],
    draws: int = 100,
    layers: Iterable[str] | None = None,
    *,
    seed: int = 0,
    backend_config: BackendConfig | None = None,
) -> Draws:
    """The best of some stochastic roundings by a score of the network, "Stochastic (best)" of the paper's table 1.

    Args:
        prepared: a calibrated model from `prepare_fx` or `prepare_pt2e`; it stays as it is.
        score: from a prepared model to a number, higher is better: convert it (each is a copy, which convert may use
            up) and measure, for example, its accuracy.
        draws: how many.
        layers, backend_config: as in `round_weights`.
        seed: of the first draw.

    Raises:
        InvalidOptionError: `draws` is not positive, `score` returns NaN, or as in `round_weights`.
        InvalidModelError: the model is not ready, see `adaround`.
    """
    check_integer("draws", draws, least=1)
    check_seed("seed", seed)
    if not callable(score):
        raise InvalidOptionError("score", f"{score!r} is not callable", "Pass a function of one prepared model.")
    host = open_host(prepared, backend_config)
    chosen = _selected(host, layers)

    def drawn(i: int) -> fx.GraphModule:
        rounded = get_scheme("stochastic", seed + i)
        return _written(host, {node.name: rounded(node.grid, node.weight) for node in chosen}, inplace=False)

    scores = tuple(float(score(drawn(i))) for i in range(draws))
    if any(value != value for value in scores):
        raise InvalidOptionError("score", "returned NaN", "Return a number, higher for a better model.")
    best = max(range(draws), key=scores.__getitem__)
    return Draws(drawn(best), best, scores)


def named_node(host: Host, name: str, argument: str = "name") -> WeightedNode:
    """The weighted node of exactly this name.

    Raises:
        InvalidOptionError: the host quantizes no weight of that name; the reason is given where there is one.
    """
    nodes = {own: node for node in host.nodes for own in node.names}
    if name in nodes:
        return nodes[name]
    reasons = {entry.name: entry.reason for entry in host.skipped}
    if name in reasons:
        raise InvalidOptionError(argument, f"layer {name!r} cannot be rounded: {reasons[name]}", "Choose another.")
    raise InvalidOptionError(argument, f"{name!r} is none of {sorted(nodes)}", "Check the name.")


def _selected(host: Host, layers: Iterable[str] | None) -> list[WeightedNode]:
    """The weighted nodes that patterns select, in the order of the graph."""
    if layers is None:
        return host.nodes
    patterns = list(layers) if isinstance(layers, Iterable) and not isinstance(layers, str) else None
    if patterns is None or not all(isinstance(pattern, str) for pattern in patterns):
        raise InvalidOptionError("layers", f"{layers!r} is not a list of names", "Pass a list, or None for all.")
    names = [name for node in host.nodes for name in node.names]
    found = {name for pattern in patterns for name in select(pattern, names, "layers")}
    return [node for node in host.nodes if found.intersection(node.names)]


def _check_fits(name: str, values: Tensor, node: WeightedNode) -> None:
    """Raise `InvalidOptionError` unless the values are integers of the layer's shape and range."""
    if not isinstance(values, Tensor):
        raise InvalidOptionError(f"integers of {name!r}", f"are {type(values).__name__}", "Pass an integer tensor.")
    if values.dtype == torch.bool or values.is_floating_point() or values.is_complex():
        raise InvalidOptionError(f"integers of {name!r}", f"are {values.dtype}", "Pass an integer tensor.")
    if values.shape != node.weight.shape:
        problem = f"have shape {tuple(values.shape)}, the weight has {tuple(node.weight.shape)}"
        raise InvalidOptionError(f"integers of {name!r}", problem, "Pass one integer for each weight.")
    low, high = node.grid.quant_min, node.grid.quant_max
    # torch compares unsigned integers with negative numbers in their own range
    values = values.to(torch.int64)
    if bool(((values < low) | (values > high)).any()):
        raise InvalidOptionError(f"integers of {name!r}", f"leave the range [{low}, {high}]", "Clip them to it.")


def _written(host: Host, integers: Mapping[str, Tensor], inplace: bool) -> fx.GraphModule:
    """The prepared model, or a copy, with integers by name of the weighted node and nearest elsewhere."""
    roundings = {}
    for node in host.nodes:
        values = integers[node.name] if node.name in integers else node.grid.nearest(node.weight)
        roundings[node.name] = LayerRounding(node.grid, values)
    with torch.no_grad():
        model = host.copy()
        host.write(model, roundings, {})
    # a report that the model carries is about other integers
    model.meta.pop(KEY, None)
    return handed_over(host, model, inplace, KEY)
