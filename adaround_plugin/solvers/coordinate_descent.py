"""Coordinate descent on the rounding problem (QuantEase, Behdin et al. 2023): from nearest to a local optimum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adaround_plugin.problem import Rounding, RoundingProblem
from adaround_plugin.solvers._sweep import sweep

__all__ = ["CoordinateDescent", "State"]


class State:
    """A rounding problem laid out for sweeping: `(G, D, R)` float32, one contiguous vector per coordinate."""

    def __init__(self, problem: RoundingProblem) -> None:
        def lay(values: Tensor) -> Tensor:
            return values.transpose(1, 2).float().contiguous()

        self.target, self.lower, self.upper = lay(problem.target), lay(problem.lower), lay(problem.upper)
        self.matrix = problem.hessian.coupling
        self.step = None if problem.step is None else lay(problem.step)
        self.error = torch.zeros_like(self.target)

    def start_from(self, q: Tensor) -> None:
        """Set the present point to `q`, `(G, R, D)`."""
        error = q.transpose(1, 2).float() - self.target
        self.error = (error if self.step is None else error * self.step).contiguous()

    def sweep(self, temperature: float = 0.0) -> None:
        """Visit every coordinate once."""
        sweep(self.error, self.target, self.lower, self.upper, self.matrix, temperature, step=self.step)

    def hardened(self) -> Tensor:
        """The present point rounded to integers inside the bounds: `(G, R, D)` int64."""
        error = self.error if self.step is None else self.error / self.step
        q = torch.clamp((error + self.target).round_(), self.lower, self.upper)
        return q.transpose(1, 2).long()

    def descend(self, sweeps: int) -> Tensor:
        """Hard sweeps until no coordinate changes, or `sweeps` are spent; returns `(G, R, D)` int64.

        A row that a whole sweep leaves unchanged is at its fixed point and takes part no longer.
        """
        self.start_from(self.hardened())
        active = torch.arange(self.target.shape[2], device=self.target.device)
        error, target, lower, upper, step = self.error.clone(), self.target, self.lower, self.upper, self.step
        for _ in range(sweeps):
            before = error.clone()
            sweep(error, target, lower, upper, self.matrix, step=step)
            self.error[..., active] = error
            moving = (error != before).any(dim=1).any(dim=0)
            if not moving.any():
                break
            active = active[moving]
            error, target, lower, upper = (x[..., moving].contiguous() for x in (error, target, lower, upper))
            step = None if step is None else step[..., moving].contiguous()
        return self.hardened()


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
