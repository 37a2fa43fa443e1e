"""Coordinate descent on the rounding problem (QuantEase, Behdin et al. 2023): from nearest to a local optimum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from adaround_plugin.options import check_integer, named
from adaround_plugin.rounding.problem import Rounding, RoundingProblem
from adaround_plugin.solvers.coordinates import Coordinates, Coupling
from adaround_plugin.solvers.sweep import settle, sweep

__all__ = ["CoordinateDescent", "Descent"]


class Descent:
    """A point of a rounding problem that moves by sweeps over all coordinates."""

    def __init__(self, problem: RoundingProblem) -> None:
        self._at = Coordinates.of(problem.target, problem.lower, problem.upper, problem.step)
        self._coupling = Coupling(problem.hessian.coupling)

    def start_from(self, q: Tensor) -> None:
        """Set the present point to `q`, `(G, R, D)`."""
        at = self._at
        at.error.copy_((q.transpose(1, 2).float() - at.target) * at.step)

    def anneal(self, temperatures: Sequence[float]) -> None:
        """Visit every coordinate once at each temperature."""
        sweep(self._at, self._coupling, temperatures)

    def hardened(self) -> Tensor:
        """The present point rounded to integers inside the bounds: `(G, R, D)` int64."""
        return self._at.rounded().transpose(1, 2).long()

    def descend(self, sweeps: int) -> Tensor:
        """Hard sweeps until no coordinate changes, or `sweeps` are spent; returns `(G, R, D)` int64."""
        self.start_from(self.hardened())
        settle(self._at, self._coupling, sweeps)
        return self.hardened()


@dataclass(frozen=True)
class CoordinateDescent:
    """Hard Gauss-Seidel sweeps from round-to-nearest.

    Attributes:
        sweeps: upper bound on the number of sweeps; descent stops earlier when nothing changes.

    Raises:
        InvalidOptionError: it is no integer, or negative.
    """

    sweeps: int = 30

    def __post_init__(self) -> None:
        check_integer(*named(self, "sweeps"), least=0)

    def solve(self, problem: RoundingProblem) -> Rounding:
        """Descend from the problem's nearest rounding."""
        descent = Descent(problem)
        descent.start_from(problem.nearest)
        return problem.best_of(descent.descend(self.sweeps))
