"""Loops compiled for the CPU by numba: how they are compiled, and how they share the cores.

Only the modules that hold such loops import this one, and only where a loop is about to run: numba takes a second to
import, and need not be there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numba
import torch

__all__ = ["compiled", "on_all_cores"]

_log = logging.getLogger(__name__)
# a product and the sum that it enters are one instruction, rounded once; sums are taken in their order
_FAST_MATH = {"contract", "nsz"}
# operations that are worth a thread
_WORK_OF_A_THREAD = 5e6


def compiled(*signatures: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile a function, and keep it on disk; it holds no lock of Python's while it runs.

    Args:
        signatures: numba's names of the types to compile it for, now; without any, those it is called with, then.
    """
    settings: dict[str, Any] = {"nogil": True, "fastmath": _FAST_MATH, "error_model": "numpy"}
    kinds = list(signatures) or None

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            found: Callable[..., Any] = numba.njit(kinds, cache=True, **settings)(function)
        except RuntimeError as error:
            # no folder that it could write to
            _log.info("Compiled loops are not kept on disk (%s).", error)
            found = numba.njit(kinds, **settings)(function)
        return found

    return decorate


def on_all_cores(run: Callable[[int, int], object], count: int, work: float) -> None:
    """Call `run(first, last)` on parts of `range(count)`, at the same time on as many threads as torch takes.

    Args:
        run: compiled code, whose parts do not touch each other's results.
        count: number of pieces.
        work: roughly the operations of all of them; a little work is not worth a thread.
    """
    threads = min(torch.get_num_threads(), count, 1 + int(work / _WORK_OF_A_THREAD))
    if threads <= 1:
        run(0, count)
        return
    ends = [count * i // threads for i in range(threads + 1)]
    with ThreadPoolExecutor(threads - 1) as pool:
        others = [pool.submit(run, *part) for part in pairwise(ends[1:])]
        run(ends[0], ends[1])
        for other in others:
            other.result()
