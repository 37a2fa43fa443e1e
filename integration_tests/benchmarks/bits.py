"""Mixed bits against uniform bits at equal size, both learned with `adaround`: divergence and top-1 on test images.

Ways to share out the same number of bits among the weights (scales, one for each channel, are the same):

- `suggested`: `suggest_bits` of `analyze`, by the losses of learned roundings;
- `suggested, nearest`: the same by its losses of nearest;
- `alone`: without derivatives: each layer is rounded to nearest alone, and the error of the network's output is
  measured; the same knapsack takes these errors;
- `uniform`: as many bits everywhere. Of a half bit more, the layers with the fewest weights have one more, as many as
  fit;
- `MCT`: by the search of Sony's Model Compression Toolkit for mixed precision, with its defaults, in the bytes that the
  other ways have; where its environment is named (`peers.run install --peers mct`). Only its bits are taken.

All are learned by the same `adaround`. `expected` is the sum of the losses of learned roundings that `analyze` gives,
`found` the `output_error` of the report: on held-out images, with all layers learned.

`ends` is the budget of 2 bits everywhere but in the first and the last layer, which have 8, as in the papers on BRECQ
and QDrop; that is its `uniform`.

    python -m integration_tests.benchmarks.bits resnet20 mobilenet vit --environments peers-environments
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaround_plugin import Analysis, adaround, analyze, get_report, suggest_bits
from adaround_plugin.guidance.record import LayerAnalysis, Width
from adaround_plugin.hosts.open import open_host
from integration_tests.benchmarks import glyphs, networks
from integration_tests.benchmarks.accuracy import TEST_IMAGES, TEST_SEED, Case
from integration_tests.benchmarks.bits_prediction import BITS, Measured, known
from integration_tests.benchmarks.peers.exchange import Job
from integration_tests.benchmarks.peers.run import allocate

IMAGES = 1024
# images that layers are measured on alone
_MEASURED = 256
# images that run at once: values of more leave the processor's caches
_AT_ONCE = 100


@dataclass(frozen=True)
class Test:
    """Test images `(n, ...)`, their labels, and the float network's log shares `(n, classes)`."""

    images: Tensor
    labels: Tensor
    exact: Tensor

    def judged(self, network: nn.Module) -> list[str]:
        """Divergence and top-1 of another network, as the table has them."""
        found = log_shares(network, self.images)
        apart = float(F.kl_div(found, self.exact, log_target=True, reduction="batchmean"))
        right = int((found.argmax(1) == self.labels).sum())
        return [f"{apart:.5f}", f"{100 * right / len(self.labels):.2f}"]


