"""Integers of few bits, packed at their width: a stream of bits, the first integer in the lowest of them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["pack", "packed_length", "unpack"]

# so many integers of b bits are b bytes, and fit in one word
_TOGETHER = 8


def packed_length(count: int, bits: int) -> int:
    """Bytes that so many integers of `bits` bits take."""
    return -(-count * bits // 8)


def pack(integers: Tensor, bits: int, least: int) -> Tensor:
    """Pack integers of a range of `2^bits`.

    Args:
        integers: of any shape, each in `[least, least + 2^bits - 1]`.
        bits: 1 to 8.
        least: the lowest integer of the range.

    Returns:
        uint8 `(packed_length(n, bits),)`, in the order of the flattened integers.
    """
    codes = integers.reshape(-1).long() - least
    count = codes.numel()
    padded = torch.cat([codes, codes.new_zeros(-count % _TOGETHER)]).view(-1, _TOGETHER)
    words = (padded << _shifts(bits, codes.device)).sum(1)
    return words.view(torch.uint8).view(-1, _TOGETHER)[:, :bits].reshape(-1)[: packed_length(count, bits)]


def unpack(packed: Tensor, bits: int, least: int, shape: tuple[int, ...]) -> Tensor:
    """What was packed: int64 of a shape.

    Args:
        packed, bits, least: as of `pack`.
        shape: of the integers.

    Raises:
        ValueError: so many integers take another number of bytes.
    """
    count = torch.Size(shape).numel()
    if packed.numel() != (wanted := packed_length(count, bits)):
        raise ValueError(f"{packed.numel()} bytes, but {wanted} for {count} integers of {bits} bits")
    padded = torch.cat([packed, packed.new_zeros(-packed.numel() % bits)]).view(-1, bits)
    words = packed.new_zeros(len(padded), _TOGETHER)
    words[:, :bits] = padded
    codes: Tensor = (words.view(torch.int64) >> _shifts(bits, packed.device)) & (2**bits - 1)
    return codes.reshape(-1)[:count].view(shape) + least


def _shifts(bits: int, device: torch.device) -> Tensor:
    """By how many bits each integer of a word is moved up."""
    return bits * torch.arange(_TOGETHER, device=device)
