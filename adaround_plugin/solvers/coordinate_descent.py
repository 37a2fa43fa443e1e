"""Coordinate descent on the rounding problem (QuantEase, Behdin et al. 2023): from nearest to a local optimum."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adaround_plugin.rounding.problem import Rounding, RoundingProblem
from adaround_plugin.solvers.coordinates import Coordinates, Coupling
from adaround_plugin.solvers.sweep import sweep

__all__ = ["CoordinateDescent", "Descent"]


class Descent:
    """A point of a rounding problem that moves by sweeps over all coordinates."""

    def __init__(self, problem: RoundingProblem) -> None:
        self._at = Coordinates.of(problem, lambda values: values.transpose(1, 2))
        self._coupling = Coupling(problem.hessian.coupling)

    def start_from(self, q: Tensor) -> None:
        """Set the present point to `q`, `(G, R, D)`."""
        at = self._at
        at.error.copy_((q.transpose(1, 2).float() - at.target) * at.step)

    def sweep(self, temperature: float = 0.0) -> None:
        """Visit every coordinate once."""
        sweep(self._at, self._coupling, temperature)

    def hardened(self) -> Tensor:
        """The present point rounded to integers inside the bounds: `(G, R, D)` int64."""
        return self._at.rounded().transpose(1, 2).long()

    def descend(self, sweeps: int) -> Tensor:
        """Hard sweeps until no coordinate changes, or `sweeps` are spent; returns `(G, R, D)` int64.

        A row that a whole sweep leaves unchanged is at its fixed point and takes part no longer.
        """
        self.start_from(self.hardened())
        rows = torch.arange(self._at.target.shape[2], device=self._at.target.device)
        moving = replace(self._at, error=self._at.error.clone())
        for _ in range(sweeps):
            before = moving.error.clone()
            sweep(moving, self._coupling)
            self._at.error[..., rows] = moving.error
            changed = (moving.error != before).any(dim=1).any(dim=0)
            if not changed.any():
                break
            rows = rows[changed]
            moving = moving.map(lambda values, changed=changed: values[..., changed].contiguous())  # type: ignore[misc]
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
        descent = Descent(problem)
        descent.start_from(problem.nearest)
        return problem.best_of(descent.descend(self.sweeps))
