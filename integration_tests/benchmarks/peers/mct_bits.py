"""Sony's Model Compression Toolkit: bits for each layer in a size, by its search for mixed precision.

https://sony.github.io/model_optimization/api/api_docs/classes/MixedPrecisionQuantizationConfig.html
"""

from __future__ import annotations

# the toolkit imports torchvision
from integration_tests.benchmarks import torchvision_cpu  # noqa: F401

# isort: split
from collections.abc import Iterator
from typing import Any

import model_compression_toolkit as mct
from torch import nn

from integration_tests.benchmarks.peers.exchange import Job, serve_bits
from integration_tests.benchmarks.peers.mct import platform, wrapped

__all__ = ["allocate"]


def allocate(job: Job, network: nn.Module, samples: list[Any]) -> dict[str, int]:
    """The toolkit's post-training quantization with its defaults for mixed precision; only its bits are taken.

    Args:
        job: its options are `widths`, in bits, and `bytes`, of all weights without scales.
        network: float.
        samples: batches.
    """

    def batches() -> Iterator[list[Any]]:
        for batch in samples:
            yield [batch]

    model, _ = mct.ptq.pytorch_post_training_quantization(
        network,
        batches,
        target_resource_utilization=mct.core.ResourceUtilization(weights_memory=job.options["bytes"]),
        core_config=mct.core.CoreConfig(mixed_precision_config=mct.core.MixedPrecisionQuantizationConfig()),
        target_platform_capabilities=platform(*job.options["widths"]),
    )
    return {name: module.weights_quantizers["weight"].num_bits for name, module in wrapped(network, model)}


if __name__ == "__main__":
    serve_bits(allocate, "model-compression-toolkit")
