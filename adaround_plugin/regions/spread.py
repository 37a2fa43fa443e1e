"""Some samples of all batches, put together to batches of the same kind."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from adaround_plugin.graph.compat import tree_flatten, tree_unflatten
from adaround_plugin.regions.calibration import input_tensors, sample_count

__all__ = ["spread"]


def spread(arguments: list[list[Any]], wanted: int, size: int, offset: float = 0.5) -> list[list[Any]]:
    """About `wanted` samples that are spread evenly over all batches, in batches of `size`.

    Where samples cannot be put together, whole batches are taken: inputs of several shapes, or what is no axis of
    samples and differs from batch to batch, or what may be one or not.

    Args:
        arguments: of each batch.
        wanted: number of samples; all are taken as they are where there are no more.
        size: samples of a batch of the result, at most as many as there are.
        offset: at least 0 and below 1, where between two samples that are taken the first lies.
    """
    lengths = [sample_count(of_batch) for of_batch in arguments]
    total = sum(lengths)
    if total <= wanted:
        return arguments
    flat = [tree_flatten(of_batch) for of_batch in arguments]
    structure = flat[0][1]
    # of each input, its values in all batches
    inputs = list(zip(*(leaves for leaves, _ in flat), strict=False))
    counted = input_tensors(arguments[0])[0]
    axes = [_has_samples(values, lengths, values[0] is counted) for values in inputs]
    if None in axes or any(other != structure for _, other in flat):
        return [arguments[i] for i in _evenly(max(1, wanted * len(arguments) // total), len(arguments), offset)]
    count = min(-(-wanted // size), total // size)
    places = [(batch, row) for batch, length in enumerate(lengths) for row in range(length)]
    chosen = [places[i] for i in _evenly(count * size, total, offset)]
    found: list[list[Any]] = []
    for number in range(count):
        # every batch of the result is spread over all samples itself
        rows = chosen[number::count]
        leaves = [
            torch.stack([values[batch][row] for batch, row in rows]) if has_samples else values[0]
            for values, has_samples in zip(inputs, axes, strict=True)
        ]
        found.append(tree_unflatten(leaves, structure))
    return found


def _evenly(count: int, total: int, offset: float) -> list[int]:
    """`count` of the numbers below `total`, evenly spaced."""
    return [int((number + offset) * total / count) for number in range(count)]


def _has_samples(values: Sequence[Any], lengths: list[int], is_counted: bool) -> bool | None:
    """Whether an input has an axis of samples in front.

    None if samples of it cannot be put together, or if nobody can tell: an input that is the same in all batches may be
    a constant that is as long as they are.

    Args:
        values: in all batches.
        lengths: samples of each batch.
        is_counted: whether these are its lengths.
    """
    first = values[0]
    tensors = [value for value in values if isinstance(value, Tensor)]
    if not tensors:
        return False if all(isinstance(value, Hashable) and value == first for value in values) else None
    if len(tensors) < len(values) or len({(one.shape[1:], one.dtype, one.device) for one in tensors}) > 1:
        return None
    is_constant = all(torch.equal(value, first) for value in values)
    if not all(value.dim() and len(value) == length for value, length in zip(values, lengths, strict=True)):
        return False if is_constant else None
    # as masks and token types often are
    is_uniform = len(first) > 1 and bool((first == first[:1]).all())
    return True if is_counted or is_uniform or not is_constant else None
