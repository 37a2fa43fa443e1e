"""Parts of a batch, for networks that take samples one by one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adaround_plugin.graph.compat import tree_map
from adaround_plugin.graph.ends import ends_of
from adaround_plugin.graph.streams import Stream, Values, tensors

__all__ = ["bytes_of_one", "is_separable", "piece"]

# how far outputs may lie apart, relative to their largest
_TOLERANCE = 1e-3


def piece(values: Values, length: int, begin: int, size: int) -> Values:
    """The graph's inputs for `size` samples from `begin` on, out of those for the `length` samples of a batch."""

    def part(value: Any) -> Any:
        is_split = isinstance(value, Tensor) and value.dim() and len(value) == length
        return value[begin : begin + size] if is_split else value

    return {node: tree_map(part, value) for node, value in values.items()}


def _run(stream: Stream, values: Values) -> Values | None:
    """The values of all nodes; None if the network does not take such a batch."""
    values = dict(values)
    try:
        with torch.no_grad():
            stream.run_nodes(values, stream.runnable(set()))
    except (RuntimeError, IndexError, ValueError, AssertionError):
        return None
    return values


def bytes_of_one(stream: Stream, values: Values, length: int) -> int:
    """Memory of all values for one sample of a batch; 0 if the network does not run on one.

    Args:
        stream: nothing of it run.
        values: the graph's inputs for the batch.
        length: its number of samples.
    """
    found = _run(stream, piece(values, length, 0, 1))
    return 0 if found is None else sum(value.nbytes for value in tensors(list(found.values())))


def is_separable(stream: Stream, values: Values, length: int) -> bool:
    """Whether a network gives for a sample alone what it gives for it among the others; arguments as before.

    Tried on the first sample, on the last and on one between.
    """
    whole = _run(stream, values)
    return whole is not None and all(
        _is_same(_outputs(stream, whole), stream, _run(stream, piece(values, length, number, 1)), number, length)
        for number in {0, length // 2, length - 1}
    )


def _outputs(stream: Stream, values: Values) -> list[Tensor]:
    with torch.no_grad():
        return tensors([stream.value(end, values) for end in ends_of(stream)])


def _is_same(whole: list[Tensor], stream: Stream, alone: Values | None, number: int, length: int) -> bool:
    """Whether the outputs of a sample alone are those that it has among all."""
    if alone is None:
        return False
    for one, among in zip(_outputs(stream, alone), whole, strict=True):
        if not one.dim() or one.shape[0] * length != among.shape[0] or one.shape[1:] != among.shape[1:]:
            return False
        same = among[number * len(one) : (number + 1) * len(one)]
        if one.numel() and not torch.allclose(one, same, rtol=0, atol=_TOLERANCE * float(same.abs().max())):
            return False
    return True
