"""One sweep over the coordinates, against visiting them one by one in float64."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from adaround_plugin.rounding.problem import RoundingProblem
from adaround_plugin.solvers import sweep as module
from adaround_plugin.solvers import sweep_numba
from adaround_plugin.solvers.coordinates import Coordinates, Coupling
from adaround_plugin.solvers.sweep import settle, sweep, visit
from adaround_plugin.tests.problems import CATALOGUE, correlated, make

Pair = tuple[Tensor, Tensor]


def varied(problem: RoundingProblem, seed: int = 0) -> RoundingProblem:
    """The problem with a step of its own for every weight."""
    generator = torch.Generator().manual_seed(seed)
    step = 0.4 + torch.rand(problem.target.shape, generator=generator, dtype=torch.float64)
    return replace(problem, step=step)


PROBLEMS = {
    "one_block": CATALOGUE["correlated"],
    # of so many rows that one which falls the other way does not decide
    "several_blocks": make(correlated(1, 110, 400, 1, decay=0.5), 64, 1),
    "a_whole_block": make(correlated(1, 48, 100, 0), 3, 0),
    "one_more_than_a_block": varied(make(correlated(1, 49, 100, 0), 3, 0)),
    "one_more_than_a_large_block": varied(make(correlated(1, 97, 200, 0), 140, 0)),
    "step_by_runs": CATALOGUE["step_varies"],
    "step_by_weight": varied(CATALOGUE["wider_than_a_block"]),
    "groups": varied(CATALOGUE["grouped"]),
    "one_column": CATALOGUE["one_column"],
    "few_levels": CATALOGUE["two_levels"],
    "targets_outside": CATALOGUE["targets_outside_the_range"],
}
every_problem = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)


@pytest.fixture(autouse=True, params=["blocks", "whole sweeps"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All problems go through the one or the other on the CPU, whatever their size."""
    monkeypatch.setattr(module, "_WORTH_BLOCKS", 0 if request.param == "blocks" else 2**60)


def in_place(values: Tensor) -> Tensor:
    """`(G, R, D)` as `(G, D, R)`, the columns in their own order."""
    return values.transpose(1, 2)


def coordinates(problem: RoundingProblem, order: Tensor | None = None) -> Coordinates:
    return Coordinates.of(problem.target, problem.lower, problem.upper, problem.step, order)


def start_of(problem: RoundingProblem, seed: int = 1) -> Tensor:
    """Some real point, `(G, D, R)` errors: what a sweep begins with."""
    return torch.randn(in_place(problem.target).shape, generator=torch.Generator().manual_seed(seed))


def by_hand(at: Coordinates, coupling: Coupling, temperature: float = 0.0) -> Pair:
    """Errors after one sweep and its loss, coordinate after coordinate in float64: the definition."""
    error, target, lower, upper, step = (
        values.double() for values in (at.error, at.target, at.lower, at.upper, at.step)
    )
    matrix = coupling.matrix.double()
    error, loss = error.clone(), torch.zeros_like(error[:, 0])
    for j in range(error.shape[1]):
        pull = torch.einsum("gk,gkr->gr", matrix[:, j], error)
        best = target[:, j] - pull / step[:, j]
        if temperature:
            share = best - best.floor()
            best = best.floor() + torch.sigmoid((2 * share - 1) / temperature)
        else:
            best = best.round()
        error[:, j] = (best.clamp(lower[:, j], upper[:, j]) - target[:, j]) * step[:, j]
        if coupling.curvature is not None:
            loss += coupling.curvature[:, j, None].double() * (error[:, j] + pull).square()
    return error, loss


def assert_close(found: Pair, expected: Pair) -> None:
    """But for float32: a conditional optimum near a half may be rounded the other way, and with it those after it."""
    same = ((found[0].double() - expected[0]).abs() <= 1e-3 * (1 + expected[0].abs())).all(1)
    assert same.double().mean() > 0.9
    torch.testing.assert_close(found[1].double()[same], expected[1][same], rtol=1e-3, atol=1e-6)


