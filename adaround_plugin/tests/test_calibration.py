"""What a loader may yield, and which columns of it are used."""

from __future__ import annotations

import itertools
import time
from collections import namedtuple
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.utils.data import DataLoader, TensorDataset

from adaround_plugin.errors import InvalidBatchError
from adaround_plugin.hosts.fx.host import placeholder_signature
from adaround_plugin.regions.binding import bind_batches
from adaround_plugin.regions.calibration import Sampling
from adaround_plugin.regions.spread import spread
from adaround_plugin.rounding.linear_op import LinearOp, Patches


class One(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


class Two(nn.Module):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x * mask


class Optional(nn.Module):
    def forward(self, x: Tensor, scale: float = 2.0, mask: Tensor | None = None) -> Tensor:
        return x * scale


class KeywordOnly(nn.Module):
    def forward(self, x: Tensor, *, bias: Tensor, gain: float = 3.0) -> Tensor:
        return x * gain + bias


X = torch.arange(6.0).reshape(2, 3)
MASK = torch.tensor([[True, False, True], [False, True, True]])


def bind(model: nn.Module, batches: Any, inputs: Any = None) -> list[list[Any]]:
    signature = placeholder_signature(fx.symbolic_trace(model))
    return bind_batches(model, signature, lambda bound: list(bound.arguments.values()), batches, inputs)


def assert_bound(found: list[list[Any]], *expected: Any) -> None:
    assert len(found) == 1
    assert len(found[0]) == len(expected)
    for value, want in zip(found[0], expected, strict=True):
        assert torch.equal(value, want) if isinstance(want, Tensor) else value == want


def test_tensors_are_batches_of_one_argument():
    found = bind(One(), [X, X + 1])
    assert [len(arguments) for arguments in found] == [1, 1]
    assert torch.equal(found[1][0], X + 1)


@pytest.mark.parametrize("batch", [(X, MASK), [X, MASK], namedtuple("Batch", "a b")(X, MASK)])
def test_tuples_are_positional(batch):
    assert_bound(bind(Two(), [batch]), X, MASK)


def test_dicts_are_keywords_in_any_order():
    assert_bound(bind(Two(), [{"mask": MASK, "x": X}]), X, MASK)


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (X, (X, 2.0, None)),
        ((X, 4.0), (X, 4.0, None)),
        ({"x": X, "mask": MASK}, (X, 2.0, MASK)),
        ({"mask": MASK, "x": X, "scale": 1.0}, (X, 1.0, MASK)),
    ],
)
def test_defaults_fill_what_is_missing(batch, expected):
    assert_bound(bind(Optional(), [batch]), *expected)


def test_keyword_only_inputs_come_from_dicts():
    assert_bound(bind(KeywordOnly(), [{"x": X, "bias": X}]), X, X, 3.0)


def test_inputs_maps_a_batch_to_the_model_s_inputs():
    batch = (X, torch.tensor([0, 1]))
    assert_bound(bind(One(), [batch], lambda batch: batch[0]), X)
    assert_bound(bind(Two(), [batch], lambda batch: {"mask": MASK, "x": batch[0]}), X, MASK)
    assert_bound(bind(Two(), [batch], lambda batch: (batch[0], MASK)), X, MASK)


def test_loaders_and_iterators_are_read_once():
    loader = DataLoader(TensorDataset(torch.arange(10.0).reshape(10, 1)), batch_size=4)
    assert [len(arguments[0]) for arguments in bind(One(), loader)] == [4, 4, 2]
    reads = []

    def stream():
        for i in range(3):
            reads.append(i)
            yield X + i

    found = bind(One(), stream())
    assert reads == [0, 1, 2]
    assert torch.equal(found[2][0], X + 2)


def test_integer_inputs_are_left_alone():
    tokens = torch.tensor([[1, 2], [3, 4]])
    assert_bound(bind(One(), [tokens]), tokens)


