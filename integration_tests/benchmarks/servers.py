"""Learned models on servers and PCs: Inductor, ONNX Runtime, OpenVINO, beside the float network in each.

W8A8 and W4A8 through X86InductorQuantizer, on the ResNet-20-like network of the glyphs. *Integers*: whether the runtime
holds the learned ones, read from oneDNN's packed weights, from ONNX's constants, from OpenVINO's; a dash where they
cannot be read, and outputs alone tell. *Off* is the largest difference of a logit, in percent of the largest logit:
from what the converted program computes, and from the float network. *Time* is relative to the float network in torch:
the median of ratios of runs one after another. A file of a float network is that of its ONNX model or package.

    python -m integration_tests.benchmarks.servers
    python -m integration_tests.benchmarks.servers onnxruntime openvino --bits 4 --batch 1

OpenVINO is a wheel of its own: pip install openvino
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from adaround_plugin import adaround
from adaround_plugin.hosts.learned import learned_weights
from integration_tests.benchmarks import glyphs, networks
from integration_tests.benchmarks.accuracy import TEST_SEED, Case, accuracy
from integration_tests.benchmarks.quiet import quiet
from integration_tests.benchmarks.server_paths import NEEDS, RUNTIMES, Model, Run, ServerPath

__all__ = ["HEAD", "learn", "time_ratios", "walk"]

HEAD = ("path", "model", "integers", "off converted %", "off float %", "top-1 %", "time", "file KB")


def learn(network: nn.Module, bits: int, batches: list[Tensor], folder: Path) -> Model:
    """The converted program of a network with learned weights of some bits and activations of 8."""
    case = Case(network, bits, host="pt2e")
    learned = adaround(case.prepare(batches), batches, progress=False)
    expected = [integers for integers, _ in learned_weights(learned).values()]
    return Model(f"W{bits}A8", case.convert(learned), bits, expected, batches[0], folder)


def walk(models: Sequence[Model], runtimes: Sequence[str]) -> Iterator[ServerPath | str]:
    """Every path of some runtimes, or what a runtime needs to be there."""
    for runtime in runtimes:
        try:
            for model in models:
                yield from RUNTIMES[runtime](model)
        except ImportError:
            if runtime not in NEEDS:
                raise
            yield f"{runtime}: {NEEDS[runtime]}"


def time_ratios(paths: Sequence[ServerPath], base: nn.Module, batch: Tensor, rounds: int) -> list[float]:
    """Median time of a batch on each path, relative to that on `base` in the same round."""
    seconds: list[list[float]] = []
    runs: list[Run] = [base, *(path.run for path in paths)]
    with torch.no_grad():
        for _ in range(rounds):
            seconds.append([])
            for run in runs:
                run(batch)  # brings its weights into the caches
                start = time.perf_counter()
                run(batch)
                seconds[-1].append(time.perf_counter() - start)
    return [median(one[index] / one[0] for one in seconds) for index in range(1, len(paths) + 1)]


def _row(path: ServerPath, network: nn.Module, ratio: float, images: Tensor, labels: Tensor) -> str:
    example = path.model.example
    with torch.no_grad():
        found, exact, converted = path.run(example), network(example), path.model.program(example)
    off = [100 * float((found - other).abs().max() / other.abs().max()) for other in (converted, exact)]
    cells = [
        path.name,
        path.model.name,
        {None: "-", True: "yes", False: "**no**"}[path.exact],
        *(f"{one:.2f}" for one in off),
        f"{accuracy(path.run, images, labels, len(example)):.2f}",
        f"{ratio:.2f}",
        "-" if path.stored is None else f"{path.stored / 1000:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


@quiet()
def main(arguments: Sequence[str] | None = None) -> None:
    """Print a Markdown table with a row for each path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runtimes", nargs="*", metavar="runtime", help=f"of {list(RUNTIMES)}; all, if none is named")
    parser.add_argument("--network", choices=["resnet20", "mobilenet"], default="resnet20")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4], help="of the weights")
    parser.add_argument("--batch", type=int, default=16, help="images that run at once")
    parser.add_argument("--images", type=int, default=256, help="to calibrate")
    parser.add_argument("--test-images", type=int, default=1600, help="as many batches as are in them")
    parser.add_argument("--rounds", type=int, default=30, help="of timing")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    if unknown := set(options.runtimes) - RUNTIMES.keys():
        parser.error(f"{sorted(unknown)} are none of {list(RUNTIMES)}")
    torch.set_num_threads(options.threads)
    network = networks.load(options.network)
    calibration, _ = glyphs.load("train", options.images, seed=1)
    batches = list(torch.split(calibration, options.batch))
    count = options.test_images // options.batch * options.batch
    images, labels = glyphs.load("test", count, seed=TEST_SEED)
    with TemporaryDirectory() as name, torch.random.fork_rng(devices=[]):
        folder = Path(name)
        models = [Model("float", network, 32, None, batches[0], folder)]
        models += [learn(network, bits, batches, folder) for bits in options.bits]
        found = list(walk(models, options.runtimes or list(RUNTIMES)))
        paths = [one for one in found if isinstance(one, ServerPath)]
        ratios = iter(time_ratios(paths, network, batches[0], options.rounds))
        print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}", flush=True)
        for one in found:
            if isinstance(one, ServerPath):
                print(_row(one, network, next(ratios), images, labels), flush=True)
            else:
                print(f"| {one} |{' |' * (len(HEAD) - 1)}", flush=True)


if __name__ == "__main__":
    main()
