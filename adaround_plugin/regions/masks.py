"""Which tokens count: those that pad sequences stay out of all that is learned, judged and compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adaround_plugin.errors import InvalidBatchError
from adaround_plugin.options import check_choice

__all__ = ["counted", "mask_number", "read_masks", "without_padding"]


def mask_number(token_mask: str | None, inputs: Sequence[str]) -> int | None:
    """The number of the input that says which tokens count.

    Args:
        token_mask: its name, or None.
        inputs: names of the graph's inputs.

    Raises:
        InvalidOptionError: no input has this name.
    """
    if token_mask is None:
        return None
    check_choice("token_mask", token_mask, inputs)
    return list(inputs).index(token_mask)


def read_masks(number: int, arguments: Sequence[Sequence[Any]], sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """`(samples, tokens)` bool for each batch.

    Args:
        number: of the input that has them.
        arguments: of each batch.
        sizes: samples of each batch.

    Raises:
        InvalidBatchError: one is no matrix of ones and zeros with a row for each sample.
    """
    masks = []
    for batch, (of_batch, size) in enumerate(zip(arguments, sizes, strict=True)):
        value = of_batch[number]
        if not isinstance(value, Tensor) or value.dim() != 2 or len(value) != size:
            found = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise InvalidBatchError(
                f"batch {batch}",
                f"the token mask is {found}, with {size} samples",
                "Pass a mask of shape (samples, tokens).",
            )
        if not bool(((value == 0) | (value == 1)).all()):
            raise InvalidBatchError(
                f"batch {batch}", "the token mask has other entries than 0 and 1", "Pass 1 for tokens, 0 for padding."
            )
        masks.append(value.bool())
    return tuple(masks)


def counted(mask: Tensor | None, shape: Sequence[int]) -> Tensor | None:
    """Which entries of the leading axes of a value count, as a mask of these.

    Args:
        mask: `(samples, tokens)` bool, or None where all count.
        shape: of the value, or of its leading axes.

    Returns:
        `(samples, tokens)`, or `(samples * tokens,)` where they are one axis; None where all entries count, or where
        the value has no axis of tokens.
    """
    if mask is None or not shape:
        return None
    if tuple(shape[:2]) == tuple(mask.shape):
        return mask
    return mask.flatten() if shape[0] == mask.numel() else None


def without_padding(value: Tensor, mask: Tensor | None) -> Tensor:
    """A value with zeros where tokens do not count, whatever stands there."""
    counts = counted(mask, value.shape)
    if counts is None:
        return value
    counts = counts.to(value.device)
    return torch.where(counts.reshape(*counts.shape, *[1] * (value.dim() - counts.dim())), value, 0.0)
