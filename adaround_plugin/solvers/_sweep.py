"""One Gauss-Seidel sweep over the columns of a rounding problem: the kernel that all the fast solvers share.

The conditional optimum of coordinate j, all others fixed, is `c_j = t_j - sum_{k != j} M_jk e_k` with `e = q - t`
and `M` a coupling with rows scaled to a unit diagonal: `H_jk / H_jj` for coordinate descent, a triangular factor for
sequential rounding. Where the step of the grid varies along a row, `e` is `(q - t) step`, and the sum is divided by
the step. Columns go in blocks, so that all but the coupling inside a block is one matrix product, as in
GPTQ (Frantar et al. 2022). The inside of a block is a loop of torch's operators, or one kernel on a CUDA device.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

__all__ = ["sweep", "visit"]

_log = logging.getLogger(__name__)
# coordinates of a block; Triton's blocks are powers of two
_BLOCK, _CUDA_BLOCK = 48, 64


def sweep(
    error: Tensor,
    target: Tensor,
    lower: Tensor,
    upper: Tensor,
    matrix: Tensor,
    temperature: float = 0.0,
    curvature: Tensor | None = None,
    step: Tensor | None = None,
) -> Tensor | None:
    """Visit every coordinate once and set it to its rounded conditional optimum, for all rows at the same time.

    Args:
        error: `(G, D, R)` float32, `q - t`, times `step` if there is one, updated in place.
        target, lower, upper: `(G, D, R)` float32.
        matrix: `(G, D, D)` float32, zero diagonal.
        temperature: 0 rounds hard; above, rounding is softened to
            `floor(c) + sigmoid((2 (c - floor(c)) - 1) / temperature)`, mean-field annealing of the QUBO.
        curvature: `(G, D)`, given for a triangular factor: `matrix` is then zero above the diagonal, half of the
            products are left out, and the loss `sum_j curvature_j (q_j - c_j)^2` is returned.
        step: `(G, D, R)` float32, the size of a grid step where it varies along a row.

    Returns:
        `(G, R)` float32 loss if `curvature` is given, else None.
    """
    columns = target.shape[1]
    triangular = curvature is not None
    loss = torch.zeros_like(target[:, 0]) if triangular else None
    visit_block, size = _visitor(error.device)
    for start in range(0, columns, size):
        part = slice(start, min(start + size, columns))
        # the pull on the block of all coordinates as they are, the block's own included
        reach = start if triangular else columns
        pull = torch.bmm(matrix[:, part, :reach], error[:, :reach])
        visit_block(
            pull,
            matrix[:, part, part],
            *(values[:, part] for values in (error, target, lower, upper)),
            temperature,
            None if curvature is None else curvature[:, part],
            None if step is None else step[:, part],
            loss,
        )
    return loss


@cache
def _visitor(device: torch.device) -> tuple[Callable[..., None], int]:
    """What visits a block on this device, and the size of a block."""
    if device.type == "cuda":
        try:
            from adaround_plugin.solvers import _triton_visit

            _triton_visit.try_out(device)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            # not installed, no compiler, no driver that it knows: whatever it is, the loop works
            _log.warning("Triton does not run here (%s): sweeps on the GPU are many times slower.", error)
        else:
            return _triton_visit.visit, _CUDA_BLOCK
    return visit, _BLOCK


def visit(
    pull: Tensor,
    inner: Tensor,
    error: Tensor,
    target: Tensor,
    lower: Tensor,
    upper: Tensor,
    temperature: float,
    curvature: Tensor | None,
    step: Tensor | None,
    loss: Tensor | None,
) -> None:
    """Visit the coordinates of a block in order; `error` and `loss` are updated in place, `pull` is used up.

    Args:
        pull: `(G, B, R)`, the pull on the block of all coordinates as they were before.
        inner: `(G, B, B)`, the coupling inside the block.
        error, target, lower, upper, step: `(G, B, R)`, as for `sweep`.
        temperature: as for `sweep`.
        curvature: `(G, B)` where the coupling is triangular.
        loss: `(G, R)`, to which the loss of the block is added where there is a curvature.
    """
    # views of the coordinates, made in one call each: the loop below is bound by the cost of calls
    errors, targets, lowers, uppers = error.unbind(1), target.unbind(1), lower.unbind(1), upper.unbind(1)
    steps = None if step is None else step.unbind(1)
    for j, drawn in enumerate(pull.unbind(1)):
        new = targets[j] - (drawn if steps is None else drawn / steps[j])
        if temperature:
            base = new.floor()
            new.sub_(base).mul_(2 / temperature).sub_(1 / temperature).sigmoid_().add_(base)
        else:
            new.round_()
        torch.clamp(new, lowers[j], uppers[j], out=new).sub_(targets[j])
        if steps is not None:
            new.mul_(steps[j])
        if j + 1 < pull.shape[1]:
            change = new - errors[j] if curvature is None else new
            pull[:, j + 1 :].baddbmm_(inner[:, j + 1 :, j : j + 1], change.unsqueeze(1))
        errors[j].copy_(new)
    if curvature is not None and loss is not None:
        loss += torch.bmm(curvature.unsqueeze(1), pull.add_(error).square_()).squeeze(1)
