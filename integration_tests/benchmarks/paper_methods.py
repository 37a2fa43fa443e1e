"""The rounding methods that the paper compares, each as a function of a prepared model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, Literal, cast

import torch
from torch import Tensor, fx, nn
from torch.ao.quantization import QConfig, QConfigMapping
from torch.ao.quantization.backend_config import BackendConfig

from adaround_plugin import LayerWise, Paper, adaround
from adaround_plugin.hosts.fx.observers import FrozenObserver
from adaround_plugin.hosts.open import open_host
from adaround_plugin.paper.cross_entropy import CrossEntropy
from adaround_plugin.paper.forms import LayerForms
from adaround_plugin.paper.task_loss import TaskLoss
from adaround_plugin.paper.variants import Sigmoid, StraightThrough, Temperature
from adaround_plugin.paper.weights import round_weights, write_integers
from adaround_plugin.rounding.grid import Grid
from adaround_plugin.rounding.problem import Solver
from adaround_plugin.rounding.schemes import Scheme
from adaround_plugin.rounding.soft_rounding import RectifiedSigmoid, SoftRounding
from adaround_plugin.solvers import Nearest, Relaxation

__all__ = ["METHODS", "Budget", "Task", "output_grid_mapping"]

# candidates of a scale, relative to the one with the least error of the weights
_FACTORS = [0.4 + 0.05 * i for i in range(17)]
# batches on which the error of a layer's output is judged for its scale
_SCALE_BATCHES = 1


@dataclass(frozen=True)
class Budget:
    """How much is spent on a cell.

    Attributes:
        images: calibration images.
        test_images: images that are scored.
        iterations, batch_size, learning_rate: of the relaxation.
        data: "moments" relaxes objectives without the activation function on second moments, all images at once;
            "samples" on minibatches, as the paper does. With the activation function it is always minibatches.
        draws, generations: of the cross-entropy method on all layers; on the first one it runs with its defaults.
        hessian_images: labelled images for the task loss's Hessian, whose every row is a backward pass over them.
    """

    images: int = 256
    test_images: int = 2000
    iterations: int = 300
    batch_size: int = 8
    learning_rate: float = 1e-2
    data: Literal["samples", "moments"] = "moments"
    draws: int = 64
    generations: int = 30
    hessian_images: int = 32


@dataclass(frozen=True)
class Task:
    """A calibrated model and the data to round it by.

    Attributes:
        prepared: from `prepare_fx`, calibrated.
        batches: calibration images, a list of `(n, 1, H, W)`.
        backend: the backend configuration given to `prepare_fx`.
        first: name of the first layer.
        task_loss: gives the task loss to second order in that layer's weight.
        budget, seed: of learning.
    """

    prepared: fx.GraphModule
    batches: list[Tensor]
    backend: BackendConfig | None
    first: str
    task_loss: Callable[[], TaskLoss]
    budget: Budget
    seed: int

    def learn(self, method: LayerWise | Paper) -> fx.GraphModule:
        """Learn by a method."""
        return adaround(
            self.prepared, self.batches, method, seed=self.seed, progress=False, backend_config=self.backend
        )

    def solve(self, solver: Solver, *, asymmetric: bool = False, correct_bias: bool = False) -> fx.GraphModule:
        """Decide layers as the paper does, but by a solver of each layer's problem."""
        layers = Paper(asymmetric=asymmetric, correct_bias=correct_bias).layers
        return self.learn(replace(layers, solver=solver))

    def relax(self, variant: type[SoftRounding], asymmetric: bool, activation: bool) -> fx.GraphModule:
        """Relax each layer within the budget."""
        budget = self.budget
        if budget.data == "samples" or activation:
            return self.learn(
                Paper(
                    iterations=budget.iterations,
                    batch_size=budget.batch_size,
                    learning_rate=budget.learning_rate,
                    asymmetric=asymmetric,
                    activation=activation,
                    variant=variant,
                )
            )
        relaxation = Relaxation(iterations=budget.iterations, learning_rate=budget.learning_rate, soft_rounding=variant)
        return self.solve(relaxation, asymmetric=asymmetric)


