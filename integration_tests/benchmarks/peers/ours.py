"""This package as any other peer: in a process of its own, from the float network to rounded weights.

Networks of images go through FX, transformers through PT2E.
"""

from __future__ import annotations

# transformers imports torchvision where it finds one
from integration_tests.benchmarks import torchvision_cpu  # noqa: F401

# isort: split
from typing import Any

import torch
from torch import fx, nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import X86InductorQuantizer

from adaround_plugin import adaround
from adaround_plugin.deployment.torchao_tensors import to_torchao
from adaround_plugin.hosts.pt2e import AdaRoundWeightOnlyQuantizer, get_adaround_x86_inductor_config
from integration_tests.benchmarks.accuracy import Case
from integration_tests.benchmarks.peers.exchange import Job, Weights, layers, serve, weights_of
from integration_tests.benchmarks.quiet import quiet

__all__ = ["of_fx", "of_pt2e", "quantize"]


def of_fx(network: nn.Module, converted: fx.GraphModule) -> Weights:
    """Each layer's weight, as the converted model of FX computes with it, and its bias."""
    made: Weights = {}
    for name, _ in layers(network):
        module: Any = converted.get_submodule(name)
        # a layer and its activation function are a sequence
        module = module[0] if isinstance(module, nn.Sequential) else module
        made[name] = module.get_weight().dequantize(), module.bias
    return made


def of_pt2e(network: nn.Module, converted: fx.GraphModule) -> Weights:
    """The same of a program of PT2E: weights are dequantized in front of the layer whose name its node has."""
    made = weights_of(network)
    state = {**dict(converted.named_parameters()), **dict(converted.named_buffers())}
    operator = torch.ops.quantized_decomposed.dequantize_per_channel.default
    names = {name for name, _ in layers(network)}
    for node in converted.graph.nodes:
        if node.target is not operator or node.args[0].op != "get_attr":
            continue
        values = [state[str(one.target)] if isinstance(one, fx.Node) else one for one in node.args]
        (user,) = node.users
        path = [entry[0] for entry in user.meta["nn_module_stack"].values()][-1]
        (name,) = (name for name in names if path.endswith(f".{name}"))
        bias = user.args[2] if len(user.args) > 2 else None
        made[name] = operator(*values), None if bias is None else state[str(bias.target)]
        names.remove(name)
    if names:
        raise RuntimeError(f"not quantized: {sorted(names)}")
    return made


def _program(job: Job, encoder: nn.Module, samples: list[Any]) -> Weights:
    """The transformer, as the benchmark of it does it: symmetric, per channel."""
    from integration_tests.benchmarks import minilm

    if job.options["affine"]:
        raise ValueError("this network is run on symmetric grids")
    quantizer = X86InductorQuantizer().set_global(get_adaround_x86_inductor_config(job.bits, activation_bits=None))
    prepared = prepare_pt2e(minilm.export(minilm.HiddenState(encoder), samples[0]), quantizer)
    with torch.no_grad():
        prepared(**samples[0])
    return of_pt2e(encoder, convert_pt2e(adaround(prepared, samples, job.options["method"], progress=False)))


def _decoder(job: Job, model: nn.Module, samples: list[Any]) -> Weights:
    """The language model, to torchao's tensors; its head stays in float."""
    from integration_tests.benchmarks import decoder

    network = decoder.Logits(model)
    sizes = {"weight_bits": job.bits, "symmetric": not job.options["affine"], "group_size": job.group}
    quantizer = AdaRoundWeightOnlyQuantizer({"model.lm_head": None}, linear_only=True, **sizes)
    prepared = prepare_pt2e(decoder.export(network, samples[0]), quantizer)
    with torch.no_grad():
        prepared(**samples[0])
    made: Any = to_torchao(network, adaround(prepared, samples, job.options["method"], progress=False))
    return {name: (weight.dequantize(), bias) for name, (weight, bias) in weights_of(made.model).items()}


def quantize(job: Job, network: nn.Module, samples: list[Any]) -> Weights:
    """Prepare, calibrate, round and convert."""
    if job.group is not None and job.network != "decoder":
        raise ValueError("this network is run with one scale for each channel")
    with quiet():
        if job.network == "minilm":
            return _program(job, network, samples)
        if job.network == "decoder":
            return _decoder(job, network, samples)
        case = Case(network, job.bits, activation_bits=None, affine=job.options["affine"])
        learned = adaround(case.prepare(samples), samples, job.options["method"], progress=False)
        return of_fx(network, case.convert(learned))


if __name__ == "__main__":
    serve(quantize, "adaround_plugin", has_groups=True)
