"""The rounding problem of one small layer under the task loss itself: section 3 of the AdaRound paper.

The mean loss is expanded to second order in all weights of the layer (arXiv 2004.10568, equation 13),

    L(w + d) - L(w)  ~  g d^T + 1/2 d H d^T,

with the exact Hessian, so every weight is coupled with every other, not only with those of its own output channel. A
layer of D weights needs a D x D matrix and about D backward passes per batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, jacrev

from adaround_plugin.errors import InvalidBatchError, InvalidModelError, InvalidOptionError, NonFiniteError
from adaround_plugin.graph.compat import Dropout, Normalization
from adaround_plugin.grid import Grid
from adaround_plugin.hessian import Hessian
from adaround_plugin.problem import RoundingProblem
from adaround_plugin.schemes import up_or_down

__all__ = ["MAX_WEIGHTS", "Loss", "TaskLoss", "expand_task_loss", "task_loss_problem", "up_or_down_problem"]

# from (a stand-in for the model, a batch) to losses, one for each sample
Loss = Callable[[Callable[..., Any], Any], Tensor]

# the largest layer: its Hessian takes 128 MiB in float64
MAX_WEIGHTS = 4096


@dataclass(frozen=True)
class TaskLoss:
    """The mean task loss around one weight, to second order.

    Attributes:
        weight: the float weight of `D` entries, which are numbered in the order of `weight.flatten()`.
        value: the mean loss at the float weight.
        gradient: `(D,)` float64.
        hessian: `(D, D)` float64, symmetric, as it is: it may be indefinite.
    """

    weight: Tensor
    value: float
    gradient: Tensor
    hessian: Tensor

    def increase(self, weight: Tensor) -> float:
        """What the expansion predicts for the loss at another weight, less `value`: `g d^T + 1/2 d H d^T`."""
        change = (weight.double() - self.weight.double()).flatten()
        return float(self.gradient @ change + 0.5 * change @ self.hessian @ change)

    def problem(self, grid: Grid, *, gradient: bool = False, damping: float = 0.01) -> RoundingProblem:
        """Round every weight up or down so that the loss grows least: one row, `(1, 1, D)`.

        The problem's loss is the predicted growth of the mean loss; with `gradient`, up to a constant.

        A rounding problem needs a definite form. Directions of negative curvature, along which a quadratic promises
        to lower the loss without end, are taken as flat: the Hessian is projected on the positive semidefinite cone
        (the nearest such matrix, Higham 1988), which leaves all other directions as they are, where a ridge large
        enough to lift them would pull the whole layer towards nearest. Behind piecewise linear activations with a
        convex loss there are none. A ridge relative to the mean diagonal, the same as for every other layer, then
        makes the form definite where the data say nothing.

        Args:
            grid: of the weight.
            gradient: keep the linear term, which the paper drops because it vanishes for a converged network.
            damping: ridge relative to the mean diagonal of the projected Hessian.

        Raises:
            InvalidOptionError: the damping is not positive.
        """
        if not damping > 0:
            raise InvalidOptionError("damping", f"{damping!r} is not positive", "Pass a positive number.")
        values, vectors = torch.linalg.eigh(self.hessian)
        # half of it: the loss is 1/2 d H d^T
        projected = (vectors * (0.5 * values.clamp_min(0))) @ vectors.T
        hessian = Hessian.damped(projected.unsqueeze(0), damping)
        target = self.weight.double().reshape(1, 1, -1)
        if gradient:
            # d M d^T + g d^T is least at d = -1/2 g M^-1
            target = target - 0.5 * hessian.solve(self.gradient.reshape(1, 1, -1))
        return up_or_down_problem(grid, self.weight, lambda values: values.reshape(1, 1, -1), hessian, target)


def task_loss_problem(
    model: nn.Module,
    name: str,
    loss: Loss,
    batches: Iterable[Any],
    grid: Grid,
    *,
    gradient: bool = False,
    damping: float = 0.01,
    chunk: int = 64,
) -> RoundingProblem:
    """The rounding problem of one layer under the task loss: `expand_task_loss`, then `TaskLoss.problem`."""
    expansion = expand_task_loss(model, name, loss, batches, chunk=chunk)
    return expansion.problem(grid, gradient=gradient, damping=damping)


def expand_task_loss(model: nn.Module, name: str, loss: Loss, batches: Iterable[Any], *, chunk: int = 64) -> TaskLoss:
    """Expand the mean task loss to second order in the weight of one layer.

    Args:
        model: the float model in eval mode; it is not changed.
        name: of the layer, or of its weight parameter.
        loss: from a stand-in that is called like the model, and a batch, to the losses of its samples, such as
            `lambda run, batch: F.cross_entropy(run(batch[0]), batch[1], reduction="none")`. The mean is taken over
            all entries of all batches, so batches may differ in size.
        batches: whatever `loss` understands.
        chunk: rows of the Hessian that are computed together; fewer need less memory.

    Raises:
        InvalidOptionError: no such layer, one with more than `MAX_WEIGHTS` weights, a chunk that is not positive, or
            a loss that returns no tensor.
        InvalidModelError: the model is in train mode.
        InvalidBatchError: there are no batches.
        NonFiniteError: the loss or a derivative of it holds NaN or infinity.
    """
    if not (isinstance(chunk, int) and chunk > 0):
        raise InvalidOptionError("chunk", f"{chunk!r} is not a positive integer", "Pass at least 1.")
    _check_eval(model)
    parameter = _parameter(model, name)
    weight = dict(model.named_parameters(remove_duplicate=False))[parameter].detach()

    def total(flat: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        """The sum of a batch's losses at another weight, and their number."""

        def run(*args: Any, **kwargs: Any) -> Any:
            return functional_call(model, {parameter: flat.view_as(weight)}, args, kwargs)

        losses = loss(run, batch)
        if not isinstance(losses, Tensor):
            raise InvalidOptionError("loss", f"returned {type(losses).__name__}", "Return a tensor of losses.")
        return losses.sum(), torch.tensor(losses.numel())

    slope = grad_and_value(total, has_aux=True)
    curvature = jacrev(lambda flat, batch: slope(flat, batch)[0], chunk_size=chunk)
    size = weight.numel()
    value, count = 0.0, 0
    gradient = torch.zeros(size, dtype=torch.float64, device=weight.device)
    hessian = torch.zeros(size, size, dtype=torch.float64, device=weight.device)
    # torch.func differentiates all the same; the other parameters' gradients are not recorded
    with torch.no_grad():
        for batch in batches:
            first, (batch_value, entries) = slope(weight.flatten(), batch)
            value, count = value + float(batch_value), count + int(entries)
            gradient += first
            hessian += curvature(weight.flatten(), batch)
    if not count:
        raise InvalidBatchError("batches", "holds no data", "Pass batches of at least one sample.")
    hessian = (hessian + hessian.T) / (2 * count)
    if not (torch.isfinite(hessian).all() and torch.isfinite(gradient).all()):
        raise NonFiniteError(f"layer {name!r}", "the loss has a derivative that is not finite", "Check the loss.")
    return TaskLoss(weight, value / count, gradient / count, hessian)


