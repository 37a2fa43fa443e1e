"""Bad days: a fault is drawn into passes over random networks. Nothing of the user's may be lost or half changed.

python -m integration_tests.benchmarks.soak --count 200
"""

from __future__ import annotations

import argparse
import copy
import functools
import random
import resource
import signal
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from neural_compressor.torch import quantization as inc
from torch import Tensor, fx

from adaround_plugin import adaround, get_report
from adaround_plugin.errors import InvalidBatchError, InvalidModelError
from adaround_plugin.inc import AdaRoundConfig, load, save
from integration_tests.benchmarks.random_graphs import Drawn, drawn
from integration_tests.inc_models import RECIPE, calibrate, data, network
from integration_tests.models import assert_unchanged, snapshot
from integration_tests.region_models import converted, prepared_by

__all__ = ["FAULTS", "survive"]

FAULTS = ("none", "not a number", "wrong shape", "loader", "interrupt", "interrupt in place", "full disk")
# bytes that a file may have where the disk is full
_FULL = 4096


class LoaderError(Exception):
    """What a loader of the user's raises."""


def survive(seed: int, host: str, fault: str) -> str:
    """Raise `AssertionError` unless a pass with a fault ends as it should; what came of it, in a word or two.

    Args:
        seed: of the network and of where the fault lies.
        host: `"fx"` or `"pt2e"`.
        fault: of `FAULTS`.
    """
    draw = random.Random(seed)
    if fault == "full disk":
        return _full_disk(draw)
    case = drawn(seed, host)
    prepared = prepared_by(case.host, case.activation_bits, case.network, case.data, case.bits)
    before, batches = snapshot(prepared), [batch.clone() for batch in case.data]
    if fault.startswith("interrupt"):
        return _interrupted(case, prepared, before, fault.endswith("in place"), draw)
    bad = draw.randrange(len(case.data))
    expected: dict[str, Any] = {
        "not a number": InvalidBatchError,
        "wrong shape": InvalidBatchError,
        "loader": LoaderError,
    }
    try:
        adaround(prepared, _faulty(case.data, fault, bad, draw), progress=False)
        came = "learned"
    except expected.get(fault, ()) as error:
        came = type(error).__name__
    assert (came == "learned") == (fault == "none")
    assert_unchanged(before, prepared)
    assert all(torch.equal(one, other) for one, other in zip(batches, case.data, strict=True))
    return came


def _faulty(batches: list[Tensor], fault: str, bad: int, draw: random.Random) -> Iterator[Tensor]:
    for number, batch in enumerate(batches):
        if number == bad and fault == "not a number":
            batch = batch.clone()
            batch.view(-1)[draw.randrange(batch.numel())] = torch.nan
        if number == bad and fault == "wrong shape":
            batch = batch[:, :2]
        if number == bad and fault == "loader":
            raise LoaderError("the loader's own")
        yield batch


@contextmanager
def _interrupt_after(seconds: float) -> Iterator[None]:
    """Press Ctrl-C, once."""
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _interrupted(
    case: Drawn, prepared: fx.GraphModule, before: dict[str, Tensor], inplace: bool, draw: random.Random
) -> str:
    began = time.perf_counter()
    expected = adaround(prepared, case.data, progress=False)
    seconds = time.perf_counter() - began
    # the last tenth more often, in which the model is written
    share = draw.choice((draw.uniform(0, 1), draw.uniform(0.9, 1)))
    try:
        with _interrupt_after(max(1e-3, share * seconds)):
            adaround(prepared, case.data, progress=False, inplace=inplace)
        came = "finished"
    except KeyboardInterrupt:
        came = "interrupted"
    try:
        get_report(prepared)
        is_written = True
    except InvalidModelError:
        is_written = False
    assert inplace or not is_written
    if not is_written:
        assert_unchanged(before, prepared)
        # it goes on as if nothing had happened
        prepared = adaround(prepared, case.data, progress=False)
    one, other = (converted(case.host, case.activation_bits, model) for model in (prepared, expected))
    with torch.no_grad():
        assert _same(one(case.data[0]), other(case.data[0]))
    return f"{came}, {'written' if is_written else 'untouched'}"


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    return len(one) == len(other) and all(_same(*pair) for pair in zip(one, other, strict=True))


@functools.cache
def _quantized() -> fx.GraphModule:
    """A quantized model; not to be changed."""
    model: fx.GraphModule = inc.quantize(network(), AdaRoundConfig(bits=3, **RECIPE), run_fn=calibrate(data()))
    return model


def _full_disk(draw: random.Random) -> str:
    """A model is saved where there is no room, over one that was saved before or into an empty folder."""
    model = copy.deepcopy(_quantized())
    with tempfile.TemporaryDirectory() as folder:
        path, has_old = Path(folder), draw.random() < 0.5
        if has_old:
            save(model, path)
        files = {file.name: file.read_bytes() for file in path.iterdir()}
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (draw.randrange(1, _FULL), limits[1]))
        try:
            save(model, path)
        except (OSError, RuntimeError):
            pass
        else:
            raise AssertionError("a full disk was not noticed")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)
        assert {file.name: file.read_bytes() for file in path.iterdir()} == files
        if has_old:
            load(path, network())
    return "old file kept" if has_old else "no file left"


def main() -> None:
    """Survive many faults, and print what came of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    began = time.perf_counter()
    found: dict[str, Counter[str]] = {fault: Counter() for fault in FAULTS}
    for seed in range(options.count):
        fault = FAULTS[seed % len(FAULTS)]
        try:
            found[fault][survive(seed, ("fx", "pt2e")[seed // len(FAULTS) % 2], fault)] += 1
        except Exception as error:
            found[fault][f"FAILED: seed {seed}, {type(error).__name__} {error}"] += 1
    print("| fault | runs | came of it |")
    print("|---|---|---|")
    for fault, counts in found.items():
        print(f"| {fault} | {sum(counts.values())} | {'; '.join(f'{one}: {n}' for one, n in sorted(counts.items()))} |")
    print(f"\n{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
