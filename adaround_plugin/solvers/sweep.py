"""Gauss-Seidel sweeps over the columns of a rounding problem: the kernel that all the fast solvers share.

The conditional optimum of coordinate j, all others fixed, is `c_j = t_j - sum_{k != j} M_jk e_k / step_j` with the
error `e = (q - t) step` and `M` a coupling with rows scaled to a unit diagonal: `H_jk / H_jj` for coordinate descent, a
triangular factor for GPTQ. Columns go in blocks, so that all but the coupling inside a block is one matrix product, as
in GPTQ (Frantar et al. 2022). The inside of a block is one kernel: numba's on the CPU, Triton's on a CUDA device, or a
loop of torch's operators where neither runs. Small problems on the CPU are not worth the calls: there one compiled loop
goes through all sweeps by itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from adaround_plugin.errors import is_out_of_memory
from adaround_plugin.solvers.coordinates import Coordinates, Coupling

__all__ = ["settle", "sweep", "visit"]

_log = logging.getLogger(__name__)
# coordinates of a block: of the loop, of numba's kernel, and of Triton's, a power of two
_LOOP_BLOCK, _CPU_BLOCK, _CUDA_BLOCK = 48, 96, 64
# so many coordinates, of all rows of a group, are worth the calls of blocks on the CPU
_WORTH_BLOCKS = 8192


def sweep(at: Coordinates, coupling: Coupling, temperatures: Sequence[float] = (0.0,)) -> Tensor:
    """Visit every coordinate once for each temperature, and set it to its rounded conditional optimum, in all rows.

    Args:
        at: the present point; its error is updated in place.
        coupling: of the coordinates.
        temperatures: 0 rounds hard; above, rounding is softened to
            `floor(c) + sigmoid((2 (c - floor(c)) - 1) / temperature)`, mean-field annealing of the QUBO.

    Returns:
        `(G, R)` float32 loss of a triangular coupling, zero for a full one.
    """
    whole = _whole_sweeps(at)
    if whole is not None:
        found: Tensor = whole.sweep(at, coupling, temperatures)
        return found
    loss = torch.zeros_like(at.target[:, 0])
    _sweep_in_blocks(at, coupling, temperatures, loss)
    return loss


def settle(at: Coordinates, coupling: Coupling, sweeps: int) -> None:
    """Visit every coordinate again and again, rounding hard, until none changes or `sweeps` are spent.

    A row that a whole sweep leaves unchanged is at its fixed point and takes part no longer.

    Args:
        at: the present point, of integers; its error is updated in place.
        coupling: of the coordinates, a full one.
        sweeps: how many, at most.
    """
    whole = _whole_sweeps(at)
    if whole is not None:
        whole.settle(at, coupling, sweeps)
        return
    rows = torch.arange(at.target.shape[2], device=at.target.device)
    moving = replace(at, error=at.error.clone())
    for _ in range(sweeps):
        before = moving.error.clone()
        sweep(moving, coupling)
        at.error[..., rows] = moving.error
        changed = (moving.error != before).any(dim=1).any(dim=0)
        if not changed.any():
            break
        rows = rows[changed]
        moving = moving.map(lambda values, changed=changed: values[..., changed].contiguous())  # type: ignore[misc]


def _whole_sweeps(at: Coordinates) -> ModuleType | None:
    """What goes through all sweeps by itself, where it runs and is faster than blocks."""
    return _compiled(at.error.device) if at.error[0].numel() < _WORTH_BLOCKS else None


@cache
def _compiled(device: torch.device) -> ModuleType | None:
    """The kernels of the CPU, on a device that is one."""
    if device.type != "cpu":
        return None
    try:
        from adaround_plugin.solvers import sweep_numba
    except ImportError as error:
        _log.warning("numba does not run here (%s): sweeps on the CPU are many times slower.", error)
        return None
    return sweep_numba


def _sweep_in_blocks(at: Coordinates, coupling: Coupling, temperatures: Sequence[float], loss: Tensor) -> None:
    """All sweeps, block after block; adds to `loss`."""
    columns, device = at.target.shape[1], at.error.device
    visit_block, size = _visitor(device)

    def written(values: Tensor) -> Tensor:
        """As kernels want it, every value for itself; on the CPU of columns that are alike those of one block."""
        is_alike = device.type == "cpu" and values.stride(1) == 0
        return (values[:, :size] if is_alike else values).contiguous()

    at = at.map(written)
    blocks = []
    for start in range(0, columns, size):
        part = slice(start, min(start + size, columns))

        def of_block(values: Tensor, part: slice = part) -> Tensor:
            return values[:, part] if values.shape[1] == columns else values[:, : part.stop - part.start]

        # the pull on the block of all coordinates as they are, the block's own included
        reach = columns if coupling.curvature is None else start
        blocks.append((coupling.matrix[:, part, :reach], at.error[:, :reach], at.map(of_block), coupling.block(part)))
    for temperature in temperatures:
        for matrix, error, inside, coupled in blocks:
            visit_block(torch.bmm(matrix, error), inside, coupled, temperature, loss)


def _visitor(device: torch.device) -> tuple[Callable[..., None], int]:
    """What visits a block on this device, and the size of a block."""
    if (kernel := _triton(device)) is not None:
        return kernel.visit, _CUDA_BLOCK
    if (kernel := _compiled(device)) is not None:
        return kernel.visit, _CPU_BLOCK
    return visit, _LOOP_BLOCK


@cache
def _triton(device: torch.device) -> ModuleType | None:
    """The kernel of CUDA, on a device that takes it."""
    if device.type != "cuda":
        return None
    try:
        from adaround_plugin.solvers import sweep_triton

        sweep_triton.try_out(device)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        # not installed, no compiler, no driver that it knows: whatever it is, the loop works
        _log.warning("Triton does not run here (%s): sweeps on the GPU are many times slower.", error)
        return None
    return sweep_triton


def visit(pull: Tensor, at: Coordinates, coupling: Coupling, temperature: float, loss: Tensor) -> None:
    """Visit the coordinates of a block in order; errors and `loss` are updated in place, `pull` is used up.

    Args:
        pull: `(G, B, R)`, the pull on the block of all coordinates as they were before.
        at: the block's coordinates, `(G, B, R)` each.
        coupling: inside the block.
        temperature: as for `sweep`.
        loss: `(G, R)`, to which the loss of the block is added where the coupling is triangular.
    """
    triangular = coupling.curvature is not None
    # views of the coordinates, made in one call each: the loop below is bound by the cost of calls
    errors, targets, lowers, uppers, steps = (
        values.unbind(1) for values in (at.error, at.target, at.lower, at.upper, at.step)
    )
    for j, drawn in enumerate(pull.unbind(1)):
        new = targets[j] - (drawn if at.is_plain else drawn / steps[j])
        if temperature:
            base = new.floor()
            new.sub_(base).mul_(2 / temperature).sub_(1 / temperature).sigmoid_().add_(base)
        else:
            new.round_()
        torch.clamp(new, lowers[j], uppers[j], out=new).sub_(targets[j])
        if not at.is_plain:
            new.mul_(steps[j])
        if j + 1 < pull.shape[1]:
            change = new if triangular else new - errors[j]
            pull[:, j + 1 :].baddbmm_(coupling.matrix[:, j + 1 :, j : j + 1], change.unsqueeze(1))
        errors[j].copy_(new)
    if coupling.curvature is not None:
        loss += torch.bmm(coupling.curvature.unsqueeze(1), pull.add_(at.error).square_()).squeeze(1)
