"""What runs: models of torchvision and timm with random weights, through FX and PT2E: learned, exact, and the time.

Small images, few samples, one recipe and no search for scales: the table says what works on a graph, nothing of
accuracy. *Exact* is that the model which the host converts gives what the quantized stream with the learned integers
gives, to the last bit. Of detection models, backbone and heads are traced, and not what chooses boxes by compiled
operators. The first linear layers of AlexNet and VGG, whose rows of 9,216 and 25,088 weights take minutes and
gigabytes, stay nearest.

    python -m integration_tests.benchmarks.model_zoo
    python -m integration_tests.benchmarks.model_zoo resnet18 swin_t --hosts pt2e

timm takes a package from PyPI: pip install --no-deps timm
"""

from __future__ import annotations

from integration_tests.benchmarks.torchvision_cpu import models

# isort: split
import argparse
import importlib.util
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization.quantize_fx import convert_to_reference_fx, prepare_fx
from torch.export import Dim
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from adaround_plugin import (
    adaround,
    get_adaround_qconfig_mapping,
    get_report,
    get_weight_only_backend_config,
)
from adaround_plugin.graph.compat import forget_models
from adaround_plugin.hosts.pt2e import AdaRoundWeightOnlyQuantizer
from integration_tests.models import QUICK, arguments_of, keep_passes, run_stream

__all__ = ["MODELS", "Outcome", "run"]

_BITS = 4
_QUICK = replace(QUICK, max_columns=2048, search_scale=False)
# what stays nearest, by model
_EXCLUDED = {"alexnet": ["classifier.1"], "vgg11": ["classifier.0"], "vgg11_bn": ["classifier.0"]}


class Heads(nn.Module):
    """Backbone and heads of a detection model."""

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.backbone = detector.backbone
        self.head = detector.head if hasattr(detector, "head") else detector.rpn.head

    def forward(self, x: Tensor) -> Any:
        return self.head(list(self.backbone(x).values()))


def _classifiers(size: int, *names: str) -> dict[str, tuple[Callable[[], nn.Module], int]]:
    def build(name: str) -> Callable[[], nn.Module]:
        more = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
        return lambda: models.get_model(name, weights=None, num_classes=10, **more)

    return {name: (build(name), size) for name in names}


def _timm(size: int, *names: str) -> dict[str, tuple[Callable[[], nn.Module], int]]:
    def build(name: str) -> Callable[[], nn.Module]:
        return lambda: importlib.import_module("timm").create_model(name, num_classes=10)

    return {f"timm/{name}": (build(name), size) for name in names}


def _segmenters(size: int, *names: str) -> dict[str, tuple[Callable[[], nn.Module], int]]:
    def build(name: str) -> Callable[[], nn.Module]:
        return lambda: models.get_model(name, weights=None, weights_backbone=None, num_classes=5)

    return {name: (build(name), size) for name in names}


def _detectors(size: int, *names: str) -> dict[str, tuple[Callable[[], nn.Module], int]]:
    def build(name: str) -> Callable[[], nn.Module]:
        return lambda: Heads(models.get_model(name, weights=None, weights_backbone=None, num_classes=5))

    return {name: (build(name), size) for name in names}


