"""The command that reruns the paper's tables: its machinery on little data, its verdicts, and that it goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from integration_tests.benchmarks import paper, scenes, segmenter
from integration_tests.benchmarks.paper_cells import BITS, Bench, Cell
from integration_tests.benchmarks.paper_figures import TABLES, Claim, Spot
from integration_tests.benchmarks.paper_methods import METHODS, Budget
from integration_tests.benchmarks.paper_tables import LAYOUT, compare, direct, render, summarize

SMALL = Budget(images=16, test_images=100, iterations=20, draws=8, generations=2, hessian_images=2)


def test_every_place_of_ours_is_one_of_the_papers() -> None:
    assert list(LAYOUT) == list(TABLES)
    for name, layout in LAYOUT.items():
        table = TABLES[name]
        assert all(spot.row in table.rows and spot.column in table.columns for spot in layout)
        assert all(len(figures) == len(table.columns) for figures in table.rows.values())
        spots = [spot for claim in table.claims for spot in (claim.better, claim.worse)]
        assert all(spot.row in table.rows and spot.column in table.columns for spot in spots)
        assert all(place.cell.method in {*METHODS, "float"} for place in layout.values())


def test_the_papers_figures_bear_out_its_claims() -> None:
    for table in TABLES.values():
        for claim in table.claims:
            better, worse = table.figure(claim.better), table.figure(claim.worse)
            if better is not None and worse is not None:
                assert compare([better.mean], [worse.mean], claim.within, 0.01).verdict == "agrees", str(claim)


@pytest.mark.parametrize(
    ("better", "worse", "within", "verdict"),
    [
        ([90.0, 90.2, 90.1], [80.0, 82.0, 81.0], None, "agrees"),
        ([80.0, 82.0, 81.0], [90.0, 90.2, 90.1], None, "disagrees"),
        ([90.0, 92.0, 91.0], [90.5, 91.5, 89.9], None, "within noise"),
        ([90.0], [90.0], None, "within noise"),
        ([90.0], [89.9], None, "within noise"),
        ([90.0], [89.0], None, "agrees"),
        ([88.5], [90.0], 2.0, "agrees"),
        ([87.9], [90.0], 2.0, "within noise"),
        ([80.0], [90.0], 2.0, "disagrees"),
    ],
)
def test_a_direction_is_what_the_seeds_allow(
    better: list[float], worse: list[float], within: float | None, verdict: str
) -> None:
    direction = compare(better, worse, within, resolution=0.2)
    assert direction.verdict == verdict
    assert direction.difference == pytest.approx(sum(better) / len(better) - sum(worse) / len(worse))


def test_the_best_draw_stands_for_itself_and_what_was_not_run_says_so() -> None:
    measured = {"stochastic": [50.0, 60.0, 40.0], "nearest": [55.0]}
    lines = list(render("1", lambda cell: measured.get(cell.method, []), [False]))
    assert lines[2:] == [
        "| nearest | 52.29 | 55.00 |",
        "| ceil | 0.10 | not run |",
        "| floor | 0.10 | not run |",
        "| stochastic | 52.06 ± 5.52 | 50.00 ± 10.00 |",
        "| stochastic (best) | 63.06 | 60.00 |",
    ]
    first = TABLES["1"].claims[0]
    assert first == Claim(Spot("stochastic (best)", "first layer"), Spot("nearest", "first layer"))
    found = direct(TABLES["1"], first, lambda cell: measured.get(cell.method, []), False, 0.1)
    assert found is not None
    assert found.difference == 5
    assert found.verdict == "agrees"
    told = list(summarize(["1"], lambda cell: measured.get(cell.method, []), [False], lambda table: 0.1))
    assert told[2] == "| 1 | stochastic (best) beats nearest (first layer) | +10.77 | +5.00 ± 0.10, agrees |"
    assert told[3].endswith("| +52.19 |  |")


@pytest.mark.parametrize(
    "cell",
    [
        *(Cell(method, first=True) for method in METHODS),
        Cell("nearest", first=True, scale="minmax"),
        Cell("nearest", first=True, scale="output", per_channel=True),
        Cell("layer-wise", first=True, origin="similar"),
        Cell("layer-wise", first=True, origin="other"),
        Cell("bias correction", first=True, activations=True, equalized=True),
        Cell("nearest", "segmenter", activations=True),
    ],
    ids=str,
)
def test_a_cell_runs_on_little_data(cell: Cell) -> None:
    assert 20 < Bench(SMALL, dict(BITS)).score(cell, 0) < 100


def test_every_number_of_images_has_a_key_of_its_own() -> None:
    bench = Bench(SMALL, dict(BITS))
    keys = [bench.key(Cell("adaround", images=count), 0) for count in (None, 64, 1024)]
    assert [key["images"] for key in keys] == [SMALL.images, 64, 1024]


def test_a_second_call_measures_only_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results.jsonl"
    call = ["--tables", "1", "--granularity", "tensor", "--images", "16", "--test-images", "50"]
    call += ["--results", str(results)]
    paper.main([*call, "--stochastic", "1", "--minutes", "0"])
    assert not results.exists()
    assert "not run" in capsys.readouterr().out
    paper.main([*call, "--stochastic", "1"])
    first = results.read_text().splitlines()
    assert [json.loads(line)["key"]["method"] for line in first] == ["nearest", "ceil", "floor", "stochastic"]
    printed = capsys.readouterr().out
    assert "not run" not in printed
    assert "### Table 1: Rounding schemes" in printed
    assert "stochastic (best) beats nearest (first layer)" in printed
    paper.main([*call, "--stochastic", "2"])
    assert results.read_text().splitlines()[:4] == first
    assert [json.loads(line)["key"]["seed"] for line in results.read_text().splitlines()[4:]] == [1]


def test_a_bit_width_of_no_network_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        paper.main(["--bits", "lenet=3"])
    assert "'lenet=3' is not NETWORK=BITS" in capsys.readouterr().err


def test_scenes_are_the_same_every_time_and_their_objects_are_labelled() -> None:
    state = torch.get_rng_state()
    first, second = (scenes.load("test", 8, seed=2) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert torch.equal(state, torch.get_rng_state())
    images, labels = first
    assert images.shape == (8, 1, scenes.SCENE_SIZE, scenes.SCENE_SIZE)
    assert all(1 < len(set(scene.flatten().tolist())) <= 4 for scene in labels)
    # where nothing was drawn there is only the background's shade and the noise
    inside = [float(image.squeeze(0)[label > 0].std()) for image, label in zip(images, labels, strict=True)]
    outside = [float(image.squeeze(0)[label == 0].std()) for image, label in zip(images, labels, strict=True)]
    assert sum(inside) > 1.5 * sum(outside)


def test_mean_iou_counts_pixels() -> None:
    labels = torch.zeros(1, 2, 4, dtype=torch.int64)
    labels[0, 0] = 1
    predicted = labels.clone()
    predicted[0, 0, 0] = 0
    logits = torch.nn.functional.one_hot(predicted, scenes.CLASSES).permute(0, 3, 1, 2).float()
    # class 0: 4 of 5, class 1: 3 of 4, the others appear nowhere
    found = scenes.mean_iou(torch.nn.Identity(), logits, labels)
    assert found == pytest.approx(100 * (4 / 5 + 3 / 4) / 2)


def test_the_segmenter_finds_objects() -> None:
    assert scenes.mean_iou(segmenter.load(), *scenes.load("test", 30, seed=3)) > 50