@every_problem
@pytest.mark.parametrize("temperature", [0.0, 0.4, 0.05])
def test_a_full_sweep_sets_every_coordinate_to_its_conditional_optimum(problem, temperature):
    coupling = Coupling(problem.hessian.coupling)
    at = replace(coordinates(problem), error=start_of(problem))
    expected = by_hand(at, coupling, temperature)
    loss = sweep(at, coupling, (temperature,))
    assert_close((at.error, loss), expected)
    assert not loss.any()


@every_problem
@pytest.mark.parametrize("temperature", [0.0, 0.4])
def test_a_triangular_sweep_feeds_errors_back_and_tells_the_loss(problem, temperature):
    coupling = Coupling(*problem.hessian.sequential)
    at = coordinates(problem, problem.hessian.order)
    expected = by_hand(at, coupling, temperature)
    loss = sweep(at, coupling, (temperature,))
    assert_close((at.error, loss), expected)
    # a triangular sweep does not ask where it begins: what is ahead has no say
    again = replace(at, error=start_of(problem))
    sweep(again, coupling, (temperature,))
    assert torch.equal(again.error, at.error)


@pytest.mark.parametrize("triangular", [False, True])
@pytest.mark.parametrize("visitor", [visit, sweep_numba.visit])
def test_how_columns_go_in_blocks_does_not_matter(triangular, visitor, monkeypatch):
    problem = PROBLEMS["step_by_weight"]
    coupling = Coupling(*problem.hessian.sequential) if triangular else Coupling(problem.hessian.coupling)

    def swept(size: int) -> Pair:
        monkeypatch.setattr(module, "_compiled", lambda device: None)
        monkeypatch.setattr(module, "_visitor", lambda device: (visitor, size))
        at = replace(coordinates(problem), error=start_of(problem))
        return at.error, sweep(at, coupling)

    whole = tuple(values.double() for values in swept(200))
    for size in (1, 7, 48):
        assert_close(swept(size), whole)


@every_problem
def test_coordinates_begin_at_the_target_and_are_rounded_inside_the_bounds(problem):
    at = coordinates(problem)
    assert not at.error.any()
    assert at.is_plain == bool((problem.step == 1).all())
    for values in (at.error, at.target, at.lower, at.upper, at.step):
        assert values.shape == in_place(problem.target).shape
        assert values.dtype == torch.float32
    assert at.error.is_contiguous()
    assert at.target.is_contiguous()
    inside = problem.clamp(problem.target.round()).float()
    assert torch.equal(at.rounded(), in_place(inside))


def test_map_takes_every_tensor_of_coordinates_along():
    problem = PROBLEMS["step_by_weight"]
    at = replace(coordinates(problem), error=start_of(problem))
    part = at.map(lambda values: values[..., 2:5])
    for name in ("error", "target", "lower", "upper", "step"):
        assert torch.equal(getattr(part, name), getattr(at, name)[..., 2:5])
    assert part.is_plain == at.is_plain


