"""A segmentation network in the manner of DeepLabV3+ with a MobileNetV2 backbone, for the scenes of glyphs."""

from typing import Final

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from integration_tests.benchmarks.networks import CHECKPOINTS, InvertedResidual, conv_bn
from integration_tests.benchmarks.scenes import CLASSES, SCENE_SIZE

_STRIDE: Final = 4  # of the backbone's output against the scene
_WIDTH: Final = 32  # channels of a branch of the pyramid


class Pyramid(nn.Module):
    """Atrous spatial pyramid pooling: (n, inputs, H, W) to (n, outputs, H, W), H = W = SCENE_SIZE / 4.

    A pointwise convolution, two dilated ones and the image's mean side by side, then projected.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.point = nn.Sequential(*conv_bn(inputs, _WIDTH, 1), nn.ReLU6())
        self.near = nn.Sequential(*conv_bn(inputs, _WIDTH, 3, dilation=2), nn.ReLU6())
        self.far = nn.Sequential(*conv_bn(inputs, _WIDTH, 3, dilation=4), nn.ReLU6())
        self.image = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), *conv_bn(inputs, _WIDTH, 1), nn.ReLU6(), nn.Upsample(size=SCENE_SIZE // _STRIDE)
        )
        self.project = nn.Sequential(*conv_bn(4 * _WIDTH, outputs, 1), nn.ReLU6())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.project(torch.cat([self.point(x), self.near(x), self.far(x), self.image(x)], 1))
        return y


class Segmenter(nn.Module):
    """Backbone with dilation, pyramid, and a decoder that sees features of half the scene's size.

    Images (n, 1, SCENE_SIZE, SCENE_SIZE) to logits (n, CLASSES, SCENE_SIZE, SCENE_SIZE).
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_bn(1, 16, 3, 2), nn.ReLU6(), InvertedResidual(16, 16, 1, 1))
        self.backbone = nn.Sequential(
            InvertedResidual(16, 24, 2, 6),
            InvertedResidual(24, 24, 1, 6),
            InvertedResidual(24, 40, 1, 6),
            InvertedResidual(40, 40, 1, 6),
            InvertedResidual(40, 48, 1, 6, dilation=2),
            InvertedResidual(48, 48, 1, 6, dilation=2),
        )
        self.pyramid = Pyramid(48, 48)
        self.enlarge = nn.Upsample(scale_factor=2, mode="bilinear")
        self.detail = nn.Sequential(*conv_bn(16, 12, 1), nn.ReLU6())
        self.decoder = nn.Sequential(*conv_bn(48 + 12, 32, 3), nn.ReLU6(), nn.Conv2d(32, CLASSES, 1))
        self.resize = nn.Upsample(scale_factor=2, mode="bilinear")

    def forward(self, x: Tensor) -> Tensor:
        detail = self.stem(x)
        y = self.enlarge(self.pyramid(self.backbone(detail)))
        logits: Tensor = self.resize(self.decoder(torch.cat([y, self.detail(detail)], 1)))
        return logits


def load() -> Segmenter:
    """Return the segmentation network in eval mode, with its committed checkpoint."""
    network = Segmenter()
    network.load_state_dict(load_file(CHECKPOINTS / "segmenter.safetensors"))
    return network.eval()
