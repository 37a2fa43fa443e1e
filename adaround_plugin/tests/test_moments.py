"""Streaming moments against their definition in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adaround_plugin.rounding.moments import HeldOut, Moments

Columns = tuple[Tensor, Tensor, Tensor]


def columns(seed: int, count: int, groups: int = 2, rows: int = 3, size: int = 4, mean: float = 1.0) -> Columns:
    """`count` columns as the float32 that activations are, with their deviation and positive weights."""
    generator = torch.Generator().manual_seed(seed)
    x = mean + torch.randn(groups, count, size, generator=generator)
    deviation = 0.1 * torch.randn(groups, count, rows, generator=generator) + 0.05 * x[..., :1]
    weight = 0.1 + torch.rand(groups, count, generator=generator)
    return x, deviation, weight


def gathered(*parts: Columns) -> Moments:
    groups, _, size = parts[0][0].shape
    moments = Moments(groups, parts[0][1].shape[2], size, torch.device("cpu"))
    for part in parts:
        moments.add(*part)
    return moments.finish()


def pick(data: Columns, index: Tensor | slice) -> Columns:
    x, deviation, weight = data
    return x[:, index], deviation[:, index], weight[:, index]


def by_definition(data: Columns) -> dict[str, Tensor]:
    x, d, weight = (part.double() for part in data)
    share = (weight / weight.sum(1, keepdim=True)).unsqueeze(-1)
    mean, deviation = (share * x).sum(1), (share * d).sum(1)
    xc, dc = x - mean[:, None], d - deviation[:, None]
    return {
        "mean": mean,
        "deviation": deviation,
        "hessian": (share * xc).transpose(1, 2) @ xc,
        "cross": (share * dc).transpose(1, 2) @ xc,
        "power": (share * dc.square()).sum(1),
        "total": weight.sum(1),
    }


def assert_same(moments: Moments, expected: dict[str, Tensor], rtol: float = 1e-5, atol: float = 1e-6) -> None:
    for name, value in expected.items():
        found = getattr(moments, name)
        assert found.dtype == torch.float64, name
        torch.testing.assert_close(found, value, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


@given(seed=st.integers(0, 2**31), count=st.integers(1, 300), mean=st.floats(-10, 10))
def test_moments_are_those_of_the_definition(seed, count, mean):
    data = columns(seed, count, mean=mean)
    moments = gathered(data)
    assert moments.count == count
    assert_same(moments, by_definition(data))


@given(seed=st.integers(0, 2**31), cuts=st.lists(st.integers(0, 3000), max_size=6))
def test_any_split_into_batches_gives_the_same_moments(seed, cuts):
    data = columns(seed, 3000)
    edges = [0, *sorted(cuts), 3000]
    parts = [pick(data, slice(a, b)) for a, b in itertools.pairwise(edges)]
    moments = gathered(*parts)
    assert moments.count == 3000
    assert_same(moments, by_definition(data))


@given(seed=st.integers(0, 2**31))
def test_the_order_of_columns_does_not_matter(seed):
    data = columns(seed, 2500)
    shuffled = pick(data, torch.randperm(2500, generator=torch.Generator().manual_seed(seed)))
    assert_same(gathered(shuffled), by_definition(data))


def test_batches_of_different_distributions_are_pooled():
    parts = [columns(seed, 1500, mean=mean) for seed, mean in enumerate((-3.0, 0.0, 5.0))]
    together = tuple(torch.cat(tensors, 1) for tensors in zip(*parts, strict=True))
    assert_same(gathered(*parts), by_definition(together))


@given(seed=st.integers(0, 2**31), cut=st.integers(0, 200), mean=st.floats(-10, 10))
def test_moments_of_two_parts_are_merged(seed, cut, mean):
    data = columns(seed, 200, mean=mean)
    first, second = gathered(pick(data, slice(cut))), gathered(pick(data, slice(cut, None)))
    kept = first.hessian.clone()
    merged = first.merged(second)
    assert merged.count == 200
    assert_same(merged, by_definition(data))
    assert torch.equal(first.hessian, kept)


def test_finishing_in_between_changes_nothing():
    data = columns(0, 900)
    moments = Moments(2, 3, 4, torch.device("cpu"))
    for start in range(0, 900, 300):
        moments.add(*pick(data, slice(start, start + 300)))
        moments.finish().finish()
    assert_same(moments, by_definition(data))


@pytest.mark.parametrize("count", [40, 5000])
def test_large_means_keep_the_spread_accurate(count):
    # in float32, E[x^2] - E[x]^2 would have no digit left of a variance of 1 beside a mean of 1,000
    data = columns(0, count, mean=1000.0)
    assert_same(
        gathered(*[pick(data, slice(i, i + 700)) for i in range(0, count, 700)]), by_definition(data), 1e-5, 1e-4
    )


def test_large_means_keep_small_errors_accurate():
    x, deviation, weight = columns(0, 4000, mean=1000.0)
    change = 1e-3 * torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1)).double()
    error = deviation.double() + x.double() @ change.transpose(1, 2)
    share = (weight.double() / weight.double().sum(1, keepdim=True)).unsqueeze(-1)
    best = (share * (error - (share * error).sum(1, keepdim=True)).square()).sum(1)
    torch.testing.assert_close(gathered((x, deviation, weight)).least_error(change), best, rtol=1e-4, atol=0)


@given(seed=st.integers(0, 2**31), count=st.integers(1, 200), biased=st.booleans())
def test_error_is_the_mean_squared_error(seed, count, biased):
    data = columns(seed, count)
    x, deviation, weight = (part.double() for part in data)
    change = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed)).double()
    residual = deviation + x @ change.transpose(1, 2)  # (G, n, R)
    share = (weight / weight.sum(1, keepdim=True)).unsqueeze(-1)
    bias = (share * residual).sum(1)
    moments = gathered(data)
    expected = (share * (residual - biased * bias.unsqueeze(1)).square()).sum(1)
    found = moments.least_error(change) if biased else moments.error(change)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moments.bias(change), bias, rtol=1e-4, atol=1e-5)


@given(seed=st.integers(0, 2**31), nudge=st.sampled_from([-0.1, 0.1]))
def test_no_other_bias_is_better(seed, nudge):
    data = columns(seed, 100)
    change = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed)).double()
    moments = gathered(data)
    x, deviation, weight = (part.double() for part in data)
    residual = deviation + x @ change.transpose(1, 2) - (moments.bias(change) + nudge).unsqueeze(1)
    share = (weight / weight.sum(1, keepdim=True)).unsqueeze(-1)
    assert ((share * residual.square()).sum(1) > moments.least_error(change)).all()


def test_uncentred_moments_are_those_of_the_definition():
    data = columns(3, 700)
    x, d, weight = (part.double() for part in data)
    share = (weight / weight.sum(1, keepdim=True)).unsqueeze(-1)
    second, cross, power = gathered(data).terms(centred=False)
    torch.testing.assert_close(second, (share * x).transpose(1, 2) @ x, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(cross, (share * d).transpose(1, 2) @ x, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(power, (share * d.square()).sum(1), rtol=1e-5, atol=1e-6)


@given(seed=st.integers(0, 2**31), count=st.integers(2, 60))
def test_columns_of_weight_zero_are_ignored(seed, count):
    x, deviation, weight = columns(seed, count)
    ignored = torch.arange(count) % 2 == 1
    weight[:, ignored] = 0
    x[:, ignored] = 1e3
    assert_same(gathered((x, deviation, weight)), by_definition(pick((x, deviation, weight), ~ignored)))


def test_a_batch_of_weight_zero_changes_nothing():
    data = columns(0, 1100)
    x, deviation, weight = columns(1, 1100, mean=50.0)
    for order in ((data, (x, deviation, 0 * weight)), ((x, deviation, 0 * weight), data)):
        assert_same(gathered(*order), by_definition(data))


def test_weights_are_relative():
    x, deviation, weight = columns(0, 500)
    moments, heavier = gathered((x, deviation, weight)), gathered((x, deviation, 1e6 * weight))
    expected = {name: getattr(moments, name) for name in ("mean", "hessian", "deviation", "cross", "power")}
    assert_same(heavier, expected)


def test_no_columns_are_no_moments():
    moments = gathered(columns(0, 0))
    assert moments.count == 0
    assert (moments.hessian == 0).all()


def test_the_hessian_is_symmetric_and_not_negative():
    hessian = gathered(columns(0, 3)).hessian  # fewer columns than dimensions
    torch.testing.assert_close(hessian, hessian.transpose(1, 2))
    assert torch.linalg.eigvalsh(hessian).min() > -1e-7


def test_error_is_never_negative():
    x = torch.ones(1, 50, 2)
    moments = gathered((x, x.sum(-1, keepdim=True), torch.ones(1, 50)))
    error = moments.error(-torch.ones(1, 1, 2).double())
    assert 0 <= error.item() < 1e-10  # exactly 0 but for rounding, which could fall below it


def test_bytes_is_what_the_large_moments_take():
    moments = gathered(columns(0, 1, groups=3, rows=5, size=7))
    assert Moments.bytes(3, 5, 7) == 8 * (moments.hessian.numel() + moments.cross.numel())


@pytest.mark.parametrize("value", [1.0, 0.1, -1000.3])
def test_constant_columns_have_no_spread_that_float32_can_tell(value):
    x = torch.full((1, 40, 3), value)
    moments = gathered((x, 0 * x, torch.ones(1, 40)))
    resolution = abs(value) * torch.finfo(torch.float32).eps
    assert moments.hessian.abs().max() <= (8 * resolution) ** 2
    torch.testing.assert_close(moments.mean, torch.full((1, 3), value).double(), rtol=1e-6, atol=0)


def test_products_in_blocks_are_the_whole_product():
    x, deviation, weight = columns(0, 50, groups=2, rows=3, size=1100)  # more than one block of columns
    moments = gathered((x, deviation, weight))
    share = weight.double() / weight.double().sum(1, keepdim=True)
    centred = x.double() - (share.unsqueeze(2) * x.double()).sum(1, keepdim=True)
    expected = (centred * share.unsqueeze(2)).transpose(1, 2) @ centred
    torch.testing.assert_close(moments.hessian, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(moments.hessian, moments.hessian.transpose(1, 2))


@given(seed=st.integers(0, 2**31), count=st.integers(1, 200), weighs=st.booleans(), shifted=st.booleans())
def test_held_out_columns_tell_what_moments_of_them_would(seed, count, weighs, shifted):
    x, deviation, weight = columns(seed, count)
    data = (x, deviation, weight if weighs else None)
    held = HeldOut()
    for part in (slice(0, count // 3), slice(count // 3, None)):
        held.add(*(None if values is None else values[:, part] for values in data))
    assert held.finish().count == count
    moments = gathered((x, deviation, weight if weighs else torch.ones_like(weight)))
    generator = torch.Generator().manual_seed(seed)
    change, rows = (torch.randn(2, 3, 4, generator=generator).double() for _ in range(2))
    offset = torch.randn(2, 3, generator=generator).double() if shifted else None
    torch.testing.assert_close(held.error(change, offset), moments.error(change, offset), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(held.power_of(rows), moments.power_of(rows), rtol=1e-3, atol=1e-5)


def test_no_columns_held_out_are_none():
    held = HeldOut()
    held.add(*columns(0, 0))
    assert held.finish().count == 0
    assert held.sums() == []


def test_columns_without_weights_weigh_one():
    x, deviation, _ = columns(5, 300)
    assert_same(gathered((x, deviation, None)), by_definition((x, deviation, torch.ones(2, 300))))
    mixed = gathered((x[:, :100], deviation[:, :100], None), (x[:, 100:], deviation[:, 100:], torch.ones(2, 200)))
    assert_same(mixed, by_definition((x, deviation, torch.ones(2, 300))))
