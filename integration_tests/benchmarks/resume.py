"""Processes that are killed at random moments while they learn, and go on: the same bits as if nothing had happened.

python -m integration_tests.benchmarks.resume --kills 50
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from adaround_plugin import BlockWise, Finetune, LayerWise, Paper, adaround, get_report, save_rounding
from integration_tests.benchmarks.quiet import quiet
from integration_tests.benchmarks.random_graphs import drawn
from integration_tests.region_models import prepared_by

__all__ = ["CALLS", "kill_and_resume"]

_FISHER = LayerWise(column_weighting="fisher")
CALLS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "best": {"method": BlockWise(layers=_FISHER, iterations=40), "finetune": Finetune(iterations=60, integers=True)},
    "paper": {"method": Paper(iterations=100)},
}
# clean processes that have imported everything, so that what is killed is learning
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([__name__])
_SECONDS = 120
# a run is killed at most so often, so that several are; and at the times `u ** _LATE` of its own, `u` uniform: most
# decisions come late, after the trials of recipes
_MOST_KILLS, _LATE = 6, 0.25


def kill_and_resume(kills: int, seed: int = 0) -> Counter[str]:
    """Raise `AssertionError` unless runs that are killed at random moments end as those that are not.

    Random networks, hosts and methods in turn; a run is started again, and perhaps killed again, until it ends.

    Args:
        kills: how many.
        seed: of networks and moments.

    Returns:
        How many runs ended, processes were killed, decisions were recalled, and half-written files were left.
    """
    draw, seen = random.Random(seed), Counter[str]()
    while seen["kills"] < kills:
        toolkit, call = ("fx", "pt2e")[seen["runs"] % 2], list(CALLS)[seen["runs"] % len(CALLS)]
        with tempfile.TemporaryDirectory() as folder:
            _one(Path(folder), draw, seen, (seed + seen["runs"], toolkit, call), kills)
    return seen


def _one(folder: Path, draw: random.Random, seen: Counter[str], case: tuple[int, str, str], kills: int) -> None:
    """A run without interruption, and one with as many as it gets."""
    whole, resumed, kept = folder / "whole", folder / "resumed", folder / "kept"
    process, connection = _started(case, None, whole)
    process.join(_SECONDS)
    assert process.exitcode == 0, f"{case} failed"
    _, seconds, _ = connection.recv()
    most = min(kills, seen["kills"] + _MOST_KILLS)
    while not resumed.exists():
        process, connection = _started(case, kept, resumed)
        process.join(seconds * draw.random() ** _LATE if seen["kills"] < most else _SECONDS)
        if process.exitcode is None:
            process.kill()
            process.join()
            seen["kills"] += 1
            seen["half-written files"] += sum(not path.name.endswith(".safetensors") for path in kept.glob("*"))
        else:
            assert process.exitcode == 0, f"{case} failed after it was killed"
    seen["runs"] += 1
    seen["recalled"] += connection.recv()[2] if connection.poll() else 0
    ours, theirs = load_file(resumed), load_file(whole)
    assert ours.keys() == theirs.keys()
    differing = [name for name in theirs if not torch.equal(ours[name], theirs[name])]
    assert not differing, f"{case}: {differing} differ"
    assert not [path for path in kept.iterdir() if path.suffix != ".safetensors"], f"{case}: half-written files left"


def _started(case: tuple[int, str, str], kept: Path | None, result: Path) -> tuple[ForkServerProcess, Connection]:
    """A process that learns, once it has begun to."""
    ours, theirs = _CONTEXT.Pipe()
    process = _CONTEXT.Process(target=_learn, args=(*case, kept, result, theirs))
    process.start()
    theirs.close()
    assert ours.poll(_SECONDS), f"{case} did not begin"
    assert ours.recv() == "began"
    return process, ours


def _learn(seed: int, toolkit: str, call: str, kept: Path | None, result: Path, connection: Connection) -> None:
    """Learn a random network and save what was learned."""
    torch.set_num_threads(1)
    case = drawn(seed, toolkit)
    with quiet():
        prepared = prepared_by(toolkit, case.activation_bits, case.network, case.data, case.bits)
        connection.send("began")
        start = time.perf_counter()
        learned = adaround(prepared, case.data, progress=False, checkpoint=kept, **CALLS[call])
        connection.send(("ended", time.perf_counter() - start, get_report(learned).recalled))
        save_rounding(learned, result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start = time.perf_counter()
    seen = kill_and_resume(arguments.kills, arguments.seed)
    told = ", ".join(f"{seen[what]} {what}" for what in ("runs", "kills", "recalled", "half-written files"))
    print(f"{told}; every run ended with the bits of one that was not killed; {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
