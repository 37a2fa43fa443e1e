"""The networks of AdaRound's paper: four of torchvision's classifiers, and DeepLabV3+ for Pascal VOC."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Final
from urllib.error import URLError

import torch
from torch import Tensor, nn

from adaround_plugin.errors import InvalidOptionError
from integration_tests.benchmarks import deeplab
from integration_tests.benchmarks.imagenet_data import Preprocessing
from integration_tests.benchmarks.torchvision_cpu import models

__all__ = ["TOPOLOGIES", "Topology", "load", "weights_of"]


@dataclass(frozen=True)
class Topology:
    """A network of the paper.

    Args:
        title: its name in tables.
        build: a state dict to the network it belongs to, with fresh weights, and the state in the network's names.
        preprocessing: of its images.
        weights: torchvision's name of the weights nearest to the paper's, or None where torchvision has none.
        segments: whether it names a class for each pixel (VOC) or one for the image (ImageNet).
    """

    title: str
    build: Callable[[Mapping[str, Tensor]], tuple[nn.Module, dict[str, Tensor]]]
    preprocessing: Preprocessing
    weights: str | None
    segments: bool = False


def _classifier(
    constructor: Callable[..., nn.Module], head: str, unused: str = "", **options: Any
) -> Callable[[Mapping[str, Tensor]], tuple[nn.Module, dict[str, Tensor]]]:
    """Build with as many classes as the weight `head` has rows, leaving out what begins with `unused`."""

    def build(state: Mapping[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
        classes = len(state[head]) if head in state else 1000
        kept = {name: value for name, value in state.items() if not (unused and name.startswith(unused))}
        return constructor(num_classes=classes, **options), kept

    return build


# torchvision's own rescaling of the input, (x - 0.5) / 0.5 in effect, is left to the preprocessing: in the graph it
# would be quantized; the auxiliary classifier serves training alone
_INCEPTION = _classifier(
    models.inception_v3, "fc.weight", unused="AuxLogits.", aux_logits=False, transform_input=False, init_weights=False
)
_HALF = (0.5, 0.5, 0.5)

TOPOLOGIES: Final = {
    "resnet18": Topology(
        *("ResNet-18", _classifier(models.resnet18, "fc.weight"), Preprocessing(256, 224)),
        "ResNet18_Weights.IMAGENET1K_V1",
    ),
    "resnet50": Topology(
        *("ResNet-50", _classifier(models.resnet50, "fc.weight"), Preprocessing(256, 224)),
        "ResNet50_Weights.IMAGENET1K_V1",
    ),
    "inception_v3": Topology(
        *("Inception V3", _INCEPTION, Preprocessing(342, 299, _HALF, _HALF)),
        "Inception_V3_Weights.IMAGENET1K_V1",
    ),
    "mobilenet_v2": Topology(
        *("MobileNetV2", _classifier(models.mobilenet_v2, "classifier.1.weight"), Preprocessing(256, 224)),
        "MobileNet_V2_Weights.IMAGENET1K_V1",
    ),
    "deeplabv3plus": Topology(
        *("DeepLabV3+ MobileNetV2", deeplab.from_state_dict, Preprocessing(513, 513), None), segments=True
    ),
}


def weights_of(name: str, state_dict: Path | None) -> str:
    """What tells these weights from others: torchvision's name, or a checksum of the file.

    Raises:
        InvalidOptionError: there is no such file, or no file is given for a network that torchvision has no weights of.
    """
    if state_dict is None:
        known = TOPOLOGIES[name].weights
        if known is None:
            raise InvalidOptionError("state_dict", f"torchvision has no weights of {name}", "Pass --state-dict FILE.")
        return known
    if not state_dict.is_file():
        raise InvalidOptionError("state_dict", f"{state_dict} is no file", "Pass a file that torch.save wrote.")
    with state_dict.open("rb") as file:
        return "sha256 " + hashlib.file_digest(file, "sha256").hexdigest()[:16]


def load(name: str, state_dict: Path | None) -> tuple[nn.Module, int]:
    """The network in eval mode, and its number of classes.

    Args:
        name: of `TOPOLOGIES`.
        state_dict: a file with a state dict, or with one under "state_dict"; without, torchvision's weights, from its
            cache or downloaded into it.

    Raises:
        InvalidOptionError: the weights cannot be had, or do not fit the network.
    """
    state = _state(name, state_dict)
    network, state = TOPOLOGIES[name].build(state)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise InvalidOptionError(
            "state_dict", f"does not fit {name} ({reason})", "Pass the state dict of that network."
        ) from error
    return network.eval(), _classes(network)


def _state(name: str, file: Path | None) -> Mapping[str, Tensor]:
    identity = weights_of(name, file)
    if file is None:
        try:
            known: Mapping[str, Tensor] = models.get_weight(identity).get_state_dict(progress=True, check_hash=True)
        except URLError as error:
            raise InvalidOptionError(
                "state_dict",
                f"{identity} is not in torch.hub's cache and cannot be downloaded ({error})",
                "Pass --state-dict FILE.",
            ) from error
        return known
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError) as error:
        raise InvalidOptionError(
            "state_dict", f"{file} holds more than tensors, or is damaged ({error})", "Save model.state_dict() into it."
        ) from error
    state = found.get("state_dict", found) if isinstance(found, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InvalidOptionError("state_dict", f"{file} holds no state dict", "Save model.state_dict() into it.")
    return state


def _classes(network: nn.Module) -> int:
    """Outputs of the last weighted layer."""
    last = [module for module in network.modules() if isinstance(module, nn.Linear | nn.Conv2d)][-1]
    return len(last.weight)
