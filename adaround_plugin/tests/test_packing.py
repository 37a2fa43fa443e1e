"""Integers packed at their width, against the same stream of bits written out one by one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaround_plugin.rounding.packing import pack, packed_length, unpack


@st.composite
def integers(draw: st.DrawFn) -> tuple[list[int], int, int]:
    """Integers of a range, their bits, and the lowest of the range."""
    bits, least = draw(st.integers(1, 8)), draw(st.integers(-128, 0))
    return draw(st.lists(st.integers(least, least + 2**bits - 1), max_size=40)), bits, least


@given(integers())
def test_a_stream_of_bits_holds_the_integers_in_order(drawn: tuple[list[int], int, int]) -> None:
    values, bits, least = drawn
    packed = pack(torch.tensor(values, dtype=torch.int64), bits, least)
    assert packed.dtype == torch.uint8
    stream = sum((value - least) << (bits * place) for place, value in enumerate(values))
    assert bytes(packed.tolist()) == stream.to_bytes(packed_length(len(values), bits), "little")
    assert unpack(packed, bits, least, (len(values),)).tolist() == values


@pytest.mark.parametrize("bits", range(1, 9))
def test_shapes_come_back(bits: int) -> None:
    values = torch.randint(0, 2**bits, (3, 5, 7), generator=torch.Generator().manual_seed(bits)) - 2 ** (bits - 1)
    packed = pack(values, bits, -(2 ** (bits - 1)))
    assert packed.numel() == -(-105 * bits // 8)
    assert torch.equal(unpack(packed, bits, -(2 ** (bits - 1)), (3, 5, 7)), values)


def test_another_number_of_bytes_is_an_error() -> None:
    packed = pack(torch.zeros(9, dtype=torch.int64), 4, 0)
    with pytest.raises(ValueError, match="5 bytes, but 6 for 12 integers of 4 bits"):
        unpack(packed, 4, 0, (12,))
