"""Intel Neural Compressor: round-to-nearest and GPTQ of a transformer's linear layers.

https://intel.github.io/neural-compressor/latest/docs/source/3x/PT_WeightOnlyQuant.html
"""

from __future__ import annotations

# transformers imports torchvision where it finds one
from integration_tests.benchmarks import torchvision_cpu  # noqa: F401

# isort: split
from typing import Any

import torch
from neural_compressor.torch.quantization import GPTQConfig, RTNConfig, convert, prepare
from torch import nn

from integration_tests.benchmarks.peers.exchange import Job, Weights, layers, serve

__all__ = ["by_config", "quantize"]


def _of_packed(packed: nn.Module, names: list[str]) -> Weights:
    """The weights that packed layers compute with, and their biases."""
    modules: list[Any] = [packed.get_submodule(name) for name in names]
    return {name: (module.recover(), module.bias) for name, module in zip(names, modules, strict=True)}


def by_config(network: nn.Module, config: Any, samples: list[Any]) -> Weights:
    """What a configuration of Neural Compressor makes of a network."""
    names = [name for name, _ in layers(network)]
    prepared = prepare(network, config)
    with torch.no_grad():
        for sample in samples:
            prepared(**sample)
    return _of_packed(convert(prepared), names)


def quantize(job: Job, network: nn.Module, samples: list[Any]) -> Weights:
    """Symmetric, everything else as by default."""
    group = -1 if job.group is None else job.group
    kinds = {"RTN": RTNConfig, "GPTQ": GPTQConfig}
    return by_config(network, kinds[job.options["algorithm"]](bits=job.bits, use_sym=True, group_size=group), samples)


if __name__ == "__main__":
    serve(quantize, "neural-compressor", has_groups=True)
