"""Groups of real processes, joined by gloo, each of which does the same with a shard of its own."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch import distributed

__all__ = ["GONE", "run_group", "shard"]

# what a process leaves that was killed
GONE = "gone"
_SECONDS = 300.0


def run_group(size: int, folder: Path, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(rank, size, *arguments)` gives in each of `size` processes of one group, or `GONE`.

    Args:
        size: how many processes.
        folder: where they meet, an empty one.
        work: a function of a module; raises nothing.
        arguments: what it is given.
    """
    context = multiprocessing.get_context("forkserver")
    # clean processes that have imported everything
    context.set_forkserver_preload([work.__module__])
    pipes = [context.Pipe(duplex=False) for _ in range(size)]
    started = [
        context.Process(target=_join, args=(rank, size, folder / "store", theirs, work, arguments))
        for rank, (_, theirs) in enumerate(pipes)
    ]
    try:
        for process, (_, theirs) in zip(started, pipes, strict=True):
            process.start()
            theirs.close()
        return [_result(ours) for ours, _ in pipes]
    finally:
        for process in started:
            process.kill()
            process.join()


def _result(ours: Connection) -> Any:
    assert wait([ours], _SECONDS), "a process does not end"
    try:
        return ours.recv()
    except EOFError:
        return GONE


def _join(
    rank: int, size: int, store: Path, result: Connection, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    """Be one of the processes."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    try:
        result.send(work(rank, size, *arguments))
    except Exception:
        # pytest has taken over where a process writes to
        result.send(traceback.format_exc())
        raise
    # nobody goes before all are done
    result.close()
    multiprocessing.Event().wait()


def shard(data: list[Any], sizes: tuple[int, ...], rank: int) -> list[Any]:
    """Of some batches, as many as each process has in order, those of one process."""
    begin = sum(sizes[:rank])
    return data[begin : begin + sizes[rank]]
