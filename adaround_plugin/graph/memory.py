"""Values that are kept for later: in memory up to a budget, then in files of a temporary folder."""

from __future__ import annotations

import ctypes
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import psutil
import torch
from torch import Tensor

from adaround_plugin.errors import InvalidOptionError
from adaround_plugin.graph.compat import tree_flatten
from adaround_plugin.graph.value_files import (
    Kept,
    ValueFile,
    is_plain,
    storages,
    unpacked,
    write_joined,
    write_values,
)
from adaround_plugin.options import check_integer

__all__ = ["KeptRows", "Memory", "MemoryUse", "free_bytes"]

T = TypeVar("T")

# of what is free, the part that values may take where nobody said how much
_SHARE = 0.5
# so many bytes are freed before they are given back, which takes a part of a second: amid a stage, and at its end
_GIVEN_BACK, _GIVEN_BACK_AFTER = 2**29, 2**28
# where the limit and the use of a container stand, and what of it are pages of files, in both versions of cgroups
_CGROUP = Path("/sys/fs/cgroup")
_CGROUPS = (
    (_CGROUP / "memory.max", _CGROUP / "memory.current", "inactive_file"),
    (_CGROUP / "memory/memory.limit_in_bytes", _CGROUP / "memory/memory.usage_in_bytes", "total_inactive_file"),
)


@dataclass(frozen=True)
class MemoryUse:
    """What was kept, in bytes.

    Attributes:
        kept: the most that values took in memory at once.
        spilled: the most that was in files at once.
        written: all that was written to files.
    """

    kept: int = 0
    spilled: int = 0
    written: int = 0


class KeptRows:
    """A tensor of which entries along its leading axis are taken.

    Args:
        kept: the tensor.
        device: where what is taken belongs.
    """

    def __init__(self, kept: Kept, device: torch.device) -> None:
        self._kept, self._device = kept, device

    def take(self, index: Tensor) -> Tensor:
        """Entries along the leading axis."""
        whole: Tensor = self._kept.value
        return whole[index.to(whole.device)].to(self._device)


