"""Values in files: the bytes that tensors lie in, and the tensors that lie in a mapped file with the same strides.

Whatever is computed of what comes back is the same to the last bit. Pages are read when they are touched, or ahead
where the system can be told so; what is written into such a tensor does not get into the file.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adaround_plugin.graph.compat import tree_flatten, tree_unflatten

__all__ = ["Kept", "Spilled", "ValueFile", "is_plain", "storages", "unpacked", "write_joined", "write_values"]

# in a file, storages begin at multiples of so many bytes, as they do in memory
_ALIGNED = 64


class Kept:
    """A value that is kept; it is let go with this object.

    Attributes:
        is_spilled: whether it is in a file.
        is_lasting: whether it may be asked for many times.
    """

    is_spilled, is_lasting = False, True

    def __init__(self, value: Any) -> None:
        self._value = value

    @property
    def value(self) -> Any:
        """The value; of one in a file every call makes new tensors."""
        return self._value

    def read_ahead(self) -> None:
        """Let the system read what is in a file."""


class Spilled(Kept):
    """A value whose tensors are in a file.

    Args:
        file: where.
        leaves, structure: of the value, with places for tensors.
    """

    is_spilled = True

    def __init__(self, file: ValueFile, leaves: list[Any], structure: Any) -> None:
        super().__init__(leaves)
        self._file, self._structure = file, structure

    @property
    def value(self) -> Any:
        mapped = self._file.mapped()
        leaves = [leaf.tensor(mapped) if isinstance(leaf, _Place) else leaf for leaf in self._value]
        return tree_unflatten(leaves, self._structure)

    def read_ahead(self) -> None:
        self._file.read_ahead({(leaf.start, leaf.stop) for leaf in self._value if isinstance(leaf, _Place)})


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in a file.

    Attributes:
        start, stop: the bytes there.
        empty: a tensor of its kind without an element.
        offset, shape, stride: of the tensor in these bytes, in elements.
    """

    start: int
    stop: int
    empty: Tensor
    offset: int
    shape: Sequence[int]
    stride: Sequence[int]

    def tensor(self, mapped: torch.UntypedStorage) -> Tensor:
        """The tensor in a mapped file, or a copy on the device where it was."""
        part = mapped[self.start : self.stop]
        assert isinstance(part, torch.UntypedStorage)
        if self.empty.device.type != "cpu":
            part = _as_bytes(part).to(self.empty.device).untyped_storage()
        return self.empty.detach().clone().set_(part, self.offset, self.shape, self.stride)


class ValueFile:
    """A file of bytes.

    Args:
        path: of the file; whoever makes this removes it.
        content: of the file, one after the other: `(n,)` uint8 on the CPU.
    """

    def __init__(self, path: Path, content: Iterable[Tensor]) -> None:
        self._path = path
        with path.open("wb") as file:
            for part in content:
                file.write(part.numpy().data)
            self.size = file.tell()

    def mapped(self) -> torch.UntypedStorage:
        """The file in memory, for as long as that is used."""
        whole = torch.UntypedStorage.from_file(str(self._path), False, self.size)
        assert isinstance(whole, torch.UntypedStorage)
        return whole

    def read_ahead(self, parts: Iterable[tuple[int, int]]) -> None:
        """Let the system read these parts, where it can be told."""
        if not hasattr(os, "posix_fadvise"):
            return
        with self._path.open("rb") as file:
            for start, stop in parts:
                os.posix_fadvise(file.fileno(), start, stop - start, os.POSIX_FADV_WILLNEED)


@dataclass
class _Span:
    """The part of a storage that tensors lie in, in bytes."""

    storage: torch.UntypedStorage
    start: int
    stop: int

    @property
    def length(self) -> int:
        """As it is in a file."""
        return -(-(self.stop - self.start) // _ALIGNED) * _ALIGNED

    @property
    def content(self) -> Tensor:
        """As it is in a file."""
        own = _as_bytes(self.storage)[self.start : self.stop].cpu()
        return torch.nn.functional.pad(own, (0, self.length - len(own)))


def write_values(path: Path, values: Sequence[Any]) -> tuple[ValueFile, list[Kept]]:
    """Write values to a file, what they share once."""
    flat = [tree_flatten(value) for value in values]
    spans: dict[int, _Span] = {}
    for leaf in (leaf for leaves, _ in flat for leaf in leaves if is_plain(leaf)):
        storage = leaf.untyped_storage()
        start, stop = _extent(leaf)
        one = spans.setdefault(storage.data_ptr(), _Span(storage, start, stop))
        one.start, one.stop = min(one.start, start), max(one.stop, stop)
    starts = accumulate((one.length for one in spans.values()), initial=0)
    begins = dict(zip(spans, starts, strict=False))
    file = ValueFile(path, (one.content for one in spans.values()))

    def placed(leaf: Any) -> Any:
        if not is_plain(leaf):
            return leaf
        pointer = leaf.untyped_storage().data_ptr()
        one, begin = spans[pointer], begins[pointer]
        offset = leaf.storage_offset() - one.start // leaf.element_size()
        return _Place(begin, begin + one.stop - one.start, _empty(leaf), offset, leaf.shape, leaf.stride())

    return file, [Spilled(file, [placed(leaf) for leaf in leaves], structure) for leaves, structure in flat]


def write_joined(path: Path, parts: Sequence[Tensor]) -> tuple[ValueFile, Kept]:
    """Write tensors joined along their leading axis, contiguous and unpacked; what comes back is on the CPU."""
    file = ValueFile(path, (_as_bytes(unpacked(part).cpu().contiguous().clone().untyped_storage()) for part in parts))
    empty = unpacked(parts[0][:0]).cpu()
    shape = (sum(len(part) for part in parts), *empty.shape[1:])
    stride = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return file, Spilled(file, [_Place(0, file.size, empty, 0, shape, stride)], tree_flatten(empty)[1])


def storages(leaves: Iterable[Any]) -> dict[int, torch.UntypedStorage]:
    """What tensors lie in, by its address."""
    found = (leaf.untyped_storage() for leaf in leaves if is_plain(leaf))
    return {storage.data_ptr(): storage for storage in found}


def is_plain(leaf: Any) -> bool:
    """Whether a value is a tensor whose bytes, shape and strides say all of it."""
    return (
        type(leaf) in (Tensor, nn.Parameter)
        and leaf.layout == torch.strided
        and leaf.device.type != "meta"
        and not leaf.is_conj()
        and not leaf.is_neg()
    )


def unpacked(tensor: Tensor) -> Tensor:
    """In floats, where it is quantized."""
    return tensor.dequantize() if tensor.is_quantized else tensor


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The first byte of its storage that a tensor may need, aligned, and the first behind."""
    size, first = tensor.element_size(), int(tensor.storage_offset())
    last = first + sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = first * size // _ALIGNED * _ALIGNED
    return start, max(start, (last + 1) * size if tensor.numel() else start)


def _empty(tensor: Tensor) -> Tensor:
    return (tensor.detach() if tensor.dim() else tensor.detach().reshape(1))[:0].clone()


def _as_bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
