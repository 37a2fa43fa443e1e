"""SVTR-LCNet, the text recognizer of PP-OCRv4, without its weights.

The backbone is PP-LCNetV3, the neck two of SVTR's blocks (Du et al. 2022, arXiv 2205.00159), the head one linear layer.
The file needs no more than `networks` does, so that the environments of other tools can build the network.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

from integration_tests.benchmarks.networks import TransformerBlock

__all__ = ["Recognizer"]


class Affine(nn.Module):
    """PP-LCNetV3's learnable affine block: one scale and one shift for all elements."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.shift = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class SqueezeExcitation(nn.Module):
    """Channels weighed by what their means say (Hu et al. 2018, arXiv 1709.01507): (n, channels, H, W) to the same."""

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce = nn.Conv2d(channels, channels // reduction, 1)
        self.relu = nn.ReLU()
        self.expand = nn.Conv2d(channels // reduction, channels, 1)
        self.gate = nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        weights: Tensor = self.gate(self.expand(self.relu(self.reduce(self.pool(x)))))
        return x * weights


def _activated(inputs: int, outputs: int, kernel: int, stride: tuple[int, int] = (1, 1), groups: int = 1) -> nn.Module:
    """A convolution of the backbone: its parallel branches and batch norms were merged into one when it was trained."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups)
    return nn.Sequential(convolution, Affine(), nn.Hardswish(), Affine())


def _separable(inputs: int, outputs: int, kernel: int, stride: tuple[int, int], attend: bool) -> nn.Module:
    """A depthwise and a pointwise convolution: (n, inputs, H, W) to (n, outputs, H / stride, W / stride)."""
    excitation = [SqueezeExcitation(inputs)] if attend else []
    depthwise = _activated(inputs, inputs, kernel, stride, groups=inputs)
    return nn.Sequential(depthwise, *excitation, _activated(inputs, outputs, 1))


def _normalized(inputs: int, outputs: int, kernel: tuple[int, int] = (1, 1)) -> nn.Module:
    """A convolution of the neck: with batch norm and SiLU, it keeps the size."""
    padding = (kernel[0] // 2, kernel[1] // 2)
    convolution = nn.Conv2d(inputs, outputs, kernel, padding=padding, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.SiLU())


class Attention(nn.Module):
    """Multi-head self-attention: (n, positions, width) to the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.softmax = nn.Softmax(3)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        # (n, positions, 3 width) to three of (n, heads, positions, width / heads)
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        weights = self.softmax(torch.matmul(q * self.scale, k.transpose(2, 3)))
        mixed = torch.matmul(weights, v).transpose(1, 2).flatten(2)
        projected: Tensor = self.proj(mixed)
        return projected


class Neck(nn.Module):
    """SVTR's global mixing of positions beside what enters it: (n, inputs, 1, positions) to (n, positions, width)."""

    def __init__(self, inputs: int, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.reduce = nn.Sequential(_normalized(inputs, inputs // 8, (1, 3)), _normalized(inputs // 8, width))
        self.blocks = nn.Sequential(
            *(TransformerBlock(width, Attention(width, heads), 2 * width, nn.SiLU()) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.expand = _normalized(width, inputs)
        self.fuse = nn.Sequential(_normalized(2 * inputs, inputs // 8, (1, 3)), _normalized(inputs // 8, width))

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.norm(self.blocks(self.reduce(x).squeeze(2).transpose(1, 2)))
        expanded = self.expand(mixed.transpose(1, 2).unsqueeze(2))
        fused: Tensor = self.fuse(torch.cat([x, expanded], 1))
        return fused.squeeze(2).transpose(1, 2)


class Recognizer(nn.Module):
    """SVTR-LCNet of PP-OCRv4: lines (n, 3, 48, W) to shares of characters (n, W / 8, classes), for CTC.

    The backbone is PP-LCNetV3, the neck two of SVTR's blocks (Du et al. 2022, arXiv 2205.00159), the head one linear
    layer. The backbone divides the height by 16 and the width by 4; the pooling leaves a height of 1. Modules are
    registered in the order in which they are called, which `load` relies on.
    """

    # of each pair of convolutions the input channels, the output channels, kernel, stride, and if it has attention
    STAGES: Final = (
        (16, 32, 3, (1, 1), False),
        (32, 64, 3, (1, 1), False),
        (64, 64, 3, (1, 1), False),
        (64, 128, 3, (2, 1), False),
        (128, 128, 3, (1, 1), False),
        (128, 240, 3, (1, 2), False),
        *4 * ((240, 240, 5, (1, 1), False),),
        (240, 480, 5, (2, 1), True),
        (480, 480, 5, (1, 1), True),
        (480, 480, 5, (2, 1), False),
        (480, 480, 5, (1, 1), False),
    )

    def __init__(self, classes: int = 6625) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, padding=1, bias=False), nn.BatchNorm2d(16))
        self.backbone = nn.Sequential(*(_separable(*stage) for stage in self.STAGES))
        self.pool = nn.AvgPool2d((3, 2))
        self.neck = Neck(480, 120, heads=8, depth=2)
        self.head = nn.Linear(120, classes)
        self.softmax = nn.Softmax(2)

    def forward(self, x: Tensor) -> Tensor:
        features = self.pool(self.backbone(self.stem(x)))
        shares: Tensor = self.softmax(self.head(self.neck(features)))
        return shares
