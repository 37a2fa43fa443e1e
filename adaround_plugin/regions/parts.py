"""What a region's minibatches are made of: values of one of the caller's batches, or of all samples together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adaround_plugin.graph.memory import Memory
from adaround_plugin.graph.value_files import Kept
from adaround_plugin.regions.masks import without_padding
from adaround_plugin.regions.samples import gathered, stack

__all__ = ["KeptParts", "Part", "stacked_parts"]


@dataclass(frozen=True)
class Part:
    """Some samples, or one of the caller's batches: values for each exit and for each entry.

    Attributes:
        targets: float values at the exits.
        entries: at the entries.
        exact: float values at the entries that are quantized there, None elsewhere; empty if nothing is dropped.
        importance: of the entries of `targets`; empty if all weigh alike.
    """

    targets: list[Any]
    entries: list[Any]
    exact: list[Any]
    importance: list[Any]

    def gathered(self, index: Tensor) -> Part:
        """The values of some samples, if these are all of them stacked."""
        return Part(*(gathered(values, index) for values in self.lists))

    @property
    def lists(self) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
        """Targets, entries, exact values and importance."""
        return self.targets, self.entries, self.exact, self.importance


class KeptParts(Sequence[Part]):
    """The caller's batches, of which nobody may know the importance."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._kept = list[list[Kept]]()

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, batch: Any) -> Any:
        return Part(*(one.value for one in self._kept[batch]))

    def append(self, part: Part) -> None:
        """Keep one more."""
        self._kept.append(self._memory.keep(part.lists))

    def weigh(self, factors: Sequence[list[Tensor]] | None) -> None:
        """Multiply the importance by factors, of each batch at every exit; None forgets it."""
        for batch, part in enumerate(self):
            weights = []
            if factors is not None:
                weights = [one * factor for one, factor in zip(part.importance, factors[batch], strict=True)]
            self._kept[batch][-1:] = self._memory.keep([weights])

    def cover(self, masks: Sequence[Tensor]) -> None:
        """Let the entries of tokens that do not count weigh nothing; `masks` are of each batch `(samples, tokens)`."""
        for batch, (part, mask) in enumerate(zip(self, masks, strict=True)):
            weights = part.importance or map(torch.ones_like, part.targets)
            self._kept[batch][-1:] = self._memory.keep([[without_padding(one, mask) for one in weights]])


def stacked_parts(parts: Sequence[Part], sizes: Sequence[int], memory: Memory) -> Part | None:
    """The values of all samples; None if these cannot be told apart."""

    # of targets, entries and so on, what each batch has
    kinds = zip(*(part.lists for part in parts), strict=True)
    try:
        return Part(*([stack(values, sizes, memory) for values in zip(*kind, strict=True)] for kind in kinds))
    except ValueError:
        return None
