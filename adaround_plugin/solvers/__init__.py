"""Solvers of the rounding problem, one per file; `get_solver` looks them up by name.

Imports `rounding`, `options` and `errors`, and Triton where it runs.
"""

from __future__ import annotations

from adaround_plugin.errors import InvalidOptionError
from adaround_plugin.options import check_solver
from adaround_plugin.rounding.problem import Solver
from adaround_plugin.solvers.annealing import Annealing
from adaround_plugin.solvers.coordinate_descent import CoordinateDescent
from adaround_plugin.solvers.gptq import GPTQ
from adaround_plugin.solvers.nearest import Nearest
from adaround_plugin.solvers.relaxation import Relaxation

__all__ = ["GPTQ", "SOLVERS", "Annealing", "CoordinateDescent", "Nearest", "Relaxation", "get_solver"]

SOLVERS: dict[str, type[Solver]] = {
    "annealing": Annealing,
    "coordinate_descent": CoordinateDescent,
    "gptq": GPTQ,
    "nearest": Nearest,
    "relaxation": Relaxation,
}


def get_solver(solver: str | Solver, argument: str = "solver") -> Solver:
    """The solver of that name with its default settings, or `solver` itself if it already is one.

    Args:
        solver: a name or a solver.
        argument: what errors call it.

    Raises:
        InvalidOptionError: no solver has that name, or the object has no method `solve`.
    """
    if not isinstance(solver, str):
        check_solver(argument, solver)
        return solver
    if solver not in SOLVERS:
        raise InvalidOptionError(argument, f"{solver!r} is not known", f"Pass one of {sorted(SOLVERS)}.")
    return SOLVERS[solver]()
