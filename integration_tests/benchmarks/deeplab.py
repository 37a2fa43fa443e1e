"""DeepLabV3+ with a MobileNetV2 backbone (Chen et al. 2018, arXiv 1802.02611; Sandler et al. 2018, arXiv 1801.04381).

The segmentation network of AdaRound's experiment on Pascal VOC, output stride 16. torchvision has none. The public
PyTorch port whose VOC checkpoint AIMET uses (jfzhang95/pytorch-deeplab-xception) deviates from the paper in three ways,
which `port=True` repeats, and has other names, which `from_state_dict` translates:

- 3x3 convolutions of pyramid and decoder are whole, not separable;
- a block pads its input, ahead of the expansion, whose bias and ReLU6 then act on the border as well;
- the dilation is that of a stage: all blocks of a stage whose stride is undone keep the dilation before it.
"""

import re
from collections.abc import Mapping
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CLASSES", "DeepLabV3Plus", "from_state_dict"]

CLASSES: Final = 21  # of Pascal VOC, background included

_OUTPUT_STRIDE: Final = 16
_RATES: Final = (6, 12, 18)  # of the pyramid, for output stride 16 (1802.02611, section 3.1)
_WIDTH: Final = 256  # channels of pyramid and decoder
_LOW_LEVEL: Final = 48  # channels of the low-level features in the decoder (1802.02611, table 1)
_LOW_LEVEL_BLOCKS: Final = 4  # the backbone's blocks up to stride 4
# expansion, channels, blocks, stride of each stage (1801.04381, table 2)
_STAGES: Final = (
    *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)),
    *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
)


def conv_bn(
    inputs: int, outputs: int, kernel: int, stride: int = 1, dilation: int = 1, groups: int = 1
) -> list[nn.Module]:
    """A convolution that keeps the size, but for the stride, and its batch norm."""
    padding = dilation * (kernel // 2)
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, bias=False)
    return [convolution, nn.BatchNorm2d(outputs)]


