"""What a linear operator does to its weight: rows, groups and the design matrix.

Convolutions (1-d to 3-d, transposed, grouped, dilated, every padding mode) and linear layers are linear in their
weight: for one output position, `y = W x` with `x` the patch of the input under the kernel. `LinearOp` gives
`W` as `(groups, rows, columns)` and the patches, a *column* of the design matrix each, at any subset of the output
positions, gathered straight from the input: no unfolded copy of the whole input is made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["LinearOp"]


@dataclass(frozen=True)
class LinearOp:
    """A linear or convolutional operator, seen from its weight.

    Attributes:
        kind: `"linear"`, `"conv"` or `"conv_transpose"`.
        stride, dilation, output_padding: one entry per spatial dimension; empty for a linear layer.
        padding: `(before, after)` per spatial dimension.
        padding_mode: as in `torch.nn.Conv2d`.
        groups: number of groups of the convolution.
    """

    kind: Literal["linear", "conv", "conv_transpose"]
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    output_padding: tuple[int, ...] = ()
    padding_mode: str = "zeros"
    groups: int = 1

    @property
    def output_axis(self) -> int:
        """The axis of the weight that runs over output channels (of one group, when transposed)."""
        return 1 if self.kind == "conv_transpose" else 0

    def rows(self, weight: Tensor) -> Tensor:
        """Lay a weight (or anything of its shape) out as `(groups, rows, columns)`; a row makes one output."""
        if self.kind == "conv_transpose":
            inputs, outputs = weight.shape[:2]
            grouped = weight.reshape(self.groups, inputs // self.groups, outputs, -1)
            return grouped.transpose(1, 2).reshape(self.groups, outputs, -1)
        return weight.reshape(self.groups, weight.shape[0] // self.groups, -1)

    def unrows(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """Inverse of `rows`: back to the weight's own `shape`."""
        if self.kind == "conv_transpose":
            inputs, outputs = shape[:2]
            grouped = rows.reshape(self.groups, outputs, inputs // self.groups, -1)
            return grouped.transpose(1, 2).reshape(shape)
        return rows.reshape(shape)

    def outputs(self, per_row: Tensor) -> Tensor:
        """`(groups, rows)` values as one vector over the output channels, in the bias's order."""
        return per_row.reshape(-1)

    def outputs_at(self, y: Tensor, weight_shape: torch.Size, sample: Tensor, position: Tensor) -> Tensor:
        """Outputs of chosen columns: what `rows` gives for the patches that `Patches.columns` takes at the same place.

        Args:
            y: the operator's output: `(N, C, *spatial)` or `(C, *spatial)`; `(N, ..., out)` or `(out,)` if linear.
            weight_shape: shape of the operator's weight.
            sample, position: `(n,)` each.

        Returns:
            `(groups, n, rows)`.
        """
        if self.kind == "linear":
            y = y.reshape(1, 1, 1, -1) if y.dim() == 1 else y.reshape(y.shape[0], prod(y.shape[1:-1]), 1, y.shape[-1])
        else:
            y = y if y.dim() == len(weight_shape) else y.unsqueeze(0)
            y = y.reshape(y.shape[0], self.groups, y.shape[1] // self.groups, prod(y.shape[2:])).permute(0, 3, 1, 2)
        return y[sample, position].transpose(0, 1)

    def accepts(self, x: Tensor, weight_shape: torch.Size) -> bool:
        """Whether an input's dimensions and channels fit a weight of this shape, and the kernel has a place in it."""
        if self.kind == "linear":
            return x.dim() >= 1 and x.shape[-1] == weight_shape[1]
        spatial = len(weight_shape) - 2
        channels = weight_shape[0] if self.kind == "conv_transpose" else weight_shape[1] * self.groups
        if x.dim() not in (spatial + 1, spatial + 2) or x.shape[-spatial - 1] != channels:
            return False
        return all(self._fits(i, size, weight_shape[2 + i]) for i, size in enumerate(x.shape[-spatial:]))

    def _fits(self, i: int, size: int, kernel: int) -> bool:
        """Whether a spatial dimension of this size is long enough."""
        reach, around = self.dilation[i] * (kernel - 1) + 1, self.padding[i]
        if self.kind == "conv_transpose":
            return size > 0 and (size - 1) * self.stride[i] + reach + self.output_padding[i] > sum(around)
        # a reflection leaves the edge out, a turn takes each entry once
        most = {"reflect": size - 1, "circular": size}.get(self.padding_mode, max(around))
        return size > 0 and size + sum(around) >= reach and max(around) <= most

    def patches(self, x: Tensor, weight_shape: torch.Size) -> Patches:
        """The design matrix of input `x`, not yet materialized.

        Args:
            x: the operator's input: `(N, C, *spatial)` or `(C, *spatial)`; `(N, ..., in)` or `(in,)` if linear.
            weight_shape: shape of the operator's weight.
        """
        if self.kind == "linear":
            x = x.reshape(1, 1, -1) if x.dim() == 1 else x.reshape(x.shape[0], prod(x.shape[1:-1]), x.shape[-1])
            return Patches(x.transpose(1, 2), (1,), (1,), (1,), 1)
        kernel = tuple(weight_shape[2:])
        if x.dim() == len(kernel) + 1:
            x = x.unsqueeze(0)
        if self.kind == "conv" and self.padding_mode == "zeros":
            return Patches(x.contiguous(), kernel, self.stride, self.dilation, self.groups, self.padding)
        x, stride = self._padded(x, kernel)
        # a transposed convolution is the correlation of its zero-stuffed input with the mirrored kernel
        return Patches(x, kernel, stride, self.dilation, self.groups, mirrored=self.kind == "conv_transpose")

    def _padded(self, x: Tensor, kernel: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...]]:
        """Pad `x` so that the operator is a plain correlation; returns it with the correlation's stride."""
        if self.kind == "conv":
            flat = [side for before_after in reversed(self.padding) for side in before_after]
            return F.pad(x, flat, mode=self.padding_mode).contiguous(), self.stride
        # transposed: input i lands at i * stride + dilation * (kernel - 1) - padding
        spatial = len(kernel)
        before = [self.dilation[i] * (kernel[i] - 1) - self.padding[i][0] for i in range(spatial)]
        after = [
            self.dilation[i] * (kernel[i] - 1) - self.padding[i][1] + self.output_padding[i] for i in range(spatial)
        ]
        spread = [(x.shape[2 + i] - 1) * self.stride[i] + 1 for i in range(spatial)]
        stuffed = x.new_zeros(x.shape[0], x.shape[1], *spread)
        spread_at: tuple[Any, ...] = (..., *(slice(None, None, step) for step in self.stride))
        stuffed[spread_at] = x
        flat = [side for i in reversed(range(spatial)) for side in (before[i], after[i])]
        return F.pad(stuffed, flat).contiguous(), (1,) * spatial


@dataclass(frozen=True)
class Patches:
    """Patches of an input under a kernel that moves over it.

    Attributes:
        x: `(N, C, *spatial)`.
        kernel, stride, dilation: one entry per spatial dimension.
        groups: of channels, each with patches of its own.
        padding: zeros `(before, after)` per spatial dimension that are not in `x`.
        mirrored: whether the kernel is taken from its end.
    """

    x: Tensor
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding: tuple[tuple[int, int], ...] = ()
    mirrored: bool = False

    @property
    def samples(self) -> int:
        """Length of the input's leading axis."""
        return self.x.shape[0]

    @property
    def _sizes(self) -> tuple[int, ...]:
        """Output positions per spatial dimension."""
        return tuple(
            (size + sum(around) - dilation * (kernel - 1) - 1) // stride + 1
            for size, around, dilation, kernel, stride in zip(
                self.x.shape[2:], self._around, self.dilation, self.kernel, self.stride, strict=True
            )
        )

    @property
    def _around(self) -> tuple[tuple[int, int], ...]:
        return self.padding or ((0, 0),) * len(self.kernel)

    @property
    def positions(self) -> int:
        """Output positions per entry of the leading axis."""
        return prod(self._sizes)

    @property
    def row_length(self) -> int:
        """Entries of one column in one group: weights of an output channel."""
        return self.x.shape[1] // self.groups * prod(self.kernel)

    @property
    def geometry(self) -> tuple[int, int, int, int, str]:
        """All that the choice of columns asks for: the same of any two operators that may take the same ones."""
        return self.samples, self.positions, self.row_length, self.groups, str(self.x.device)

    @property
    def _takes_values_alone(self) -> bool:
        """Whether a column is what stands at one position, as the tokens of a linear layer."""
        return self.kernel == (1,) and self.stride == (1,) and self.groups == 1 and not any(map(any, self._around))

    def columns(self, sample: Tensor, position: Tensor) -> Tensor:
        """Materialize chosen columns.

        Args:
            sample: `(n,)` indices into the leading axis.
            position: `(n,)` flat indices of output positions.

        Returns:
            `(groups, n, columns)`: for each group the patches as rows, in the order of `LinearOp.rows`.
        """
        if self._takes_values_alone and self.x.stride(1) == 1:
            values = self.x.transpose(1, 2).reshape(-1, self.row_length)
            if self.samples > 1 or len(sample) < self.positions:
                values = values.index_select(0, sample * self.positions + position)
            return values.unsqueeze(0)
        gather = _compiled_gather() if self.x.device.type == "cpu" and self.x.dtype == torch.float32 else None
        if gather is not None:
            before = tuple(one for one, _ in self._around)
            taken = (self.kernel, self.stride, self.dilation, before, self.groups, self.mirrored)
            return gather(self.x, sample, position, self._sizes, *taken)
        picked = self._view()[(sample, *torch.unravel_index(position, self._sizes))]  # (n, groups, *patch)
        if self.mirrored:
            picked = picked.flip(tuple(range(-len(self.kernel), 0)))
        return picked.reshape(len(picked), self.groups, self.row_length).transpose(0, 1)

    def _view(self) -> Tensor:
        """All patches, `(N, *positions, groups, channels of a group, *kernel)`: a strided view of the padded input."""
        flat = [side for around in reversed(self._around) for side in around]
        x = F.pad(self.x, flat) if any(flat) else self.x
        steps, channels = x.stride(), x.shape[1] // self.groups
        moves = tuple(step * stride for step, stride in zip(steps[2:], self.stride, strict=True))
        inner = tuple(step * dilation for step, dilation in zip(steps[2:], self.dilation, strict=True))
        return x.as_strided(
            (len(x), *self._sizes, self.groups, channels, *self.kernel),
            (steps[0], *moves, steps[1] * channels, steps[1], *inner),
            x.storage_offset(),
        )


@cache
def _compiled_gather() -> Callable[..., Tensor] | None:
    """The kernel for the CPU, if numba is there; without it, gathering takes several times as long."""
    try:
        from adaround_plugin.rounding import gather_numba
    except ImportError:
        return None
    return gather_numba.gather
