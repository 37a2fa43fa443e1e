"""The report as the steps of a pass build it: what a layer says of itself once it is learned again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from adaround_plugin.hosts.base import Skipped, WeightedNode
from adaround_plugin.learning.layer import Recipe
from adaround_plugin.learning.progress import Progress
from adaround_plugin.learning.report_builder import ReportBuilder
from adaround_plugin.report import BlockReport, ClippedActivation, LayerReport, RecipeTrial
from adaround_plugin.rounding.grid import GridSpec
from adaround_plugin.rounding.linear_op import LinearOp
from adaround_plugin.rounding.result import LayerRounding

GRID = GridSpec(-4, 3, 0, True, torch.qint8).at(torch.tensor([0.5, 1.0]), torch.zeros(2))
# the first row has a weight out of the grid, the others round to nearest as they stand
WEIGHT = torch.tensor([[0.4, -1.1, 9.0, 0.0], [1.2, 2.9, -3.1, 0.6]])
CLIPPED = ClippedActivation("x", -1.0, 1.0, -4.0, 2.0, 0.5)
JUDGED = {"nearest_error": 0.5, "learned_error": 0.6, "nearest_holdout": 0.3, "learned_holdout": 0.4}


def node(name: str = "head", **values: object) -> WeightedNode:
    """A linear layer that no host knows."""
    given = {
        "name": name,
        "names": (name, f"{name}.tied"),
        "kind": "Linear",
        "op": LinearOp("linear"),
        "weight": WEIGHT,
        "grid": GRID,
        "sites": (),
        "bias": "present",
        "keeps_scale": False,
        "set_quantized": lambda module, rounding: None,
    }
    return WeightedNode(**{**given, **values})


def nearest(**values: object) -> LayerRounding:
    """A layer that keeps nearest because it is better on held-out samples."""
    return LayerRounding(GRID, GRID.nearest(WEIGHT), **{**JUDGED, **values})


def moved(integers: Tensor, *places: tuple[int, int]) -> Tensor:
    """The same integers, but one up at some places."""
    integers = integers.clone()
    for place in places:
        integers[place] += 1
    return integers


@pytest.fixture
def builder() -> ReportBuilder:
    return ReportBuilder(Progress(shown=False))


def layers(builder: ReportBuilder) -> list[LayerReport]:
    report = builder.build(
        method="m",
        solver="s",
        recipe="r",
        skipped=[],
        output_error=0.0,
        nearest_output_error=0.0,
        seconds={},
        settings={},
        versions={},
        weights={},
        recalled=0,
        memory={},
    )
    return report.layers


def only(builder: ReportBuilder) -> LayerReport:
    (layer,) = layers(builder)
    return layer


def decide(builder: ReportBuilder, rounding: LayerRounding, *notes: str, columns: int = 10) -> WeightedNode:
    """A layer decided so; the node."""
    of = node()
    builder.layer(of, rounding, notes, columns, 0.25)
    return of


def test_a_layer_is_told_as_it_was_decided(builder):
    rounding = replace(nearest(learned=True), integers=moved(GRID.nearest(WEIGHT), (0, 0), (1, 1)))
    decide(builder, rounding, "one thing", "another")
    found = only(builder)
    assert (found.name, found.kind, found.tied) == ("head", "Linear", ("head.tied",))
    assert (found.shape, found.bits, found.columns, found.seconds) == ((2, 4), 3, 10, 0.25)
    assert {name: getattr(found, name) for name in JUDGED} == JUDGED
    assert (found.learned, found.flipped, found.clipped) == (True, 2 / 8, 1 / 8)
    assert found.note == "one thing; another"
    assert (found.least_scale, found.median_scale, found.greatest_scale) == (0.5, 0.5, 1.0)


@pytest.mark.parametrize(("held", "word"), [(True, "held-out"), (False, "learning")])
def test_a_layer_that_keeps_nearest_says_on_which_samples_it_is_better(builder, held, word):
    rounding = nearest() if held else nearest(nearest_holdout=None, learned_holdout=None)
    decide(builder, rounding, "one thing")
    found = only(builder)
    assert not found.learned
    assert found.flipped == 0
    assert found.note.startswith("one thing; nearest kept")
    assert word in found.note


def test_a_layer_that_no_sample_reached_was_not_judged(builder):
    decide(builder, nearest(), "no learning sample reached this layer", columns=0)
    assert only(builder).note == "no learning sample reached this layer"


def test_what_is_learned_again_no_longer_keeps_nearest(builder):
    before = nearest()
    of = decide(builder, before, "one thing")
    assert "nearest kept" in only(builder).note
    integers = moved(before.integers, (0, 1))
    builder.relearned(of, before, replace(before, integers=integers, learned=True))
    found = only(builder)
    assert found.learned
    assert found.note == "one thing"
    assert found.flipped == 1 / 8
    # errors are those of when it was decided
    assert {name: getattr(found, name) for name in JUDGED} == JUDGED


def test_notes_are_never_parsed(builder):
    before = nearest()
    text = "nearest kept: it is better on the held-out samples"
    of = decide(builder, before, text)
    builder.relearned(of, before, replace(before, integers=moved(before.integers, (0, 0)), learned=True))
    # what a step has said stays, whatever it reads like
    assert only(builder).note == text


def test_a_layer_whose_integers_stay_nearest_goes_on_saying_so(builder):
    before = nearest()
    of = decide(builder, before)
    grid = GRID.at(2 * GRID.scale, GRID.zero_point)
    builder.relearned(of, before, replace(before, grid=grid, bias_correction=torch.ones(2)))
    found = only(builder)
    assert not found.learned
    assert "nearest kept" in found.note
    assert found.bias == "corrected"
    # on the new scale other integers would be nearest: none counts as flipped that was not chosen
    assert found.flipped == 0


def test_a_learned_scale_alone_flips_nothing_and_moved_integers_count_on_the_new_one(builder):
    chosen = replace(nearest(learned=True), integers=moved(GRID.nearest(WEIGHT), (0, 0)))
    of = decide(builder, chosen)
    grid = GRID.at(1.1 * GRID.scale, GRID.zero_point)
    scaled = replace(chosen, grid=grid)
    builder.relearned(of, chosen, scaled)
    assert only(builder).flipped == 1 / 8
    both = replace(scaled, integers=moved(grid.nearest(WEIGHT), (0, 0), (0, 1), (1, 3)))
    builder.relearned(of, scaled, both)
    assert only(builder).flipped == 3 / 8


def test_what_was_never_decided_cannot_be_learned_again(builder):
    before = nearest()
    decide(builder, before)
    builder.relearned(node("other"), before, replace(before, learned=True))
    assert [layer.name for layer in layers(builder)] == ["head"]
    assert not only(builder).learned


@pytest.mark.parametrize(("bias", "expected"), [("present", "corrected"), ("addable", "added")])
def test_what_became_of_the_bias(builder, bias, expected):
    of = node(bias=bias)
    builder.layer(of, nearest(learned=True), [], 10, 0.0)
    assert only(builder).bias == "kept"
    builder.relearned(of, nearest(), nearest(learned=True, bias_correction=torch.ones(2)))
    assert only(builder).bias == expected


def test_everything_told_is_in_the_report(builder):
    builder.trial(Recipe(), 0.5)
    for name in ("a", "b"):
        builder.layer(node(name), nearest(learned=True), [], 10, 0.0)
    builder.blocks.append(BlockReport("a ... b", ("a", "b")))
    builder.finetuning = BlockReport("network", ("a", "b"))
    builder.clipped = [CLIPPED]
    report = builder.build(
        method="blocks",
        solver="Annealing",
        recipe="errors propagated",
        skipped=[Skipped("c", "Embedding", "not supported")],
        output_error=0.25,
        nearest_output_error=0.5,
        seconds={"total": 1.0},
        settings={"method": (Recipe(damping=0.5), "a", Tensor, object()), "seed": 3},
        versions={"torch": "1"},
        weights={"a": "0"},
        recalled=2,
        memory={"kept": 7},
    )
    assert (report.method, report.solver, report.recipe) == ("blocks", "Annealing", "errors propagated")
    assert [layer.name for layer in report.layers] == ["a", "b"]
    assert report.trials == [RecipeTrial(str(Recipe()), 0.5)]
    assert report.skipped == [("c", "Embedding", "not supported")]
    assert [block.name for block in report.blocks] == ["a ... b"]
    assert report.finetuning is not None
    assert report.finetuning.name == "network"
    assert (report.output_error, report.nearest_output_error, report.seconds) == (0.25, 0.5, {"total": 1.0})
    # as Python writes them, without addresses
    assert report.settings == {"method": f"({Recipe(damping=0.5)!r}, 'a', Tensor, object)", "seed": "3"}
    assert report.versions == {"torch": "1"}
    assert report.memory["kept"] == 7
    assert report.clipped == [CLIPPED]
    assert report.memory["process"] >= report.memory["process before"] > 10**7


def test_steps_are_shown_as_they_come(monkeypatch):
    shown: list[tuple[str, int, float]] = []

    class Told(Progress):
        def step(self, name: str, iteration: int, loss: float) -> None:
            shown.append((name, iteration, loss))

    tell: Callable[[int, float], None] = ReportBuilder(Told(shown=False)).steps("a block")
    tell(50, 0.5)
    tell(100, 0.25)
    assert shown == [("a block", 50, 0.5), ("a block", 100, 0.25)]


def test_a_layer_that_is_taken_back_is_described_as_it_is_then(builder):
    wide = GRID.at(0.1 * GRID.scale, GRID.zero_point)
    chosen = replace(nearest(learned=True), grid=wide, integers=moved(wide.nearest(WEIGHT), (0, 0)))
    of = decide(builder, chosen)
    assert only(builder).clipped > 1 / 8
    assert only(builder).flipped == 1 / 8
    builder.relearned(of, chosen, nearest(), "the network's output is better so")
    found = only(builder)
    assert (found.clipped, found.flipped) == (1 / 8, 0)
