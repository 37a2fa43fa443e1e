"""AIMET: AdaRound, and scales searched layer by layer (SeqMSE).

https://quic.github.io/aimet-pages/releases/latest/techniques/adaround.html
"""

from __future__ import annotations

# AIMET imports torchvision
from integration_tests.benchmarks import torchvision_cpu  # noqa: F401

# isort: split
from tempfile import TemporaryDirectory
from typing import Any

from aimet_torch.adaround.adaround_weight import Adaround, AdaroundParameters
from aimet_torch.common.defs import QuantScheme
from aimet_torch.common.quantsim_config.utils import get_path_for_per_channel_config
from aimet_torch.model_preparer import prepare_model
from aimet_torch.quantsim import QuantizationSimModel
from aimet_torch.seq_mse import apply_seq_mse
from torch import nn

from integration_tests.benchmarks.peers.exchange import Job, Weights, layers, serve

__all__ = ["quantize"]


def _simulated(job: Job, network: nn.Module, samples: list[Any]) -> QuantizationSimModel:
    """Weights per channel, by the scheme that `apply_adaround` has by default."""
    return QuantizationSimModel(
        network,
        dummy_input=samples[0],
        quant_scheme=QuantScheme.post_training_tf_enhanced,
        default_param_bw=job.bits,
        config_file=get_path_for_per_channel_config(),
    )


def _quantized(simulated: QuantizationSimModel) -> Weights:
    """Each layer's weight as the simulation computes with it."""
    made: Weights = {}
    for name, module in layers(simulated.model):
        quantizers: Any = module.param_quantizers
        made[name] = quantizers["weight"](module.weight), module.bias
    return made


def _adaround(job: Job, network: nn.Module, samples: list[Any]) -> Weights:
    """`apply_adaround` with the number of iterations that it has by default, its scales frozen in a simulation."""
    parameters = AdaroundParameters(
        samples,
        num_batches=len(samples),
        default_num_iterations=job.options.get("iterations"),
        forward_fn=lambda model, batch: model(batch),
    )
    with TemporaryDirectory() as folder:
        rounded = Adaround.apply_adaround(
            network,
            samples[0],
            parameters,
            path=folder,
            filename_prefix="adaround",
            default_param_bw=job.bits,
            default_config_file=get_path_for_per_channel_config(),
        )
        simulated = _simulated(job, rounded, samples)
        simulated.set_and_freeze_param_encodings(encoding_path=f"{folder}/adaround.encodings")
    return _quantized(simulated)


def _seq_mse(job: Job, network: nn.Module, samples: list[Any]) -> Weights:
    """`apply_seq_mse`: each layer's scales among 20 candidates, weights to the nearest."""
    simulated = _simulated(job, network, samples)
    apply_seq_mse(simulated, samples, forward_fn=lambda model, batch: model(batch))
    return _quantized(simulated)


def quantize(job: Job, network: nn.Module, samples: list[Any]) -> Weights:
    """AIMET's flow for weights alone: what is functional becomes modules first."""
    prepared = prepare_model(network)
    methods = {"adaround": _adaround, "seq_mse": _seq_mse}
    return methods[job.options["method"]](job, prepared, samples)


if __name__ == "__main__":
    serve(quantize, "aimet-torch")
