"""The quantization grid of one weight: the only place that knows broadcasting and makes integers.

`w^ = (q - zero_point) * scale` with integers `quant_min <= q <= quant_max`. With a symmetric scheme and
zero point 0 this is equation 22 of the AdaRound paper (arXiv 2004.10568), whose clipping bounds n and p are
`quant_min` and `quant_max`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from adaround_plugin.errors import InvalidOptionError

__all__ = ["Grid", "GridSpec", "check_bits", "integer_range", "is_symmetric_by_default", "same_grid"]


def check_bits(bits: int, argument: str = "bits") -> int:
    """Return `bits`, or raise `InvalidOptionError` naming `argument` unless it is an integer in 2..8."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise InvalidOptionError(argument, f"{bits!r} is not a bit width", "Pass an integer from 2 to 8.")
    return bits


def integer_range(bits: int) -> tuple[int, int]:
    """`(quant_min, quant_max)` of signed `bits`-bit integers: `[-2^(b-1), 2^(b-1) - 1]`."""
    check_bits(bits)
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def is_symmetric_by_default(bits: int) -> bool:
    """Whether grids of so many bits have their zero point at 0 where either will do.

    With 4 or 8 integers a row that lies off 0 wastes too many of them (docs/benchmarks.md).
    """
    return bits > 3


@dataclass(frozen=True)
class GridSpec:
    """A grid whose scale and zero point are still to be chosen.

    Attributes:
        quant_min, quant_max: inclusive integer range.
        ch_axis: axis of the weight that the scale runs along; None when per tensor.
        symmetric: whether the zero point is pinned to 0.
        dtype: the dtype the host stores the integers in, for example `torch.qint8`.
        group_size: entries of a row of a matrix `(out, in)` that share a scale; the last group of a row may be
            smaller. None where a channel has one scale.
        scale_dtype: every scale is rounded to a number of this dtype, for hosts that store scales so.
    """

    quant_min: int
    quant_max: int
    ch_axis: int | None
    symmetric: bool
    dtype: torch.dtype
    group_size: int | None = field(default=None, kw_only=True)
    scale_dtype: torch.dtype = field(default=torch.float32, kw_only=True)

    @property
    def bits(self) -> int:
        """Smallest bit width that holds the integer range."""
        return (self.quant_max - self.quant_min).bit_length()

    @property
    def qscheme(self) -> torch.qscheme:
        """The scheme's name in torch."""
        if self.ch_axis is None:
            return torch.per_tensor_symmetric if self.symmetric else torch.per_tensor_affine
        return torch.per_channel_symmetric if self.symmetric else torch.per_channel_affine

    def at(self, scale: Tensor, zero_point: Tensor) -> Grid:
        """The grid with this scale and zero point, each `()` or `(channels,)`."""
        # the smallest number of a narrow dtype is the least scale it can tell from 0
        least = 0.0 if self.scale_dtype == torch.float32 else torch.finfo(self.scale_dtype).smallest_normal
        scale = scale.clamp_min(least).to(self.scale_dtype).float()
        return Grid(
            self.quant_min,
            self.quant_max,
            self.ch_axis,
            self.symmetric,
            self.dtype,
            scale,
            zero_point.long(),
            group_size=self.group_size,
            scale_dtype=self.scale_dtype,
        )

    def expand(self, values: Tensor, shape: torch.Size) -> Tensor:
        """Broadcast per-channel `values` (`()` or `(channels,)`) to a weight of `shape`."""
        if self.group_size is not None:
            return values.reshape(shape[0], -1).repeat_interleave(self.group_size, 1)[:, : shape[1]]
        if self.ch_axis is not None:
            view = [1] * len(shape)
            view[self.ch_axis] = -1
            values = values.view(view)
        return values.expand(shape)

    def channels(self, weight: Tensor) -> Tensor:
        """Lay a weight out as `(channels, elements)`; one channel when per tensor, one per group and row when grouped.

        A group that is smaller than the others is filled up with zeros, which no grid rounds.
        """
        if self.group_size is not None:
            return F.pad(weight, (0, -weight.shape[1] % self.group_size)).reshape(-1, self.group_size)
        if self.ch_axis is None:
            return weight.reshape(1, -1)
        return weight.movedim(self.ch_axis, 0).reshape(weight.shape[self.ch_axis], -1)

    def per_channel(self, values: Tensor) -> Tensor:
        """Give `(channels,)` values the shape of a scale: `()` when per tensor."""
        return values.reshape(()) if self.ch_axis is None else values

    def choose(self, where: Tensor, grid: Grid, other: Grid) -> Grid:
        """`grid` on the channels where `(channels,)` `where` holds, `other` elsewhere."""
        where = self.per_channel(where)
        return self.at(
            torch.where(where, grid.scale, other.scale), torch.where(where, grid.zero_point, other.zero_point)
        )


@dataclass(frozen=True)
class Grid(GridSpec):
    """Scale, zero point and integer range of one weight.

    Attributes:
        scale: float32, shape `()` (per tensor) or `(channels,)` (per channel; row by row, group by group), positive.
        zero_point: int64, the shape of `scale`; all zero for a symmetric scheme.
    """

    scale: Tensor
    zero_point: Tensor

    def coordinates(self, weight: Tensor) -> Tensor:
        """Real-valued grid coordinates `w / scale + zero_point`, float64, unclipped."""
        scale, zero_point = self.expand(self.scale, weight.shape), self.expand(self.zero_point, weight.shape)
        return weight.double() / scale.double() + zero_point

    def nearest(self, weight: Tensor) -> Tensor:
        """Round to the nearest grid point: int64 integers of the weight's shape, inside the range."""
        return self.coordinates(weight).round().clamp(self.quant_min, self.quant_max).long()

    def dequantize(self, integers: Tensor) -> Tensor:
        """`(q - zero_point) * scale` in float32: the weight that every host quantizes back to exactly `q`."""
        scale, zero_point = self.expand(self.scale, integers.shape), self.expand(self.zero_point, integers.shape)
        return (integers - zero_point).float() * scale


def same_grid(one: Grid, other: Grid) -> bool:
    """Whether two grids have the same points."""
    return (
        (one.quant_min, one.quant_max, one.ch_axis, one.dtype, one.group_size)
        == (other.quant_min, other.quant_max, other.ch_axis, other.dtype, other.group_size)
        and torch.equal(one.scale, other.scale)
        and torch.equal(one.zero_point, other.zero_point)
    )
