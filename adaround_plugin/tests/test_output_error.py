"""Errors of outputs, sample by sample, against their definition in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adaround_plugin.learning.output_error import OutputError, OutputTally
from adaround_plugin.regions.calibration import Sampling

# of a batch, one tensor for each output
Outputs = list[Tensor]


def outputs(count: int, *shapes: tuple[int, ...], seed: int = 0) -> tuple[Outputs, Outputs]:
    """Of `count` samples each, what a network says and what it says quantized; entries have means and units."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    exact = [3 * draw(*shape) + draw(*shape).exp() * draw(count, *shape) for shape in shapes]
    return exact, [one + 0.1 * draw(*one.shape) for one in exact]


def tallied(sizes: Sequence[int], batches: Sequence[tuple[Outputs, Outputs]], holdout: float = 0.0) -> OutputError:
    """What a tally makes of batches of these sizes."""
    tally = OutputTally(Sampling.of([[torch.zeros(size, 1)] for size in sizes], holdout, 100, 0))
    for batch, (exact, quantized) in enumerate(batches):
        tally.add(batch, exact, quantized)
    return tally.finish()


def split(sizes: Sequence[int], of_all: tuple[Outputs, Outputs]) -> list[tuple[Outputs, Outputs]]:
    """The outputs of all samples in batches."""
    exact, quantized = (zip(*(one.split(list(sizes)) for one in side), strict=True) for side in of_all)
    return [(list(one), list(other)) for one, other in zip(exact, quantized, strict=True)]


def in_one(of_all: tuple[Outputs, Outputs], holdout: float = 0.0) -> OutputError:
    """The same in one batch."""
    return tallied([len(of_all[0][0])], [of_all], holdout)


def by_definition(of_all: tuple[Outputs, Outputs]) -> Tensor:
    """`(S,)`: of each output, the mean squared error of a sample over the mean variance of an entry."""
    errors = []
    for exact, quantized in zip(*of_all, strict=True):
        samples, entries = len(exact), exact[0].numel()
        x, y = exact.double().reshape(samples, entries), quantized.double().reshape(samples, entries)
        variance = 0.0
        for entry in range(entries):
            mean = sum(float(x[i, entry]) for i in range(samples)) / samples
            variance += sum((float(x[i, entry]) - mean) ** 2 for i in range(samples)) / (samples - 1) / entries
        errors.append((x - y).square().mean(1) / variance)
    return torch.stack(errors).mean(0)


def assert_close(found: OutputError, expected: Tensor, rtol: float = 1e-9) -> None:
    assert found.samples.dtype == torch.float64
    torch.testing.assert_close(found.samples, expected, rtol=rtol, atol=0)


shapes = st.lists(st.lists(st.integers(1, 4), max_size=3).map(tuple), min_size=1, max_size=3)
splits = st.lists(st.integers(1, 7), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) > 1)


@given(shapes, splits, st.integers(0, 2**31))
def test_errors_are_those_of_the_definition_however_samples_are_split(shapes, sizes, seed):
    of_all = outputs(sum(sizes), *shapes, seed=seed)
    found = tallied(sizes, split(sizes, of_all))
    assert_close(found, by_definition(of_all))
    assert_close(in_one(of_all), found.samples)
    assert not found.held_out.any()
    assert found.mean == pytest.approx(float(by_definition(of_all).mean()))


@given(splits, st.floats(0.05, 0.5), st.integers(0, 2**31))
def test_held_out_samples_judge(sizes, holdout, seed):
    total = sum(sizes)
    of_all = outputs(total, (3,), seed=seed)
    found = tallied(sizes, split(sizes, of_all), holdout)
    # variances are of all samples
    expected = by_definition(of_all)
    assert_close(found, expected)
    held = Sampling.of([[torch.zeros(total, 1)]], holdout, 100, 0).held_out(0, total)
    assert torch.equal(found.held_out, held)
    assert 0 < int(held.sum()) < total
    assert found.mean == pytest.approx(float(expected[held].mean()))


def test_all_samples_judge_where_none_is_held_out():
    found = OutputError(torch.tensor([1.0, 5.0]).double(), torch.tensor([False, False]))
    assert found.mean == 3
    assert OutputError(found.samples, torch.tensor([False, True])).mean == 5


@given(shapes, splits, st.integers(0, 2**31), st.floats(-30, 30))
def test_what_all_samples_have_in_common_does_not_count(shapes, sizes, seed, size):
    of_all = outputs(sum(sizes), *shapes, seed=seed)
    patterns = [size * one[0] for one in outputs(1, *shapes, seed=seed + 1)[0]]
    shifted = tuple([one + pattern for one, pattern in zip(side, patterns, strict=True)] for side in of_all)
    assert_close(tallied(sizes, split(sizes, shifted)), in_one(of_all).samples, 1e-6)


