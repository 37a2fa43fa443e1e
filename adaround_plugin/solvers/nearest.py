"""Round to nearest: the baseline that every other solver has to beat."""

from __future__ import annotations

from dataclasses import dataclass

from adaround_plugin.rounding.problem import Rounding, RoundingProblem

__all__ = ["Nearest"]


@dataclass(frozen=True)
class Nearest:
    """`q = clip(round(w / scale) + zero_point)`, whatever the data says."""

    def solve(self, problem: RoundingProblem) -> Rounding:
        """The problem's own nearest rounding with its loss."""
        return problem.best_of()