class Block(nn.Module):
    """MobileNetV2's inverted residual: (n, inputs, H, W) to (n, outputs, H / stride, W / stride)."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int, dilation: int, pad_first: bool) -> None:
        super().__init__()
        hidden = inputs * expansion
        expand = [*conv_bn(inputs, hidden, 1), nn.ReLU6()] if expansion > 1 else []
        depthwise = nn.Conv2d(
            *(hidden, hidden, 3, stride, 0 if pad_first else dilation, dilation), groups=hidden, bias=False
        )
        self.conv = nn.Sequential(*expand, depthwise, nn.BatchNorm2d(hidden), nn.ReLU6(), *conv_bn(hidden, outputs, 1))
        self.padding = dilation if pad_first else 0
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(F.pad(x, [self.padding] * 4) if self.padding else x)
        return x + y if self.residual else y


def _backbone(port: bool) -> tuple[nn.Sequential, nn.Sequential]:
    """MobileNetV2: (n, 3, H, W) to (n, 24, H / 4, W / 4), and these to (n, 320, H / 16, W / 16).

    Past the output stride, strides become dilations of what follows.
    """
    blocks: list[nn.Module] = [nn.Sequential(*conv_bn(3, 32, 3, 2), nn.ReLU6())]
    inputs, reached, dilation = 32, 2, 1
    for expansion, outputs, count, stride in _STAGES:
        undone = reached * stride > _OUTPUT_STRIDE
        reached *= 1 if undone else stride
        widened = dilation * (stride if undone else 1)
        for index in range(count):
            first = index == 0
            rate = dilation if first or port else widened
            blocks.append(Block(inputs, outputs, expansion, stride if first and not undone else 1, rate, port))
            inputs = outputs
        dilation = widened
    return nn.Sequential(*blocks[:_LOW_LEVEL_BLOCKS]), nn.Sequential(*blocks[_LOW_LEVEL_BLOCKS:])


def _filtered(inputs: int, dilation: int, port: bool) -> list[nn.Module]:
    """A 3x3 convolution to `_WIDTH` channels with batch norm and ReLU, atrous separable unless `port`."""
    if port:
        return [*conv_bn(inputs, _WIDTH, 3, dilation=dilation), nn.ReLU()]
    depthwise = conv_bn(inputs, inputs, 3, groups=inputs, dilation=dilation)
    return [*depthwise, nn.ReLU(), *conv_bn(inputs, _WIDTH, 1), nn.ReLU()]


class Pyramid(nn.Module):
    """Atrous spatial pyramid pooling: (n, inputs, H, W) to (n, 256, H, W)."""

    def __init__(self, inputs: int, port: bool) -> None:
        super().__init__()
        point = nn.Sequential(*conv_bn(inputs, _WIDTH, 1), nn.ReLU())
        self.branches = nn.ModuleList([point, *(nn.Sequential(*_filtered(inputs, rate, port)) for rate in _RATES)])
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), *conv_bn(inputs, _WIDTH, 1), nn.ReLU())
        self.project = nn.Sequential(*conv_bn(_WIDTH * (len(self.branches) + 1), _WIDTH, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        image = _resized(self.pool(x), x)
        y: Tensor = self.project(torch.cat([*(branch(x) for branch in self.branches), image], 1))
        return y


class Decoder(nn.Module):
    """Pyramid (n, 256, h, w) and low-level features (n, inputs, H, W) to logits (n, classes, H, W)."""

    def __init__(self, inputs: int, classes: int, port: bool) -> None:
        super().__init__()
        self.reduce = nn.Sequential(*conv_bn(inputs, _LOW_LEVEL, 1), nn.ReLU())
        self.refine = nn.Sequential(*_filtered(_WIDTH + _LOW_LEVEL, 1, port), *_filtered(_WIDTH, 1, port))
        self.classify = nn.Conv2d(_WIDTH, classes, 1)

    def forward(self, x: Tensor, low_level: Tensor) -> Tensor:
        low_level = self.reduce(low_level)
        logits: Tensor = self.classify(self.refine(torch.cat([_resized(x, low_level), low_level], 1)))
        return logits


class DeepLabV3Plus(nn.Module):
    """Images (n, 3, H, W) to logits (n, classes, H, W).

    Args:
        classes: background included.
        port: the network of the public PyTorch port instead of the paper's.
    """

    def __init__(self, classes: int = CLASSES, port: bool = False) -> None:
        super().__init__()
        self.low_level, self.high_level = _backbone(port)
        self.pyramid = Pyramid(320, port)
        self.decoder = Decoder(24, classes, port)

    def forward(self, x: Tensor) -> Tensor:
        low_level = self.low_level(x)
        logits = self.decoder(self.pyramid(self.high_level(low_level)), low_level)
        return _resized(logits, x)


def _resized(x: Tensor, like: Tensor) -> Tensor:
    """`x` at the height and width of `like`, corners aligned, as in the paper's own code."""
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=True)


# the port's names, each with ours
_PORT_NAMES: Final = {
    **{"backbone.low_level_features": "low_level", "backbone.high_level_features": "high_level"},
    **{f"aspp.aspp{index + 1}.atrous_conv": f"pyramid.branches.{index}.0" for index in range(4)},
    **{f"aspp.aspp{index + 1}.bn": f"pyramid.branches.{index}.1" for index in range(4)},
    **{"aspp.global_avg_pool": "pyramid.pool", "aspp.conv1": "pyramid.project.0", "aspp.bn1": "pyramid.project.1"},
    **{"decoder.conv1": "decoder.reduce.0", "decoder.bn1": "decoder.reduce.1"},
    **{"decoder.last_conv.0": "decoder.refine.0", "decoder.last_conv.1": "decoder.refine.1"},
    **{"decoder.last_conv.4": "decoder.refine.3", "decoder.last_conv.5": "decoder.refine.4"},
    "decoder.last_conv.8": "decoder.classify",
}
# where the port has both parts of the backbone once more
_PORT_TWICE: Final = "backbone.features."


def from_state_dict(state: Mapping[str, Tensor]) -> tuple[DeepLabV3Plus, dict[str, Tensor]]:
    """The network that `state` belongs to, with fresh weights, and `state` in its names."""
    port = any(name.startswith("backbone.low_level_features.") for name in state)
    if port:
        prefix = re.compile(rf"^({'|'.join(map(re.escape, _PORT_NAMES))})(?=\.)")
        state = {
            prefix.sub(lambda match: _PORT_NAMES[match[1]], name): value
            for name, value in state.items()
            if not name.startswith(_PORT_TWICE)
        }
    head = state.get("decoder.classify.weight")
    return DeepLabV3Plus(CLASSES if head is None else len(head), port), dict(state)
