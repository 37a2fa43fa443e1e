"""The quadratic form and its factors against torch.linalg."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaround_plugin.errors import InvalidOptionError, NonFiniteError
from adaround_plugin.rounding.hessian import Hessian
from adaround_plugin.tests.problems import correlated


def rows(groups: int, count: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(groups, count, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(seed=st.integers(0, 2**31), groups=st.integers(1, 3), columns=st.integers(1, 12), count=st.integers(1, 4))
def test_solve_is_the_linear_system(seed, groups, columns, count):
    hessian = Hessian.damped(correlated(groups, columns, 5, seed), 0.01)
    right = rows(groups, count, columns, seed % 1000)
    # r H^-1 with H symmetric
    expected = torch.linalg.solve(hessian.matrix, right.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(hessian.solve(right), expected, rtol=1e-8, atol=1e-8)


def test_quadratic_is_r_h_r():
    hessian, r = Hessian.damped(correlated(2, 6, 30, 0), 0.01), rows(2, 3, 6)
    expected = torch.stack([torch.stack([r[g, i] @ hessian.matrix[g] @ r[g, i] for i in range(3)]) for g in range(2)])
    torch.testing.assert_close(hessian.quadratic(r), expected)


def test_damping_adds_a_share_of_the_mean_diagonal_to_each_group():
    moment = correlated(2, 5, 30, 0) * torch.tensor([1.0, 100.0]).double()[:, None, None]
    before = moment.clone()
    damped = Hessian.damped(moment, 0.1).matrix
    for g in range(2):
        expected = moment[g] + 0.1 * moment[g].trace() / 5 * torch.eye(5).double()
        torch.testing.assert_close(damped[g], expected)
    assert torch.equal(moment, before)


def test_constant_data_give_the_identity():
    moment = torch.stack([torch.zeros(3, 3), torch.eye(3)]).double()
    damped = Hessian.damped(moment, 0.01).matrix
    assert torch.equal(damped[0], torch.eye(3).double())
    torch.testing.assert_close(damped[1], 1.01 * torch.eye(3).double())


def test_data_too_small_for_products_in_float32_give_the_identity():
    columns = torch.randn(1, 16, 7, generator=torch.Generator().manual_seed(0)) * 1e-22
    products = (columns @ columns.mT).double()
    assert 0 < products.abs().max() < 1e-42
    hessian = Hessian.damped(products, 0.1)
    assert (hessian.diagonal - 1).abs().max() < 1e-12
    assert torch.isfinite(hessian.cholesky).all()


def test_damping_makes_rank_deficient_and_dead_columns_definite():
    moment = correlated(1, 20, 3, 0)
    moment[:, 4], moment[:, :, 4] = 0, 0
    hessian = Hessian.damped(moment, 1e-3)
    assert torch.isfinite(hessian.cholesky).all()
    assert torch.isfinite(hessian.coupling).all()
    assert torch.isfinite(hessian.solve(rows(1, 2, 20))).all()


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 9])
def test_blocks_are_the_form_on_runs_of_columns(size):
    hessian, r = Hessian.damped(correlated(2, 6, 30, 0), 0.01), rows(2, 3, 6)
    blocks = hessian.blocks(size)
    count = -(-6 // size)
    assert blocks.matrix.shape == (2 * count, size, size)
    assert torch.isfinite(blocks.cholesky).all()
    for group in range(2):
        for i in range(count):
            only = torch.zeros_like(r)
            run = slice(i * size, min(6, (i + 1) * size))
            only[group, :, run] = r[group, :, run]
            padded = torch.zeros(1, 3, size, dtype=torch.float64)
            padded[0, :, : run.stop - run.start] = r[group, :, run]
            found = Hessian(blocks.matrix[group * count + i][None]).quadratic(padded)
            torch.testing.assert_close(found[0], hessian.quadratic(only)[group])


def test_order_visits_the_largest_diagonal_first_and_ties_in_place():
    diagonal = torch.tensor([[1.0, 5.0, 1.0, 3.0], [2.0, 2.0, 2.0, 2.0]]).double()
    assert Hessian(torch.diag_embed(diagonal)).order.tolist() == [[1, 3, 0, 2], [0, 1, 2, 3]]


def test_coupling_is_the_conditional_optimum_of_a_coordinate():
    hessian = Hessian.damped(correlated(1, 6, 30, 0), 0.01)
    error = rows(1, 1, 6)[0, 0]
    for j in range(6):
        # d/de_j (e H e) = 0 at e_j = -sum_k M_jk e_k
        moved = error.clone()
        moved[j] = -(hessian.coupling[0, j].double() @ error)
        torch.testing.assert_close((hessian.matrix[0] @ moved)[j], torch.zeros(()).double(), atol=1e-5, rtol=0)


def test_sequential_factor_reproduces_the_form():
    hessian, e = Hessian.damped(correlated(2, 9, 40, 0), 0.01), rows(2, 3, 9)
    matrix, curvature = hessian.sequential
    assert (matrix.triu() == 0).all()
    ordered = e.gather(2, hessian.order.unsqueeze(1).expand(-1, 3, -1))
    residual = ordered + ordered @ matrix.double().transpose(1, 2)
    found = (curvature.double().unsqueeze(1) * residual.square()).sum(-1)
    torch.testing.assert_close(found, hessian.quadratic(e), rtol=1e-4, atol=1e-6)


def test_cholesky_factors_the_permuted_matrix():
    hessian = Hessian.damped(correlated(2, 7, 40, 0), 0.01)
    for g in range(2):
        index = hessian.order[g].flip(0)
        permuted = hessian.matrix[g][index][:, index]
        torch.testing.assert_close(hessian.cholesky[g] @ hessian.cholesky[g].T, permuted)


@pytest.mark.parametrize("shape", [(3, 3), (1, 2, 3), (1, 1, 2, 2)])
def test_a_shape_that_is_no_form_per_group_is_refused(shape):
    with pytest.raises(InvalidOptionError, match=r"hessian.*\(groups, D, D\)"):
        Hessian(torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(value):
    matrix = torch.eye(3, dtype=torch.float64)[None].clone()
    matrix[0, 1, 2] = value
    with pytest.raises(NonFiniteError, match="hessian"):
        Hessian(matrix)
    with pytest.raises(NonFiniteError):
        Hessian.damped(matrix, 0.01)


def test_an_indefinite_form_is_refused_with_the_remedy():
    matrix = torch.tensor([[[1.0, 2.0], [2.0, 1.0]]], dtype=torch.float64)
    with pytest.raises(InvalidOptionError, match=r"damping.*Raise it"):
        Hessian(matrix).solve(rows(1, 1, 2))