class Memory:
    """Keeps values within a budget; a context manager, which removes its files.

    Args:
        budget: bytes that values may take in memory; None for no limit.

    Attributes:
        use: what was kept so far.
    """

    def __init__(self, budget: int | None = None) -> None:
        self.budget, self.use = budget, MemoryUse()
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._files = 0
        # of each storage in memory: how many values lie in it, and its bytes
        self._storages: dict[int, list[int]] = {}
        self._used = self._on_disk = 0
        # bytes that were freed since freed memory was given back
        self._freed = 0

    @classmethod
    def of(cls, budget: Any, devices: Iterable[torch.device] = (), sharing: int = 1) -> Memory:
        """By what a caller asks for: bytes, or `"auto"`, half of the memory that is free now.

        Args:
            budget: what is asked for.
            devices: where values will be.
            sharing: how many processes there have equal parts of that half.

        Raises:
            InvalidOptionError: it is neither.
        """
        if budget == "auto":
            free = min(free_bytes(device) for device in set(devices) or {torch.device("cpu")})
            return cls(int(_SHARE * free / sharing))
        if isinstance(budget, str):
            raise InvalidOptionError("memory_budget", f"{budget!r} is not known", 'Pass a number of bytes, or "auto".')
        check_integer("memory_budget", budget, least=0)
        return cls(budget)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def keep(self, values: Sequence[Any]) -> list[Kept]:
        """Keep values that nobody else needs, all of them in memory or all in one file.

        Raises:
            InvalidOptionError: there is no room for them on the disk.
        """
        leaves = [tree_flatten(value)[0] for value in values]
        if self._has_room(storages(leaf for one in leaves for leaf in one)):
            held = [self._held(value, one) for value, one in zip(values, leaves, strict=True)]
            self._give_back(_GIVEN_BACK)
            return held
        return self._spilled(lambda path: write_values(path, values))

    def keep_rows(self, parts: Sequence[Tensor]) -> KeptRows:
        """Keep tensors joined along their leading axis, contiguous, quantized ones as floats.

        Args:
            parts: alike but for the length of that axis.

        Raises:
            InvalidOptionError: there is no room for them on the disk.
        """
        one = unpacked(parts[0][:0])
        if self._fits(sum(len(part) for part in parts) * prod(one.shape[1:]) * one.element_size()):
            (kept,) = self.keep([torch.cat([unpacked(part).contiguous() for part in parts])])
        else:
            kept = self._spilled(lambda path: write_joined(path, parts))
        return KeptRows(kept, one.device)

    def settle(self) -> None:
        """Give back what is free, at the end of a stage; nothing where all fits."""
        self._give_back(_GIVEN_BACK_AFTER)

    def _give_back(self, least: int) -> None:
        if self.use.written and self._freed >= least:
            self._freed = 0
            _trim()

    def fits(self, values: Sequence[Any]) -> bool:
        """Whether these values may be in memory, too."""
        return self._has_room(storages(tree_flatten(list(values))[0]))

    def _has_room(self, needed: Mapping[int, torch.UntypedStorage]) -> bool:
        return self._fits(sum(one.nbytes() for pointer, one in needed.items() if pointer not in self._storages))

    def _fits(self, size: int) -> bool:
        return self.budget is None or not size or self._used + size <= self.budget

    def _held(self, value: Any, leaves: Sequence[Any]) -> Kept:
        kept = Kept(value)
        pointers = []
        for storage in (leaf.untyped_storage() for leaf in leaves if is_plain(leaf)):
            entry = self._storages.setdefault(storage.data_ptr(), [0, storage.nbytes()])
            self._used += 0 if entry[0] else entry[1]
            entry[0] += 1
            pointers.append(storage.data_ptr())
        weakref.finalize(kept, self._let_go, pointers)
        self.use = replace(self.use, kept=max(self.use.kept, self._used))
        return kept

    def _let_go(self, pointers: Sequence[int]) -> None:
        for pointer in pointers:
            entry = self._storages[pointer]
            entry[0] -= 1
            if not entry[0]:
                self._used -= entry[1]
                self._freed += entry[1]
                del self._storages[pointer]

    def _spilled(self, write: Callable[[Path], tuple[ValueFile, T]]) -> T:
        """What is made by writing a file, which is removed with the last value in it."""
        try:
            if self._folder is None:
                self._folder = tempfile.TemporaryDirectory(prefix="adaround-", ignore_cleanup_errors=True)
            self._files += 1
            path = Path(self._folder.name) / str(self._files)
            file, kept = write(path)
        except OSError as error:
            raise InvalidOptionError(
                "memory_budget",
                f"values go beyond it, and cannot be written to the folder {tempfile.gettempdir()!r} ({error})",
                "Raise it, or let the variable TMPDIR name a folder on a larger disk.",
            ) from error
        weakref.finalize(file, self._remove, path, file.size)
        self._on_disk += file.size
        self.use = replace(self.use, spilled=max(self.use.spilled, self._on_disk), written=self.use.written + file.size)
        self._freed += file.size
        self._give_back(_GIVEN_BACK)
        return kept

    def _remove(self, path: Path, size: int) -> None:
        self._on_disk -= size
        # some systems keep a file that is mapped: it goes with the folder then
        with suppress(OSError):
            path.unlink()


def _trim() -> None:
    """Give memory that was freed back to the system.

    glibc keeps freed blocks of less than 32 MB where others lie behind them: with values of many batches, which come
    and go, several times what is in use.
    """
    with suppress(OSError, AttributeError):  # another C library
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)


def free_bytes(device: torch.device) -> int:
    """Memory that this process can still take: of a GPU, or of the machine or the container without swapping."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    for limit, used, pages in _CGROUPS:
        # no container, or one without a limit
        with suppress(OSError, ValueError):
            facts = dict(line.split() for line in limit.with_name("memory.stat").read_text().splitlines())
            # pages of files are given up when memory is short
            taken = int(used.read_text()) - int(facts.get(pages, 0))
            free = min(free, int(limit.read_text()) - taken)
    return max(0, free)
