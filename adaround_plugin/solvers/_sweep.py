"""One Gauss-Seidel sweep over the columns of a rounding problem: the kernel that all the fast solvers share.

The conditional optimum of coordinate j, all others fixed, is `c_j = t_j - sum_{k != j} M_jk e_k` with `e = q - t`
and `M` a coupling with rows scaled to a unit diagonal: `H_jk / H_jj` for coordinate descent, a triangular factor for
sequential rounding. Where the step of the grid varies along a row, `e` is `(q - t) step`, and the sum is divided by
the step. Columns go in blocks, so that all but the coupling inside a block is one matrix product, as in
GPTQ (Frantar et al. 2022).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["sweep"]

_BLOCK = 48


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
    loss = None if curvature is None else torch.zeros_like(target[:, 0])
    # views of the coordinates, made in one call each: the loop below is bound by the cost of calls
    errors, targets, lowers, uppers = error.unbind(1), target.unbind(1), lower.unbind(1), upper.unbind(1)
    steps = None if step is None else step.unbind(1)
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        # the pull on the block of all coordinates as they are, the block's own included
        reach = start if triangular else columns
        pull = torch.bmm(matrix[:, start:stop, :reach], error[:, :reach])
        pulls = pull.unbind(1)
        inner = matrix[:, start:stop, start:stop]
        for j in range(start, stop):
            new = targets[j] - (pulls[j - start] if steps is None else pulls[j - start] / steps[j])
            if temperature:
                base = new.floor()
                new.sub_(base).mul_(2 / temperature).sub_(1 / temperature).sigmoid_().add_(base)
            else:
                new.round_()
            torch.clamp(new, lowers[j], uppers[j], out=new).sub_(targets[j])
            if steps is not None:
                new.mul_(steps[j])
            k = j + 1 - start
            if j + 1 < stop:
                change = new if triangular else new - errors[j]
                pull[:, k:].baddbmm_(inner[:, k:, k - 1 : k], change.unsqueeze(1))
            errors[j].copy_(new)
        if loss is not None and curvature is not None:
            residual = pull.add_(error[:, start:stop]).square_()
            loss += torch.bmm(curvature[:, start:stop].unsqueeze(1), residual).squeeze(1)
    return loss
