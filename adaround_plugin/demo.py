"""The demo: a convolutional network on scikit-learn's handwritten digits, rounded to nearest and with AdaRound.

Every row but the first is a model that `convert_fx` made: 8-bit activations and torch's integer kernels.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, fx, nn
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

from adaround_plugin.api import adaround
from adaround_plugin.hosts.fx.qconfig import get_adaround_qconfig_mapping
from adaround_plugin.report import get_report

__all__ = ["Digits", "load", "network", "run", "train"]

_TEST = 797
_CALIBRATION = 512


@dataclass(frozen=True)
class Digits:
    """Handwritten digits: `(n, 1, 8, 8)` float32 images in [0, 1] and `(n,)` labels, for training and for testing."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load() -> Digits:
    """1,000 digits to train on, 797 to test on, shuffled with a fixed seed."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = (torch.tensor(data.images, dtype=torch.float32) / 16).unsqueeze(1)[order]
    labels = torch.tensor(data.target)[order]
    return Digits(images[_TEST:], labels[_TEST:], images[:_TEST], labels[:_TEST])


def network() -> nn.Module:
    """Five convolutions, one depthwise, with batch norm, and a linear layer; initialized with a fixed seed."""

    def block(inputs: int, outputs: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, groups=groups, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            *block(1, 16),
            *block(16, 32, stride=2),
            *block(32, 32, groups=32),
            *block(32, 48),
            *block(48, 48, stride=2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(48, 10),
        )


def train(model: nn.Module, digits: Digits, epochs: int = 30) -> nn.Module:
    """Train with Adam on shifted digits; returns the model in eval mode."""
    generator = torch.Generator().manual_seed(0)
    steps = epochs * -(-len(digits.labels) // 100)
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(digits.labels), generator=generator).split(100):  # type: ignore[no-untyped-call]
            shift = torch.randint(-1, 2, (2,), generator=generator).tolist()
            images = torch.roll(digits.images[chosen], shift, (2, 3))
            loss = nn.functional.cross_entropy(model(images), digits.labels[chosen])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return model.eval()


def accuracy(model: nn.Module, digits: Digits) -> float:
    """Top-1 on the test digits, in percent."""
    with torch.no_grad():
        right = model(digits.test_images).argmax(1) == digits.test_labels
    return 100 * float(right.float().mean())


def _kilobytes(model: nn.Module) -> float:
    """Size of the saved state."""
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.tell() / 1024


def _packed_kilobytes(prepared: fx.GraphModule) -> float:
    """Size of the quantized weights at their bit width."""
    bits = sum(layer.bits * int(torch.Size(layer.shape).numel()) for layer in get_report(prepared).layers)
    return bits / 8 / 1024


def run(bits: Sequence[int], backend: str = "x86", layers: bool = False, html: Path | None = None) -> Iterator[str]:
    """Train, quantize, compare; yields the lines of the table as they are ready.

    Args:
        bits: weight bit widths.
        backend: of torch's integer kernels; the process's engine is set while the demo runs.
        layers: also yield the report of every learned layer.
        html: where to write the report of the last learned model as a page.
    """
    engine = torch.backends.quantized.engine
    torch.backends.quantized.engine = backend
    try:
        yield from _table(bits, backend, layers, html)
    finally:
        torch.backends.quantized.engine = engine


def _table(bits: Sequence[int], backend: str, layers: bool, html: Path | None) -> Iterator[str]:
    digits = load()
    start = time.perf_counter()
    model = train(network(), digits)
    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear))
    yield (
        f"Digits of scikit-learn: {len(digits.labels)} to train, {_CALIBRATION} of them (unlabelled) to calibrate, "
        f"{_TEST} to test; converted models run {backend} integer kernels with 8-bit activations."
    )
    head = ("model", "weights", "top-1 %", "seconds", "saved KB", "weights at b bits, KB")
    yield "{:10s} {:>8s} {:>8s} {:>8s} {:>9s} {:>22s}".format(*head)

    def row(name: str, width: str, score: float, seconds: float, saved: float, packed: float) -> str:
        return f"{name:10s} {width:>8s} {score:8.2f} {seconds:8.1f} {saved:9.1f} {packed:22.1f}"

    trained = time.perf_counter() - start
    yield row("float", "32 bit", accuracy(model, digits), trained, _kilobytes(model), weights * 4 / 1024)
    batches = list(digits.images[:_CALIBRATION].split(64))  # type: ignore[no-untyped-call]
    for width in bits:
        prepared = prepare_fx(model, get_adaround_qconfig_mapping(backend, weight_bits=width), (batches[0],))
        for batch in batches:
            prepared(batch)
        for name, method in (("nearest", "nearest"), ("AdaRound", "default")):
            start = time.perf_counter()
            learned = adaround(prepared, batches, method, progress=False)
            seconds = time.perf_counter() - start
            report, packed = get_report(learned), _packed_kilobytes(learned)
            converted = convert_fx(learned)
            yield row(name, f"{width} bit", accuracy(converted, digits), seconds, _kilobytes(converted), packed)
            if layers:
                yield str(report)
    if html is not None:
        # learned comes last
        report.to_html(html)
        yield f"Report of AdaRound at {width} bits: {html}"