@pytest.mark.parametrize(
    ("model", "batch"),
    [
        (One(), (X, torch.tensor([0, 1]))),
        (One(), {"image": X}),
        (One(), ()),
        (Two(), X),
        (Two(), {"x": X}),
        (Two(), (X, MASK, X)),
        (Optional(), {"mask": MASK}),
        (KeywordOnly(), X),
    ],
)
def test_a_batch_that_does_not_fit_the_signature_is_named_with_the_remedy(model, batch):
    good = {"x": X, "mask": MASK, "bias": X}
    names = [node.name for node in fx.symbolic_trace(model).graph.nodes if node.op == "placeholder"]
    fitting = {name: good[name] for name in names if name in good}
    with pytest.raises(InvalidBatchError, match=r"batch 1: .*does not fit the model's inputs.*inputs=") as caught:
        bind(model, [fitting, batch])
    assert all(name in str(caught.value) for name in names)
    assert caught.value.subject == "batch 1"


@pytest.mark.parametrize("batches", [[], (), iter([]), DataLoader(TensorDataset(torch.zeros(0, 1)))])
def test_no_batches_are_refused(batches):
    with pytest.raises(InvalidBatchError, match=r"^data: .*Pass a list or a DataLoader"):
        bind(One(), batches)


def test_a_consumed_iterator_is_refused():
    batches = iter([X])
    bind(One(), batches)
    with pytest.raises(InvalidBatchError, match=r"^data: .*iterator"):
        bind(One(), batches)


@pytest.mark.parametrize("batches", [X, {"x": X}])
def test_one_batch_is_not_a_sequence_of_batches(batches):
    with pytest.raises(InvalidBatchError, match=r"not a sequence of batches. Pass \[batch\] instead"):
        bind(One(), batches)


@pytest.mark.parametrize("batches", [3, None])
def test_what_cannot_be_iterated_is_refused(batches):
    with pytest.raises(InvalidBatchError, match=r"not iterable. Pass a DataLoader"):
        bind(One(), batches)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_inputs_of_another_precision_are_refused(dtype):
    with pytest.raises(InvalidBatchError, match=rf"batch 1: input 'mask' is {dtype}. Pass float32"):
        bind(Two(), [(X, X), (X, X.to(dtype))])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_inputs_that_are_not_finite_are_refused(value):
    bad = X.clone()
    bad[1, 2] = value
    with pytest.raises(InvalidBatchError, match=r"batch 2: input .x. holds NaN or infinity\. Remove the sample"):
        bind(One(), [X, X, bad])


@pytest.mark.parametrize("batch", [torch.zeros(0, 3), 3.0, None])
def test_a_batch_without_data_is_refused(batch):
    with pytest.raises(InvalidBatchError, match="batch 1: holds no data"):
        bind(One(), [X, (batch,)])


def sampling(sizes: list[int], holdout: float = 0.0, max_columns: int = 10**9, seed: int = 0) -> Sampling:
    return Sampling.of([[torch.zeros(size, 1)] for size in sizes], holdout, max_columns, seed)


def image(samples: int, height: int, width: int) -> Patches:
    op = LinearOp("conv", (1, 1), ((0, 0), (0, 0)), (1, 1))
    return op.patches(torch.zeros(samples, 1, height, width), torch.Size((1, 1, 1, 1)))


def tokens(leading: int, length: int) -> Patches:
    return LinearOp("linear").patches(torch.zeros(leading, length, 2), torch.Size((3, 2)))


def chosen(found: Sampling, positions: int, sites: int = 1, fold: int = 1) -> list[tuple[int, int]]:
    """`(entry, position)` of every chosen column, entries numbered through all batches."""
    columns = []
    for batch, size in enumerate(found.size):
        index, position = found.columns(batch, tokens(size * fold, positions), sites)
        columns += [(found.first[batch] * fold + int(i), int(p)) for i, p in zip(index, position, strict=True)]
    return columns


splits = st.lists(st.integers(1, 7), min_size=1, max_size=6)


