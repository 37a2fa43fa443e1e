"""Sony's Model Compression Toolkit: gradient-based post-training quantization (GPTQ) of the whole network.

https://sony.github.io/model_optimization/api/api_docs/methods/pytorch_gradient_post_training_quantization.html
"""

from __future__ import annotations

# the toolkit imports torchvision
from integration_tests.benchmarks import torchvision_cpu  # noqa: F401

# isort: split
from collections.abc import Iterator
from typing import Any

import model_compression_toolkit as mct
from mct_quantizers import PytorchQuantizationWrapper, QuantizationMethod
from model_compression_toolkit.target_platform_capabilities.constants import BIAS_ATTR, KERNEL_ATTR
from model_compression_toolkit.target_platform_capabilities.schema import mct_current_schema as schema
from torch import nn

from integration_tests.benchmarks.peers.exchange import Job, Weights, layers, serve, weights_of

__all__ = ["platform", "quantize", "wrapped"]

# epochs of the tutorial example_pytorch_mobilenet_gptq
_EPOCHS = 50


def platform(*widths: int) -> schema.TargetPlatformCapabilities:
    """Symmetric weights per channel of one of some widths, activations in float.

    Otherwise as the toolkit's own platforms are described.
    """

    def weights(quantized: bool, width: int) -> schema.AttributeQuantizationConfig:
        return schema.AttributeQuantizationConfig(
            weights_quantization_method=QuantizationMethod.SYMMETRIC,
            weights_n_bits=width,
            weights_per_channel_threshold=quantized,
            enable_weights_quantization=quantized,
            lut_values_bitwidth=None,
        )

    def operator(attributes: dict[str, Any]) -> schema.OpQuantizationConfig:
        return schema.OpQuantizationConfig(
            default_weight_attr_config=weights(False, 8),
            attr_weights_configs_mapping=attributes,
            activation_quantization_method=QuantizationMethod.POWER_OF_TWO,
            activation_n_bits=8,
            supported_input_activation_n_bits=8,
            enable_activation_quantization=False,
            quantization_preserving=False,
            fixed_scale=None,
            fixed_zero_point=None,
            simd_size=32,
            signedness=schema.Signedness.AUTO,
        )

    def options(*configs: schema.OpQuantizationConfig) -> schema.QuantizationConfigOptions:
        return schema.QuantizationConfigOptions(quantization_configurations=configs, base_config=configs[-1])

    bias = weights(False, 32)
    learned = options(*(operator({KERNEL_ATTR: weights(True, one), BIAS_ATTR: bias}) for one in sorted(widths)))
    names = (schema.OperatorSetNames.CONV, schema.OperatorSetNames.FULLY_CONNECTED)
    return schema.TargetPlatformCapabilities(
        default_qco=options(operator({})),
        tpc_minor_version=1,
        tpc_patch_version=0,
        tpc_platform_type="weights",
        operator_set=tuple(schema.OperatorsSet(name=name, qc_options=learned) for name in names),
        add_metadata=False,
        name="weights",
    )


def quantize(job: Job, network: nn.Module, samples: list[Any]) -> Weights:
    """The toolkit's flow, with the epochs of its tutorial and the weights of its loss unless the job has others."""

    def batches() -> Iterator[list[Any]]:
        for batch in samples:
            yield [batch]

    hessian = job.options.get("hessian", True)
    config = mct.gptq.get_pytorch_gptq_config(
        n_epochs=job.options.get("epochs", _EPOCHS),
        use_hessian_based_weights=hessian,
        use_hessian_sample_attention=hessian,
    )
    model, _ = mct.gptq.pytorch_gradient_post_training_quantization(
        network, batches, gptq_config=config, target_platform_capabilities=platform(job.bits)
    )
    made = weights_of(network)
    for name, module in wrapped(network, model):
        bias = module.layer.bias
        weight = module.get_quantized_weights()["weight"]
        made[name] = weight.detach(), None if bias is None else bias.detach()
    return made


def wrapped(network: nn.Module, model: nn.Module) -> Iterator[tuple[str, PytorchQuantizationWrapper]]:
    """The quantized layers of what the toolkit made of a network, by the network's names of them.

    Raises:
        RuntimeError: after the last, if there are layers that it did not quantize.
    """
    # the toolkit's names have underscores for dots
    names = {name.replace(".", "_"): name for name, _ in layers(network)}
    for name, module in model.named_modules():
        if isinstance(module, PytorchQuantizationWrapper):
            yield names.pop(name), module
    if names:
        raise RuntimeError(f"not quantized: {sorted(names.values())}")


if __name__ == "__main__":
    serve(quantize, "model-compression-toolkit")
