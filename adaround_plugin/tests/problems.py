"""The catalogue of rounding problems that every solver runs through, and a brute-force oracle for small ones."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from adaround_plugin.rounding.hessian import Hessian
from adaround_plugin.rounding.problem import RoundingProblem

__all__ = ["CATALOGUE", "correlated", "definition", "make", "optimum", "small_problem"]


def correlated(groups: int, columns: int, samples: int, seed: int, decay: float = 0.0) -> Tensor:
    """Second moment of `samples` correlated columns, `(G, D, D)` float64; rank-deficient if there are too few."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(groups, columns, columns, generator=generator, dtype=torch.float64)
    scale = torch.arange(1, columns + 1, dtype=torch.float64) ** -decay
    data = torch.randn(groups, samples, columns, generator=generator, dtype=torch.float64) * scale @ mixing
    return data.transpose(1, 2) @ data / samples


def make(
    moment: Tensor,
    rows: int,
    seed: int,
    low: int = -8,
    high: int = 7,
    spread: float = 3.0,
    shift: float = 0.3,
    damping: float = 0.01,
) -> RoundingProblem:
    """A problem as a layer poses it: `nearest` rounds a weight, the target lies `shift` away from that weight."""
    groups, columns = moment.shape[:2]
    generator = torch.Generator().manual_seed(seed)
    weight = spread * torch.randn(groups, rows, columns, generator=generator, dtype=torch.float64)
    target = weight + shift * torch.randn(groups, rows, columns, generator=generator, dtype=torch.float64)
    nearest = weight.round().clamp(low, high).long()
    lower, upper = torch.full_like(nearest, low), torch.full_like(nearest, high)
    return RoundingProblem(target, Hessian.damped(moment, damping), lower, upper, nearest)


def _up_or_down() -> RoundingProblem:
    problem = make(correlated(1, 12, 64, 5), 6, 5, spread=5.0, shift=0.0)
    floor = problem.target.floor().long()
    lower, upper = floor.clamp(-8, 7), (floor + 1).clamp(-8, 7)
    return RoundingProblem(problem.target, problem.hessian, lower, upper, problem.nearest)


def _degenerate() -> RoundingProblem:
    problem = make(correlated(1, 10, 64, 6), 5, 6)
    lower, upper = problem.lower.clone(), problem.upper.clone()
    lower[..., ::2] = upper[..., ::2] = problem.nearest[..., ::2]
    return RoundingProblem(problem.target, problem.hessian, lower, upper, problem.nearest)


def _with_step(problem: RoundingProblem, size: int, seed: int) -> RoundingProblem:
    """The same problem with a grid step that differs from row to row and from group to group of `size` columns."""
    groups, rows, columns = problem.target.shape
    generator = torch.Generator().manual_seed(seed)
    step = 0.3 + torch.rand(groups, rows, -(-columns // size), generator=generator, dtype=torch.float64)
    return replace(problem, step=step.repeat_interleave(size, 2)[..., :columns])


def _diagonal() -> Tensor:
    return torch.diag_embed(torch.tensor([[1.0, 10.0, 0.1, 3.0, 0.5, 2.0]], dtype=torch.float64))


CATALOGUE: dict[str, RoundingProblem] = {
    "correlated": make(correlated(1, 24, 200, 0), 16, 0),
    "wider_than_a_block": make(correlated(1, 110, 400, 1, decay=0.5), 8, 1),
    "rank_deficient": make(correlated(1, 30, 7, 2), 8, 2),
    "dominated_by_few_columns": make(correlated(1, 20, 100, 3, decay=3.0), 8, 3),
    "diagonal": make(_diagonal(), 8, 4, damping=0.0),
    "one_column": make(torch.full((1, 1, 1), 2.5, dtype=torch.float64), 8, 4),
    "constant_data": make(torch.zeros(1, 9, 9, dtype=torch.float64), 4, 4),
    "depthwise": make(correlated(32, 9, 40, 4), 1, 4),
    "grouped": make(correlated(3, 12, 100, 4), 5, 4),
    "up_or_down": _up_or_down(),
    "degenerate_bounds": _degenerate(),
    "two_levels": make(correlated(1, 16, 64, 7), 6, 7, low=0, high=1, spread=1.0),
    "eight_bits": make(correlated(1, 20, 100, 8), 6, 8, low=-128, high=127, spread=40.0),
    "unsigned_range": make(correlated(1, 14, 100, 9), 6, 9, low=0, high=3, spread=2.0),
    "targets_outside_the_range": make(correlated(1, 14, 100, 9), 6, 9, spread=100.0, shift=10.0),
    "targets_far_outside_the_range": make(correlated(1, 14, 100, 9), 6, 9, spread=1e4, shift=1e3),
    "targets_float32_cannot_hold": make(correlated(1, 14, 100, 9), 6, 9, spread=5e7, shift=1e6),
    "small_curvature": make(1e-12 * correlated(1, 14, 100, 9), 6, 9),
    "step_varies": _with_step(make(correlated(1, 60, 200, 10), 7, 10), 16, 10),
    "step_varies_in_groups": _with_step(make(correlated(2, 12, 100, 11), 4, 11), 5, 11),
    "large_curvature": make(1e12 * correlated(1, 14, 100, 9), 6, 9),
}


def definition(problem: RoundingProblem, q: Tensor) -> Tensor:
    """`(q - t) H (q - t)^T` term by term in float64, `(G, R)`."""
    error = (q.double() - problem.target) * problem.step
    return torch.einsum("grj,gjk,grk->gr", error, problem.hessian.matrix, error)


def optimum(problem: RoundingProblem) -> Tensor:
    """The smallest loss of each row over *all* roundings, `(G, R)`; for a handful of columns and levels."""
    groups, rows, _ = problem.target.shape
    best = torch.empty(groups, rows, dtype=torch.float64)
    for g, r in product(range(groups), range(rows)):
        levels = [range(int(a), int(b) + 1) for a, b in zip(problem.lower[g, r], problem.upper[g, r], strict=True)]
        error = torch.tensor(list(product(*levels)), dtype=torch.float64) - problem.target[g, r]
        error = error * problem.step[g, r]
        best[g, r] = ((error @ problem.hessian.matrix[g]) * error).sum(1).min()
    return best


def small_problem(seed: int) -> RoundingProblem:
    """Four rows of up to 7 columns and 2 or 3 levels, strongly correlated; every fifth has a step that varies."""
    columns, high = 4 + seed % 4, 1 + seed % 2
    moment = correlated(1, columns, 3 * columns, 100 + seed)
    problem = make(moment, 4, seed, low=0, high=high, spread=0.8, shift=0.5)
    return _with_step(problem, 2, seed) if seed % 5 == 0 else problem