@given(splits, st.integers(1, 20), st.integers(0, 1000))
def test_every_column_is_taken_once_when_all_fit(sizes, positions, seed):
    found = chosen(sampling(sizes, seed=seed), positions)
    assert sorted(found) == [(i, p) for i in range(sum(sizes)) for p in range(positions)]


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 6))
def test_positions_of_images_are_numbered_through_rows(samples, height, width):
    index, position = sampling([samples]).columns(0, image(samples, height, width), 1)
    expected = [(i, p) for i in range(samples) for p in range(height * width)]
    assert sorted(zip(index.tolist(), position.tolist(), strict=True)) == expected


# all that `check_seed` takes
seeds = st.integers(-(2**62), 2**62)


@given(splits, st.integers(1, 40), st.integers(1, 100), st.integers(1, 3), st.integers(1, 4), seeds)
def test_the_cap_is_kept_and_used(sizes, positions, cap, sites, fold, seed):
    samples = sum(sizes)
    found = chosen(sampling(sizes, max_columns=cap, seed=seed), positions, sites, fold)
    assert len(found) == len(set(found))
    assert all(0 <= position < positions for _, position in found)
    # rows of two weights: four columns for each are taken whatever the cap
    budget = min(max(cap, 4 * 2) / sites, samples * fold * positions)
    assert abs(len(found) - budget) <= 1


@given(splits, splits, st.integers(1, 40), st.integers(1, 100), st.integers(0, 1000), st.integers(1, 3))
def test_how_samples_are_batched_does_not_matter(sizes, other, positions, cap, seed, fold):
    total = sum(sizes)
    regrouped = [size for size in other if size < total]
    while sum(regrouped) > total:
        regrouped.pop()
    regrouped += [total - sum(regrouped)] * (sum(regrouped) < total)
    first, second = (
        chosen(sampling(split, max_columns=cap, seed=seed), positions, fold=fold) for split in (sizes, regrouped)
    )
    assert first == second