@given(splits, st.integers(0, 2**31), st.sampled_from([1e-4, 1.0, 1e5]))
def test_outputs_of_different_units_count_alike(sizes, seed, unit):
    exact, quantized = outputs(sum(sizes), (3,), (2, 2), seed=seed)
    scaled = [exact[0], unit * exact[1]], [quantized[0], unit * quantized[1]]
    alone = [in_one(([one], [other])).samples for one, other in zip(exact, quantized, strict=True)]
    assert_close(tallied(sizes, split(sizes, scaled)), (alone[0] + alone[1]) / 2)


def test_an_output_counts_by_no_number_of_entries():
    exact, quantized = outputs(9, (1,), (50,))
    wide = [exact[0], exact[0].repeat(1, 50)], [quantized[0], quantized[0].repeat(1, 50)]
    assert_close(in_one(wide), in_one(([exact[0]], [quantized[0]])).samples)
    alone = [in_one(([one], [other])).samples for one, other in zip(exact, quantized, strict=True)]
    assert_close(in_one((exact, quantized)), (alone[0] + alone[1]) / 2)


# --- tokens and positions: an axis that is longer in some batches than in others


def pooled(batches: Sequence[tuple[Outputs, Outputs]], entry: Callable[[Tensor], Tensor]) -> Tensor:
    """Errors over the variance of rows `(n, entries)` that `entry` makes of an output, of all batches together."""
    rows = torch.cat([entry(exact) for (exact,), _ in batches])
    variance = (rows - rows.mean(0)).square().sum(0).mean() / (len(rows) - 1)
    return torch.cat([(x - y).square().flatten(1).mean(1) for (x,), (y,) in batches]) / variance


@given(st.lists(st.integers(1, 6), min_size=2, max_size=5).filter(lambda one: len(set(one)) > 1), st.integers(1, 4))
def test_tokens_have_one_mean_where_their_number_differs(lengths, size):
    batches = [outputs(size, (length, 3), seed=i) for i, length in enumerate(lengths)]
    found = tallied([size] * len(lengths), batches)
    assert_close(found, pooled(batches, lambda x: x.reshape(-1, 3)))


def test_positions_of_images_have_one_mean_for_each_channel_where_sizes_differ():
    batches = [outputs(2, (3, height, width)) for height, width in ((4, 5), (2, 3), (4, 5))]
    found = tallied([2, 2, 2], batches)
    assert_close(found, pooled(batches, lambda x: x.movedim(1, -1).reshape(-1, 3)))


def test_tokens_may_be_all_there_is():
    batches = [outputs(3, (length,), seed=length) for length in (2, 5)]
    assert_close(tallied([3, 3], batches), pooled(batches, lambda x: x.reshape(-1, 1)))


def test_what_all_tokens_have_in_common_does_not_count():
    batches = [outputs(3, (length, 4), seed=length) for length in (2, 5)]
    pattern = 10 * torch.arange(4.0)
    shifted = [([x + pattern], [y + pattern]) for (x,), (y,) in batches]
    assert_close(tallied([3, 3], shifted), tallied([3, 3], batches).samples)


def test_as_many_tokens_in_every_batch_have_means_of_their_own():
    of_all = outputs(6, (4, 3))
    assert_close(tallied([2, 4], split([2, 4], of_all)), by_definition(of_all))


# --- several entries of the leading axis for each sample


@given(splits, st.integers(2, 4), st.integers(0, 2**31))
def test_rows_of_a_sample_on_the_leading_axis_are_entries_of_it(sizes, rows, seed):
    of_all = outputs(sum(sizes), (rows, 3), seed=seed)
    folded = [
        ([one.flatten(0, 1) for one in exact], [one.flatten(0, 1) for one in quantized])
        for exact, quantized in split(sizes, of_all)
    ]
    found = tallied(sizes, folded)
    assert found.samples.shape == (sum(sizes),)
    assert_close(found, by_definition(of_all))


def test_rows_on_the_leading_axis_are_averaged_sample_by_sample():
    exact = torch.tensor([[1.0], [-1.0], [1.0], [-1.0], [1.0], [-1.0]])
    error = torch.tensor([[1.0], [3.0], [0.0], [0.0], [2.0], [2.0]])
    found = tallied([3], [([exact], [exact + error])])
    assert (found.samples / found.samples.sum()).tolist() == pytest.approx([5 / 9, 0, 4 / 9])


# --- few samples, and what does not vary


@pytest.mark.parametrize("shape", [(4,), (2, 3)])
def test_of_one_sample_entries_have_one_mean(shape):
    exact, quantized = outputs(1, shape)
    values, error = exact[0].flatten(), (exact[0] - quantized[0]).square().mean()
    assert_close(in_one((exact, quantized)), (error / values.var()).reshape(1))


def test_of_one_number_the_square_is_taken():
    found = in_one(([torch.tensor([[3.0]])], [torch.tensor([[1.5]])]), 0.25)
    assert found.samples.tolist() == [0.25]
    assert found.mean == 0.25


