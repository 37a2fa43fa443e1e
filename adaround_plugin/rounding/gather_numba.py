"""Gathering patches on the CPU as one compiled loop: what `Patches.columns` does, without an index for each number.

The zeros around an input are put into the patches that need them, not around a copy of the input.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from adaround_plugin.compiled import compiled, on_all_cores

__all__ = ["gather"]

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]


def gather(
    x: Tensor,
    sample: Tensor,
    corner: Tensor,
    kernel: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    mirrored: bool,
) -> Tensor:
    """Chosen patches of `x`, as in `Patches.columns`: `(groups, n, columns)`.

    Args:
        x: `(N, C, *spatial)` float32.
        sample: `(n,)`, of each patch.
        corner: `(n, spatial dimensions)`, where each begins; outside the input are zeros.
        kernel, dilation, groups, mirrored: as in `Patches`.
    """
    steps, spatial = torch.tensor(x.stride()[2:]), x.shape[2:]
    # of the entries of a patch in one channel, where they are from its corner
    offsets = torch.cartesian_prod(*(torch.arange(k) * d for k, d in zip(kernel, dilation, strict=True)))
    offsets = offsets.reshape(-1, len(kernel))
    if mirrored:
        offsets = offsets.flip(0)
    channels = x.shape[1] // groups
    found = torch.empty(groups, len(sample), channels * len(offsets))
    extent = 1 + sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    arrays = [
        tensor.numpy()
        for tensor in (
            x.detach().as_strided((extent,), (1,), x.storage_offset()),
            sample * x.stride(0) + corner @ steps,
            corner.contiguous(),
            offsets @ steps,
            offsets.contiguous(),
            torch.tensor(spatial),
            found,
        )
    ]

    def run(first: int, last: int) -> None:
        _gather(*arrays, channels, x.stride(1), first, last)

    on_all_cores(run, len(sample), 4.0 * found.numel())
    return found


@compiled("void(f4[::1], i8[::1], i8[:,::1], i8[::1], i8[:,::1], i8[::1], f4[:,:,::1], i8, i8, i8, i8)")
def _gather(
    numbers: Floats,
    start: Integers,
    corner: Integers,
    within: Integers,
    offsets: Integers,
    limits: Integers,
    found: Floats,
    channels: int,
    channel_step: int,
    first: int,
    last: int,
) -> None:
    dimensions, count = corner.shape[1], within.shape[0]
    inside = np.ones(count, dtype=np.bool_)
    for i in range(first, last):
        whole = True
        for k in range(count):
            inside[k] = True
            for d in range(dimensions):
                at = corner[i, d] + offsets[k, d]
                if at < 0 or at >= limits[d]:
                    inside[k] = False
                    whole = False
        for g in range(found.shape[0]):
            for c in range(channels):
                at, to = start[i] + (g * channels + c) * channel_step, c * count
                if whole:
                    for k in range(count):
                        found[g, i, to + k] = numbers[at + within[k]]
                else:
                    for k in range(count):
                        found[g, i, to + k] = numbers[at + within[k]] if inside[k] else np.float32(0)
