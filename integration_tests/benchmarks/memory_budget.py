"""Memory and time of `adaround` under a budget for what it keeps of the batches, beside a run without limit.

Random images are written to a file, and a loader reads them from there, batch by batch. Each run is in a process of its
own, whose largest resident memory is the peak; pages of mapped files count for it, though the system may take them
back. The last column is a digest of all integers and scales: the same for every budget.

python -m integration_tests.benchmarks.memory_budget resnet50 --images 1024 --gib 64 1
python -m integration_tests.benchmarks.memory_budget resnet50 --images 4096 --gib 1
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaround_plugin import adaround, get_report
from adaround_plugin.digests import digest
from adaround_plugin.hosts.learned import learned_weights
from integration_tests.benchmarks.accuracy import preset_of
from integration_tests.benchmarks.floor import in_own_process, peak_gigabytes, table, warm_up
from integration_tests.benchmarks.floor_models import NETWORKS, Setting, load

__all__ = ["FileImages", "measure"]

HEAD = (
    *("network", "images", "budget GiB", "seconds", "peak GiB (before)", "kept in memory GiB", "in files GiB"),
    *("written GiB", "output error", "digest"),
)
_GIB = 2**30


class FileImages:
    """Batches of images from a file of float32, read anew each time.

    Args:
        path: of the file.
        shape: of all images, `(images, channels, height, width)`.
        batch: images in a batch.
    """

    def __init__(self, path: Path, shape: Sequence[int], batch: int) -> None:
        self._path, self._shape, self._batch = path, torch.Size(shape), batch

    def write(self) -> None:
        """Fill the file with random images."""
        generator = torch.Generator().manual_seed(0)
        with self._path.open("wb") as file:
            for start in range(0, self._shape[0], self._batch):
                count = min(self._batch, self._shape[0] - start)
                file.write(torch.randn(count, *self._shape[1:], generator=generator).numpy().data)

    def __iter__(self) -> Iterator[Tensor]:
        of_one = self._shape[1:].numel()
        with self._path.open("rb") as file:
            for start in range(0, self._shape[0], self._batch):
                batch = torch.empty(min(self._batch, self._shape[0] - start), *self._shape[1:])
                read = file.readinto(batch.numpy().reshape(-1).data.cast("B"))
                assert read == 4 * len(batch) * of_one
                yield batch


def measure(setting: Setting, method: str, budget: int, images: FileImages, threads: int | None) -> list[str]:
    """The cells of one run, under `HEAD`."""
    if threads is not None:
        torch.set_num_threads(threads)
    warm_up("cpu", method)
    # what calibrates it is enough
    workload = load(replace(setting, images=min(setting.images, 128)))
    workload.batches.clear()
    before, start = peak_gigabytes("cpu"), time.perf_counter()
    learned = adaround(workload.prepared, images, preset_of(method), progress=False, memory_budget=budget)
    seconds = time.perf_counter() - start
    report = get_report(learned)
    use = {name: f"{value / _GIB:.2f}" for name, value in report.memory.items()}
    return [
        *(setting.network, str(setting.images), use["budget"], f"{seconds:.0f}"),
        f"{peak_gigabytes('cpu'):.2f} ({before:.2f})",
        *(use["kept"], use["spilled"], use["written"], f"{report.output_error:.5f}"),
        digest(*(part for integers, grid in learned_weights(learned).values() for part in (integers, grid.scale))),
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sized = [name for name, setting in NETWORKS.items() if setting.size is not None]
    parser.add_argument("network", choices=sized)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--size", type=int, help="height and width of an image")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--gib", type=float, nargs="+", default=[64.0, 1.0], help="the budgets")
    parser.add_argument("--method", default="default")
    parser.add_argument("--threads", type=int)
    options: Any = parser.parse_args()
    setting = replace(NETWORKS[options.network], images=options.images, batch=options.batch)
    setting = replace(setting, size=options.size or setting.size)
    with tempfile.TemporaryDirectory() as folder:
        shape = (setting.images, 3, setting.size or 0, setting.size or 0)
        images = FileImages(Path(folder) / "images", shape, options.batch)
        images.write()
        budgets = [int(gib * _GIB) for gib in options.gib]
        runs = (in_own_process(measure, setting, options.method, budget, images, options.threads) for budget in budgets)
        table(HEAD, runs)
    print(f"\n{options.threads or torch.get_num_threads()} threads; load average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
