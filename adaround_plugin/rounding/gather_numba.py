"""Gathering patches on the CPU as one compiled loop: what `Patches.columns` does, without an index for each number.

The zeros around an input are put into the patches that need them, not around a copy of the input.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product

import numpy as np
import numpy.typing as npt
from torch import Tensor

from adaround_plugin.compiled import compiled, on_all_cores

__all__ = ["gather"]

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]

# patches that are read together, channel by channel: those of a sample lie near each other there
_TOGETHER = 16


def gather(
    x: Tensor,
    sample: Tensor,
    position: Tensor,
    sizes: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    before: tuple[int, ...],
    groups: int,
    mirrored: bool,
) -> Tensor:
    """Chosen patches of `x`, as in `Patches.columns`: `(groups, n, columns)`.

    Args:
        x: `(N, C, *spatial)` float32.
        sample, position: `(n,)`, of each patch; outside the input are zeros.
        sizes: output positions per spatial dimension.
        kernel, stride, dilation, groups, mirrored: as in `Patches`.
        before: zeros before the input, per spatial dimension.
    """
    steps, channels = x.stride()[2:], x.shape[1] // groups
    offsets, within = _offsets(kernel, dilation, steps, mirrored)
    geometry = np.array((sizes, stride, before, steps, x.shape[2:]), dtype=np.int64)
    found = x.new_empty(groups, len(sample), channels * len(within))
    extent = 1 + sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    numbers = x.detach().as_strided((extent,), (1,), x.storage_offset()).numpy()
    arrays = (numbers, sample.numpy(), position.numpy(), geometry, offsets, within, found.numpy())

    def run(first: int, last: int) -> None:
        _gather(*arrays, channels, x.stride(0), x.stride(1), first, last)

    on_all_cores(run, len(sample), 4.0 * found.numel())
    return found


@lru_cache(maxsize=64)
def _offsets(
    kernel: tuple[int, ...], dilation: tuple[int, ...], steps: tuple[int, ...], mirrored: bool
) -> tuple[Integers, Integers]:
    """Where the entries of a patch in one channel are from its corner: `(k, dimensions)`, and `(k,)` in memory."""
    places = list(product(*(range(0, size * step, step) for size, step in zip(kernel, dilation, strict=True))))
    offsets = np.array(places[::-1] if mirrored else places, dtype=np.int64)
    return offsets, offsets @ np.array(steps, dtype=np.int64)


@compiled("void(f4[::1], i8[::1], i8[::1], i8[:,::1], i8[:,::1], i8[::1], f4[:,:,::1], i8, i8, i8, i8, i8)")
def _gather(
    numbers: Floats,
    sample: Integers,
    position: Integers,
    geometry: Integers,
    offsets: Integers,
    within: Integers,
    found: Floats,
    channels: int,
    sample_step: int,
    channel_step: int,
    first: int,
    last: int,
) -> None:
    count, dimensions = offsets.shape
    sizes, stride, before, steps, limits = geometry
    start = np.empty(_TOGETHER, dtype=np.int64)
    whole = np.empty(_TOGETHER, dtype=np.bool_)
    inside = np.empty((_TOGETHER, count), dtype=np.bool_)
    for begin in range(first, last, _TOGETHER):
        together = min(_TOGETHER, last - begin)
        for b in range(together):
            start[b], whole[b], rest = sample[begin + b] * sample_step, True, position[begin + b]
            inside[b] = True
            for d in range(dimensions - 1, -1, -1):
                corner = rest % sizes[d] * stride[d] - before[d]
                rest //= sizes[d]
                start[b] += corner * steps[d]
                for k in range(count):
                    at = corner + offsets[k, d]
                    if at < 0 or at >= limits[d]:
                        inside[b, k] = False
                        whole[b] = False
        for g in range(found.shape[0]):
            for c in range(channels):
                channel, to = (g * channels + c) * channel_step, c * count
                for b in range(together):
                    at, patch = start[b] + channel, found[g, begin + b]
                    if whole[b]:
                        for k in range(count):
                            patch[to + k] = numbers[at + within[k]]
                    else:
                        for k in range(count):
                            patch[to + k] = numbers[at + within[k]] if inside[b, k] else np.float32(0)
