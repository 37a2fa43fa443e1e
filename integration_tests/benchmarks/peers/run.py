"""Peers side by side: install each into an environment of its own, run them on the same job, judge them alike.

Rows that are in the results file already are not run again, so that a run can be cut off and go on. CPU seconds and
memory are of the peer's process, on one thread, from the float network to rounded weights. Whatever fails is a row too,
with the last line of the error.

    python -m integration_tests.benchmarks.peers.run install --environments peers-env
    python -m integration_tests.benchmarks.peers.run run resnet20 --environments peers-env --results docs/peers.jsonl
    python -m integration_tests.benchmarks.peers.run table --results docs/peers.jsonl --figure docs/figures/peers.png
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from integration_tests.benchmarks.peers.exchange import Job, read, read_bits, write
from integration_tests.benchmarks.peers.registry import PEERS
from integration_tests.benchmarks.peers.table import draw, show
from integration_tests.benchmarks.peers.tasks import TASKS, filled, levels

__all__ = ["allocate", "install", "measure"]

ROOT = Path(__file__).resolve().parents[3]

# run in a peer's environment: the versions of the distributions that the command line names
_VERSIONS = """
import sys
from importlib.metadata import version
print(*(f"{name} {version(name)}" for name in sys.argv[1:]), sep=", ")
"""


def _python(environments: Path, peer: str) -> Path:
    """The interpreter of a peer's environment."""
    return (environments / peer / "bin" / "python").absolute() if PEERS[peer].requirements else Path(sys.executable)


def install(environments: Path, peer: str) -> str:
    """Make the environment of a peer, or complete it; the versions that it has of what was asked for."""
    python = _python(environments, peer)
    if not python.exists():
        venv.create(environments / peer, with_pip=True)
    # one that was cut off is completed, one that is complete takes a moment
    subprocess.run([python, "-m", "pip", "install", "--quiet", *PEERS[peer].requirements], check=True)
    names = [re.split(r"[=\[ ]", one)[0] for one in PEERS[peer].requirements]
    asked = subprocess.run([python, "-c", _VERSIONS, *names], check=True, capture_output=True, text=True)
    return asked.stdout.strip()


def _given(row: dict[str, Any]) -> dict[str, Any]:
    """What tells one row from another."""
    return {name: row.get(name) for name in ("peer", "setting", "network", "bits", "group", "samples", "seed")}


def measure(job: Job, environments: Path) -> dict[str, Any]:
    """One row: the job, what it took, what the judge says, or how it failed."""
    task = TASKS[job.network]
    given = _given(asdict(job))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, job, task.network(), task.samples(job.samples, job.seed))
        if (error := _failed(job.peer, job.peer, environments, folder)) is not None:
            return {**given, "failed": error}
        made, result = read(folder)
    try:
        other = filled(task.network(), made)
    except ValueError as error:
        return {**given, "failed": str(error)}
    found = task.judge(other)
    grids = (weight if job.group is None else weight.reshape(-1, job.group) for weight, _ in made.values())
    needed = max(levels(weight, 2**job.bits) for weight in grids)
    return {**given, **found, **result, "on_grid": needed <= 2**job.bits}


def _failed(peer: str, script: str, environments: Path, folder: Path) -> str | None:
    """Let a script do the job of a folder in a peer's environment; the last line of its error, if there is one."""
    done = subprocess.run(
        [_python(environments, peer), "-m", f"integration_tests.benchmarks.peers.{script}", folder],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return None if done.returncode == 0 else lines[-1][:300]


def allocate(job: Job, environments: Path) -> tuple[dict[str, int], float]:
    """Bits for each layer by a peer's search, whose options are `widths` and `bytes`, and its CPU seconds.

    Raises:
        RuntimeError: the peer fails.
    """
    task = TASKS[job.network]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, job, task.network(), task.samples(job.samples, job.seed))
        if (error := _failed(job.peer, f"{job.peer}_bits", environments, folder)) is not None:
            raise RuntimeError(f"{PEERS[job.peer].title} fails: {error}")
        return read_bits(folder)


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _jobs(options: argparse.Namespace) -> Iterator[Job]:
    """All runs that the command line asks for."""
    for peer in options.peers:
        for setting, own in PEERS[peer].settings.items():
            asked = options.settings is None or setting in options.settings
            if asked and options.network in PEERS[peer].networks:
                for bits in options.bits:
                    yield Job(peer, setting, options.network, bits, options.samples, options.seed, own, options.group)


def _run(options: argparse.Namespace) -> None:
    """Run what is missing."""
    done = [_given(row) for row in _rows(options.results)]
    for job in _jobs(options):
        if _given(asdict(job)) not in done:
            row = measure(job, options.environments)
            print(json.dumps(row), flush=True)
            with options.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def main() -> None:
    """Install, run, or show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("install", help="make the environments")
    two = commands.add_parser("run", help="quantize and judge")
    three = commands.add_parser("table", help="print the results, draw the figure")
    two.add_argument("network", choices=TASKS)
    two.add_argument("--settings", nargs="+", help="all unless told otherwise")
    two.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    two.add_argument("--group", type=int, help="columns that share a scale; all of a row without")
    two.add_argument("--samples", type=int, default=1024)
    two.add_argument("--seed", type=int, default=1)
    for command in (one, two):
        command.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
        command.add_argument("--environments", type=Path, default=Path("peers-environments"))
    for command in (two, three):
        command.add_argument("--results", type=Path, default=Path("peers.jsonl"))
    three.add_argument("--figure", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.command == "install":
        for peer in options.peers:
            if PEERS[peer].requirements:
                print(f"{peer}: {install(options.environments, peer)}", flush=True)
    elif options.command == "run":
        _run(options)
    else:
        show(_rows(options.results))
        if options.figure is not None:
            draw(_rows(options.results), options.figure)


if __name__ == "__main__":
    main()
