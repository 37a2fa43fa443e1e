"""Some samples of all batches, put together to batches of the same kind."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from adaround_plugin.graph.compat import tree_flatten, tree_unflatten
from adaround_plugin.regions.batches import input_tensors, sizes_of

__all__ = ["evenly_chosen", "put_together", "spread", "whole"]


def spread(arguments: Sequence[list[Any]], wanted: int, size: int, offset: float = 0.5) -> Sequence[list[Any]]:
    """About `wanted` samples that are spread evenly over all batches, in batches of `size`.

    Where samples cannot be put together, whole batches are taken.

    Args:
        arguments: of each batch.
        wanted: number of samples; all are taken as they are where there are no more.
        size: samples of a batch of the result, at most as many as there are.
        offset: at least 0 and below 1, where between two samples that are taken the first lies.
    """
    sizes = sizes_of(arguments)
    total = sum(sizes)
    if total <= wanted:
        return arguments
    found = put_together(arguments, evenly_chosen(total, wanted, size, offset), size)
    return [arguments[batch] for batch in whole(sizes, wanted, offset)] if found is None else found


def evenly_chosen(total: int, wanted: int, size: int, offset: float) -> list[int]:
    """The numbers of about `wanted` samples out of `total`, by batches of `size`, each spread over all itself."""
    count = min(-(-wanted // size), total // size)
    chosen = _evenly(count * size, total, offset)
    return [number for start in range(count) for number in chosen[start::count]]


def whole(sizes: Sequence[int], wanted: int, offset: float = 0.5) -> list[int]:
    """The numbers of evenly spaced batches that have about `wanted` samples; at least one.

    Args:
        sizes: samples of each batch.
        wanted, offset: as of `spread`.
    """
    count = min(len(sizes), max(1, wanted * len(sizes) // sum(sizes)))
    return _evenly(count, len(sizes), offset)


def put_together(arguments: Sequence[list[Any]], numbers: Sequence[int], size: int) -> list[list[Any]] | None:
    """Samples put together to batches of `size`; the last is smaller where they do not come out even.

    Batches are gone through once, in order.

    Args:
        arguments: of each batch.
        numbers: of the samples, numbered through all batches, in the order in which they are taken.
        size: samples of a batch of the result.

    Returns:
        None where samples cannot be put together: inputs of several shapes, or what is no axis of samples and differs
        from batch to batch, or what may be one or not.
    """
    lengths, wanted = sizes_of(arguments), set(numbers)
    is_single = size == max(lengths) == 1
    inputs, structure = list[_Input](), tree_flatten(arguments[0])[1]
    # of each sample that is taken, its part of every input
    rows: dict[int, list[Any]] = {}
    for first, length, of_batch in zip(accumulate(lengths, initial=0), lengths, arguments, strict=False):
        leaves, found = tree_flatten(of_batch)
        if found != structure:
            return None
        if not inputs:
            counted = input_tensors(of_batch)[0]
            inputs = [_Input(leaf, leaf is counted) for leaf in leaves]
        for one, leaf in zip(inputs, leaves, strict=True):
            one.add(leaf, length)
        for row in range(length):
            if first + row in wanted:
                rows[first + row] = [leaf[row].clone() if _has_rows(leaf, length) else None for leaf in leaves]
    axes = [one.has_samples(is_single) for one in inputs]
    if None in axes:
        return None
    batches: list[list[Any]] = []
    for start in range(0, len(numbers), size):
        taken = [rows[number] for number in numbers[start : start + size]]
        leaves = [
            torch.stack([of_sample[number] for of_sample in taken]) if has_samples else one.first
            for number, (one, has_samples) in enumerate(zip(inputs, axes, strict=True))
        ]
        batches.append(tree_unflatten(leaves, structure))
    return batches


def _evenly(count: int, total: int, offset: float) -> list[int]:
    """`count` of the numbers below `total`, evenly spaced."""
    return [int((number + offset) * total / count) for number in range(count)]


def _has_rows(value: Any, length: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == length


class _Input:
    """What is known of one input in all batches.

    Args:
        first: its value in the first batch.
        is_counted: whether its length is that of the batches.
    """

    def __init__(self, first: Any, is_counted: bool) -> None:
        self.first, self._is_counted = first, is_counted
        self._is_constant = self._has_axis = self._is_alike = True
        # as masks and token types often are
        self._is_uniform = (
            isinstance(first, Tensor) and first.dim() > 0 and len(first) > 1 and bool((first == first[:1]).all())
        )

    def add(self, value: Any, length: int) -> None:
        """Take note of its value in a batch of so many samples."""
        first = self.first
        if not isinstance(first, Tensor) or not isinstance(value, Tensor):
            are_plain = not isinstance(first, Tensor) and not isinstance(value, Tensor) and isinstance(value, Hashable)
            self._is_alike = self._is_alike and are_plain and bool(value == first)
            return
        self._is_alike &= (value.shape[1:], value.dtype, value.device) == (first.shape[1:], first.dtype, first.device)
        self._is_constant = self._is_constant and self._is_alike and torch.equal(value, first)
        self._has_axis &= _has_rows(value, length)

    def has_samples(self, is_single: bool) -> bool | None:
        """Whether it has an axis of samples in front.

        None if samples of it cannot be put together, or if nobody can tell: an input that is the same in all batches
        may be a constant that is as long as they are.

        Args:
            is_single: whether batches of one are to be made of batches of one: a constant may be either then.
        """
        if not self._is_alike:
            return None
        if not isinstance(self.first, Tensor) or (self._is_constant and not self._is_counted and is_single):
            return False
        if not self._has_axis:
            return False if self._is_constant else None
        return True if self._is_counted or self._is_uniform or not self._is_constant else None