def test_an_output_that_never_varies_is_relative_to_its_mean_square():
    exact = torch.tensor([1.0, 2.0, 3.0]).repeat(6, 1)
    quantized = exact + torch.arange(6.0).unsqueeze(1)
    mean_square = (1 + 4 + 9) / 3
    found = tallied([2, 4], split([2, 4], ([exact], [quantized])))
    assert_close(found, torch.arange(6.0).double().square() / mean_square)


def test_what_varies_by_no_more_than_rounding_does_not_vary():
    exact = 1000 + 1e-3 * torch.arange(6.0).double().reshape(6, 1)
    assert in_one(([exact], [exact + 100])).mean == pytest.approx(0.01, rel=1e-4)


def test_an_output_of_zeros_is_as_wrong_as_what_becomes_of_it():
    exact = torch.zeros(4, 3)
    assert in_one(([exact], [exact])).samples.tolist() == [0] * 4
    assert in_one(([exact], [exact + 0.5])).samples.tolist() == [0.25] * 4


def test_large_means_keep_small_errors_accurate():
    exact, quantized = outputs(50, (3,))
    shifted = [exact[0] + 1000], [quantized[0] + 1000]
    assert_close(in_one(shifted), by_definition((exact, quantized)), 1e-6)


def test_float32_is_added_up_in_float64():
    exact, quantized = ([one.float() for one in side] for side in outputs(3000, (2,)))
    sizes = [7] * 428 + [4]
    assert_close(tallied(sizes, split(sizes, (exact, quantized))), by_definition((exact, quantized)), 1e-6)


# --- outputs without an axis of samples, and without entries


def test_an_output_without_samples_is_one_for_all_of_its_batch():
    """A scalar for each batch, such as a loss."""
    values, errors = torch.tensor([1.0, 4.0, -2.0]).double(), torch.tensor([0.5, 0.0, 1.0]).double()
    sizes = [2, 3, 1]
    found = tallied(sizes, [([x], [x + error]) for x, error in zip(values, errors, strict=True)])
    assert_close(found, (errors.square() / values.var()).repeat_interleave(torch.tensor(sizes)))


def test_an_axis_that_is_none_of_samples_is_one_of_entries():
    """Of 4 and 5 samples, three numbers each."""
    batches = [([x[0]], [y[0]]) for (x,), (y,) in (outputs(1, (3,), seed=i) for i in range(4))]
    sizes = [4, 5, 4, 5]
    exact, quantized = (torch.stack([side[number][0] for side in batches]) for number in range(2))
    expected = by_definition(([exact], [quantized]))
    assert_close(tallied(sizes, batches), expected.repeat_interleave(torch.tensor(sizes)))


def test_a_scalar_counts_like_an_output_with_samples():
    exact, quantized = outputs(6, (3,))
    loss = torch.tensor([1.0, 2.0]).double()
    batches = [
        ([*x, one], [*y, one + 0.5]) for (x, y), one in zip(split([2, 4], (exact, quantized)), loss, strict=True)
    ]
    expected = (by_definition((exact, quantized)) + 0.25 / loss.var()) / 2
    assert_close(tallied([2, 4], batches), expected)


def test_an_empty_output_does_not_count():
    exact, quantized = outputs(6, (3,))
    empty = torch.zeros(6, 0)
    expected = by_definition((exact, quantized))
    assert_close(in_one(([*exact, empty], [*quantized, empty])), expected)
    assert_close(in_one(([empty, *exact], [empty, *quantized])), expected)


def test_nothing_but_empty_outputs_has_no_error():
    found = tallied([2, 1], [([torch.zeros(0, 4)], [torch.zeros(0, 4)])] * 2, 0.25)
    assert found.samples.tolist() == [0] * 3
    assert found.mean == 0


def test_no_outputs_have_no_error():
    assert tallied([2, 1], [([], [])] * 2).samples.tolist() == [0] * 3


def test_an_output_may_be_empty_in_some_batches():
    """As boxes are where nothing is found."""
    batches = [outputs(2, (length, 4), seed=i) for i, length in enumerate((3, 0, 2))]
    found = tallied([2, 2, 2], batches)
    expected = pooled([batches[0], batches[2]], lambda x: x.reshape(-1, 4))
    torch.testing.assert_close(found.samples[[0, 1, 4, 5]], expected)
    assert found.samples[2:4].tolist() == [0, 0]


def test_outputs_that_are_the_same_have_no_error():
    exact, _ = outputs(5, (2, 3), ())
    assert in_one((exact, exact), 0.25).mean == 0


def test_an_error_that_is_no_number_stays_one():
    exact, quantized = outputs(4, (3,))
    quantized[0][2, 1] = float("nan")
    assert in_one((exact, quantized)).samples.isnan().tolist() == [False, False, True, False]


@given(splits, st.integers(0, 2**31))
def test_outputs_are_left_as_they_are(sizes, seed):
    of_all = outputs(sum(sizes), (3,), seed=seed)
    before = [one.clone() for one in itertools.chain(*of_all)]
    in_one(of_all)
    assert all(torch.equal(one, other) for one, other in zip(itertools.chain(*of_all), before, strict=True))
