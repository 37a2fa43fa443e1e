"""How far a second moment may be trusted, beside the terms of every sample written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from adaround_plugin.rounding import shrinkage
from adaround_plugin.rounding.moments import Moments
from adaround_plugin.rounding.shrinkage import SampleSpread

SAMPLES, PER_SAMPLE = 40, 6
SAMPLE = torch.arange(SAMPLES).repeat_interleave(PER_SAMPLE)


def drawn(groups: int = 1, columns: int = 12, lead: float = 3.0) -> tuple[Tensor, Tensor]:
    """Columns that have a direction and, in a sample, an offset in common; and weights."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(groups, SAMPLES, *shape, generator=generator)

    x = normal(PER_SAMPLE, columns) + normal(1, columns) + lead * normal(PER_SAMPLE, 1) + 2
    return x.flatten(1, 2), torch.rand(groups, SAMPLES * PER_SAMPLE, generator=generator) + 0.1


def mean_of(x: Tensor, weight: Tensor) -> Tensor:
    weight = weight.double().unsqueeze(2)
    return (weight * x.double()).sum(1) / weight.sum(1)


def exact(x: Tensor, weight: Tensor, mean: Tensor | None) -> tuple[float, Tensor]:
    """The shrinkage by its definition, with what is unbiased for the noise; and the traces of the moments."""
    centred = x.double() if mean is None else x.double() - mean.unsqueeze(1)
    parts = (centred * weight.double().sqrt().unsqueeze(2)).unflatten(1, (SAMPLES, PER_SAMPLE))
    terms = parts.transpose(2, 3) @ parts
    moment = terms.sum(1)
    level = moment.diagonal(dim1=1, dim2=2).mean(1)
    noise = (terms - terms.mean(1, keepdim=True)).square().sum((1, 2, 3)) * SAMPLES / (SAMPLES - 1)
    distance = (moment - level[:, None, None] * torch.eye(x.shape[2])).square().sum((1, 2))
    ratio = (noise / level.square()).sum() / (distance / level.square()).sum()
    return min(1.0, float(ratio)), level * x.shape[2]


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("groups", [1, 3, 50])
@pytest.mark.parametrize("lead", [1.0, 3.0])
def test_many_projections_find_the_shrinkage_of_ledoit_and_wolf(groups, centred, lead, monkeypatch):
    monkeypatch.setattr(shrinkage, "_PAIRS", 20_000)
    monkeypatch.setattr(shrinkage, "_MOST_GROUPS", 100)
    x, weight = drawn(groups, lead=lead)
    mean = mean_of(x, weight) if centred else None
    found = SampleSpread(groups, x.shape[2], SAMPLES, x.device)
    found.add(x, SAMPLE, weight)
    expected, trace = exact(x, weight, mean)
    assert 0.01 < expected < 0.9
    assert found.shrinkage(trace, mean) == pytest.approx(expected, rel=0.1)


def test_few_projections_and_some_groups_come_near():
    x, weight = drawn(100)
    mean = mean_of(x, weight)
    found = SampleSpread(100, x.shape[2], SAMPLES, x.device)
    found.add(x, SAMPLE, weight)
    expected, trace = exact(x, weight, mean)
    assert found.shrinkage(trace, mean) == pytest.approx(expected, rel=0.5)