def up_or_down_problem(
    grid: Grid,
    weight: Tensor,
    rows: Callable[[Tensor], Tensor],
    hessian: Hessian,
    target: Tensor,
) -> RoundingProblem:
    """The rounding problem of a weight in the paper's search space, in the units of the hessian.

    Args:
        grid, weight: what is rounded.
        rows: lays anything of the weight's shape out as `(G, R, D)`.
        hessian: `D` columns in each of `G` groups, in weight units.
        target: `(G, R, D)` float64, the row to imitate, in weight units.
    """
    lower, upper = up_or_down(grid, weight)
    scale = rows(grid.expand(grid.scale, weight.shape)).double()
    target = target / scale + rows(grid.expand(grid.zero_point, weight.shape))
    return RoundingProblem(target, hessian, rows(lower), rows(upper), rows(grid.nearest(weight)), scale)


def _check_eval(model: nn.Module) -> None:
    """Raise unless the modules that behave differently in training are in eval mode."""
    for name, module in model.named_modules():
        if module.training and isinstance(module, Dropout | Normalization):
            raise InvalidModelError(f"module {name!r}", "is in train mode", "Call .eval() first.")


def _parameter(model: nn.Module, name: str) -> str:
    """The qualified name of a layer's weight; the layer must be small."""
    sizes = {own: values.numel() for own, values in model.named_parameters(remove_duplicate=False)}
    for found in (name, f"{name}.weight"):
        if found not in sizes:
            continue
        if sizes[found] > MAX_WEIGHTS:
            raise InvalidOptionError(
                "name",
                f"layer {name!r} has {sizes[found]} weights, and its task-loss Hessian a row and a column for each",
                f"Choose a layer of at most {MAX_WEIGHTS} weights; the local form serves layers of any size.",
            )
        return found
    raise InvalidOptionError("name", f"{name!r} is none of the model's parameters {sorted(sizes)}", "Check the name.")
