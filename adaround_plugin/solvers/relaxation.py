"""The paper's solver: gradient descent on a continuous relaxation of the rounding (equations 21 to 24)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adaround_plugin.errors import InvalidOptionError, taking_derivatives
from adaround_plugin.options import check_integer, check_number, check_solver, named
from adaround_plugin.rounding.problem import Rounding, RoundingProblem, Solver, solved
from adaround_plugin.rounding.qubo import two_levels
from adaround_plugin.rounding.soft_rounding import RectifiedSigmoid, SoftRounding, bracket

__all__ = ["Relaxation", "Schedule", "check_exponents", "check_soft_rounding", "descend"]

# how often it is asked whether every weight has settled
_CHECK = 50


def check_exponents(argument: str, value: Any) -> None:
    """Raise `InvalidOptionError` unless `value` is a pair of positive numbers."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise InvalidOptionError(argument, f"{value!r} is not accepted", "Pass two positive exponents.")
    for one in value:
        check_number(argument, one, above=0)


def check_soft_rounding(argument: str, value: Any) -> None:
    """Raise `InvalidOptionError` unless `value` is a class of soft roundings."""
    if not isinstance(value, type) or not hasattr(value, "spans_grid"):
        raise InvalidOptionError(
            argument, f"{value!r} is not a soft rounding", "Pass a class of adaround_plugin.paper.variants."
        )


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How shares between two levels are moved to 0 or 1 by Adam. The defaults are the paper's settings.

    Attributes:
        iterations: steps of Adam; fewer if every weight has settled at 0 or 1 before.
        learning_rate: of Adam, for `V`; the paper keeps Adam's default.
        regularization: the paper's lambda.
        warm_up: share of the iterations without `f_reg`.
        beta: first and last exponent of `f_reg`.
        soft_rounding: how a share depends on `V`.

    Raises:
        InvalidOptionError: a setting is out of range.
    """

    iterations: int = 10_000
    learning_rate: float = 1e-3
    regularization: float = 1.0
    warm_up: float = 0.2
    beta: tuple[float, float] = (20.0, 2.0)
    soft_rounding: type[SoftRounding] = field(default=RectifiedSigmoid, repr=False)

    def __post_init__(self) -> None:
        check_integer(*named(self, "iterations"), least=1)
        check_number(*named(self, "learning_rate"), above=0)
        check_number(*named(self, "regularization"), least=0)
        check_number(*named(self, "warm_up"), least=0, below=1)
        check_exponents(*named(self, "beta"))
        check_soft_rounding(*named(self, "soft_rounding"))

    def soften(self, lower: Tensor, upper: Tensor, start: Tensor) -> SoftRounding:
        """Soft coordinates between integer bounds that begin at `start`."""
        return self.soft_rounding(lower, upper, start, self.warm_up, self.beta)


@dataclass(frozen=True, kw_only=True)
class Relaxation(Schedule):
    """Relax the rounding problem's quadratic form: equation 25 without the activation function, on all data at once.

    The paper's own form, on minibatches and with the activation function, is `adaround_plugin.Paper`.

    Attributes:
        start: None, so that `h(V)` starts at the fraction of the target, which is `W / s` in the paper; or a solver
            whose integers are the start: a weight may then move a step from them, to the side to which the loss falls.
    """

    start: Solver | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start is not None:
            check_solver("Relaxation.start", self.start)

    def solve(self, problem: RoundingProblem) -> Rounding:
        """Relax on second moments, all rows and all data at once."""
        target, matrix, step = problem.target.float(), problem.hessian.matrix.float(), problem.step.float()
        found = problem.nearest if self.start is None else solved(self.start, problem)
        # rows are problems of their own: each counts relative to the rounding it starts from
        scale = problem.loss(found).float().clamp_min(torch.finfo(torch.float32).tiny)
        if self.start is None:
            inside = problem.clamp(problem.target)
            lower, upper = two_levels(problem)
        else:
            inside = found.double()
            slope = ((found.float() - target) * step) @ matrix * step
            lower, upper = bracket(found, slope, problem.lower, problem.upper)
        if self.soft_rounding.spans_grid:
            lower, upper = problem.lower, problem.upper
        with torch.enable_grad():
            soft = self.soften(lower, upper, inside)

            def loss(progress: float) -> Tensor:
                error = (soft.coordinates(progress) - target) * step
                return (((error @ matrix) * error).sum(-1) / scale).mean()

            descend([soft], [], loss, self)
        return problem.best_of(soft.integers(), found)


def descend(
    softs: Sequence[SoftRounding],
    others: Sequence[dict[str, Any]],
    loss: Callable[[float], Tensor],
    schedule: Schedule,
    *,
    report: Callable[[int, float], None] | None = None,
    decay: bool = False,
    error_context: tuple[str, str] = ("solver", "Pass LayerWise(solver='annealing')."),
    average: Callable[[Sequence[Tensor]], list[Tensor]] = list,
) -> int:
    """Adam on soft roundings, until the iterations are spent or every weight has settled.

    Args:
        softs: what is rounded.
        others: parameter groups of Adam for what else is learned.
        loss: from the share of the iterations done to the error, relative to that of the start.
        schedule: iterations, rates and lambda.
        report: called now and then with the number of iterations and the loss.
        decay: let the rates fall to zero along a half cosine.
        error_context: the option and the remedy that an error names where no derivative can be taken.
        average: the mean of each of some tensors over all machines that learn the same.

    Returns:
        The number of iterations made.
    """
    parameters = [soft.parameter for soft in softs]
    groups = [{"params": parameters, "lr": schedule.learning_rate}, *others] if parameters else list(others)
    optimizer = torch.optim.Adam(groups)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, schedule.iterations) if decay else None
    learned = [parameter for group in groups for parameter in group["params"]]
    weights = sum(parameter.numel() for parameter in parameters)
    for i in range(schedule.iterations):
        progress = i / schedule.iterations
        value = loss(progress)
        penalties = [(soft.penalty(progress), soft.parameter.numel() / weights) for soft in softs]
        total = value
        for penalty, share in penalties:
            if penalty is not None:
                total = total + schedule.regularization * share * penalty
        # not backward(): modules along the way are shared, and must not be left with gradients
        with taking_derivatives(*error_context):
            gradients = average(torch.autograd.grad(total, learned))
        for parameter, gradient in zip(learned, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        if falling is not None:
            falling.step()
        if (i + 1) % _CHECK == 0:
            if report is not None:
                report(i + 1, float(value.detach()))
            if softs and progress >= schedule.warm_up:
                settled = torch.tensor(float(all(soft.settled(progress) for soft in softs)), device="cpu")
                if float(average([settled])[0]) == 1:
                    return i + 1
    return schedule.iterations