@pytest.mark.parametrize("temperature", [0.0, 0.4])
@pytest.mark.parametrize("triangular", [False, True])
def test_steps_of_one_may_be_left_out(triangular, temperature):
    problem = PROBLEMS["several_blocks"]
    coupling = Coupling(*problem.hessian.sequential) if triangular else Coupling(problem.hessian.coupling)

    def swept(is_plain: bool) -> Pair:
        at = replace(coordinates(problem), error=start_of(problem), is_plain=is_plain)
        return at.error, sweep(at, coupling, (temperature,))

    for one, other in zip(swept(True), swept(False), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("triangular", [False, True])
@pytest.mark.parametrize("with_kernel", [False, True])
@pytest.mark.parametrize(("groups", "columns"), [(1, 60), (2, 100), (1, 200)])
def test_one_bound_and_one_step_may_stand_for_all(groups, columns, triangular, with_kernel, monkeypatch):
    problem = make(correlated(groups, columns, 300, 0), 20, 0, low=-2, high=1)
    assert (problem.lower == -2).all()
    assert (problem.upper == 1).all()
    coupling = Coupling(*problem.hessian.sequential) if triangular else Coupling(problem.hessian.coupling)
    if not with_kernel:
        without_kernel(monkeypatch)

    def swept(low: Tensor, high: Tensor, step: Tensor) -> Pair:
        at = Coordinates.of(problem.target, low, high, step)
        return at.error, sweep(at, coupling, (0.3, 0.0))

    ones = torch.full(problem.target.shape, 0.7)
    low, high, step = (torch.tensor(end).expand(problem.target.shape) for end in (-2, 1, 0.7))
    for one, other in zip(swept(problem.lower, problem.upper, ones), swept(low, high, step), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("triangular", [False, True])
def test_the_coupling_of_a_block_is_what_lies_inside_it(triangular):
    hessian = CATALOGUE["grouped"].hessian
    coupling = Coupling(*hessian.sequential) if triangular else Coupling(hessian.coupling)
    block = coupling.block(slice(3, 7))
    assert torch.equal(block.matrix, coupling.matrix[:, 3:7, 3:7])
    if coupling.curvature is None:
        assert block.curvature is None
    else:
        assert torch.equal(block.curvature, coupling.curvature[:, 3:7])


def without_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_compiled", lambda device: None)


@every_problem
@pytest.mark.parametrize("triangular", [False, True])
@pytest.mark.parametrize("temperatures", [(0.0,), (0.4,), (0.5, 0.2, 0.0)])
def test_the_compiled_kernel_does_what_the_loop_does(problem, triangular, temperatures, monkeypatch):
    coupling = Coupling(*problem.hessian.sequential) if triangular else Coupling(problem.hessian.coupling)

    def swept() -> Pair:
        at = replace(coordinates(problem), error=start_of(problem))
        loss = sweep(at, coupling, temperatures)
        return at.error.double(), loss.double()

    found = swept()
    without_kernel(monkeypatch)
    expected = swept()
    assert_close(found, expected)


@pytest.mark.parametrize("rows", [1, 15, 16, 40, 127, 128, 129, 300])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_how_rows_go_in_chunks_does_not_matter(rows, threads):
    problem = make(correlated(1, 60, 100, 0), rows, 0)
    coupling = Coupling(problem.hessian.coupling)
    before = torch.get_num_threads()

    def swept(of: RoundingProblem) -> Tensor:
        at = replace(coordinates(of), error=start_of(problem)[..., : of.target.shape[1]].contiguous())
        sweep(at, coupling, (0.4,))
        return at.error

    torch.set_num_threads(threads)
    try:
        whole = swept(problem)
    finally:
        torch.set_num_threads(before)
    few = problem.part(slice(None), slice(max(1, rows // 2)))
    torch.testing.assert_close(swept(few), whole[..., : max(1, rows // 2)], rtol=1e-3, atol=1e-3)


@every_problem
def test_settling_ends_at_a_fixed_point_with_and_without_the_kernel(problem, monkeypatch):
    coupling = Coupling(problem.hessian.coupling)

    def settled() -> Coordinates:
        at = coordinates(problem)
        sweep(at, coupling)
        settle(at, coupling, 100)
        return at

    found = settled()
    again = found.error.clone()
    sweep(found, coupling)
    # but for float32: a coordinate that lies at a half goes to and fro
    assert ((found.error - again).abs() > 1e-3).double().mean() < 0.01
    without_kernel(monkeypatch)
    expected = settled().error
    same = ((again - expected).abs() < 1e-3 * (1 + expected.abs())).all(1)
    assert same.double().mean() > 0.9


def test_a_missing_kernel_is_told_and_the_loop_taken(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "adaround_plugin.solvers.sweep_numba", None)
    monkeypatch.delattr("adaround_plugin.solvers.sweep_numba", raising=False)
    module._compiled.cache_clear()
    problem = PROBLEMS["several_blocks"]
    try:
        at = coordinates(problem)
        sweep(at, Coupling(problem.hessian.coupling))
        assert module._compiled(at.error.device) is None
    finally:
        module._compiled.cache_clear()
    assert "numba does not run here" in caplog.text
    assert at.error.any()
