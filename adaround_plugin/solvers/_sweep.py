"""One Gauss-Seidel sweep over the columns of a rounding problem: the kernel that all the fast solvers share.

The conditional optimum of coordinate j, all others fixed, is `c_j = t_j - sum_{k != j} M_jk e_k` with `e = q - t`
and `M` a coupling with rows scaled to a unit diagonal: `H_jk / H_jj` for coordinate descent, a triangular factor for
sequential rounding. Columns go in blocks, so that all but the coupling inside a block is one matrix product, as in
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
) -> Tensor | None:
    """Visit every coordinate once and set it to its rounded conditional optimum, for all rows at the same time.

    Args:
        error: `(G, D, R)` float32, `q - t`, updated in place.
        target, lower, upper: `(G, D, R)` float32.
        matrix: `(G, D, D)` float32, zero diagonal.
        temperature: 0 rounds hard; above, rounding is softened to
            `floor(c) + sigmoid((2 (c - floor(c)) - 1) / temperature)`, mean-field annealing of the QUBO.
        curvature: `(G, D)`, given for a triangular factor: `matrix` is then zero above the diagonal, half of the
            products are left out, and the loss `sum_j curvature_j (q_j - c_j)^2` is returned.

    Returns:
        `(G, R)` float32 loss if `curvature` is given, else None.
    """
    columns = target.shape[1]
    triangular = curvature is not None
    loss = None if curvature is None else torch.zeros_like(target[:, 0])
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        # the pull on the block of all coordinates as they are, the block's own included
        reach = start if triangular else columns
        pull = torch.bmm(matrix[:, start:stop, :reach], error[:, :reach])
        inner = matrix[:, start:stop, start:stop]
        for j in range(stop - start):
            t = target[:, start + j]
            c = t - pull[:, j]
            if temperature:
                base = c.floor()
                c = base + torch.sigmoid_((c - base).mul_(2).sub_(1).div_(temperature))
            else:
                c = c.round_()
            new = torch.clamp(c, lower[:, start + j], upper[:, start + j]).sub_(t)
            if j + 1 < stop - start:
                change = new if triangular else new - error[:, start + j]
                pull[:, j + 1 :].baddbmm_(inner[:, j + 1 :, j : j + 1], change.unsqueeze(1))
            error[:, start + j] = new
        if loss is not None and curvature is not None:
            residual = pull.add_(error[:, start:stop]).square_()
            loss += torch.bmm(curvature[:, start:stop].unsqueeze(1), residual).squeeze(1)
    return loss
