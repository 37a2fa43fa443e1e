"""What networks past this machine would take: memory, traffic and time by formulas, from rates that were measured.

The formulas are in docs/explanation/past-this-machine.md. Nothing is run but shapes.

    python -m integration_tests.benchmarks.plan
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from integration_tests.benchmarks.floor import table
from integration_tests.benchmarks.torchvision_cpu import models

__all__ = ["DEVICES", "NETWORKS", "Device", "Layer", "Network", "checks", "plan"]

# columns of a layer that enter its moments, and at least so many for each weight of a row
_COLUMNS, _PER_WEIGHT = 16384, 4
# float32, and float64 of moments
_FLOAT, _DOUBLE = 4, 8
# the caller's model, the host's conversion, and the quantized stream
_COPIES = 3
# seconds of ResNet-50 on two threads (docs/benchmarks.md, the table before derivatives): what a pass takes over both
# streams alone, and moments over their products; and all of the present default (the table behind it) over these phases
# and solve, each relative to the floor of its day
_FORWARD, _MOMENTS = 173.5 / (54.77 + 55.08), 37.4 / 34.18
_ALL = (765.0 / 187.55) / ((173.5 + 37.4 + 57.6) / 144.03)


@dataclass(frozen=True)
class Layer:
    """Layers of one shape.

    Attributes:
        count: how many there are.
        groups, rows, columns: `G`, `R` and `D` of the weight.
        positions: columns of the design matrix in a sample.
    """

    count: int
    groups: int
    rows: int
    columns: int
    positions: int

    @property
    def moments(self) -> int:
        """Bytes of one layer's moments: `8 G D (D + R)`."""
        return _DOUBLE * self.groups * self.columns * (self.columns + self.rows)

    @property
    def taken(self) -> int:
        """Columns that enter its moments."""
        return max(_COLUMNS // min(self.groups, 4), _PER_WEIGHT * self.columns)

    @property
    def multiply(self) -> int:
        """Operations of all these layers for a sample: two for each weight and position."""
        return 2 * self.count * self.groups * self.rows * self.columns * self.positions

    @property
    def products(self) -> int:
        """Operations of the products of moments, as the floor makes them: `2 n D (D + 2 R)`."""
        return 2 * self.count * self.groups * self.taken * self.columns * (self.columns + 2 * self.rows)

    @property
    def sweep(self) -> int:
        """Operations of one visit of every integer: `2 R D^2`."""
        return 2 * self.count * self.groups * self.rows * self.columns**2


@dataclass(frozen=True)
class Network:
    """What is to be known of a network.

    Attributes:
        name, samples, weights: of the network; how many samples and weights.
        layers: that are learned.
        values: that one stream keeps of a sample between stages, at the most; `moved`, the sum over all stages.
        bits: of a value in the quantized stream between stages.
    """

    name: str
    samples: int
    weights: int
    layers: Sequence[Layer]
    values: int
    moved: int
    bits: int = 32

    def total(self, attribute: str) -> int:
        """The sum of an attribute of the layers."""
        return sum(getattr(layer, attribute) for layer in self.layers)

    @property
    def value_bytes(self) -> int:
        """Of both streams and all samples, at the most."""
        return self.samples * self.values * (_FLOAT + self.bits // 8)


@dataclass(frozen=True)
class Device:
    """Rates that were measured, in operations a second.

    Attributes:
        exact, quantized: of a float and of a quantized pass.
        products: of the products of moments.
        per_layer: seconds of a layer whatever its size.
    """

    name: str
    exact: float
    quantized: float
    products: float
    per_layer: float

    def phases(self, network: Network, devices: int = 1) -> tuple[float, float, float, float]:
        """Seconds of forward, moments, solve, and all together with trials, derivatives and the comparison."""
        multiply = network.samples * network.total("multiply") / devices
        forward = _FORWARD * (multiply / self.exact + multiply / self.quantized)
        moments = _MOMENTS * network.total("products") / devices / self.products
        solve = VISITS * network.total("sweep") / devices / self.products + self.per_layer * network.total("count")
        return forward, moments, solve, _ALL * (forward + moments + solve)


def convolutional(name: str, samples: int, bits: int = 32) -> Network:
    """A ResNet of torchvision at 224x224, by the shapes of its layers.

    Between stages a block keeps what its shortcut needs, and the input of the layer that is next.
    """
    with torch.device("meta"):
        model = getattr(models, name)().eval()
    layers: list[Layer] = []
    kept: list[int] = [3 * 224 * 224]

    def see(module: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            columns = module.weight[0].numel()
            layers.append(Layer(1, module.groups, module.out_channels // module.groups, columns, made[0, 0].numel()))
        elif isinstance(module, nn.Linear):
            layers.append(Layer(1, 1, module.out_features, module.in_features, 1))

    def pass_block(module: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
        inner = layers[-sum(isinstance(one, nn.Conv2d) for one in module.modules()) :]
        inner = inner[: -1 if module.downsample is None else -2]
        # the first layer waits for the block's input, each other for what the one before it gives
        kept.append(given[0][0].numel())
        kept.extend(made[0].numel() + layer.groups * layer.rows * layer.positions for layer in inner)

    for module in model.modules():
        if isinstance(module, models.resnet.BasicBlock | models.resnet.Bottleneck):
            module.register_forward_hook(pass_block)
        else:
            module.register_forward_hook(see)
    model(torch.empty(1, 3, 224, 224, device="meta"))
    weights = sum(one.numel() for one in model.parameters())
    return Network(name, samples, weights, layers, max(kept), sum(kept), bits)


def transformer(
    name: str,
    samples: int,
    depth: int,
    width: int,
    hidden: int,
    tokens: int,
    *,
    gated: bool = False,
    kv_width: int | None = None,
    beside: int = 0,
) -> Network:
    """Blocks of attention and of two layers, or of three that are gated.

    Args:
        name, samples: of the network.
        depth, width, hidden, tokens: number of blocks, their width, that between their layers, and tokens of a sample.
        gated: whether a layer gates that beside it.
        kv_width: of keys and values.
        beside: weights of embeddings and of heads, which are not learned here.
    """
    keys = width if kv_width is None else kv_width
    layers = [
        Layer(2 * depth, 1, width, width, tokens),
        Layer(2 * depth, 1, keys, width, tokens),
        Layer((2 if gated else 1) * depth, 1, hidden, width, tokens),
        Layer(depth, 1, width, hidden, tokens),
    ]
    # the residual stream beside the inputs of queries, of the output, of the hidden layers, and of the last
    stages = [width, 2 * width, 2 * width, width + hidden]
    weights = beside + sum(layer.count * layer.rows * layer.columns for layer in layers)
    return Network(name, samples, weights, layers, tokens * max(stages), depth * tokens * sum(stages))


def vit(name: str, samples: int, depth: int, width: int, patch: int) -> Network:
    """A vision transformer at 224x224."""
    tokens = (224 // patch) ** 2 + 1
    return transformer(name, samples, depth, width, 4 * width, tokens, beside=3 * patch**2 * width + 1000 * width)


RESNET50, RESNET18 = convolutional("resnet50", 1024), convolutional("resnet18", 1024)
VIT_B = vit("ViT-B/16", 1024, 12, 768, 16)
NETWORKS: Final = (
    convolutional("resnet152", 1024),
    vit("ViT-H/14", 1024, 32, 1280, 14),
    transformer("decoder, 70 B", 512, 80, 8192, 28672, 2048, gated=True, kv_width=1024, beside=2 * 128256 * 8192),
)


def _rate(name: str, exact: float, quantized: float, products: float, per_layer: float) -> Device:
    """Rates by the floor of ResNet-50, in seconds."""
    multiply = RESNET50.samples * RESNET50.total("multiply")
    return Device(name, multiply / exact, multiply / quantized, RESNET50.total("products") / products, per_layer)


CPU: Final = _rate("two threads", 54.77, 55.08, 34.18, 0.0)
# of the measured moments and solve, what is not products takes as long for each of 54 layers
H100: Final = _rate("H100", 0.19, 0.45, 0.12, (2.0 - 0.12 + 6.1) / RESNET50.total("count"))
DEVICES: Final = (CPU, H100)
# visits of every integer that a solution is worth, at the rate of products: by ViT-B/16 on two threads, 134.9 s
VISITS: Final = 134.9 * CPU.products / VIT_B.total("sweep")

# bytes a second in one direction, by the sheets that the page names
LINKS: Final = {"NVLink": 450e9, "PCIe": 64e9, "InfiniBand": 50e9, "NVMe, read": 13e9, "NVMe, write": 6.6e9}
_GPUS: Final = 8
_GIB: Final = 2**30 / 1e9


def checks() -> list[list[str]]:
    """What was measured (docs/benchmarks.md) beside what the formulas say."""
    eight = convolutional("resnet50", 1024, bits=8)
    forward, moments, _, _ = CPU.phases(VIT_B)
    found = [
        ("ResNet-50, H100, peak, GB", 9.3 * _GIB, _resident(RESNET50)),
        ("ResNet-50, CPU, peak above the start, GB", (11.69 - 1.70) * _GIB, _resident(RESNET50, 2)),
        ("the same, W4A8, before derivatives", (7.93 - 1.68) * _GIB, _resident(eight, 2)),
        ("ResNet-18, H100, peak, GB", 4.1 * _GIB, _resident(RESNET18)),
        ("ViT-B/16, CPU, peak above the start, GB", (12.77 - 2.43) * _GIB, _resident(VIT_B, 2)),
        ("ViT-B/16, CPU, forward, s", 588.0, forward),
        ("ViT-B/16, CPU, moments, s", 59.4, moments),
        ("ResNet-50, CPU, solve, s", 57.6, CPU.phases(RESNET50)[2]),
        ("ResNet-18, H100, moments and solve, s", 2.9, sum(H100.phases(RESNET18)[1:3])),
    ]
    return [[what, f"{measured:.3g}", f"{said:.3g}", f"{said / measured - 1:+.0%}"] for what, measured, said in found]


def _resident(network: Network, copies: int = _COPIES) -> float:
    """GB of values, of copies of the weights, and of the largest moments."""
    return (network.value_bytes + copies * _FLOAT * network.weights + max(one.moments for one in network.layers)) / 1e9


def plan(network: Network) -> list[list[str]]:
    """What a network takes, on one GPU and on eight."""
    largest = max(network.layers, key=lambda layer: layer.moments)
    rows = max(layer.rows for layer in network.layers)
    moments = sum(layer.count * layer.moments for layer in network.layers)
    ring = 2 * (_GPUS - 1) / _GPUS * moments
    links = ", ".join(f"{ring / LINKS[name]:.2g} s by {name}" for name in ("NVLink", "PCIe", "InfiniBand"))
    moved = network.samples * network.moved * 2 * _FLOAT
    disk = moved / LINKS["NVMe, read"] + moved / LINKS["NVMe, write"]
    each = _bytes(network.value_bytes / network.samples)
    found = [
        ["weights, three float32 copies", _bytes(_COPIES * _FLOAT * network.weights)],
        ["values of both streams between stages", f"{_bytes(network.value_bytes)} ({each} a sample)"],
        ["moments of the largest layer", f"{_bytes(largest.moments)} ({largest.rows} x {largest.columns})"],
        ["its columns, of one stream", _bytes(_FLOAT * largest.taken * largest.columns * largest.groups)],
        ["second moments of derivatives, most rows", f"{_bytes(_FLOAT * rows**2)} ({rows})"],
        [f"moments of all layers, reduced over {_GPUS} GPUs", f"{_bytes(ring)} from each: {links}"],
        ["all values to a disk and back", f"{_bytes(moved)} each way: {_seconds(disk)}"],
    ]
    for devices in (1, _GPUS):
        forward, made, solve, whole = map(_seconds, H100.phases(network, devices))
        parts = f"forward {forward}, moments {made}, solve {solve}"
        found.append([f"time on {devices} H100", f"**{whole}** ({parts})"])
    return found


def _bytes(count: float) -> str:
    power = min(4, int(math.log(max(count, 1), 1000)))
    return f"{count / 1000**power:.3g} {('B', 'KB', 'MB', 'GB', 'TB')[power]}"


def _seconds(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def main() -> None:
    rates = [
        [device.name, *(f"{rate / 1e12:.3g}" for rate in (device.exact, device.quantized, device.products))]
        for device in DEVICES
    ]
    table(("TFLOP/s", "float pass", "quantized pass", "products of moments"), rates)
    print(f"\nsolutions: {VISITS:.0f} visits of every integer, and on an H100 {H100.per_layer:.2f} s for each layer\n")
    table(("what", "measured", "by formula", "off by"), checks())
    for network in NETWORKS:
        print()
        table((f"{network.name}: {network.weights / 1e6:,.0f} M weights, {network.samples} samples", ""), plan(network))


if __name__ == "__main__":
    main()
