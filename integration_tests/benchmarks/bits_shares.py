"""What `adaround` leaves of the loss that `analyze` expects of a layer: the share that a sum of losses does not know.

One layer has few bits, all others 8. Columns: what `analyze` expects of the layer rounded to nearest, and by GPTQ; what
is found with all layers learned without errors propagated, columns weighed and rows coupled; with columns weighed and
rows coupled; and with errors propagated too, which is the default. Errors are the network's, on 4,000 test images, over
the variance of its output.

    python -m integration_tests.benchmarks.bits_shares vit patches.0:3 patches.3:3 blocks.0.attention.q:2 \
        blocks.0.attention.k:2 blocks.0.attention.v:2 head:3 --test-seed 2
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from adaround_plugin import LayerWise, adaround, analyze
from integration_tests.benchmarks import glyphs, networks
from integration_tests.benchmarks.accuracy import TEST_SEED, Case
from integration_tests.benchmarks.bits_prediction import BITS
from integration_tests.benchmarks.bits_subjects import IMAGES

__all__ = ["METHODS", "error"]

_TEST_IMAGES = 4000
_AT_ONCE = 100

METHODS = {
    "alone": LayerWise(column_weighting="none", output_hessian=False, propagate_error=False),
    "weighed and coupled": LayerWise(column_weighting="fisher", output_hessian=True, propagate_error=False),
    "default": LayerWise(column_weighting="fisher", output_hessian=True, propagate_error=True),
}


@torch.no_grad()
def error(network: nn.Module, other: nn.Module, images: Tensor) -> float:
    """Mean squared error of another network's outputs over the variance of the network's."""
    exact, found = (torch.cat([one(x) for x in torch.split(images, _AT_ONCE)]) for one in (network, other))
    return float((found - exact).square().mean() / exact.var(0, unbiased=False).mean())


def main() -> None:
    """Run and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=["resnet20", "mobilenet", "vit"])
    parser.add_argument("layers", nargs="+", metavar="NAME:BITS")
    parser.add_argument("--test-seed", type=int, default=TEST_SEED)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    network = networks.load(options.network)
    images, _ = glyphs.load("test", _TEST_IMAGES, seed=options.test_seed)
    batches = list(torch.split(glyphs.load("train", IMAGES, seed=1)[0], 64))
    analysis = analyze(Case(network, 4, None).prepare(batches), batches, bits=BITS, progress=False)
    layers = {layer.name: layer for layer in analysis.layers}
    head = ["layer", "bits", "nearest", "expected", *METHODS, "share"]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
    for one in options.layers:
        name, bits = one.rsplit(":", 1)
        case = Case(network, 8, None, layers={name: int(bits)})
        found = []
        for method in METHODS.values():
            learned = adaround(case.prepare(batches), batches, method, progress=False)
            found.append(error(network, case.convert(learned), images))
        width = layers[name].at(int(bits))
        figures = [f"{value:.2g}" for value in (width.nearest_loss, width.learned_loss, *found)]
        print(f"| {' | '.join([name, bits, *figures, f'{found[-1] / width.learned_loss:.2f}'])} |", flush=True)


if __name__ == "__main__":
    main()
