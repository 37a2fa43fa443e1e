"""Methods by name: what `adaround(method=...)` does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from adaround_plugin.errors import InvalidOptionError
from adaround_plugin.hosts.base import Host
from adaround_plugin.learning.blockwise import BlockWise
from adaround_plugin.learning.finetuning import Finetune
from adaround_plugin.learning.layerwise import LayerWise
from adaround_plugin.learning.paper import Paper
from adaround_plugin.learning.passes import Pass
from adaround_plugin.solvers import Nearest

__all__ = ["METHODS", "Method", "Preset", "get_preset"]


@runtime_checkable
class Method(Protocol):
    """A way to decide every layer of a network: `LayerWise`, `BlockWise` or `Paper`."""

    @property
    def layers(self) -> LayerWise:
        """How each layer is decided, or started."""

    @property
    def is_baseline(self) -> bool:
        """Whether this is round-to-nearest, with nothing learned after it."""

    def check(self, host: Host) -> None:
        """Raise `InvalidOptionError` where the method does not fit the network."""

    def with_layers(self, layers: LayerWise) -> Method:
        """The method whose layers are decided so."""

    def learn(self, run: Pass) -> None:
        """Decide every layer of a pass."""


@dataclass(frozen=True)
class Preset:
    """A method, and how the whole network is finetuned after it; None for not at all."""

    method: Method
    finetune: Finetune | None = None


METHODS: Mapping[str, Preset] = {
    # second moments, annealed: 4 and 3 bits
    "default": Preset(LayerWise()),
    # the baseline
    "nearest": Preset(LayerWise(solver=Nearest())),
    # all roundings of a block together
    "blocks": Preset(BlockWise()),
    # blocks where activations have few bits, then the whole network, integers of 2 bits too (docs/benchmarks.md)
    "best": Preset(BlockWise(layers=LayerWise(), blocks="auto"), Finetune(integers="auto")),
    # Nagel et al. 2020 to the letter
    "paper": Preset(Paper()),
}


def get_preset(method: str | Method | Preset) -> Preset:
    """The preset of that name, or of that method alone; a preset is itself.

    Raises:
        InvalidOptionError: no preset has that name, or the object is no method.
    """
    if isinstance(method, str):
        if method not in METHODS:
            raise InvalidOptionError("method", f"{method!r} is not known", f"Pass one of {list(METHODS)}.")
        return METHODS[method]
    if isinstance(method, Preset):
        return method
    if isinstance(method, type) or not isinstance(method, Method):
        known = "LayerWise(...), BlockWise(...) or Paper(...)"
        raise InvalidOptionError("method", f"{method!r} is not a method", f"Pass one of {list(METHODS)}, or {known}.")
    return Preset(method)
