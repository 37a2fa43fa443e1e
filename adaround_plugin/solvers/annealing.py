"""Annealed coordinate descent: the default solver.

Mean-field annealing (Hopfield and Tank 1985; Peterson and Anderson 1987) of the paper's quadratic problem: coordinate
descent whose rounding is softened by a temperature that falls geometrically, so that early decisions stay soft while
others are still moving. At temperature 0 it is plain coordinate descent. Rows are independent given the hessian, so
the better of annealing and of sequential rounding followed by descent is kept row by row.
"""

from __future__ import annotations

from dataclasses import dataclass

from adaround_plugin.problem import Rounding, RoundingProblem
from adaround_plugin.solvers.coordinate_descent import State
from adaround_plugin.solvers.sequential import round_sequentially

__all__ = ["Annealing"]


@dataclass(frozen=True)
class Annealing:
    """Annealed sweeps, then hard descent; the better of it and sequential rounding with descent, row by row.

    Attributes:
        sweeps: number of annealed sweeps.
        hot, cold: first and last temperature, in grid steps.
        descent_sweeps: upper bound on the hard sweeps that follow.
    """

    sweeps: int = 20
    hot: float = 0.5
    cold: float = 0.05
    descent_sweeps: int = 10

    def solve(self, problem: RoundingProblem) -> Rounding:
        """Anneal from the unrounded target."""
        state = State(problem)
        state.start_from(problem.clamp(problem.target))
        for i in range(self.sweeps):
            state.sweep(self.hot * (self.cold / self.hot) ** (i / max(1, self.sweeps - 1)))
        start = problem.best_of(state.hardened(), round_sequentially(problem)[0])
        state.start_from(start.integers)
        return problem.best_of(state.descend(self.descent_sweeps))
