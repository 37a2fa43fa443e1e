"""One layer from data to rounding: its errors against the operator itself, and when nearest is kept."""

from __future__ import annotations

from dataclasses import replace
from math import isnan

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaround_plugin.errors import InvalidOptionError
from adaround_plugin.graph.operators import module_op
from adaround_plugin.learning.layer import Layer, Recipe
from adaround_plugin.rounding.grid import GridSpec, integer_range
from adaround_plugin.rounding.linear_op import LinearOp
from adaround_plugin.rounding.moments import HeldOut, Moments
from adaround_plugin.rounding.problem import Rounding
from adaround_plugin.rounding.ranges import min_mse_grid
from adaround_plugin.rounding.result import LayerRounding
from adaround_plugin.solvers import GPTQ, Annealing, CoordinateDescent, Nearest, Relaxation

MODULES = {
    "linear": lambda: nn.Linear(12, 6),
    "conv": lambda: nn.Conv2d(4, 6, 3, padding=1),
    "depthwise": lambda: nn.Conv2d(6, 6, 3, groups=6),
    "grouped": lambda: nn.Conv2d(4, 6, 3, 2, groups=2),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3, 2, groups=2),
}
RECIPES = [
    Recipe(),
    Recipe(propagate_error=False),
    Recipe(correct_bias=False),
    Recipe(propagate_error=False, correct_bias=False),
    Recipe(damping=0.1),
]


