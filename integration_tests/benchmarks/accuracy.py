"""Top-1 of the glyph networks at few bits: nearest, coordinate descent and annealing, by number of images.

Every figure is of the model the host converted: `convert_to_reference_fx` with float activations (weight-only), and
with 8-bit activations of the x86 backend (W/A8). All layers are quantized, first and last included, per channel.

    python -m integration_tests.benchmarks.accuracy resnet20 mobilenet vit
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.ao.quantization.quantize_fx import convert_to_reference_fx, prepare_fx

from adaround_plugin import adaround, get_adaround_qconfig_mapping, get_report, get_weight_only_backend_config
from integration_tests.benchmarks import glyphs, networks

TEST_IMAGES = 10_000
# no choice in the making of the method has seen the images of this seed
TEST_SEED = 1
IMAGES = (1024, 256, 64)


def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Top-1 in percent."""
    batches = zip(torch.split(images, 500), torch.split(labels, 500), strict=True)
    with torch.no_grad():
        right = sum(int((network(x).argmax(1) == y).sum()) for x, y in batches)
    return 100 * right / len(labels)


def prepare(network: nn.Module, bits: int, weight_only: bool, batches: list[Tensor], affine: bool) -> fx.GraphModule:
    """Prepare and calibrate."""
    backend = get_weight_only_backend_config() if weight_only else None
    mapping = get_adaround_qconfig_mapping(
        "x86", weight_bits=bits, activation_bits=None if weight_only else 8, symmetric=not affine
    )
    prepared = prepare_fx(network, mapping, (batches[0],), backend_config=backend)
    with torch.no_grad():
        for batch in batches:
            prepared(batch)
    return prepared


@dataclass(frozen=True)
class Case:
    """A network with its float accuracy, and how its weights are quantized."""

    network: nn.Module
    exact: float
    bits: int
    weight_only: bool
    affine: bool
    max_columns: int


def rows(case: Case, solvers: list[str], counts: list[int]) -> Iterator[list[str]]:
    """Table rows: mode, solver, images, top-1, loss against float, CPU seconds of `adaround`, recipe."""
    images, labels = glyphs.load("test", TEST_IMAGES, seed=TEST_SEED)
    calibration, _ = glyphs.load("train", IMAGES[0], seed=1)
    for solver in solvers:
        for count in counts if solver == "annealing" else counts[:1]:
            batches = list(torch.split(calibration[:count], 64))
            prepared = prepare(case.network, case.bits, case.weight_only, batches, case.affine)
            start = time.process_time()
            learned = adaround(prepared, batches, solver=solver, max_columns=case.max_columns, progress=False)
            seconds = time.process_time() - start
            recipe = get_report(learned).recipe
            backend = get_weight_only_backend_config() if case.weight_only else None
            score = accuracy(convert_to_reference_fx(learned, backend_config=backend), images, labels)
            mode = f"W{case.bits}" + ("" if case.weight_only else "A8") + (" affine" if case.affine else "")
            yield [mode, solver, str(count), f"{score:.2f}", f"{case.exact - score:.2f}", f"{seconds:.0f}", recipe]


def main() -> None:
    """Run and print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="+", choices=["resnet20", "mobilenet", "vit"])
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--solvers", nargs="+", default=["nearest", "coordinate_descent", "annealing"])
    parser.add_argument(
        "--modes", nargs="+", choices=["weight-only", "activations"], default=["weight-only", "activations"]
    )
    parser.add_argument("--affine", action="store_true", help="affine weights, zero point searched with the scale")
    parser.add_argument("--images", type=int, nargs="+", default=IMAGES, help="calibration images, at most 1024")
    parser.add_argument("--max-columns", type=int, default=16384)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    images, labels = glyphs.load("test", TEST_IMAGES, seed=TEST_SEED)
    for name in options.networks:
        network = networks.load(name)
        exact = accuracy(network, images, labels)
        print(f"\n{name}: float {exact:.2f} on {TEST_IMAGES} test images\n")
        head = ["weights", "solver", "images", "top-1 %", "loss", "CPU s", "recipe"]
        print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
        for mode in options.modes:
            for bits in options.bits:
                case = Case(network, exact, bits, mode == "weight-only", options.affine, options.max_columns)
                for row in rows(case, options.solvers, options.images):
                    print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
