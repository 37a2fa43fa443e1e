"""GPTQ: one pass of rounding with error feedback, written as Babai's nearest plane.

With the Cholesky factor `H = L L^T` the loss of a row is `sum_j (sum_{k >= j} L_kj e_k)^2`: the last coordinate
appears in every term, the first only in its own. Rounding from the last to the first, each coordinate to the nearest
integer of `t_j - sum_{k > j} (L_kj / L_jj) e_k`, makes every term as small as the ones fixed before allow
(Frantar et al. 2022; Chen et al. 2025 show the equivalence). Coordinates with the largest `H_jj` go first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adaround_plugin.rounding.hessian import Hessian
from adaround_plugin.rounding.problem import Rounding, RoundingProblem
from adaround_plugin.solvers.coordinates import Coordinates, Coupling
from adaround_plugin.solvers.sweep import sweep

__all__ = ["GPTQ", "feed_errors_back", "round_in_order"]


def feed_errors_back(hessian: Hessian, at: Coordinates) -> Tensor:
    """One pass of error feedback: `(G, R)` float32 loss of each row.

    Args:
        hessian: the quadratic form.
        at: of any number of rows, in visiting order; left at the integers found.
    """
    return sweep(at, Coupling(*hessian.sequential))


def round_in_order(problem: RoundingProblem) -> tuple[Tensor, Tensor]:
    """One pass of error feedback: `(G, R, D)` int64 integers and their `(G, R)` float32 loss."""
    order = problem.hessian.order
    at = Coordinates.of(problem.target, problem.lower, problem.upper, problem.step, order)
    loss = feed_errors_back(problem.hessian, at)
    q = at.rounded()
    return torch.zeros_like(q).scatter_(1, order.unsqueeze(2).expand(q.shape), q).transpose(1, 2).long(), loss


@dataclass(frozen=True)
class GPTQ:
    """One pass of rounding with error feedback, the better of it and nearest kept row by row."""

    def solve(self, problem: RoundingProblem) -> Rounding:
        """Solve by one pass."""
        return problem.best_of(round_in_order(problem)[0])