def streams(module: nn.Module, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Correlated inputs of the float and the quantized stream, the second a coarse version of the first."""
    generator = torch.Generator().manual_seed(seed)
    channels = module.in_features if isinstance(module, nn.Linear) else module.in_channels
    size = () if isinstance(module, nn.Linear) else (3, 3)
    mixing = torch.randn(channels, channels, generator=torch.Generator().manual_seed(0))
    x = torch.randn(count, *size, channels, generator=generator) @ mixing + 0.5
    if size:  # smooth, as images are
        x = F.interpolate(x.movedim(-1, 1), size=(6, 6), mode="bilinear", align_corners=False)
    return x, (x * 4).round() / 4 + 0.05


def columns(op: LinearOp, weight: Tensor, x: Tensor) -> Tensor:
    patches = op.patches(x, weight.shape)
    sample = torch.arange(patches.samples).repeat_interleave(patches.positions)
    return patches.columns(sample, torch.arange(patches.positions).repeat(patches.samples))


def moments_of(op: LinearOp, weight: Tensor, exact: Tensor, quantized: Tensor) -> Moments:
    groups, rows, size = op.rows(weight).shape
    moments = Moments(groups, rows, size, torch.device("cpu"))
    add_columns(moments, op, weight, exact, quantized)
    return moments.finish()


def add_columns(to: Moments | HeldOut, op: LinearOp, weight: Tensor, exact: Tensor, quantized: Tensor) -> None:
    a, b = columns(op, weight, exact), columns(op, weight, quantized)
    to.add(b, (a - b) @ op.rows(weight).transpose(1, 2))


def make(
    name: str, bits: int = 3, axis: int | str | None = "output", symmetric: bool = True, seed: int = 0, holdout: int = 0
) -> tuple[Layer, nn.Module, Tensor, Tensor]:
    """The layer, its module, and the float and quantized inputs it was made from."""
    torch.manual_seed(seed)
    module = MODULES[name]().requires_grad_(False)
    op, weight = module_op(module), module.weight
    ch_axis = op.output_axis if axis == "output" else axis
    grid = min_mse_grid(weight, GridSpec(*integer_range(bits), ch_axis, symmetric, torch.qint8))
    exact, quantized = streams(module, 40, seed + 1)
    held = HeldOut()
    if holdout:
        add_columns(held, op, weight, *streams(module, holdout, seed + 2))
    held.finish()
    return Layer(op, weight, grid, moments_of(op, weight, exact, quantized), held), module, exact, quantized


def output_error(found: LayerRounding, module: nn.Module, exact: Tensor, quantized: Tensor) -> float:
    """Squared error of the module's real output over the float output's variance, over all output channels."""
    with torch.no_grad():
        module = module.double()
        expected = module(exact.double())
        weight = found.grid.dequantize(found.integers).double()
        bias = module.bias + (0 if found.bias_correction is None else found.bias_correction.double())
        y = torch.func.functional_call(module, {"weight": weight, "bias": bias}, (quantized.double(),))
        axes = [i for i in range(y.dim()) if i != 1]
        # variance of the output for the quantized input, as the moments have it
        power = module(quantized.double()).var(axes, correction=0).sum()
        return float((y - expected).square().mean(axes).sum() / power)


def assert_valid(found: LayerRounding, layer: Layer) -> None:
    assert found.integers.shape == layer.weight.shape
    assert found.integers.dtype == torch.int64
    assert found.integers.min() >= layer.grid.quant_min
    assert found.integers.max() <= layer.grid.quant_max
    assert torch.equal(found.grid.nearest(found.grid.dequantize(found.integers)), found.integers)
    assert replace(found.grid, scale=layer.grid.scale, zero_point=layer.grid.zero_point) == layer.grid


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_errors_are_those_of_the_module_s_own_output(name, recipe):
    layer, module, exact, quantized = make(name)
    found = layer.learn(recipe, Annealing(), search_scale=True)
    assert_valid(found, layer)
    assert found.learned
    assert found.learned_error == pytest.approx(output_error(found, module, exact, quantized), rel=1e-3)
    baseline = layer.nearest()
    assert baseline.nearest_error == pytest.approx(output_error(baseline, module, exact, quantized), rel=1e-3)
    assert found.nearest_error == baseline.nearest_error


# bits, axis and whether the scale is searched: every two of them together, and each with every module and every recipe
FORMATS = [
    [(2, "output", True), (2, None, False)],
    [(4, "output", False), (4, None, True)],
    [(8, "output", True), (8, None, False)],
]


@pytest.mark.parametrize("recipe", range(len(RECIPES)), ids=lambda i: str(RECIPES[i]))
@pytest.mark.parametrize("name", MODULES)
def test_learning_is_not_worse_than_nearest_on_its_own_samples(name, recipe):
    turn = (list(MODULES).index(name) + recipe) % len(FORMATS)
    for bits, axis, search in FORMATS[turn]:
        layer, *_ = make(name, bits, axis, seed=turn)
        found = layer.learn(RECIPES[recipe], Annealing(), search_scale=search)
        assert found.nearest_holdout is None
        assert found.learned_holdout is None
        assert found.learned == (found.learned_error <= found.nearest_error)
        # without propagated errors it imitates something else than the float output
        assert found.learned or not RECIPES[recipe].propagate_error


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize(
    ("name", "axis"),
    [
        ("linear", 0),
        ("linear", 1),
        ("linear", None),
        ("conv", 0),
        ("conv", 1),
        ("conv", 2),
        ("depthwise", 1),
        ("grouped", 1),
        ("grouped", None),
        ("transposed", 0),
        ("transposed", 1),
        ("transposed", None),
    ],
)
def test_every_axis_and_scheme_learns_much(name, axis, search, symmetric):
    layer, module, exact, quantized = make(name, 3, axis, symmetric)
    found = layer.learn(Recipe(), Annealing(), search_scale=search)
    assert_valid(found, layer)
    assert found.learned
    assert found.learned_error < 0.65 * found.nearest_error  # measured: 0.11 to 0.60
    assert found.learned_error == pytest.approx(output_error(found, module, exact, quantized), rel=1e-3)


@pytest.mark.parametrize("name", ["linear", "grouped", "transposed"])
def test_a_scale_along_the_inputs_is_solved_in_its_own_form(name):
    # the axis that is not the output's: the solver must see the loss that the weight will have
    layer, *_ = make(name, 3, 0 if name == "transposed" else 1)
    recipe = Recipe(propagate_error=False, correct_bias=True, damping=1e-9)
    hessian = layer.moments.hessian
    target = layer.op.rows(layer.weight).double()

    class Spy:
        def solve(self, problem):
            self.found = Annealing().solve(problem)
            return self.found

    spy = Spy()
    found = layer.learn(recipe, spy, search_scale=True)
    assert torch.equal(found.grid.scale, layer.grid.scale)
    change = layer.op.rows(layer.grid.dequantize(found.integers)).double() - target
    loss = torch.einsum("grj,gjk,grk->gr", change, hessian, change)
    torch.testing.assert_close(spy.found.loss, loss, rtol=1e-3, atol=0)


WRONG = {
    "above": (lambda found: replace(found, integers=found.integers + 8), "above problem.upper"),
    "below": (lambda found: replace(found, integers=found.integers - 8), "below problem.lower"),
    "one": (lambda found: replace(found, integers=found.integers.index_fill(2, torch.tensor([3]), 99)), "above"),
    "floats": (lambda found: replace(found, integers=found.integers.double() + 0.5), "torch.float64"),
    "int32": (lambda found: replace(found, integers=found.integers.int()), "torch.int32"),
    "bits": (lambda found: replace(found, integers=found.integers > 0), "torch.bool"),
    "shape": (lambda found: replace(found, integers=found.integers.flatten(1)), "of shape"),
    "part": (lambda found: replace(found, integers=found.integers[:, :0]), "of shape"),
    "device": (lambda found: replace(found, integers=found.integers.to("meta")), "on meta"),
    "list": (lambda found: Rounding(found.integers.tolist(), found.loss), "returned list"),
    "tensor": (lambda found: found.integers, "returned NoneType"),
    "nothing": (lambda found: None, "returned NoneType"),
}


@pytest.mark.parametrize("coupled", [False, True], ids=["alone", "coupled"])
@pytest.mark.parametrize("kind", WRONG)
def test_what_a_solver_returns_is_checked(kind, coupled):
    change, match = WRONG[kind]

    class Untrue:
        calls = 0

        def solve(self, problem):
            self.calls += 1
            found = problem.best_of()
            return change(found) if self.calls > coupled else found

    layer, *_ = make("grouped")
    groups, rows, _ = layer.op.rows(layer.weight).shape
    layer = replace(layer, outputs=torch.eye(rows, dtype=torch.float64).expand(groups, -1, -1))
    with pytest.raises(InvalidOptionError, match=f"solver Untrue: .*{match}.*best_of") as caught:
        layer.learn(Recipe(output_hessian=coupled), Untrue(), search_scale=False)
    assert caught.value.subject == "solver Untrue"


def test_what_a_solver_to_start_from_returns_is_checked():
    class Untrue:
        def solve(self, problem):
            return Rounding(problem.upper + 1, problem.loss(problem.upper))

    layer, *_ = make("linear")
    with pytest.raises(InvalidOptionError, match=r"solver Untrue: .*above problem\.upper"):
        layer.learn(Recipe(), Relaxation(start=Untrue(), iterations=2), search_scale=False)


@pytest.mark.parametrize("name", MODULES)
def test_up_or_down_stays_beside_the_weight(name):
    layer, *_ = make(name, 3)
    found = layer.learn(Recipe(), Annealing(), search_scale=False, up_or_down=True)
    x = layer.grid.coordinates(layer.weight)
    low = x.floor().clamp(layer.grid.quant_min, layer.grid.quant_max)
    high = (x.floor() + 1).clamp(layer.grid.quant_min, layer.grid.quant_max)
    assert ((found.integers == low) | (found.integers == high)).all()
    full = layer.learn(Recipe(), Annealing(), search_scale=False)
    assert full.learned_error <= found.learned_error * 1.05


def test_up_or_down_holds_on_a_searched_scale():
    layer, *_ = make("conv", 2)
    found = layer.learn(Recipe(), Annealing(), search_scale=True, up_or_down=True)
    assert not torch.equal(found.grid.scale, layer.grid.scale)
    x = found.grid.coordinates(layer.weight).clamp(layer.grid.quant_min, layer.grid.quant_max)
    assert ((x - found.integers).abs() < 1 + 1e-6).all()


@pytest.mark.parametrize("solver", [Annealing(), CoordinateDescent(), GPTQ(), Nearest()])
def test_the_observer_s_scale_is_kept_when_it_is_not_searched(solver):
    layer, *_ = make("conv")
    found = layer.learn(Recipe(), solver, search_scale=False)
    assert torch.equal(found.grid.scale, layer.grid.scale)
    assert torch.equal(found.grid.zero_point, layer.grid.zero_point)


def test_searching_the_scale_helps_at_two_bits():
    layers = [make(name, 2)[0] for name in ("linear", "conv", "depthwise", "grouped")]
    kept, searched = (
        sum(layer.learn(Recipe(), Annealing(), search_scale=search).learned_error for layer in layers)
        for search in (False, True)
    )
    assert searched < 0.9 * kept


@pytest.mark.parametrize("name", MODULES)
def test_the_bias_correction_centres_the_output(name):
    layer, module, exact, quantized = make(name)
    found = layer.learn(Recipe(correct_bias=True), Annealing(), search_scale=True)
    assert found.bias_correction.shape == module.bias.shape
    assert found.bias_correction.dtype == torch.float32
    weight, bias = found.grid.dequantize(found.integers), module.bias + found.bias_correction
    y = torch.func.functional_call(module, {"weight": weight, "bias": bias}, (quantized,))
    axes = [i for i in range(y.dim()) if i != 1]
    torch.testing.assert_close(y.mean(axes), module(exact).mean(axes), rtol=0, atol=1e-4)


def test_a_bias_that_cannot_be_written_is_not_corrected():
    layer, *_ = make("conv")
    assert layer.learn(Recipe(correct_bias=False), Annealing(), search_scale=True).bias_correction is None
    assert layer.nearest().bias_correction is None


def test_imitating_the_float_output_needs_the_quantized_input():
    layer, *_ = make("conv", 4)
    error = {
        propagated: layer.learn(Recipe(propagated, damping=1e-3), Annealing(), search_scale=True).learned_error
        for propagated in (True, False)
    }
    assert error[True] < error[False]


def test_nearest_with_nothing_to_do_is_the_baseline():
    layer, *_ = make("linear")
    found = layer.learn(Recipe(False, False), Nearest(), search_scale=False)
    assert torch.equal(found.integers, layer.grid.nearest(layer.weight))
    assert found.learned_error == found.nearest_error


@pytest.mark.parametrize("name", MODULES)
def test_similar_held_out_samples_accept_what_was_learned(name):
    layer, module, *_ = make(name, 3, holdout=40)
    found = layer.learn(Recipe(), Annealing(), search_scale=True)
    assert found.learned
    assert found.learned_holdout <= found.nearest_holdout
    held = streams(module, 40, 2)
    assert found.learned_holdout == pytest.approx(output_error(found, module, *held), rel=1e-3)
    assert found.nearest_holdout == pytest.approx(output_error(layer.nearest(), module, *held), rel=1e-3)


@pytest.mark.parametrize("name", ["linear", "conv", "transposed"])
def test_nearest_is_kept_where_held_out_samples_say_so(name):
    layer, *_ = make(name, 3)
    learned = layer.learn(Recipe(), Annealing(), search_scale=True)
    # held-out data that exercise nothing but what learning made worse: the change itself, more than its own weight
    worse = layer.op.rows(layer.weight.double() - learned.grid.dequantize(learned.integers).double())
    nearest = layer.op.rows(layer.weight - layer.grid.dequantize(layer.grid.nearest(layer.weight))).double()
    groups = len(worse)
    gain = worse.transpose(1, 2) @ worse - nearest.transpose(1, 2) @ nearest
    direction = torch.linalg.eigh(gain)[1][..., -1]
    generator = torch.Generator().manual_seed(0)
    x = 10 * torch.randn(groups, 200, 1, generator=generator) * direction.unsqueeze(1).float()
    holdout = HeldOut()
    mean = layer.moments.mean.float().unsqueeze(1)
    holdout.add(x + mean, layer.moments.deviation.float().unsqueeze(1).expand(-1, 200, -1), torch.ones(groups, 200))
    found = replace(layer, holdout=holdout.finish()).learn(Recipe(), Annealing(), search_scale=True)
    assert not found.learned
    assert found.learned_holdout > found.nearest_holdout
    assert found.learned_error == learned.learned_error
    assert torch.equal(found.integers, layer.grid.nearest(layer.weight))
    assert torch.equal(found.grid.scale, layer.grid.scale)
    assert found.bias_correction is None


def test_a_trial_is_one_pass_that_is_not_judged():
    layer, *_ = make("grouped", 3, holdout=10)
    trial = layer.learn(Recipe(), Annealing(), search_scale=False, is_trial=True)
    assert trial.learned
    assert isnan(trial.nearest_error)
    assert isnan(trial.learned_error)
    fed_back = layer.rounded(trial.grid, trial.integers, trial.bias_correction)
    learned = layer.learn(Recipe(), Annealing(), search_scale=False)
    assert learned.learned_error <= fed_back.learned_error < learned.nearest_error


def test_learning_again_gives_the_same():
    first, second = (
        make("grouped", 3, holdout=10)[0].learn(Recipe(), Annealing(), search_scale=True) for _ in range(2)
    )
    assert torch.equal(first.integers, second.integers)
    assert torch.equal(first.grid.scale, second.grid.scale)
    assert torch.equal(first.bias_correction, second.bias_correction)
    assert first.learned_holdout == second.learned_holdout


@pytest.mark.parametrize("search", [True, False])
def test_constant_inputs_are_survived(search):
    layer, _, exact, _ = make("linear")
    constant = torch.ones_like(exact)
    moments = moments_of(layer.op, layer.weight, constant, constant)
    found = replace(layer, moments=moments).learn(Recipe(), Annealing(), search_scale=search)
    assert_valid(found, layer)
    assert found.learned_error <= 1e-9


@pytest.mark.parametrize("axis", [0, None])
def test_a_weight_of_zeros_stays_zero(axis):
    layer, *_ = make("linear")
    weight = torch.zeros_like(layer.weight)
    grid = min_mse_grid(weight, GridSpec(-4, 3, axis, True, torch.qint8))
    moments = Moments(1, 6, 12, weight.device)
    moments.add(torch.randn(1, 50, 12), torch.zeros(1, 50, 6), torch.ones(1, 50))
    found = Layer(layer.op, weight, grid, moments.finish(), layer.holdout).learn(
        Recipe(), Annealing(), search_scale=True
    )
    assert (found.integers == 0).all()
    assert found.learned_error == 0


def grouped_layer(columns: int, size: int, symmetric: bool, bits: int = 3) -> Layer:
    torch.manual_seed(0)
    module = nn.Linear(columns, 6)
    exact, quantized = streams(module, 200, 1)
    low, high = integer_range(bits)
    spec = GridSpec(low, high, 0, symmetric, torch.int8, group_size=size, scale_dtype=torch.float16)
    op, weight = LinearOp("linear"), module.weight.detach()
    moments, held = (moments_of(op, weight, exact[part], quantized[part]) for part in (slice(40, 200), slice(40)))
    return Layer(op, weight, min_mse_grid(weight, spec), moments, held)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("columns", "size"), [(12, 4), (10, 4), (12, 12), (7, 16)])
def test_groups_are_learned_and_never_worse_than_nearest(columns, size, symmetric):
    layer = grouped_layer(columns, size, symmetric)
    found = layer.learn(Recipe(), Annealing(), search_scale=True)
    assert found.learned
    assert found.learned_error < 0.85 * found.nearest_error
    assert found.grid.scale.shape == (6 * -(-columns // size),)
    assert torch.equal(found.grid.scale, found.grid.scale.half().float())
    assert found.integers.min() >= found.grid.quant_min
    assert found.integers.max() <= found.grid.quant_max


def test_one_group_per_row_is_what_a_channel_is():
    grouped = grouped_layer(12, 12, True)
    plain = replace(grouped, grid=replace(grouped.grid, group_size=None))
    # without refitting, which groups do without
    one, other = (layer.learn(Recipe(), GPTQ(), search_scale=True, up_or_down=True) for layer in (grouped, plain))
    assert torch.equal(one.integers, other.integers)
    assert torch.equal(one.grid.scale, other.grid.scale)


def test_smaller_groups_leave_smaller_errors():
    errors = [
        grouped_layer(12, size, True).learn(Recipe(), Annealing(), search_scale=True).learned_error for size in (12, 4)
    ]
    assert errors[1] < errors[0]
