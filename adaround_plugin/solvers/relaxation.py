"""The paper's solver: gradient descent on a continuous relaxation of the rounding (equations 21 to 25)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from adaround_plugin.errors import InvalidOptionError, taking_derivatives
from adaround_plugin.problem import Rounding, RoundingProblem, Solver
from adaround_plugin.soft_rounding import VARIANTS, SoftRounding, Variant, bracket, soft_rounding

__all__ = ["NO_DERIVATIVE", "Relaxation", "descend"]

NO_DERIVATIVE = "Pass solver='annealing', or blocks without the operator that has none."
# how often it is asked whether every weight has settled
_CHECK = 50


@dataclass(frozen=True)
class Relaxation:
    """Learn `h(V)` by Adam. The defaults are the paper's settings.

    On `data="samples"` the loss is equation 25, evaluated on minibatches through the host's own operators:
    `|| f_a(W x) - f_a(W~ x^) ||^2 + lambda f_reg(V)`. On `data="moments"` it is the rounding problem's quadratic form,
    which is (25) without the activation function on all the data at once.

    `lambda` means the same for every layer: the error is divided by the error of the rounding that the layer starts
    from (round-to-nearest, or what `start` found), and `f_reg` is the mean over the weights. The paper has
    lambda = 0.01 with a squared error and a sum over weights whose scales it does not give.

    Attributes:
        iterations: steps of Adam for each layer or block; fewer if every weight has settled at 0 or 1 before.
        batch_size: samples in a minibatch; a program exported for one batch size has that.
        learning_rate: of Adam, for `V`; the paper keeps Adam's default.
        regularization: lambda.
        warm_up: share of the iterations without `f_reg`.
        beta: first and last exponent of `f_reg`.
        variant: how `h` depends on `V`, see `adaround_plugin.soft_rounding`.
        data: `"samples"` or `"moments"`.
        start: None, so that `h(V)` starts at the fraction of `W / s` as in the paper; or a solver whose integers are
            the start: a weight may then move one step from them, to the side to which the loss falls.
        activation: whether the loss is taken after the activation function that follows the layer (samples only).
        drop: probability with which an activation inside, or at the entry of, a block is left unquantized in a step
            (QDrop, Wei et al. 2022, arXiv 2203.05740); needs samples.
        fisher: weigh the output's entries by their squared gradient of the network's output (BRECQ, Li et al. 2021,
            arXiv 2102.05426, with the output's own squared error in place of labels); needs samples.
        learn_scale: learn the scale too, where it is ours to choose; needs samples. (Biases are learned with a recipe
            that corrects them.)
        seed: of the minibatches and of dropping.
    """

    iterations: int = 10_000
    batch_size: int = 32
    learning_rate: float = 1e-3
    regularization: float = 1.0
    warm_up: float = 0.2
    beta: tuple[float, float] = (20.0, 2.0)
    variant: Variant = "rectified_sigmoid"
    data: Literal["samples", "moments"] = "samples"
    start: Solver | None = None
    activation: bool = True
    drop: float = 0.0
    fisher: bool = False
    learn_scale: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self)

    def solve(self, problem: RoundingProblem) -> Rounding:
        """Relax on second moments, all rows and all data at once."""
        target, matrix = problem.target.float(), problem.hessian.matrix.float()
        step = 1.0 if problem.step is None else problem.step.float()
        found = problem.nearest if self.start is None else self.start.solve(problem).integers
        # rows are problems of their own: each counts relative to the rounding it starts from
        scale = problem.loss(found).float().clamp_min(torch.finfo(torch.float32).tiny)
        if self.start is None:
            inside = problem.clamp(problem.target)
            lower = inside.floor().long()
            upper = problem.clamp(lower + 1)
        else:
            inside = found.double()
            slope = ((found.float() - target) * step) @ matrix * step
            lower, upper = bracket(found, slope, problem.lower, problem.upper)
        if self.variant == "straight_through":
            lower, upper = problem.lower, problem.upper
        with torch.enable_grad():
            soft = soft_rounding(self.variant, lower, upper, inside, self.warm_up, self.beta)

            def loss(progress: float) -> Tensor:
                error = (soft.coordinates(progress) - target) * step
                return (((error @ matrix) * error).sum(-1) / scale).mean()

            descend([soft], [], loss, self)
        return problem.best_of(soft.integers(), found)


def descend(
    softs: Sequence[SoftRounding],
    others: Sequence[dict[str, Any]],
    loss: Callable[[float], Tensor],
    settings: Relaxation,
    report: Callable[[int, float], None] | None = None,
    decay: bool = False,
    blame: tuple[str, str] = ("solver", NO_DERIVATIVE),
) -> int:
    """Adam on soft roundings, until the iterations are spent or every weight has settled.

    Args:
        softs: what is rounded.
        others: parameter groups of Adam for what else is learned.
        loss: from the share of the iterations done to the error, relative to that of the start.
        settings: iterations, rates and lambda.
        report: called now and then with the number of iterations and the loss.
        decay: let the rates fall to zero along a half cosine.
        blame: the option and the remedy that an error names where no derivative can be taken.

    Returns:
        The number of iterations made.
    """
    parameters = [soft.parameter for soft in softs]
    groups = [{"params": parameters, "lr": settings.learning_rate}, *others] if parameters else list(others)
    optimizer = torch.optim.Adam(groups)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.iterations) if decay else None
    learned = [parameter for group in groups for parameter in group["params"]]
    weights = sum(parameter.numel() for parameter in parameters)
    for i in range(settings.iterations):
        progress = i / settings.iterations
        value = loss(progress)
        penalties = [(soft.penalty(progress), soft.parameter.numel() / weights) for soft in softs]
        total = value
        for penalty, share in penalties:
            if penalty is not None:
                total = total + settings.regularization * share * penalty
        # not backward(): modules along the way are shared, and must not be left with gradients
        with taking_derivatives(*blame):
            gradients = torch.autograd.grad(total, learned)
        for parameter, gradient in zip(learned, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        if falling is not None:
            falling.step()
        if (i + 1) % _CHECK == 0:
            if report is not None:
                report(i + 1, float(value.detach()))
            if softs and progress >= settings.warm_up and all(soft.settled(progress) for soft in softs):
                return i + 1
    return settings.iterations


def _check(settings: Relaxation) -> None:
    """Raise `InvalidOptionError` unless the settings make sense together."""

    def refuse(name: str, remedy: str) -> None:
        raise InvalidOptionError(f"Relaxation.{name}", f"{getattr(settings, name)!r} is not accepted", remedy)

    for name in ("iterations", "batch_size"):
        if not isinstance(getattr(settings, name), int) or getattr(settings, name) < 1:
            refuse(name, "Pass a positive integer.")
    if not settings.learning_rate > 0:
        refuse("learning_rate", "Pass a positive number.")
    if not settings.regularization >= 0:
        refuse("regularization", "Pass 0 or more.")
    for name in ("warm_up", "drop"):
        if not 0 <= getattr(settings, name) < 1:
            refuse(name, "Pass a share from 0 to below 1.")
    if len(settings.beta) != 2 or min(settings.beta) <= 0:
        refuse("beta", "Pass two positive exponents.")
    if settings.variant not in VARIANTS:
        refuse("variant", f"Pass one of {list(VARIANTS)}.")
    if settings.data not in ("samples", "moments"):
        refuse("data", "Pass 'samples' or 'moments'.")
    if settings.data == "moments" and (settings.drop or settings.fisher or settings.learn_scale):
        refuse("data", "drop, fisher and learn_scale need data='samples'.")
    if settings.fisher and not settings.activation:
        refuse("fisher", "It needs activation=True: what follows a layer is seen behind its activation function.")
    if settings.start is not None and not callable(getattr(settings.start, "solve", None)):
        refuse("start", "Pass None, or a solver such as Annealing().")
