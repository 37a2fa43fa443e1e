"""Visiting the coordinates of one block on a CUDA device: the inner loop of a sweep, as one kernel.

On a GPU the loop of `adaround_plugin.solvers.sweep` is bound by the launches of a dozen small kernels for each
coordinate. Here a program keeps a block of coordinates of a few rows in registers and goes through them by itself.
Written in Triton, which comes with the CUDA builds of torch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adaround_plugin.solvers.coordinates import Coordinates, Coupling

__all__ = ["try_out", "visit"]

# rows of one program: one for each thread of a warp
_ROWS = 32


@triton.jit  # type: ignore[untyped-decorator]
def _visit(  # type: ignore[no-untyped-def]
    pull,
    inner,
    error,
    target,
    lower,
    upper,
    step,
    curvature,
    loss,
    rows,
    count,
    inner_group,
    inner_row,
    error_group,
    curvature_group,
    temperature,
    TRIANGULAR: tl.constexpr,
    SOFT: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    here = row < rows
    index = tl.arange(0, BLOCK)
    # what the coordinates visited so far have added to the pull on later ones
    change = tl.zeros((BLOCK, ROWS), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for j in range(count):
        at = group * error_group + j * rows + row
        coupled = tl.load(inner + group * inner_group + j * inner_row + index, mask=index < j, other=0.0)
        drawn = tl.load(pull + (group * count + j) * rows + row, mask=here, other=0.0)
        drawn += tl.sum(coupled[:, None] * change, axis=0)
        goal = tl.load(target + at, mask=here, other=0.0)
        size = tl.load(step + at, mask=here, other=1.0)
        new = goal - drawn / size
        base = tl.floor(new)
        if SOFT:
            new = base + 1.0 / (1.0 + tl.exp((1.0 - 2.0 * (new - base)) / temperature))
        else:
            # halves go to the even neighbour, as in torch
            half = new - base
            odd = base - 2.0 * tl.floor(base * 0.5)
            new = tl.where((half > 0.5) | ((half == 0.5) & (odd == 1.0)), base + 1.0, base)
        low = tl.load(lower + at, mask=here, other=0.0)
        high = tl.load(upper + at, mask=here, other=0.0)
        new = (tl.minimum(tl.maximum(new, low), high) - goal) * size
        if TRIANGULAR:
            moved = new
            residual = drawn + new
            total += tl.load(curvature + group * curvature_group + j) * residual * residual
        else:
            moved = new - tl.load(error + at, mask=here, other=0.0)
        change = tl.where(index[:, None] == j, moved[None, :], change)
        tl.store(error + at, new, mask=here)
    if TRIANGULAR:
        # no other program has these rows
        total += tl.load(loss + group * rows + row, mask=here, other=0.0)
        tl.store(loss + group * rows + row, total, mask=here)


def visit(pull: Tensor, at: Coordinates, coupling: Coupling, temperature: float, loss: Tensor) -> None:
    """Visit a block of coordinates in order: what `adaround_plugin.solvers.sweep.visit` does, on a CUDA device.

    Args:
        pull: `(G, B, R)` contiguous; it is left as it is.
        at: `(G, B, R)` blocks of contiguous `(G, D, R)` tensors of one shape.
        coupling: its rows contiguous.
        temperature, loss: as there; `loss` contiguous.
    """
    groups, count, rows = pull.shape
    inner, curvature = coupling.matrix, coupling.curvature
    assert pull.is_contiguous()
    assert inner.stride(2) == 1
    per_program = min(_ROWS, triton.next_power_of_2(rows))
    # a kernel runs on the current device
    with torch.cuda.device(pull.device):
        _visit[(groups, triton.cdiv(rows, per_program))](
            pull,
            inner,
            at.error,
            at.target,
            at.lower,
            at.upper,
            at.step,
            pull if curvature is None else curvature,
            loss,
            rows,
            count,
            inner.stride(0),
            inner.stride(1),
            at.error.stride(0),
            0 if curvature is None else curvature.stride(0),
            float(temperature) if temperature else 1.0,
            TRIANGULAR=curvature is not None,
            SOFT=bool(temperature),
            BLOCK=triton.next_power_of_2(count),
            ROWS=per_program,
            num_warps=1,
        )


def try_out(device: torch.device) -> None:
    """Visit one coordinate: raises whatever keeps Triton from working here, such as a missing C compiler."""
    one = torch.ones(1, 1, 1, device=device)
    at = Coordinates(one.clone(), one, one, one, one, is_plain=True)
    visit(one.clone(), at, Coupling(one), 0.0, one[:, 0].clone())
    torch.cuda.synchronize(device)
