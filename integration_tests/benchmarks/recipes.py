"""What trials predict of each recipe, beside what a run with it leaves: errors relative to those of the first recipe.

Weights only, affine, per channel, every layer, 1,024 images. Predictions are those in the report of the default call;
runs have the recipe set. The divergence of the predictions is on 10,000 test images.

    python -m integration_tests.benchmarks.recipes resnet20 mobilenet vit --bits 2
"""

import argparse
from collections.abc import Iterator

import torch

from adaround_plugin import LayerWise, adaround, get_report
from integration_tests.benchmarks import glyphs, networks
from integration_tests.benchmarks.accuracy import IMAGES, TEST_IMAGES, TEST_SEED, Case, divergence

# seeds of the images to calibrate with; no table of another benchmark is of the later ones
SEEDS = (1, 5)


def rows(name: str, bits: int, seeds: list[int], test: torch.Tensor) -> Iterator[list[str]]:
    """Table rows: network, bits, seed, recipe, what is predicted, what a run leaves, its divergence."""
    network = networks.load(name)
    case = Case(network, bits, activation_bits=None, affine=True)
    for seed in seeds:
        batches = list(torch.split(glyphs.load("train", IMAGES[0], seed=seed)[0], 64))
        prepared = case.prepare(batches)
        trials = get_report(adaround(prepared, batches, progress=False)).trials
        first: tuple[float, float, float] | None = None
        for recipe, trial in zip(LayerWise().recipes(), trials, strict=True):
            assert trial.recipe == str(recipe)
            if trial.output_error is None:
                # it was not tried
                continue
            learned = adaround(prepared, batches, LayerWise().with_recipe(recipe), progress=False)
            error = get_report(learned).output_error
            assert error is not None
            found = trial.output_error, error, divergence(network, case.convert(learned), test)
            first = first or found
            relative = [f"{one:.4f} ({one / of_first - 1:+.0%})" for one, of_first in zip(found, first, strict=True)]
            yield [name, f"W{bits}", str(seed), f'`"{recipe.column_weighting}"`', *relative]


def main() -> None:
    """Run and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+", choices=list(networks.BUILDERS))
    parser.add_argument("--bits", type=int, nargs="+", default=[2])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="of the images to calibrate with")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    test, _ = glyphs.load("test", TEST_IMAGES, seed=TEST_SEED)
    head = ["network", "weights", "seed", "column weighting", "predicted", "error of the run", "divergence"]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
    for name in options.networks:
        for bits in options.bits:
            for row in rows(name, bits, options.seeds, test):
                print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
