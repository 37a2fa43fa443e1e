"""The task loss to second order in one layer's weight: derivatives, definiteness, and the problem made of them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from adaround_plugin.errors import InvalidBatchError, InvalidModelError, InvalidOptionError, NonFiniteError
from adaround_plugin.paper.cross_entropy import CrossEntropy
from adaround_plugin.paper.task_loss import MAX_WEIGHTS, expand_task_loss
from adaround_plugin.rounding.grid import Grid, GridSpec
from adaround_plugin.rounding.ranges import min_max_grid
from adaround_plugin.solvers import Annealing


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """A model in float64 and eval mode whose weights do not depend on what ran before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().double().eval()


def smooth() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))


def convolutional() -> nn.Module:
    layers = (nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(12, 3))


MODELS = {"smooth": (smooth, (3,), "0"), "convolutional": (convolutional, (2, 5, 5), "0"), "last": (smooth, (3,), "2")}
every_model = pytest.mark.parametrize("which", MODELS)


def batches(shape: tuple[int, ...], sizes: tuple[int, ...] = (5, 5, 3)) -> list[tuple[Tensor, Tensor]]:
    """Labelled batches of unequal size."""
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, *shape, generator=generator, dtype=torch.float64),
            torch.randint(0, 3, (size,), generator=generator),
        )
        for size in sizes
    ]


def cross_entropy(run: Callable[..., Any], batch: tuple[Tensor, Tensor]) -> Tensor:
    """The losses of a batch's samples."""
    return F.cross_entropy(run(batch[0]), batch[1], reduction="none")


def mean_loss(model: nn.Module, name: str, data: list[tuple[Tensor, Tensor]]) -> Callable[[Tensor], Tensor]:
    """The mean loss over all samples as a function of a layer's weight."""
    inputs, labels = (torch.cat(part) for part in zip(*data, strict=True))
    return lambda weight: F.cross_entropy(functional_call(model, {f"{name}.weight": weight}, (inputs,)), labels)


def case(which: str) -> tuple[nn.Module, str, list[tuple[Tensor, Tensor]]]:
    make, shape, name = MODELS[which]
    return seeded(make), name, batches(shape)


def grid_of(weight: Tensor, bits: int = 3, ch_axis: int | None = 0) -> Grid:
    """A symmetric grid that clips nothing."""
    spec = GridSpec(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, ch_axis, True, torch.qint8)
    return min_max_grid(weight.detach().float(), spec)


@every_model
def test_value_gradient_and_hessian_are_those_of_autograd(which):
    model, name, data = case(which)
    found = expand_task_loss(model, name, cross_entropy, data, chunk=5)
    weight = model.get_parameter(f"{name}.weight").detach()
    loss = mean_loss(model, name, data)
    size = weight.numel()
    gradient = torch.autograd.functional.jacobian(loss, weight).flatten()
    hessian = torch.autograd.functional.hessian(loss, weight).reshape(size, size)
    assert found.value == pytest.approx(float(loss(weight).detach()), rel=1e-12)
    torch.testing.assert_close(found.gradient, gradient, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.hessian, hessian, rtol=1e-9, atol=1e-12)
    assert torch.equal(found.hessian, found.hessian.T)


@every_model
def test_the_increase_is_that_of_the_loss_to_third_order(which):
    model, name, data = case(which)
    found = expand_task_loss(model, name, cross_entropy, data)
    loss, weight = mean_loss(model, name, data), found.weight
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    errors = []
    for size in (1e-2, 1e-3):
        moved = weight + size * direction
        errors.append(abs(float(loss(moved).detach()) - found.value - found.increase(moved)))
    # a tenth of the way leaves a thousandth of the error
    assert errors[1] < errors[0] / 500


