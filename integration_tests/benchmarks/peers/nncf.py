"""NNCF's compression of weights in its backend for torch, which has no GPTQ.

https://openvinotoolkit.github.io/nncf/autoapi/nncf/index.html#nncf.compress_weights
"""

from __future__ import annotations

from typing import Any

import nncf
from nncf.torch.function_hook import get_hook_storage
from torch import nn

from integration_tests.benchmarks.peers.exchange import Job, Weights, layers, serve, weights_of

__all__ = ["quantize"]

_MODES = {
    4: nncf.CompressWeightsMode.INT4_SYM,
    3: nncf.CompressWeightsMode.INT3_SYM,
    2: nncf.CompressWeightsMode.INT2_SYM,
}


def quantize(job: Job, network: nn.Module, samples: list[Any]) -> Weights:
    """`compress_weights` of all layers per channel, activation-aware and with estimated scales if the job says so."""
    compressed = nncf.compress_weights(
        network,
        mode=_MODES[job.bits],
        group_size=-1,
        all_layers=True,
        dataset=nncf.Dataset(samples),
        awq=job.options["awq"],
        scale_estimation=job.options["scale_estimation"],
    )
    made = weights_of(network)
    hooks = get_hook_storage(compressed).post_hooks
    for name, module in layers(compressed):
        # a weight is packed integers, and what unpacks it is a hook
        made[name] = hooks[f"{name.replace('.', ':')}:weight__0"]["0"](module.weight), made[name][1]
    return made


if __name__ == "__main__":
    serve(quantize, "nncf")