Method = Callable[[Task], fx.GraphModule]


def _nearest(task: Task) -> fx.GraphModule:
    return task.solve(Nearest())


def _scheme(scheme: Scheme) -> Method:
    return lambda task: round_weights(task.prepared, scheme, seed=task.seed, backend_config=task.backend)


def _task_loss(task: Task) -> fx.GraphModule:
    """Equation 13 on the first layer by the cross-entropy method."""
    form = LayerForms.of(task.prepared, task.first, task.backend)
    problem = task.task_loss().problem(form.node.grid)
    found = form.integers(CrossEntropy(seed=task.seed).solve(problem))
    return write_integers(task.prepared, {task.first: found}, backend_config=task.backend)


def _local(task: Task) -> fx.GraphModule:
    """Equation 20 by the cross-entropy method."""
    first_only = len(open_host(task.prepared, task.backend).nodes) == 1
    samples = {} if first_only else {"samples": task.budget.draws, "iterations": task.budget.generations}
    return task.solve(CrossEntropy(seed=task.seed, **samples))


def _relaxed(
    variant: type[SoftRounding] = RectifiedSigmoid, *, asymmetric: bool = False, activation: bool = False
) -> Method:
    return lambda task: task.relax(variant, asymmetric, activation)


def _bias_correction(task: Task) -> fx.GraphModule:
    """Round to nearest, then let each bias absorb the mean error of its layer (equation 26), in order."""
    return task.solve(Nearest(), asymmetric=True, correct_bias=True)


METHODS: Final[dict[str, Method]] = {
    "nearest": _nearest,
    "floor": _scheme("floor"),
    "ceil": _scheme("ceil"),
    "stochastic": _scheme("stochastic"),
    "task loss": _task_loss,
    "local": _local,
    "temperature": _relaxed(Temperature),
    "sigmoid": _relaxed(Sigmoid),
    "layer-wise": _relaxed(),
    "asymmetric": _relaxed(asymmetric=True),
    "straight-through": _relaxed(StraightThrough),
    "adaround": _relaxed(asymmetric=True, activation=True),
    "bias correction": _bias_correction,
}


def output_grid_mapping(
    mapping: QConfigMapping, prepared: nn.Module, first: str, batches: list[Tensor], backend: BackendConfig | None
) -> QConfigMapping:
    """Give each layer the scale with the least error of its output when rounded to nearest: `||W x - W~ x||^2`.

    Args:
        mapping: whose weight observers choose the scale by the weights; it is changed and returned.
        prepared: a model prepared with it.
        first: name of its first layer.
        batches: calibration images.
        backend: the backend configuration given to `prepare_fx`.
    """
    own = cast(QConfig, mapping.global_qconfig)
    with torch.no_grad():
        prepared(batches[0])
    form = LayerForms.of(prepared, first, backend)
    for node in form.host.nodes:
        grid = _output_grid(replace(form, node=node), batches[:_SCALE_BATCHES])
        observer = FrozenObserver.with_args(grid=grid)
        mapping.set_module_name(node.names[0], QConfig(activation=own.activation, weight=observer))  # type: ignore[no-untyped-call]
    return mapping


def _output_grid(form: LayerForms, batches: list[Tensor]) -> Grid:
    """The best of the candidate scales, one by one for each channel that has a scale of its own."""
    node, hessian = form.node, form.local(batches).hessian
    grid, rows = node.grid, node.op.rows
    errors = []
    for factor in _FACTORS:
        scaled = grid.at(grid.scale * factor, grid.zero_point)
        change = rows(node.weight - scaled.dequantize(scaled.nearest(node.weight))).double()
        error = hessian.quadratic(change)
        errors.append(node.op.outputs(error) if grid.scale.numel() > 1 else error.sum().reshape(1))
    best = torch.stack(errors).argmin(0)
    factors = torch.tensor(_FACTORS)[best].to(grid.scale)
    return grid.at(grid.scale * factors.reshape(grid.scale.shape), grid.zero_point)