def test_chunks_and_batches_make_no_difference():
    model, name, data = case("convolutional")
    whole = [tuple(torch.cat(part) for part in zip(*data, strict=True))]
    one = expand_task_loss(model, name, cross_entropy, data, chunk=1)
    other = expand_task_loss(model, f"{name}.weight", cross_entropy, whole, chunk=1000)
    torch.testing.assert_close(one.hessian, other.hessian, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(one.gradient, other.gradient, rtol=1e-9, atol=1e-14)


def test_a_linear_loss_has_no_curvature():
    model = seeded(lambda: nn.Linear(3, 2, bias=False))
    data = batches((3,))
    found = expand_task_loss(model, "weight", lambda run, batch: run(batch[0]).sum(1), data)
    assert not found.hessian.any()
    mean = torch.cat([inputs for inputs, _ in data]).mean(0)
    torch.testing.assert_close(found.gradient, mean.repeat(2), rtol=1e-12, atol=0)


def test_the_model_stays_as_it_is():
    model, name, data = case("convolutional")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = expand_task_loss(model, name, cross_entropy, data)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not any(x.requires_grad for x in (found.weight, found.gradient, found.hessian))


def test_there_is_no_negative_curvature_behind_piecewise_linear_activations():
    values = torch.linalg.eigvalsh(expand_task_loss(*_arguments("convolutional")).hessian)
    assert values[0] > -1e-12 * values[-1]


def test_negative_curvature_is_taken_as_flat():
    found = expand_task_loss(*_arguments("smooth"))
    values, vectors = torch.linalg.eigh(found.hessian)
    assert values[0] < -1e-3 * values[-1]
    damping = 1e-3
    problem = found.problem(grid_of(found.weight), damping=damping)
    shifted = torch.diagonal(vectors.T @ problem.hessian.matrix[0] @ vectors)
    kept = 0.5 * values.clamp_min(0)
    torch.testing.assert_close(shifted, kept + damping * kept.mean(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("ch_axis", [None, 0, 1])
@pytest.mark.parametrize("gradient", [False, True])
def test_the_problems_loss_is_the_predicted_growth(ch_axis, gradient):
    found = expand_task_loss(*_arguments("convolutional"))
    grid, damping = grid_of(found.weight, ch_axis=ch_axis), 1e-3
    problem = found.problem(grid, gradient=gradient, damping=damping)
    ridge = damping * 0.5 * found.hessian.diagonal().mean()
    generator = torch.Generator().manual_seed(0)
    growth, loss = [], []
    for _ in range(5):
        bits = torch.randint(0, 2, problem.target.shape, generator=generator).bool()
        q = torch.where(bits, problem.upper, problem.lower)
        weight = grid.dequantize(q.reshape(found.weight.shape)).double()
        change = (weight - found.weight).flatten()
        linear = 0.0 if gradient else float(found.gradient @ change)
        growth.append(found.increase(weight) - linear + float(ridge * change.square().sum()))
        loss.append(float(problem.loss(q)))
    # with the gradient, up to a constant
    shift = growth[0] - loss[0] if gradient else 0.0
    assert [value + shift for value in loss] == pytest.approx(growth, rel=1e-5)


def test_the_search_space_is_floor_and_ceil():
    found = expand_task_loss(*_arguments("smooth"))
    grid = grid_of(found.weight)
    problem = found.problem(grid)
    real = grid.coordinates(found.weight).reshape(1, 1, -1)
    assert ((problem.lower <= real + 1e-6) & (real - 1e-6 <= problem.upper)).all()
    assert (problem.upper - problem.lower <= 1).all()
    assert torch.equal(problem.nearest.reshape(found.weight.shape), grid.nearest(found.weight))


@pytest.mark.parametrize("gradient", [False, True])
def test_solvers_find_the_best_of_all_roundings_of_a_layer(gradient):
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 3, bias=False), nn.ReLU(), nn.Linear(3, 3)))
    # inputs with a common offset couple the weights of a row
    data = [(inputs + 2, labels) for inputs, labels in batches((3,), (40, 24))]
    weight = model.get_parameter("0.weight").detach()
    grid = grid_of(weight)
    problem = expand_task_loss(model, "0", cross_entropy, data).problem(grid, gradient=gradient, damping=1e-6)
    levels = [sorted({int(a), int(b)}) for a, b in zip(problem.lower[0, 0], problem.upper[0, 0], strict=True)]
    every = torch.tensor(list(product(*levels)))
    best = min(float(problem.loss(q.reshape(1, 1, -1))) for q in every)
    assert best < float(problem.loss(problem.nearest)) * (1 - 1e-3)
    for solver in (CrossEntropy(samples=2048), Annealing()):
        assert float(solver.solve(problem).loss) == pytest.approx(best, rel=1e-9)


