"""Brevitas: GPTQ, GPFQ, Qronos and learned rounding, as its example of post-training quantization calls them.

https://github.com/Xilinx/brevitas/tree/master/src/brevitas_examples/imagenet_classification/ptq
"""

from __future__ import annotations

# the example imports torchvision
from integration_tests.benchmarks import torchvision_cpu  # noqa: F401

# isort: split
from argparse import Namespace
from typing import Any

import torch
from brevitas.graph.quantize import preprocess_for_quantize
from brevitas_examples.imagenet_classification.ptq.learned_round_utils import apply_learned_round
from brevitas_examples.imagenet_classification.ptq.ptq_common import (
    apply_bias_correction,
    apply_gpfq,
    apply_gptq,
    apply_qronos,
    quantize_model,
)
from brevitas_examples.imagenet_classification.ptq.ptq_imagenet_args import create_args_parser
from torch import Tensor, nn

from integration_tests.benchmarks.peers.exchange import Job, Weights, layers, serve, weights_of

__all__ = ["quantize"]


def _learned_round(model: nn.Module, loader: list[tuple[Tensor, int]], defaults: Namespace, job: Job) -> None:
    """Learned rounding of each layer, with the example's defaults but for what the job has."""
    options = {"learned_round": "hard_sigmoid", "learned_round_iters": job.options.get("iterations", 1000)}
    apply_learned_round(model, loader, Namespace(**{**vars(defaults), **options}))


def quantize(job: Job, network: nn.Module, samples: list[Any]) -> Weights:
    """The example's flow for weights alone and per channel, with the defaults of its command line otherwise."""
    defaults = create_args_parser().parse_args([])
    method = job.options["method"]
    model = preprocess_for_quantize(
        network,
        equalize_iters=defaults.graph_eq_iterations,
        equalize_merge_bias=defaults.graph_eq_merge_bias,
        merge_bn=defaults.merge_bn,
    )
    model = quantize_model(
        model,
        backend="layerwise",
        weight_bit_width=job.bits,
        act_bit_width=None,
        bias_bit_width=None,
        weight_quant_granularity="per_channel",
        act_quant_percentile=defaults.act_quant_percentile,
        act_quant_type=defaults.act_quant_type,
        scale_factor_type=defaults.scale_factor_type,
        quant_format=defaults.quant_format,
        layerwise_first_last_bit_width=job.bits,
        weight_narrow_range=defaults.weight_narrow_range,
        weight_param_method=job.options.get("scale", defaults.weight_quant_calibration_type),
        weight_quant_type=defaults.weight_quant_type,
    )
    # the example's loaders yield images with labels
    loader = [(batch, 0) for batch in samples]
    with torch.no_grad():
        model.eval()(samples[0])
    if method == "gptq":
        apply_gptq(loader, model, act_order=defaults.gpxq_act_order, create_weight_orig=True)
    elif method == "gpfq":
        apply_gpfq(loader, model, act_order=defaults.gpxq_act_order)
    elif method == "qronos":
        apply_qronos(model, loader, act_order=defaults.gpxq_act_order)
    else:
        _learned_round(model, loader, defaults, job)
    if defaults.bias_corr:
        apply_bias_correction(loader, model)
    made = weights_of(model)
    for name, module in layers(model):
        # a layer of Brevitas is one of torch too, with a weight that is quantized where it is read
        made[name] = module.quant_weight().value.detach().clone(), made[name][1]  # type: ignore[operator]
    return made


if __name__ == "__main__":
    serve(quantize, "brevitas")
