"""Several processes that learn one model, each from its own shard of the data: what they tell each other.

The processes are those of a group of `torch.distributed`. They talk over a group of gloo of their own, so that nothing
of the caller's comes in between; tensors on GPUs are summed and gathered by the caller's group, where that has NCCL.
Before every exchange all processes say where they are. So one that failed tells the others, processes that do different
things are found out, and one that is gone is noticed at once, since its connections are closed.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from io import BytesIO
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from adaround_plugin.errors import InvalidOptionError, ProcessError, is_out_of_memory
from adaround_plugin.graph.compat import process_store

__all__ = ["ALONE", "Group", "Processes", "open_processes"]

T = TypeVar("T")

# how long the first waits for the last at the door, and at every meeting after that
_DOOR, _MEETING = timedelta(minutes=5), timedelta(hours=2)
# bytes of what a process says at a meeting, and how it begins
_LONGEST, _FINE, _FAILED = 768, "at: ", "failed: "
# where the store counts who has come; axes that a tensor may have
_ARRIVED, _AXES = "arrived", 8
_REMEDY = "Look at its own error, and start all processes again; with checkpoint= they go on from there."


class Processes:
    """A process that is alone: it shares out nothing and waits for nobody.

    Every method is called by all processes alike, in the same order. `at` says what for, in errors.

    Attributes:
        rank: the number of this process.
        size: how many there are.
    """

    rank, size = 0, 1

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let the others know of an error; without one, wait for them."""

    def add(self, at: str, *tensors: Tensor) -> None:
        """Put the sum over all processes into each tensor, in place."""

    def averaged(self, at: str, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The mean of each tensor over all processes."""
        return list(tensors)

    def gathered(self, at: str, value: T) -> list[T]:
        """The values of all processes, by rank: plain data, and tensors on the CPU."""
        return [value]

    def joined(self, at: str, values: Tensor, dim: int) -> Tensor:
        """The tensors of all processes, by rank one after the other along an axis."""
        return values

    def shared(self, at: str, value: T) -> T:
        """The value of the first process: plain data, and tensors on the CPU."""
        return value

    def agree(self, at: str, value: bool) -> bool:
        """Whether it is so in all processes."""
        return all(self.gathered(at, value))

    def sharing(self, at: str, what: str) -> int:
        """How many processes on this machine, this one included, have what this one names."""
        return 1

    def part(self, count: int) -> slice:
        """Which of `count` things this process does; perhaps none."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)


ALONE = Processes()


class Group(Processes):
    """One of several processes.

    Args:
        group: to which this process belongs.

    Raises:
        ProcessError: not all of them came.
    """

    def __init__(self, group: distributed.ProcessGroup) -> None:
        self.rank, self.size = distributed.get_rank(group), distributed.get_world_size(group)
        self._given = group
        self._has_nccl = "cuda:nccl" in distributed.get_backend_config(group)
        # connections of gloo, None once they are closed
        self._own: Any = None
        try:
            self._connect()
        except RuntimeError as error:
            raise self._lost("at: the door") from error

    def _connect(self) -> None:
        """Wait for all processes, and connect to them."""
        name = f"adaround_plugin/{'_'.join(map(str, distributed.get_process_group_ranks(self._given)))}"
        store = process_store(name)
        # as many as there are processes meet each time
        call = (store.add(_ARRIVED, 1) - 1) // self.size
        try:
            # nobody leaves the door before all have come through
            opened = [
                distributed.ProcessGroupGloo(process_store(f"{name}/{call}/{place}"), self.rank, self.size, timeout)
                for place, timeout in (("door", _DOOR), ("work", _MEETING))
            ]
            self._own = opened[1]
        except BaseException:
            # whoever comes now is of the next time
            if store.add(f"{call}/failed", 1) == 1:
                store.add(_ARRIVED, -store.add(_ARRIVED, 0) % self.size)
            raise

    def _close(self) -> None:
        """Close the connections, which whoever waits for this process notices; nothing else refers to them."""
        self._own = None

    def _part(self) -> None:
        """Close the connections when all have heard what was said last."""
        with suppress(ProcessError):
            self._said("goodbye")
        self._close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._meet("the end")
                self._part()
            elif isinstance(error, Exception):
                # whoever is interrupted does not wait for the others
                with suppress(ProcessError):
                    self._meet(f"{type(error).__name__}: {error}", _FAILED)
        finally:
            self._close()

    def add(self, at: str, *tensors: Tensor) -> None:
        self._meet(at)
        with self._speaking(_FINE + at):
            for tensor in tensors:
                sent = self._sent(tensor)
                if sent.is_cuda:
                    distributed.all_reduce(sent, group=self._given)
                else:
                    self._own.allreduce([sent]).wait()
                if sent is not tensor:
                    tensor.copy_(sent)

    def averaged(self, at: str, tensors: Sequence[Tensor]) -> list[Tensor]:
        kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for number, tensor in enumerate(tensors):
            kinds.setdefault((tensor.device, tensor.dtype), []).append(number)
        # one exchange for all of a kind
        together = [torch.cat([tensors[number].reshape(-1) for number in of_kind]) for of_kind in kinds.values()]
        self.add(at, *together)
        found = list(tensors)
        for values, of_kind in zip(together, kinds.values(), strict=True):
            parts = torch.split(values / self.size, [tensors[number].numel() for number in of_kind])
            for number, part in zip(of_kind, parts, strict=True):
                found[number] = part.reshape(tensors[number].shape)
        return found

    def gathered(self, at: str, value: T) -> list[T]:
        said = BytesIO()
        torch.save(value, said)
        parts = self._parts(at, torch.frombuffer(said.getbuffer(), dtype=torch.uint8))
        return [torch.load(BytesIO(part.numpy().tobytes()), weights_only=True) for part in parts]

    def joined(self, at: str, values: Tensor, dim: int) -> Tensor:
        parts = [part for part in self._parts(at, self._sent(values)) if part.numel()]
        # one that has nothing may not know the shape either
        return torch.cat(parts, dim).to(values.device) if parts else values

    def shared(self, at: str, value: T) -> T:
        # the others have nothing to say
        return self.gathered(at, value if self.rank == 0 else None)[0]  # type: ignore[return-value]

    def sharing(self, at: str, what: str) -> int:
        everyones = self.gathered(at, (socket.gethostname(), what))
        return everyones.count(everyones[self.rank])

    def _parts(self, at: str, mine: Tensor) -> list[Tensor]:
        """The tensors of all processes, of any length along any axis."""
        self._meet(at)
        with self._speaking(_FINE + at):
            shape = torch.tensor([mine.dim(), *mine.shape, *[0] * (_AXES - mine.dim())], device="cpu")
            shapes = [torch.empty_like(shape) for _ in range(self.size)]
            self._own.allgather([shapes], [shape]).wait()
            parts = [
                mine if rank == self.rank else mine.new_empty(of_one[1 : 1 + int(of_one[0])].tolist())
                for rank, of_one in enumerate(shapes)
            ]
            for rank, part in enumerate(parts):
                if part.is_cuda and part.numel():
                    distributed.broadcast(part, group_src=rank, group=self._given)
                elif part.numel():
                    self._own.broadcast(part, rank).wait()
            return parts

    def _sent(self, tensor: Tensor) -> Tensor:
        """The tensor as it can be sent."""
        return tensor.contiguous() if self._has_nccl and tensor.is_cuda else tensor.cpu().contiguous()

    def _meet(self, at: str, how: str = _FINE) -> None:
        """Say where this process is, and hear where the others are.

        Raises:
            ProcessError: one of the processes failed, or is elsewhere, or gone.
        """
        heard = self._said(how + at)
        failed = [
            f"rank {rank} failed: {one.removeprefix(_FAILED)}"
            for rank, one in enumerate(heard)
            if one.startswith(_FAILED)
        ]
        if failed:
            self._part()
            raise ProcessError("process_group", "; ".join(failed), _REMEDY)
        if len(set(heard)) > 1:
            self._part()
            places = ", ".join(f"rank {rank} is {one}" for rank, one in enumerate(heard))
            raise ProcessError(
                "process_group", f"not all processes do the same: {places}", "Call adaround alike in all of them."
            )

    def _said(self, what: str) -> list[str]:
        """What all processes say at a time, by rank."""
        mine = torch.frombuffer(bytearray(what.encode()[:_LONGEST].ljust(_LONGEST)), dtype=torch.uint8)
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        with self._speaking(what):
            self._own.allgather([everyone], [mine]).wait()
        return [one.numpy().tobytes().decode(errors="replace").rstrip() for one in everyone]

    @contextmanager
    def _speaking(self, what: str) -> Iterator[None]:
        """Say what it means when the others do not answer."""
        if self._own is None:
            raise ProcessError("process_group", f"the processes have parted ({what})", _REMEDY)
        try:
            yield
        except BaseException as error:
            self._close()
            if not isinstance(error, RuntimeError) or is_out_of_memory(error):
                raise
            raise self._lost(what) from error

    def _lost(self, what: str) -> ProcessError:
        problem = f"one of {self.size} processes is gone, or did not come ({what})"
        return ProcessError("process_group", problem, _REMEDY)


def open_processes(group: Any) -> Processes:
    """The processes of a group; `ALONE` without one, or where it has one process.

    Raises:
        InvalidOptionError: it is no group, or one that this process does not belong to; or there are several processes
            and no group is given.
        ProcessError: not all processes of the group came.
    """
    can_have = distributed.is_available() and distributed.is_initialized()
    if group is None:
        if can_have and (count := distributed.get_world_size()) > 1:
            raise InvalidOptionError(
                "process_group",
                f"not given, and torch.distributed joins {count} processes",
                "Pass torch.distributed.group.WORLD if each of them calls adaround with its shard of the data; else "
                "learn in a process without a group, save the result, and load it in the others.",
            )
        return ALONE
    if not can_have or not isinstance(group, distributed.ProcessGroup):
        raise InvalidOptionError(
            "process_group",
            f"{group!r} is no group that this process belongs to",
            "Call torch.distributed.init_process_group, and pass torch.distributed.group.WORLD or a new_group.",
        )
    return Group(group) if distributed.get_world_size(group) > 1 else ALONE
