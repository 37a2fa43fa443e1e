"""Solvers of the rounding problem, one per file; `get_solver` looks them up by name."""

from __future__ import annotations

from adaround_plugin.errors import InvalidOptionError
from adaround_plugin.problem import Solver
from adaround_plugin.solvers.annealing import Annealing
from adaround_plugin.solvers.coordinate_descent import CoordinateDescent
from adaround_plugin.solvers.cross_entropy import CrossEntropy
from adaround_plugin.solvers.nearest import Nearest
from adaround_plugin.solvers.relaxation import Relaxation
from adaround_plugin.solvers.sequential import Sequential

__all__ = ["Annealing", "CoordinateDescent", "CrossEntropy", "Nearest", "Relaxation", "Sequential", "get_solver"]

_SOLVERS: dict[str, type[Solver]] = {
    "annealing": Annealing,
    "coordinate_descent": CoordinateDescent,
    "cross_entropy": CrossEntropy,
    "nearest": Nearest,
    "relaxation": Relaxation,
    "sequential": Sequential,
}


def get_solver(solver: str | Solver) -> Solver:
    """The solver of that name with its default settings, or `solver` itself if it already is one.

    Raises:
        InvalidOptionError: no solver has that name.
    """
    if not isinstance(solver, str):
        if not callable(getattr(solver, "solve", None)):
            raise InvalidOptionError("solver", f"{solver!r} has no solve method", f"Pass one of {sorted(_SOLVERS)}.")
        return solver
    if solver not in _SOLVERS:
        raise InvalidOptionError("solver", f"{solver!r} is not known", f"Pass one of {sorted(_SOLVERS)}.")
    return _SOLVERS[solver]()
