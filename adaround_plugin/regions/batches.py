"""Bound calibration batches: kept in memory or in files, or read again where that takes less time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from adaround_plugin.digests import digest
from adaround_plugin.errors import InvalidBatchError
from adaround_plugin.graph.compat import tree_flatten
from adaround_plugin.graph.memory import Memory
from adaround_plugin.graph.value_files import Kept

__all__ = ["Batches", "batch_digest", "input_tensors", "read_batches", "sample_count", "sizes_of"]

_log = logging.getLogger(__name__)

# a batch is asked for about four times more, of which each takes a third of what writing it to a file takes. To read it
# again must take less: (1 + 4 / 3) / 4 of what writing takes
_CHEAP = 0.6

# makes arguments of what was read and its number
Bind = Callable[[Any, int], list[Any]]


class Batches(Sequence[list[Any]]):
    """The arguments of every batch, as a model's graph takes them.

    Args:
        kept: of each batch, one for each argument.
        sizes: number of samples of each.
    """

    def __init__(self, kept: Iterable[list[Kept]], sizes: Iterable[int]) -> None:
        self._kept, self.sizes = list(kept), tuple(sizes)

    @classmethod
    def lent(cls, arguments: Iterable[list[Any]]) -> Batches:
        """Of values that others keep in memory."""
        arguments = list(arguments)
        return cls(([Kept(value) for value in one] for one in arguments), map(sample_count, arguments))

    @classmethod
    def of(cls, arguments: Sequence[list[Any]], memory: Memory) -> Batches:
        """Of values that nobody else keeps."""
        if isinstance(arguments, Batches):
            return arguments
        return cls((memory.keep(one) for one in arguments), map(sample_count, arguments))

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, batch: Any) -> Any:
        return [one.value for one in self._kept[batch]]

    def kept(self, batch: int) -> list[Kept]:
        """One batch, as it is kept."""
        return self._kept[batch]


def read_batches(data: Iterable[Any], bind: Bind, memory: Memory, *, owned: bool) -> Batches:
    """Read all batches once, and keep them.

    What does not fit into the memory goes to files. From the first that does not on, batches are read again instead,
    each time they are asked for, where they can be, where that is faster, and where they are the same then: a source
    that does not repeat itself is kept, and one that changes later is an error.

    Args:
        data: what yields batches.
        bind: makes arguments of them.
        memory: where they are kept.
        owned: whether nobody but us keeps the arguments in memory.
    """
    kept, sizes = list[list[Kept]](), list[int]()
    source = _Source(data, bind)
    # not known before one does not fit
    again = None if owned and not isinstance(data, Iterator) else False
    start = time.perf_counter()
    for number, given in enumerate(data):
        arguments = bind(given, number)
        seconds = time.perf_counter() - start
        sizes.append(sample_count(arguments))
        if not owned:
            kept.append([Kept(value) for value in arguments])
        elif again and not memory.fits(arguments):
            kept.append(source.later(number, arguments))
        else:
            start = time.perf_counter()
            kept.append(memory.keep(arguments))
            if again is None and kept[-1][0].is_spilled:
                most = _CHEAP * (time.perf_counter() - start)
                again = seconds < most and source.repeats([one.value for one in kept[0]], most - seconds)
        start = time.perf_counter()
    return Batches(kept, sizes)


class _Source:
    """Data that can be read again, in order: a batch that was passed by takes a new start.

    Args:
        data, bind: as of `read_batches`.
    """

    def __init__(self, data: Iterable[Any], bind: Bind) -> None:
        self._data, self._bind = data, bind
        self._digests: dict[int, str] = {}
        self._iterator: Iterator[Any] | None = None
        self._next = 0
        self._open: tuple[int, list[Any]] | None = None

    def repeats(self, first: list[Any], seconds: float) -> bool:
        """Whether the first batch is the same when it is read again, and can be compared in so much time.

        Where it is not the same, that is logged.
        """
        start = time.perf_counter()
        before = batch_digest(first)
        if time.perf_counter() - start > seconds:
            return False
        same = batch_digest(self._bind(next(iter(self._data)), 0)) == before
        if not same:
            _log.warning("the data are others each time they are read: they are kept in files instead of read again")
        return same

    def later(self, number: int, arguments: list[Any]) -> list[Kept]:
        """A batch to be read again."""
        self._digests[number] = batch_digest(arguments)
        return [_Later(self, number, index) for index in range(len(arguments))]

    def arguments(self, number: int) -> list[Any]:
        """A batch, read again.

        Raises:
            InvalidBatchError: it is another one than before.
        """
        if self._open is None or self._open[0] != number:
            self._open = None
            arguments = self._bind(self._given(number), number)
            if batch_digest(arguments) != self._digests[number]:
                raise InvalidBatchError(
                    f"batch {number}",
                    "is another one than when the data were read first",
                    "Pass a loader that neither shuffles nor augments, or a list of batches.",
                )
            self._open = number, arguments
        return self._open[1]

    def _given(self, number: int) -> Any:
        if self._iterator is None or number < self._next:
            self._iterator, self._next = iter(self._data), 0
        for given in self._iterator:
            self._next += 1
            if self._next > number:
                if self._next > max(self._digests):
                    # so that a loader's processes end
                    self._iterator = None
                return given
        raise InvalidBatchError(
            f"batch {number}",
            f"is missing: the data had {self._next} batches when they were read again",
            "Pass a loader that yields the same batches each time, or a list of batches.",
        )


class _Later(Kept):
    """An argument of a batch that is read again."""

    is_lasting = False

    def __init__(self, source: _Source, batch: int, index: int) -> None:
        super().__init__(None)
        self._source, self._batch, self._index = source, batch, index

    @property
    def value(self) -> Any:
        return self._source.arguments(self._batch)[self._index]


def batch_digest(arguments: list[Any]) -> str:
    """What tells a batch from others."""
    leaves, structure = tree_flatten(arguments)
    return digest(repr(structure), *(leaf if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves))


def input_tensors(value: Any) -> list[Tensor]:
    """The tensors in a nested input, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [tensor for item in value for tensor in input_tensors(item)] if isinstance(value, list | tuple) else []


def sample_count(arguments: list[Any]) -> int:
    """Length of the leading axis of the first tensor."""
    first = input_tensors(arguments)[0]
    return first.shape[0] if first.dim() else 1


def sizes_of(arguments: Sequence[list[Any]]) -> tuple[int, ...]:
    """The number of samples of each batch."""
    return arguments.sizes if isinstance(arguments, Batches) else tuple(map(sample_count, arguments))
