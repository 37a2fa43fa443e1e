"""The PT2E quantizers of vendors, each made as its vendor says, with the smallest network that shows what they do.

Each is imported where it is made: some need wheels of their own (`NEEDS`).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from adaround_plugin import adaround, get_report
from adaround_plugin.graph.arguments import argument, attribute
from adaround_plugin.graph.operators import is_weighted_function
from adaround_plugin.hosts.learned import learned_weights
from adaround_plugin.report import Report

__all__ = ["NEEDS", "VENDORS", "Learned", "Linears", "Net", "calibrated", "integers", "learn", "qualcomm", "samples"]


class Net(nn.Module):
    """A convolution, a depthwise and a pointwise one, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.depthwise = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.pointwise, self.pool, self.head = nn.Conv2d(16, 32, 1), nn.MaxPool2d(4), nn.Linear(32 * 4, 10)

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.depthwise(torch.relu(self.conv(x))))
        return self.head(self.pool(torch.relu(self.pointwise(x))).flatten(1))


class Linears(nn.Sequential):
    """Linear layers alone."""

    def __init__(self) -> None:
        layers = (nn.Linear(192, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
        super().__init__(nn.Flatten(), *layers)


def samples(count: int = 8, seed: int = 0) -> list[Tensor]:
    """Batches of 16 images of noise."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 3, 8, 8, generator=generator) for _ in range(count)]


# --- quantizers


def _xnnpack(is_dynamic: bool = False) -> Any:
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer as vendor

    config = vendor.get_symmetric_quantization_config(is_per_channel=True, is_dynamic=is_dynamic)
    return vendor.XNNPACKQuantizer().set_global(config)


def _core_ml() -> Any:
    from coremltools.optimize.torch.quantization import LinearQuantizerConfig
    from executorch.backends.apple.coreml.quantizer import CoreMLQuantizer

    config = {"quantization_scheme": "symmetric", "weight_dtype": torch.qint8, "activation_dtype": torch.quint8}
    return CoreMLQuantizer(LinearQuantizerConfig.from_dict({"global_config": config}))


def _cadence() -> Any:
    from executorch.backends.cadence.aot.quantizer.quantizer import CadenceDefaultQuantizer

    return CadenceDefaultQuantizer()


def qualcomm(dtype: str) -> Any:
    """Qualcomm's quantizer with a type of its `QuantDtype`."""
    from executorch.backends.qualcomm.quantizer.quantizer import QnnQuantizer, QuantDtype

    # an empty path keeps the import from fetching Qualcomm's SDK, which only the lowering needs. On AMD's processors
    # the quantizer takes oneDNN from the whole process, and other vendors' then find convolutions laid out otherwise
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.mkldnn, "enabled", torch.backends.mkldnn.enabled)
        patch.setenv("QNN_SDK_ROOT", "")
        quantizer = QnnQuantizer()
        quantizer.set_default_quant_config(QuantDtype[dtype], is_conv_per_channel=True, is_linear_per_channel=True)
    return quantizer


def _samsung() -> Any:
    from executorch.backends.samsung.quantizer.quantizer import EnnQuantizer, Precision

    quantizer = EnnQuantizer()
    quantizer.setup_quant_params(Precision.A8W8, is_per_channel=True)
    return quantizer


def _vulkan() -> Any:
    from executorch.backends.vulkan.quantizer import vulkan_quantizer as vendor

    config = vendor.get_symmetric_quantization_config(is_dynamic=False, weight_bits=8)
    return vendor.VulkanQuantizer().set_global(config)


def _tosa() -> Any:
    from executorch.backends.arm.quantizer import TOSAQuantizer, get_symmetric_quantization_config
    from executorch.backends.arm.tosa.specification import TosaSpecification

    specification = TosaSpecification.create_from_string("TOSA-1.0+INT")
    return TOSAQuantizer(specification).set_global(get_symmetric_quantization_config(is_per_channel=True))


def _ethos_u() -> Any:
    from executorch.backends.arm.ethosu import EthosUCompileSpec
    from executorch.backends.arm.quantizer import EthosUQuantizer, get_symmetric_quantization_config

    quantizer = EthosUQuantizer(EthosUCompileSpec("ethos-u55-128"))
    return quantizer.set_global(get_symmetric_quantization_config(is_per_channel=True))


def _vgf() -> Any:
    from executorch.backends.arm.quantizer import VgfQuantizer, get_symmetric_quantization_config
    from executorch.backends.arm.vgf import VgfCompileSpec

    return VgfQuantizer(VgfCompileSpec()).set_global(get_symmetric_quantization_config(is_per_channel=True))


def _cortex_m() -> Any:
    from executorch.backends.cortex_m.quantizer.quantizer import CortexMQuantizer

    return CortexMQuantizer()


def _openvino() -> Any:
    from executorch.backends.openvino.quantizer.quantizer import OpenVINOQuantizer

    return OpenVINOQuantizer()


VENDORS: dict[str, Callable[[], Any]] = {
    "XNNPACK": _xnnpack,
    "Qualcomm 8a8w": lambda: qualcomm("use_8a8w"),
    "Qualcomm 16a4w": lambda: qualcomm("use_16a4w"),
    "Samsung": _samsung,
    "Vulkan": _vulkan,
    "Cadence": _cadence,
    "Core ML": _core_ml,
    "TOSA": _tosa,
    "Ethos-U": _ethos_u,
    "VGF": _vgf,
    "Cortex-M": _cortex_m,
    "OpenVINO": _openvino,
}
# beside executorch
NEEDS = {
    **dict.fromkeys(("TOSA", "Ethos-U", "VGF", "Cortex-M"), "tosa-tools"),
    "OpenVINO": "nncf>=3.4 openvino>=2026",
}

# --- the flow


def calibrated(vendor: str, quantizer: Any, data: list[Tensor], build: Callable[[], nn.Module] = Net) -> fx.GraphModule:
    """A network from `prepare_pt2e`, calibrated.

    Cortex-M takes channels-last memory only, and no check of the inputs' shapes in the graph.
    """
    program = copy.deepcopy(_exported(build, _layout(vendor), data[0].shape))
    prepared: fx.GraphModule = prepare_pt2e(program, quantizer)
    with torch.no_grad():
        for batch in data:
            prepared(batch.to(memory_format=_layout(vendor)))
    return prepared


def _layout(vendor: str) -> torch.memory_format:
    """What a vendor's quantizer takes."""
    return torch.channels_last if vendor == "Cortex-M" else torch.preserve_format


@functools.cache
def _exported(build: Callable[[], nn.Module], layout: torch.memory_format, shape: Sequence[int]) -> fx.GraphModule:
    """A network as a program for inputs of a shape; not to be changed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build().eval().to(memory_format=layout)  # type: ignore[call-overload]
    example = torch.zeros(shape).to(memory_format=layout)
    program: fx.GraphModule = torch.export.export(network, (example,), strict=True).module(check_guards=False)
    return program


@dataclass(frozen=True)
class Learned:
    """What came of a vendor's quantizer.

    Attributes:
        report: of `adaround`.
        converted: what `convert_pt2e` made.
        exact: whether its integers are the learned ones, each in the range that it was given.
    """

    report: Report
    converted: fx.GraphModule
    exact: bool


def learn(
    vendor: str,
    quantizer: Any,
    data: list[Tensor],
    method: Any = "default",
    build: Callable[[], nn.Module] = Net,
) -> Learned:
    """The whole flow with one quantizer, bare or in an `AdaRoundQuantizer`."""
    prepared = calibrated(vendor, quantizer, data, build)
    learned = adaround(prepared, [batch.to(memory_format=_layout(vendor)) for batch in data], method, progress=False)
    expected, report = learned_weights(learned).values(), get_report(learned)
    converted: fx.GraphModule = convert_pt2e(learned)
    found = integers(converted)
    exact = len(found) == len(expected) and all(
        torch.equal(one.long(), other) and grid.quant_min <= int(other.min()) and int(other.max()) <= grid.quant_max
        for one, (other, grid) in zip(found, expected, strict=True)
    )
    return Learned(report, converted, exact)


def integers(converted: fx.GraphModule) -> list[Tensor]:
    """The integers of the weights in a converted program, in the order of the layers."""
    weights = [argument(node, 1, "weight") for node in converted.graph.nodes if is_weighted_function(node)]
    sources = [weight.args[0] for weight in weights if weight.op == "call_function"]
    return [attribute(converted, str(source.target)) for source in sources]
