"""Tokens that pad sequences stay out of all that is learned and judged, in both hosts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.ao.quantization.quantize_fx import prepare_fx
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

from adaround_plugin import (
    BlockWise,
    Finetune,
    InvalidBatchError,
    InvalidOptionError,
    LayerWise,
    adaround,
    analyze,
    get_adaround_qconfig_mapping,
    get_report,
    get_weight_only_backend_config,
)
from adaround_plugin.hosts.learned import learned_weights
from adaround_plugin.hosts.pt2e import AdaRoundWeightOnlyQuantizer
from adaround_plugin.learning.output_error import OutputTally
from adaround_plugin.regions.calibration import Sampling
from adaround_plugin.regions.masks import counted, without_padding
from adaround_plugin.rounding.linear_op import LinearOp
from integration_tests.models import QUICK, RECIPE

WIDTH, TOKENS = 8, 10
Batch = dict[str, Tensor]


class Tokens(nn.Module):
    """Each token by itself, so that those that pad cannot influence others; or, if folded, with one axis for all."""

    def __init__(self, folded: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(WIDTH, 12), nn.Linear(12, 6)
        self.folded = folded

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x.flatten(0, 1) if self.folded else x)))


class Pooled(Tokens):
    """The mean of the tokens that count, and a layer that sees no tokens any more."""

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = torch.relu(self.first(x)) * attention_mask.unsqueeze(-1)
        return self.second(hidden.sum(1) / attention_mask.sum(1, keepdim=True))


def batches(padding: float, size: int = 8) -> list[Batch]:
    """Correlated tokens, sequences of 3 to `TOKENS` of them, and `padding` times as large ones behind."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(WIDTH, WIDTH, generator=generator)
    found = []
    for _ in range(48 // size):
        x = torch.randn(size, TOKENS, WIDTH, generator=generator) @ mixing
        lengths = torch.randint(3, TOKENS + 1, (size, 1), generator=generator)
        mask = torch.arange(TOKENS) < lengths
        x = torch.where(mask.unsqueeze(-1), x, padding * torch.randn(x.shape, generator=generator) + padding)
        found.append({"x": x, "attention_mask": mask.long()})
    return found


def prepared(host: str, model: nn.Module, batch: Batch) -> fx.GraphModule:
    model = copy.deepcopy(model).eval()
    if host == "fx":
        mapping = get_adaround_qconfig_mapping(weight_bits=3, activation_bits=None)
        example = (batch["x"], batch["attention_mask"])
        return prepare_fx(model, mapping, example, backend_config=get_weight_only_backend_config())
    sizes = {0: torch.export.Dim("samples", min=1, max=64), 1: torch.export.Dim("tokens", min=2, max=TOKENS)}
    shapes = dict.fromkeys(batch, sizes)
    program = torch.export.export(model, (), kwargs=batch, dynamic_shapes=shapes, strict=True).module()
    made = prepare_pt2e(program, AdaRoundWeightOnlyQuantizer(weight_bits=3))
    with torch.no_grad():
        made(**batch)
    assert isinstance(made, fx.GraphModule)
    return made


def assert_same(one: fx.GraphModule, other: fx.GraphModule) -> None:
    """The same integers, scales and biases, and the same errors."""
    found, expected = learned_weights(one), learned_weights(other)
    assert len(found) == 2
    for name, (integers, grid) in found.items():
        assert torch.equal(integers, expected[name][0])
        assert torch.equal(grid.scale, expected[name][1].scale)
    reports = get_report(one), get_report(other)
    assert reports[0].output_error == reports[1].output_error
    for ours, theirs in zip(reports[0].layers, reports[1].layers, strict=True):
        assert (ours.learned_error, ours.learned_holdout) == (theirs.learned_error, theirs.learned_holdout)


METHODS: dict[str, dict[str, Any]] = {
    "trials": {},
    "fisher": {"method": LayerWise(**{**RECIPE, "column_weighting": "fisher", "output_hessian": True})},
    "inverse_norm": {"method": LayerWise(**{**RECIPE, "column_weighting": "inverse_norm"})},
    "few columns": {"method": LayerWise(**RECIPE, max_columns=40)},
    "blocks": {"method": BlockWise(layers=LayerWise(**{**RECIPE, "correct_bias": False}), iterations=10)},
    "finetuned": {"method": QUICK, "finetune": Finetune(iterations=5)},
}


@pytest.mark.parametrize("host", ["fx", "pt2e"])
@pytest.mark.parametrize("method", METHODS)
def test_what_stands_in_padding_changes_nothing(host: str, method: str) -> None:
    few, many = batches(0.0), batches(30.0)
    model = prepared(host, Tokens(), few[0])
    options: dict[str, Any] = {"progress": False, "token_mask": "attention_mask", **METHODS[method]}
    assert_same(adaround(model, few, **options), adaround(model, many, **options))


def test_without_the_mask_padding_does_change_what_is_learned() -> None:
    few, many = batches(0.0), batches(30.0)
    model = prepared("fx", Tokens(), few[0])
    one, other = (adaround(model, data, LayerWise(**RECIPE), progress=False) for data in (few, many))
    found, expected = learned_weights(one), learned_weights(other)
    assert any(not torch.equal(found[name][0], expected[name][0]) for name in found)


@pytest.mark.parametrize("model", [Tokens(folded=True), Pooled()], ids=["folded", "pooled"])
def test_axes_of_tokens_are_found_where_there_are_any(model: nn.Module) -> None:
    few, many = batches(0.0), batches(30.0)
    made = prepared("fx", model, few[0])
    options: dict[str, Any] = {"progress": False, "token_mask": "attention_mask"}
    found = adaround(made, few, **options)
    assert_same(found, adaround(made, many, **options))
    report = get_report(found)
    assert report.output_error < report.nearest_output_error


def test_padded_sequences_give_what_they_give_one_by_one() -> None:
    padded = batches(30.0, size=1)
    alone = [
        {name: value[:, : int(batch["attention_mask"].sum())] for name, value in batch.items()} for batch in padded
    ]
    model = prepared("pt2e", Tokens(), batches(0.0)[0])
    method = LayerWise(**RECIPE)
    masked = adaround(model, padded, method, token_mask="attention_mask", progress=False)
    cut = adaround(model, alone, method, progress=False)
    found, expected = learned_weights(masked), learned_weights(cut)
    for name, (integers, _) in found.items():
        assert torch.equal(integers, expected[name][0])
    assert get_report(masked).output_error == pytest.approx(get_report(cut).output_error, rel=1e-5)


def test_blocks_behind_the_tokens_are_learned_from_sequences_of_several_lengths() -> None:
    """Their inputs have no tokens any more, and are put together; masks cannot be."""
    lengths = (10, 7) * 3
    data = [
        {name: value[:, :length] for name, value in batch.items()}
        for batch, length in zip(batches(0.0), lengths, strict=True)
    ]
    method = BlockWise(layers=LayerWise(**RECIPE), blocks=["second"], iterations=10)
    found = adaround(prepared("pt2e", Pooled(), data[0]), data, method, token_mask="attention_mask", progress=False)
    assert [block.iterations for block in get_report(found).blocks] == [10]


def test_a_sample_without_a_token_may_be_the_one_that_is_held_out() -> None:
    model, data = prepared("fx", Tokens(), batches(0.0)[0]), batches(0.0, size=1)[:4]
    for number in range(len(data)):
        emptied = [
            {**batch, "attention_mask": batch["attention_mask"] * (which != number)} for which, batch in enumerate(data)
        ]
        report = get_report(adaround(model, emptied, QUICK, token_mask="attention_mask", progress=False))
        assert report.output_error <= report.nearest_output_error


def test_analyze_leaves_padding_out() -> None:
    few, many = batches(0.0), batches(30.0)
    model = prepared("fx", Tokens(), few[0])
    options: dict[str, Any] = {"bits": [2, 4], "token_mask": "attention_mask", "progress": False}
    one, other = analyze(model, few, **options), analyze(model, many, **options)
    for ours, theirs in zip(one.layers, other.layers, strict=True):
        assert ours.widths == theirs.widths
    assert one.layers[0].widths != analyze(model, many, bits=[2, 4], progress=False).layers[0].widths


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda mask: mask.unsqueeze(1), r"shape \(8, 1, 10\), with 8 samples"),
        (lambda mask: mask * 2, "other entries than 0 and 1"),
        (lambda mask: mask * 0, "leaves no token"),
    ],
    ids=["shape", "entries", "nothing"],
)
def test_masks_that_are_none_are_refused(change: Any, problem: str) -> None:
    data = batches(0.0)
    model = prepared("fx", Tokens(), data[0])
    wrong = [{"x": batch["x"], "attention_mask": change(batch["attention_mask"])} for batch in data]
    with pytest.raises(InvalidBatchError, match=problem):
        adaround(model, wrong, token_mask="attention_mask", progress=False)


