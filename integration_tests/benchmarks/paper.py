"""The AdaRound paper's tables 1 to 9 and its figure 4, in their structure, on the networks of this repository.

Prints ours beside the paper's figures on ImageNet (see `paper_figures` for where each was checked; a question mark
follows those that could not be), and for everything that the paper concludes whether ours point the same way. Finished
measurements are kept, one JSON object a line, so that a second call continues where the first one ended.

    python -m integration_tests.benchmarks.paper --tables 1 4 --seeds 5 --iterations 10000 --learning-rate 1e-3
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from integration_tests.benchmarks.paper_cells import BITS, Bench, Cell
from integration_tests.benchmarks.paper_figures import TABLES
from integration_tests.benchmarks.paper_methods import Budget
from integration_tests.benchmarks.paper_tables import LAYOUT, cells, render, summarize

__all__ = ["Store", "main"]


class Store:
    """Scores that were measured, in memory and in a file.

    Args:
        path: of the file, which is made when the first score is added; a score in it is not measured again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._scores: dict[str, float] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                entry = json.loads(line)
                self._scores[_text(entry["key"])] = entry["score"]

    def get(self, key: dict[str, Any]) -> float | None:
        """The score under a key, None where there is none yet."""
        return self._scores.get(_text(key))

    def add(self, key: dict[str, Any], score: float, seconds: float) -> None:
        """Keep a score, and the seconds of processor time that it took."""
        self._scores[_text(key)] = score
        with self._path.open("a") as file:
            file.write(json.dumps({"key": key, "score": score, "seconds": round(seconds, 1)}) + "\n")


def _text(key: dict[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)


class Run:
    """Measures cells over their seeds.

    Args:
        bench: runs one.
        store: keeps the scores.
        seeds: how often a cell is measured, with calibration images and draws of their own.
        draws: the same for stochastic rounding.
    """

    def __init__(self, bench: Bench, store: Store, seeds: int, draws: int) -> None:
        self.bench, self.store, self.seeds, self.draws = bench, store, seeds, draws

    def repeats(self, cell: Cell) -> int:
        """How often a cell is measured."""
        return self.draws if cell.method == "stochastic" else self.seeds if cell.seeded else 1

    def missing(self, wanted: list[Cell]) -> Iterator[tuple[Cell, int]]:
        """Cells and seeds without a score; every cell's first seed comes before any cell's second."""
        for seed in range(max(map(self.repeats, wanted))):
            for cell in wanted:
                if seed < self.repeats(cell) and self.store.get(self.bench.key(cell, seed)) is None:
                    yield cell, seed

    def measure(self, wanted: list[Cell], minutes: float) -> None:
        """Measure what is missing, and begin no more cells after so many minutes."""
        end = time.monotonic() + 60 * minutes
        left = list(self.missing(wanted))
        for cell, seed in tqdm(left, unit="cell", smoothing=0):
            if time.monotonic() > end:
                break
            start = time.process_time()
            score = self.bench.score(cell, seed)
            self.store.add(self.bench.key(cell, seed), score, time.process_time() - start)

    def scores(self, cell: Cell) -> list[float]:
        """The scores of a cell that were measured, by seed."""
        found = (self.store.get(self.bench.key(cell, seed)) for seed in range(self.repeats(cell)))
        return [score for score in found if score is not None]


def _bits(text: str) -> tuple[str, int]:
    network, _, bits = text.partition("=")
    if network not in BITS or not bits.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not NETWORK=BITS with one of {list(BITS)}")
    return network, int(bits)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=list(LAYOUT), default=list(LAYOUT))
    parser.add_argument("--granularity", nargs="+", choices=["tensor", "channel"], default=["tensor", "channel"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--stochastic", type=int, default=25, help="stochastic roundings for table 1; the paper: 100")
    parser.add_argument("--bits", type=_bits, nargs="+", default=[], metavar="NETWORK=BITS", help=f"default: {BITS}")
    for field in fields(Budget):
        choices = ["moments", "samples"] if field.name == "data" else None
        name = f"--{field.name.replace('_', '-')}"
        parser.add_argument(name, type=type(field.default), default=field.default, choices=choices)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no measurement after so many")
    parser.add_argument("--results", type=Path, default=Path("paper_results.jsonl"), help="where scores are kept")
    parser.add_argument("--threads", type=int, default=1)
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Measure what is missing, and print."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    budget = Budget(**{field.name: getattr(options, field.name) for field in fields(Budget)})
    run = Run(Bench(budget, BITS | dict(options.bits)), Store(options.results), options.seeds, options.stochastic)
    granularities = [kind == "channel" for kind in options.granularity]
    wanted = [cell for kind in granularities for name in options.tables for cell in cells(name, kind)]
    run.measure(list(dict.fromkeys(wanted)), options.minutes)

    shown = {
        name: value for name, value in vars(options).items() if name not in ("tables", "results", "minutes", "bits")
    }
    print(f"Bits of the weights: {run.bench.bits}, the paper's have 4 (why: `paper_cells.BITS`). Options: {shown}.")
    for name in options.tables:
        print(f"\n### {name if name.startswith('figure') else f'Table {name}'}: {TABLES[name].title}\n")
        print("\n".join(render(name, run.scores, granularities)))
    print("\n### What the paper concludes, and what ours say\n")
    print("\n".join(summarize(options.tables, run.scores, granularities, run.bench.resolution)))


if __name__ == "__main__":
    main()
