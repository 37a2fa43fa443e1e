"""Mixed bits against uniform bits at equal size, both learned with `adaround`: divergence and score on test data.

Ways to share out the same number of bits among the weights (scales, one for each channel, are the same):

- `suggested`: `suggest_bits` of `analyze`, by the losses of learned roundings;
- `suggested, nearest`: the same by its losses of nearest;
- `alone`: without derivatives: each layer is rounded to nearest alone, and the error of the network's output is
  measured; the same knapsack takes these errors;
- `uniform`: as many bits everywhere. Of a half bit more, the layers with the fewest weights have one more, as many as
  fit;
- `MCT`: on networks of images, by the search of Sony's Model Compression Toolkit for mixed precision, with its
  defaults, in the bytes that the other ways have; where its environment is named (`peers.run install --peers mct`).
  Only its bits are taken.

All are learned by the same `adaround`. `expected` is the sum of the losses of learned roundings that `analyze` gives,
`found` the `output_error` of the report: on held-out images, with all layers learned.

`ends` is the budget of 2 bits everywhere but in the first and the last layer, which have 8, as in the papers on BRECQ
and QDrop; that is its `uniform`.

    python -m integration_tests.benchmarks.bits resnet20 mobilenet vit --environments peers-environments
    python -m integration_tests.benchmarks.bits crepe minilm --budgets 2.5
    python -m integration_tests.benchmarks.bits recognizer --budgets 2.5 --without-alone
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from adaround_plugin import Analysis, adaround, analyze, get_report, suggest_bits
from adaround_plugin.guidance.record import LayerAnalysis, Width
from adaround_plugin.hosts.open import open_host
from integration_tests.benchmarks.bits_prediction import BITS, Measured, known
from integration_tests.benchmarks.bits_subjects import SUBJECTS, Subject
from integration_tests.benchmarks.peers.exchange import Job
from integration_tests.benchmarks.peers.run import allocate


def measured_alone(analysis: Analysis, subject: Subject) -> Analysis:
    """The analysis with the measured errors of layers that are rounded to nearest alone in place of its losses."""
    host = open_host(subject.prepare({}))
    measured = Measured(host, subject.few)
    nodes = {node.name: node for node in host.nodes}
    of_layer = known(host, subject.batches)

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


def shares(
    analysis: Analysis, alone: Analysis | None, average: float, plain: dict[str, int]
) -> dict[str, dict[str, int]]:
    """By name of the way, the bits of each layer, with at most an average; `plain` is the uniform way."""
    ways = {
        "suggested": suggest_bits(analysis, average_bits=average).bits,
        "suggested, nearest": suggest_bits(analysis, average_bits=average, rounding="nearest").bits,
        "alone": {} if alone is None else suggest_bits(alone, average_bits=average).bits,
        "uniform": plain,
    }
    return {way: dict(bits) for way, bits in ways.items() if bits}


def searched(job: Job, analysis: Analysis, average: float, environments: Path) -> tuple[dict[str, int], float]:
    """MCT's bits for the same bytes, in the order of the layers, and its CPU seconds."""
    total = sum(layer.weights for layer in analysis.layers)
    options = {"widths": BITS, "bytes": average * total / 8}
    bits, seconds = allocate(replace(job, options=options), environments)
    return {layer.name: bits[layer.name] for layer in analysis.layers}, seconds


def rows(subject: Subject, analysis: Analysis, ways: dict[str, dict[str, int]]) -> Iterator[list[str]]:
    """Table rows: way, bits a weight, expected and found output error, divergence, score, bits by layer."""
    # ways may come to the same bits
    known: dict[tuple[int, ...], list[str]] = {}
    for way, bits in ways.items():
        key = tuple(bits.values())
        if key not in known:
            learned = adaround(subject.prepare(bits), subject.batches, progress=False)
            expected = sum(layer.at(bits[layer.name]).learned_loss for layer in analysis.layers)
            errors = [f"{expected:.3g}", f"{get_report(learned).output_error:.3g}"]
            divergence, score = subject.judge(learned)
            known[key] = [f"{average_of(analysis, bits):.3f}", *errors, f"{divergence:.5f}", f"{score:.2f}"]
        yield [way, *known[key], "".join(map(str, key))]


def main() -> None:
    """Run and print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="+", choices=[*SUBJECTS])
    parser.add_argument("--budgets", nargs="+", default=["ends", "2.5", "3", "4"], help="average bits, or ends")
    parser.add_argument("--environments", type=Path, help="of the peers, for MCT's way on networks of images")
    parser.add_argument("--without-alone", action="store_true", help="measure no layers alone, which takes longest")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.networks:
        subject = SUBJECTS[name]()
        start = time.process_time()
        analysis = analyze(subject.prepare({}), subject.batches, bits=BITS, progress=False)
        middle = time.process_time()
        alone = None if options.without_alone else measured_alone(analysis, subject)
        end = time.process_time()
        measuring = "" if alone is None else f", {end - middle:.1f} to measure layers alone"
        print(f"\n{name}: {middle - start:.1f} s of CPU time to analyze{measuring}\n")
        columns = ("budget", "way", "bits a weight", "expected", "found", subject.divergence, subject.score)
        print(f"| {' | '.join([*columns, 'bits by layer'])} |\n|{'---|' * (len(columns) + 1)}", flush=True)
        searches = []
        for budget in options.budgets:
            plain = ends(analysis) if budget == "ends" else uniform(analysis, float(budget))
            # the same number of bits for all
            average = average_of(analysis, plain)
            ways = shares(analysis, alone, average, plain)
            if options.environments is not None and subject.samples is not None:
                job = Job("mct", "bits", name, max(BITS), subject.samples)
                ways["MCT"], seconds = searched(job, analysis, average, options.environments)
                searches.append(f"{seconds:.1f}")
            for row in rows(subject, analysis, ways):
                print(f"| {' | '.join([budget, *row])} |", flush=True)
        if searches:
            print(f"\nCPU seconds of MCT's searches: {', '.join(searches)}", flush=True)


if __name__ == "__main__":
    main()
