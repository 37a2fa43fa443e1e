"""Annealed coordinate descent: the default solver.

Mean-field annealing (Hopfield and Tank 1985; Peterson and Anderson 1987) of the paper's quadratic problem: coordinate
descent whose rounding is softened by a temperature that falls geometrically, so that early decisions stay soft while
others are still moving. At temperature 0 it is plain coordinate descent. Rows are independent given the hessian, so
the better of annealing and of GPTQ followed by descent is kept row by row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adaround_plugin.options import check_integer, check_number, named
from adaround_plugin.rounding.problem import Rounding, RoundingProblem
from adaround_plugin.solvers.coordinate_descent import Descent
from adaround_plugin.solvers.gptq import round_in_order

__all__ = ["Annealing"]


@dataclass(frozen=True)
class Annealing:
    """Annealed sweeps, then hard descent; the better of it and GPTQ with descent, row by row.

    Attributes:
        sweeps: number of annealed sweeps.
        hot, cold: first and last temperature, in grid steps.
        descent_sweeps: upper bound on the hard sweeps that follow.

    Raises:
        InvalidOptionError: a setting is out of range.
    """

    sweeps: int = 20
    hot: float = 0.5
    cold: float = 0.05
    descent_sweeps: int = 10

    def __post_init__(self) -> None:
        check_integer(*named(self, "sweeps"), least=0)
        check_number(*named(self, "hot"), above=0)
        check_number(*named(self, "cold"), above=0)
        check_integer(*named(self, "descent_sweeps"), least=0)

    def solve(self, problem: RoundingProblem) -> Rounding:
        """Anneal from the unrounded target."""
        descent = self._annealed(problem)
        annealed, (fed_back, loss) = descent.hardened(), round_in_order(problem)
        better = (problem.loss(annealed) < loss).unsqueeze(-1)
        descent.start_from(torch.where(better, annealed, fed_back))
        return problem.best_of(descent.descend(self.descent_sweeps))

    def anneal(self, problem: RoundingProblem, start: Tensor | None = None) -> Tensor:
        """The annealed and descended integers, `(G, R, D)` int64, compared with no others.

        Args:
            problem: to solve.
            start: `(G, R, D)`, where sweeps start from; the unrounded target if None.
        """
        return self._annealed(problem, start).descend(self.descent_sweeps)

    def _annealed(self, problem: RoundingProblem, start: Tensor | None = None) -> Descent:
        descent = Descent(problem)
        descent.start_from(problem.clamp(problem.target) if start is None else start)
        last = max(1, self.sweeps - 1)
        descent.anneal([self.hot * (self.cold / self.hot) ** (i / last) for i in range(self.sweeps)])
        return descent
