"""Coordinate descent on the rounding problem (QuantEase, Behdin et al. 2023): from nearest downhill to a local optimum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..problem import Rounding, RoundingProblem
from ._sweep import sweep

__all__ = ["CoordinateDescent", "State"]


class State:
    """A rounding problem laid out for sweeping: `(G, D, R)` float32, one contiguous vector per coordinate."""

    def __init__(self, problem: RoundingProblem) -> None:
        def lay(values: Tensor) -> Tensor:
            return values.transpose(1, 2).float().contiguous()

        self.target, self.lower, self.upper = lay(problem.target), lay(problem.lower), lay(problem.upper)
        self.matrix = problem.hessian.coupling
        self.error = torch.zeros_like(self.target)

    def start_from(self, q: Tensor) -> None:
        """Set the present point to `q`, `(G, R, D)`."""
        self.error = q.transpose(1, 2).float() - self.target

    def sweep(self, temperature: float = 0.0) -> None:
        """Visit every coordinate once."""
        sweep(self.error, self.target, self.lower, self.upper, self.matrix, temperature)

    def harden(self) -> None:
        """Round the present point to integers."""
        q = (self.error + self.target).round_()
        self.error = torch.clamp(q, self.lower, self.upper) - self.target

    def descend(self, sweeps: int) -> Tensor:
        """Hard sweeps until no coordinate of any row changes, or `sweeps` are spent; returns `(G, R, D)` int64."""
        self.harden()
        for _ in range(sweeps):
            before = self.error.clone()
            self.sweep()
            if torch.equal(before, self.error):
                break
        return (self.error + self.target).round_().transpose(1, 2).long()


@dataclass(frozen=True)
class CoordinateDescent:
    """Hard Gauss-Seidel sweeps from round-to-nearest.

    Attributes:
        sweeps: upper bound on the number of sweeps; descent stops earlier when nothing changes.
    """

    sweeps: int = 30

    def solve(self, problem: RoundingProblem) -> Rounding:
        """Descend from the problem's nearest rounding."""
        state = State(problem)
        state.start_from(problem.nearest)
        return problem.best_of(state.descend(self.sweeps))