@given(st.integers(4, 60), st.integers(1, 30), st.integers(0, 1000))
def test_samples_share_the_columns_evenly(samples, positions, seed):
    cap = max(samples, samples * positions // 2)
    found = chosen(sampling([samples], max_columns=cap, seed=seed), positions)
    counts = torch.tensor([entry for entry, _ in found]).bincount(minlength=samples)
    assert counts.max() - counts.min() <= 1
    assert counts.min() >= 1


def test_positions_are_covered_evenly():
    found = chosen(sampling([400], max_columns=1200), positions=64)
    counts = torch.tensor([position for _, position in found]).bincount(minlength=64).double()
    assert counts.min() >= 0.7 * 1200 / 64
    assert counts.max() <= 1.3 * 1200 / 64


def test_the_seed_moves_the_positions():
    first, second = (chosen(sampling([20], max_columns=60, seed=seed), positions=64) for seed in (0, 1))
    assert first != second
    assert [entry for entry, _ in first] == [entry for entry, _ in second]


@pytest.mark.parametrize("seed", [0, -1, 2**61 + 12345])
def test_samples_have_other_positions_than_their_neighbours_whatever_the_seed(seed):
    found = chosen(sampling([20], max_columns=60, seed=seed), positions=64)
    by_sample = {entry: frozenset(p for e, p in found if e == entry) for entry, _ in found}
    assert len(set(by_sample.values())) > 10


@given(splits, st.floats(0.01, 0.5), st.integers(1, 5))
def test_the_share_of_samples_held_out(sizes, holdout, fold):
    found, total = sampling(sizes, holdout), sum(sizes)
    held = torch.cat([found.held_out(batch, size * fold) for batch, size in enumerate(sizes)])
    assert held.dtype == torch.bool
    per_sample = held.reshape(total, fold)
    assert (per_sample.all(1) == per_sample.any(1)).all()  # a sample is held out as a whole
    share = per_sample[:, 0].double().mean()
    if total == 1:
        assert share == 0
    else:
        assert 0 < share < 1
        assert abs(share - 1 / float(found.every)) <= 1 / total


@given(splits, st.integers(2, 60))
def test_one_in_so_many_is_one_of_each_run_of_them(sizes, run):
    found, total = sampling(sizes, 1 / run), sum(sizes)
    held = torch.cat([found.held_out(batch, size) for batch, size in enumerate(sizes)])
    if total > 1:
        assert found.every == min(run, total)
        chosen = [int(((i + 1) * 0.6180339887498949 % 1) * found.every) for i in range(-(-total // found.every))]
        assert held.nonzero().flatten().tolist() == [
            at for i, one in enumerate(chosen) if (at := i * found.every + one) < total
        ]


@pytest.mark.parametrize("holdout", [0.4, 0.3, 0.15, 0.45, 0.22, 0.01])
@pytest.mark.parametrize("total", [2, 5, 16, 100, 997])
def test_what_was_asked_for_is_held_out_to_the_nearest_sample(holdout, total):
    held = sampling([total], holdout).held_out(0, total)
    count = int(held.sum())
    assert count == max(1, round(holdout * total))
    # evenly: any run of samples has its share, but for one at each end
    counted = torch.cat([torch.zeros(1, dtype=torch.long), held.cumsum(0)])
    expected = torch.arange(total + 1) * count / total
    assert (counted - expected).abs().max() <= 1


def test_numbering_many_batches_is_linear():
    start = time.perf_counter()
    found = Sampling.of([[X]] * 50_000, 0.125, 100, 0)
    assert found.first[-1] == 2 * 49_999
    assert time.perf_counter() - start < 5


@given(splits, splits)
def test_which_samples_are_held_out_does_not_depend_on_batches(sizes, other):
    total = min(sum(sizes), sum(other))
    masks = []
    for split in (sizes, other):
        found = Sampling.of([[torch.zeros(size, 1)] for size in split], 0.25, 100, 0)
        masks.append(torch.cat([found.held_out(batch, size) for batch, size in enumerate(split)])[:total])
    if sum(sizes) >= 4 and sum(other) >= 4:
        assert torch.equal(*masks)


def test_nothing_is_held_out_unless_asked():
    assert not sampling([5, 3]).held_out(1, 3).any()


@pytest.mark.parametrize("holdout", [0.125, 0.25])
@pytest.mark.parametrize(
    ("positions", "share"), [(1, 0.125), (4, 0.25), (1, 0.5), (1, 0.6), (4, 0.9), (1, 1.0), (4, 1.5), (16, 2.25)]
)
def test_held_out_samples_get_their_share_of_the_columns(positions, share, holdout):
    # `share` columns per sample on average: which samples they fall on must not follow which are held out
    samples = 960
    found = sampling([samples], holdout, round(samples * share))
    held = found.held_out(0, samples)
    entries = torch.tensor([entry for entry, _ in chosen(found, positions)])
    assert 0.7 * holdout < held[entries].double().mean() < 1.3 * holdout


def test_samples_are_numbered_through_batches():
    found = sampling([3, 1, 4])
    assert found.first == (0, 3, 4)
    assert found.total == 8


def test_the_leading_axis_of_the_first_tensor_counts_the_samples():
    bound = [[2.0, torch.zeros(5, 2), torch.zeros(7)], [1.0, torch.tensor(3.0), None]]
    assert Sampling.of(bound, 0.0, 10, 0).size == (5, 1)


SAMPLES = 512
NUMBERS = torch.arange(float(SAMPLES)).reshape(SAMPLES, 1).repeat(1, 2)


def cut(data: Tensor, sizes: int | Iterable[int]) -> list[Tensor]:
    """Samples in batches of these sizes; what is left of them is the last."""
    if isinstance(sizes, int):
        return list(data.split(sizes))
    edges = sorted({min(edge, len(data)) for edge in itertools.accumulate(sizes)} - {0, len(data)})
    return list(torch.tensor_split(data, edges))


def numbers(found: list[list[Any]]) -> list[list[int]]:
    """Which samples of `NUMBERS` are in each batch."""
    return [arguments[0][:, 0].long().tolist() for arguments in found]


def numbered(sizes: int | Iterable[int]) -> list[list[Any]]:
    return [[batch] for batch in cut(NUMBERS, sizes)]


uneven = st.lists(st.integers(1, 90), max_size=20)
takes = st.tuples(st.integers(1, 300), st.integers(1, 64)).filter(lambda pair: pair[1] <= pair[0])


@given(uneven, takes, st.floats(0, 1, exclude_max=True))
def test_samples_taken_are_evenly_spread(sizes, take, offset):
    wanted, size = take
    found = numbers(spread(numbered(sizes), wanted, size, offset))
    assert {len(batch) for batch in found} == {size}
    taken = sorted(itertools.chain.from_iterable(found))
    # as many as wanted, in whole batches
    assert len(taken) - size < wanted <= len(taken) or len(taken) > SAMPLES - size
    step = SAMPLES / len(taken)
    assert taken == [int((i + offset) * SAMPLES / len(taken)) for i in range(len(taken))]
    assert all(abs(number - (i + offset) * step) <= 1 for i, number in enumerate(taken))
    # each batch is spread over all of them itself
    for batch in found:
        assert batch[0] < step * len(found)
        assert batch[-1] >= SAMPLES - step * len(found) - 1
        assert all(abs(b - a - step * len(found)) <= 1 for a, b in itertools.pairwise(batch))


@given(uneven, takes, st.sampled_from([0.0, 0.25, 0.5, 0.75]))
def test_how_samples_come_in_batches_does_not_matter(sizes, take, offset):
    wanted, size = take
    expected = spread(numbered(SAMPLES), wanted, size, offset)
    for split in (4, 32, 256, sizes):
        found = spread(numbered(split), wanted, size, offset)
        assert len(found) == len(expected)
        assert all(torch.equal(a[0], b[0]) for a, b in zip(found, expected, strict=True))


@given(st.integers(1, 200), st.integers(1, 64), st.floats(0, 0.45), uneven)
def test_two_offsets_share_no_sample(wanted, size, offset, sizes):
    size = min(size, wanted)
    first, second = (numbers(spread(numbered(sizes), wanted, size, start)) for start in (offset, offset + 0.5))
    first, second = (set(itertools.chain.from_iterable(one)) for one in (first, second))
    assert len(first) == len(second)
    if 2 * len(first) <= SAMPLES:
        assert not first & second


def test_no_more_samples_than_wanted_are_left_as_they_are():
    arguments = numbered([100, 12])
    assert spread(arguments, SAMPLES, 32) is arguments
    assert spread(arguments, SAMPLES + 1, 32) is arguments


def test_batches_of_one_are_put_together():
    found = spread(numbered(1), 32, 8)
    assert [arguments[0].shape for arguments in found] == [(8, 2)] * 4
    assert sorted(itertools.chain.from_iterable(numbers(found))) == list(range(8, SAMPLES, 16))


def test_one_batch_is_taken_apart():
    assert numbers(spread(numbered(SAMPLES), 4, 2)) == [[64, 320], [192, 448]]


@pytest.mark.parametrize("split", [4, 32, 256, [3, 200, 70]])
def test_inputs_stay_together_and_constants_stay(split):
    """A dict, a list and a tuple with samples; a number, none, a name, a table and a scale that all batches share."""
    table, scale = torch.randn(5, 3), torch.tensor(3.0)
    arguments = [
        [{"image": image, "k": 2}, [image + 1, (image[:, 0] > 7, None)], "mean", table.clone(), scale, image.long()]
        for image in cut(NUMBERS, split)
    ]
    found = spread(arguments, 96, 32)
    assert numbers([[arguments[0]["image"]] for arguments in found]) == numbers(spread(numbered(split), 96, 32))
    for inputs, (one, mask), *rest, numbers_again in found:
        image = inputs["image"]
        assert inputs.keys() == {"image", "k"}
        assert inputs["k"] == 2
        assert torch.equal(one, image + 1)
        assert torch.equal(mask[0], image[:, 0] > 7)
        assert mask[1] is None
        assert rest[0] == "mean"
        assert torch.equal(rest[1], table)
        assert torch.equal(rest[2], scale)
        assert torch.equal(numbers_again, image.long())
        assert numbers_again.dtype == torch.int64


@pytest.mark.parametrize("split", [4, 32, 256, [3, 200, 70]])
def test_masks_of_ones_go_with_their_samples(split):
    found = spread([[x, torch.ones(len(x), 3)] for x in cut(NUMBERS, split)], 96, 32)
    assert [arguments[0].shape for arguments in found] == [(32, 2)] * 3
    assert all(torch.equal(arguments[1], torch.ones(32, 3)) for arguments in found)


def test_a_batch_given_many_times_is_one_of_samples():
    x = NUMBERS[:8]
    found = spread([[x, x + 1] for _ in range(8)], 16, 4)
    assert all(torch.equal(arguments[0] + 1, arguments[1]) for arguments in found)
    found = spread([[x] for _ in range(8)], 16, 4)
    assert numbers(found) == [[2] * 4, [6] * 4] * 2


def by_tokens(*lengths: int) -> list[list[Any]]:
    """Batches of 4 samples of these numbers of tokens."""
    return [[torch.full((4, length), float(i))] for i, length in enumerate(lengths)]


# what cannot be put together, by batch
APART = {
    "other shapes": lambda i: torch.zeros(4, 3 + i % 3),
    "another number": float,
    "a shared table as long as a batch": lambda i: torch.arange(4.0),
    "a table of each batch": lambda i: torch.full((7, 2), float(i)),
    "a scale of each batch": lambda i: torch.tensor(float(i)),
    "a number or a tensor": lambda i: torch.ones(4) if i % 2 else 2.0,
    "a tensor or nothing": lambda i: None if i % 2 else torch.ones(4),
    "another type": lambda i: torch.full((4,), i, dtype=torch.int64 if i % 2 else torch.float32),
    "another structure": lambda i: [torch.full((4,), float(i))] * (1 + i % 2),
    "an array": lambda i: np.ones(3),
}


@pytest.mark.parametrize("other", APART)
def test_batches_whose_samples_cannot_be_put_together_are_taken_whole(other):
    arguments = [[x, APART[other](i)] for i, x in enumerate(cut(NUMBERS, 4))]
    # a tenth of the samples
    found = spread(arguments, 51, 17)
    positions = [next(i for i, one in enumerate(arguments) if one is arguments_found) for arguments_found in found]
    assert positions == [int((i + 0.5) * len(arguments) / 12) for i in range(12)]


def test_a_scale_of_one_entry_is_not_taken_for_samples():
    """Which it might be, of batches of one."""
    found = spread([[x, torch.full((1,), 3.0)] for x in cut(NUMBERS, 1)], 64, 32)
    assert all(len(arguments[0]) == len(arguments[1]) == 1 for arguments in found)
    assert numbers(found) == [[number] for number in range(4, SAMPLES, 8)]


@given(st.lists(st.integers(1, 9), min_size=2, max_size=30), st.integers(1, 60), st.floats(0, 0.45))
def test_whole_batches_are_spread_and_two_offsets_share_none(lengths, wanted, offset):
    arguments = by_tokens(*lengths, 10)
    total = 4 * len(arguments)
    found = [spread(arguments, wanted, min(wanted, 4), start) for start in (offset, offset + 0.5)]
    if wanted >= total:
        assert all(one is arguments for one in found)
        return
    first, second = ([int(one[0][0, 0]) for one in part] for part in found)
    assert len(first) == len(second) == max(1, wanted // 4)
    assert all(
        abs(number - i * len(arguments) / len(first)) <= len(arguments) / len(first) for i, number in enumerate(first)
    )
    if 2 * len(first) <= len(arguments):
        assert not set(first) & set(second)


def test_what_is_spread_is_left_as_it_is():
    arguments = [[x, x.long()] for x in cut(NUMBERS, 16)]
    before = [[value.clone() for value in of_batch] for of_batch in arguments]
    spread(arguments, 64, 32)
    assert all(
        torch.equal(a, b) for one, other in zip(arguments, before, strict=True) for a, b in zip(one, other, strict=True)
    )
