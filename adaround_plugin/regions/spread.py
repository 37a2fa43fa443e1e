"""Some samples of all batches, put together to batches of the same kind."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from adaround_plugin.graph.compat import tree_flatten, tree_unflatten
from adaround_plugin.regions.calibration import input_tensors, sample_count

__all__ = ["put_together", "spread", "whole"]


def spread(arguments: list[list[Any]], wanted: int, size: int, offset: float = 0.5) -> list[list[Any]]:
    """About `wanted` samples that are spread evenly over all batches, in batches of `size`.

    Where samples cannot be put together, whole batches are taken.

    Args:
        arguments: of each batch.
        wanted: number of samples; all are taken as they are where there are no more.
        size: samples of a batch of the result, at most as many as there are.
        offset: at least 0 and below 1, where between two samples that are taken the first lies.
    """
    total = sum(map(sample_count, arguments))
    if total <= wanted:
        return arguments
    count = min(-(-wanted // size), total // size)
    chosen = _evenly(count * size, total, offset)
    # every batch of the result is spread over all samples itself
    found = put_together(arguments, [number for start in range(count) for number in chosen[start::count]], size)
    return [arguments[batch] for batch in whole(arguments, wanted, offset)] if found is None else found


def whole(arguments: list[list[Any]], wanted: int, offset: float = 0.5) -> list[int]:
    """The numbers of evenly spaced batches that have about `wanted` samples; at least one."""
    total = sum(map(sample_count, arguments))
    count = min(len(arguments), max(1, wanted * len(arguments) // total))
    return _evenly(count, len(arguments), offset)


def put_together(arguments: list[list[Any]], numbers: Sequence[int], size: int) -> list[list[Any]] | None:
    """Samples put together to batches of `size`; the last is smaller where they do not come out even.

    Args:
        arguments: of each batch.
        numbers: of the samples, numbered through all batches, in the order in which they are taken.
        size: samples of a batch of the result.

    Returns:
        None where samples cannot be put together: inputs of several shapes, or what is no axis of samples and differs
        from batch to batch, or what may be one or not.
    """
    lengths = [sample_count(of_batch) for of_batch in arguments]
    flat = [tree_flatten(of_batch) for of_batch in arguments]
    structure = flat[0][1]
    # of each input, its values in all batches
    inputs = list(zip(*(leaves for leaves, _ in flat), strict=False))
    counted = input_tensors(arguments[0])[0]
    axes = [_has_samples(values, lengths, values[0] is counted, size == max(lengths) == 1) for values in inputs]
    if None in axes or any(other != structure for _, other in flat):
        return None
    places = [(batch, row) for batch, length in enumerate(lengths) for row in range(length)]
    found: list[list[Any]] = []
    for start in range(0, len(numbers), size):
        rows = [places[number] for number in numbers[start : start + size]]
        leaves = [
            torch.stack([values[batch][row] for batch, row in rows]) if has_samples else values[0]
            for values, has_samples in zip(inputs, axes, strict=True)
        ]
        found.append(tree_unflatten(leaves, structure))
    return found


def _evenly(count: int, total: int, offset: float) -> list[int]:
    """`count` of the numbers below `total`, evenly spaced."""
    return [int((number + offset) * total / count) for number in range(count)]


def _has_samples(values: Sequence[Any], lengths: list[int], is_counted: bool, is_single: bool) -> bool | None:
    """Whether an input has an axis of samples in front.

    None if samples of it cannot be put together, or if nobody can tell: an input that is the same in all batches may be
    a constant that is as long as they are.

    Args:
        values: in all batches.
        lengths: samples of each batch.
        is_counted: whether these are its lengths.
        is_single: whether batches of one are to be made of batches of one: a constant may be either then.
    """
    first = values[0]
    tensors = [value for value in values if isinstance(value, Tensor)]
    if not tensors:
        return False if all(isinstance(value, Hashable) and value == first for value in values) else None
    if len(tensors) < len(values) or len({(one.shape[1:], one.dtype, one.device) for one in tensors}) > 1:
        return None
    is_constant = all(torch.equal(value, first) for value in values)
    if is_constant and not is_counted and is_single:
        return False
    if not all(value.dim() and len(value) == length for value, length in zip(values, lengths, strict=True)):
        return False if is_constant else None
    # as masks and token types often are
    is_uniform = len(first) > 1 and bool((first == first[:1]).all())
    return True if is_counted or is_uniform or not is_constant else None
