"""Intel Neural Compressor: GPTQ of a transformer's linear layers.

https://intel.github.io/neural-compressor/latest/docs/source/3x/PT_WeightOnlyQuant.html
"""

from __future__ import annotations

# transformers imports torchvision where it finds one
from integration_tests.benchmarks import torchvision_cpu  # noqa: F401

# isort: split
from typing import Any

import torch
from neural_compressor.torch.quantization import GPTQConfig, convert, prepare
from torch import nn

from integration_tests.benchmarks.peers.exchange import Job, Weights, layers, serve, weights_of

__all__ = ["quantize"]


def quantize(job: Job, network: nn.Module, samples: list[Any]) -> Weights:
    """GPTQ per channel and symmetric, everything else as by default."""
    made = weights_of(network)
    names = [name for name, _ in layers(network)]
    config = GPTQConfig(bits=job.bits, use_sym=True, group_size=-1)
    prepared = prepare(network, config)
    with torch.no_grad():
        for sample in samples:
            prepared(**sample)
    packed = convert(prepared)
    for name in names:
        made[name] = packed.get_submodule(name).recover(), made[name][1]
    return made


if __name__ == "__main__":
    serve(quantize, "neural-compressor")