def _arguments(which: str) -> tuple[Any, ...]:
    model, name, data = case(which)
    return model, name, cross_entropy, data


# --- what is refused


def test_a_large_layer_is_refused():
    model = nn.Linear(MAX_WEIGHTS // 8 + 1, 8)
    with pytest.raises(InvalidOptionError, match=rf"'weight' has {MAX_WEIGHTS + 8} weights.*at most {MAX_WEIGHTS}"):
        expand_task_loss(model, "weight", cross_entropy, [])


def test_a_layer_that_is_not_there_is_refused():
    model, _, data = case("smooth")
    with pytest.raises(InvalidOptionError, match=r"'1' is none of.*'0.weight'"):
        expand_task_loss(model, "1", cross_entropy, data)


def test_train_mode_is_refused():
    model, name, data = case("convolutional")
    with pytest.raises(InvalidModelError, match=r"module .1..*train mode"):
        expand_task_loss(model.train(), name, cross_entropy, data)


@pytest.mark.parametrize("data", [[], [(torch.zeros(0, 3, dtype=torch.float64), torch.zeros(0, dtype=torch.long))]])
def test_no_samples_are_refused(data):
    model, name, _ = case("smooth")
    with pytest.raises(InvalidBatchError, match="batches"):
        expand_task_loss(model, name, cross_entropy, data)


def test_a_loss_that_is_no_tensor_is_refused():
    model, name, data = case("smooth")
    with pytest.raises(InvalidOptionError, match="loss: returned float"):
        expand_task_loss(model, name, lambda run, batch: 1.0, data)


@pytest.mark.parametrize("detached", [False, True])
def test_a_loss_of_the_model_itself_is_refused(detached):
    model, name, data = case("smooth")

    def loss(run: Callable[..., Any], batch: tuple[Tensor, Tensor]) -> Tensor:
        losses = cross_entropy(model, batch)
        return losses.detach() if detached else losses

    with pytest.raises(InvalidOptionError, match=r"loss: does not depend on '0\.weight'"):
        expand_task_loss(model, name, loss, data)


def test_a_loss_that_is_not_finite_is_refused():
    model, name, data = case("smooth")
    with pytest.raises(NonFiniteError, match="layer '0'"):
        expand_task_loss(model, name, lambda run, batch: cross_entropy(run, batch) / 0.0, data)


@pytest.mark.parametrize("chunk", [0, -1, 2.5])
def test_a_chunk_out_of_range_is_refused(chunk):
    with pytest.raises(InvalidOptionError, match="chunk"):
        expand_task_loss(*_arguments("smooth"), chunk=chunk)


@pytest.mark.parametrize("damping", [0.0, -1.0, float("nan")])
def test_a_damping_out_of_range_is_refused(damping):
    found = expand_task_loss(*_arguments("last"))
    with pytest.raises(InvalidOptionError, match="damping"):
        found.problem(grid_of(found.weight), damping=damping)


def test_a_loss_that_is_no_number_is_refused():
    def broken(run: Callable[..., Any], batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(run, batch) + torch.nan

    with pytest.raises(NonFiniteError, match="the loss is not finite"):
        expand_task_loss(seeded(smooth), "0", broken, batches((3,)))
