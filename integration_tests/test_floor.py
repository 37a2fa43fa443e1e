"""The benchmark of time and memory measures what it says, on the smallest case."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adaround_plugin import adaround, get_report
from adaround_plugin.hosts.open import open_host
from integration_tests.benchmarks import floor
from integration_tests.benchmarks.floor_models import NETWORKS, Crepe, Setting, load, set_statistics, stack, tones

TINY = replace(NETWORKS["stack"], images=12, batch=6, size=6, layers=2, width=4)


@pytest.fixture(scope="module")
def row() -> dict[str, Any]:
    return floor.measure(TINY, repeats=2)


def test_a_measurement_has_floor_total_and_what_was_learned(row: dict[str, Any]) -> None:
    assert row["floor"] == pytest.approx(row["float"] + row["quantized"] + row["products"])
    assert min(row[name] for name in ("float", "quantized", "products", "warm_up")) > 0
    assert row["total"] > sum(row["seconds"][phase] for phase in floor.PHASES)
    assert row["peak_gb"] >= row["before_gb"] > 0
    assert row["learned"] == ["0", "3", "8"]
    assert row["skipped"] == []
    assert 0 < row["output_error"] < 1
    assert Setting(**{name: row[name] for name in TINY.__dataclass_fields__}) == TINY
    assert json.loads(json.dumps(row)) == row


def test_a_row_of_the_table_has_a_cell_for_each_head(row: dict[str, Any]) -> None:
    cells = floor.cells(row, "stack")
    assert len(cells) == len(floor.HEAD)
    assert cells[:2] == ["stack", "12"]


def test_products_have_the_shapes_and_the_columns_of_the_layers() -> None:
    workload = load(replace(TINY, size=8))
    report = get_report(adaround(workload.prepared, workload.batches, "nearest", progress=False))
    found = floor.products(open_host(workload.prepared), report)
    image, sample = 12 * 8 * 8, 12
    assert found == [
        floor.Products(1, 4, 27, image),
        floor.Products(1, 4, 36, image),
        floor.Products(1, 10, 4, sample),
    ]
    assert floor.Products(groups=3, rows=2, columns=5, count=7).seconds("cpu") > 0


def test_the_command_appends_what_it_measured_and_draws_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], row: dict[str, Any]
) -> None:
    seen: list[Setting] = []

    def measured(function: Any, setting: Setting, *more: Any) -> dict[str, Any]:
        assert (function, more) == (floor.measure, ("gptq", 3, 1))
        seen.append(setting)
        return {**row, "layers": setting.layers, "width": setting.width, "images": setting.images}

    def command(*words: str) -> None:
        monkeypatch.setattr("sys.argv", ["floor", *words, "--json", str(file)])
        floor.main()

    monkeypatch.setattr(floor, "in_own_process", measured)
    file = tmp_path / "rows.jsonl"
    options = ("--method", "gptq", "--repeats", "3", "--threads", "1", "--bits", "2", "--batch", "16", "--size", "96")
    command("minilm", "resnet18", "--images", "64", *options)
    assert seen == [
        Setting("minilm", 64, batch=None, bits=2),
        Setting("resnet18", 64, batch=16, size=96, bits=2),
    ]
    seen.clear()
    command("--grow", *floor.GROWTH, *options)
    stacks = replace(NETWORKS["stack"], batch=16, size=96, bits=2)
    assert seen == [replace(stacks, **{axis: value}) for axis, values in floor.GROWTH.items() for value in values]
    assert len(file.read_text().splitlines()) == 2 + len(seen)
    printed = capsys.readouterr().out
    assert printed.count("load average") == 2
    assert "\n| 1024 | 1024 | " in printed
    command("--figure", str(tmp_path / "figure.png"))
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.parametrize("words", [["resnet19"], ["--figure", "f.png"]])
def test_a_command_that_cannot_be_done_is_refused(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["floor", *words])
    with pytest.raises(SystemExit):
        floor.main()


def test_another_process_answers() -> None:
    assert floor.in_own_process(divmod, 7, 2) == (3, 1)


def test_tones_are_normalized_frames_and_the_same_every_time() -> None:
    sound = tones(5)
    assert sound.shape == (5, 1024)
    torch.testing.assert_close(sound.mean(1), torch.zeros(5), rtol=0, atol=1e-5)
    torch.testing.assert_close(sound.std(1), torch.ones(5))
    assert torch.equal(sound, tones(5))
    with torch.no_grad():
        assert Crepe().eval()(sound).shape == (5, 360)


def test_batch_norm_statistics_are_set_and_the_network_left_in_eval_mode() -> None:
    network, batches = stack(1, 4), [torch.randn(2, 3, 8, 8) for _ in range(2)]
    set_statistics(network, batches)
    convolution, norm = network[0], network[1]
    assert isinstance(norm, nn.BatchNorm2d)
    with torch.no_grad():
        expected = torch.stack([convolution(batch).mean((0, 2, 3)) for batch in batches]).mean(0)
    torch.testing.assert_close(norm.running_mean, expected)
    assert norm.momentum == nn.BatchNorm2d(1).momentum
    assert not any(module.training for module in network.modules())
