"""The method "paper" beside an independent implementation of equations 21 to 25, on a network of this repository.

Per tensor, weight-only, one calibration set, several seeds of the minibatches.

    python -m integration_tests.benchmarks.paper_preset resnet20 --bits 3
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.ao.quantization.quantize_fx import convert_to_reference_fx, prepare_fx
from torch.fx.experimental.optimization import fuse

from adaround_plugin import Paper, adaround, get_adaround_qconfig_mapping, get_weight_only_backend_config
from integration_tests.benchmarks import glyphs, networks
from integration_tests.benchmarks.accuracy import TEST_IMAGES, TEST_SEED, accuracy
from integration_tests.independent_adaround import adaround_as_published, nearest

__all__ = ["by_hand", "by_preset", "rounded_to_nearest"]


def by_preset(
    model: nn.Module, bits: int, batches: Sequence[Tensor], iterations: int, learning_rate: float, seeds: Sequence[int]
) -> list[nn.Module]:
    """Converted models, learned by the method "paper", one for each seed."""
    backend = get_weight_only_backend_config()
    mapping = get_adaround_qconfig_mapping("x86", bits, activation_bits=None, per_channel=False, symmetric=True)
    prepared = prepare_fx(model, mapping, (batches[0],), backend_config=backend)
    with torch.no_grad():
        for batch in batches:
            prepared(batch)
    method = Paper(iterations=iterations, learning_rate=learning_rate)
    learned = [adaround(prepared, batches, method, seed=seed, progress=False) for seed in seeds]
    return [convert_to_reference_fx(one, backend_config=backend) for one in learned]


def by_hand(
    model: nn.Module,
    bits: int,
    images: Tensor,
    iterations: int,
    learning_rate: float,
    seeds: Sequence[int],
    **options: Any,
) -> list[nn.Module]:
    """Models rounded by the independent implementation, one for each seed; `options` are its own."""
    folded: Any = fuse(model)
    relu = _followed_by_relu(folded)
    return [
        adaround_as_published(folded, bits, images, relu.__contains__, iterations, learning_rate, seed, **options)
        for seed in seeds
    ]


def rounded_to_nearest(model: nn.Module, bits: int) -> nn.Module:
    """The independent implementation's round-to-nearest."""
    return nearest(fuse(model), bits)


def _followed_by_relu(folded: fx.GraphModule) -> set[str]:
    """Names of the modules whose output enters a ReLU and nothing else."""
    modules = dict(folded.named_modules())
    return {
        str(node.target)
        for node in folded.graph.nodes
        if node.op == "call_module"
        and len(node.users) == 1
        and isinstance(modules.get(str(next(iter(node.users)).target)), nn.ReLU)
    }


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=["resnet20"])
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--images", type=int, default=256, help="to calibrate")
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    network = networks.load(options.network)
    test = glyphs.load("test", TEST_IMAGES, seed=TEST_SEED)
    images = glyphs.load("train", 1024, seed=1)[0][: options.images]
    how = options.iterations, options.learning_rate, range(options.seeds)
    print("| method | top-1 % by seed | mean | deviation | CPU s |\n|---|---|---|---|---|")
    rows: dict[str, Callable[[], list[nn.Module]]] = {
        "float": lambda: [network],
        "nearest": lambda: [rounded_to_nearest(network, options.bits)],
        "paper": lambda: by_preset(network, options.bits, list(torch.split(images, 64)), *how),
        "independent, its lambda relative": lambda: by_hand(network, options.bits, images, *how, relative=True),
        "independent": lambda: by_hand(network, options.bits, images, *how),
    }
    for name, models in rows.items():
        start = time.process_time()
        found = models()
        seconds = time.process_time() - start
        scores = [accuracy(model, *test) for model in found]
        deviation = f"{statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
        shown = ", ".join(f"{score:.2f}" for score in scores)
        print(f"| {name} | {shown} | {statistics.mean(scores):.2f} | {deviation} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
