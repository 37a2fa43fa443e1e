"""Learning on the device of the model: there, and as well as on a processor. What takes long runs only on a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.ao.quantization.quantize_fx import convert_fx

from adaround_plugin import (
    BlockWise,
    Finetune,
    InvalidBatchError,
    LayerWise,
    Paper,
    adaround,
    equalize,
    get_equalization_report,
    get_report,
)
from adaround_plugin.hosts.learned import learned_weights
from adaround_plugin.inc import AdaRoundConfig
from adaround_plugin.learning.methods import Preset
from adaround_plugin.learning.passes import Pass
from adaround_plugin.paper.cross_entropy import CrossEntropy
from adaround_plugin.paper.forms import LayerForms
from adaround_plugin.paper.weights import best_of_draws, round_weights, write_integers
from adaround_plugin.rounding.hessian import Hessian
from adaround_plugin.rounding.problem import RoundingProblem
from adaround_plugin.solvers import Relaxation, get_solver, sweep
from adaround_plugin.solvers.coordinates import Coordinates, Coupling
from adaround_plugin.tests.problems import CATALOGUE
from integration_tests.devices import every_device, gpu
from integration_tests.models import RECIPE
from integration_tests.region_models import Dense, Net, converted, learn_in, prepared_by, samples, seeded, streamed

LAYERS = LayerWise(**RECIPE)
STEPS = {"iterations": 60, "learning_rate": 3e-2, "regularization": 10.0, "beta": (8.0, 2.0)}
MOMENTS = Relaxation(**STEPS)
METHODS: dict[str, Any] = {
    "trials": "default",
    "annealing": LAYERS,
    "fisher": replace(LAYERS, column_weighting="fisher"),
    "paper": Paper(batch_size=8, **STEPS),
    "moments": replace(LAYERS, solver=MOMENTS),
    "blocks": BlockWise(layers=LAYERS, iterations=60, batch_size=8),
    "finetune": Preset(LAYERS, Finetune(iterations=60, batch_size=16, learning_rate=3e-3)),
    "integers": Preset(LAYERS, Finetune(iterations=150, batch_size=16, integers=True)),
}
HOSTS = [("fx", None), ("fx", 4), ("fx", 8), ("pt2e", None), ("pt2e", 4)]


def on(device: str, count: int = 48) -> list[Tensor]:
    return [batch.to(device) for batch in samples(count)]


def devices(model: nn.Module) -> set[str]:
    return {values.device.type for values in (*model.parameters(), *model.buffers())}


def moved(problem: RoundingProblem, device: str) -> RoundingProblem:
    return problem.map(lambda values: values.to(device), Hessian(problem.hessian.matrix.to(device)))


@gpu
@pytest.mark.parametrize("solver", ["annealing", "coordinate_descent", "gptq", "cross_entropy", "moments"])
@pytest.mark.parametrize("name", CATALOGUE)
def test_a_solver_finds_as_good_a_rounding(solver, name):
    chosen = {"cross_entropy": CrossEntropy(iterations=20), "moments": MOMENTS}
    solve = (chosen[solver] if solver in chosen else get_solver(solver)).solve
    expected, found = solve(CATALOGUE[name]), solve(moved(CATALOGUE[name], "cuda"))
    assert found.integers.device.type == found.loss.device.type == "cuda"
    # another order of summation decides ties otherwise, and then what follows: in sum, not row by row
    tolerance = 0.25 if solver == "moments" else 0.05
    assert float(found.loss.sum()) <= (1 + tolerance) * float(expected.loss.sum()) + 1e-12


@gpu
def test_sweeps_take_the_kernel():
    kernel = pytest.importorskip("adaround_plugin.solvers.sweep_triton")
    assert sweep._visitor(torch.device("cuda", 0))[0] is kernel.visit


def test_sweeps_do_without_the_kernel_where_it_cannot_run(caplog):
    # no Triton, or no GPU: on a machine with both, another device of its own kind
    assert sweep._triton.__wrapped__(torch.device("cuda", 99)) is None
    assert "Triton does not run here" in caplog.text


@gpu
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7, 5), (2, 64, 40), (1, 33, 1000), (700, 9, 1)])
@pytest.mark.parametrize("temperature", [0.0, 0.3])
@pytest.mark.parametrize("triangular", [False, True])
@pytest.mark.parametrize("varies", [False, True])
def test_the_kernel_of_a_block_does_what_its_loop_does(shape, temperature, triangular, varies):
    kernel = pytest.importorskip("adaround_plugin.solvers.sweep_triton")
    groups, count, rows = shape
    generator = torch.Generator().manual_seed(0)

    def drawn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    # a block out of the middle of a wider problem
    part = slice(3, 3 + count)
    error, target = drawn(groups, count + 5, rows), 2 * drawn(groups, count + 5, rows)
    lower, upper = torch.full_like(target, -2), torch.full_like(target, 1)
    step = drawn(groups, count + 5, rows).abs() + 0.5 if varies else torch.ones_like(target)
    curvature = drawn(groups, count + 5).abs() if triangular else None
    matrix, pull, loss = (
        0.1 * drawn(groups, count + 5, count + 5),
        drawn(groups, count, rows),
        drawn(groups, rows).abs(),
    )

    def visited(visit: Any, device: str) -> tuple[Tensor, Tensor]:
        whole = Coordinates(error, target, lower, upper, step, is_plain=not varies)
        at = whole.map(lambda values: values.to(device, copy=True))
        coupling = Coupling(matrix.to(device), None if curvature is None else curvature.to(device))
        total = loss.to(device, copy=True)
        block = at.map(lambda values: values[:, part])
        visit(pull.to(device, copy=True), block, coupling.block(part), temperature, total)
        return at.error.cpu(), total.cpu()

    expected, found = visited(sweep.visit, "cpu"), visited(kernel.visit, "cuda")
    # of a thousand sums, one may lie close enough to a half to be rounded the other way, and with it those after it
    assert ((expected[0] - found[0]).abs() > 1e-3).double().mean() < 0.01
    torch.testing.assert_close(found[1].sum(), expected[1].sum(), rtol=1e-2, atol=1e-3)


@gpu
@pytest.mark.parametrize(("host", "activation_bits"), HOSTS)
@pytest.mark.parametrize("method", METHODS)
def test_a_model_is_learned_on_its_device(host, activation_bits, method):
    def learn(where: str) -> tuple[fx.GraphModule, Pass]:
        net = seeded(Net if host == "fx" else Dense).to(where)
        return learn_in(prepared_by(host, activation_bits, net, on(where)), on(where), METHODS[method])

    (expected, _), (found, run) = learn("cpu"), learn("cuda")
    assert devices(found) == {"cuda"}
    assert get_report(found).output_error <= 1.2 * get_report(expected).output_error
    model = converted(host, activation_bits, found)
    with torch.no_grad():
        for batch in on("cuda"):
            value = streamed(run, batch)
            assert value.device.type == "cuda"
            assert torch.equal(value, model(batch))


@every_device
def test_what_was_learned_there_runs_in_the_kernels_of_the_processor(device):
    prepared = prepared_by("fx", 8, seeded(Dense).to(device), on(device))
    learned = adaround(prepared, on(device), LAYERS, progress=False)
    expected = learned_weights(learned)
    native = convert_fx(learned.cpu())
    with torch.no_grad():
        assert native(on("cpu")[0]).device.type == "cpu"
    for name, (integers, _) in expected.items():
        assert torch.equal(native.get_submodule(name).weight().int_repr().long(), integers.cpu().long())


@every_device
@pytest.mark.parametrize("activations", [False, True])
def test_channels_are_scaled_on_the_device_of_the_model(activations, device):
    def scaled(where: str) -> nn.Module:
        chain = seeded(lambda: nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 3, 3)))
        return equalize(chain.to(where), (on(where)[0],), activations=on(where) if activations else None)

    expected, found = scaled("cpu"), scaled(device)
    assert devices(found) == {device}
    assert get_equalization_report(found).pairs
    for one, other in zip(expected.parameters(), found.parameters(), strict=True):
        torch.testing.assert_close(one, other.cpu(), rtol=1e-4, atol=1e-5)


@every_device
def test_integers_of_ones_own_choice_go_there(device):
    prepared = prepared_by("fx", None, seeded(Dense).to(device), on(device))
    drawn = learned_weights(round_weights(prepared, "stochastic", seed=3))
    same = learned_weights(round_weights(prepared_by("fx", None, seeded(Dense), on("cpu")), "stochastic", seed=3))
    assert all(torch.equal(drawn[name][0].cpu(), same[name][0]) for name in same)
    # integers from the processor are taken along
    written = write_integers(prepared, {name: integers for name, (integers, _) in same.items()})
    assert devices(written) == {device}
    assert all(torch.equal(learned_weights(written)[name][0].cpu(), same[name][0]) for name in same)
    best = best_of_draws(prepared, lambda model: -float(model(on(device)[0]).detach().square().mean()), draws=3)
    assert devices(best.model) == {device}


@every_device
def test_both_rounding_problems_of_a_layer_are_posed_there(device):
    data = [(batch, torch.arange(len(batch), device=device) % 3) for batch in on(device)]
    prepared = prepared_by("fx", None, seeded(Net).to(device), on(device))
    forms = LayerForms.of(prepared, "short")

    def loss(run: Any, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(run(batch[0]), batch[1], reduction="none")

    for problem in (forms.local(on(device)), forms.task_loss(loss, data)):
        integers = forms.integers(CrossEntropy(iterations=10).solve(problem))
        assert integers.device.type == device
        write_integers(prepared, {"short": integers})


@every_device
@pytest.mark.parametrize("kind", ["weight-only", "observed"])
def test_neural_compressor_takes_it(kind, device):
    from neural_compressor.torch.quantization import convert, prepare

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval().to(device)
    batches = [torch.randn(16, 16, generator=torch.Generator().manual_seed(i)).to(device) for i in range(3)]
    config = AdaRoundConfig(bits=4, act_dtype="fp32" if kind == "weight-only" else "uint8", **RECIPE)
    prepared = prepare(model, config, example_inputs=batches[0])
    with torch.no_grad():
        for batch in batches:
            prepared(batch)
        found = convert(prepared)
        assert torch.isfinite(found(batches[0].to(next(iter(devices(found)), "cpu")))).all()


def test_a_batch_on_another_device_is_named():
    prepared = prepared_by("fx", None, seeded(Dense), samples())
    with pytest.raises(InvalidBatchError, match=r"batch 1.*'x'.*meta.*cpu.*inputs="):
        adaround(prepared, [samples()[0], samples()[1].to("meta")], progress=False)
