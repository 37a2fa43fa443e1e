"""Values of all calibration batches put together, so that any samples can be taken out as a minibatch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adaround_plugin.graph.memory import KeptRows, Memory

__all__ = ["Rows", "gathered", "stack"]


@dataclass(frozen=True)
class Rows:
    """A tensor with an equal run of its leading axis for each sample.

    Attributes:
        values: `(samples * run, ...)`.
        run: how many entries each sample has.
    """

    values: KeptRows
    run: int

    def take(self, index: Tensor) -> Tensor:
        """The runs of some samples, as the leading axis of one tensor."""
        if self.run == 1:
            return self.values.take(index)
        places = index.unsqueeze(1) * self.run + torch.arange(self.run, device=index.device)
        return self.values.take(places.flatten())


def stack(values: Sequence[Any], sizes: Sequence[int], memory: Memory) -> Any:
    """The values that one node has in every batch, as `Rows`; in a tuple, list or dict, entry by entry.

    Values that are the same in all batches stay as they are: whether they depend on the size of these is not seen here.

    Args:
        values: one for each batch.
        sizes: samples in each batch.
        memory: where they are kept.

    Raises:
        ValueError: samples cannot be told apart in the values, which may depend on the size of the batch.
    """
    first = values[0]
    if isinstance(first, Tensor):
        return _rows(values, sizes, memory)
    if isinstance(first, tuple | list):
        if type(first) not in (tuple, list) or len({len(value) for value in values}) > 1:
            raise ValueError("a structure of its own")
        return type(first)(stack(entries, sizes, memory) for entries in zip(*values, strict=True))
    if isinstance(first, dict):
        if any(not isinstance(value, dict) or value.keys() != first.keys() for value in values):
            raise ValueError("a structure of its own")
        return {key: stack([value[key] for value in values], sizes, memory) for key in first}
    if any(value != first for value in values):
        raise ValueError("a number that depends on the batch")
    return first


def _rows(values: Sequence[Tensor], sizes: Sequence[int], memory: Memory) -> Rows | Tensor:
    first = values[0]
    runs = {value.shape[0] / size if value.dim() else 0.0 for value, size in zip(values, sizes, strict=True)}
    run = runs.pop()
    if not runs and run >= 1 and run.is_integer() and all(value.shape[1:] == first.shape[1:] for value in values):
        return Rows(memory.keep_rows(values), int(run))
    if all(torch.equal(value, first) for value in values):
        return first
    raise ValueError("a tensor without an axis of samples")


def gathered(stacked: Any, index: Tensor) -> Any:
    """The value for some samples."""
    if isinstance(stacked, Rows):
        return stacked.take(index)
    if isinstance(stacked, tuple | list):
        return type(stacked)(gathered(entry, index) for entry in stacked)
    if isinstance(stacked, dict):
        return {key: gathered(entry, index) for key, entry in stacked.items()}
    return stacked
