"""Sequential rounding with error feedback: GPTQ's one pass, written as Babai's nearest plane.

With the Cholesky factor `H = L L^T` the loss of a row is `sum_j (sum_{k >= j} L_kj e_k)^2`: the last coordinate
appears in every term, the first only in its own. Rounding from the last to the first, each coordinate to the nearest
integer of `t_j - sum_{k > j} (L_kj / L_jj) e_k`, makes every term as small as the ones fixed before allow
(Frantar et al. 2022; Chen et al. 2025 show the equivalence). Coordinates with the largest `H_jj` go first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adaround_plugin.problem import Rounding, RoundingProblem
from adaround_plugin.solvers._sweep import sweep

__all__ = ["Sequential", "round_sequentially"]


def round_sequentially(problem: RoundingProblem) -> tuple[Tensor, Tensor]:
    """One pass of error feedback: `(G, R, D)` int64 integers and their `(G, R)` float32 loss."""
    order = problem.hessian.order.unsqueeze(2).expand(-1, -1, problem.target.shape[1])

    def arrange(values: Tensor) -> Tensor:
        return values.transpose(1, 2).gather(1, order).float()

    target, lower, upper = arrange(problem.target), arrange(problem.lower), arrange(problem.upper)
    matrix, curvature = problem.hessian.sequential
    step = None if problem.step is None else arrange(problem.step)
    error = torch.zeros_like(target)
    loss = sweep(error, target, lower, upper, matrix, curvature=curvature, step=step)
    assert loss is not None
    if step is not None:
        error = error / step
    q = torch.clamp((error + target).round_(), lower, upper)
    return torch.zeros_like(q).scatter_(1, order, q).transpose(1, 2).long(), loss


@dataclass(frozen=True)
class Sequential:
    """One pass of rounding with error feedback, the better of it and nearest kept row by row."""

    def solve(self, problem: RoundingProblem) -> Rounding:
        """Solve by one sequential pass."""
        q, _ = round_sequentially(problem)
        return problem.best_of(q)
