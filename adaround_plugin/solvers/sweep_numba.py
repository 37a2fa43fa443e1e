"""Gauss-Seidel sweeps on the CPU, compiled: the inside of a block, and whole sweeps of small problems in one loop.

The loop of torch's operators is bound by the cost of calls, microseconds for each coordinate. `visit` goes through the
coordinates of a block by itself. `sweep` and `settle` take some rows at a time through all sweeps: rows do not depend
on each other, and their coordinates stay in the cache, while the coupling comes by. That saves the calls of blocks, but
its products take four times as long as those of a library.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from adaround_plugin.compiled import compiled, on_all_cores
from adaround_plugin.solvers.coordinates import Coordinates, Coupling

__all__ = ["settle", "sweep", "visit"]

Array = npt.NDArray[np.float32]

# coordinates whose pull by all others is taken together, and rows that go through the sweeps together, at most and at
# least: few waste the processor's wide registers
_BLOCK, _ROWS, _FEW_ROWS = 48, 128, 16


def sweep(at: Coordinates, coupling: Coupling, temperatures: Sequence[float]) -> Tensor:
    """As `adaround_plugin.solvers.sweep.sweep`, on the CPU."""
    return _run(at, coupling, temperatures, settles=False)


def settle(at: Coordinates, coupling: Coupling, sweeps: int) -> None:
    """As `adaround_plugin.solvers.sweep.settle`, on the CPU."""
    _run(at, coupling, [0.0] * sweeps, settles=True)


def visit(pull: Tensor, at: Coordinates, coupling: Coupling, temperature: float, loss: Tensor) -> None:
    """As `adaround_plugin.solvers.sweep.visit`, on the CPU.

    Args:
        pull: `(G, B, R)` contiguous; it is used up.
        at: `(G, B, R)` blocks of contiguous `(G, D, R)` tensors.
        coupling, temperature: as there.
        loss: as there, contiguous.
    """
    groups, count, rows = pull.shape
    triangular = coupling.curvature is not None
    values = (pull, at.error, at.target, at.lower, at.upper, at.step, coupling.matrix, loss)
    # views of arrays take a tenth of the time of views of tensors
    arrays = [one.numpy() for one in values]
    curvature = np.empty((groups, 0), dtype=np.float32) if coupling.curvature is None else coupling.curvature.numpy()
    for group in range(groups):
        of_group = [one[group] for one in (*arrays, curvature)]

        def run(first: int, last: int, of_group: Sequence[Array] = of_group) -> None:
            _visit(*of_group, temperature, at.is_plain, triangular, first, last)

        on_all_cores(run, -(-rows // _ROWS), rows * count * count)


def _run(at: Coordinates, coupling: Coupling, temperatures: Sequence[float], settles: bool) -> Tensor:
    groups, columns, rows = at.target.shape
    triangular = coupling.curvature is not None
    curvature = at.target.new_zeros(groups, 1) if coupling.curvature is None else coupling.curvature
    loss = torch.zeros_like(at.target[:, 0])
    # of one group, every thread gets as many chunks of rows, even ones
    threads = min(torch.get_num_threads(), -(-rows // _FEW_ROWS)) if groups == 1 else 1
    chunks = threads * -(-rows // (_ROWS * threads))
    size = -(-rows // chunks)
    chunks = -(-rows // size)
    arrays = [
        values.numpy()
        for values in (at.error, at.target, at.lower, at.upper, at.step, coupling.matrix, curvature, loss)
    ]
    cooling = np.array(temperatures, dtype=np.float32)

    def run(first: int, last: int) -> None:
        _sweep(*arrays, cooling, at.is_plain, triangular, settles, size, chunks, first, last)

    work = len(temperatures) * groups * rows * columns * columns * (0.5 if triangular else 1.0)
    on_all_cores(run, groups * chunks, work)
    return loss


@compiled()
def _add_products(
    matrix: Array, first: int, last: int, start: int, stop: int, values: Array, sums: Array, width: int
) -> None:
    """Add `matrix[i, start:stop] @ values[start:stop]` to `sums[i - first]` for `first <= i < last`."""
    i = first
    while i + 4 <= last:
        s0, s1, s2, s3 = sums[i - first], sums[i - first + 1], sums[i - first + 2], sums[i - first + 3]
        m0, m1, m2, m3 = matrix[i], matrix[i + 1], matrix[i + 2], matrix[i + 3]
        k = start
        while k + 4 <= stop:
            a0, a1, a2, a3 = m0[k], m0[k + 1], m0[k + 2], m0[k + 3]
            b0, b1, b2, b3 = m1[k], m1[k + 1], m1[k + 2], m1[k + 3]
            c0, c1, c2, c3 = m2[k], m2[k + 1], m2[k + 2], m2[k + 3]
            d0, d1, d2, d3 = m3[k], m3[k + 1], m3[k + 2], m3[k + 3]
            for r in range(width):
                v0, v1, v2, v3 = values[k, r], values[k + 1, r], values[k + 2, r], values[k + 3, r]
                s0[r] += a0 * v0 + a1 * v1 + a2 * v2 + a3 * v3
                s1[r] += b0 * v0 + b1 * v1 + b2 * v2 + b3 * v3
                s2[r] += c0 * v0 + c1 * v1 + c2 * v2 + c3 * v3
                s3[r] += d0 * v0 + d1 * v1 + d2 * v2 + d3 * v3
            k += 4
        while k < stop:
            a0, b0, c0, d0 = m0[k], m1[k], m2[k], m3[k]
            for r in range(width):
                v0 = values[k, r]
                s0[r] += a0 * v0
                s1[r] += b0 * v0
                s2[r] += c0 * v0
                s3[r] += d0 * v0
            k += 1
        i += 4
    while i < last:
        _add_row(matrix[i], start, stop, values, sums[i - first], width)
        i += 1


@compiled()
def _add_row(coupled: Array, start: int, stop: int, values: Array, sums: Array, width: int) -> None:
    """Add `coupled[start:stop] @ values[start:stop]` to `sums`."""
    k = start
    while k + 8 <= stop:
        m0, m1, m2, m3 = coupled[k], coupled[k + 1], coupled[k + 2], coupled[k + 3]
        m4, m5, m6, m7 = coupled[k + 4], coupled[k + 5], coupled[k + 6], coupled[k + 7]
        for r in range(width):
            sums[r] += (
                m0 * values[k, r]
                + m1 * values[k + 1, r]
                + m2 * values[k + 2, r]
                + m3 * values[k + 3, r]
                + m4 * values[k + 4, r]
                + m5 * values[k + 5, r]
                + m6 * values[k + 6, r]
                + m7 * values[k + 7, r]
            )
        k += 8
    while k < stop:
        m0 = coupled[k]
        for r in range(width):
            sums[r] += m0 * values[k, r]
        k += 1


@compiled()
def _rounded(value: np.float32, temperature: np.float32) -> np.float32:
    """Rounded, softly above temperature 0."""
    if temperature > 0:
        one, two = np.float32(1), np.float32(2)
        base = np.floor(value)
        share = two * (value - base) - one
        value = base + one / (one + np.float32(math.exp(-share / temperature)))
    else:
        value = np.rint(value)
    return value


# C arrays are contiguous, A arrays may repeat a value along an axis
@compiled(
    "void(f4[:,:,::1], f4[:,:,::1], f4[:,:,:], f4[:,:,:], f4[:,:,:], f4[:,:,::1], f4[:,::1], f4[:,::1], f4[::1], "
    "b1, b1, b1, i8, i8, i8, i8)"
)
def _sweep(
    error: Array,
    target: Array,
    lower: Array,
    upper: Array,
    step: Array,
    matrix: Array,
    curvature: Array,
    loss: Array,
    temperatures: Array,
    plain: bool,
    triangular: bool,
    settles: bool,
    size: int,
    chunks: int,
    first: int,
    last: int,
) -> None:
    """Let the chunks of `size` rows numbered from `first` to `last`, `chunks` in each group, go through all sweeps."""
    columns, rows = target.shape[1], target.shape[2]
    e = np.empty((columns, size), dtype=np.float32)
    t, low, high, s = np.empty_like(e), np.empty_like(e), np.empty_like(e), np.empty_like(e)
    pull = np.empty((_BLOCK, size), dtype=np.float32)
    total = np.empty(size, dtype=np.float32)
    for piece in range(first, last):
        group, begin = piece // chunks, piece % chunks * size
        width = min(size, rows - begin)
        for j in range(columns):
            for r in range(width):
                e[j, r] = error[group, j, begin + r]
                t[j, r] = target[group, j, begin + r]
                low[j, r] = lower[group, j, begin + r] - target[group, j, begin + r]
                high[j, r] = upper[group, j, begin + r] - target[group, j, begin + r]
                s[j, r] = step[group, j, begin + r]
        total[:] = 0
        for number in range(temperatures.shape[0]):
            temperature = temperatures[number]
            moved = False
            for start in range(0, columns, _BLOCK):
                stop = min(start + _BLOCK, columns)
                pull[: stop - start] = 0
                _add_products(matrix[group], start, stop, 0, start, e, pull, width)
                if not triangular:
                    _add_products(matrix[group], start, stop, stop, columns, e, pull, width)
                for j in range(start, stop):
                    drawn, now = pull[j - start], e[j]
                    _add_row(matrix[group, j], start, j, e, drawn, width)
                    if not triangular:
                        _add_row(matrix[group, j], j + 1, stop, e, drawn, width)
                    for r in range(width):
                        best = _rounded(t[j, r] - (drawn[r] if plain else drawn[r] / s[j, r]), temperature)
                        new = min(max(best - t[j, r], low[j, r]), high[j, r])
                        if not plain:
                            new *= s[j, r]
                        moved = moved or new != now[r]
                        now[r] = new
                        if triangular:
                            total[r] += curvature[group, j] * (drawn[r] + new) * (drawn[r] + new)
            if settles and not moved:
                break
        for j in range(columns):
            for r in range(width):
                error[group, j, begin + r] = e[j, r]
        for r in range(width):
            loss[group, begin + r] += total[r]


@compiled(
    "void(f4[:,::1], f4[:,::1], f4[:,::1], f4[:,::1], f4[:,::1], f4[:,::1], f4[:,:], f4[::1], f4[::1], "
    "f4, b1, b1, i8, i8)"
)
def _visit(
    pull: Array,
    error: Array,
    target: Array,
    lower: Array,
    upper: Array,
    step: Array,
    matrix: Array,
    loss: Array,
    curvature: Array,
    temperature: float,
    plain: bool,
    triangular: bool,
    first: int,
    last: int,
) -> None:
    """Visit the coordinates of a block, in the chunks of `_ROWS` rows numbered from `first` to `last`."""
    count, rows = pull.shape
    # by how much each coordinate moved; of triangular ones, where to
    change = np.empty((count, _ROWS), dtype=np.float32)
    for piece in range(first, last):
        begin = piece * _ROWS
        end = min(begin + _ROWS, rows)
        width = end - begin
        total = loss[begin:end]
        for j in range(count):
            drawn, now, moved = pull[j][begin:end], error[j][begin:end], change[j]
            _add_row(matrix[j], 0, j, change, drawn, width)
            t, low, high, s = target[j][begin:end], lower[j][begin:end], upper[j][begin:end], step[j][begin:end]
            for r in range(width):
                best = _rounded(t[r] - (drawn[r] if plain else drawn[r] / s[r]), temperature)
                new = min(max(best, low[r]), high[r]) - t[r]
                if not plain:
                    new *= s[r]
                moved[r] = new if triangular else new - now[r]
                now[r] = new
                if triangular:
                    total[r] += curvature[j] * (drawn[r] + new) * (drawn[r] + new)
