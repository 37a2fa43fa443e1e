"""Which activations of the batches lie outside of what their observers saw, and are clipped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from adaround_plugin.hosts.base import ObservedActivation
from adaround_plugin.processes import ALONE, Processes
from adaround_plugin.report import ClippedActivation

__all__ = ["RangeTally"]

# entries of an activation that are looked at in a batch: about so many, evenly spread
_ENTRIES = 2**14
# observers that follow a moving average do not keep the ends of what they saw: what is farther outside than this part
# of the range is no matter of that, and a larger share than this no matter of chance
_BEYOND, _SHARE = 0.05, 0.01


@dataclass
class _Seen:
    """What was seen of one activation.

    Attributes:
        least, greatest: value, tensors without an axis.
        outside: how many entries lay outside of the observed range, such a tensor.
        entries: how many were looked at.
    """

    least: Tensor
    greatest: Tensor
    outside: Tensor
    entries: int

    def add(self, other: _Seen) -> _Seen:
        return _Seen(
            torch.minimum(self.least, other.least),
            torch.maximum(self.greatest, other.greatest),
            self.outside + other.outside,
            self.entries + other.entries,
        )


class RangeTally:
    """Looks at the values of the float network as a pass computes them; nothing waits for a GPU before `clipped`.

    Args:
        observed: what is quantized.
        inputs: nodes whose values are known before anything runs.
    """

    def __init__(self, observed: Sequence[ObservedActivation], inputs: Sequence[fx.Node]) -> None:
        self._observed = {one.node: one for one in observed}
        self._inputs = list(inputs)
        self._seen: dict[fx.Node, _Seen] = {}
        self._due: set[fx.Node] = set()

    def due(self, nodes: Iterable[fx.Node]) -> list[fx.Node]:
        """Those of the nodes that run next, and of the inputs, that are to be looked at, each once in a pass."""
        new = dict.fromkeys((*self._inputs, *nodes))
        found = [node for node in new if node in self._observed and node not in self._due]
        self._due.update(found)
        return found

    def look(self, nodes: Iterable[fx.Node], values: Mapping[fx.Node, Any]) -> None:
        """Look at the values of some nodes in one batch."""
        for node in nodes:
            value = values[node]
            if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
                found = self._of(self._observed[node], value)
                self._seen[node] = self._seen[node].add(found) if node in self._seen else found

    @staticmethod
    def _of(observed: ObservedActivation, value: Tensor) -> _Seen:
        # in the order of the memory, so that nothing is copied; an odd step falls on every channel of an even number
        ordered = value.detach().permute(sorted(range(value.dim()), key=value.stride, reverse=True))
        entries = ordered.flatten()[:: max(1, value.numel() // _ENTRIES) | 1]
        least, greatest = torch.aminmax(entries)
        beyond = _BEYOND * (observed.high - observed.low)
        outside = ((entries < observed.low - beyond) | (entries > observed.high + beyond)).sum()
        return _Seen(least, greatest, outside, entries.numel())

    def clipped(self, processes: Processes = ALONE) -> list[ClippedActivation]:
        """The activations of which too much lies outside in the batches of all processes, in the order of the graph."""
        mine = {
            number: (float(seen.least), float(seen.greatest), int(seen.outside), seen.entries)
            for number, node in enumerate(self._observed)
            if (seen := self._seen.get(node)) is not None
        }
        everyones = processes.gathered("what lies outside of what observers saw", mine)
        found = []
        for number, one in enumerate(self._observed.values()):
            parts = [of_process[number] for of_process in everyones if number in of_process]
            if not parts:
                continue
            least, greatest, outside, entries = zip(*parts, strict=True)
            if (share := sum(outside) / sum(entries)) > _SHARE:
                found.append(ClippedActivation(one.name, one.low, one.high, min(least), max(greatest), share))
        return found