def test_columns_come_in_any_order_from_any_call_site_or_machine():
    x, weight = drawn(2)
    mean, (_, trace) = mean_of(x, weight), exact(x, weight, mean_of(x, weight))
    whole, first, second = (SampleSpread(2, x.shape[2], SAMPLES, x.device) for _ in range(3))
    whole.add(x, SAMPLE, weight)
    order = torch.randperm(len(SAMPLE), generator=torch.Generator().manual_seed(1))
    for part in order.split(37):
        first.add(x[:, part], SAMPLE[part], weight[:, part])
    expected = whole.shrinkage(trace, mean)
    assert first.shrinkage(trace, mean) == pytest.approx(expected, rel=1e-6)
    # two call sites: half of the columns of every sample each
    one, other = (SampleSpread(2, x.shape[2], SAMPLES, x.device) for _ in range(2))
    for start, into in enumerate((one, other)):
        into.add(x[:, start::2], SAMPLE[start::2], weight[:, start::2])
    one.merge(other)
    assert one.shrinkage(trace, mean) == pytest.approx(expected, rel=1e-6)
    # two machines: half of the samples each
    here, there = SAMPLE < 15, SAMPLE >= 15
    second.add(x[:, there], SAMPLE[there], weight[:, there])
    sums: list[list[Tensor]] = []

    def note(*values: Tensor) -> None:
        sums.append([value.clone() for value in values])

    second.shrinkage(trace, mean, note)

    def add(*values: Tensor) -> None:
        for value, more in zip(values, sums[0], strict=True):
            value += more

    mine = SampleSpread(2, x.shape[2], SAMPLES, x.device)
    mine.add(x[:, here], SAMPLE[here], weight[:, here])
    assert mine.shrinkage(trace, mean, add) == pytest.approx(expected, rel=1e-6)


def test_weights_count_as_columns_that_come_more_than_once():
    x, _ = drawn()
    twice, weighed = (SampleSpread(1, x.shape[2], SAMPLES, x.device) for _ in range(2))
    for _ in range(2):
        twice.add(x, SAMPLE)
    weighed.add(x, SAMPLE, torch.full(x.shape[:2], 2.0))
    _, trace = exact(x, torch.full(x.shape[:2], 2.0), None)
    assert twice.shrinkage(trace) == pytest.approx(weighed.shrinkage(trace), rel=1e-6)


@pytest.mark.parametrize("samples", [0, 1])
def test_less_than_two_samples_say_nothing(samples):
    x, _ = drawn()
    found = SampleSpread(1, x.shape[2], SAMPLES, x.device)
    count = samples * PER_SAMPLE
    found.add(x[:, :count], SAMPLE[:count])
    assert found.shrinkage(torch.ones(1, dtype=torch.float64)) == 1.0


def test_constant_data_say_nothing():
    found = SampleSpread(1, 4, SAMPLES, torch.device("cpu"))
    found.add(torch.zeros(1, len(SAMPLE), 4), SAMPLE)
    assert found.shrinkage(torch.zeros(1, dtype=torch.float64)) == 1.0


def damping(x: Tensor, sample: Tensor) -> float:
    moments = Moments(len(x), 2, x.shape[2], x.device)
    moments.add(x, x.new_zeros(len(x), x.shape[1], 2))
    found = SampleSpread(len(x), x.shape[2], int(sample.max()) + 1, x.device)
    found.add(x, sample)
    return found.damping(moments.finish())


@pytest.mark.parametrize(("samples", "columns"), [(60, 30), (120, 30), (60, 60)])
def test_damping_of_independent_normal_columns_is_a_fifth_of_their_length_over_their_number(samples, columns):
    x = torch.randn(5, samples, columns, generator=torch.Generator().manual_seed(0)) + 1
    sample = torch.arange(samples)
    assert damping(x, sample) == pytest.approx(0.2 * columns / samples, rel=0.25)
    # the same column again in the same sample says nothing new
    again = damping(x.repeat_interleave(6, 1), sample.repeat_interleave(6))
    assert again == pytest.approx(damping(x, sample), rel=1e-4)


def test_damping_has_bounds():
    x, _ = drawn(columns=400)
    assert damping(x[:, SAMPLE == 0], SAMPLE[SAMPLE == 0]) == 10.0
    many = torch.randn(1, 4000, 4, generator=torch.Generator().manual_seed(0))
    assert damping(many, torch.arange(4000)) == 0.01
    assert damping(torch.ones(1, 10, 4), torch.arange(10)) == 0.01


def test_a_constant_group_does_not_decide_for_the_others():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 60, 30, generator=generator) + 1
    sample = torch.arange(60)
    # whose variance is what float32 leaves of it
    x[1] = 0.37
    assert damping(x, sample) == pytest.approx(damping(x[:1], sample), rel=0.2)