@pytest.mark.parametrize("name", ["mask", 3])
def test_a_mask_is_one_of_the_inputs(name: Any) -> None:
    data = batches(0.0)
    model = prepared("fx", Tokens(), data[0])
    with pytest.raises(InvalidOptionError, match=r"token_mask.*\['x', 'attention_mask'\]"):
        adaround(model, data, token_mask=name, progress=False)


def test_an_output_error_is_that_of_the_tokens_that_count() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    arguments = [[torch.zeros(2, 3), mask]]
    exact = torch.tensor([[[1.0], [3.0], [9.0]], [[2.0], [7.0], [torch.nan]]])
    tally = OutputTally(Sampling.of(arguments, 0, 1, 0, mask=1))
    tally.add(0, [exact], [exact + torch.tensor([[[1.0], [2.0], [5.0]], [[3.0], [4.0], [5.0]]])])
    found = tally.finish()
    # the three tokens that count are 1, 3 and 2: of variance 1
    torch.testing.assert_close(found.samples, torch.tensor([2.5, 9.0], dtype=torch.float64))


def test_few_columns_are_taken_from_tokens_that_count() -> None:
    mask = torch.arange(50) < torch.tensor([[5], [10]])
    sampling = Sampling.of([[torch.zeros(2, 50), mask]], 0, 12, 0, per_weight=1, mask=1)
    patches = LinearOp("linear").patches(torch.zeros(2, 50, 4), torch.Size([3, 4]))
    index, position = sampling.columns(0, patches, 1)
    assert bool(mask[index, position].all())
    assert 8 <= len(index) <= 15


def test_a_mask_covers_the_leading_axes_that_it_has() -> None:
    mask = torch.tensor([[True, False], [False, True], [True, True]])
    assert counted(mask, (3, 2, 7)) is mask
    folded = counted(mask, (6, 7))
    assert folded is not None
    assert folded.tolist() == [True, False, False, True, True, True]
    assert counted(mask, (3, 7)) is None
    value = torch.full((3, 2, 2), torch.nan)
    assert torch.isnan(without_padding(value, mask)).sum() == 8