def measured_alone(analysis: Analysis, case: Case, batches: list[Tensor]) -> Analysis:
    """The analysis with the measured errors of layers that are rounded to nearest alone in place of its losses."""
    host = open_host(case.prepare(batches))
    measured = Measured(host, list(torch.split(torch.cat(batches)[:_MEASURED], _MEASURED // 2)))
    nodes = {node.name: node for node in host.nodes}
    of_layer = known(host, batches)

    def at(layer: LayerAnalysis, width: Width) -> Width:
        loss = measured.error({nodes[layer.name]: of_layer[layer.name].roundings[width.bits][0]})
        return replace(width, nearest_loss=loss, learned_loss=loss)

    layers = [replace(layer, widths=tuple(at(layer, width) for width in layer.widths)) for layer in analysis.layers]
    return replace(analysis, layers=layers)


def uniform(analysis: Analysis, average: float) -> dict[str, int]:
    """As many bits everywhere, and one more in the smallest layers as long as the average allows."""
    least, layers = int(average), analysis.layers
    total = sum(layer.weights for layer in layers)
    left = (average - least) * total
    found = {layer.name: least for layer in layers}
    for layer in sorted(layers, key=lambda one: one.weights):
        if layer.weights <= left:
            found[layer.name] = least + 1
            left -= layer.weights
    return found


def ends(analysis: Analysis) -> dict[str, int]:
    """2 bits, and 8 in the first and the last layer."""
    names = [layer.name for layer in analysis.layers]
    return {name: 8 if name in (names[0], names[-1]) else 2 for name in names}


def average_of(analysis: Analysis, bits: dict[str, int]) -> float:
    """Bits of a weight on the mean."""
    return mean_of([layer.weights for layer in analysis.layers], [bits[layer.name] for layer in analysis.layers])


def mean_of(weights: list[int], values: list[int]) -> float:
    """The weighted mean."""
    return sum(one * value for one, value in zip(weights, values, strict=True)) / sum(weights)


def shares(analysis: Analysis, alone: Analysis, average: float, plain: dict[str, int]) -> dict[str, dict[str, int]]:
    """By name of the way, the bits of each layer, with at most an average; `plain` is the uniform way."""
    return {
        "suggested": dict(suggest_bits(analysis, average_bits=average).bits),
        "suggested, nearest": dict(suggest_bits(analysis, average_bits=average, rounding="nearest").bits),
        "alone": dict(suggest_bits(alone, average_bits=average).bits),
        "uniform": plain,
    }


def searched(network: str, analysis: Analysis, average: float, environments: Path) -> tuple[dict[str, int], float]:
    """MCT's bits for the same bytes, in the order of the layers, and its CPU seconds."""
    total = sum(layer.weights for layer in analysis.layers)
    options = {"widths": BITS, "bytes": average * total / 8}
    bits, seconds = allocate(Job("mct", "bits", network, max(BITS), IMAGES, options=options), environments)
    return {layer.name: bits[layer.name] for layer in analysis.layers}, seconds


@torch.no_grad()
def log_shares(network: nn.Module, images: Tensor) -> Tensor:
    """Logarithms of the shares of classes: (n, classes)."""
    return torch.cat([network(batch).log_softmax(1) for batch in torch.split(images, _AT_ONCE)])


def rows(
    case: Case, analysis: Analysis, ways: dict[str, dict[str, int]], batches: list[Tensor], test: Test
) -> Iterator[list[str]]:
    """Table rows: way, bits a weight, expected and found output error, divergence, top-1, bits by layer."""
    # ways may come to the same bits
    known: dict[tuple[int, ...], list[str]] = {}
    for way, bits in ways.items():
        key = tuple(bits.values())
        if key not in known:
            mixed = replace(case, layers=bits)
            learned = adaround(mixed.prepare(batches), batches, progress=False)
            expected = sum(layer.at(bits[layer.name]).learned_loss for layer in analysis.layers)
            errors = [f"{expected:.3g}", f"{get_report(learned).output_error:.3g}"]
            known[key] = [f"{average_of(analysis, bits):.3f}", *errors, *test.judged(mixed.convert(learned))]
        yield [way, *known[key], "".join(map(str, key))]


def main() -> None:
    """Run and print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="+", choices=["resnet20", "mobilenet", "vit"])
    parser.add_argument("--budgets", nargs="+", default=["ends", "2.5", "3", "4"], help="average bits, or ends")
    parser.add_argument("--test-seeds", type=int, nargs="+", default=[TEST_SEED], help="10,000 images of each")
    parser.add_argument("--environments", type=Path, help="of the peers, for MCT's way")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tests = [glyphs.load("test", TEST_IMAGES, seed=seed) for seed in options.test_seeds]
    images, labels = (torch.cat(parts) for parts in zip(*tests, strict=True))
    calibration, _ = glyphs.load("train", IMAGES, seed=1)
    batches = list(torch.split(calibration, 64))
    for name in options.networks:
        case = Case(networks.load(name), 4, None)
        test = Test(images, labels, log_shares(case.network, images))
        start = time.process_time()
        analysis = analyze(case.prepare(batches), batches, bits=BITS, progress=False)
        middle = time.process_time()
        alone = measured_alone(analysis, case, batches)
        end = time.process_time()
        print(f"\n{name}: {middle - start:.1f} s of CPU time to analyze, {end - middle:.1f} to measure layers alone\n")
        head = ["budget", "way", "bits a weight", "expected", "found", "divergence", "top-1 %", "bits by layer"]
        print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
        searches = []
        for budget in options.budgets:
            plain = ends(analysis) if budget == "ends" else uniform(analysis, float(budget))
            # the same number of bits for all
            average = average_of(analysis, plain)
            ways = shares(analysis, alone, average, plain)
            if options.environments is not None:
                ways["MCT"], seconds = searched(name, analysis, average, options.environments)
                searches.append(f"{seconds:.1f}")
            for row in rows(case, analysis, ways, batches, test):
                print(f"| {' | '.join([budget, *row])} |", flush=True)
        if searches:
            print(f"\nCPU seconds of MCT's searches: {', '.join(searches)}", flush=True)


if __name__ == "__main__":
    main()
