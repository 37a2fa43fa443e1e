"""The cross-entropy method (Rubinstein 1999), with which the AdaRound paper solves its binary problem.

Every weight has a Bernoulli distribution over two levels. A generation of roundings is drawn, the best few are the
elite, and the distribution moves towards the elite's mean, until it is degenerate. It starts at the fractional part of
the target, that is at stochastic rounding. The method asks for losses alone and never for a factor of the hessian.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adaround_plugin.options import check_integer, check_number, check_seed, named
from adaround_plugin.rounding.problem import Rounding, RoundingProblem
from adaround_plugin.rounding.qubo import two_levels

__all__ = ["CrossEntropy"]

# entries of the samples that are in memory at a time; a whole row's generation always is
_ENTRIES = 2**20
# a probability this close to 0 or 1 is decided; the start keeps this far from both
_DECIDED, _OPEN = 1e-3, 0.1


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy search over two levels per weight, the best of all samples and of nearest kept row by row.

    Where the box has two levels per coordinate, as with `levels="up_or_down"`, these are the search space. Where it
    has more, the search space is the floor and the ceil of the target (the two levels at the box's end for a target
    outside it): other levels are never tried.

    Attributes:
        samples: roundings of a row drawn in each generation.
        elite: share of them that the distribution moves towards.
        smoothing: how far it moves, from 0 (not at all) to 1 (to the elite's mean).
        iterations: upper bound on the generations; a row whose distribution is degenerate stops earlier.
        seed: of the draws. All rows see the same uniform numbers, so a row's answer does not depend on the others.

    Raises:
        InvalidOptionError: a setting is out of range.
    """

    samples: int = 512
    elite: float = 0.05
    smoothing: float = 0.3
    iterations: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        check_integer(*named(self, "samples"), least=1)
        check_integer(*named(self, "iterations"), least=1)
        check_number(*named(self, "elite"), above=0, most=1)
        check_number(*named(self, "smoothing"), above=0, most=1)
        check_seed(*named(self, "seed"))

    def solve(self, problem: RoundingProblem) -> Rounding:
        """Search every row; groups and rows go together, as many as fit in memory."""
        groups, rows, columns = problem.target.shape
        at_once = max(1, _ENTRIES // (self.samples * columns))
        group_size, row_size = max(1, at_once // rows), min(rows, at_once)
        found = torch.empty_like(problem.nearest)
        for g in range(0, groups, group_size):
            for r in range(0, rows, row_size):
                part = slice(g, g + group_size), slice(r, r + row_size)
                found[part] = self._search(problem.part(*part))
        return problem.best_of(found)

    def _search(self, problem: RoundingProblem) -> Tensor:
        """The best rounding drawn for each row: `(G, R, D)` int64."""
        low, high = two_levels(problem)
        free = high > low
        # stochastic rounding; no level is out of the question before anything was drawn
        chance = (problem.target - low).clamp(_OPEN, 1 - _OPEN) * free
        best = torch.zeros_like(free)
        best_loss = torch.full_like(chance[..., 0], torch.inf)
        generator = torch.Generator().manual_seed(self.seed)
        moving = torch.ones_like(best_loss, dtype=torch.bool)
        for _ in range(self.iterations):
            size = self.samples, chance.shape[2]
            drawn = torch.rand(size, generator=generator, dtype=chance.dtype, device="cpu")
            bits = drawn.to(chance.device) < chance.unsqueeze(2)  # (G, R, samples, D)
            loss = _losses(problem, low, bits)
            elite = loss.topk(max(1, round(self.elite * self.samples)), dim=2, largest=False)
            chosen = _gather(bits, elite.indices)
            better = moving & (elite.values[..., 0] < best_loss)
            best_loss = torch.where(better, elite.values[..., 0], best_loss)
            best = torch.where(better.unsqueeze(2), chosen[:, :, 0], best)
            target = chosen.to(chance.dtype).mean(2)
            chance = torch.where(moving.unsqueeze(2), chance.lerp(target, self.smoothing), chance)
            moving = moving & (torch.minimum(chance, 1 - chance) > _DECIDED).any(2)
            if not moving.any():
                break
        return low + best.long()


def _losses(problem: RoundingProblem, low: Tensor, bits: Tensor) -> Tensor:
    """The loss of each of `(G, R, samples, D)` roundings: `(G, R, samples)`."""
    error = ((low - problem.target).unsqueeze(2) + bits) * problem.step.unsqueeze(2)
    # all samples of a group's rows meet the hessian in one product
    return problem.hessian.quadratic(error.flatten(1, 2)).reshape(bits.shape[:3])


def _gather(bits: Tensor, index: Tensor) -> Tensor:
    """The samples of each row at `(G, R, n)` indices: `(G, R, n, D)`."""
    return bits.gather(2, index.unsqueeze(3).expand(-1, -1, -1, bits.shape[3]))
