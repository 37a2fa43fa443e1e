"""The rounding problem of one small layer under the task loss itself: section 3 of the AdaRound paper.

The mean loss is expanded to second order in all weights of the layer (arXiv 2004.10568, equation 13),

    L(w + d) - L(w)  ~  g d^T + 1/2 d H d^T,

with the exact Hessian, so every weight is coupled with every other, not only with those of its own output channel. A
layer of D weights needs a D x D matrix and about D backward passes per batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from adaround_plugin.errors import InvalidBatchError, InvalidModelError, InvalidOptionError, NonFiniteError
from adaround_plugin.graph.compat import Dropout, Normalization
from adaround_plugin.options import check_integer, check_number
from adaround_plugin.rounding.grid import Grid
from adaround_plugin.rounding.hessian import Hessian
from adaround_plugin.rounding.problem import RoundingProblem
from adaround_plugin.rounding.qubo import up_or_down_problem

__all__ = ["MAX_WEIGHTS", "Loss", "TaskLoss", "expand_task_loss"]

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
        check_number("damping", damping, above=0)
        values, vectors = torch.linalg.eigh(self.hessian)
        # half of it: the loss is 1/2 d H d^T
        projected = (vectors * (0.5 * values.clamp_min(0))) @ vectors.T
        hessian = Hessian.damped(projected.unsqueeze(0), damping)
        target = self.weight.double().reshape(1, 1, -1)
        if gradient:
            # d M d^T + g d^T is least at d = -1/2 g M^-1
            target = target - 0.5 * hessian.solve(self.gradient.reshape(1, 1, -1))
        return up_or_down_problem(grid, self.weight, lambda values: values.reshape(1, 1, -1), hessian, target)


def expand_task_loss(model: nn.Module, name: str, loss: Loss, batches: Iterable[Any], *, chunk: int = 1) -> TaskLoss:
    """Expand the mean task loss to second order in the weight of one layer.

    Args:
        model: the float model in eval mode; it is not changed.
        name: of the layer, or of its weight parameter.
        loss: from a stand-in that is called like the model, and a batch, to the losses of its samples, such as
            `lambda run, batch: F.cross_entropy(run(batch[0]), batch[1], reduction="none")`. The mean is taken over
            all entries of all batches, so batches may differ in size.
        batches: whatever `loss` understands.
        chunk: rows of the Hessian that are computed together. More need more memory; they may be faster on an
            accelerator, and are slower on a CPU.

    Raises:
        InvalidOptionError: no such layer, one with more than `MAX_WEIGHTS` weights, a chunk that is not positive, or
            a loss that is no tensor or does not depend on the layer.
        InvalidModelError: the model is in train mode.
        InvalidBatchError: there are no batches.
        NonFiniteError: the loss or a derivative of it holds NaN or infinity.
    """
    check_integer("chunk", chunk, least=1)
    if not callable(loss):
        raise InvalidOptionError("loss", f"{loss!r} is not callable", "Pass a function of a stand-in and a batch.")
    if not isinstance(batches, Iterable):
        raise InvalidBatchError("batches", f"{type(batches).__name__} is not iterable", "Pass a list of batches.")
    _check_model(model)
    parameter = _parameter(model, name)
    weight = dict(model.named_parameters(remove_duplicate=False))[parameter].detach()
    size = weight.numel()
    value, count = 0.0, 0
    gradient = torch.zeros(size, dtype=torch.float64, device=weight.device)
    hessian = torch.zeros(size, size, dtype=torch.float64, device=weight.device)
    for batch in batches:
        point = weight.flatten().clone().requires_grad_()
        with torch.enable_grad():
            losses = _losses(model, parameter, point.view_as(weight), loss, batch)
            slope = _slope(losses.sum(), point, parameter)
        value, count = value + float(losses.detach().double().sum()), count + losses.numel()
        gradient += slope.detach()
        _add_curvature(hessian, slope, point, chunk)
    if not count:
        raise InvalidBatchError("batches", "holds no data", "Pass batches of at least one sample.")
    hessian = (hessian + hessian.T) / (2 * count)
    if not isfinite(value):
        raise NonFiniteError(f"layer {name!r}", "the loss is not finite", "Check the loss and the batches.")
    if not (torch.isfinite(hessian).all() and torch.isfinite(gradient).all()):
        raise NonFiniteError(f"layer {name!r}", "the loss has a derivative that is not finite", "Check the loss.")
    return TaskLoss(weight, value / count, gradient / count, hessian)


def _losses(model: nn.Module, parameter: str, weight: Tensor, loss: Loss, batch: Any) -> Tensor:
    """The losses of a batch's samples with another weight."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return functional_call(model, {parameter: weight}, args, kwargs)

    losses = loss(run, batch)
    if not isinstance(losses, Tensor):
        raise InvalidOptionError("loss", f"returned {type(losses).__name__}", "Return a tensor of losses.")
    return losses


def _slope(total: Tensor, point: Tensor, parameter: str) -> Tensor:
    """The gradient of a loss, itself differentiable."""
    found = None
    if total.requires_grad:
        (found,) = torch.autograd.grad(total, point, create_graph=True, allow_unused=True)
    if found is None:
        raise InvalidOptionError(
            "loss", f"does not depend on {parameter!r}", "Call the stand-in, not the model, and with gradients on."
        )
    return found


def _add_curvature(hessian: Tensor, slope: Tensor, point: Tensor, chunk: int) -> None:
    """Add the derivative of `(D,)` slope with respect to `(D,)` point to the hessian, a few rows at a time."""
    if not slope.requires_grad:
        # the loss is linear in the weight
        return
    size = point.numel()
    for start in range(0, size, chunk):
        stop = min(start + chunk, size)
        basis = point.new_zeros(stop - start, size)
        basis[:, start:stop].fill_diagonal_(1)
        # one row without the machinery of vmap, which costs more than it saves on a CPU
        vectors = basis[0] if chunk == 1 else basis
        (found,) = torch.autograd.grad(
            slope, point, vectors, retain_graph=True, is_grads_batched=chunk > 1, materialize_grads=True
        )
        hessian[start:stop] += found


def _check_model(model: nn.Module) -> None:
    """Raise unless it is a module, and what behaves differently in training is in eval mode."""
    if not isinstance(model, nn.Module):
        raise InvalidModelError("model", f"is a {type(model).__name__}, no module", "Pass the float model.")
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
