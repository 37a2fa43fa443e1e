"""Short names for large values: what two runs, two networks or two files have in common, or not."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

__all__ = ["checksum", "digest"]

# hex digits that tell one value from another where nobody means harm
_DIGITS = 16


def checksum(*values: Tensor | str) -> str:
    """SHA-256 of texts and tensors, with their dtypes and shapes, in order: 64 hex digits."""
    found = hashlib.sha256()
    for value in values:
        if isinstance(value, str):
            text = value.encode()
            found.update(f"text {len(text)} ".encode())
            found.update(text)
            continue
        found.update(f"{value.dtype} {tuple(value.shape)} ".encode())
        # the bytes as they lie in memory: bfloat16 and others have no counterpart in numpy
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def digest(*values: Tensor | str) -> str:
    """The first hex digits of `checksum`."""
    return checksum(*values)[:_DIGITS]
