"""The benchmark networks: three small glyph classifiers with checkpoints, and the ResNet-18 of ImageNet's size.

Each is traceable by ``torch.fx``: no control flow in ``forward`` depends on the input, and each activation is a
module of its own.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from integration_tests.benchmarks.glyphs import CLASSES, IMAGE_SIZE

CHECKPOINTS: Final = Path(__file__).parent / "checkpoints"


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (n, inputs, H, W) to (n, outputs, H / stride, W / stride)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.downsample: nn.Sequential | None = None
        if stride != 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        shortcut = x if self.downsample is None else self.downsample(x)
        activated: Tensor = self.relu2(y + shortcut)
        return activated


def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    """Chain basic blocks, the first of which has the stride."""
    first = BasicBlock(inputs, outputs, stride)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)))


class ResNet20(nn.Module):
    """ResNet-20 as for CIFAR, with projection shortcuts: (n, 1, H, W) to logits (n, classes)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = _stage(16, 16, 3, 1)
        self.layer2 = _stage(16, 32, 3, 2)
        self.layer3 = _stage(32, 64, 3, 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits


def conv_bn(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, dilation: int = 1
) -> list[nn.Module]:
    """Return a convolution that keeps the size, but for the stride, and its batch norm."""
    padding = dilation * (kernel // 2)
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, bias=False)
    return [convolution, nn.BatchNorm2d(outputs)]


class InvertedResidual(nn.Module):
    """Expand, filter depthwise, project: (n, inputs, H, W) to (n, outputs, H / stride, W / stride)."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int, dilation: int = 1) -> None:
        super().__init__()
        hidden = inputs * expansion
        expand = [*conv_bn(inputs, hidden, 1), nn.ReLU6()] if expansion != 1 else []
        depthwise = [*conv_bn(hidden, hidden, 3, stride, hidden, dilation), nn.ReLU6()]
        self.conv = nn.Sequential(*expand, *depthwise, *conv_bn(hidden, outputs, 1))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return x + y if self.residual else y


class MobileNet(nn.Module):
    """MobileNetV2, scaled down: (n, 1, H, W) to logits (n, classes).

    Args:
        classes: Number of logits.
        stages: Of each stage the expansion, the channels, the number of blocks and the first block's stride.
        features: Channels of the last convolution.
    """

    def __init__(self, classes: int, stages: Sequence[tuple[int, int, int, int]], features: int) -> None:
        super().__init__()
        channels = 16
        layers = [*conv_bn(1, channels, 3, 2), nn.ReLU6()]
        for expansion, outputs, blocks, stride in stages:
            for block in range(blocks):
                layers.append(InvertedResidual(channels, outputs, stride if block == 0 else 1, expansion))
                channels = outputs
        self.features = nn.Sequential(*layers, *conv_bn(channels, features, 1), nn.ReLU6())
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))
        return logits


class Attention(nn.Module):
    """Multi-head self-attention in plain operations: (n, tokens, width) to the same shape."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (width // heads) ** -0.5
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.softmax = nn.Softmax(dim=-1)
        self.proj = nn.Linear(width, width)

    def _split(self, x: Tensor) -> Tensor:
        """Split the width into heads: (n, tokens, width) to (n, heads, tokens, width / heads)."""
        return torch.unflatten(x, 2, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._split(self.q(x)), self._split(self.k(x)), self._split(self.v(x))
        weights = self.softmax(torch.matmul(q, k.transpose(2, 3)) * self.scale)
        mixed = torch.matmul(weights, v).transpose(1, 2).flatten(2)
        projected: Tensor = self.proj(mixed)
        return projected


class TransformerBlock(nn.Module):
    """Attention and a two-layer perceptron, each after a layer norm: (n, tokens, width) to the same shape."""

    def __init__(self, width: int, attention: nn.Module, hidden: int, activation: nn.Module) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = attention
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), activation, nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class VisionTransformer(nn.Module):
    """A small ViT that averages its tokens: (n, 1, IMAGE_SIZE, IMAGE_SIZE) to logits (n, classes).

    A few small convolutions embed the patches of 4 by 4 pixels, as in "Early Convolutions Help Transformers See
    Better": training takes several times fewer steps than with a single one.
    """

    def __init__(self, classes: int, stem: int, width: int, heads: int, hidden: int, depth: int) -> None:
        super().__init__()
        first = [*conv_bn(1, stem, 3, 2), nn.ReLU()]
        second = [*conv_bn(stem, 2 * stem, 3), nn.ReLU()]
        third = [*conv_bn(2 * stem, width, 3, 2), nn.ReLU()]
        self.patches = nn.Sequential(*first, *second, *third, nn.Conv2d(width, width, 1))
        self.positions = nn.Parameter(torch.zeros(1, (IMAGE_SIZE // 4) ** 2, width))
        self.blocks = nn.Sequential(
            *(TransformerBlock(width, Attention(width, heads), hidden, nn.GELU()) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        logits: Tensor = self.head(self.norm(self.blocks(x)).mean(1))
        return logits


def resnet20() -> ResNet20:
    """Build the untrained ResNet-20 of the glyphs."""
    return ResNet20(len(CLASSES))


def mobilenet() -> MobileNet:
    """Build the untrained MobileNetV2 of the glyphs."""
    stages = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 3, 2))
    return MobileNet(len(CLASSES), stages, 192)


def vit() -> VisionTransformer:
    """Build the untrained vision transformer of the glyphs."""
    return VisionTransformer(len(CLASSES), stem=16, width=64, heads=4, hidden=128, depth=4)


BUILDERS: Final[dict[str, Callable[[], nn.Module]]] = {
    "resnet20": resnet20,
    "mobilenet": mobilenet,
    "vit": vit,
}


def load(name: str) -> nn.Module:
    """Return one of the glyph networks in eval mode, with its committed checkpoint."""
    network = BUILDERS[name]()
    network.load_state_dict(load_file(CHECKPOINTS / f"{name}.safetensors"))
    return network.eval()
