"""Recipes for the layers of the small language model, at a few bits, judged on training text that nothing learns from.

Weights are symmetric, in groups of 32; the head stays in float. The divergence is the mean Kullback-Leibler divergence
of the next token from the float model's, in nats.

    python -m integration_tests.benchmarks.decoder_recipes --sequences 128 64 --bits 2
"""

from __future__ import annotations

# transformers imports torchvision where it finds one
from integration_tests.benchmarks import torchvision_cpu  # noqa: F401

# isort: split
import argparse
import copy
import time
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

from adaround_plugin import LayerWise, adaround, get_report
from adaround_plugin.deployment.torchao_tensors import to_torchao
from adaround_plugin.hosts.pt2e import AdaRoundWeightOnlyQuantizer
from integration_tests.benchmarks import decoder
from integration_tests.benchmarks.floor import table
from integration_tests.benchmarks.quiet import quiet

__all__ = ["RECIPES", "measure"]

_FISHER: Final[Mapping[str, Any]] = {"propagate_error": True, "correct_bias": True, "column_weighting": "fisher"}
RECIPES: Final[Mapping[str, Any]] = {
    "default": "default",
    "fisher, damping 0.1": LayerWise(**_FISHER, output_hessian=False, damping=0.1),
    "fisher, damping 0.01": LayerWise(**_FISHER, output_hessian=False, damping=0.01),
    "fisher, output hessian, damping 0.1": LayerWise(**_FISHER, output_hessian=True, damping=0.1),
    "fisher, output hessian, damping 0.01": LayerWise(**_FISHER, output_hessian=True, damping=0.01),
}
# of the text that is learned from, drawn by another seed than what calibrates
_JUDGED, _SEED = 96, 7


def _divergence(model: nn.Module, data: list[Tensor], exact: list[Tensor]) -> float:
    total = positions = 0.0
    for (found, _), of_float in zip(decoder.log_shares(model, data), exact, strict=True):
        total += float((of_float.exp() * (of_float - found)).sum())
        positions += of_float[..., 0].numel()
    return total / positions


def measure(model: nn.Module, sequences: int, bits: int, method: Any) -> tuple[nn.Module, str, float]:
    """The learned model, the recipe that it was learned by, and CPU seconds."""
    samples = [{"input_ids": sequence} for sequence in decoder.sequences("train", sequences)]
    network = decoder.Logits(copy.deepcopy(model))
    sizes: dict[str, Any] = {"weight_bits": bits, "symmetric": True, "group_size": 32}
    quantizer = AdaRoundWeightOnlyQuantizer({"model.lm_head": None}, linear_only=True, **sizes)
    with quiet():
        prepared = prepare_pt2e(decoder.export(network, samples[0]), quantizer)
        with torch.no_grad():
            prepared(**samples[0])
        start = time.process_time()
        learned = adaround(prepared, samples, method, progress=False)
        seconds = time.process_time() - start
        made: Any = to_torchao(network, learned)
    return made.model, get_report(learned).recipe, seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, nargs="+", default=[128])
    parser.add_argument("--bits", type=int, nargs="+", default=[2])
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    options = parser.parse_args()
    model, data = decoder.load(), decoder.sequences("train", _JUDGED, _SEED)
    exact = [shares for shares, _ in decoder.log_shares(model, data)]

    def row(sequences: int, bits: int, name: str) -> list[str]:
        made, recipe, seconds = measure(model, sequences, bits, RECIPES[name])
        found = _divergence(made, data, exact)
        return [str(sequences), f"W{bits}", name, f"{found:.4f}", f"{seconds:.0f}", recipe]

    cases = ((count, bits, name) for count in options.sequences for bits in options.bits for name in options.recipes)
    table(("sequences", "weights", "setting", "divergence", "CPU s", "recipe"), (row(*case) for case in cases))


if __name__ == "__main__":
    main()
