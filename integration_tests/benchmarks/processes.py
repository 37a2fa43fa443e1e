"""Seconds of `adaround` in one process, and in several that share out the same images: glyph networks, one thread each.

With fewer cores than processes these take turns, so the largest count must not be above the number of free cores.

    python -m integration_tests.benchmarks.processes resnet20 --processes 1 2
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from adaround_plugin import adaround, get_report
from integration_tests.benchmarks import glyphs, networks
from integration_tests.benchmarks.accuracy import Case
from integration_tests.process_groups import run_group

BATCH = 64
PHASES = ("setup", "trials", "importance", "forward", "moments", "solve", "reconstruct", "compare", "total")


def learn(rank: int, size: int, network: str, bits: int, images: int, method: str) -> dict[str, Any]:
    """The report of one of several processes, as its columns."""
    case = Case(networks.load(network), bits, activation_bits=None, affine=True)
    batches = list(torch.split(glyphs.load("train", images, seed=1)[0], BATCH))
    prepared = case.prepare(batches)
    ends = [len(batches) * number // size for number in range(size + 1)]
    mine = batches[ends[rank] : ends[rank + 1]]
    report = get_report(adaround(prepared, mine, method, progress=False, process_group=distributed.group.WORLD))
    return {"seconds": report.seconds, "error": report.output_error}


def main() -> None:
    """Run and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+", choices=list(networks.BUILDERS))
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--method", default="default")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    head = ["network", "method", "processes", *PHASES, "output error"]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
    for network in options.networks:
        for size in options.processes:
            with tempfile.TemporaryDirectory() as folder:
                given = network, options.bits, options.images, options.method
                first, *_ = run_group(size, Path(folder), learn, *given)
            seconds = [f"{first['seconds'].get(phase, 0.0):.1f}" for phase in PHASES]
            row = [network, options.method, str(size), *seconds, f"{first['error']:.4g}"]
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
