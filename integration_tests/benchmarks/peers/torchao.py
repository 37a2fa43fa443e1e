"""torchao's tensors of few bits: round-to-nearest, or scales by half-quadratic quantization.

https://docs.pytorch.org/ao/stable/generated/torchao.quantization.IntxWeightOnlyConfig.html
"""

from __future__ import annotations

# transformers imports torchvision where it finds one
from integration_tests.benchmarks import torchvision_cpu  # noqa: F401

# isort: split
from typing import Any

import torch
from torch import nn
from torchao.quantization import IntxWeightOnlyConfig, PerAxis, PerGroup, quantize_

from integration_tests.benchmarks.peers.exchange import Job, Weights, layers, serve, weights_of

__all__ = ["quantize"]


def quantize(job: Job, network: nn.Module, samples: list[Any]) -> Weights:
    """Symmetric, without data; the algorithm of the scales as by default unless the job has another."""
    granularity = PerAxis(0) if job.group is None else PerGroup(job.group)
    options = {f"intx_choose_qparams_{name}": value for name, value in job.options.items()}
    config = IntxWeightOnlyConfig(getattr(torch, f"int{job.bits}"), granularity, **options)
    names = {name for name, _ in layers(network)}
    quantize_(network, config, lambda _, name: name in names)
    return {name: (weight.dequantize(), bias) for name, (weight, bias) in weights_of(network).items()}


if __name__ == "__main__":
    serve(quantize, "torchao", has_groups=True)
