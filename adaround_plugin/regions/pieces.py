"""Parts of a batch, for networks that take samples one by one."""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from adaround_plugin.errors import is_out_of_memory
from adaround_plugin.graph.compat import tree_map
from adaround_plugin.graph.ends import ends_of
from adaround_plugin.graph.streams import Stream, Values, tensors

__all__ = ["are_close", "is_separable", "piece", "piece_size", "stand_alone", "takes_one"]

# derivatives are taken of so many samples at once that their values take up this much, or of one
_PIECE_BYTES = 2**30
# how far outputs may lie apart, relative to their largest
_TOLERANCE = 1e-3


def piece(values: Values, length: int, begin: int, size: int) -> Values:
    """The graph's inputs for `size` samples from `begin` on, out of those for the `length` samples of a batch."""
    return _changed(values, length, lambda samples: samples[begin : begin + size])


def _changed(values: Values, length: int, change: Callable[[Tensor], Tensor]) -> Values:
    """The graph's inputs, with those changed that have an axis of samples."""

    def part(value: Any) -> Any:
        is_split = isinstance(value, Tensor) and value.dim() and len(value) == length
        return change(value) if is_split else value

    return {node: tree_map(part, value) for node, value in values.items()}


def _tried(run: Callable[[], list[Tensor]]) -> list[Tensor] | None:
    """What a network makes of samples put together otherwise, which it need not take; None if it does not."""
    try:
        with torch.no_grad():
            return run()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return None


def _outputs(stream: Stream, values: Values) -> list[Tensor] | None:
    """What the network makes of inputs, at its ends; None if it does not take them."""
    return _tried(lambda: tensors(stream.outputs([values[node] for node in stream.placeholders], ends_of(stream))))


def _every_value(stream: Stream, values: Values) -> list[Tensor]:
    values = dict(values)
    stream.run_nodes(values, stream.runnable(set()))
    return tensors(list(values.values()))


def piece_size(stream: Stream, values: Values, length: int) -> int:
    """Samples to take derivatives of at once: as many as keep values of `_PIECE_BYTES`, one at least.

    Batches stay whole where a sample depends on the others.

    Args:
        stream: nothing of it run.
        values: the graph's inputs for the largest batch.
        length: its number of samples, which is returned where all of them may be taken, or must be.
    """
    if length == 1:
        return length
    one = _tried(lambda: _every_value(stream, piece(values, length, 0, 1)))
    taken = sum(value.nbytes for value in one or ())
    fitting = max(1, _PIECE_BYTES // max(1, taken))
    return length if fitting >= length or not is_separable(stream, values, length) else fitting


def takes_one(stream: Stream, values: Values, length: int) -> bool:
    """Whether a network makes something of the first sample of a batch alone, whatever that is."""
    if length == 1:
        return True
    alone = _outputs(stream, piece(values, length, 0, 1))
    return alone is not None and all(output.numel() for output in alone)


def is_separable(stream: Stream, values: Values, length: int) -> bool:
    """Whether a network gives for a sample alone what it gives for it among the others.

    Tried on the first sample, on the last and on one between.
    """
    whole = _outputs(stream, values)
    return whole is not None and all(
        _is_same(whole, _outputs(stream, piece(values, length, number, 1)), number, length)
        for number in sorted({0, length // 2, length - 1})
    )


def stand_alone(stream: Stream, values: Values, length: int, *, fixed: bool) -> bool:
    """Whether samples may be put together otherwise than they are.

    Args:
        stream: nothing of it run.
        values: the graph's inputs for a batch.
        length: its number of samples.
        fixed: whether the graph takes no other number. Samples are tried in reverse order then: what a network makes of
            their order is found, and not what it makes of all of them alike, as of their mean.
    """
    if not fixed:
        return is_separable(stream, values, length)
    whole = _outputs(stream, values)
    other = None if whole is None else _outputs(stream, _changed(values, length, lambda samples: samples.flip(0)))
    if whole is None or other is None:
        return False
    return all(
        one.dim() > 0
        and one.shape == two.shape
        and one.shape[0] % length == 0
        and are_close(_by_sample(one, length).flip(0), _by_sample(two, length))
        for one, two in zip(whole, other, strict=True)
    )


def _is_same(whole: list[Tensor], alone: list[Tensor] | None, number: int, length: int) -> bool:
    """Whether the outputs of a sample alone are those that it has among all."""
    if alone is None:
        return False
    for one, among in zip(alone, whole, strict=True):
        if not one.dim() or one.shape[0] * length != among.shape[0] or one.shape[1:] != among.shape[1:]:
            return False
        if not are_close(one, among[number * len(one) : (number + 1) * len(one)]):
            return False
    return True


def _by_sample(output: Tensor, length: int) -> Tensor:
    return output.reshape(length, output.shape[0] // length, *output.shape[1:])


def are_close(one: Tensor, other: Tensor) -> bool:
    """Whether values have one shape and lie no farther apart than batches of other sizes let them, to their largest."""
    if one.shape != other.shape:
        return False
    if not one.numel():
        return True
    largest = float(other.abs().max())
    return isfinite(largest) and torch.allclose(one, other, rtol=0, atol=_TOLERANCE * largest)