# by name what builds it, and the height and width of its images
MODELS = {
    **_classifiers(64, "alexnet", "vgg11", "vgg11_bn", "resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2"),
    **_classifiers(64, "densenet121", "googlenet", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large"),
    **_classifiers(64, "mnasnet0_5", "mnasnet1_0", "shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "squeezenet1_0"),
    **_classifiers(64, "squeezenet1_1", "efficientnet_b0", "efficientnet_v2_s", "regnet_x_400mf", "regnet_y_400mf"),
    **_classifiers(64, "convnext_tiny", "swin_t", "swin_v2_t"),
    **_classifiers(96, "inception_v3"),
    **_classifiers(224, "vit_b_32", "maxvit_t"),
    **_segmenters(64, "fcn_resnet50", "deeplabv3_resnet50", "deeplabv3_mobilenet_v3_large"),
    **_segmenters(64, "lraspp_mobilenet_v3_large"),
    **_detectors(128, "retinanet_resnet50_fpn", "fcos_resnet50_fpn", "ssdlite320_mobilenet_v3_large"),
    **_detectors(128, "fasterrcnn_mobilenet_v3_large_fpn"),
    **_timm(64, "resnet50d", "resnest14d", "res2net50_26w_4s", "ecaresnet26t", "seresnet18", "skresnet18"),
    **_timm(64, "resnetv2_50", "nf_resnet26", "eca_nfnet_l0", "efficientnet_lite0", "mobilenetv4_conv_small"),
    **_timm(64, "ghostnet_100", "fbnetc_100", "mixnet_s", "rexnet_100", "lcnet_050", "tinynet_e", "regnetz_005"),
    **_timm(64, "dla34", "cspdarknet53", "ese_vovnet19b_dw", "gernet_s", "hrnet_w18_small", "hgnetv2_b0"),
    **_timm(64, "repvgg_a0", "mobileone_s0", "repvit_m0_9", "convnextv2_atto", "inception_next_atto"),
    **_timm(64, "convmixer_1024_20_ks9_p14", "poolformer_s12", "edgenext_xx_small", "fastvit_t8", "pvt_v2_b0"),
    **_timm(224, "deit_tiny_patch16_224", "levit_128s", "efficientformer_l1", "tiny_vit_5m_224", "twins_svt_small"),
    **_timm(224, "mixer_s16_224", "xcit_nano_12_p16_224", "coat_lite_tiny", "cait_xxs24_224", "visformer_tiny"),
    **_timm(224, "eva02_tiny_patch14_224", "nest_tiny", "efficientvit_b0"),
    **_timm(240, "crossvit_tiny_240"),
    **_timm(256, "mobilevit_xxs", "mobilevitv2_050"),
}


@dataclass(frozen=True)
class Outcome:
    """What came of a model in a host.

    Attributes:
        traced: whether the host prepared it; else `problem` says what the host raised.
        learned: how many layers were learned, out of how many; None if there was an error of ours, in `problem`.
        exact: whether the conversion gives what the quantized stream gives.
        skipped: kinds of layers that were left alone.
        seconds: of `adaround`.
        problem: the first line of an error.
    """

    traced: bool
    learned: tuple[int, int] | None = None
    exact: bool = False
    skipped: str = ""
    seconds: float = 0.0
    problem: str = ""

    def cells(self) -> tuple[str, str]:
        """What was learned, or why nothing was; and what was left alone."""
        if self.learned is None:
            return f"{'failed' if self.traced else 'not prepared'}: {self.problem}", "-"
        return "{} of {}".format(*self.learned) + ("" if self.exact else ", **not exact**"), self.skipped or "none"


def run(name: str, host: str) -> Outcome:
    """Prepare, learn and convert one model."""
    build, size = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build().eval()
    data = list(torch.split(torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(0)), 4))
    try:
        with torch.no_grad():
            prepared = _prepared(network, data, host)
    except Exception as error:
        return Outcome(traced=False, problem=_first_line(error))
    start = time.perf_counter()
    try:
        with pytest.MonkeyPatch.context() as patch:
            passes = keep_passes(patch)
            learned = adaround(prepared, data, _QUICK, exclude=_EXCLUDED.get(name, []), progress=False)
    except Exception as error:
        return Outcome(traced=True, problem=_first_line(error))
    seconds, report = time.perf_counter() - start, get_report(learned)
    with torch.no_grad():
        expected = _flat(run_stream(passes[0].streams[1], arguments_of(prepared, data[0])))
        if host == "fx":
            converted: nn.Module = convert_to_reference_fx(learned, backend_config=get_weight_only_backend_config())
        else:
            converted = convert_pt2e(learned)
        found = _flat(converted(data[0]))
    forget_models()
    exact = len(expected) == len(found) and all(map(torch.equal, expected, found))
    counted = Counter(kind for _, kind, _ in report.skipped)
    skipped = ", ".join(f"{count} {kind}" for kind, count in counted.items())
    return Outcome(True, (sum(layer.learned for layer in report.layers), len(report.layers)), exact, skipped, seconds)


def _prepared(network: nn.Module, data: list[Tensor], host: str) -> Any:
    prepared: Any
    if host == "fx":
        mapping = get_adaround_qconfig_mapping(weight_bits=_BITS, activation_bits=None)
        prepared = prepare_fx(network, mapping, (data[0],), backend_config=get_weight_only_backend_config())
    else:
        program = torch.export.export(network, (data[0],), dynamic_shapes=({0: Dim.AUTO},), strict=True)
        prepared = prepare_pt2e(program.module(), AdaRoundWeightOnlyQuantizer(weight_bits=_BITS))
    for batch in data:
        prepared(batch)
    return prepared


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:120]}"


def _flat(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    items = outputs.values() if isinstance(outputs, dict) else outputs
    return [tensor for item in items for tensor in _flat(item)]


def main() -> None:
    """Print a row for each model and host."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="model", help="all, if none is named")
    parser.add_argument("--hosts", nargs="+", default=["fx", "pt2e"], choices=["fx", "pt2e"])
    options = parser.parse_args()
    named = options.models or list(MODELS)
    if any(name.startswith("timm/") for name in named) and importlib.util.find_spec("timm") is None:
        raise SystemExit("pip install --no-deps timm")
    warnings.simplefilter("ignore")
    print("| model | host | learned, of layers | left alone | s |")
    print("|---|---|---|---|---|")
    for name in named:
        found = {host: run(name, host) for host in options.hosts}
        # one row where the hosts agree
        alike = len({replace(outcome, seconds=0.0) for outcome in found.values()}) == 1
        for host in [" and ".join(found)] if alike else found:
            outcomes = list(found.values()) if alike else [found[host]]
            learned, skipped = outcomes[0].cells()
            seconds = " and ".join(f"{outcome.seconds:.0f}" for outcome in outcomes)
            print(f"| {name} | {host} | {learned} | {skipped} | {seconds} |", flush=True)


if __name__ == "__main__":
    main()
