"""A report as a table and as JSON."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace

import pytest
import torch
from torch import fx, nn

from adaround_plugin.errors import InvalidModelError, InvalidOptionError
from adaround_plugin.report import KEY, BlockReport, LayerReport, RecipeTrial, Report, get_report

LAYER = LayerReport(
    name="blocks.0.conv",
    kind="Conv2d",
    tied=(),
    shape=(4, 3, 3, 3),
    bits=3,
    nearest_error=0.0123456,
    learned_error=0.00234567,
    nearest_holdout=None,
    learned_holdout=None,
    learned=True,
    flipped=0.25,
    clipped=0.015,
    bias="corrected",
    columns=1000,
    seconds=1.25,
    note="",
)
BLOCK = BlockReport("blocks.0", ("blocks.0.conv", "head"), 0.5, 0.25, None, None, 300, 1.5, "entries weighed alike")
REPORT = Report(
    method="blocks",
    solver="Annealing",
    recipe="errors propagated",
    layers=[LAYER, LayerReport(**{**vars(LAYER), "name": "head", "learned": False, "note": "kept nearest"})],
    skipped=[("embedding", "Embedding", "not supported")],
    trials=[RecipeTrial("errors not propagated", 0.5)],
    blocks=[BLOCK],
    output_error=0.04,
    seconds={"total": 2.0},
)


def test_json_holds_everything():
    back = json.loads(REPORT.to_json())
    assert back["layers"][0] == {**vars(LAYER), "tied": [], "shape": [4, 3, 3, 3]}
    assert back["skipped"] == [["embedding", "Embedding", "not supported"]]
    assert back["trials"] == [{"recipe": "errors not propagated", "output_error": 0.5, "note": "", "taken": False}]
    assert back["blocks"] == [{**vars(BLOCK), "layers": ["blocks.0.conv", "head"]}]
    assert back["finetuning"] is None
    assert set(back) == {"format", "version", *vars(REPORT)}
    assert "\n" not in REPORT.to_json(indent=None)


def test_json_is_read_back_as_the_same_report():
    whole = replace(REPORT, finetuning=BLOCK, settings={"seed": "0"}, versions={"torch": "2.13"})
    for report in (REPORT, whole):
        assert Report.from_json(report.to_json()) == report
    assert Report.from_json(REPORT.to_json(indent=None)).layers[0].shape == (4, 3, 3, 3)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda data: {**data, "format": "another"}, "has the format 'another'"),
        (lambda data: {**data, "version": 2}, "has the version 2"),
        (lambda data: [data], "has the format None"),
        (lambda data: {name: value for name, value in data.items() if name != "layers"}, "lacks 'layers'"),
        (lambda data: {**data, "extra": 1}, "does not belong there"),
        (lambda data: {**data, "method": 3}, r"adaround report\.method: 3 does not belong there"),
        (lambda data: {**data, "layers": {}}, r"adaround report\.layers: {} does not"),
        (lambda data: {**data, "skipped": [["a", "b"]]}, r"skipped\[0\]: \['a', 'b'\] does not"),
        (lambda data: {**data, "seconds": {"total": "long"}}, r"seconds\['total'\]: 'long' does not"),
        (lambda data: {**data, "seconds": []}, r"seconds: \[\] does not"),
        (lambda data: {**data, "layers": [{**data["layers"][0], "bits": True}]}, r"layers\[0\]\.bits: True does not"),
        (lambda data: {**data, "blocks": [3]}, r"blocks\[0\]: 3 does not"),
    ],
)
def test_what_is_no_report_is_refused(change, told):
    with pytest.raises(InvalidOptionError, match=told):
        Report.from_json(json.dumps(change(json.loads(REPORT.to_json()))))


@pytest.mark.parametrize("text", ["", "{", None, b"\xff"])
def test_what_is_no_json_is_refused(text):
    with pytest.raises(InvalidOptionError, match="is not JSON"):
        Report.from_json(text)


def test_the_table_has_a_line_per_layer_and_says_what_was_left_out():
    lines = str(REPORT).splitlines()
    assert lines[0].split()[:5] == ["layer", "op", "weight", "bits", "nearest"]
    assert lines[1].split()[:8] == ["blocks.0.conv", "Conv2d", "4x3x3x3", "3", "0.0123", "0.00235", "-", "-"]
    assert lines[2].endswith("kept nearest")
    assert "skipped embedding (Embedding): not supported" in lines
    assert any("tried errors not propagated" in line and "0.5" in line for line in lines)
    told = ("blocks", "1 of 2 layers", "Annealing", "errors propagated", "output error 0.04", "total 2.0 s")
    assert all(one in lines[-1] for one in told)


def test_what_was_learned_on_samples_has_a_table_of_its_own():
    finetuned = BlockReport("network", ("blocks.0.conv", "head"), 0.25, 0.2, iterations=7)
    lines = str(replace(REPORT, finetuning=finetuned)).splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("learned on samples"))
    assert head == 3
    assert lines[head + 1].split()[:7] == ["blocks.0", "2", "0.5", "0.25", "-", "-", "300"]
    assert lines[head + 1].endswith("entries weighed alike")
    assert lines[head + 2].split()[:7] == ["network", "2", "0.25", "0.2", "-", "-", "7"]
    assert not any(line.startswith("learned on samples") for line in str(replace(REPORT, blocks=[])).splitlines())


def test_columns_of_the_table_are_aligned():
    lines = str(REPORT).splitlines()[:3]
    assert len({line.index(word) for line, word in zip(lines, ("op", "Conv2d", "Conv2d"), strict=True)}) == 1


def test_an_empty_report_can_be_printed():
    assert "0 of 0 layers" in str(Report("nearest", "Nearest", "plain", [], []))


def test_a_report_can_be_pickled():
    assert pickle.loads(pickle.dumps(REPORT)) == REPORT


def test_the_report_is_found_in_the_model_s_meta():
    model = fx.symbolic_trace(nn.ReLU())
    model.meta[KEY] = REPORT
    assert get_report(model) is REPORT


@pytest.mark.parametrize("model", [nn.Linear(1, 1), fx.symbolic_trace(nn.Sequential(nn.ReLU())), torch.relu])
def test_a_model_without_a_report_is_refused(model):
    with pytest.raises(InvalidModelError, match=r"carries no AdaRound report.*adaround\(\.\.\.\) returned"):
        get_report(model)
