"""This package as a configuration of Neural Compressor, beside its own."""

from __future__ import annotations

# transformers imports torchvision where it finds one
from integration_tests.benchmarks import torchvision_cpu  # noqa: F401

# isort: split
from typing import Any

from torch import nn

from adaround_plugin.inc import AdaRoundConfig
from integration_tests.benchmarks.peers.exchange import Job, Weights, layers, serve
from integration_tests.benchmarks.peers.inc import by_config
from integration_tests.benchmarks.quiet import quiet

__all__ = ["quantize"]


def quantize(job: Job, network: nn.Module, samples: list[Any]) -> Weights:
    """Symmetric, as Neural Compressor's own are here."""
    names = [name for name, _ in layers(network)]
    group = -1 if job.group is None else job.group
    config = AdaRoundConfig(bits=job.bits, group_size=group, act_dtype="fp32", white_list=names, **job.options)
    with quiet():
        return by_config(network, config, samples)


if __name__ == "__main__":
    serve(quantize, "adaround_plugin", has_groups=True)
