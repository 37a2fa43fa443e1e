"""Error and accuracy against time: what each way to round buys, at 4, 3 and 2 bits.

Weight-only, per channel, every layer, the model that the host converted. Rows that are in the results file already are
not run again, so that a run can be cut off and go on. Time is CPU seconds; with `--device cuda`, where all but the
conversion and the accuracy runs on the GPU, it is wall time.

    python -m integration_tests.benchmarks.frontier resnet20 --results frontier.jsonl --figure docs/figures/frontier.png
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch

from adaround_plugin import LayerWise, Paper, adaround, get_report
from adaround_plugin.learning.methods import Method
from integration_tests.benchmarks import glyphs, networks
from integration_tests.benchmarks.accuracy import TEST_IMAGES, TEST_SEED, Case, accuracy

# the paper's rate is for 10,000 steps: in fewer, shares would not get from where they start to 0 or 1
METHODS: dict[str, str | Method] = {
    "nearest": "nearest",
    "coordinate descent": LayerWise(solver="coordinate_descent"),
    "annealing": "default",
    "relaxation, 500": Paper(iterations=500, learning_rate=1e-2),
    "relaxation, 2,000": Paper(iterations=2000, learning_rate=1e-2),
    "relaxation, 10,000": "paper",
    "blocks": "blocks",
}


def clock(device: str) -> float:
    """CPU seconds of this process, or wall seconds when the accelerator has done all it was given."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def measure(name: str, bits: int, method: str, images: int, device: str = "cpu") -> dict[str, Any]:
    """One row: error of the output and top-1 on test images, loss against float, seconds of `adaround`."""
    network = networks.load(name)
    test = glyphs.load("test", TEST_IMAGES, seed=TEST_SEED)
    calibration, _ = glyphs.load("train", 1024, seed=1)
    case = Case(copy.deepcopy(network).to(device), bits, None)
    batches = list(torch.split(calibration[:images].to(device), 64))
    prepared = case.prepare(batches)
    start = clock(device)
    learned = adaround(prepared, batches, METHODS[method], progress=False)
    seconds = clock(device) - start
    recipe = get_report(learned).recipe
    converted = case.convert(learned.cpu())
    exact, score = accuracy(network, *test), accuracy(converted, *test)
    row = {"network": name, "bits": bits, "method": method, "images": images, "device": device}
    with torch.no_grad():
        outputs = [(network(x), converted(x)) for x in torch.split(test[0][:2000], 500)]
    error = sum(float((a - b).square().sum()) for a, b in outputs)
    power = sum(float((a - a.mean()).square().sum()) for a, _ in outputs)
    return {
        **row,
        "error": error / power,
        "top1": score,
        "loss": exact - score,
        "seconds": seconds,
        "recipe": recipe,
    }


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """The figure: a panel for each number of bits, output error against seconds, top-1 beside each point."""
    from matplotlib.figure import Figure

    widths = sorted({row["bits"] for row in rows}, reverse=True)
    figure = Figure(figsize=(4.2 * len(widths), 4.2), layout="constrained")
    unit = "CPU seconds" if rows[0].get("device", "cpu") == "cpu" else "seconds"
    markers = dict(zip(METHODS, "xs*v^Do", strict=True))
    for axes, bits in zip(figure.subplots(1, len(widths), squeeze=False)[0], widths, strict=True):
        for row in (row for row in rows if row["bits"] == bits):
            color = f"C{list(METHODS).index(row['method'])}"
            axes.plot(row["seconds"], row["error"], markers[row["method"]], color=color, label=row["method"])
            axes.annotate(
                f"{row['top1']:.1f} %",
                (row["seconds"], row["error"]),
                xytext=(0, 6),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
        axes.set(xscale="log", yscale="log", title=f"{bits} bits", xlabel=unit)
        axes.margins(0.15)
    figure.axes[0].set_ylabel("output error over its variance, unseen images")
    handles = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    names = [name for name in METHODS if name in handles]
    figure.legend([handles[name] for name in names], names, loc="outside lower center", ncols=len(names), fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run what is missing, print the table, draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network", choices=["resnet20", "mobilenet", "vit"])
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--results", type=Path, default=Path("frontier.jsonl"))
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [json.loads(line) for line in options.results.read_text().splitlines()] if options.results.exists() else []
    given = {"network": options.network, "images": options.images, "device": options.device}
    rows = [row for row in rows if given.items() <= {"device": "cpu", **row}.items()]
    done = {(row["bits"], row["method"]) for row in rows}
    for method in options.methods:
        for bits in options.bits:
            if (bits, method) not in done:
                rows.append(measure(options.network, bits, method, options.images, options.device))
                with options.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    order = list(METHODS)
    rows.sort(key=lambda row: (-row["bits"], order.index(row["method"])))
    unit = "CPU s" if options.device == "cpu" else "s"
    print(f"| weights | method | output error | top-1 % | loss | {unit} |\n|---|---|---|---|---|---|")
    for row in rows:
        cells = (f"{row['error']:.4f}", f"{row['top1']:.2f}", f"{row['loss']:.2f}", f"{row['seconds']:.0f}")
        print(f"| W{row['bits']} | {row['method']} | {' | '.join(cells)} |")
    if options.figure is not None:
        draw(rows, options.figure)


if __name__ == "__main__":
    main()
