"""Which operations pass a positive scale of each channel on, and where they leave the channels.

An operation that works on each channel alone and has `f(s x) = s f(x)` for every `s > 0` passes it on exactly: ReLU and
its leaky relatives, poolings, padding with zeros, resizing, and what only renames positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from adaround_plugin.graph.arguments import argument
from adaround_plugin.graph.compat import Dropout

__all__ = ["Channels", "cap_of", "is_elementwise", "passed"]


@dataclass(frozen=True)
class Channels:
    """Where the channels of a layer are in a value.

    Attributes:
        axis: of the value, from the front.
        repeat: how many neighbouring entries of the axis belong to one channel.
    """

    axis: int
    repeat: int = 1


_ELEMENTWISE_MODULES = {nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Identity}
_ELEMENTWISE_FUNCTIONS = {torch.relu, torch.relu_, F.relu, F.relu_, F.leaky_relu, F.leaky_relu_, F.prelu, torch.prelu}
_ELEMENTWISE_METHODS = {"relu", "relu_", "prelu", "contiguous", "clone", "detach"}
_ELEMENTWISE: set[Any] = _ELEMENTWISE_FUNCTIONS | _ELEMENTWISE_METHODS
_DROPOUTS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout}
_RESHAPE_FUNCTIONS = {torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze}
_RESHAPE_METHODS = {"flatten", "view", "reshape", "squeeze", "unsqueeze"}
_RESHAPES: set[Any] = {nn.Flatten, nn.Unflatten} | _RESHAPE_FUNCTIONS | _RESHAPE_METHODS
_MEANS: set[Any] = {torch.mean, "mean"}
_RESIZES: set[Any] = {F.interpolate, nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d}
_POOLS = ("MaxPool", "AvgPool", "AdaptiveMaxPool", "AdaptiveAvgPool")
_PADS = ("ZeroPad", "ReflectionPad", "ReplicationPad", "CircularPad")
_FUNCTIONAL_POOLS = ("max_pool", "avg_pool", "adaptive_max_pool", "adaptive_avg_pool")
# how many axes at the end each of these works over; a maximum pads with -inf, which scales too
_SPATIAL: dict[Any, int] = {
    getattr(owner, f"{kind}{dims}d"): dims
    for owner, kinds in {nn: _POOLS + _PADS, F: _FUNCTIONAL_POOLS, torch: ("max_pool",)}.items()
    for kind in kinds
    for dims in (1, 2, 3)
}


def is_elementwise(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether `node` is a positively homogeneous function of each element: of the ReLU family, or the identity."""
    if module is not None:
        return type(module) in _ELEMENTWISE_MODULES or isinstance(module, Dropout)
    if node.target in _DROPOUTS:
        return argument(node, 2, "training", True) is False
    if node.target is torch.dropout:
        return argument(node, 2, "train", True) is False
    return node.target in _ELEMENTWISE


def cap_of(module: nn.Module | None) -> float | None:
    """The upper limit of a module that clips to `[0, limit]`, such as 6 of ReLU6; None if it is none."""
    if isinstance(module, nn.Hardtanh) and type(module) in (nn.ReLU6, nn.Hardtanh) and module.min_val == 0:
        return module.max_val
    return None


def passed(
    node: fx.Node, module: nn.Module | None, before: torch.Size, after: torch.Size, channels: Channels
) -> Channels | None:
    """Where the channels are after an operation, or None if it does not pass their scales on.

    Args:
        node: the operation; its first argument is the value with the channels.
        module: what it calls, if it calls a module.
        before, after: shapes of that value and of the result.
        channels: where they are in that value.
    """
    operation: Any = node.target if module is None else type(module)
    positions = len(before) - channels.axis - 1
    if is_elementwise(node, module):
        return channels
    if operation in _RESHAPES:
        return _reshaped(before, after, channels)
    if operation in _SPATIAL:
        return channels if positions >= _SPATIAL[operation] else None
    if operation in _RESIZES:
        return channels if channels.axis == 1 else None
    if operation in _MEANS:
        axes = argument(node, 1, "dim")
        return channels if _are_positions(axes, len(before), channels.axis) else None
    if operation is F.pad:
        padding = argument(node, 1, "pad")
        is_zero = argument(node, 2, "mode", "constant") != "constant" or not argument(node, 3, "value")
        return channels if is_zero and isinstance(padding, tuple | list) and len(padding) <= 2 * positions else None
    return None


def _reshaped(before: torch.Size, after: torch.Size, channels: Channels) -> Channels | None:
    """Channels after a reshape, which keeps the row-major order: in their axis, or flattened with the positions."""
    axis = channels.axis
    if len(after) <= axis or after[:axis] != before[:axis]:
        return None
    if after[axis] == before[axis]:
        return channels
    positions = math.prod(before[axis + 1 :])
    if len(after) == axis + 1 and after[axis] == before[axis] * positions:
        return replace(channels, repeat=channels.repeat * positions)
    return None


def _are_positions(axes: Any, dims: int, channel_axis: int) -> bool:
    """Whether all of `axes` come after the channels'."""
    axes = [axes] if isinstance(axes, int) else axes
    if not isinstance(axes, tuple | list) or not axes:
        return False
    return all(isinstance(axis, int) and axis % dims > channel_axis for axis in axes)
